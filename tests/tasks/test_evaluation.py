"""`mobilevit.evaluate` against `mobilevit evaluate`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import nn

import mobilevit
from mobilevit.cli import main
from mobilevit.images import Preprocessing
from mobilevit.predict import Classifier
from mobilevit.weights import read
from small_networks import randomize


@pytest.fixture
def here(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    for name in ("x/0", "x/1", "y/0", "y/1", "y/2"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (40, 36, 3), np.uint8)).save(tmp_path / "data" / f"{name}.png")
    model = randomize(Classifier("xxs", num_classes=2))
    model.class_names, model.preprocessing = ("x", "y"), Preprocessing(36, 32)
    mobilevit.save(model, tmp_path / "xy.safetensors")
    return tmp_path


@pytest.mark.parametrize("size_px", [None, 48])
def test_same_as_the_command(here: Path, capsys: pytest.CaptureFixture[str], size_px: int | None):
    data, file = str(here / "data"), here / "xy.safetensors"
    size = ["--size", str(size_px)] if size_px else []
    with pytest.raises(SystemExit):
        main(["evaluate", str(file), "--data", data, "--json", "--per-class", "--num-workers", "0", *size])
    line = json.loads(capsys.readouterr().out)
    for weights in (str(file), file, read(file)):
        result = mobilevit.evaluate(weights, data, size_px=size_px, batch_size=5)
        assert result.size_px == line["size_px"] == (size_px or 32)
        assert result.metrics == pytest.approx({name: line[name] for name in result.metrics}, rel=1e-6)
        assert [row.as_dict() for row in result.per_class] == line["classes"]
    assert result.metrics["num_images"] == 5


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weights": nn.Linear(2, 2)}, TypeError, "Linear.*mobilevit.save"),
        ({"weights": "missing.pt"}, ValueError, "missing.pt: no such file"),
        ({"data": "missing"}, ValueError, "missing: no such folder"),
        ({"device": "tpu9"}, ValueError, "device 'tpu9' cannot be used here"),
        ({"size_px": 8}, ValueError, "size is 8; it must be 32 px or more"),
    ],
)
def test_invalid_arguments(here: Path, change: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        mobilevit.evaluate(**{"weights": here / "xy.safetensors", "data": here / "data", **change})
