"""Detection: loss against a loop, metrics against pycocotools with files, initial weights, report."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import box_convert, box_iou

from mobilevit.data.box_transforms import BoxBatch, BoxTruth
from mobilevit.data.boxes import Boxes
from mobilevit.data.loader import Batch, ImageDataset, load
from mobilevit.data.sampler import eval_batches
from mobilevit.data.samples import Sample
from mobilevit.data.sources import default_split
from mobilevit.images import ImageError, Preprocessing
from mobilevit.models.mobilevit import MobileViT
from mobilevit.models.ssdlite import SSDLite, encode
from mobilevit.recipes import Data, Recipe
from mobilevit.report.results import sections
from mobilevit.tasks.detection import Detection, DetectionResults, ImageDetections, match, ssd_loss
from mobilevit.tasks.task import ClassMetrics
from mobilevit.weights import Weights

TASK = Detection()
RECIPE = Recipe(
    task="detect", architecture="xxs", label_smoothing=0, data=Data(size_px=64, flip=False, val_fraction=0.5)
)


def random_boxes(num: int, generator: torch.Generator) -> Tensor:
    centers, sides = torch.rand(num, 2, generator=generator), 0.05 + 0.6 * torch.rand(num, 2, generator=generator)
    return torch.cat((centers - sides / 2, centers + sides / 2), 1).clamp(0, 1)


def random_batch(nums: Sequence[int], num_classes: int = 3, seed: int = 0) -> BoxBatch:
    generator = torch.Generator().manual_seed(seed)
    M = max(1, *nums)
    corners, labels = torch.zeros(len(nums), M, 4), torch.full((len(nums), M), -1)
    for i, num in enumerate(nums):
        corners[i, :num] = random_boxes(num, generator)
        labels[i, :num] = torch.randint(num_classes, (num,), generator=generator)
    return BoxBatch(corners, labels)


def slow_match(corners: Tensor, anchors: Tensor) -> list[int]:
    """Anchor by anchor and box by box, for one image."""
    overlaps = box_iou(box_convert(anchors, "cxcywh", "xyxy"), corners)
    of_anchor = []
    for row in overlaps:
        best = max(range(len(corners)), key=lambda j: row[j].item(), default=-1)
        of_anchor.append(best if best >= 0 and row[best] >= 0.5 else -1)
    for j in range(len(corners)):
        of_anchor[int(overlaps[:, j].argmax())] = j
    return of_anchor


def slow_loss(logits: Tensor, locations: Tensor, anchors: Tensor, targets: BoxBatch) -> Tensor:
    total, num_positive = torch.zeros(()), 0
    for i in range(len(logits)):
        is_box = targets.labels[i] >= 0
        corners, labels = targets.corners[i, is_box], targets.labels[i, is_box]
        of_anchor = slow_match(corners, anchors)
        negatives = []
        here = 0
        for a, j in enumerate(of_anchor):
            log_p = logits[i, a].log_softmax(0)
            if j < 0:
                negatives.append(-log_p[0])
                continue
            here += 1
            total = total - log_p[labels[j] + 1]
            for d in locations[i, a] - encode(corners[j], anchors[a]):
                total = total + (0.5 * d * d if d.abs() < 1 else d.abs() - 0.5)
        negatives.sort(key=lambda x: -x.item())
        total = total + sum(negatives[: max(3, 3 * here)], torch.zeros(()))
        num_positive += here
    return total / max(1, num_positive)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (97, 33)])
@pytest.mark.parametrize("nums", [(1,), (4, 0, 9), (30, 2)])
def test_matching_against_a_loop(height: int, width: int, nums: tuple[int, ...]):
    anchors = SSDLite("xxs", 3).anchors(height, width)
    targets = random_batch(nums)
    matched = match(targets, anchors)
    for i, num in enumerate(nums):
        assert matched[i].tolist() == slow_match(targets.corners[i, :num], anchors)


@pytest.mark.parametrize("nums", [(1,), (4, 0, 9), (30, 2), (0, 0)])
def test_loss_against_a_loop(nums: tuple[int, ...]):
    anchors = SSDLite("xxs", 3).anchors(64, 64)
    targets = random_batch(nums)
    logits, locations = 2 * torch.randn(len(nums), len(anchors), 4), torch.randn(len(nums), len(anchors), 4)
    grads = []
    for of in (ssd_loss, slow_loss):
        x, y = logits.clone().requires_grad_(), locations.clone().requires_grad_()
        loss = of(x, y, anchors, targets)
        loss.backward()
        grads.append((loss.detach(), x.grad, y.grad))
    (loss, x, y), (expected, x_expected, y_expected) = grads
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x, x_expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(y, torch.zeros_like(y) if y_expected is None else y_expected, rtol=1e-4, atol=1e-6)


def test_loss_does_not_depend_on_padding_or_other_images():
    anchors = SSDLite("xxs", 3).anchors(64, 64)
    targets = random_batch((3,))
    logits, locations = torch.randn(1, len(anchors), 4), torch.randn(1, len(anchors), 4)
    loss = ssd_loss(logits, locations, anchors, targets)
    padded = BoxBatch(F.pad(targets.corners, (0, 0, 0, 5)), F.pad(targets.labels, (0, 5), value=-1))
    torch.testing.assert_close(ssd_loss(logits, locations, anchors, padded), loss)
    twice = BoxBatch(targets.corners.repeat(2, 1, 1), targets.labels.repeat(2, 1))
    torch.testing.assert_close(ssd_loss(logits.repeat(2, 1, 1), locations.repeat(2, 1, 1), anchors, twice), loss)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (97, 33)])
def test_loss_of_the_network_and_its_gradients_are_finite(height: int, width: int):
    model = SSDLite("xxs", 3).train()
    pixels = torch.rand(2, 3, height, width)
    for targets in (random_batch((0, 0)), random_batch((2, 5)), TASK.blank_labels(2, 64)):
        for precision in (False, True):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, precision):
                loss = TASK.loss(RECIPE, model, Batch(pixels, targets))
            assert loss.dtype == torch.float32
            loss.backward()
            assert loss.isfinite()
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None, name
                assert parameter.grad.isfinite().all(), name
            assert any(parameter.grad.any() for parameter in model.backbone.parameters())  # type: ignore[union-attr]


def test_label_smoothing():
    anchors = torch.tensor([[0.5, 0.5, 0.5, 0.5]])
    targets = BoxBatch(torch.tensor([[[0.25, 0.25, 0.75, 0.75]]]), torch.tensor([[1]]))
    logits = torch.randn(1, 1, 4)
    loss = ssd_loss(logits, torch.zeros(1, 1, 4), anchors, targets, 0.2)
    log_p = logits[0, 0].log_softmax(0)
    torch.testing.assert_close(loss, -(0.8 * log_p[2] + 0.05 * log_p.sum()))


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def truth_of(corners: Any, labels: Any, size: tuple[int, int] = (300, 400), crowd: Any = None) -> BoxTruth:
    corners = np.array(corners, np.float32).reshape(-1, 4)
    crowd = np.zeros(len(corners), bool) if crowd is None else np.array(crowd, bool)
    areas = (corners[:, 2:] - corners[:, :2]).prod(1)
    return BoxTruth(Boxes(corners, np.array(labels, np.int64), crowd, areas), *size)


def random_detections(num_images: int, num_classes: int, seed: int, shift: float = 12) -> tuple[ImageDetections, ...]:
    """Detections shifted by some pixels, with missing, additional and wrongly classified ones."""
    random = np.random.default_rng(seed)
    found = []
    for index in range(num_images):
        num = int(random.integers(0, 7))
        top_left, sides = random.uniform(0, 200, (num, 2)), random.uniform(8, 150, (num, 2))
        corners, labels = np.concatenate((top_left, top_left + sides), 1), random.integers(num_classes, size=num)
        truth = truth_of(corners, labels, crowd=random.random(num) < 0.15)
        boxes = np.concatenate((corners, corners[: num // 2] + 40)) + random.uniform(-shift, shift, (num + num // 2, 4))
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 2)
        predicted_labels = np.concatenate((labels, labels[: num // 2]))
        predicted_labels = np.where(random.random(len(boxes)) < 0.2, random.integers(num_classes), predicted_labels)
        scores = np.sort(random.random(len(boxes)))[::-1]
        found.append(
            ImageDetections(
                index, truth, boxes.astype(np.float32), scores.astype(np.float32), predicted_labels.astype(np.int64)
            )
        )
    return tuple(found)


def by_pycocotools(found: Sequence[ImageDetections], num_classes: int, folder: Path) -> np.ndarray:
    """COCO's twelve metrics, computed by pycocotools from files in another process."""
    boxes, predictions = [], []
    for one in found:
        of = one.truth.boxes
        for corners, label, area, crowd in zip(of.corners, of.labels, of.areas, of.crowd, strict=True):
            left, top, right, bottom = map(float, corners)
            where = {"bbox": [left, top, right - left, bottom - top], "area": float(area), "iscrowd": int(crowd)}
            boxes.append({"id": len(boxes) + 1, "image_id": 7 + one.index, "category_id": 3 + int(label), **where})
        for corners, label, score in zip(one.boxes, one.labels, one.scores, strict=True):
            left, top, right, bottom = map(float, corners)
            prediction = {"image_id": 7 + one.index, "category_id": 3 + int(label), "score": float(score)}
            predictions.append({**prediction, "bbox": [left, top, right - left, bottom - top]})
    images = [{"id": 7 + one.index} for one in found]
    classes = [{"id": 3 + i, "name": str(i)} for i in range(num_classes)]
    content = {"info": {}, "images": images, "annotations": boxes, "categories": classes}
    (folder / "truth.json").write_text(json.dumps(content))
    (folder / "found.json").write_text(json.dumps(predictions))
    program = (
        "from pycocotools.coco import COCO\nfrom pycocotools.cocoeval import COCOeval\n"
        "truth = COCO('truth.json')\ne = COCOeval(truth, truth.loadRes('found.json'), 'bbox')\n"
        "e.evaluate(); e.accumulate(); e.summarize()\nprint(*e.stats)"
    )
    out = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=True)
    return np.array([float(x) for x in out.stdout.splitlines()[-1].split()])


@pytest.mark.parametrize(("num_images", "num_classes", "seed"), [(8, 2, 0), (25, 5, 1)])
def test_metrics_against_pycocotools(num_images: int, num_classes: int, seed: int, tmp_path: Path):
    found = random_detections(num_images, num_classes, seed)
    results = DetectionResults(found, num_classes)
    metrics = results.metrics()
    expected = dict(
        zip(
            ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
            100 * by_pycocotools(found, num_classes, tmp_path)[:6],
            strict=True,
        )
    )
    assert 1 < expected["ap"] < 99
    assert metrics == {
        **{name: pytest.approx(value, abs=1e-9) for name, value in expected.items()},
        "num_images": num_images,
    }
    names = [f"class {i}" for i in range(num_classes)]
    rows = results.per_class(names)
    assert [row.class_name for row in rows] == names
    assert np.mean([row.metrics["ap"] or 0.0 for row in rows]) == pytest.approx(metrics["ap"])
    assert np.nanmean(results.precision_recall_curves()) * 100 == pytest.approx(metrics["ap50"])
    num_boxes = [
        sum(int((one.truth.boxes.labels[~one.truth.boxes.crowd] == i).sum()) for one in found)
        for i in range(num_classes)
    ]
    assert [row.metrics["num_boxes"] for row in rows] == num_boxes


def perfect(found: Sequence[ImageDetections], shift: float = 0) -> tuple[ImageDetections, ...]:
    return tuple(
        replace(
            one,
            boxes=one.truth.boxes.corners + np.float32(shift),
            labels=one.truth.boxes.labels,
            scores=np.ones(len(one.truth.boxes.labels), np.float32),
        )
        for one in found
    )


def test_perfect_and_shifted_boxes():
    squares = [truth_of([(10 * i, 20, 10 * i + 100, 120)], [i % 2]) for i in range(6)]
    empty = np.empty((0, 4), np.float32), np.empty(0, np.float32), np.empty(0, np.int64)
    nothing = [ImageDetections(i, truth, *empty) for i, truth in enumerate(squares)]
    assert DetectionResults(tuple(nothing), 2).metrics() == {
        "ap": 0,
        "ap50": 0,
        "ap75": 0,
        "ap_large": 0,
        "num_images": 6,
    }
    metrics = DetectionResults(perfect(nothing), 2).metrics()
    assert metrics == {name: pytest.approx(100) for name in ("ap", "ap50", "ap75", "ap_large")} | {"num_images": 6}
    # 10 px to the right and down: 90^2 of 2 * 100^2 - 90^2 in common, 0.68, so that 4 of the 10 thresholds are met.
    metrics = DetectionResults(perfect(nothing, 10), 2).metrics()
    assert metrics["ap"] == pytest.approx(40)
    assert metrics["ap50"] == pytest.approx(100)
    assert metrics["ap75"] == 0


def test_crowds_are_ignored_and_a_class_without_boxes_has_no_ap():
    truth = truth_of([(0, 0, 50, 50), (100, 100, 300, 300)], [0, 0], crowd=[False, True])
    boxes = np.array([(0, 0, 50, 50), (100, 100, 200, 200), (150, 150, 250, 250)], np.float32)
    found = ImageDetections(0, truth, boxes, np.array([0.5, 0.9, 0.8], np.float32), np.zeros(3, np.int64))
    results = DetectionResults((found,), 2)
    assert results.metrics()["ap"] == pytest.approx(100)
    assert results.per_class(["a", "b"])[1] == ClassMetrics("b", {"num_boxes": 0, "ap": None, "ap50": None})
    assert np.isnan(results.precision_recall_curves()[1]).all()
    none = ImageDetections(0, truth_of([], []), found.boxes[:0], found.scores[:0], found.labels[:0])
    assert DetectionResults((none,), 2).metrics() == {"ap": 0, "num_images": 1}


class Prepared(SSDLite):
    """Predicts the given boxes for the image whose index is its pixel value, 0 to 255."""

    def __init__(self, found: Sequence[ImageDetections], num_classes: int):
        super().__init__("xxs", num_classes)
        self.found = found

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        assert images.dtype == torch.float32
        anchors = self.anchors(*images.shape[2:])
        logits = torch.zeros(len(images), len(anchors), self.num_classes + 1)
        logits[..., 0] = 30
        locations = torch.zeros(len(images), len(anchors), 4)
        indices = (255 * images[:, 0, 0, 0]).round().long().tolist()
        for i, index in enumerate(indices):
            one = self.found[index]
            size = torch.tensor((one.truth.width, one.truth.height) * 2)
            boxes = torch.from_numpy(one.boxes) / size
            of = torch.arange(len(boxes)) * 3  # arbitrary anchors
            locations[i, of] = encode(boxes, anchors[of])
            # Logits such that the probability of the class is the score.
            score = torch.from_numpy(one.scores).double()
            logits[i, of, torch.from_numpy(one.labels) + 1] = (30 + (score / (1 - score)).log()).float()
        return logits, locations


def prepared_batches(found: Sequence[ImageDetections], *sizes: int) -> list[Batch]:
    indices = torch.arange(len(found))
    pixels = (indices / 255)[:, None, None, None].expand(-1, 3, 64, 64)
    return [
        Batch(part, [found[i].truth for i in these], tuple(these))
        for part, these in zip(pixels.split(sizes), (n.tolist() for n in indices.split(sizes)), strict=True)
    ]


def spread_detections() -> tuple[ImageDetections, ...]:
    """Detections inside images of several sizes, too far apart for NMS to remove any."""
    random = np.random.default_rng(0)
    found = []
    for number in range(9):
        width, height = 200 + 40 * number, 300 - 20 * number
        corners = np.array([(10 + 45 * i, 15, 45 + 45 * i, 100 - 7 * i) for i in range(3)], np.float32)
        scores = np.sort(random.uniform(0.1, 0.9, 3))[::-1].astype(np.float32)
        truth = truth_of(corners + random.uniform(-6, 6, (3, 4)), [0, 1, number % 2], (height, width))
        found.append(ImageDetections(number, truth, corners, scores, np.array([0, 1, 1])))
    return tuple(found)


def test_evaluation_maps_boxes_back_to_the_image():
    found = spread_detections()
    results = TASK.evaluate(Prepared(found, 2).eval(), prepared_batches(found, 5, 4))
    assert results.num_classes == 2
    for ours, expected in zip(results.images, found, strict=True):
        assert ours.index == expected.index
        np.testing.assert_allclose(ours.boxes, expected.boxes, atol=0.05)
        np.testing.assert_allclose(ours.scores, expected.scores, atol=1e-4)
        np.testing.assert_array_equal(ours.labels, expected.labels)
    assert results.metrics() == {k: pytest.approx(v, abs=0.5) for k, v in DetectionResults(found, 2).metrics().items()}


def test_results_do_not_depend_on_batches_and_processes():
    found = spread_detections()
    model = Prepared(found, 2).eval()
    whole = TASK.evaluate(model, prepared_batches(found, 9))
    empty = Batch(torch.empty(0, 3, 64, 64), [], (), ("unreadable.png",))
    in_turn = prepared_batches(found, 3, 4, 1, 1)
    halves: list[Any] = []

    def note(value: Any) -> list[Any]:
        halves.append(value)
        return [value]

    TASK.evaluate(model, in_turn[1::2], note)
    for others in (
        TASK.evaluate(model, prepared_batches(found, *[1] * 9)),
        TASK.evaluate(model, [*in_turn[::-1], empty]),
        TASK.evaluate(model, in_turn[::2], lambda mine: [mine, *halves]),
        TASK.evaluate(model, in_turn[::2], lambda mine: [([], 0), *halves, mine]),  # one process had no image
    ):
        assert others.metrics() == whole.metrics()
        assert others.num_classes == 2
        for ours, theirs in zip(whole.images, others.images, strict=True):
            for name in ("boxes", "scores", "labels"):
                np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    with pytest.raises(ImageError, match="none of the images"):
        TASK.evaluate(model, [empty])


# ---------------------------------------------------------------------------------------------------------------------
# Data and weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """COCO's layout: six images with a red or green rectangle each, the classes "red" and "green"."""
    random = np.random.default_rng(0)
    for split, num in (("train", 4), ("val", 2)):
        (tmp_path / f"{split}2017").mkdir()
        images, boxes = [], []
        for i in range(num):
            width, height = 60 + 10 * i, 50
            pixels = random.integers(0, 60, (height, width, 3), np.uint8)
            left, top, w, h = 5 + i, 8, 30, 25 + i
            pixels[top : top + h, left : left + w] = (250, 10, 10) if i % 2 else (10, 250, 10)
            Image.fromarray(pixels).save(tmp_path / f"{split}2017" / f"{i}.png")
            images.append({"id": i + 5, "file_name": f"{i}.png", "width": width, "height": height})
            box: dict[str, Any] = {"bbox": [left, top, w, h], "area": w * h, "iscrowd": 0}
            boxes.append({"id": i + 1, "image_id": i + 5, "category_id": 3 + i % 2, **box})
        classes = [{"id": 3, "name": "green"}, {"id": 4, "name": "red"}]
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"instances_{split}2017.json").write_text(
            json.dumps({"images": images, "annotations": boxes, "categories": classes})
        )
    return tmp_path


def weights(class_names: tuple[str, ...] = ("green", "red"), seed: int = 0, **values: Any) -> Weights:
    torch.manual_seed(seed)
    model = SSDLite("xxs", len(class_names))
    preprocessing = Preprocessing(resize_px=(64, 64), crop_px=64, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))
    return Weights(model.architecture, model.state_dict(), preprocessing, class_names, task="detect", **values)


def test_datasets_and_evaluation(folder: Path):
    train, val = TASK.datasets(RECIPE, folder)
    assert train.source.class_names == val.source.class_names == ("green", "red")
    assert (len(train), len(val)) == (4, 2)
    assert default_split("detect", folder) == "val"
    dataset = TASK.evaluation_set(weights(("red", "green")), folder, Preprocessing(resize_px=72, crop_px=64), "val")
    loaded = load(dataset, eval_batches(2, batch_size=2, size_px=64), num_workers=0, device="cpu")
    (batch,) = loaded
    assert batch.pixels.shape == (2, 3, 64, 64)
    assert [truth.boxes.labels.tolist() for truth in batch.labels] == [[1], [0]]
    assert [(truth.height, truth.width) for truth in batch.labels] == [(50, 60), (50, 70)]
    green = batch.pixels[0, 1] > 200  # the whole image, warped, not a center crop
    rows, columns = (np.flatnonzero(green.any(axis).numpy()) for axis in (1, 0))
    np.testing.assert_allclose((columns[0], rows[0]), (5 * 64 / 60, 8 * 64 / 50), atol=1.5)
    with pytest.raises(ValueError, match="class names"):
        TASK.evaluation_set(replace(weights(), class_names=()), folder, weights().preprocessing, "val")


def test_build_with_random_weights(folder: Path):
    train, _ = TASK.datasets(RECIPE, folder)
    built = TASK.build(RECIPE, train, None)
    assert (built.task, built.architecture.name, built.num_classes) == ("detect", "xxs", 2)
    assert built.class_names == ("green", "red")
    assert built.preprocessing == Preprocessing(resize_px=(64, 64), crop_px=64)
    assert isinstance(built.build(), SSDLite)


def same(built: Weights, before: Weights) -> set[str]:
    return {
        name
        for name in built.tensors
        if name in before.tensors and torch.equal(built.tensors[name], before.tensors[name])
    }


@pytest.mark.parametrize("class_names", [("green", "red"), ("red", "green"), ("a", "b", "c"), ()])
def test_build_from_detection_weights(folder: Path, class_names: tuple[str, ...]):
    pretrained = weights(class_names or ("x", "y"))
    pretrained = replace(pretrained, class_names=class_names)
    train, _ = TASK.datasets(RECIPE, folder)
    built = TASK.build(replace(RECIPE, architecture="s"), train, pretrained)
    assert (built.architecture.name, built.num_classes, built.class_names) == ("xxs", 2, ("green", "red"))
    assert built.category_ids == (3, 4)
    assert (built.preprocessing.mean, built.preprocessing.std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
    changed = set(built.tensors) - same(built, pretrained)
    if class_names == ("green", "red"):
        assert not changed
    else:
        assert changed >= {f"heads.{i}.out.weight" for i in range(6)}
        assert all(name.endswith(("out.weight", "out.bias")) for name in changed)


def test_build_from_classification_weights(folder: Path):
    classifier = MobileViT("xs", num_classes=5)
    preprocessing = Preprocessing(resize_px=36, crop_px=32, mean=(0.5, 0.4, 0.3))
    pretrained = Weights(classifier.architecture, classifier.state_dict(), preprocessing)
    train, _ = TASK.datasets(RECIPE, folder)
    built = TASK.build(RECIPE, train, pretrained)
    assert built.architecture.name == "xs"
    assert built.preprocessing == Preprocessing(resize_px=(64, 64), crop_px=64, mean=(0.5, 0.4, 0.3))
    assert {name for name in pretrained.tensors if name.startswith("backbone.")} <= same(built, pretrained)


def test_report_sections():
    class Source:
        class_names = ("<b>a & b</b>", "c")

        def __getitem__(self, index: int) -> Sample:
            return Sample(np.zeros((300 - 20 * index, 200 + 40 * index, 3), np.uint8), None, f"<i>{index}</i>.png")

    source: Any = Source()
    for results in (
        DetectionResults(spread_detections(), 2),
        DetectionResults(perfect(spread_detections()), 2),
        DetectionResults(
            (ImageDetections(0, truth_of([], []), *(np.empty((0, 4)), np.empty(0), np.empty(0, int))),), 2
        ),
    ):
        html = {section.title: section.html for section in sections(results, source)}
        assert list(html) == ["Average precision", "Precision and recall", "Classes", "Worst images", "Best images"]
        text = "".join(html.values())
        assert "a & b" not in text
        assert "<i>" not in text
        assert not re.search(r"\bnan\b", re.sub(r'src="[^"]*"', "", text))
    html = {section.title: section.html for section in sections(DetectionResults(spread_detections(), 2), source)}
    assert html["Worst images"].count("<figure>") == 8
    assert "annotated: " in html["Worst images"]


def test_pycocotools_missing(monkeypatch: pytest.MonkeyPatch, folder: Path):
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(ValueError, match=r"pycocotools.*mobilevit\[dense\]"):
        TASK.datasets(RECIPE, folder)


def test_overfits_four_images(folder: Path):
    """From random weights, without augmentation, to an AP50 of 100 %."""
    train, _ = TASK.datasets(RECIPE, folder)
    initial = TASK.build(RECIPE, train, None)
    still = TASK.evaluation_set(initial, folder, initial.preprocessing, "val")
    still = ImageDataset(train.source, still.prepare, list)
    (batch,) = load(
        still,
        eval_batches(4, batch_size=4, size_px=64),
        num_workers=0,
        device="cpu",
        preprocessing=initial.preprocessing,
    )
    sizes = [np.array((truth.width, truth.height) * 2) for truth in batch.labels]
    corners = np.stack([truth.boxes.corners / size for truth, size in zip(batch.labels, sizes, strict=True)])
    labels = np.stack([truth.boxes.labels for truth in batch.labels])
    targets = BoxBatch(torch.from_numpy(corners.astype(np.float32)), torch.from_numpy(labels))
    model: nn.Module = initial.build().train()
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=80)
    for _ in range(80):
        loss = TASK.loss(RECIPE, model, Batch(batch.pixels, targets))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    for module in model.modules():  # after so few steps, running statistics differ from those of a batch
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    metrics = TASK.evaluate(model, [batch]).metrics()
    assert metrics["ap50"] == pytest.approx(100)
