"""Transforms for classification: augmentation of an image, and Mixup and CutMix of a batch.

The random numbers of an image come from a generator that is seeded with (seed, epoch, index of the image). So the
result depends on these three only: not on the worker, the order of images, or other users of random numbers.
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

from mobilevit.data.sampler import Pick
from mobilevit.data.samples import Sample
from mobilevit.images import Preprocessing, read_crop, read_image

Crop = tuple[int, int, int, int]  # left, top, right, bottom
Policy = Literal["basic", "advanced"]


@dataclass(frozen=True)
class Augmentation:
    """Random resized crop and horizontal flip: the paper's "basic" augmentation.

    "advanced" adds RandAugment (two operations of magnitude 9 of 30) and random erasing (of a quarter of the images).
    Mixup and CutMix mix the images of a batch; see `mix`.
    """

    min_scale: float
    flip: bool
    seed: int
    policy: Policy = "basic"
    min_size_px: int = 0  # of the result, for a teacher whose input is larger than that of the network

    def __call__(self, sample: Sample[int], pick: Pick) -> tuple[np.ndarray, int]:
        """An image of any size -> uint8 (size_px, size_px, 3), and its class index. Raises ImageError."""
        random = np.random.default_rng((self.seed, pick.epoch, pick.image_index))
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

    def __call__(self, sample: Sample[int], pick: Pick) -> tuple[np.ndarray, int]:
        """An image of any size -> uint8 (crop_px, crop_px, 3), and its class index. Raises ImageError."""
        image = read_image(sample.image, sample.name)
        return np.asarray(self.preprocessing.resize_and_crop(image)), sample.label


def random_crop(width: int, height: int, min_scale: float, random: np.random.Generator) -> Crop:
    """A crop with `min_scale` to 1 of the area of the image and an aspect ratio of 3:4 to 4:3."""
    for _ in range(10):
        area = random.uniform(min_scale, 1) * width * height
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(random.integers(width - w + 1)), int(random.integers(height - h + 1))
            return left, top, left + w, top + h
    # No such crop fits into a very long image: use its centre, as square as allowed.
    w, h = min(width, max(1, round(height * 4 / 3))), min(height, max(1, round(width * 4 / 3)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


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


# --------------------------------------------------------------------------------------------------------------------
# RandAugment (Cubuk et al. 2019) at the strength and with the ranges of torchvision: 14 operations on uint8 images,
# black where nothing is left.

NUM_OPERATIONS = 2
STRENGTH = 9 / 30  # of the largest


def _affine(a: float, b: float, c: float, d: float, e: float, f: float) -> Callable[[Image.Image], Image.Image]:
    # What is at (x, y) afterwards was at (a x + b y + c, d x + e y + f).
    return lambda image: image.transform(image.size, Image.Transform.AFFINE, (a, b, c, d, e, f))


def operations(size_px: int, sign: int) -> dict[str, Callable[[Image.Image], Image.Image]]:
    """The operations on a square image; `sign`, 1 or -1, is their direction where they have one."""
    shear, shift = sign * 0.3 * STRENGTH, int(sign * 150 / 331 * size_px * STRENGTH)
    factor = 1 + sign * 0.9 * STRENGTH
    return {
        "identity": lambda image: image,
        "shear x": _affine(1, shear, 0, 0, 1, 0),
        "shear y": _affine(1, 0, 0, shear, 1, 0),
        "translate x": _affine(1, 0, -shift, 0, 1, 0),
        "translate y": _affine(1, 0, 0, 0, 1, -shift),
        "rotate": lambda image: image.rotate(sign * 30 * STRENGTH),
        "brightness": lambda image: ImageEnhance.Brightness(image).enhance(factor),
        "color": lambda image: ImageEnhance.Color(image).enhance(factor),
        "contrast": lambda image: ImageEnhance.Contrast(image).enhance(factor),
        "sharpness": lambda image: ImageEnhance.Sharpness(image).enhance(factor),
        "posterize": lambda image: ImageOps.posterize(image, 8 - round(4 * STRENGTH)),
        "solarize": lambda image: ImageOps.solarize(image, math.ceil(255 * (1 - STRENGTH))),
        "autocontrast": ImageOps.autocontrast,
        "equalize": ImageOps.equalize,
    }


def rand_augment(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """A square image after two of the operations, drawn one by one."""
    for _ in range(NUM_OPERATIONS):
        by_name = operations(image.width, 1 if random.random() < 0.5 else -1)
        image = list(by_name.values())[random.integers(len(by_name))](image)
    return image


def random_erasing(pixels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Noise, each value 0 to 255 alike, in a box of `pixels` (H, W, 3), a quarter of the time; written in place.

    The box has 0.02 to 0.33 of the area and a shape of 0.3 to 3.3, by Zhong et al. 2017.
    """
    if random.random() >= 0.25:
        return pixels
    height, width = pixels.shape[:2]
    for _ in range(10):
        area = random.uniform(0.02, 0.33) * width * height
        ratio = math.exp(random.uniform(math.log(0.3), math.log(3.3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w < width and 0 < h < height:
            left, top = random.integers(width - w + 1), random.integers(height - h + 1)
            pixels[top : top + h, left : left + w] = random.integers(0, 256, (h, w, 3), dtype=np.uint8)
            break
    return pixels


# ---------------------------------------------------------------------------------------------------------------------
# Batches

MIXUP_ALPHA = 0.2
CUTMIX_ALPHA = 1.0


def mix(pixels: Tensor, targets: Tensor, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al. 2017) or CutMix (Yun et al. 2019), one as likely as the other, on any device.

    Pixels (B, 3, H, W) and targets (B, num_classes), both of floats, each image with one partner of the same batch
    and all in the same proportions. What is handed in stays as it is; a single image comes back unchanged.
    """
    batch_size, _, height, width = pixels.shape
    if batch_size == 1:
        return pixels, targets
    partners = torch.from_numpy(random.permutation(batch_size)).to(pixels.device)
    if random.random() < 0.5:
        share = random.beta(MIXUP_ALPHA, MIXUP_ALPHA)
        mixed = pixels.lerp(pixels[partners], 1 - share)
    else:
        side = math.sqrt(1 - random.beta(CUTMIX_ALPHA, CUTMIX_ALPHA))
        x, y = random.random(2)
        left, right = (round(width * min(max(edge, 0), 1)) for edge in (x - side / 2, x + side / 2))
        top, bottom = (round(height * min(max(edge, 0), 1)) for edge in (y - side / 2, y + side / 2))
        mixed = pixels.clone()
        mixed[:, :, top:bottom, left:right] = pixels[partners, :, top:bottom, left:right]
        share = 1 - (right - left) * (bottom - top) / (width * height)  # what the border left of the box
    return mixed, targets.lerp(targets[partners], 1 - share)
