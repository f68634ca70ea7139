"""Which part of an image a network sees, and where in it a place of the image is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import Image

from mobilevit.images import Preprocessing


@dataclass(frozen=True)
class View:
    """What preprocessing leaves of an image of `width` by `height` px.

    `box` is (left, top, right, bottom) in pixels of the upright image: (0, 0) is its upper left corner. Places in it
    are given as shares of its sides, (x, y) from 0 to 1, since every map of the network is spread evenly over it.
    """

    width: int
    height: int
    box: tuple[float, float, float, float]

    def share(self, x: float, y: float) -> tuple[float, float]:
        """Where the middle of pixel (x, y) of the image is in the box.

        Raises:
            ValueError: the network does not see this pixel.
        """
        left, top, right, bottom = self.box
        share_x, share_y = (x + 0.5 - left) / (right - left), (y + 0.5 - top) / (bottom - top)
        if not (0 <= share_x < 1 and 0 <= share_y < 1):
            first_x, first_y, end_x, end_y = (math.ceil(edge - 0.5) for edge in self.box)
            raise ValueError(
                f"the place is {x:g} {y:g}; of this image of {self.width} x {self.height} px the network sees "
                f"x from {first_x} to {end_x - 1} and y from {first_y} to {end_y - 1}: choose a place in there"
            )
        return share_x, share_y

    def cut(self, image: Image.Image, longest_px: int) -> Image.Image:
        """The part of the image that the network sees, in the image's own proportions and at a size to look at."""
        left, top, right, bottom = self.box
        scale = longest_px / max(right - left, bottom - top)
        size = (max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale)))
        filter = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
        return image.resize(size, filter, box=self.box)


def view_of(preprocessing: Preprocessing, width: int, height: int) -> View:
    """What `preprocessing` leaves of an image of this size; it mirrors `Preprocessing.resize_and_crop`."""
    p = preprocessing
    if isinstance(p.resize_px, int):
        short = min(width, height)
        new_width, new_height = (int(p.resize_px * side / short) for side in (width, height))
    else:
        new_height, new_width = p.resize_px
    left, top = (new_width - p.crop_px) // 2, (new_height - p.crop_px) // 2
    x, y = width / new_width, height / new_height
    box = (left * x, top * y, min((left + p.crop_px) * x, width), min((top + p.crop_px) * y, height))
    return View(width, height, box)
