"""Places of the image and places in what the network sees, against the preprocessing itself."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mobilevit.explain.view import view_of
from mobilevit.images import Preprocessing

CASES = [
    ((301, 200), Preprocessing(144, 128)),
    ((200, 301), Preprocessing(144, 127)),
    ((97, 100), Preprocessing((110, 96), 96)),
    ((240, 80), Preprocessing((64, 64), 64)),
    ((30, 1200), Preprocessing(64, 64)),
]


@pytest.mark.parametrize(("size", "preprocessing"), CASES)
def test_a_place_is_found_where_preprocessing_puts_it(size: tuple[int, int], preprocessing: Preprocessing):
    """Two images that say of every pixel where it is: x in one, y in the other."""
    width, height = size
    ramps = {
        "x": np.broadcast_to(np.linspace(0, 255, width), (height, width)),
        "y": np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width)),
    }
    seen = {}
    for name, ramp in ramps.items():
        image = Image.fromarray(ramp.astype(np.uint8)).convert("RGB")
        seen[name] = np.asarray(preprocessing.resize_and_crop(image))[..., 0].astype(float)
    view = view_of(preprocessing, width, height)
    left, top, right, bottom = view.box
    side = preprocessing.crop_px
    for u, v in ((0.3, 0.4), (0.5, 0.5), (0.62, 0.77)):
        x, y = int(left + u * (right - left)), int(top + v * (bottom - top))
        share_x, share_y = view.share(x, y)
        column, row = int(share_x * side), int(share_y * side)
        # Within two pixels of the coarser of the two images; grey levels are whole numbers.
        assert seen["x"][row, column] == pytest.approx(
            255 * x / (width - 1), abs=2 + 2 * 255 * max(1 / side, 1 / width)
        )
        assert seen["y"][row, column] == pytest.approx(
            255 * y / (height - 1), abs=2 + 2 * 255 * max(1 / side, 1 / height)
        )


def test_only_places_that_are_seen_can_be_chosen():
    view = view_of(Preprocessing(100, 80), 300, 200)  # resized to 150 x 100, the middle 80 x 80 of it
    assert view.box == (70, 20, 230, 180)
    assert view.share(70, 20) == pytest.approx((0.5 / 160, 0.5 / 160))
    assert view.share(229, 179) == pytest.approx((159.5 / 160, 159.5 / 160))
    for x, y in ((69, 100), (230, 100), (100, 19), (100, 180), (-1, 100), (1000, 100)):
        with pytest.raises(ValueError, match=r"x from 70 to 229 and y from 20 to 179: choose a place in there"):
            view.share(x, y)


def test_what_is_shown_is_what_is_seen():
    image = Image.new("RGB", (300, 200), "black")
    image.paste("white", (70, 20, 230, 180))
    cut = view_of(Preprocessing(100, 80), 300, 200).cut(image, 64)
    assert cut.size == (64, 64)
    assert np.asarray(cut).min() > 200  # but for a little ringing at the edge, all white
    assert view_of(Preprocessing((64, 64), 64), 300, 200).cut(image, 60).size == (60, 40)
