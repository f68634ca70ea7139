"""`export`: file names, inputs, metadata, calibration, and the checks that reject a wrong artifact."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mobilevit.benchmark import timing
from mobilevit.export import ArtifactSpec, ExportOptions, Operators, export, export_each, installed, load_artifact
from mobilevit.export.artifact import ExportModel
from mobilevit.export.verify import synthetic_images
from mobilevit.export_options import ARTIFACT_SUFFIXES
from mobilevit.files import MissingExtraError
from mobilevit.images import ImageError
from mobilevit.weights import Weights


class FakeBackend(ModuleType):
    """A backend whose artifacts return torch's outputs, changed by `change`."""

    PRECISIONS = ("fp32", "fp16", "int8")
    DYNAMIC = ("batch",)
    POSTPROCESS_TASKS = ()

    def __init__(self) -> None:
        super().__init__("mobilevit.export.fake")
        self.change = lambda logits: logits
        self.shapes: set[tuple[int, ...]] = set()
        self.calibration: dict[str, Sequence[Tensor]] = {}

    def write(self, network, spec, path, metadata, calibration) -> None:
        self.network, self.metadata = network, metadata
        self.calibration[spec.precision] = calibration
        path.write_text(spec.precision)

    def load(self, path: Path, num_threads: int):
        def infer(images: np.ndarray) -> tuple[np.ndarray, ...]:
            self.shapes.add(images.shape)
            with torch.no_grad():
                return (self.change(self.network(torch.from_numpy(images)).numpy()),)

        return infer

    def operators(self, path: Path) -> Operators:
        return Operators(1, ())


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeBackend:
    backend = FakeBackend()
    monkeypatch.setitem(sys.modules, "mobilevit.export.fake", backend)
    monkeypatch.setitem(ARTIFACT_SUFFIXES, "fake", ".fake")
    return backend


def test_existing_files(weights: Weights, fake: FakeBackend, tmp_path: Path):
    [artifact] = export(weights, ["fake"], tmp_path, prefix="pets")
    assert artifact.path == tmp_path / "pets_64x64_fp32.fake"
    first = fake.network
    with pytest.raises(ValueError, match="--overwrite") as error:
        export(weights, ["fake"], tmp_path, prefix="pets")
    assert str(artifact.path) in str(error.value)
    assert fake.network is first  # nothing was converted
    export(weights, ["fake"], tmp_path, ExportOptions(overwrite=True), prefix="pets")
    assert fake.network is not first


@pytest.mark.parametrize("uint8", [False, True])
def test_input(weights: Weights, fake: FakeBackend, uint8: bool, tmp_path: Path):
    image = Image.fromarray(synthetic_images(1, (90, 100))[0])
    export(weights, ["fake"], tmp_path, ExportOptions(uint8=uint8), images=[image])
    normalized = weights.preprocessing(image)[None]
    pixels = np.array(weights.preprocessing.resize_and_crop(image))
    x = torch.from_numpy(pixels)[None] if uint8 else normalized
    torch.testing.assert_close(fake.network(x), weights.build()(normalized), rtol=1e-4, atol=1e-4)
    export(weights, ["fake"], tmp_path, ExportOptions(size=(75, 130)), images=[image])
    assert (1, 3, 75, 130) in fake.shapes


def test_uint8_normalization(weights: Weights):
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(1, 16, 16, 3)
    model = ExportModel(torch.nn.Identity(), weights.preprocessing, uint8=True)
    expected = weights.preprocessing.scale(pixels.permute(0, 3, 1, 2))
    torch.testing.assert_close(model(pixels), expected, rtol=0, atol=2e-6)


def test_the_last_batch_is_filled_up(weights: Weights, fake: FakeBackend, tmp_path: Path):
    images = synthetic_images(6, (64, 64))
    [artifact] = export(weights, ["fake"], tmp_path, ExportOptions(batch_size=4), images=images)
    assert fake.shapes == {(4, 3, 64, 64)}
    assert artifact.agreement is not None
    assert (artifact.agreement.num_predictions, artifact.agreement.prediction_unit) == (6, "images")
    assert artifact.agreement.prediction_agreement == 1
    assert artifact.agreement.max_error < 1e-5


def test_dynamic_batch_is_checked_at_two_sizes(weights: Weights, fake: FakeBackend, tmp_path: Path):
    export(weights, ["fake"], tmp_path, ExportOptions(dynamic_batch=True))
    assert {shape[0] for shape in fake.shapes} == {1, 3}
    fake.change = lambda logits: logits if len(logits) == 1 else logits + 1
    with pytest.raises(ValueError, match="differ from torch"):
        export(weights, ["fake"], tmp_path / "other", ExportOptions(dynamic_batch=True))


@pytest.mark.parametrize(
    ("precision", "change", "message"),
    [
        ("fp32", lambda x: x + 0.01, r"logits.* 0\.\d+ .*0\.001"),
        ("fp32", lambda x: x * np.nan, "nan"),
        ("int8", lambda x: -x, r"only [\d.]+ % of 12 images.* 90 %"),
    ],
)
def test_a_wrong_artifact_is_not_written(
    weights: Weights, fake: FakeBackend, tmp_path: Path, precision: Any, change: Any, message: str
):
    images, options = synthetic_images(12, (64, 64)), ExportOptions(precision, overwrite=True)
    [good] = export(weights, ["fake"], tmp_path, options, images=images)
    before = good.path.stat().st_mtime_ns
    fake.change = change  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match=f"fake {precision}.*{message}"):
        export(weights, ["fake"], tmp_path, options, images=images)
    assert list(tmp_path.iterdir()) == [good.path]
    assert good.path.stat().st_mtime_ns == before


def test_earlier_artifacts_stay(weights: Weights, fake: FakeBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wrong = FakeBackend()
    wrong.change = lambda x: -x  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "mobilevit.export.wrong", wrong)
    monkeypatch.setitem(ARTIFACT_SUFFIXES, "wrong", ".wrong")
    artifacts = export_each(
        weights, ["fake", "wrong"], tmp_path, ExportOptions(), images=(), data=None, source="", prefix=""
    )
    first = next(artifacts)
    with pytest.raises(ValueError, match="wrong fp32"):
        next(artifacts)
    assert list(tmp_path.iterdir()) == [first.path]


def test_metadata(weights: Weights, fake: FakeBackend, tmp_path: Path):
    export(weights, ["fake"], tmp_path, source="a/b.safetensors")
    assert json.loads(fake.metadata["class_names"]) == list(weights.class_names)
    preprocessing = weights.preprocessing.to_dict() | {"scaled_inside": False}
    assert json.loads(fake.metadata["preprocessing"]) == json.loads(json.dumps(preprocessing))
    assert (fake.metadata["source"], fake.metadata["precision"]) == ("a/b.safetensors", "fp32")


def test_calibration_images_are_evenly_spaced(weights: Weights, fake: FakeBackend, tmp_path: Path):
    images = [np.full((64, 64, 3), i // 4, np.uint8) for i in range(1000)]
    export(weights, ["fake"], tmp_path, ExportOptions("int8", uint8=True), images=images)
    levels = [int(x[0, 0, 0, 0]) for x in fake.calibration["int8"]]
    assert len(levels) == 256
    assert levels == sorted(levels)
    assert (levels[0], levels[-1]) == (0, 249)
    assert not fake.calibration["fp32"]


@pytest.mark.parametrize(
    ("backend", "options", "message"),
    [
        ("fakes", {}, "no backend 'fakes'.* onnx, executorch"),
        (None, {}, "no backend is given.* onnx"),
        ("fake", {"precision": "bf16"}, "fake .*bf16.* fp32, fp16, int8"),
        ("fake", {"dynamic_size": True, "size": (96, 96)}, "leave out --dynamic-size"),
        ("executorch", {"dynamic_batch": True}, "leave out --dynamic-batch"),
        ("onnx", {"dynamic_size": True}, "64 x 64 px.* 65 px"),
        ("fake", {"size": (16, 64)}, "16 x 64 px.* 32 px"),
        ("fake", {"size": (64, 64, 64)}, r"size is \(64, 64, 64\)"),
        ("fake", {"postprocess": True}, "'classify'.* leave out --postprocess"),
        ("fake", {"batch_size": 0}, "batch size is 0"),
        ("fake", {"num_threads": 0}, "num threads is 0"),
        ("fake", {"precision": "int8"}, "int8 .*--images"),
        ("onnx", {"browser": True}, "--browser .* not of onnx in fp32; leave it out"),
        ("fake", {"browser": True, "precision": "int8"}, "--browser .* not of fake in int8"),
    ],
)
def test_refused(weights: Weights, fake: FakeBackend, tmp_path: Path, backend: str, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        export(weights, [backend] if backend else [], tmp_path, ExportOptions(**options))
    assert not list(tmp_path.iterdir())


def test_unusable_weights_and_images(weights: Weights, fake: FakeBackend, tmp_path: Path):
    features = replace(
        weights, tensors={k: v for k, v in weights.tensors.items() if not k.startswith("classifier")}, class_names=()
    )
    with pytest.raises(ValueError, match="no classifier"):
        export(features, ["fake"], tmp_path)
    with pytest.raises(ImageError, match=r"none\.png"):
        export(weights, ["fake"], tmp_path, images=[tmp_path / "none.png"])


@pytest.mark.parametrize(
    ("backend", "module", "fix"),
    [("onnx", "onnxruntime", r"'mobilevit\[onnx\]'"), ("litert", "flatbuffers", "python3 -m venv .venv-litert &&")],
)
def test_missing_packages(weights: Weights, backend: str, module: str, fix: str, monkeypatch: Any, tmp_path: Path):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"mobilevit.export.{backend}", raising=False)
    assert not installed(backend)
    with pytest.raises(MissingExtraError, match=f"{backend} requires {module}.*{fix}"):
        export(weights, [backend], tmp_path)


def test_int8_is_timed_against_fp32(weights: Weights, fake: FakeBackend, tmp_path: Path, monkeypatch: Any):
    seconds, now = {"int8": 0.004, "fp32": 0.012}, [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    load = fake.load

    def load_slow(path: Path, num_threads: int):
        infer, precision = load(path, num_threads), path.read_text()

        def timed(images: np.ndarray) -> tuple[np.ndarray, ...]:
            now[0] += seconds[precision]
            return infer(images)

        return timed

    fake.load = load_slow
    images = synthetic_images(3, (64, 64))
    [artifact] = export(weights, ["fake"], tmp_path, ExportOptions("int8"), images=images)
    assert artifact.path.read_text() == "int8"
    assert artifact.latency_ms == pytest.approx(4)
    assert artifact.speedup_over_fp32 == pytest.approx(3)
    [artifact] = export(weights, ["fake"], tmp_path)
    assert (artifact.latency_ms, artifact.speedup_over_fp32) == (pytest.approx(12), None)


def test_load_artifact_refuses(tmp_path: Path):
    with pytest.raises(ValueError, match=r"none\.onnx: no such file"):
        load_artifact(tmp_path / "none.onnx")
    (tmp_path / "x.pt").touch()
    with pytest.raises(ValueError, match=r"x\.pt: .*\.onnx, \.pte"):
        load_artifact(tmp_path / "x.pt")


def test_example_input():
    assert ArtifactSpec("fp32", 64, 96, batch_size=3).example().shape == (3, 3, 64, 96)
    example = ArtifactSpec("fp32", 64, 96, dynamic_batch=True, uint8=True).example()
    assert (example.shape, example.dtype) == ((2, 64, 96, 3), torch.uint8)
