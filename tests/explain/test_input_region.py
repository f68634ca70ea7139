"""The input region against the preprocessing itself."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mobilevit.explain.input_region import InputRegion
from mobilevit.images import Preprocessing

CASES = [
    ((301, 200), Preprocessing(144, 128)),
    ((200, 301), Preprocessing(144, 127)),
    ((97, 100), Preprocessing((110, 96), 96)),
    ((240, 80), Preprocessing((64, 64), 64)),
    ((30, 1200), Preprocessing(64, 64)),
]


@pytest.mark.parametrize(("size", "preprocessing"), CASES)
def test_points_are_where_preprocessing_puts_them(size: tuple[int, int], preprocessing: Preprocessing):
    """Two images whose pixel values encode their x and y coordinates."""
    width, height = size
    ramps = {
        "x": np.broadcast_to(np.linspace(0, 255, width), (height, width)),
        "y": np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width)),
    }
    preprocessed = {}
    for name, ramp in ramps.items():
        image = Image.fromarray(ramp.astype(np.uint8)).convert("RGB")
        preprocessed[name] = np.asarray(preprocessing.resize_and_crop(image))[..., 0].astype(float)
    region = InputRegion(width, height, preprocessing.input_box(width, height))
    left, top, right, bottom = region.box
    side = preprocessing.crop_px
    for u, v in ((0.3, 0.4), (0.5, 0.5), (0.62, 0.77)):
        x, y = int(left + u * (right - left)), int(top + v * (bottom - top))
        relative_x, relative_y = region.to_relative(x, y)
        column, row = int(relative_x * side), int(relative_y * side)
        # Within two pixels of the coarser image; gray levels are integers.
        assert preprocessed["x"][row, column] == pytest.approx(
            255 * x / (width - 1), abs=2 + 2 * 255 * max(1 / side, 1 / width)
        )
        assert preprocessed["y"][row, column] == pytest.approx(
            255 * y / (height - 1), abs=2 + 2 * 255 * max(1 / side, 1 / height)
        )


def test_points_outside_the_region():
    # Resized to 150 x 100 px, of which the central 80 x 80 px remain.
    region = InputRegion(300, 200, Preprocessing(100, 80).input_box(300, 200))
    assert region.box == (70, 20, 230, 180)
    assert region.to_relative(70, 20) == pytest.approx((0.5 / 160, 0.5 / 160))
    assert region.to_relative(229, 179) == pytest.approx((159.5 / 160, 159.5 / 160))
    for x, y in ((69, 100), (230, 100), (100, 19), (100, 180), (-1, 100), (1000, 100)):
        with pytest.raises(ValueError, match="x from 70 to 229 and y from 20 to 179"):
            region.to_relative(x, y)


def test_crop():
    image = Image.new("RGB", (300, 200), "black")
    image.paste("white", (70, 20, 230, 180))
    crop = InputRegion(300, 200, Preprocessing(100, 80).input_box(300, 200)).crop(image, 64)
    assert crop.size == (64, 64)
    assert np.asarray(crop).min() > 200  # white, except for ringing at the edge
    assert InputRegion(300, 200, Preprocessing((64, 64), 64).input_box(300, 200)).crop(image, 60).size == (60, 40)
