"""What training does to a picture.

Every number is drawn from a generator that is handed in, so the augmentation of a picture depends on the seed of that
generator alone: not on workers, not on the pictures before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mobilevit.data.sampler import Pick
from mobilevit.pictures import Preprocessing


@dataclass(frozen=True)
class Augmentation:
    """The paper's "basic" augmentation: a random part of the picture, and a mirror image half of the time."""

    min_scale: float
    flip: bool
    seed: int

    def __call__(self, image: Image.Image, pick: Pick) -> Image.Image:
        """An RGB image of any size -> size_px by size_px of `pick`, by chance from (seed, epoch, number) alone."""
        random = np.random.default_rng((self.seed, pick.epoch, pick.number))
        image = random_resized_crop(image, pick.size_px, self.min_scale, random)
        return random_flip(image, random) if self.flip else image


@dataclass(frozen=True)
class Evaluation:
    """No chance: what the network will do to pictures once it is trained."""

    preprocessing: Preprocessing

    def __call__(self, image: Image.Image, pick: Pick) -> Image.Image:
        """An RGB image of any size -> crop_px by crop_px."""
        return self.preprocessing.resize_and_crop(image)


def random_resized_crop(image: Image.Image, size_px: int, min_scale: float, random: np.random.Generator) -> Image.Image:
    """A random part of `image`, `min_scale` to 1 of its area and 3:4 to 4:3 in shape, as size_px by size_px."""
    width, height = image.size
    for _ in range(10):
        area = random.uniform(min_scale, 1) * width * height
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            break
    else:  # a picture so long and thin that no such part fits: its middle, as square as allowed
        w, h = min(width, max(1, round(height * 4 / 3))), min(height, max(1, round(width * 4 / 3)))
        left, top = (width - w) // 2, (height - h) // 2
        return image.resize((size_px, size_px), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h))
    left, top = int(random.integers(width - w + 1)), int(random.integers(height - h + 1))
    return image.resize((size_px, size_px), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h))


def random_flip(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """`image`, mirrored left to right half of the time."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else image
