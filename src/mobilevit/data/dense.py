"""Transforms of detection and segmentation: what is done to an image is done to its boxes or its mask.

Every number is drawn from a generator made from (seed, epoch, number of the image), as in `transforms.py`. The square
that a network sees is the whole image, warped, wherever there is no chance in it: in evaluation, prediction and
deployment.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as V

from mobilevit.data.labels import IGNORE, Boxes, MaskFile
from mobilevit.data.sampler import Pick
from mobilevit.data.samples import Sample
from mobilevit.data.transforms import Box, resize
from mobilevit.images import Preprocessing, read_crop, read_image

# JPEG hands parts over at 1/2, 1/4 or 1/8 of their size, from 8 pixels to 8 pixels; a part that began between two of
# them would be moved against its boxes. Parts of images from LARGE_PX up therefore keep to such a grid, and no other
# part is made smaller while it is read.
GRID_PX = 8
LARGE_PX = 256


def warp(size_px: int) -> Preprocessing:
    """The whole image as a square, whatever its ratio was."""
    return Preprocessing(resize_px=(size_px, size_px), crop_px=size_px)


def _grid_px(width: int, height: int) -> int:
    return GRID_PX if min(width, height) >= LARGE_PX else 1


# ---------------------------------------------------------------------------------------------------------------------
# Boxes

MIN_OVERLAPS = (None, 0.1, 0.3, 0.5, 0.7, 0.9, 0.0)  # of a part with a box; None is the whole image, 0.0 any part
NUM_TRIES = 50


class BoxTarget(NamedTuple):
    """What is in one image: corners (N, 4) float32, x1 y1 x2 y2 in units of the image; classes (N,) int64."""

    corners: np.ndarray
    labels: np.ndarray


class BoxBatch(NamedTuple):
    """What is in the images of a batch: corners (B, M, 4) float32 in units of the image, classes (B, M) int64.

    M is 1 or more; where an image has fewer boxes, classes are -1 and corners 0.
    """

    corners: Tensor
    labels: Tensor


class BoxTruth(NamedTuple):
    """The boxes of an image as they were annotated, and its size in pixels."""

    boxes: Boxes
    height: int
    width: int


@dataclass(frozen=True)
class BoxAugmentation:
    """The published augmentation of SSDLite: a random part, other colours, a mirror image half of the time.

    The part is SSD's (arXiv 1512.02325, section 2.2): see `random_part`; its sides are at least the root of `min_scale`
    of the image's (SSD's 0.3 is a `min_scale` of 0.09). Zooming out, which SSD found to help with small objects, is
    neither in the released recipe nor in torchvision's of SSDLite, and not here.
    """

    min_scale: float
    flip: bool
    seed: int

    def __call__(self, sample: Sample[Boxes], pick: Pick) -> tuple[np.ndarray, BoxTarget]:
        """An image of any size -> uint8 (size_px, size_px, 3), by chance from (seed, epoch, number) alone; its boxes.

        Boxes of crowds are left out, and those whose centre is not in the part. Raises ImageError.
        """
        random = np.random.default_rng((self.seed, pick.epoch, pick.number))
        boxes = sample.label
        corners, labels = boxes.corners[~boxes.crowd], boxes.labels[~boxes.crowd]

        def choose(width: int, height: int) -> Box:
            nonlocal corners, labels
            corners = corners.clip(0, np.array((width, height, width, height), np.float32))
            is_box = (corners[:, 2:] > corners[:, :2]).all(1)
            corners, labels = corners[is_box], labels[is_box]
            left, top, right, bottom = part = random_part(width, height, corners, self.min_scale, random)
            is_seen = _centres_in(corners, np.array(part)[None])[0]
            origin, size = np.array((left, top, left, top)), np.array((right - left, bottom - top) * 2)
            corners = ((corners[is_seen] - origin) / size).clip(0, 1).astype(np.float32)
            labels = labels[is_seen]
            return part

        part = read_crop(sample.image, choose, max(pick.size_px, LARGE_PX // 2), sample.name)
        pixels = distort(Image.fromarray(resize(part, pick.size_px).numpy()), random)
        if self.flip and random.random() < 0.5:
            pixels = pixels[:, ::-1]
            corners = np.stack((1 - corners[:, 2], corners[:, 1], 1 - corners[:, 0], corners[:, 3]), 1)
        return np.ascontiguousarray(pixels), BoxTarget(corners, labels)


@dataclass(frozen=True)
class BoxEvaluation:
    """No chance: what the network will do to images once it is trained."""

    preprocessing: Preprocessing

    def __call__(self, sample: Sample[Boxes], pick: Pick) -> tuple[np.ndarray, BoxTruth]:
        """An image of any size -> uint8 (crop_px, crop_px, 3); its boxes as they are. Raises ImageError."""
        image = read_image(sample.image, sample.name)
        pixels = np.asarray(self.preprocessing.resize_and_crop(image))
        return pixels, BoxTruth(sample.label, image.height, image.width)


def random_part(width: int, height: int, corners: np.ndarray, min_scale: float, random: np.random.Generator) -> Box:
    """A part of an image for a detector to learn from (SSD, section 2.2).

    `corners` (N, 4) are boxes in pixels. The sides of the part are the root of `min_scale` to 1 of the image's, its
    shape is 1:2 to 2:1, some box has its centre in it, and the intersection over union of the part and some box is at
    least a number that is drawn from `MIN_OVERLAPS`. The whole image is one of the draws; it is also what remains
    where nothing of the kind is found. Without boxes all parts of these shapes will do.
    """
    whole = (0, 0, width, height)
    min_overlap = MIN_OVERLAPS[random.integers(len(MIN_OVERLAPS))]
    if min_overlap is None:
        return whole
    grid = _grid_px(width, height)
    image = np.array((width, height))
    cells = -(-image // grid)
    lengths = np.round(random.uniform(math.sqrt(min_scale), 1, (NUM_TRIES, 2)) * image / grid).clip(1, cells)
    starts = np.floor(random.random((NUM_TRIES, 2)) * (cells - lengths + 1))
    parts = np.concatenate((starts * grid, ((starts + lengths) * grid).clip(max=image)), 1)
    ratio = (parts[:, 2] - parts[:, 0]) / (parts[:, 3] - parts[:, 1])
    fits = (ratio >= 0.5) & (ratio <= 2)
    if len(corners):
        centres_in = _centres_in(corners, parts)
        fits &= centres_in.any(1) & (_overlaps(parts, corners).max(1) >= min_overlap)
    if not fits.any():
        return whole
    left, top, right, bottom = (int(x) for x in parts[fits.argmax()])
    return left, top, right, bottom


def distort(image: Image.Image, random: np.random.Generator) -> np.ndarray:
    """Another brightness, contrast, saturation and hue, each half of the time; uint8 (H, W, 3).

    In torchvision's ranges, which are SSD's: brightness 7/8 to 9/8, contrast and saturation 1/2 to 3/2, hue 18 degrees
    either way. Contrast comes before or after saturation and hue. Colours are not interchanged, which the released code
    does half of the time and SSD never did: it takes from a network what colours say.
    """
    contrast_first = random.random() < 0.5
    is_on = random.random(4) < 0.5
    brightness, contrast, saturation, hue = random.uniform((0.875, 0.5, 0.5, -0.05), (1.125, 1.5, 1.5, 0.05))
    # On an image of Pillow, where hue is several times as fast as on a tensor.
    steps: list[tuple[bool, Callable[[Any, float], Any], float]] = [
        (is_on[0], V.adjust_brightness, brightness),
        (is_on[2], V.adjust_saturation, saturation),
        (is_on[3], V.adjust_hue, hue),
    ]
    steps.insert(1 if contrast_first else 3, (is_on[1], V.adjust_contrast, contrast))
    for is_done, change, amount in steps:
        if is_done:
            image = change(image, amount)
    return np.array(image)


def stack_boxes(targets: list[BoxTarget]) -> BoxBatch:
    """The labels of a batch to train on."""
    longest = max((len(target.labels) for target in targets), default=0)
    corners = torch.zeros(len(targets), max(1, longest), 4)
    labels = torch.full((len(targets), max(1, longest)), -1, dtype=torch.long)
    for i, target in enumerate(targets):
        corners[i, : len(target.labels)] = torch.from_numpy(target.corners)
        labels[i, : len(target.labels)] = torch.from_numpy(target.labels)
    return BoxBatch(corners, labels)


def _centres_in(corners: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Which of the parts (P, 4) have the centre of which box (N, 4): (P, N)."""
    centres = (corners[:, :2] + corners[:, 2:]) / 2
    return np.all((centres > parts[:, None, :2]) & (centres < parts[:, None, 2:]), axis=2)


def _overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes (P, 4) and (N, 4) that are not empty: (P, N)."""
    sides = np.minimum(a[:, None, 2:], b[:, 2:]) - np.maximum(a[:, None, :2], b[:, :2])
    both = sides.clip(0).prod(2)
    area_a, area_b = ((x[:, 2:] - x[:, :2]).prod(1) for x in (a, b))
    return both / (area_a[:, None] + area_b - both)


# ---------------------------------------------------------------------------------------------------------------------
# Masks

MIN_SIZE, MAX_SIZE = 0.5, 2.0  # of the short side of the resized image, in sides of the square cut from it
MAX_DEGREES = 10.0


@dataclass(frozen=True)
class MaskAugmentation:
    """The augmentation of DeepLabv3: another size, a part, a mirror image and a small rotation half of the time each.

    Size, part and mirror image are the paper's released recipe (short side 1/2 to 2 of the square's), except that what
    lies beyond a small image is black and ignored, where that recipe enlarges the image. The rotation, up to 10
    degrees either way, is of its later release, which also distorts colours; here they stay. `min_scale` is the
    smallest share of the image's area that a part of a square image keeps: 1 never cuts anything off.
    """

    min_scale: float
    flip: bool
    seed: int

    def __call__(self, sample: Sample[MaskFile], pick: Pick) -> tuple[np.ndarray, np.ndarray]:
        """An image of any size -> uint8 (size_px, size_px, 3), by chance from (seed, epoch, number) alone.

        And its mask, uint8 (size_px, size_px), 255 where it is to be ignored. Raises ImageError.
        """
        random = np.random.default_rng((self.seed, pick.epoch, pick.number))
        side = pick.size_px
        size = random.uniform(MIN_SIZE, min(MAX_SIZE, 1 / math.sqrt(self.min_scale))) * side
        at_x, at_y = random.random(2)
        whole = out = (0, 0)
        box = (0, 0, 0, 0)

        def choose(width: int, height: int) -> Box:
            nonlocal whole, out, box
            whole = width, height
            shrink = min(whole) / size  # pixels of the image in one of the square
            grid = _grid_px(width, height)
            edges = []
            for length, at in ((width, at_x), (height, at_y)):
                cells, part = -(-length // grid), math.ceil(min(length, side * shrink) / grid)
                start = int(at * (cells - part + 1))
                edges.append((start * grid, min(length, (start + part) * grid)))
            (left, right), (top, bottom) = edges
            out = tuple(min(side, max(1, round((b - a) / shrink))) for a, b in edges)
            box = (left, top, right, bottom)
            return box

        part = read_crop(sample.image, choose, max(side, LARGE_PX // 2), sample.name)
        left, top, right, bottom = box
        classes = torch.from_numpy(sample.label.read(*whole)[top:bottom, left:right].copy())
        pixels = torch.from_numpy(part)[None].permute(0, 3, 1, 2)
        pixels = F.interpolate(pixels, out[::-1], mode="bilinear", antialias=True)
        classes = F.interpolate(classes[None, None], out[::-1], mode="nearest-exact")
        # Where there is not enough for the square: black, anywhere around it.
        left, top = (int(random.integers(side - length + 1)) for length in out)
        margins = (left, side - left - out[0], top, side - top - out[1])
        pixels, classes = F.pad(pixels, margins), F.pad(classes, margins, value=IGNORE)
        if self.flip and random.random() < 0.5:
            pixels, classes = pixels.flip(3), classes.flip(3)
        if random.random() < 0.5:
            degrees = random.uniform(-MAX_DEGREES, MAX_DEGREES)
            pixels = V.rotate(pixels, degrees, InterpolationMode.BILINEAR)
            classes = V.rotate(classes, degrees, InterpolationMode.NEAREST, fill=[float(IGNORE)])
        return pixels[0].permute(1, 2, 0).contiguous().numpy(), classes[0, 0].contiguous().numpy()


@dataclass(frozen=True)
class MaskEvaluation:
    """No chance: what the network will do to images once it is trained."""

    preprocessing: Preprocessing

    def __call__(self, sample: Sample[MaskFile], pick: Pick) -> tuple[np.ndarray, np.ndarray]:
        """An image of any size -> uint8 (crop_px, crop_px, 3); its own mask, uint8 (H, W). Raises ImageError."""
        image = read_image(sample.image, sample.name)
        mask = sample.label.read(*image.size)
        return np.asarray(self.preprocessing.resize_and_crop(image)), mask


def stack_masks(masks: list[np.ndarray]) -> Tensor:
    """The labels of a batch to train on: (B, size_px, size_px) uint8, an eighth of what a loss wants them as."""
    return torch.from_numpy(np.stack(masks))
