"""Predictions of artifacts in each installed runtime, compared with those of the network in torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from mobilevit.export import ExportOptions, export, installed
from mobilevit.export.predictor import ArtifactClassifier, ArtifactDetector, ArtifactSegmenter, load_predictor
from mobilevit.export.verify import synthetic_images
from mobilevit.images import Preprocessing
from mobilevit.predict import Classifier, Detector, Segmenter
from mobilevit.weights import Calibration, Weights

IMAGES = [Image.fromarray(image) for image in synthetic_images(3, (90, 75))]
slow = partial(pytest.param, marks=pytest.mark.slow)


def exported(weights: Weights, backend: str, out: Path, **options) -> Path:
    if not installed(backend):
        pytest.skip(f"{backend} is not installed")
    [artifact] = export(weights, [backend], out, ExportOptions(num_threads=1, **options), images=IMAGES)
    return artifact.path


@pytest.mark.parametrize("backend", ["onnx", "openvino", "litert", slow("executorch")])
def test_classes(weights: Weights, backend: str, tmp_path: Path):
    """Three images in batches of two, for ONNX as uint8 pixels; with a calibration."""
    weights = replace(weights, calibration=Calibration(2.5, min_probability=0.2, min_precision=0.9))
    path = exported(weights, backend, tmp_path, batch_size=2, uint8=backend == "onnx")
    model = load_predictor(path)
    assert isinstance(model, ArtifactClassifier)
    assert model.calibration == weights.calibration
    expected = Classifier.from_weights(weights).predict(IMAGES, top_k=7)
    for found, wanted in zip(model.predict(IMAGES, top_k=7), expected, strict=True):
        assert found[0].class_name == wanted[0].class_name
        assert [p.rejected for p in found] == [p.rejected for p in wanted]
        by_class = {p.class_name: p.probability for p in found}
        assert by_class == pytest.approx({p.class_name: p.probability for p in wanted}, abs=1e-4)


@pytest.mark.parametrize(
    ("backend", "postprocess"),
    [
        ("onnx", True),
        ("openvino", False),
        ("litert", False),
        slow("onnx", False),
        slow("openvino", True),
        slow("executorch", False),
    ],
)
def test_boxes(all_weights: dict[str, Weights], backend: str, postprocess: bool, tmp_path: Path):
    weights = all_weights["detect"]
    model = load_predictor(exported(weights, backend, tmp_path, postprocess=postprocess))
    assert isinstance(model, ArtifactDetector)
    assert (model.category_ids, model.num_classes) == (weights.category_ids, 7)
    expected = Detector.from_weights(weights).predict(IMAGES, score_threshold=0.35)
    assert any(expected)
    num_same = 0
    for found, wanted in zip(model.predict(IMAGES, score_threshold=0.35), expected, strict=True):
        for one in found:  # boxes of nearly equal scores may be in another order
            num_same += any(
                (one.class_name, one.class_index) == (other.class_name, other.class_index)
                and one.score == pytest.approx(other.score, abs=1e-4)
                and one.box == pytest.approx(other.box, abs=0.02)
                for other in wanted
            )
        assert abs(len(found) - len(wanted)) <= 1
    assert num_same >= 0.98 * sum(map(len, expected)) > 20
    if postprocess:
        with pytest.raises(ValueError, match=r"score threshold is 0\.001.*--postprocess"):
            model.predict(IMAGES, score_threshold=0.001)


@pytest.mark.parametrize(
    ("backend", "postprocess"),
    [("onnx", False), slow("onnx", True), slow("openvino", False), slow("executorch", False)],
)
def test_masks(all_weights: dict[str, Weights], backend: str, postprocess: bool, tmp_path: Path):
    weights = all_weights["segment"]
    model = load_predictor(exported(weights, backend, tmp_path, postprocess=postprocess))
    assert isinstance(model, ArtifactSegmenter)
    for found, wanted in zip(model.predict(IMAGES), Segmenter.from_weights(weights).predict(IMAGES), strict=True):
        assert found.shape == wanted.shape == (90, 75)
        assert (found == wanted).mean() > (
            0.97 if postprocess else 0.999
        )  # a class map is coarser at borders between classes


def test_another_size(weights: Weights, tmp_path: Path):
    model = load_predictor(exported(weights, "onnx", tmp_path, size=(96, 96)))
    larger = replace(weights, preprocessing=weights.preprocessing.at_size(96))
    assert isinstance(model, ArtifactClassifier)
    found, expected = model.predict(IMAGES), Classifier.from_weights(larger).predict(IMAGES)
    assert [p[0].probability for p in found] == pytest.approx([p[0].probability for p in expected], abs=1e-4)


def fake(monkeypatch: pytest.MonkeyPatch, metadata: dict[str, str], load: Callable[..., object]) -> None:
    backend = ModuleType("mobilevit.export.coreml")
    backend.__dict__.update(read_metadata=lambda path: metadata, load=load)
    monkeypatch.setitem(sys.modules, "mobilevit.export.coreml", backend)


def test_what_cannot_be_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    path = tmp_path / "a.mlpackage"
    path.mkdir()
    fake(monkeypatch, {}, lambda path, num_threads: None)
    with pytest.raises(ValueError, match=r"a\.mlpackage: .*no 'task'"):
        load_predictor(path)
    metadata = {"task": "classify", "precision": "fp32", "batch_size": "1", "outputs": "logits", "num_classes": "1"}
    preprocessing = Preprocessing().to_dict() | {"scaled_inside": False}
    metadata |= {"preprocessing": json.dumps(preprocessing), "class_names": "[]"}
    fake(monkeypatch, metadata, lambda path, num_threads: None)
    with pytest.raises(ValueError, match=r"a\.mlpackage: .*no 'size'"):
        load_predictor(path)
    fake(monkeypatch, metadata | {"size": "256 256"}, lambda path, num_threads: None)
    with pytest.raises(ValueError, match=r"a\.mlpackage: .*Apple systems.* --to onnx"):
        load_predictor(path)
    with pytest.raises(ValueError, match=r"missing\.onnx: no such file"):
        load_predictor(tmp_path / "missing.onnx")
