"""Detection and segmentation through every runtime that runs here: what torch says, as outputs and as answers."""

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
from dense_networks import detector, segmentation
from mobilevit.export import Artifact, Precision, Target, export, load_artifact, read_metadata
from mobilevit.export.artifact import NOTHING, Boxes, Classes, Found, deployed
from mobilevit.export.verify import Tally, as_arrays, compare, synthetic_images
from mobilevit.models.deeplabv3 import LATER_HEAD
from mobilevit.models.ssdlite import MAX_GROWTH, SIZE_VARIANCE, SSDLite, decode, detect
from mobilevit.tasks.detection import MAX_PER_IMAGE, SCORE_THRESHOLD
from mobilevit.weights import Weights

SIZES = [(64, 64), (75, 98)]
EXECUTORCH, OPENVINO = (pytest.param(name, marks=pytest.mark.slow) for name in ("executorch", "openvino"))
IMAGES = synthetic_images(6, (80, 90))


@pytest.fixture(scope="module", name="detector")
def the_detector() -> Weights:
    return detector()


@pytest.fixture(scope="module")
def weights(detector: Weights) -> dict[str, Weights]:
    ids = tuple(range(7, 7 + 2 * detector.num_classes, 2))
    return {"detect": replace(detector, category_ids=ids), "segment": segmentation()}


# ---------------------------------------------------------------------------------------------------------------------
# What stands behind the network


@pytest.mark.parametrize("size", SIZES)
def test_boxes_are_those_of_decode(detector: Weights, size: tuple[int, int]):
    network = detector.build(SSDLite).double()
    anchors = network.anchors(*size).double()
    x = torch.rand(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        logits, locations = network(x)
        locations = locations * 5  # some beyond what is let grow
        assert (SIZE_VARIANCE * locations[..., 2:] > MAX_GROWTH).any()
        boxes, scores = Boxes(anchors)((logits, locations))
    assert (boxes - decode(locations, anchors)).abs().max() < 1e-12
    torch.testing.assert_close(scores, logits.softmax(-1)[..., 1:])


def test_found_is_what_detect_finds_filled_up(detector: Weights):
    network = detector.build(SSDLite)
    anchors = network.anchors(64, 64)
    with torch.no_grad():
        logits, locations = network(torch.rand(2, 3, 64, 64))
        logits[1, 5:, 1:] = -20  # nearly nothing in the second image
        boxes, scores, labels = Found(Boxes(anchors))((logits, locations))
        options = {"score_threshold": SCORE_THRESHOLD, "max_per_image": MAX_PER_IMAGE}
        expected = detect(logits, locations, anchors, **options)
    assert (boxes.shape, scores.shape, labels.shape) == ((2, 100, 4), (2, 100), (2, 100))
    assert labels.dtype == torch.int32
    assert 0 < len(expected[1].scores) < 100
    for i, one in enumerate(expected):
        n = len(one.scores)
        torch.testing.assert_close(boxes[i, :n], one.boxes)
        torch.testing.assert_close(scores[i, :n], one.scores)
        assert labels[i, :n].tolist() == one.labels.tolist()
        assert (labels[i, n:] == NOTHING).all()
        assert not scores[i, n:].any()


def test_the_nms_of_the_documentation(detector: Weights):
    text = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    [code] = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "def find(" in block]
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    network = detector.build(SSDLite)
    anchors = network.anchors(75, 98)
    with torch.no_grad():
        outputs = network(torch.rand(1, 3, 75, 98))
        boxes, scores = Boxes(anchors)(outputs)
        class_logits, locations = outputs
        [expected] = detect(class_logits, locations, anchors, score_threshold=0.3, max_per_image=1000)
    found = namespace["find"](boxes[0].tolist(), scores[0].tolist())
    assert len(found) == len(expected.labels) > 20
    assert [label for label, _, _ in found] == expected.labels.tolist()
    torch.testing.assert_close(torch.tensor([box for _, _, box in found]), expected.boxes)


def test_classes():
    logits = torch.rand(2, 5, 8, 9)
    classes = Classes()(logits)
    assert (classes.shape, classes.dtype) == ((2, 8, 9), torch.int32)
    assert torch.equal(logits.gather(1, classes.long()[:, None])[:, 0], logits.amax(1))


# ---------------------------------------------------------------------------------------------------------------------
# How two sides are compared


def found(boxes: list, scores: list, labels: list) -> tuple[np.ndarray, ...]:
    return np.array([boxes], np.float32), np.array([scores], np.float32), np.array([labels], np.int32)


def test_boxes_are_matched_whatever_the_order_of_equals():
    a, b, c = (0, 0, 0.5, 0.5), (0.2, 0.2, 0.9, 0.9), (0.6, 0.1, 0.8, 0.4)
    names = ("boxes", "scores", "labels")
    theirs = found([a, b, c, (0,) * 4], [0.9, 0.5, 0.5, 0], [1, 2, 2, NOTHING])
    same, other, missing = Tally(names), Tally(names), Tally(names)
    same.add(theirs, found([a, c, b, (0,) * 4], [0.9, 0.5, 0.5, 0], [1, 2, 2, NOTHING]), 1)
    assert (same.num_same, same.num_answers, same.error, same.kind) == (3, 3, 0, "boxes")
    other.add(theirs, found([a, b, c, (0,) * 4], [0.9, 0.5, 0.4, 0], [1, 1, 2, NOTHING]), 1)
    assert (other.num_same, other.num_answers) == (2, 4)  # one is missing, and one too many
    assert other.error > 0.1  # of the score 0.4
    missing.add(theirs, found([a, a, b, c], [0.9, 0.8, 0.5, 0.5], [1, 1, 2, 2]), 1)
    assert (missing.num_same, missing.num_answers) == (3, 4)
    # What nobody would look at counts nothing, unless there is nothing else
    for score, counted in ((0.1, (3, 3)), (0.4, (3, 4))):
        faint = Tally(names)
        faint.add(theirs, found([a, b, c, a], [0.9, 0.5, 0.5, score], [1, 2, 2, 1]), 1)
        assert (faint.num_same, faint.num_answers) == counted
    faint = Tally(names)
    faint.add(found([a, b], [0.1, 0.1], [0, 1]), found([a, b], [0.1, 0.1], [0, 0]), 1)
    assert (faint.num_same, faint.num_answers) == (1, 3)
    # Another candidate around the same thing is the same answer, and no error
    beside = Tally(names)
    beside.add(theirs, found([(0, 0, 0.5, 0.4), b, c, (0,) * 4], [0.9, 0.5, 0.5, 0], [1, 2, 2, NOTHING]), 1)
    assert (beside.num_same, beside.num_answers, beside.error) == (3, 3, 0)


def test_nothing_found_is_nothing_compared(detector: Weights):
    target = Target("fp32", 64, 64, task="detect", answers=True)
    nothing = found([(0,) * 4], [0], [NOTHING])
    network = torch.nn.Identity()
    network.forward = lambda x: tuple(map(torch.from_numpy, nothing))  # pyright: ignore
    with pytest.raises(ValueError, match=r"torch finds nothing on any of the 1 images, .*--images"):
        compare(network, lambda x: nothing, [torch.zeros(1, 3, 64, 64)], target)


def test_outputs_of_detectors_are_compared_by_what_is_found_in_them():
    def outputs(*scores: tuple[float, float]) -> tuple[np.ndarray, ...]:
        places = np.arange(len(scores), dtype=np.float32)[:, None] + np.array([0, 0, 0.9, 0.9], np.float32)
        return places[None], np.array([scores], np.float32)

    tally = Tally(("boxes", "scores"))
    # The same; another class; lost; found; a weaker one that is still found; what nobody would look at
    theirs = outputs((0.9, 0.05), (0.8, 0.0), (0.6, 0.1), (0.0, 0.1), (0.31, 0.1), (0.2, 0.1))
    ours = outputs((0.8, 0.15), (0.0, 0.8), (0.0, 0.1), (0.6, 0.1), (0.29, 0.1), (0.0, 0.2))
    tally.add(theirs, ours, 1)
    assert (tally.num_same, tally.num_answers, tally.kind) == (2, 6, "boxes")
    # Of boxes that overlap the better one alone
    overlapping = Tally(("boxes", "scores"))
    theirs[0][0, 1] = theirs[0][0, 0]
    theirs[1][0] = (0.9, 0.1), (0.8, 0.1), (0, 0), (0, 0), (0, 0), (0, 0)
    overlapping.add(theirs, theirs, 1)
    assert (overlapping.num_same, overlapping.num_answers, overlapping.error) == (1, 1, 0)


def test_classes_that_differ_are_the_error():
    tally = Tally(("classes",))
    expected = np.zeros((2, 10, 10), np.int32)
    other = expected.copy()
    other[0, 0, :3] = 1
    tally.add([expected], [other], 2)
    assert tally.error == pytest.approx(3 / 200)


# ---------------------------------------------------------------------------------------------------------------------
# Through the runtimes


def made(weights: Weights, backend: str, out: Path, **options) -> Artifact:
    [artifact] = export(weights, [backend], out, images=IMAGES, num_threads=1, source="here", **options)
    return artifact


@pytest.mark.parametrize(
    ("backend", "task"),
    [
        ("onnx", "detect"),
        ("openvino", "segment"),
        pytest.param("executorch", "detect", marks=pytest.mark.slow),
        pytest.param("executorch", "segment", marks=pytest.mark.slow),
    ],
)
def test_outputs(weights: dict[str, Weights], backend: str, task: str, tmp_path: Path):
    size = SIZES[task == "detect"]
    uint8 = backend != "executorch"  # which turns and widens pixels outside its delegate
    artifact = made(weights[task], backend, tmp_path, size=size, uint8=uint8)
    assert artifact.agreement is not None
    assert artifact.agreement.error < 1e-4
    assert artifact.agreement.same > 0.999
    assert artifact.agreement.answers > 100
    assert artifact.path.stem == f"mobilevit_xxs_{task}_{size[0]}x{size[1]}_fp32{'_uint8' * uint8}"
    assert artifact.operators.outside == ()
    if backend == "executorch":
        assert artifact.operators.num_operators == 1
    metadata = read_metadata(artifact.path)
    assert metadata["task"] == task
    assert metadata["outputs"] == {"detect": "boxes scores", "segment": "logits"}[task]
    assert json.loads(metadata["class_names"]) == list(weights[task].class_names)
    assert tuple(json.loads(metadata.get("category_ids", "[]"))) == weights[task].category_ids


@pytest.mark.parametrize("backend", ["onnx", OPENVINO])
def test_found_in_a_batch(weights: dict[str, Weights], backend: str, tmp_path: Path):
    artifact = made(weights["detect"], backend, tmp_path, size=SIZES[1], answers=True, batch_size=2, dynamic_batch=True)
    assert artifact.agreement is not None
    assert artifact.agreement.kind == "boxes"
    assert artifact.agreement.error < 1e-3
    assert artifact.agreement.same > 0.99
    assert artifact.path.stem == "mobilevit_xxs_detect_75x98_fp32_answers"
    run = load_artifact(artifact.path)
    network = deployed(weights["detect"], artifact.target)
    x = torch.rand(3, 3, *SIZES[1])
    outputs = run(x.numpy())
    assert [(y.shape, y.dtype.name) for y in outputs] == [
        ((3, 100, 4), "float32"),
        ((3, 100), "float32"),
        ((3, 100), "int32"),
    ]
    assert (np.diff(outputs[1], axis=1) <= 0).all()  # best first
    tally = Tally(artifact.target.outputs)
    with torch.no_grad():
        tally.add(as_arrays(network(x)), outputs, 3)
    assert tally.num_same > 0.99 * tally.num_answers
    assert json.loads(read_metadata(artifact.path)["nms"])["max_per_image"] == 100


@pytest.mark.parametrize("backend", ["onnx", OPENVINO])
def test_fewer_found_than_there_is_room_for(detector: Weights, backend: str, tmp_path: Path):
    tensors = {key: tensor.clone() for key, tensor in detector.tensors.items()}
    for i in range(6):
        bias = tensors[f"heads.{i}.out.bias"]
        bias.unflatten(0, (-1, 12))[:, 4] += 11.0  # background, nearly everywhere
    artifact = made(replace(detector, tensors=tensors), backend, tmp_path, answers=True)
    assert artifact.agreement is not None
    assert 0 < artifact.agreement.answers < 590
    assert artifact.agreement.same > 0.98
    boxes, scores, labels = load_artifact(artifact.path)(np.zeros((1, 3, 64, 64), np.float32))
    nothing = labels == NOTHING
    assert nothing.any()
    assert (scores[nothing] == 0).all()
    assert (boxes[nothing] == 0).all()
    assert (scores[~nothing] > SCORE_THRESHOLD).all()


@pytest.mark.parametrize("backend", ["onnx", "openvino", EXECUTORCH])
def test_class_map(weights: dict[str, Weights], backend: str, tmp_path: Path):
    artifact = made(weights["segment"], backend, tmp_path, size=SIZES[1], answers=True)
    assert artifact.agreement is not None
    assert (artifact.agreement.kind, artifact.agreement.answers) == ("pixels", 6 * 75 * 98)
    assert artifact.agreement.same > 0.999
    image = torch.from_numpy(synthetic_images(1, SIZES[1])[0]).permute(2, 0, 1)[None]
    [classes] = load_artifact(artifact.path)(weights["segment"].preprocessing.scale(image).numpy())
    assert (classes.shape, classes.dtype.name) == ((1, 75, 98), "int32")
    assert len(np.unique(classes)) > 1
    if backend == "executorch":  # XNNPACK has no argmax
        assert 0 < len(artifact.operators.outside) < 4


@pytest.mark.parametrize("backend", ["onnx", OPENVINO])
def test_segmentation_of_any_size(backend: str, tmp_path: Path):
    weights = segmentation(LATER_HEAD, output_stride=8)
    artifact = made(weights, backend, tmp_path, size=(96, 80), dynamic_batch=True, dynamic_size=True)
    run, network = load_artifact(artifact.path), deployed(weights, artifact.target)
    for shape in ((1, 3, 65, 130), (2, 3, 128, 96)):
        x = torch.rand(shape)
        with torch.no_grad():
            tally = Tally(artifact.target.outputs)
            tally.add(as_arrays(network(x)), run(x.numpy()), len(x))
        assert tally.error < 1e-3


@pytest.mark.parametrize(
    ("backend", "precision", "task"),
    [  # each runtime's int8 with one head: all ten pairs take minutes
        ("onnx", "fp16", "segment"),
        ("onnx", "int8", "detect"),
        ("openvino", "bf16", "detect"),
        pytest.param("openvino", "int8", "segment", marks=pytest.mark.slow),
        pytest.param("executorch", "int8", "detect", marks=pytest.mark.slow),
    ],
)
def test_lower_precision(
    weights: dict[str, Weights],
    backend: str,
    precision: Precision,
    task: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    # The answers of random weights are too close to each other for int8, and which of many boxes is the best one is
    # chance: of those of a network trained for 15 epochs all stayed.
    monkeypatch.setattr(mobilevit.export, "LEAST_AGREEMENT", 0.7 if task == "segment" else 0.15)
    artifact = made(weights[task], backend, tmp_path, precision=precision)
    assert artifact.agreement is not None
    assert 1e-5 < artifact.agreement.error < {"fp16": 0.05, "bf16": 0.5, "int8": 3}[precision]
    if precision == "int8":
        num_bytes = sum(4 * tensor.numel() for tensor in weights[task].tensors.values())
        path = artifact.path.with_suffix(".bin") if backend == "openvino" else artifact.path
        assert path.stat().st_size < 0.34 * num_bytes
    if backend == "executorch":
        assert artifact.operators.outside == ()
    if (backend, precision, task) == ("executorch", "int8", "detect"):
        # The boxes are computed in float: in 8 bits there would be no more than 256 places for them.
        boxes, _ = load_artifact(artifact.path)(np.random.default_rng(0).random((1, 3, 64, 64), np.float32))
        assert len(np.unique(boxes)) > 400


def test_refused(weights: dict[str, Weights], tmp_path: Path):
    with pytest.raises(ValueError, match="the anchors of a detector belong to one size; leave out --dynamic-size"):
        made(weights["detect"], "onnx", tmp_path, size=(96, 96), dynamic_size=True)
    with pytest.raises(ValueError, match=r"executorch has no NMS; leave out --answers, see docs/export.md"):
        made(weights["detect"], "executorch", tmp_path, answers=True)
    assert not list(tmp_path.iterdir())
