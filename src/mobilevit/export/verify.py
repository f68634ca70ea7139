"""Comparison of an artifact with torch on the same images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from mobilevit.defaults import SCORE_THRESHOLD as SHOWN_SCORE
from mobilevit.export.artifact import NMS_LIMITS, NO_LABEL, ArtifactSpec, as_arrays, fill_batches
from mobilevit.export.backend import InferenceFn
from mobilevit.models.ssdlite import suppress

LOG_EPSILON = 1e-4  # added to scores before the logarithm, so that differences of smaller scores do not count
MATCH_IOU = 0.5  # boxes that detect the same object
PredictionUnit = Literal["images", "labels", "pixels", "boxes"]
SAME_BOX_IOU = 0.9  # boxes of the same anchor: their difference is a numerical error


@dataclass(frozen=True)
class Agreement:
    """How closely an artifact agrees with torch.

    `max_error` is the largest difference of an output value, in standard deviations of torch's output; scores are
    compared by their logarithms. `prediction_agreement` is the fraction of equal predictions: the top-1 class of an
    image or pixel; for several labels per image, whether it has a label; or a detected box. A box counts if either
    model scores it above `SHOWN_SCORE`; if there is no such box, all boxes count.
    """

    num_images: int
    max_error: float
    prediction_agreement: float
    num_predictions: int
    prediction_unit: PredictionUnit


def compare(
    network: nn.Module,
    infer: InferenceFn,
    inputs: Sequence[Tensor],
    spec: ArtifactSpec,
    thresholds: Sequence[float] = (),
) -> Agreement:
    """Compare the outputs of `network` and of the artifact `infer` for `inputs`, (1, ...) each.

    `thresholds` are those of a multi-label classifier, empty for other tasks.

    Raises:
        ValueError: a detector without detections on all inputs, if predictions are all that can be compared.
    """
    comparison = OutputComparison(spec.outputs, thresholds)
    num_left = len(inputs)
    for batch in fill_batches(inputs, spec.batch_size):
        with torch.inference_mode():
            expected = as_arrays(network(batch))
        comparison.update(expected, infer(batch.numpy()), min(num_left, len(batch)))
        num_left -= len(batch)
    if not comparison.num_predictions and (spec.postprocess or spec.precision == "int8"):
        raise ValueError(
            f"torch detects nothing in any of the {len(inputs)} images, so there is nothing to compare; give images "
            "that contain objects (--images)"
        )
    return Agreement(
        len(inputs),
        comparison.max_error,
        comparison.prediction_agreement,
        comparison.num_predictions,
        comparison.unit,
    )


@dataclass
class ErrorStatistics:
    """Running statistics of the values of one output and of their errors."""

    max_abs: float = 0.0
    squared_error: float = 0.0
    count: int = 0
    total: float = 0.0
    total_squares: float = 0.0

    def update(self, errors: np.ndarray, values: np.ndarray) -> None:
        if errors.size:
            self.max_abs = float(np.maximum(self.max_abs, np.abs(errors).max()))  # unlike max(), propagates NaN
            self.squared_error += float(np.square(errors, dtype=np.float64).sum())
        self.count += values.size
        self.total += float(values.sum(dtype=np.float64))
        self.total_squares += float(np.square(values, dtype=np.float64).sum())

    def normalized(self, error: float) -> float:
        """`error` in standard deviations of the values."""
        mean = self.total / self.count
        std = max(0.0, self.total_squares / self.count - mean * mean) ** 0.5
        return error / (std or math.nan) if self.max_abs else 0.0


class Boxes(NamedTuple):
    """Detections of one image, by decreasing score, padding removed."""

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


class OutputComparison:
    """Compares the outputs that `ArtifactSpec.outputs` names, batch by batch; `thresholds` as for `compare`."""

    def __init__(self, names: Sequence[str], thresholds: Sequence[float] = ()):
        self.names = tuple(names)
        self._thresholds = np.array(thresholds)
        self.statistics = {name: ErrorStatistics() for name in self.names}
        self.unit: PredictionUnit = "boxes" if "boxes" in names else "pixels"
        # (equal, all) predictions; of boxes only those above `SHOWN_SCORE`.
        self._counts = np.zeros(2, int)
        self._counts_of_all_boxes = np.zeros(2, int)

    @property
    def _num_equal_and_all(self) -> np.ndarray:
        return self._counts if self._counts[1] else self._counts_of_all_boxes

    @property
    def num_predictions(self) -> int:
        return int(self._num_equal_and_all[1])

    @property
    def prediction_agreement(self) -> float:
        """Fraction of equal predictions; 1 without predictions."""
        num_equal, num_all = self._num_equal_and_all
        return float(num_equal / num_all) if num_all else 1.0

    @property
    def max_error(self) -> float:
        """Largest normalized error of all outputs; of a class map, the fraction of different pixels."""
        if self.names == ("classes",):
            return 1 - self.prediction_agreement
        return self._worst([s.normalized(s.max_abs) for s in self.statistics.values() if s.count])

    @property
    def rms_error(self) -> float:
        """Root mean square of the normalized errors, of the worst output."""
        used = [s for s in self.statistics.values() if s.count]
        return self._worst([s.normalized((s.squared_error / s.count) ** 0.5) for s in used])

    @staticmethod
    def _worst(errors: list[float]) -> float:
        return float(np.max(errors, initial=0.0))  # NaN if one is NaN

    def update(self, expected: Sequence[np.ndarray], actual: Sequence[np.ndarray], num_images: int) -> None:
        """Add the outputs of a batch, of which the first `num_images` images count."""
        shapes = [x.shape for x in actual], [x.shape for x in expected]
        assert shapes[0] == shapes[1], f"output shapes of the artifact are {shapes[0]}, of torch {shapes[1]}"
        expected, actual = ([x[:num_images] for x in outputs] for outputs in (expected, actual))
        if self.names == ("classes",):
            self._add_classes(expected[0], actual[0])
        elif self.names == ("logits",):
            self.unit = "images" if expected[0].ndim == 2 else "pixels"
            self._add_values("logits", expected[0], actual[0])
            if len(self._thresholds):
                self.unit = "labels"
                with np.errstate(divide="ignore"):  # of a threshold of 0 or 1
                    limits = np.log(self._thresholds) - np.log1p(-self._thresholds)
                self._add_classes(expected[0] >= limits, actual[0] >= limits)
            else:
                self._add_classes(expected[0].argmax(1), actual[0].argmax(1))
        elif "labels" in self.names:
            for image in zip(*expected, *actual, strict=True):
                ours, theirs = (
                    Boxes(*(x[outputs[2] != NO_LABEL] for x in outputs)) for outputs in (image[:3], image[3:])
                )
                self._add_detections(ours, theirs, with_values=True)
        else:
            self._add_values("boxes", expected[0], actual[0])
            self._add_scores(expected[1], actual[1])
            for ours, theirs in zip(_apply_nms(*expected), _apply_nms(*actual), strict=True):
                self._add_detections(ours, theirs)

    def _add_classes(self, expected: np.ndarray, actual: np.ndarray) -> None:
        self._counts += (actual == expected).sum(), expected.size

    def _add_values(self, name: str, expected: np.ndarray, actual: np.ndarray) -> None:
        self.statistics[name].update(actual.astype(np.float32) - expected, expected)

    def _add_scores(self, expected: np.ndarray, actual: np.ndarray) -> None:
        # Most scores are almost 0, so their standard deviation is meaningless. Logarithms are distributed like logits.
        errors = np.log(actual.astype(np.float32) + LOG_EPSILON) - np.log(expected + LOG_EPSILON)
        self.statistics["scores"].update(errors, np.log(np.maximum(expected, np.finfo(np.float32).tiny)))

    def _add_detections(self, expected: Boxes, actual: Boxes, with_values: bool = False) -> None:
        """Match the boxes of one image greedily, best first, by label and IoU."""
        iou = _box_iou(expected.boxes, actual.boxes)
        free = expected.labels[:, None] == actual.labels
        matches = []
        for i in range(len(iou)):
            candidates = np.where(free[i], iou[i], 0)
            if candidates.size and candidates.max() >= MATCH_IOU:
                matches.append((i, int(candidates.argmax())))
                free[:, matches[-1][1]] = False
        i, j = np.array(matches, int).reshape(-1, 2).T
        matched = np.maximum(expected.scores[i], actual.scores[j])
        unmatched = np.concatenate([np.delete(expected.scores, i), np.delete(actual.scores, j)])
        for counts, threshold in ((self._counts, SHOWN_SCORE), (self._counts_of_all_boxes, 0)):
            num_equal = (matched >= threshold).sum()
            counts += num_equal, num_equal + (unmatched >= threshold).sum()
        if with_values:
            same = iou[i, j] >= SAME_BOX_IOU
            self._add_values("boxes", expected.boxes[i[same]], actual.boxes[j[same]])
            self._add_scores(expected.scores[i[same]], actual.scores[j[same]])


def _apply_nms(boxes: np.ndarray, scores: np.ndarray) -> list[Boxes]:
    """Apply NMS to the outputs of a batch. Single anchors are not compared, because an object has many similar ones."""
    tensors = (torch.from_numpy(x.astype(np.float32)) for x in (boxes, scores))
    return [Boxes(*(x.numpy() for x in detections)) for detections in suppress(*tensors, **NMS_LIMITS)]


def _box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    iou = box_iou(torch.from_numpy(a.astype(np.float32)), torch.from_numpy(b.astype(np.float32)))
    return iou.nan_to_num().numpy()  # NaN: boxes without an area


def synthetic_images(num_images: int, size: tuple[int, int], seed: int = 0) -> list[np.ndarray]:
    """Images (H, W, 3) of overlapping ellipses and bars with shading and noise, used if no images are given."""
    height, width = size
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    x, y = x / width, y / height
    images = []
    for i in range(num_images):
        random = np.random.default_rng((seed, i))
        a, b, c = random.uniform(0, 1, (3, 3))
        image = a + (b - a) * x[..., None] + (c - a) * y[..., None]
        for _ in range(random.integers(2, 9)):
            cx, cy, angle = random.uniform(0, (1, 1, np.pi))
            u = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
            v = (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
            long, short = random.uniform(0.05, 0.4, 2)
            ellipse = (u / long) ** 2 + (v / short) ** 2 < 1
            inside = ellipse if random.random() < 0.5 else (abs(u) < long) & (abs(v) < short)
            shade = random.uniform(0, 1, 3) * (1 + random.uniform(-0.5, 0.5) * u[..., None] / long)
            image = np.where(inside[..., None], shade, image)
        image += random.normal(0, random.uniform(0, 0.08), image.shape)
        images.append((255 * image.clip(0, 1)).astype(np.uint8))
    return images
