"""The comparison of an artifact with torch: matching of boxes, errors in standard deviations, synthetic images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mobilevit.export import ArtifactSpec
from mobilevit.export.artifact import NO_LABEL
from mobilevit.export.verify import OutputComparison, compare, synthetic_images

DETECTIONS = ("boxes", "scores", "labels")
A, B, C, PADDING = (0, 0, 0.5, 0.5), (0.2, 0.2, 0.9, 0.9), (0.6, 0.1, 0.8, 0.4), (0,) * 4


def detections(boxes: list, scores: list, labels: list) -> tuple[np.ndarray, ...]:
    return np.array([boxes], np.float32), np.array([scores], np.float32), np.array([labels], np.int32)


def compared(expected: Any, actual: Any, names: tuple[str, ...] = DETECTIONS) -> OutputComparison:
    comparison = OutputComparison(names)
    comparison.update(expected, actual, 1)
    assert comparison.unit == "boxes"
    return comparison


@pytest.mark.parametrize(
    ("boxes", "scores", "labels", "num_equal", "num_all"),
    [
        ([A, C, B, PADDING], [0.9, 0.5, 0.5, 0], [1, 2, 2, NO_LABEL], 3, 3),  # another order of equal scores
        ([A, B, C, PADDING], [0.9, 0.5, 0.4, 0], [1, 1, 2, NO_LABEL], 2, 4),  # another label: one missing, one extra
        ([A, A, B, C], [0.9, 0.8, 0.5, 0.5], [1, 1, 2, 2], 3, 4),  # a duplicate
        ([A, B, C, A], [0.9, 0.5, 0.5, 0.1], [1, 2, 2, 1], 3, 3),  # a duplicate below the shown score
        ([(0, 0, 0.5, 0.4), B, C, PADDING], [0.9, 0.5, 0.5, 0], [1, 2, 2, NO_LABEL], 3, 3),  # IoU 0.8
        ([(0, 0, 0.5, 0.2), B, C, PADDING], [0.9, 0.5, 0.5, 0], [1, 2, 2, NO_LABEL], 2, 4),  # IoU 0.4
    ],
)
def test_detections_are_matched(boxes: list, scores: list, labels: list, num_equal: int, num_all: int):
    expected = detections([A, B, C, PADDING], [0.9, 0.5, 0.5, 0], [1, 2, 2, NO_LABEL])
    comparison = compared(expected, detections(boxes, scores, labels))
    assert comparison.num_predictions == num_all
    assert comparison.prediction_agreement == pytest.approx(num_equal / num_all)
    assert comparison.max_error == (0 if scores[2] == 0.5 else pytest.approx(np.log(0.5 / 0.4) / SCORE_STD, rel=0.01))


SCORE_STD = float(np.std(np.log([0.9, 0.5])))


def test_without_shown_boxes_all_boxes_count():
    comparison = compared(detections([A, B], [0.1, 0.1], [0, 1]), detections([A, B], [0.1, 0.1], [0, 0]))
    assert (comparison.num_predictions, comparison.prediction_agreement) == (3, pytest.approx(1 / 3))


def test_raw_detector_outputs_are_compared_after_nms():
    def outputs(*scores: tuple[float, float]) -> tuple[np.ndarray, ...]:
        corners = np.arange(len(scores), dtype=np.float32)[:, None] + np.array([0, 0, 0.9, 0.9], np.float32)
        return corners[None], np.array([scores], np.float32)

    # Equal; another class; missing; extra; below the shown score in one; below it in both.
    expected = outputs((0.9, 0.05), (0.8, 0.0), (0.6, 0.1), (0.0, 0.1), (0.31, 0.1), (0.2, 0.1))
    actual = outputs((0.8, 0.15), (0.0, 0.8), (0.0, 0.1), (0.6, 0.1), (0.29, 0.1), (0.0, 0.2))
    comparison = compared(expected, actual, ("boxes", "scores"))
    assert (comparison.num_predictions, comparison.prediction_agreement) == (6, pytest.approx(2 / 6))
    expected[0][0, 1] = expected[0][0, 0]
    expected[1][0] = (0.9, 0.1), (0.8, 0.1), (0, 0), (0, 0), (0, 0), (0, 0)
    comparison = compared(expected, expected, ("boxes", "scores"))  # NMS removes the second of two equal boxes
    assert (comparison.num_predictions, comparison.prediction_agreement, comparison.max_error) == (1, 1, 0)


def test_class_maps():
    comparison = OutputComparison(("classes",))
    expected = np.zeros((2, 10, 10), np.int32)
    actual = expected.copy()
    actual[0, 0, :3] = 1
    comparison.update([expected], [actual], 2)
    assert (comparison.max_error, comparison.unit) == (pytest.approx(3 / 200), "pixels")


def test_no_detections():
    class Empty(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(map(torch.from_numpy, nothing))

    nothing = detections([PADDING], [0], [NO_LABEL])
    spec = ArtifactSpec("fp32", 64, 64, task="detect", postprocess=True)
    with pytest.raises(ValueError, match=r"nothing in any of the 1 images.*--images"):
        compare(Empty(), lambda x: nothing, [torch.zeros(1, 3, 64, 64)], spec)


def test_errors_are_in_standard_deviations():
    network = torch.nn.Flatten()
    inputs = [torch.tensor([[[[0.0, 2.0, 4.0]]]]), torch.tensor([[[[4.0, 2.0, 0.0]]]])]
    spec = ArtifactSpec("fp32", 1, 3)
    agreement = compare(network, lambda x: (x.reshape(len(x), -1) + np.array([0, 3, 0]),), inputs, spec)
    assert agreement.max_error == pytest.approx(3 / np.std([0, 2, 4, 4, 2, 0]))
    assert agreement.prediction_agreement == 0
    agreement = compare(network, lambda x: (x.reshape(len(x), -1) * np.nan,), inputs, spec)
    assert np.isnan(agreement.max_error)


def test_synthetic_images_are_reproducible():
    images = synthetic_images(5, (40, 60))
    assert all(image.shape == (40, 60, 3) and image.dtype == np.uint8 for image in images)
    assert all(np.array_equal(a, b) for a, b in zip(images, synthetic_images(5, (40, 60)), strict=True))
    assert len({image.tobytes() for image in images}) == 5
    assert min(image.std() for image in images) > 5
