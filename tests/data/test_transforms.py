"""The augmentation: the part of the picture it takes against torchvision's, and what it may depend on."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from mobilevit.data.sampler import Pick
from mobilevit.data.transforms import Augmentation, Evaluation, random_resized_crop
from mobilevit.pictures import Preprocessing


@pytest.fixture
def boxes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int, int]]:
    """(left, top, width, height) of every part that was taken from a picture; the pictures that come out are black."""
    taken = []

    def resize(self: Image.Image, size: tuple[int, int], resample: Any = None, box: Any = None) -> Image.Image:
        left, top, right, bottom = box
        assert 0 <= left < right <= self.width
        assert 0 <= top < bottom <= self.height
        taken.append((left, top, right - left, bottom - top))
        return Image.new("RGB", size)

    monkeypatch.setattr(Image.Image, "resize", resize)
    return taken


def furthest_apart(a: np.ndarray, b: np.ndarray) -> float:
    """Kolmogorov and Smirnov's distance of two samples: 0 to 1."""
    at = np.concatenate([a, b])
    return np.abs(
        np.searchsorted(np.sort(a), at, "right") / len(a) - np.searchsorted(np.sort(b), at, "right") / len(b)
    ).max()


@pytest.mark.parametrize("size", [(640, 480), (333, 501), (1500, 500), (17, 16)])
@pytest.mark.parametrize("min_scale", [0.08, 0.6])
def test_the_parts_are_distributed_as_torchvisions(boxes, size: tuple[int, int], min_scale: float):
    num = 2000
    image, random = Image.new("RGB", size), np.random.default_rng(1)
    for _ in range(num):
        random_resized_crop(image, 32, min_scale, random)
    ours = np.array(boxes, dtype=float)
    torch.manual_seed(1)
    theirs = [
        RandomResizedCrop.get_params(torch.empty(3, *size[::-1]), [min_scale, 1], [3 / 4, 4 / 3]) for _ in range(num)
    ]
    theirs = np.array(theirs, dtype=float)[:, [1, 0, 3, 2]]
    looks = {
        "area": lambda b: b[:, 2] * b[:, 3],
        "ratio": lambda b: b[:, 2] / b[:, 3],
        "left": lambda b: b[:, 0] / np.maximum(1, size[0] - b[:, 2]),
        "top": lambda b: b[:, 1] / np.maximum(1, size[1] - b[:, 3]),
    }
    for name, look in looks.items():  # 1.95 is what one pair of equal distributions in a thousand goes beyond
        assert furthest_apart(look(ours), look(theirs)) < 1.95 * math.sqrt(2 / num), name


def test_the_promised_bounds(boxes):
    width, height, min_scale = 1201, 1000, 0.25
    image, random = Image.new("RGB", (width, height)), np.random.default_rng(0)
    for _ in range(2000):
        random_resized_crop(image, 32, min_scale, random)
    w, h = np.array(boxes, dtype=float)[:, 2:].T
    share, ratio, rounding = w * h / (width * height), w / h, 0.003
    assert min_scale - rounding < share.min() < min_scale + 0.01
    assert 0.95 < share.max() <= 1
    assert 3 / 4 - rounding < ratio.min() < 0.76
    assert 1.32 < ratio.max() < 4 / 3 + rounding


@pytest.mark.parametrize(
    ("size", "min_scale", "box"),
    [
        ((1000, 1), 0.08, (499, 0, 1, 1)),
        ((1, 1000), 0.08, (0, 499, 1, 1)),
        ((3, 1000), 0.08, (0, 498, 3, 4)),
        ((1, 1), 0.08, (0, 0, 1, 1)),
        ((1, 1), 1, (0, 0, 1, 1)),
        ((8, 8), 1, (0, 0, 8, 8)),
        ((321, 321), 1, (0, 0, 321, 321)),
        ((600, 300), 1, (100, 0, 400, 300)),  # beyond 4:3 the whole is not allowed
    ],
)
def test_pictures_that_leave_no_choice(boxes, size: tuple[int, int], min_scale: float, box: tuple[int, ...]):
    random = np.random.default_rng(0)
    for _ in range(50):
        out = random_resized_crop(Image.new("RGB", size), 33, min_scale, random)
        assert out.size == (33, 33)
    assert set(boxes) == {box}


def test_the_part_fills_the_square():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (51, 51, 3), dtype=np.uint8))
    out = random_resized_crop(image, 40, 1, np.random.default_rng(0))  # of a square at 1: all of it
    assert out.tobytes() == image.resize((40, 40), Image.Resampling.BILINEAR).tobytes()


def test_chance_comes_from_seed_epoch_and_number_alone(boxes):
    image = Image.new("RGB", (100, 90))

    def box(seed: int = 3, epoch: int = 4, number: int = 5, size_px: int = 32) -> tuple[int, int, int, int]:
        Augmentation(min_scale=0.08, flip=True, seed=seed)(image, Pick(number, epoch, size_px))
        return boxes[-1]

    first = box()
    assert len({first, box(seed=4), box(epoch=5), box(number=4), box(epoch=5, number=4)}) == 5
    np.random.seed(0)
    torch.manual_seed(0)
    assert box() == first
    assert box(size_px=64) == first


@pytest.mark.parametrize("flip", [True, False])
def test_mirror_images(flip: bool):
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    pixels[:8, 16:] = 255  # top right
    augment = Augmentation(min_scale=1, flip=flip, seed=0)
    outs = [np.asarray(augment(Image.fromarray(pixels), Pick(i, 0, 32))) for i in range(400)]
    num_flipped = sum(np.array_equal(out, pixels[:, ::-1]) for out in outs)
    assert num_flipped + sum(np.array_equal(out, pixels) for out in outs) == 400
    assert 160 < num_flipped < 240 if flip else num_flipped == 0


def test_evaluation_sees_what_the_network_will_see():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 71, 3), dtype=np.uint8))
    preprocessing = Preprocessing(resize_px=40, crop_px=32)
    pixels = np.asarray(Evaluation(preprocessing)(image, Pick(0, 0, 99)))
    assert torch.equal(preprocessing(image), torch.tensor(pixels).permute(2, 0, 1) / 255)
