"""The transforms of detection and segmentation: boxes and masks are transformed like the image."""

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.ops import box_iou
from torchvision.transforms.v2 import functional as V

from mobilevit.data import box_transforms
from mobilevit.data.box_transforms import (
    MIN_IOUS,
    BoxAugmentation,
    BoxEvaluation,
    BoxTarget,
    distort,
    random_iou_crop,
    stack_boxes,
)
from mobilevit.data.boxes import Boxes
from mobilevit.data.mask_transforms import MaskAugmentation, MaskEvaluation, stack_masks
from mobilevit.data.masks import MaskCoding, MaskFile
from mobilevit.data.sampler import Pick
from mobilevit.data.samples import Sample
from mobilevit.data.transforms import warp
from mobilevit.images import Preprocessing

SIZES = [
    (300, 200),
    (201, 333),
    (640, 481),
    (1203, 900),
]  # width and height; crops of the last two are aligned to a grid
COLOURS = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255)], np.uint8)


def boxes(*corners: tuple[float, ...], labels: list[int] | None = None, crowd: list[bool] | None = None) -> Boxes:
    array = np.array(corners, np.float32).reshape(-1, 4)
    return Boxes(
        array,
        np.array(range(len(array)) if labels is None else labels, np.int64),
        np.array([False] * len(array) if crowd is None else crowd, bool),
        (array[:, 2:] - array[:, :2]).prod(1),
    )


def scene(width: int, height: int, seed: int = 0) -> tuple[np.ndarray, Boxes, np.ndarray]:
    """Three rectangles without overlap, red, green and blue, on black: pixels, boxes and the mask (0 is black)."""
    random = np.random.default_rng(seed)
    pixels, mask = np.zeros((height, width, 3), np.uint8), np.zeros((height, width), np.uint8)
    corners = []
    for i, color in enumerate(COLOURS):
        w, h = (int(random.integers(side // 6, side // 3 - 2)) for side in (width, height))
        left, top = i * width // 3 + int(random.integers(width // 3 - w)), int(random.integers(height - h))
        pixels[top : top + h, left : left + w] = color
        mask[top : top + h, left : left + w] = i + 1
        corners.append((left, top, left + w, top + h))
    return pixels, boxes(*corners), mask


def jpeg(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


@pytest.fixture
def mask_file(tmp_path: Path):
    def write(mask: np.ndarray) -> MaskFile:
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.png"
        Image.fromarray(mask).save(file)
        return MaskFile(file, MaskCoding(tuple(range(4))))

    return write


def classes_seen(pixels: np.ndarray) -> np.ndarray:
    """The index of the color of each pixel, from 1; 0 for black. Ignores brightness and saturation."""
    values = pixels.astype(int)
    return np.where(values.max(2) - values.min(2) < 40, 0, values.argmax(2) + 1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("compressed", [False, True])
def test_boxes_follow_the_image(size: tuple[int, int], compressed: bool):
    pixels, labels, _ = scene(*size)
    sample = Sample(jpeg(pixels) if compressed else pixels, labels, "scene")
    num_cut, side = 0, 96
    for number in range(60):
        out, target = BoxAugmentation(min_scale=0.09, flip=True, seed=1)(sample, Pick(number, 2, side))
        assert out.shape == (side, side, 3)
        assert out.dtype == np.uint8
        assert target.corners.dtype == np.float32
        seen = classes_seen(out)
        for (left, top, right, bottom), label in zip(side * target.corners, target.labels, strict=True):
            rows, columns = (np.flatnonzero((seen == label + 1).any(axis)) for axis in (1, 0))
            expected = np.array((left, top, right, bottom))
            found = np.array((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
            # Resizing and JPEG blur the edges.
            assert np.abs(found - expected).max() < 1.7, (number, label)
            num_cut += bool((np.isin(expected, (0, side))).any())
    assert num_cut > 20


def test_crowd_boxes_and_boxes_with_center_outside_are_dropped():
    pixels, labels, _ = scene(300, 200)
    crowd = replace(labels, crowd=np.array([False, True, False]))
    nums = set()
    for number in range(100):
        pick = Pick(number, 0, 64)
        _, target = BoxAugmentation(min_scale=0.09, flip=True, seed=0)(Sample(pixels, crowd, "x"), pick)
        assert 1 not in target.labels
        assert (target.corners[:, 2:] > target.corners[:, :2]).all()
        assert target.corners.min(initial=0) >= 0
        assert target.corners.max(initial=1) <= 1
        nums.add(len(target.labels))
    assert nums == {1, 2}


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (257, 300)])
def test_images_without_boxes(size: tuple[int, int]):
    pixels = np.zeros((*size[::-1], 3), np.uint8)
    for number in range(20):
        out, target = BoxAugmentation(0.09, True, 0)(Sample(pixels, boxes(), "x"), Pick(number, 0, 32))
        assert out.shape == (32, 32, 3)
        assert target.corners.shape == (0, 4)
        assert target.labels.shape == (0,)


@pytest.mark.parametrize(("width", "height"), [(200, 150), (613, 480)])
def test_properties_of_ssd_crops(width: int, height: int):
    """Shape of each crop, a box center inside it, and its IoU with a box by torchvision's box_iou."""
    _, labels, _ = scene(width, height)
    random = np.random.default_rng(0)
    best = []
    for _ in range(1000):
        crop = random_iou_crop(width, height, labels.corners, 0.09, random)
        left, top, right, bottom = crop
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        best.append(box_iou(torch.tensor([crop]).float(), torch.from_numpy(labels.corners)).max().item())
        if crop == (0, 0, width, height):
            continue
        assert 0.5 <= (right - left) / (bottom - top) <= 2
        assert min((right - left) / width, (bottom - top) / height) >= 0.3 - 8 / min(width, height)
        centers = labels.corners.reshape(-1, 2, 2).mean(1)
        assert ((centers > (left, top)) & (centers < (right, bottom))).all(1).any()
    # One sample in seven is the whole image, and so is the fallback for large minimum IoUs.
    assert 0 < min(best) < 0.1
    whole = box_iou(torch.tensor([[0, 0, width, height]]).float(), torch.from_numpy(labels.corners)).max().item()
    assert 1 / len(MIN_IOUS) < np.mean(np.isclose(best, whole)) < 0.75


def test_ssd_crops_reach_the_sampled_iou(monkeypatch: pytest.MonkeyPatch):
    corners = np.array([(40, 30, 150, 120)], np.float32)
    for least in (0.3, 0.7, 0.9):
        monkeypatch.setattr(box_transforms, "MIN_IOUS", (least,))
        random = np.random.default_rng(0)
        crops = [random_iou_crop(200, 150, corners, 0.09, random) for _ in range(300)]
        found = [crop for crop in crops if crop != (0, 0, 200, 150)]
        assert found
        overlaps = box_iou(torch.tensor(found).float(), torch.from_numpy(corners))
        assert least <= overlaps.min() < least + 0.05


def test_distortion_is_that_of_torchvision():
    """Every operation against torchvision's; the probabilities and ranges of the operations."""
    photograph = Image.fromarray(load_sample_images().images[0]).resize((64, 48))

    class Prepared:
        """A generator that returns given values."""

        def __init__(self, first: bool, is_on: tuple[bool, ...], amounts: tuple[float, ...]):
            self.values: list[Any] = [0.0 if first else 1.0, np.where(is_on, 0.0, 1.0)]
            self.amounts = np.array(amounts)

        def random(self, size: int | None = None) -> Any:
            return self.values.pop(0)

        def uniform(self, low: tuple[float, ...], high: tuple[float, ...]) -> np.ndarray:
            assert (low, high) == ((0.875, 0.5, 0.5, -0.05), (1.125, 1.5, 1.5, 0.05))
            return self.amounts

    amounts = (1.1, 0.7, 1.3, -0.03)
    operations = (V.adjust_brightness, V.adjust_contrast, V.adjust_saturation, V.adjust_hue)
    for order, first in (((0, 1, 2, 3), True), ((0, 2, 3, 1), False)):
        for bits in range(16):
            is_on = tuple(bool(bits >> i & 1) for i in range(4))
            expected: Any = photograph
            for i in order:
                if is_on[i]:
                    expected = operations[i](expected, amounts[i])
            out = distort(photograph, Prepared(first, is_on, amounts))  # type: ignore[arg-type]
            np.testing.assert_array_equal(out, np.asarray(expected))
    random = np.random.default_rng(0)
    num_same = sum(np.array_equal(distort(photograph, random), np.asarray(photograph)) for _ in range(800))
    assert abs(num_same / 800 - 1 / 16) < 0.03


def test_box_evaluation():
    pixels, labels, _ = scene(301, 200)
    out, truth = BoxEvaluation(warp(64))(Sample(pixels, labels, "x"), Pick(0, 0, 99))
    expected = Image.fromarray(pixels).resize((64, 64), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(out, np.asarray(expected))
    assert (truth.height, truth.width) == (200, 301)
    assert truth.boxes is labels
    assert warp(64) == Preprocessing(resize_px=(64, 64), crop_px=64)


def test_stacked_boxes():
    targets = [BoxTarget(np.full((n, 4), n / 10, np.float32), np.arange(n)) for n in (2, 0, 3)]
    batch = stack_boxes(targets)
    assert batch.labels.tolist() == [[0, 1, -1], [-1, -1, -1], [0, 1, 2]]
    assert batch.corners.shape == (3, 3, 4)
    assert batch.corners.dtype == torch.float32
    assert batch.corners.sum() == pytest.approx(4 * (2 * 0.2 + 3 * 0.3))
    assert stack_boxes(targets[1:2]).labels.tolist() == [[-1]]  # at least one column


# ---------------------------------------------------------------------------------------------------------------------
# Masks


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("compressed", [False, True])
def test_masks_follow_the_image(size: tuple[int, int], compressed: bool, mask_file):
    pixels, _, mask = scene(*size)
    sample = Sample(jpeg(pixels) if compressed else pixels, mask_file(mask), "scene")
    side = 97
    inner_fractions, nums_ignored = [], []
    for number in range(60):
        out, classes = MaskAugmentation(min_scale=0.08, flip=True, seed=1)(sample, Pick(number, 2, side))
        assert out.shape == (side, side, 3)
        assert classes.shape == (side, side)
        assert out.dtype == classes.dtype == np.uint8
        assert out.flags.c_contiguous
        assert classes.flags.c_contiguous
        is_ignored = classes == 255
        nums_ignored.append(int(is_ignored.sum()))
        assert (out[is_ignored] < 128).all()  # padding is black, except where the edge is blurred
        # Away from blurred edges, colors and classes agree.
        patches = np.lib.stride_tricks.sliding_window_view(classes, (5, 5)).reshape(side - 4, side - 4, -1)
        is_inner = (patches == patches[..., :1]).all(2) & (patches[..., 0] != 255)
        same = classes_seen(out)[2:-2, 2:-2] == patches[..., 0]
        assert same[is_inner].all(), number
        inner_fractions.append(is_inner.mean())
    assert np.mean(inner_fractions) > 0.3
    assert min(nums_ignored) == 0 < max(nums_ignored)


def test_min_scale_of_1_does_not_crop_a_square(mask_file):
    mask = np.zeros((120, 120), np.uint8)
    mask[0, :], mask[-1, :], mask[:, 0], mask[:, -1] = 1, 1, 1, 1
    sample = Sample(np.zeros((120, 120, 3), np.uint8), mask_file(mask), "x")
    num_straight = 0
    for number in range(60):
        _, classes = MaskAugmentation(min_scale=1, flip=False, seed=0)(sample, Pick(number, 0, 240))
        inside = np.argwhere(classes != 255)
        (top, left), (bottom, right) = inside.min(0), inside.max(0)
        if len(inside) != (bottom - top + 1) * (right - left + 1):
            continue  # rotated
        num_straight += 1
        assert 120 <= bottom - top + 1 == right - left + 1 <= 240
        assert (classes[top, left : right + 1] == 1).all()
        assert (classes[top : bottom + 1, right] == 1).all()
    assert 15 < num_straight < 45


@pytest.mark.parametrize("size", [(1, 1), (2, 150), (150, 2), (40, 41)])
def test_tiny_images(size: tuple[int, int], mask_file):
    mask = np.ones(size[::-1], np.uint8)
    sample = Sample(np.full((*size[::-1], 3), 200, np.uint8), mask_file(mask), "x")
    for number in range(20):
        out, classes = MaskAugmentation(min_scale=0.08, flip=True, seed=0)(sample, Pick(number, 0, 64))
        assert out.shape == (64, 64, 3)
        assert classes.shape == (64, 64)
        assert set(np.unique(classes)) <= {1, 255}


def test_ranges_of_sizes_and_rotations(mask_file):
    """Length and slope of a line in the mask give the scale and the rotation."""
    pixels = np.zeros((100, 100, 3), np.uint8)
    mask = np.zeros((100, 100), np.uint8)
    mask[49:51, 40:60] = 1
    sample = Sample(pixels, mask_file(mask), "x")
    lengths, degrees = [], []
    for number in range(400):
        _, classes = MaskAugmentation(min_scale=0.08, flip=False, seed=0)(sample, Pick(number, 0, 200))
        y, x = np.nonzero(classes == 1)
        if not len(x) or min(x.min(), y.min()) < 2 or max(x.max(), y.max()) > 197:
            continue  # cut off
        slope, _ = np.polyfit(x, y, 1)
        degrees.append(math.degrees(math.atan(slope)))
        lengths.append(math.hypot(np.ptp(x) + 1, np.ptp(y) + 1 - 2))
    degrees_, lengths_ = np.abs(degrees), np.array(lengths) / 20
    assert 0.35 < np.mean(degrees_ > 0.6) < 0.6
    assert 9 < degrees_.max() < 11.5
    assert lengths_.min() < 1.3
    assert 3.2 < lengths_.max() < 4.4
    assert min(degrees) < -8 < 8 < max(degrees)


def test_mask_evaluation(mask_file):
    pixels, _, mask = scene(301, 200)
    out, classes = MaskEvaluation(warp(64))(Sample(pixels, mask_file(mask), "x"), Pick(0, 0, 99))
    expected = Image.fromarray(pixels).resize((64, 64), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(out, np.asarray(expected))
    np.testing.assert_array_equal(classes, mask)


def test_stacked_masks():
    masks = [np.full((4, 4), i, np.uint8) for i in (0, 255)]
    stacked = stack_masks(masks)
    assert stacked.dtype == torch.uint8
    assert stacked[:, 0, 0].tolist() == [0, 255]


# ---------------------------------------------------------------------------------------------------------------------
# Both


@pytest.mark.parametrize("kind", ["boxes", "masks"])
def test_random_numbers_depend_on_seed_epoch_and_index_only(kind: str, mask_file):
    photograph = load_sample_images().images[0]
    mask = (photograph[..., 0] // 64).astype(np.uint8)
    labels = {"boxes": boxes((10, 20, 300, 400), (200, 100, 630, 420)), "masks": mask_file(mask)}

    def augment(seed: int = 3, epoch: int = 4, number: int = 5) -> bytes:
        augmentation: Any = (BoxAugmentation if kind == "boxes" else MaskAugmentation)(0.08, True, seed)
        out, target = augmentation(Sample(photograph, labels[kind], "x"), Pick(number, epoch, 64))
        arrays = (out, *target) if kind == "boxes" else (out, target)
        return b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)

    first = augment()
    assert len({first, augment(seed=4), augment(epoch=5), augment(number=4), augment(epoch=5, number=4)}) == 5
    np.random.seed(0)
    torch.manual_seed(0)
    before = np.random.get_state()[1].tobytes(), torch.get_rng_state()  # type: ignore[union-attr]
    assert augment() == first
    after = np.random.get_state()[1].tobytes(), torch.get_rng_state()  # type: ignore[union-attr]
    assert before[0] == after[0]
    assert torch.equal(before[1], after[1])


@pytest.mark.parametrize("flip", [True, False])
def test_horizontal_flip(flip: bool, mask_file):
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:16, 32:] = 255  # top right
    mask = (pixels[..., 0] // 255).astype(np.uint8)
    file = mask_file(mask)
    num, num_flipped = 0, 0
    for number in range(300):
        _, target = BoxAugmentation(1, flip, 0)(Sample(pixels, boxes((32, 0, 64, 16)), "x"), Pick(number, 0, 64))
        assert target.corners.tolist() in ([[0.5, 0, 1, 0.25]], [[0, 0, 0.5, 0.25]])
        num_flipped += target.corners[0, 0] == 0
        _, classes = MaskAugmentation(1, flip, 0)(Sample(pixels, file, "x"), Pick(number, 0, 64))
        _, x = np.nonzero(classes != 255)
        _, x_of_box = np.nonzero(classes == 1)
        num += x_of_box.mean() < x.mean()
    if flip:
        assert 120 < num_flipped < 180
        assert 120 < num < 180
    else:
        assert num == num_flipped == 0
