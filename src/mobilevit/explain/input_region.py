"""The region of an image that preprocessing passes to the network."""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class InputRegion:
    """The region of an image of `width` x `height` px that the network receives.

    `box` is (left, top, right, bottom) in pixels of the upright image; see `Preprocessing.input_box`. Points in it are
    given relative to its size, (x, y) in [0, 1), because every feature map is spread evenly over the box.
    """

    width: int
    height: int
    box: tuple[float, float, float, float]

    def to_relative(self, x: float, y: float) -> tuple[float, float]:
        """The relative coordinates of the center of the image pixel (x, y).

        Raises:
            ValueError: the pixel is outside the region.
        """
        left, top, right, bottom = self.box
        relative_x, relative_y = (x + 0.5 - left) / (right - left), (y + 0.5 - top) / (bottom - top)
        if not (0 <= relative_x < 1 and 0 <= relative_y < 1):
            first_x, first_y, end_x, end_y = (math.ceil(edge - 0.5) for edge in self.box)
            raise ValueError(
                f"point {x:g} {y:g} is outside the network's input; choose x from {first_x} to {end_x - 1} and y from "
                f"{first_y} to {end_y - 1} in this image of {self.width} x {self.height} px"
            )
        return relative_x, relative_y

    def crop(self, image: Image.Image, longest_px: int) -> Image.Image:
        """The region of `image` in its own aspect ratio, with a long side of `longest_px`."""
        left, top, right, bottom = self.box
        scale = longest_px / max(right - left, bottom - top)
        size = (max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale)))
        resample = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
        return image.resize(size, resample, box=self.box)
