"""LiteRT artifacts in the LiteRT interpreter, compared with torch: make test-litert, in its own environment."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from mobilevit.cli import main
from mobilevit.export import ArtifactSpec, ExportOptions, export
from mobilevit.export.artifact import build_export_model
from mobilevit.export.verify import synthetic_images
from mobilevit.models.mobilevit import MobileViT
from mobilevit.weights import Weights, write
from reference_runtimes import assert_metadata, difference, normalized, run_artifact, torch_outputs

NAME = "mobilevit.export.litert"


@pytest.fixture(scope="module")
def litert() -> ModuleType:
    module = pytest.importorskip(NAME)
    try:
        module._check_converter()
    except ValueError as error:
        pytest.skip(str(error))
    return module


@pytest.fixture
def litert_without_packages(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, importable without any package of LiteRT."""
    for name in ("ai_edge_litert", "ai_edge_litert.interpreter", "ai_edge_litert.tools", "flatbuffers"):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    spec = importlib.util.find_spec(NAME)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("version", "reason"), [("2.15.0+cpu", "torch is 2.15.0"), ("2.14.1", "litert_torch is not installed")]
)
def test_without_converter(
    litert_without_packages: ModuleType, version: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setitem(sys.modules, "litert_torch", None)
    path = tmp_path / "model.tflite"
    with pytest.raises(ValueError, match=f"{reason}.*python3 -m venv .venv-litert &&") as error:
        litert_without_packages.write(MobileViT("xxs"), ArtifactSpec("fp32", 64, 64), path, {}, ())
    assert "\n" not in str(error.value)
    assert not path.exists()


def test_fp32(litert: ModuleType, weights: Weights, export_once: Any, capfd: pytest.CaptureFixture[str]) -> None:
    artifact = export_once("litert")
    assert capfd.readouterr() == ("", "")
    images = synthetic_images(1, (64, 64))
    outputs = run_artifact(artifact.path, normalized(weights, images).numpy())
    assert difference(outputs, torch_outputs(weights, images)) < 1e-4
    assert artifact.operators.num_operators > 30
    assert artifact.operators.fallback == ()
    assert_metadata(litert.read_metadata(artifact.path), weights, "logits")
    assert litert.signature(artifact.path).shape == (1, 3, 64, 64)
    (names,) = litert._interpreter(artifact.path, 1).get_signature_list().values()
    assert names == {"inputs": ["images"], "outputs": ["logits"]}
    _assert_aligned(litert, artifact.path)


def test_uint8_batch_and_odd_size(litert: ModuleType, weights: Weights, export_once: Any) -> None:
    artifact = export_once("litert", size=(75, 98), batch_size=2, uint8=True)
    images = synthetic_images(2, (75, 98))
    assert difference(run_artifact(artifact.path, np.stack(images)), torch_outputs(weights, images)) < 1e-4


def test_fp16(litert: ModuleType, weights: Weights, export_once: Any) -> None:
    artifact = export_once("litert", precision="fp16")
    images = synthetic_images(1, (64, 64))
    outputs = run_artifact(artifact.path, normalized(weights, images).numpy())
    assert difference(outputs, torch_outputs(weights, images)) < 0.02
    assert artifact.operators.fallback == ()
    assert artifact.num_bytes < 0.55 * _num_bytes(weights)


@pytest.mark.parametrize(("task", "min_correlation"), [("classify", 0.9), ("detect", 0.8), ("segment", 0.8)])
def test_int8(
    litert: ModuleType, all_weights: dict[str, Weights], task: Any, min_correlation: float, tmp_path: Path
) -> None:
    # Without `export`, which requires equal predictions: with random weights, scores are too close.
    weights, path = all_weights[task], tmp_path / "model.tflite"
    spec = ArtifactSpec("int8", 64, 64, task=task)
    images = synthetic_images(24, (64, 64), seed=1)
    inputs = [normalized(weights, [image]) for image in images]
    litert.write(build_export_model(weights, spec), spec, path, {"precision": "int8"}, inputs)
    assert set(litert.operators(path).fallback) <= ({"CONCATENATION"} if task == "detect" else set())
    assert litert.read_metadata(path) == {"precision": "int8"}
    _assert_aligned(litert, path)
    actual = zip(*(run_artifact(path, x.numpy()) for x in inputs), strict=True)
    for one, expected in zip(actual, torch_outputs(weights, images), strict=True):
        assert np.corrcoef(np.concatenate(one).ravel(), expected.ravel())[0, 1] > min_correlation
    assert path.stat().st_size < 0.45 * _num_bytes(weights)


def test_from_the_command_line(litert: ModuleType, weights: Weights, tmp_path: Path) -> None:
    # The converter requires an older tyro than the other environment has.
    file = tmp_path / "weights.safetensors"
    write(weights, file, "mobilevit")
    with pytest.raises(SystemExit) as stop:
        main(["export", str(file), "--to", "litert", "--out", str(tmp_path), "--uint8"])
    assert stop.value.code == 0
    assert litert.read_metadata(tmp_path / "weights_64x64_fp32_uint8.tflite")["source"] == str(file)


def test_a_file_that_is_no_model(litert: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "model.tflite"
    path.write_bytes(b"no model at all, but some bytes of text")
    with pytest.raises(ValueError, match=r"model\.tflite: LiteRT cannot load it"):
        litert.operators(path)


@pytest.mark.parametrize("size", [(64, 64), (75, 98)])
def test_detector(
    litert: ModuleType, all_weights: dict[str, Weights], export_once: Any, size: tuple[int, int], tmp_path: Path
) -> None:
    weights, images = all_weights["detect"], synthetic_images(1, size)
    artifact = export_once("litert", "detect", size=size)
    outputs = run_artifact(artifact.path, normalized(weights, images).numpy())
    assert difference(outputs, torch_outputs(weights, images)) < 1e-3
    # XNNPACK concatenates at most five tensors, and a detector has six maps.
    assert set(artifact.operators.fallback) == {"CONCATENATION"}
    with pytest.raises(ValueError, match="litert has no NMS; leave out --postprocess"):
        export(weights, ["litert"], tmp_path, ExportOptions(postprocess=True))


def _num_bytes(weights: Weights) -> int:
    return sum(4 * tensor.numel() for tensor in weights.tensors.values())


def _assert_aligned(litert: ModuleType, path: Path) -> None:
    model = litert.schema.Model.GetRootAs(path.read_bytes(), 0)
    buffers = [model.Buffers(i) for i in range(model.BuffersLength())]
    starts = [buffer._tab.Vector(buffer._tab.Offset(4)) for buffer in buffers if buffer.DataLength()]
    assert len(starts) > 20
    assert all(start % 16 == 0 for start in starts)
