"""Transforms for classification: augmentation of an image, and Mixup and CutMix of a batch.

The random numbers of an image come from a generator that is seeded with (seed, epoch, index of the image), and with the
number of the use if an epoch uses the image again. So the result depends on these only: not on the worker, the order of
images, or other users of random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torchvision.transforms import v2

from mobilevit.data.sampler import Pick
from mobilevit.data.samples import Label, Sample
from mobilevit.images import Preprocessing, read_crop, read_image

Crop = tuple[int, int, int, int]  # left, top, right, bottom
Policy = Literal["basic", "advanced"]


@dataclass(frozen=True)
class Augmentation:
    """Random resized crop and horizontal flip: the paper's "basic" augmentation.

    "advanced" adds RandAugment (two operations of magnitude 9 of 30) and random erasing (probability 1/4). `mix` adds
    Mixup and CutMix of batches.
    """

    min_scale: float
    flip: bool
    seed: int
    policy: Policy = "basic"
    min_size_px: int = 0  # of the result, for a teacher whose input is larger than that of the network

    def __call__(self, sample: Sample[Label], pick: Pick) -> tuple[np.ndarray, Label]:
        """An image of any size -> uint8 (size_px, size_px, 3), and its label. Raises ImageError."""
        repeat = (pick.repeat,) if pick.repeat else ()  # an image that is used again in an epoch gets another crop
        random = np.random.default_rng((self.seed, pick.epoch, pick.image_index, *repeat))
        size_px = max(pick.size_px, self.min_size_px)
        crop = read_crop(
            sample.image,
            lambda width, height: random_crop(width, height, self.min_scale, random),
            size_px,
            sample.name,
        )
        pixels = resize(crop, size_px)
        if self.flip and random.random() < 0.5:
            pixels = pixels.flip(1)
        if self.policy == "basic":
            return pixels.numpy(), sample.label
        return random_erasing(np.array(rand_augment(Image.fromarray(pixels.numpy()), random)), random), sample.label


@dataclass(frozen=True)
class Evaluation:
    """The preprocessing of prediction, without random operations."""

    preprocessing: Preprocessing

    def __call__(self, sample: Sample[Label], pick: Pick) -> tuple[np.ndarray, Label]:
        """An image of any size -> uint8 (crop_px, crop_px, 3), and its label. Raises ImageError."""
        image = read_image(sample.image, sample.name)
        return np.asarray(self.preprocessing.resize_and_crop(image)), sample.label


def random_crop(width: int, height: int, min_scale: float, random: np.random.Generator) -> Crop:
    """A crop with `min_scale` to 1 of the area of the image and an aspect ratio of 3:4 to 4:3."""
    if crop := _random_box(width, height, (min_scale, 1), (3 / 4, 4 / 3), random):
        return crop
    # No such crop fits into a very long image: use its center, with the nearest allowed aspect ratio.
    w, h = min(width, max(1, round(height * 4 / 3))), min(height, max(1, round(width * 4 / 3)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _random_box(
    width: int,
    height: int,
    areas: tuple[float, float],
    ratios: tuple[float, float],
    random: np.random.Generator,
) -> Crop | None:
    """A box with a relative area and an aspect ratio in these ranges; None if none of ten samples fits the image."""
    for _ in range(10):
        area = random.uniform(*areas) * width * height
        ratio = math.exp(random.uniform(math.log(ratios[0]), math.log(ratios[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(random.integers(width - w + 1)), int(random.integers(height - h + 1))
            return left, top, left + w, top + h
    return None


def resize(pixels: np.ndarray, size_px: int) -> Tensor:
    """uint8 (H, W, 3) -> (size_px, size_px, 3), bilinear with antialiasing."""
    # Three times as fast as Pillow. torch must add the batch axis: it reads numpy's, whose stride is 0, as channels
    # first.
    x = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    return F.interpolate(x, (size_px, size_px), mode="bilinear", antialias=True)[0].permute(1, 2, 0)


def warp(size_px: int) -> Preprocessing:
    """Preprocessing that resizes the whole image to a square, without keeping its aspect ratio."""
    return Preprocessing(resize_px=(size_px, size_px), crop_px=size_px)


# JPEG can be decoded at 1/2, 1/4 or 1/8 of its size, which maps blocks of 8 pixels to whole pixels. A crop that starts
# inside a block would be shifted against its boxes or mask. So crops of images from LARGE_PX on start at multiples of
# GRID_PX, and smaller images are decoded at full size.
GRID_PX = 8
LARGE_PX = 256


def grid_px(width: int, height: int) -> int:
    """Crops of an image for detection and segmentation start at multiples of this number."""
    return GRID_PX if min(width, height) >= LARGE_PX else 1


# ---------------------------------------------------------------------------------------------------------------------
# RandAugment (Cubuk et al. 2019): the 14 operations of torchvision on uint8 images, pixel for pixel, in half the time
# at 64 px (docs/log.md). Pixels from outside the image are black.

NUM_OPERATIONS = 2
MAGNITUDE = 9 / 30  # relative to the largest


def _affine(a: float, b: float, c: float, d: float, e: float, f: float) -> Callable[[Image.Image], Image.Image]:
    """A transform whose output pixel (x, y) is the input pixel (a x + b y + c, d x + e y + f)."""
    return lambda image: image.transform(image.size, Image.Transform.AFFINE, (a, b, c, d, e, f))


def operations(size_px: int, sign: int) -> dict[str, Callable[[Image.Image], Image.Image]]:
    """The operations on a square image; `sign`, 1 or -1, is the direction of those that have one."""
    shear, shift = sign * 0.3 * MAGNITUDE, int(sign * 150 / 331 * size_px * MAGNITUDE)
    factor = 1 + sign * 0.9 * MAGNITUDE
    return {
        "identity": lambda image: image,
        "shear x": _affine(1, shear, 0, 0, 1, 0),
        "shear y": _affine(1, 0, 0, shear, 1, 0),
        "translate x": _affine(1, 0, -shift, 0, 1, 0),
        "translate y": _affine(1, 0, 0, 0, 1, -shift),
        "rotate": lambda image: image.rotate(sign * 30 * MAGNITUDE),
        "brightness": lambda image: ImageEnhance.Brightness(image).enhance(factor),
        "color": lambda image: ImageEnhance.Color(image).enhance(factor),
        "contrast": lambda image: ImageEnhance.Contrast(image).enhance(factor),
        "sharpness": lambda image: ImageEnhance.Sharpness(image).enhance(factor),
        "posterize": lambda image: ImageOps.posterize(image, 8 - round(4 * MAGNITUDE)),
        "solarize": lambda image: ImageOps.solarize(image, math.ceil(255 * (1 - MAGNITUDE))),
        "autocontrast": ImageOps.autocontrast,
        "equalize": ImageOps.equalize,
    }


def rand_augment(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Apply two operations to a square image; each is sampled from all of them."""
    for _ in range(NUM_OPERATIONS):
        by_name = operations(image.width, 1 if random.random() < 0.5 else -1)
        image = list(by_name.values())[random.integers(len(by_name))](image)
    return image


def random_erasing(pixels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Make a box of `pixels` (H, W, 3) black with probability 1/4, in place (Zhong et al. 2017).

    The box has 0.02 to 0.33 of the area and an aspect ratio of 0.3 to 3.3.
    """
    if random.random() < 0.25:
        height, width = pixels.shape[:2]
        if box := _random_box(width, height, (0.02, 0.33), (0.3, 3.3), random):
            left, top, right, bottom = box
            pixels[top:bottom, left:right] = 0
    return pixels


# ---------------------------------------------------------------------------------------------------------------------
# Batches

_MIXUP_OR_CUTMIX = v2.RandomChoice([v2.MixUp(alpha=0.2), v2.CutMix(alpha=1.0)])


def mix(pixels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al. 2017) or CutMix (Yun et al. 2019) of each image with the previous one of the batch.

    Pixels (B, 3, H, W) and targets (B, num_classes) are floats, on any device, and are not changed. Both methods are
    equally likely; all images of the batch are mixed in the same proportions. Random numbers come from torch's default
    generator, which training seeds for each micro-batch.
    """
    return _MIXUP_OR_CUTMIX(pixels, targets)
