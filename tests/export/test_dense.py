"""Detection and segmentation artifacts in their runtimes, compared with torch: raw and decoded outputs."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mobilevit.export
from dense_networks import segmentation
from mobilevit.export import ExportOptions, export, read_metadata
from mobilevit.export.artifact import NO_LABEL, ArgMax, DecodeBoxes, DetectBoxes
from mobilevit.export.verify import synthetic_images
from mobilevit.models.deeplabv3 import LATER_HEAD
from mobilevit.models.ssdlite import MAX_GROWTH, SIZE_VARIANCE, Detections, SSDLite, decode, detect
from mobilevit.tasks.detection import MAX_PER_IMAGE, SCORE_THRESHOLD
from mobilevit.weights import Weights
from reference_runtimes import assert_metadata, difference, normalized, run_artifact, torch_outputs

SIZES = [(64, 64), (75, 98)]
EXECUTORCH, OPENVINO = (pytest.param(name, marks=pytest.mark.slow) for name in ("executorch", "openvino"))


@pytest.fixture(scope="module")
def detector(all_weights: dict[str, Weights]) -> Weights:
    return all_weights["detect"]


def torch_detections(weights: Weights, images: list[np.ndarray]) -> list[Detections]:
    network: Any = weights.build(SSDLite)
    x = normalized(weights, images)
    with torch.no_grad():
        outputs = network(x)
    limits = {"score_threshold": SCORE_THRESHOLD, "max_per_image": MAX_PER_IMAGE}
    return detect(*outputs, network.anchors(*x.shape[2:]), **limits)  # pyright: ignore[reportCallIssue]


def num_equal(actual: tuple[np.ndarray, ...], expected: Detections) -> int:
    """Expected detections that `actual` (boxes, scores, labels) contains, in any order of equal scores."""
    boxes, scores, labels = actual
    return sum(
        bool(((abs(scores - score) < 1e-4) & (labels == label) & (abs(boxes - box).max(1) < 1e-3)).any())
        for box, score, label in zip(*(x.numpy() for x in expected), strict=True)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Postprocessing modules


@pytest.mark.parametrize("size", SIZES)
def test_decode_boxes(detector: Weights, size: tuple[int, int]):
    network = detector.build(SSDLite).double()
    anchors = network.anchors(*size).double()
    with torch.no_grad():
        logits, locations = network(torch.rand(2, 3, *size, dtype=torch.float64))
        locations = locations * 20  # some of them are clamped
        assert (SIZE_VARIANCE * locations[..., 2:] > MAX_GROWTH).any()
        boxes, scores = DecodeBoxes(anchors)((logits, locations))
    assert (boxes - decode(locations, anchors)).abs().max() < 1e-12
    torch.testing.assert_close(scores, logits.softmax(-1)[..., 1:])


def test_detect_boxes_pads(detector: Weights):
    network = detector.build(SSDLite)
    anchors = network.anchors(64, 64)
    with torch.no_grad():
        logits, locations = network(torch.rand(2, 3, 64, 64))
        logits[1, 5:, 1:] = -20  # few detections in the second image
        boxes, scores, labels = DetectBoxes(DecodeBoxes(anchors))((logits, locations))
        limits = {"score_threshold": SCORE_THRESHOLD, "max_per_image": MAX_PER_IMAGE}
        expected = detect(logits, locations, anchors, **limits)
    assert (boxes.shape, scores.shape, labels.shape) == ((2, 100, 4), (2, 100), (2, 100))
    assert labels.dtype == torch.int32
    assert 0 < len(expected[1].scores) < 100
    for i, one in enumerate(expected):
        n = len(one.scores)
        torch.testing.assert_close(boxes[i, :n], one.boxes)
        torch.testing.assert_close(scores[i, :n], one.scores)
        assert labels[i, :n].tolist() == one.labels.tolist()
        assert (labels[i, n:] == NO_LABEL).all()
        assert not scores[i, n:].any()


def test_arg_max():
    logits = torch.rand(2, 5, 8, 9)
    classes = ArgMax()(logits)
    assert (classes.shape, classes.dtype) == ((2, 8, 9), torch.int32)
    assert torch.equal(logits.gather(1, classes.long()[:, None])[:, 0], logits.amax(1))


def test_nms_in_the_documentation(detector: Weights):
    text = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    [code] = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "def nms(" in block]
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    network = detector.build(SSDLite)
    anchors = network.anchors(75, 98)
    with torch.no_grad():
        outputs = network(torch.rand(1, 3, 75, 98))
        boxes, scores = DecodeBoxes(anchors)(outputs)
        [expected] = detect(*outputs, anchors, score_threshold=0.3, max_per_image=1000)  # pyright: ignore[reportCallIssue]
    actual = namespace["nms"](boxes[0].tolist(), scores[0].tolist())
    assert len(actual) == len(expected.labels) > 20
    assert [label for label, _, _ in actual] == expected.labels.tolist()
    torch.testing.assert_close(torch.tensor([box for _, _, box in actual]), expected.boxes)


# ---------------------------------------------------------------------------------------------------------------------
# Artifacts


@pytest.mark.parametrize(
    ("backend", "task"),
    [
        ("onnx", "detect"),
        ("openvino", "segment"),
        pytest.param("executorch", "detect", marks=pytest.mark.slow),
        pytest.param("executorch", "segment", marks=pytest.mark.slow),
    ],
)
def test_raw_outputs(all_weights: dict[str, Weights], export_once: Any, backend: str, task: str):
    size = SIZES[task == "detect"]
    uint8 = backend != "executorch"  # where it would add operators outside the delegate
    artifact = export_once(backend, task, size=size, uint8=uint8)
    weights, images = all_weights[task], synthetic_images(1, size)
    inputs = np.stack(images) if uint8 else normalized(weights, images).numpy()
    assert difference(run_artifact(artifact.path, inputs), torch_outputs(weights, images)) < 1e-4
    assert artifact.agreement.prediction_agreement > 0.999
    assert artifact.agreement.num_predictions > 100
    assert artifact.path.stem == f"mobilevit_small_{task}_{size[0]}x{size[1]}_fp32{'_uint8' * uint8}"
    assert artifact.operators.fallback == ()
    assert backend != "executorch" or artifact.operators.num_operators == 1
    metadata = read_metadata(artifact.path)
    assert_metadata(metadata, weights, {"detect": "boxes scores", "segment": "logits"}[task])


@pytest.mark.parametrize("backend", ["onnx", OPENVINO])
def test_nms(detector: Weights, export_once: Any, backend: str):
    artifact = export_once(backend, "detect", size=SIZES[1], postprocess=True, batch_size=2, dynamic_batch=True)
    assert artifact.path.stem == "mobilevit_small_detect_75x98_fp32_postprocess"
    assert artifact.agreement.prediction_unit == "boxes"
    images = synthetic_images(3, SIZES[1])
    outputs = run_artifact(artifact.path, normalized(detector, images).numpy())
    expected_types = [((3, 100, 4), "float32"), ((3, 100), "float32"), ((3, 100), "int32")]
    assert [(y.shape, y.dtype.name) for y in outputs] == expected_types
    assert (np.diff(outputs[1], axis=1) <= 0).all()  # by decreasing score
    expected = torch_detections(detector, images)
    equal = sum(num_equal(actual, one) for *actual, one in zip(*outputs, expected, strict=True))  # pyright: ignore[reportArgumentType]
    assert equal > 0.98 * sum(len(one.scores) for one in expected) > 100
    assert json.loads(read_metadata(artifact.path)["nms"])["max_per_image"] == 100


@pytest.mark.parametrize("backend", ["onnx", OPENVINO])
def test_nms_with_padding(detector: Weights, backend: str, tmp_path: Path):
    tensors = {key: tensor.clone() for key, tensor in detector.tensors.items()}
    for i in range(6):
        bias = tensors[f"heads.{i}.out.bias"]
        bias.unflatten(0, (-1, 12))[:, 4] += 11.0  # background, for almost all anchors
    weights, images = replace(detector, tensors=tensors), synthetic_images(1, (64, 64))
    options = ExportOptions(postprocess=True, num_threads=1)
    [artifact] = export(weights, [backend], tmp_path, options, images=synthetic_images(6, (80, 90)))
    boxes, scores, labels = (x[0] for x in run_artifact(artifact.path, normalized(weights, images).numpy()))
    [expected] = torch_detections(weights, images)
    padding = labels == NO_LABEL
    assert abs(int((~padding).sum()) - len(expected.scores)) <= 1 < len(expected.scores) < 100
    assert num_equal((boxes, scores, labels), expected) >= len(expected.scores) - 1
    assert not scores[padding].any()
    assert not boxes[padding].any()
    assert (scores[~padding] > SCORE_THRESHOLD).all()


@pytest.mark.parametrize("backend", ["onnx", "openvino", EXECUTORCH])
def test_class_map(all_weights: dict[str, Weights], export_once: Any, backend: str):
    artifact = export_once(backend, "segment", size=SIZES[1], postprocess=True)
    weights, images = all_weights["segment"], synthetic_images(1, SIZES[1])
    [classes] = run_artifact(artifact.path, normalized(weights, images).numpy())
    assert (classes.shape, classes.dtype.name) == ((1, 75, 98), "int32")
    assert (classes == torch_outputs(weights, images)[0].argmax(1)).mean() > 0.999
    assert len(np.unique(classes)) > 1
    assert (artifact.agreement.prediction_unit, artifact.agreement.num_predictions) == ("pixels", 12 * 75 * 98)
    if backend == "executorch":  # XNNPACK has no argmax
        assert 0 < len(artifact.operators.fallback) < 4


@pytest.mark.parametrize("backend", ["onnx", OPENVINO])
def test_segmentation_with_a_dynamic_size(backend: str, tmp_path: Path):
    weights = segmentation(LATER_HEAD, output_stride=8)
    options = ExportOptions(size=(96, 80), dynamic_batch=True, dynamic_size=True, num_threads=1)
    [artifact] = export(weights, [backend], tmp_path, options)
    for num, size in ((1, (65, 130)), (2, (128, 96))):
        images = synthetic_images(num, size)
        outputs = run_artifact(artifact.path, normalized(weights, images).numpy())
        assert difference(outputs, torch_outputs(weights, images)) < 1e-3


@pytest.mark.parametrize(
    ("backend", "precision", "task"),
    [  # int8 of each runtime with one task
        ("onnx", "fp16", "segment"),
        ("onnx", "int8", "detect"),
        ("openvino", "bf16", "detect"),
        pytest.param("openvino", "int8", "segment", marks=pytest.mark.slow),
        pytest.param("executorch", "int8", "detect", marks=pytest.mark.slow),
    ],
)
def test_lower_precision(
    all_weights: dict[str, Weights],
    export_once: Any,
    backend: str,
    precision: str,
    task: str,
    monkeypatch: pytest.MonkeyPatch,
):
    # Random weights have close scores, so that int8 changes many predictions. In trained networks it changes few.
    monkeypatch.setattr(mobilevit.export, "MIN_PREDICTION_AGREEMENT", 0.7 if task == "segment" else 0.1)
    artifact = export_once(backend, task, precision=precision)
    weights, images = all_weights[task], synthetic_images(1, (64, 64))
    outputs = run_artifact(artifact.path, normalized(weights, images).numpy())
    expected = torch_outputs(weights, images)
    if task == "detect":  # scores as logits: most of them are almost 0
        outputs, expected = ([boxes, np.log(scores + 1e-4)] for boxes, scores in (outputs, expected))
    assert 1e-5 < difference(outputs, expected) < {"fp16": 0.05, "bf16": 0.5, "int8": 3}[precision]
    if precision == "int8":
        num_bytes = sum(4 * tensor.numel() for tensor in weights.tensors.values())
        path = artifact.path.with_suffix(".bin") if backend == "openvino" else artifact.path
        assert path.stat().st_size < 0.4 * num_bytes
    if backend == "executorch":
        assert artifact.operators.fallback == ()
    if (precision, task) == ("int8", "detect"):  # boxes are decoded in float: int8 has 256 values only
        assert len(np.unique(outputs[0])) > 400


@pytest.mark.parametrize(
    ("backend", "options", "fix"),
    [
        ("onnx", ExportOptions(size=(96, 96), dynamic_size=True), "leave out --dynamic-size"),
        ("executorch", ExportOptions(postprocess=True), "executorch has no NMS; leave out --postprocess"),
        ("coreml", ExportOptions(postprocess=True), "coreml has no NMS; leave out --postprocess"),
    ],
)
def test_refused(detector: Weights, backend: str, options: ExportOptions, fix: str, tmp_path: Path):
    with pytest.raises(ValueError, match=fix):
        export(detector, [backend], tmp_path, options)
    assert not list(tmp_path.iterdir())
