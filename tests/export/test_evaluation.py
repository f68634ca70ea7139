"""Metrics of artifacts in their runtimes, compared with those of the same weights in torch."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from command_line import check_refused, run
from labeled_data import labeled, photos
from mobilevit.data.corruptions import Corruption
from mobilevit.export import ExportOptions, export, installed
from mobilevit.export.evaluation import evaluate_artifact
from mobilevit.export.verify import synthetic_images
from mobilevit.tasks.evaluation import EvaluationOptions, evaluate
from mobilevit.weights import Calibration, TaskName, Weights, write

slow = partial(pytest.param, marks=pytest.mark.slow)


def exported(weights: Weights, backend: str, folder: Path, **options: Any) -> Path:
    if not installed(backend):
        pytest.skip(f"{backend} is not installed")
    images = synthetic_images(4, (80, 90))
    [artifact] = export(weights, [backend], folder, ExportOptions(num_threads=1, **options), images=images)
    return artifact.path


@pytest.mark.parametrize(
    ("task", "backend", "options"),
    [
        ("classify", "onnx", {"uint8": True, "batch_size": 3}),
        ("multilabel", "onnx", {}),
        ("detect", "onnx", {}),
        ("segment", "openvino", {}),
        slow("classify", "executorch", {}),
        slow("detect", "openvino", {"postprocess": True}),
        slow("segment", "executorch", {}),
        slow("classify", "litert", {}),
    ],
)
def test_metrics_of_torch(
    task: TaskName, backend: str, options: dict[str, Any], all_weights: dict[str, Weights], tmp_path: Path
):
    data = labeled(task, tmp_path / "data")
    weights = {**all_weights, "multilabel": replace(all_weights["classify"], task="multilabel")}[task]
    if task == "classify":
        weights = replace(weights, calibration=Calibration(2.0))
    expected = evaluate(weights, data)
    found = evaluate_artifact(exported(weights, backend, tmp_path, **options), data)
    assert (found.split, found.size_px) == (expected.split, 64)
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-3, abs=1e-3)
    for row, of_torch in zip(found.per_class, expected.per_class, strict=True):
        assert row.class_name == of_torch.class_name
        assert row.metrics.keys() == of_torch.metrics.keys()
        for name, value in of_torch.metrics.items():  # None: undefined for the class
            assert row.metrics[name] == (value if value is None else pytest.approx(value, rel=1e-3, abs=1e-3))


def test_other_sizes_corruptions_and_images_of_another_source(weights: Weights, tmp_path: Path):
    data = photos(tmp_path / "data")
    path = exported(weights, "onnx", tmp_path, dynamic_size=True, size=(96,))
    (tmp_path / "other").mkdir()
    for i, pixels in enumerate(synthetic_images(5, (80, 64), seed=7)):
        Image.fromarray(pixels).save(tmp_path / f"other/{i}.png")
    for size_px, corruption in ((96, None), (70, None), (70, Corruption("contrast", 3))):
        options: dict[str, Any] = {"corruption": corruption, "ood": None if corruption else tmp_path / "other"}
        expected = evaluate(weights, data, size_px=size_px, **options)
        found = evaluate_artifact(path, data, size_px=size_px, options=EvaluationOptions(**options))
        assert found.size_px == size_px
        assert found.metrics == pytest.approx(expected.metrics, rel=1e-3, abs=1e-3)
    assert evaluate_artifact(path, data).size_px == 96


def test_command_line(
    weights: Weights, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "data")
    # Data without splits are divided as in training; the artifact contains what is needed for that.
    weights = replace(weights, training={"recipe": {"data": {"val_fraction": 0.3}}})
    write(weights, tmp_path / "w.safetensors")
    path = exported(weights, "onnx", tmp_path)
    for split, num_images in (("val", 4), ("all", 11)):
        command = f"evaluate w.safetensors {path.name} --data data --num-workers 0"
        assert run(f"{command} --split {split} --json --device cpu") == 0
        ours, theirs = (json.loads(line) for line in capsys.readouterr().out.splitlines())
        assert (ours.pop("weights"), theirs.pop("weights")) == ("w.safetensors", path.name)
        assert (ours.pop("split"), theirs.pop("split")) == (split, split)
        assert theirs == pytest.approx(ours, rel=1e-3, abs=1e-3)
        assert theirs["num_images"] == num_images
    assert run(f"evaluate {path.name} --data data --num-workers 0") == 0
    assert f"{theirs['loss']:.3f}" in capsys.readouterr().out

    wide = exported(weights, "onnx", tmp_path, size=(64, 96)).name
    unnamed = exported(replace(weights, class_names=()), "onnx", tmp_path / "unnamed")
    import onnx  # not in the environment of LiteRT

    other = onnx.load(path)
    del other.metadata_props[:]
    onnx.save(other, tmp_path / "other.onnx")
    Path("text.onnx").write_text("no model")
    for args, facts in {
        f"{path.name} --knn --k 1": f"{path.name} --knn features weights",
        f"{path.name} --device cuda": "--device cuda CPU leave out",
        f"{path.name} --size 96": f"--size 96 {path.name} 64 x leave out --size",
        wide: f"{wide} 64 x 96 square --size 96",
        "other.onnx": "other.onnx 'task' export",
        "text.onnx": "text.onnx not an ONNX model",
        "nothere.onnx": "nothere.onnx no such file",
        str(unnamed): "no class names",
    }.items():
        check_refused(capsys, f"evaluate {args} --data data --num-workers 0", facts)
