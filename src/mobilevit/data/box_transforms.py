"""Transforms for detection: an image and its boxes together.

Random numbers are seeded as in `transforms.py`. Without random operations (in evaluation, prediction and exports) the
network gets the whole image, warped to a square.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou
from torchvision.transforms.v2 import functional as V

from mobilevit.data.boxes import Boxes
from mobilevit.data.sampler import Pick
from mobilevit.data.samples import Sample
from mobilevit.data.transforms import LARGE_PX, Crop, grid_px, resize
from mobilevit.images import Preprocessing, read_crop, read_image

# SSD's minimum IoU of a crop with a box; None is the whole image, 0.0 any crop.
MIN_IOUS = (None, 0.1, 0.3, 0.5, 0.7, 0.9, 0.0)
NUM_TRIES = 50


class BoxTarget(NamedTuple):
    """Boxes of one image: corners (N, 4) float32, x1 y1 x2 y2 relative to the image; class indices (N,) int64."""

    corners: np.ndarray
    labels: np.ndarray


class BoxBatch(NamedTuple):
    """Boxes of a batch: corners (B, M, 4) float32 relative to the image, class indices (B, M) int64.

    M is 1 or more. Padding rows have class -1 and corners 0.
    """

    corners: Tensor
    labels: Tensor


class BoxTruth(NamedTuple):
    """The annotated boxes of an image, and its size in pixels."""

    boxes: Boxes
    height: int
    width: int


@dataclass(frozen=True)
class BoxAugmentation:
    """The published augmentation of SSDLite: SSD's random crop, color distortion, horizontal flip.

    Height and width of the crop are at least sqrt(`min_scale`) of the image's (SSD's 0.3 is a `min_scale` of 0.09);
    see `random_iou_crop`. SSD's zoom-out, which helps with small objects, is omitted, as in the released recipe and in
    torchvision's recipe for SSDLite.
    """

    min_scale: float
    flip: bool
    seed: int

    def __call__(self, sample: Sample[Boxes], pick: Pick) -> tuple[np.ndarray, BoxTarget]:
        """An image of any size -> uint8 (size_px, size_px, 3), and its boxes.

        Crowd boxes, and boxes whose center is outside the crop, are omitted. Raises ImageError.
        """
        random = np.random.default_rng((self.seed, pick.epoch, pick.image_index))
        boxes = sample.label
        corners, labels = boxes.corners[~boxes.crowd], boxes.labels[~boxes.crowd]

        def choose(width: int, height: int) -> Crop:
            nonlocal corners, labels
            corners = corners.clip(0, np.array((width, height, width, height), np.float32))
            has_area = (corners[:, 2:] > corners[:, :2]).all(1)
            corners, labels = corners[has_area], labels[has_area]
            left, top, right, bottom = crop = random_iou_crop(width, height, corners, self.min_scale, random)
            is_inside = _centers_inside(corners, np.array(crop)[None])[0]
            origin, size = np.array((left, top, left, top)), np.array((right - left, bottom - top) * 2)
            corners = ((corners[is_inside] - origin) / size).clip(0, 1).astype(np.float32)
            labels = labels[is_inside]
            return crop

        cropped = read_crop(sample.image, choose, max(pick.size_px, LARGE_PX // 2), sample.name)
        pixels = distort(Image.fromarray(resize(cropped, pick.size_px).numpy()), random)
        if self.flip and random.random() < 0.5:
            pixels = pixels[:, ::-1]
            corners = np.stack((1 - corners[:, 2], corners[:, 1], 1 - corners[:, 0], corners[:, 3]), 1)
        return np.ascontiguousarray(pixels), BoxTarget(corners, labels)


@dataclass(frozen=True)
class BoxEvaluation:
    """The preprocessing of prediction, without random operations."""

    preprocessing: Preprocessing

    def __call__(self, sample: Sample[Boxes], pick: Pick) -> tuple[np.ndarray, BoxTruth]:
        """An image of any size -> uint8 (crop_px, crop_px, 3), and its unchanged boxes. Raises ImageError."""
        image = read_image(sample.image, sample.name)
        pixels = np.asarray(self.preprocessing.resize_and_crop(image))
        return pixels, BoxTruth(sample.label, image.height, image.width)


def random_iou_crop(
    width: int, height: int, corners: np.ndarray, min_scale: float, random: np.random.Generator
) -> Crop:
    """SSD's random crop (arXiv 1512.02325, section 2.2).

    `corners` (N, 4) are boxes in pixels. Height and width of the crop are sqrt(`min_scale`) to 1 of the image's, its
    aspect ratio is 1:2 to 2:1, it contains the center of a box, and its IoU with a box is at least a minimum that is
    sampled from `MIN_IOUS`. The whole image is one of the samples, and the fallback after `NUM_TRIES` tries. Without
    boxes, only size and aspect ratio count.
    """
    whole = (0, 0, width, height)
    min_iou = MIN_IOUS[random.integers(len(MIN_IOUS))]
    if min_iou is None:
        return whole
    grid = grid_px(width, height)
    image = np.array((width, height))
    cells = -(-image // grid)
    lengths = np.round(random.uniform(math.sqrt(min_scale), 1, (NUM_TRIES, 2)) * image / grid).clip(1, cells)
    starts = np.floor(random.random((NUM_TRIES, 2)) * (cells - lengths + 1))
    crops = np.concatenate((starts * grid, ((starts + lengths) * grid).clip(max=image)), 1)
    ratio = (crops[:, 2] - crops[:, 0]) / (crops[:, 3] - crops[:, 1])
    is_valid = (ratio >= 0.5) & (ratio <= 2)
    if len(corners):
        ious = box_iou(torch.from_numpy(crops), torch.from_numpy(corners.astype(np.float64))).numpy()
        is_valid &= _centers_inside(corners, crops).any(1) & (ious.max(1) >= min_iou)
    if not is_valid.any():
        return whole
    left, top, right, bottom = (int(x) for x in crops[is_valid.argmax()])
    return left, top, right, bottom


def distort(image: Image.Image, random: np.random.Generator) -> np.ndarray:
    """Random brightness, contrast, saturation and hue, each with probability 1/2; uint8 (H, W, 3).

    The ranges are torchvision's, which are SSD's: brightness 7/8 to 9/8, contrast and saturation 1/2 to 3/2, hue up to
    18 degrees. Contrast comes before or after saturation and hue. Channels are not permuted, as in SSD. The
    released code permutes them in half of the images, which removes color information.
    """
    contrast_first = random.random() < 0.5
    is_on = random.random(4) < 0.5
    brightness, contrast, saturation, hue = random.uniform((0.875, 0.5, 0.5, -0.05), (1.125, 1.5, 1.5, 0.05))
    # Pillow images: hue is several times as fast as on tensors.
    steps: list[tuple[bool, Callable[[Any, float], Any], float]] = [
        (is_on[0], V.adjust_brightness, brightness),
        (is_on[2], V.adjust_saturation, saturation),
        (is_on[3], V.adjust_hue, hue),
    ]
    steps.insert(1 if contrast_first else 3, (is_on[1], V.adjust_contrast, contrast))
    for is_applied, adjust, factor in steps:
        if is_applied:
            image = adjust(image, factor)
    return np.array(image)


def stack_boxes(targets: list[BoxTarget]) -> BoxBatch:
    """The boxes of a training batch."""
    longest = max((len(target.labels) for target in targets), default=0)
    corners = torch.zeros(len(targets), max(1, longest), 4)
    labels = torch.full((len(targets), max(1, longest)), -1, dtype=torch.long)
    for i, target in enumerate(targets):
        corners[i, : len(target.labels)] = torch.from_numpy(target.corners)
        labels[i, : len(target.labels)] = torch.from_numpy(target.labels)
    return BoxBatch(corners, labels)


def _centers_inside(corners: np.ndarray, crops: np.ndarray) -> np.ndarray:
    """Whether crops (P, 4) contain the centers of boxes (N, 4): (P, N)."""
    centers = (corners[:, :2] + corners[:, 2:]) / 2
    return np.all((centers > crops[:, None, :2]) & (centers < crops[:, None, 2:]), axis=2)
