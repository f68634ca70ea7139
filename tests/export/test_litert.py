"""LiteRT artifacts say what torch says. The converter is installed in an environment of its own: make test-litert."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from conftest import randomise
from dense_networks import dense_weights
from mobilevit.cli import main
from mobilevit.export import Target, export, load_artifact
from mobilevit.export.artifact import Deployed, deployed
from mobilevit.export.verify import as_arrays, synthetic_images
from mobilevit.images import Preprocessing
from mobilevit.models.mobilevit import ARCHITECTURES, MobileViT
from mobilevit.weights import TaskName, Weights, write

NAME = "mobilevit.export.litert"


@pytest.fixture(scope="module")
def litert() -> ModuleType:
    module = pytest.importorskip(NAME)
    try:
        module._check_converter()
    except ValueError as error:
        pytest.skip(str(error))
    return module


@pytest.fixture(scope="module")
def weights() -> Weights:
    torch.manual_seed(0)
    model = randomise(MobileViT("xxs", num_classes=7))
    preprocessing = Preprocessing(resize_px=72, crop_px=64, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    return Weights(ARCHITECTURES["xxs"], model.state_dict(), preprocessing, tuple("abcdefü"))


@pytest.fixture
def unable(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module as it is where nothing of LiteRT needs to be installed."""
    for name in ("ai_edge_litert", "ai_edge_litert.interpreter", "ai_edge_litert.tools", "flatbuffers"):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    spec = importlib.util.find_spec(NAME)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("version", "reason"), [("2.15.0+cpu", "and this is 2.15.0"), ("2.14.1", "and litert_torch is not installed")]
)
def test_without_converter_says_what_to_do(
    unable: ModuleType, version: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setitem(sys.modules, "litert_torch", None)
    path = tmp_path / "model.tflite"
    with pytest.raises(ValueError, match=f"torch below 2.15, {reason}") as caught:
        unable.write(MobileViT("xxs"), Target("fp32", 64, 64), path, {}, ())
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith("python3 -m venv .venv-litert && .venv-litert/bin/pip install 'mobilevit[litert]'")
    assert not path.exists()


def test_fp32(litert: ModuleType, weights: Weights, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (artifact,) = export(weights, ["litert"], tmp_path, source="here", num_threads=1)
    assert capfd.readouterr() == ("", "")
    assert artifact.agreement is not None
    assert artifact.agreement.error < 1e-4
    assert artifact.operators.num_operators > 300
    assert artifact.operators.outside == ()
    metadata = litert.read_metadata(artifact.path)
    assert metadata["architecture"] == "xxs"
    assert metadata["source"] == "here"
    assert "ü" in metadata["class_names"]
    (source,) = litert._interpreter(artifact.path, 1).get_signature_list().values()
    assert source == {"inputs": ["images"], "outputs": ["logits"]}
    (logits,) = load_artifact(artifact.path)(np.zeros((1, 3, 64, 64), np.float32))
    assert logits.shape == (1, 7)
    _assert_aligned(litert, artifact.path)


def test_uint8_batch_and_odd_size(litert: ModuleType, weights: Weights, tmp_path: Path) -> None:
    (artifact,) = export(weights, ["litert"], tmp_path, size=(75, 98), batch_size=2, uint8=True, num_threads=1)
    assert artifact.agreement is not None
    assert artifact.agreement.error < 1e-4
    (logits,) = load_artifact(artifact.path)(np.zeros((2, 75, 98, 3), np.uint8))
    assert logits.shape == (2, 7)


def test_fp16(litert: ModuleType, weights: Weights, tmp_path: Path) -> None:
    (artifact,) = export(weights, ["litert"], tmp_path, precision="fp16", num_threads=1)
    assert artifact.agreement is not None
    assert artifact.agreement.error < 0.02
    assert artifact.operators.outside == ()
    assert artifact.num_bytes < 0.55 * _num_bytes_of_weights(weights)


def test_int8(litert: ModuleType, weights: Weights, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # Past `export`, which asks for the same answers: those of random weights are too close to each other for that.
    network = Deployed(weights.build(), weights.preprocessing, uint8=False).eval()
    path = tmp_path / "model.tflite"
    inputs = [weights.preprocessing(image)[None] for image in synthetic_images(24, (80, 90), seed=1)]
    litert.write(network, Target("int8", 64, 64), path, {"precision": "int8"}, inputs)
    run = litert.load(path, num_threads=1)
    assert litert.operators(path).outside == ()
    assert capfd.readouterr() == ("", "")
    found = np.concatenate([run(x.numpy())[0] for x in inputs])
    with torch.inference_mode():
        expected = torch.cat([network(x) for x in inputs]).numpy()
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.9
    assert path.stat().st_size < 0.31 * _num_bytes_of_weights(weights)
    assert litert.read_metadata(path) == {"precision": "int8"}
    _assert_aligned(litert, path)


def test_from_the_command_line(litert: ModuleType, weights: Weights, tmp_path: Path) -> None:
    # Here the command line runs with an older tyro than elsewhere: the converter allows no newer one.
    file = tmp_path / "weights.safetensors"
    write(weights, file, "mobilevit")
    with pytest.raises(SystemExit) as stop:
        main(["export", str(file), "--to", "litert", "--out", str(tmp_path), "--uint8"])
    assert stop.value.code == 0
    assert litert.read_metadata(tmp_path / "weights_64x64_fp32_uint8.tflite")["source"] == str(file)


def test_what_is_no_model_is_refused(litert: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "model.tflite"
    path.write_bytes(b"no model at all, but some bytes of text")
    with pytest.raises(ValueError, match=r"model.tflite: LiteRT does not take it"):
        litert.operators(path)


def test_detector(litert: ModuleType, tmp_path: Path) -> None:
    dense = dense_weights("detect")
    for size in ((64, 64), (75, 98)):
        (artifact,) = export(dense, ["litert"], tmp_path, size=size, num_threads=1)
        assert artifact.agreement is not None
        assert artifact.agreement.error < 1e-3
        # XNNPACK puts together five tensors at most, and a detector has six maps.
        assert set(artifact.operators.outside) == {"CONCATENATION"}
        (names,) = litert._interpreter(artifact.path, 1).get_signature_list().values()
        assert set(names["outputs"]) == set(artifact.target.outputs)
    with pytest.raises(ValueError, match="litert has no NMS"):
        export(dense, ["litert"], tmp_path, answers=True)


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_dense_int8(litert: ModuleType, task: TaskName, tmp_path: Path) -> None:
    dense = dense_weights(task)
    target = Target("int8", 64, 64, task=task)
    network, path = deployed(dense, target), tmp_path / "model.tflite"
    inputs = [torch.from_numpy(p).permute(2, 0, 1)[None] / 255 for p in synthetic_images(24, (64, 64), seed=1)]
    litert.write(network, target, path, {}, inputs)
    assert set(litert.operators(path).outside) <= {"CONCATENATION"}
    for found, expected in zip(litert.load(path, 1)(inputs[0].numpy()), as_arrays(network(inputs[0])), strict=True):
        assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.8


def _num_bytes_of_weights(weights: Weights) -> int:
    return sum(4 * tensor.numel() for tensor in weights.tensors.values())


def _assert_aligned(litert: ModuleType, path: Path) -> None:
    model = litert.schema.Model.GetRootAs(path.read_bytes(), 0)
    buffers = [model.Buffers(i) for i in range(model.BuffersLength())]
    starts = [buffer._tab.Vector(buffer._tab.Offset(4)) for buffer in buffers if buffer.DataLength()]
    assert len(starts) > 100
    assert all(start % 16 == 0 for start in starts)
