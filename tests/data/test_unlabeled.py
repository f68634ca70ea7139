"""Images without labels: the validation split, decoded images, crops."""

from __future__ import annotations

import gc
import math
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mobilevit.data.samples import ImageFiles
from mobilevit.data.unlabeled import DecodedImages, cached_short_side, decode_once, find_unlabeled, repeat
from mobilevit.images import read_image

SIZES = ((40, 60), (90, 50), (33, 33), (200, 100), (64, 48))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i, (width, height) in enumerate(SIZES):
        file = root / ("deep/er" if i % 2 else ".") / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file)
    (root / "notes.txt").write_text("ignored")
    return root


def test_split(folder: Path, tmp_path: Path):
    train, val = find_unlabeled(folder, 0.4, ("a", "b"))
    assert (len(train), len(val)) == (3, 2)
    assert not set(train.keys()) & set(val.keys())
    assert train.class_names == ("a", "b")
    one_train, one_val = find_unlabeled(folder / "0.png", 0.4, ("a", "b"))
    assert list(one_train.keys()) == list(one_val.keys()) == ["0.png"]
    with pytest.raises(ValueError, match="none"):
        find_unlabeled(folder / "none", 0.4, ("a",))
    with pytest.raises(ValueError, match=str(tmp_path)):
        find_unlabeled(tmp_path, 0.4, ("a",))


def test_crops_of_an_image(folder: Path):
    train, _ = find_unlabeled(folder, 0.4, ("a",))
    repeated = repeat(train, 3)
    assert [repeated[i].name for i in range(len(repeated))] == [train[i].name for i in (0, 0, 0, 1, 1, 1, 2, 2, 2)]


def test_pixels_are_those_of_the_files(folder: Path):
    train, _ = find_unlabeled(folder, 0.2, ("a",))
    decoded = decode_once(train, min_px=1000, max_bytes=1e6)
    for images in (decoded, pickle.loads(pickle.dumps(decoded))):
        for i in range(len(train)):
            assert isinstance(train.images, ImageFiles)
            pixels = images[i].image
            assert isinstance(pixels, np.ndarray)
            np.testing.assert_array_equal(pixels, np.asarray(read_image(train[i].image, "")))
            assert images[i].name == train[i].name


def test_large_images_are_reduced(folder: Path):
    train, _ = find_unlabeled(folder, 0.2, ("a",))
    decoded = decode_once(train, min_px=40, max_bytes=1e6)
    for i in range(len(train)):
        pixels = decoded[i].image
        assert isinstance(pixels, np.ndarray)
        original = read_image(train[i].image, "")
        assert min(pixels.shape[:2]) == min(40, *original.size)
        expected = np.asarray(original.resize(pixels.shape[1::-1], Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(pixels - expected).mean() < 4


def test_the_limit_and_the_file(folder: Path):
    """Images that do not fit remain files, and so do unreadable ones; the temporary file is removed."""
    train, _ = find_unlabeled(folder, 0.2, ("a",))
    sizes = [3 * math.prod(read_image(train[i].image, "").size) for i in range(len(train))]
    decoded = decode_once(train, min_px=1000, max_bytes=sizes[0] + sizes[1])
    assert isinstance(decoded.images, DecodedImages)
    kinds = [type(decoded[i].image) for i in range(len(train))]
    assert issubclass(kinds[0], np.ndarray)
    assert issubclass(kinds[1], np.ndarray)
    assert all(issubclass(kind, Path) for kind in kinds[2:])
    file = decoded.images._file
    assert file.stat().st_size == sizes[0] + sizes[1]
    del decoded
    gc.collect()
    assert not file.exists()
    foreign = Path(tempfile.gettempdir()) / "mobilevit-x-y.pixels"  # not written by this package
    foreign.touch()
    (folder / "0_broken.png").write_bytes(b"\x89PNG broken")
    try:
        train, _ = find_unlabeled(folder, 0.2, ("a",))
        decoded = decode_once(train, min_px=1000, max_bytes=1e6)
        names = [Path(train[i].name).name for i in range(len(train))]
        if "0_broken.png" in names:
            assert isinstance(decoded[names.index("0_broken.png")].image, Path)
        assert foreign.exists()
    finally:
        foreign.unlink()
        (folder / "0_broken.png").unlink()


def test_no_crop_loses_detail():
    short = cached_short_side(64, 0.08)
    assert short * short * 0.08 >= 64 * 64
