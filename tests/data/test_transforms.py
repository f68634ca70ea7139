"""Augmentation of images and batches, compared with torchvision by pixels or by distribution."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandAugment, RandomErasing, RandomResizedCrop, autoaugment

from mobilevit.data.sampler import Pick
from mobilevit.data.samples import Sample
from mobilevit.data.transforms import (
    Augmentation,
    Evaluation,
    Policy,
    mix,
    operations,
    rand_augment,
    random_crop,
    random_erasing,
    resize,
)
from mobilevit.images import Preprocessing

PHOTOGRAPHS = [Image.fromarray(photograph) for photograph in load_sample_images().images]


def noise(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def sample(pixels: np.ndarray) -> Sample:
    return Sample(pixels, 0, "image")


def sizes(boxes: list[tuple[int, int, int, int]]) -> np.ndarray:
    """(left, top, right, bottom) -> left, top, width, height as columns."""
    left, top, right, bottom = np.array(boxes, dtype=float).T
    return np.stack([left, top, right - left, bottom - top])


def ks_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Kolmogorov-Smirnov distance of two samples."""
    at = np.concatenate([a, b])
    return np.abs(
        np.searchsorted(np.sort(a), at, "right") / len(a) - np.searchsorted(np.sort(b), at, "right") / len(b)
    ).max()


BOX_FEATURES = {
    "area": lambda b: b[2] * b[3],
    "aspect ratio": lambda b: b[2] / b[3],
    "left": lambda b: b[0],
    "top": lambda b: b[1],
}


@pytest.mark.parametrize("size", [(640, 480), (333, 501), (1500, 500), (17, 16)])
@pytest.mark.parametrize("min_scale", [0.08, 0.6])
def test_random_crop_has_the_distribution_of_torchvision(size: tuple[int, int], min_scale: float):
    num = 2000
    random = np.random.default_rng(1)
    ours = sizes([random_crop(*size, min_scale, random) for _ in range(num)])
    torch.manual_seed(1)
    theirs = [
        RandomResizedCrop.get_params(torch.empty(3, *size[::-1]), [min_scale, 1], [3 / 4, 4 / 3]) for _ in range(num)
    ]
    theirs = np.array(theirs, dtype=float).T[[1, 0, 3, 2]]
    for name, feature in BOX_FEATURES.items():  # equal distributions exceed the limit with probability 0.001
        assert ks_distance(feature(ours), feature(theirs)) < 1.95 * math.sqrt(2 / num), name


def test_bounds_of_random_crops():
    width, height, min_scale = 1201, 1000, 0.25
    random = np.random.default_rng(0)
    left, top, w, h = sizes([random_crop(width, height, min_scale, random) for _ in range(2000)])
    assert min(left.min(), top.min()) == 0
    assert (left + w).max() == width
    assert (top + h).max() == height
    area, ratio, rounding = w * h / (width * height), w / h, 0.003
    assert min_scale - rounding < area.min() < min_scale + 0.01
    assert 0.95 < area.max() <= 1
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
        ((600, 300), 1, (100, 0, 400, 300)),  # the whole image would exceed 4:3
    ],
)
def test_images_with_a_single_possible_crop(size: tuple[int, int], min_scale: float, box: tuple[int, ...]):
    random = np.random.default_rng(0)
    assert {tuple(sizes([random_crop(*size, min_scale, random)])[:, 0]) for _ in range(50)} == {box}
    pixels = Augmentation(min_scale, flip=True, seed=0)(sample(noise(*size)), Pick(0, 0, 33))[0]
    assert pixels.shape == (33, 33, 3)


@pytest.mark.parametrize("photograph", PHOTOGRAPHS)
@pytest.mark.parametrize("size_px", [31, 160, 500])
def test_resize_is_that_of_pillow(photograph: Image.Image, size_px: int):
    theirs = np.asarray(photograph.resize((size_px, size_px), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(resize(np.array(photograph), size_px).numpy() - theirs).max() <= 1
    crop = np.array(photograph)[20:-31, 11:-40]
    theirs = np.asarray(Image.fromarray(crop).resize((size_px, size_px), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(resize(crop, size_px).numpy() - theirs).max() <= 1


def test_crop_fills_the_square():
    pixels = noise(51, 51)
    out = Augmentation(min_scale=1, flip=False, seed=0)(sample(pixels), Pick(0, 0, 40))[0]  # 1: the whole image
    assert np.array_equal(out, resize(pixels, 40))


def coordinates(width: int, height: int) -> np.ndarray:
    """Pixels that encode their position: red increases from left to right, green from top to bottom."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.linspace(0, 255, width), np.linspace(0, 255, height)[:, None]
    return pixels


@pytest.mark.parametrize("policy", ["basic", "advanced"])
def test_random_numbers_depend_on_seed_epoch_and_index_only(policy: Policy):
    image = sample(noise(100, 90))

    def augment(seed: int = 3, epoch: int = 4, number: int = 5, repeat: int = 0) -> bytes:
        augmentation = Augmentation(min_scale=0.08, flip=True, seed=seed, policy=policy)
        return augmentation(image, Pick(number, epoch, 32, repeat))[0].tobytes()

    first = augment()
    assert len({first, augment(seed=4), augment(epoch=5), augment(number=4), augment(epoch=5, number=4)}) == 5
    assert len({first, augment(repeat=1), augment(repeat=2)}) == 3
    np.random.seed(0)
    torch.manual_seed(0)
    before = np.random.get_state()[1].tobytes(), torch.get_rng_state()  # type: ignore[union-attr]
    assert augment() == first
    after = np.random.get_state()[1].tobytes(), torch.get_rng_state()  # type: ignore[union-attr]
    assert before[0] == after[0]
    assert torch.equal(before[1], after[1])


def test_crop_does_not_depend_on_the_output_size():
    augment = Augmentation(min_scale=0.08, flip=True, seed=0)
    for number in range(20):
        a, b = (augment(sample(coordinates(200, 180)), Pick(number, 0, size))[0].astype(int) for size in (32, 64))
        assert np.abs(a[[0, 0, -1, -1], [0, -1, 0, -1]] - b[[0, 0, -1, -1], [0, -1, 0, -1]]).max() <= 4  # corners


@pytest.mark.parametrize("flip", [True, False])
def test_horizontal_flip(flip: bool):
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    pixels[:8, 16:] = 255  # top right
    augment = Augmentation(min_scale=1, flip=flip, seed=0)
    outs = [augment(sample(pixels), Pick(i, 0, 32))[0] for i in range(400)]
    num_flipped = sum(np.array_equal(out, pixels[:, ::-1]) for out in outs)
    assert num_flipped + sum(np.array_equal(out, pixels) for out in outs) == 400
    assert 160 < num_flipped < 240 if flip else num_flipped == 0


def test_file_and_its_bytes_give_equal_pixels(tmp_path: Path):
    PHOTOGRAPHS[0].save(tmp_path / "photograph.jpg", quality=90)
    augment = Augmentation(min_scale=0.08, flip=True, seed=0)
    for size_px in (32, 256):
        pick = Pick(1, 2, size_px)
        file, content = tmp_path / "photograph.jpg", (tmp_path / "photograph.jpg").read_bytes()
        assert np.array_equal(augment(Sample(file, 0, "a"), pick)[0], augment(Sample(content, 0, "b"), pick)[0])


def test_evaluation_is_the_preprocessing_of_prediction():
    pixels = noise(71, 50)
    preprocessing = Preprocessing(resize_px=40, crop_px=32)
    out = torch.tensor(Evaluation(preprocessing)(sample(pixels), Pick(0, 0, 99))[0])
    assert torch.equal(preprocessing(pixels), out.permute(2, 0, 1) / 255)


# ---------------------------------------------------------------------------------------------------------------------
# The advanced augmentation


@pytest.mark.parametrize("size_px", [64, 97])
@pytest.mark.parametrize("sign", [1, -1])
def test_operations_are_those_of_torchvision(size_px: int, sign: int):
    image = PHOTOGRAPHS[1].resize((size_px, size_px))
    ours = operations(size_px, sign)
    theirs = RandAugment()._augmentation_space(31, (size_px, size_px))
    assert {name.replace(" ", "") for name in ours} == {name.lower() for name in theirs}
    for name, (magnitudes, is_signed) in theirs.items():
        magnitude = (sign if is_signed else 1) * float(magnitudes[9]) if magnitudes.ndim else 0.0
        expected: Any = autoaugment._apply_op(image, name, magnitude, InterpolationMode.NEAREST, None)  # type: ignore[arg-type]
        [operation] = [ours[our_name] for our_name in ours if our_name.replace(" ", "") == name.lower()]
        assert operation(image).tobytes() == expected.tobytes(), name


def test_pairs_of_operations_are_uniformly_distributed():
    image = Image.fromarray(coordinates(24, 24))
    pairs: dict[bytes, float] = {}
    for sign_1 in (1, -1):
        for first in operations(24, sign_1).values():
            for sign_2 in (1, -1):
                for second in operations(24, sign_2).values():
                    out = second(first(image)).tobytes()
                    pairs[out] = pairs.get(out, 0) + 1 / 28**2
    random = np.random.default_rng(0)
    num = 8000
    counts = dict.fromkeys(pairs, 0)
    for _ in range(num):
        counts[rand_augment(image, random).tobytes()] += 1
    chi_2 = sum((counts[out] - num * share) ** 2 / (num * share) for out, share in pairs.items())
    degrees = len(pairs) - 1
    assert degrees > 200
    assert abs(chi_2 - degrees) < 4 * math.sqrt(2 * degrees)


def erased(pixels: np.ndarray) -> tuple[float, float, float, float] | None:
    """(left, top, width, height) of the black pixels."""
    rows, columns = (np.flatnonzero((pixels == 0).all(2).any(axis)) for axis in (1, 0))
    return (columns[0], rows[0], len(columns), len(rows)) if len(rows) else None


def test_random_erasing_has_the_distribution_of_torchvision():
    num, (width, height) = 6000, (90, 70)
    random = np.random.default_rng(0)
    found = [erased(random_erasing(np.full((height, width, 3), 7, np.uint8), random)) for _ in range(num)]
    ours = np.array([box for box in found if box], dtype=float).T
    assert abs(ours.shape[1] / num - 0.25) < 4 * math.sqrt(0.25 * 0.75 / num)
    torch.manual_seed(0)
    image = torch.zeros(3, height, width)
    params = [RandomErasing.get_params(image, (0.02, 0.33), (0.3, 3.3), [0.0]) for _ in range(2000)]
    theirs = np.array([(j, i, w, h) for i, j, h, w, _ in params], dtype=float).T
    for name, feature in BOX_FEATURES.items():
        limit = 1.95 * math.sqrt(1 / ours.shape[1] + 1 / theirs.shape[1]) + 0.01  # two boxes of 10,000 fill a side
        assert ks_distance(feature(ours), feature(theirs)) < limit, name


def test_advanced_adds_to_basic():
    basic = Augmentation(min_scale=0.3, flip=True, seed=0)
    advanced = replace(basic, policy="advanced")
    images = [sample(np.asarray(photograph)) for photograph in PHOTOGRAPHS]
    num_equal = 0
    for i in range(300):
        pick = Pick(i, 0, 32)
        a, b = (augment(images[i % 2], pick)[0] for augment in (basic, advanced))
        assert a.shape == b.shape == (32, 32, 3)
        assert a.dtype == b.dtype == np.uint8
        num_equal += np.array_equal(a, b)
    # Equal if both operations are the identity or change nothing in this image, and nothing is erased.
    assert 0 < num_equal < 30


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def batch(num: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Images in which all pixels are different integers, and one-hot targets."""
    return torch.arange(num * 3.0 * height * width).reshape(num, 3, height, width), torch.eye(num)


@pytest.mark.parametrize(("num", "height", "width"), [(1, 8, 8), (2, 16, 16), (5, 33, 20)])
def test_mixed_targets_are_the_fractions_of_the_images(num: int, height: int, width: int):
    pixels, targets = batch(num, height, width)
    pixels = pixels.to(memory_format=torch.channels_last)
    before = pixels.clone(), targets.clone()
    num_cutmix = 0
    for seed in range(200):
        torch.manual_seed(seed)
        mixed, weights = mix(pixels, targets)
        torch.manual_seed(seed)
        assert all(map(torch.equal, mix(pixels, targets), (mixed, weights)))
        assert num == 1 or mixed.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(weights.sum(1), torch.ones(num))
        if not torch.isin(mixed, pixels).all():  # Mixup
            torch.testing.assert_close(mixed, torch.einsum("ij,jchw->ichw", weights, pixels))
            continue
        num_cutmix += 1
        source = mixed.long() // (3 * height * width)  # index of the image that a pixel comes from
        assert torch.equal(mixed.long() % (3 * height * width), pixels[0].long().expand_as(mixed))  # same position
        for i in range(num):
            counts = torch.bincount(source[i].flatten(), minlength=num) / (3 * height * width)
            torch.testing.assert_close(weights[i], counts)
            foreign = (source[i, 0] != i).nonzero()
            if len(foreign):
                assert len(foreign) == (foreign.amax(0) - foreign.amin(0) + 1).prod()  # a single box
    assert torch.equal(pixels, before[0])
    assert torch.equal(targets, before[1])
    assert num == 1 or 70 < num_cutmix < 130


def test_mixing_proportions_have_the_published_distributions():
    pixels, targets = torch.arange(3.0)[:, None, None, None].expand(3, 3, 64, 64), torch.eye(3)
    fractions: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(1500):
        torch.manual_seed(seed)
        mixed, weights = mix(pixels, targets)
        fractions[bool(torch.isin(mixed, pixels).all())].append(float(weights[0, 0]))
    # A lambda of Mixup next to 0 or 1 changes nothing in float32 and is counted as CutMix.
    assert 650 < len(fractions[True]) < 850
    random = np.random.default_rng(1)
    assert ks_distance(np.array(fractions[False]), random.beta(0.2, 0.2, 5000)) < 0.1
    # CutMix: a box with a fraction 1 - lambda of the area around a random point, clipped at the border.
    lam, x, y = random.random((3, 5000))
    half = np.sqrt(1 - lam) / 2
    w, h = (np.minimum(at + half, 1) - np.maximum(at - half, 0) for at in (x, y))
    assert ks_distance(np.array(fractions[True]), 1 - w * h) < 0.1
