"""Batches do not depend on worker processes; unreadable images are reported by name."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from mobilevit.data import loader
from mobilevit.data.loader import Batch, ImageDataset, load
from mobilevit.data.sampler import BatchShapes, EpochBatches, Pick, eval_batches
from mobilevit.data.samples import Sample
from mobilevit.data.transforms import Augmentation, Evaluation, Policy
from mobilevit.images import ImageError, Preprocessing

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # where there is one core
    pytest.mark.filterwarnings("ignore:This process .*is multi-threaded:DeprecationWarning"),
]
AUGMENTATION = Augmentation(min_scale=0.1, flip=True, seed=0)
EVALUATION = Evaluation(Preprocessing(resize_px=32, crop_px=32))


@dataclass(frozen=True)
class Files:
    """Images of three classes in turn."""

    files: tuple[Path, ...]
    class_names: tuple[str, ...] = ("a", "b", "c")

    @property
    def labels(self) -> Sequence[int]:
        return [i % 3 for i in range(len(self.files))]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.files[index], index % 3, str(self.files[index]))


@pytest.fixture
def source(tmp_path: Path) -> Files:
    """Ten images of noise of different sizes."""
    random = np.random.default_rng(0)
    files = tuple(tmp_path / f"{i}.png" for i in range(10))
    for i, file in enumerate(files):
        Image.fromarray(random.integers(0, 255, (32 + i, 50 - i, 3), dtype=np.uint8)).save(file)
    return Files(files)


def damage(source: Any, *numbers: int) -> None:
    for number in numbers:
        file = source.files[number]
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_labels_and_indices_match(source: Any, num_workers: int):
    dataset = ImageDataset(source, EVALUATION)
    assert len(dataset) == 10
    order = [[Pick(4, 0, 32), Pick(0, 0, 32)], [Pick(9, 0, 32)]]
    batches = list(load(dataset, order, num_workers=num_workers, device="cpu"))
    assert [batch.labels.tolist() for batch in batches] == [[1, 0], [0]]
    assert [batch.indices for batch in batches] == [(4, 0), (9,)]
    assert [batch.unreadable for batch in batches] == [(), ()]
    assert [batch.pixels.shape for batch in batches] == [(2, 3, 32, 32), (1, 3, 32, 32)]
    assert {batch.pixels.dtype for batch in batches} == {torch.uint8}
    assert all(batch.pixels.is_contiguous(memory_format=torch.channels_last) for batch in batches)
    with Image.open(source.files[0]) as image:  # already 32 px high: only cropped
        middle = np.asarray(image)[:, 9:41]
    assert np.array_equal(batches[0].pixels[1].permute(1, 2, 0), middle)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_scaling_is_the_preprocessing_of_prediction(source: Any, num_workers: int):
    preprocessing = Preprocessing(32, 32, mean=(0.1, 0.5, 0.7), std=(0.2, 1.0, 3.0))
    dataset = ImageDataset(source, Evaluation(preprocessing))
    picks = eval_batches(10, batch_size=4, size_px=32)
    batches = list(load(dataset, picks, num_workers=num_workers, device="cpu", preprocessing=preprocessing))
    assert all(batch.pixels.is_contiguous(memory_format=torch.channels_last) for batch in batches)
    expected = torch.stack([preprocessing(file) for file in source.files])
    torch.testing.assert_close(torch.cat([batch.pixels for batch in batches]), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("policy", ["basic", "advanced"])
def test_batches_do_not_depend_on_workers_order_or_restarts(source: Any, policy: Policy):
    dataset = ImageDataset(source, Augmentation(min_scale=0.1, flip=True, seed=0, policy=policy))
    picks = EpochBatches(10, BatchShapes((32, 40), 3, 32), epoch=1)
    alone, helped = (list(load(dataset, picks, num_workers=n, device="cpu")) for n in (0, 2))
    backwards = list(load(dataset, list(picks)[:0:-1], num_workers=0, device="cpu"))[::-1]
    assert len(alone) == len(picks) > 2
    for others in (helped, alone[:1] + backwards):
        for a, b in zip(alone, others, strict=True):
            assert isinstance(b, Batch)
            assert torch.equal(a.pixels, b.pixels)
            assert torch.equal(a.labels, b.labels)
            assert a.indices == b.indices
    picks = EpochBatches(10, BatchShapes((32,), 3, 32), epoch=2)
    other = torch.cat([batch.pixels for batch in load(dataset, picks, num_workers=0, device="cpu")])
    assert not any(torch.equal(alone[0].pixels[0], pixels) for pixels in other)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_damaged_image_is_named(source: Any, num_workers: int):
    damage(source, 7)
    dataset = ImageDataset(source, AUGMENTATION)
    batches = load(dataset, eval_batches(10, batch_size=3, size_px=32), num_workers=num_workers, device="cpu")
    assert len([next(batches), next(batches)]) == 2
    with pytest.raises(ImageError, match=f"^{source.files[7]}: damaged image") as caught:
        next(batches)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_image_is_replaced_by_the_next(source: Any, num_workers: int):
    picks = eval_batches(10, batch_size=5, size_px=32)
    dataset = ImageDataset(source, AUGMENTATION)
    whole = list(load(dataset, picks, num_workers=0, device="cpu"))
    damage(source, 0, 3, 4, 9)
    batches = list(load(dataset, picks, num_workers=num_workers, device="cpu", max_unreadable=1))
    assert [batch.indices for batch in batches] == [(1, 1, 2, 1, 1), (5, 6, 7, 8, 5)]
    assert [batch.labels.tolist() for batch in batches] == [[1, 1, 2, 1, 1], [2, 0, 1, 2, 2]]
    assert [batch.unreadable for batch in batches] == [
        tuple(str(source.files[i]) for i in numbers) for numbers in ((0, 3, 4), (9,))
    ]
    for batch, before in zip(batches, whole, strict=True):
        for number, pixels in zip(batch.indices, batch.pixels, strict=True):
            assert torch.equal(pixels, before.pixels[number % 5])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_images_are_left_out_of_an_evaluation(source: Any, num_workers: int):
    damage(source, 1, 9)
    dataset = ImageDataset(source, EVALUATION)
    picks = eval_batches(10, batch_size=3, size_px=32)
    batches = list(
        load(dataset, picks, num_workers=num_workers, device="cpu", max_unreadable=1, replace_unreadable=False)
    )
    assert [batch.indices for batch in batches] == [(0, 2), (3, 4, 5), (6, 7, 8), ()]
    assert [batch.labels.tolist() for batch in batches] == [[0, 2], [0, 1, 2], [0, 1, 2], []]
    assert [batch.pixels.shape for batch in batches] == [(n, 3, 32, 32) for n in (2, 3, 3, 0)]
    assert [name for batch in batches for name in batch.unreadable] == [str(source.files[i]) for i in (1, 9)]
    with pytest.raises(ImageError, match=f"^{source.files[1]}: damaged"):
        list(load(dataset, picks, num_workers=num_workers, device="cpu", replace_unreadable=False))


def test_batch_without_readable_images(source: Any):
    damage(source, 3, 4, 5)
    picks = eval_batches(10, batch_size=3, size_px=32)
    batches = load(ImageDataset(source, AUGMENTATION), picks, num_workers=0, device="cpu", max_unreadable=100)
    assert next(batches).indices == (0, 1, 2)
    with pytest.raises(ImageError, match=f"^{source.files[3]}: damaged"):
        next(batches)


def test_source_that_raises_image_errors(source: Any):
    class Broken(Files):
        def __getitem__(self, index: int) -> Sample:
            if index == 1:
                raise ImageError("images.tar: damaged")
            return super().__getitem__(index)

    dataset = ImageDataset(cast(Any, Broken)(source.files), EVALUATION)
    [batch] = load(dataset, [[Pick(1, 0, 32), Pick(2, 0, 32)]], num_workers=0, device="cpu", max_unreadable=1)
    assert batch.indices == (2, 2)
    assert batch.unreadable == ("images.tar: damaged",)


def test_other_errors_are_raised(source: Any):
    def prepare(sample: Sample, pick: Pick) -> tuple[np.ndarray, int]:
        raise ZeroDivisionError

    batches = load(ImageDataset(source, prepare), [[Pick(0, 0, 32)]], num_workers=0, device="cpu", max_unreadable=9)
    with pytest.raises(ZeroDivisionError):
        next(batches)


def test_waited_seconds_exclude_the_training_step(source: Any, monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(loader.time, "perf_counter", lambda: now[0])

    def prepare(sample: Sample, pick: Pick) -> tuple[np.ndarray, int]:
        now[0] += 0.5
        return np.zeros((32, 32, 3), np.uint8), 0

    picks = eval_batches(4, batch_size=2, size_px=32)
    batches = load(ImageDataset(source, prepare), picks, num_workers=0, device="cpu")
    assert batches.waited_seconds == 0
    next(batches)
    assert batches.waited_seconds == 1
    now[0] += 7  # a training step
    next(batches)
    assert batches.waited_seconds == 2


def test_python_exits_with_a_loader_in_a_reference_cycle(tmp_path: Path):
    script = """
import gc, sys, warnings
from mobilevit.data.loader import ImageDataset, load
from mobilevit.data.sampler import eval_batches
from mobilevit.data.sources import find_splits
from mobilevit.data.transforms import Evaluation
from mobilevit.images import Preprocessing

warnings.simplefilter("ignore")
source = find_splits("classify", sys.argv[1], val_fraction=0.2)[0]
dataset = ImageDataset(source, Evaluation(Preprocessing(resize_px=32, crop_px=32)))
cycle = [load(dataset, eval_batches(8, batch_size=1, size_px=32), num_workers=1, device="cpu")]
cycle.append(cycle)
next(cycle[0])
del cycle
gc.collect()
"""
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(5):
            Image.new("RGB", (32, 32)).save(tmp_path / name / f"{i}.png")
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=120)
