"""Transforms for segmentation: an image and its mask together.

Random numbers are seeded as in `transforms.py`. Without random operations (in evaluation, prediction and exports) the
network gets the whole image, warped to a square.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as V

from mobilevit.data.masks import IGNORE, MaskFile
from mobilevit.data.sampler import Pick
from mobilevit.data.samples import Sample
from mobilevit.data.transforms import LARGE_PX, Crop, grid_px
from mobilevit.images import Preprocessing, read_crop, read_image

MIN_SCALE, MAX_SCALE = 0.5, 2.0  # short side of the resized image, relative to the side of the square crop
MAX_DEGREES = 10.0


@dataclass(frozen=True)
class MaskAugmentation:
    """The augmentation of DeepLabv3: random resize, random crop, horizontal flip, rotation of half of the images.

    Resize, crop and flip are those of the paper's released recipe (short side 1/2 to 2 of the crop's side), except that
    a small image is padded with black pixels that the loss ignores, where that recipe enlarges the image. The rotation
    by up to 10 degrees is from a later release, which also distorts colors; this class does not. `min_scale` limits
    the crop: the smallest fraction of the area of a square image. With 1, nothing is cropped.
    """

    min_scale: float
    flip: bool
    seed: int

    def __call__(self, sample: Sample[MaskFile], pick: Pick) -> tuple[np.ndarray, np.ndarray]:
        """An image of any size -> uint8 (size_px, size_px, 3), and its mask, uint8 (size_px, size_px).

        The mask is 255 for pixels to ignore. Raises ImageError.
        """
        random = np.random.default_rng((self.seed, pick.epoch, pick.image_index))
        side = pick.size_px
        short_side = random.uniform(MIN_SCALE, min(MAX_SCALE, 1 / math.sqrt(self.min_scale))) * side
        at_x, at_y = random.random(2)
        image_size = out = (0, 0)
        crop = (0, 0, 0, 0)

        def choose(width: int, height: int) -> Crop:
            nonlocal image_size, out, crop
            image_size = width, height
            shrink = min(image_size) / short_side  # pixels of the image per pixel of the square
            grid = grid_px(width, height)
            edges = []
            for length, at in ((width, at_x), (height, at_y)):
                cells, num = -(-length // grid), math.ceil(min(length, side * shrink) / grid)
                start = int(at * (cells - num + 1))
                edges.append((start * grid, min(length, (start + num) * grid)))
            (left, right), (top, bottom) = edges
            out = tuple(min(side, max(1, round((b - a) / shrink))) for a, b in edges)
            crop = (left, top, right, bottom)
            return crop

        cropped = read_crop(sample.image, choose, max(side, LARGE_PX // 2), sample.name)
        left, top, right, bottom = crop
        classes = torch.from_numpy(sample.label.read(*image_size)[top:bottom, left:right].copy())
        pixels = torch.from_numpy(cropped)[None].permute(0, 3, 1, 2)
        pixels = F.interpolate(pixels, out[::-1], mode="bilinear", antialias=True)
        classes = F.interpolate(classes[None, None], out[::-1], mode="nearest-exact")
        # Place a crop that is smaller than the square at a random position.
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
    """The preprocessing of prediction, without random operations."""

    preprocessing: Preprocessing

    def __call__(self, sample: Sample[MaskFile], pick: Pick) -> tuple[np.ndarray, np.ndarray]:
        """An image of any size -> uint8 (crop_px, crop_px, 3), and its mask, uint8 (H, W). Raises ImageError."""
        image = read_image(sample.image, sample.name)
        mask = sample.label.read(*image.size)
        return np.asarray(self.preprocessing.resize_and_crop(image)), mask


def stack_masks(masks: list[np.ndarray]) -> Tensor:
    """Masks of a training batch: (B, size_px, size_px) uint8, which is an eighth of the memory of int64."""
    return torch.from_numpy(np.stack(masks))
