"""Batches of an epoch: complete, equal for all processes, reproducible, of the published sizes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

from mobilevit.data.sampler import (
    PAPER_SIZES_PX,
    VARIANTS,
    BatchShapes,
    EpochBatches,
    Pick,
    Variant,
    count_micro_batches,
    eval_batches,
    micro_batches,
)

LISTING_SIZES_PX = (128, 192, 256, 320, 384)


def shapes(variant: Variant, batch_size: int) -> BatchShapes:
    return BatchShapes((256,) if variant == "standard" else PAPER_SIZES_PX, batch_size, 256, variant)


def batches(
    num_images: int,
    *,
    variant: Variant = "main",
    batch_size: int = 8,
    seed: int = 0,
    epoch: int = 0,
    world_size: int = 1,
) -> list[EpochBatches]:
    """The epoch, once for each process."""
    return [
        EpochBatches(
            num_images,
            shapes(variant, batch_size),
            seed=seed,
            epoch=epoch,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]


@pytest.mark.parametrize(
    ("variant", "sizes_px", "world_size", "expected"),
    [
        ("equation", PAPER_SIZES_PX, 1, [512, 355, 200, 158, 128]),
        ("listing", LISTING_SIZES_PX, 1, [512, 227, 128, 81, 56]),
        ("v0.1", PAPER_SIZES_PX, 8, [328, 224, 128, 128, 128]),
        ("main", PAPER_SIZES_PX, 1, [327, 227, 128, 101, 81]),
        ("standard", PAPER_SIZES_PX, 1, [128] * 5),
    ],
)
def test_batch_sizes_as_published(variant: Variant, sizes_px: tuple[int, ...], world_size: int, expected: list[int]):
    rule = BatchShapes(sizes_px, 128, 256, variant)
    assert [rule.batch_size_at(size, world_size) for size in sizes_px] == expected


@pytest.mark.parametrize(
    ("variant", "sizes_px", "updates"),
    [
        ("standard", (256,), 375_600),
        ("equation", PAPER_SIZES_PX, 177_000),
        ("listing", LISTING_SIZES_PX, 238_000),
        ("v0.1", PAPER_SIZES_PX, 256_000),
        ("main", PAPER_SIZES_PX, 277_000),
    ],
)
def test_updates_on_imagenet(variant: Variant, sizes_px: tuple[int, ...], updates: int):
    rule = BatchShapes(sizes_px, 128, 256, variant)
    num_steps = sum(len(EpochBatches(1_281_167, rule, epoch=epoch, world_size=8)) for epoch in range(10))
    assert 30 * num_steps == pytest.approx(updates, rel=0.015)  # 10 of 300 epochs


@pytest.mark.parametrize("num_images", [8, 9, 31, 32, 33, 100, 1198])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_image_once_and_ranks_agree(variant: Variant, world_size: int, num_images: int):
    for seed, epoch, batch_size in itertools.product((0, 7), (0, 3), (2, 8, 5000)):
        ranks = batches(
            num_images, variant=variant, batch_size=batch_size, seed=seed, epoch=epoch, world_size=world_size
        )
        assert len({len(rank) for rank in ranks}) == 1
        seen: list[int] = []
        for step, of_ranks in enumerate(zip(*ranks, strict=True)):
            sizes = [len(picks) for picks in of_ranks]
            assert max(sizes) - min(sizes) <= (step == len(ranks[0]) - 1)
            expected = shapes(variant, batch_size).batch_size_at(ranks[0].size_px(step), world_size)
            assert min(sizes) >= min(2, expected, num_images // world_size)
            assert len({(pick.size_px, pick.epoch) for picks in of_ranks for pick in picks}) == 1
            assert sum(sizes) == ranks[0].global_batch_size(step)
            seen.extend(pick.image_index for picks in of_ranks for pick in picks)
        assert sorted(seen) == list(range(num_images))


@pytest.mark.parametrize("variant", VARIANTS)
def test_size_of_each_batch(variant: Variant):
    rule = shapes(variant, 10)
    (epoch,) = batches(2000, variant=variant, batch_size=10)
    for step in range(len(epoch) - 2):
        assert len(epoch[step]) == rule.batch_size_at(epoch.size_px(step))
        assert {pick.size_px for pick in epoch[step]} == {epoch.size_px(step)}
    # The last batch contains the remaining images, and possibly those of the previous one.
    assert len(epoch[-1]) <= 1 + max(map(rule.batch_size_at, rule.sizes_px))


def test_steps_do_not_depend_on_the_number_of_processes():
    (alone,) = batches(1005, variant="standard", batch_size=12)
    ranks = batches(1005, variant="standard", batch_size=3, world_size=4)
    assert len(alone) == len(ranks[0])
    for step in range(len(alone)):
        assert sorted(alone[step]) == sorted(pick for rank in ranks for pick in rank[step])


def test_sizes_are_uniformly_distributed():
    (epoch,) = batches(200_000, batch_size=8)
    counts = np.array([sum(epoch.size_px(step) == size for step in range(len(epoch))) for size in PAPER_SIZES_PX])
    expected = len(epoch) / 5
    assert ((counts - expected) ** 2 / expected).sum() < 18.5  # chi-square of 4 degrees, one in a thousand


def test_steps_can_be_computed_in_any_order():
    (epoch,) = batches(500, epoch=4)
    in_order = list(epoch)
    (again,) = batches(500, epoch=4)
    assert [again[step] for step in reversed(range(len(again)))] == in_order[::-1]
    assert again[7:] == in_order[7:]
    assert again[-1] == in_order[-1]
    with pytest.raises(IndexError):
        again[len(again)]


def test_order_depends_on_epoch_and_seed():
    orders = {
        tuple(pick.image_index for batch in batches(50, seed=seed, epoch=epoch)[0] for pick in batch)
        for seed in range(4)
        for epoch in range(4)
    }
    assert len({*orders, tuple(range(50))}) == 17


def test_pairs_of_images_are_independent():
    firsts = [batches(20, variant="standard", batch_size=10, epoch=epoch)[0][0] for epoch in range(1000)]
    together = sum({0, 1} <= {pick.image_index for pick in batch} for batch in firsts)
    assert together == pytest.approx(1000 * 10 / 20 * 9 / 19, abs=55)  # four standard deviations


# ---------------------------------------------------------------------------------------------------------------------
# Balanced classes


@pytest.mark.parametrize("counts", [(3, 1), (1, 50), (40, 7, 2, 1, 19), (97, 1, 1)])
@pytest.mark.parametrize("variant", ["standard", "main"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_classes_are_balanced(counts: tuple[int, ...], variant: Variant, world_size: int):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    uses, total = np.zeros(len(labels), np.int64), 0
    for epoch in range(20):
        ranks = [
            EpochBatches(
                len(labels), shapes(variant, 4), seed=5, epoch=epoch, rank=rank, world_size=world_size, labels=labels
            )
            for rank in range(world_size)
        ]
        picks = [pick for step in range(len(ranks[0])) for rank in ranks for pick in rank[step]]
        assert len(picks) == len(labels)
        of_class = np.bincount(labels[[pick.image_index for pick in picks]], minlength=len(counts))
        assert of_class.max() - of_class.min() <= 1
        # Uses of an image in an epoch have different numbers, so they get different crops.
        for index in {pick.image_index for pick in picks}:
            repeats = sorted(pick.repeat for pick in picks if pick.image_index == index)
            assert repeats == list(range(len(repeats)))
        for pick in picks:
            uses[pick.image_index] += 1
        total += len(picks)
        for label in range(len(counts)):  # no image waits while another of its class is used twice
            of_images = uses[labels == label]
            assert of_images.max() - of_images.min() <= 1
    by_class = np.bincount(labels, weights=uses)
    assert by_class.sum() == total
    assert by_class.max() - by_class.min() <= 1  # over all epochs, too


def test_balanced_steps_do_not_depend_on_the_number_of_processes():
    labels = np.repeat(np.arange(5), (700, 200, 90, 10, 5))
    alone = EpochBatches(1005, shapes("standard", 12), epoch=3, labels=labels)
    ranks = [
        EpochBatches(1005, shapes("standard", 3), epoch=3, rank=rank, world_size=4, labels=labels) for rank in range(4)
    ]
    assert len(alone) == len(ranks[0])
    for step in reversed(range(len(alone))):
        assert sorted(alone[step]) == sorted(pick for rank in ranks for pick in rank[step])


def test_balanced_order_depends_on_epoch_and_seed():
    labels = np.repeat(np.arange(3), (30, 15, 5))
    orders = {
        tuple(
            pick.image_index
            for batch in EpochBatches(50, shapes("main", 8), seed=s, epoch=e, labels=labels)
            for pick in batch
        )
        for s in range(4)
        for e in range(4)
    }
    assert len(orders) == 16


def test_labels_of_another_number_of_images():
    with pytest.raises(ValueError, match=r"labels has 3 entries; it must have one for each of the 4 images"):
        EpochBatches(4, shapes("standard", 2), labels=np.array([0, 1, 1]))


class Sizes(Dataset):
    """A dataset that returns the pick."""

    def __getitem__(self, pick: Pick) -> tuple[int, int]:
        return pick.image_index, pick.size_px


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # where there is one core
@pytest.mark.filterwarnings("ignore:This process .*is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batch_sampler_of_a_data_loader(num_workers: int):
    (epoch,) = batches(100)
    loader = DataLoader(Sizes(), batch_sampler=epoch, num_workers=num_workers)
    assert len(loader) == len(epoch)
    for (numbers, sizes_px), batch in zip(loader, epoch, strict=True):
        assert numbers.tolist() == [pick.image_index for pick in batch]
        assert set(sizes_px.tolist()) == {batch[0].size_px}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"variant": "cvnets"}, "variant is 'cvnets'.*equation"),
        ({"num_images": 0}, "num_images is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"sizes_px": ()}, "give at least one size"),
        ({"rank": 2, "world_size": 2}, "rank is 2 of 2"),
        ({"num_images": 3, "world_size": 4}, "3 images are too few for 4 processes"),
    ],
)
def test_wrong_arguments(wrong: dict, message: str):
    rule = BatchShapes((32,), 4, 32)
    of_shapes = {name: wrong[name] for name in wrong.keys() & vars(rule).keys()}
    others: Any = {"num_images": 10} | {name: value for name, value in wrong.items() if name not in of_shapes}
    with pytest.raises(ValueError, match=message):
        EpochBatches(shapes=replace(rule, **of_shapes), **others)


@pytest.mark.parametrize(
    ("num_images", "min_last", "sizes"),
    [
        (24, None, [8, 8, 8]),
        (25, None, [8, 8, 9]),  # one image is too few
        (26, None, [8, 8, 8, 2]),
        (26, 1, [8, 8, 8, 2]),
        (25, 1, [8, 8, 8, 1]),
        (28, 4, [8, 8, 8, 4]),
        (27, 4, [8, 8, 11]),
        (3, 4, [3]),  # the only batch
    ],
)
def test_size_of_the_last_batch(num_images: int, min_last: int | None, sizes: list[int]):
    epoch = EpochBatches(num_images, BatchShapes((32,), 8, 32), min_last=min_last)
    assert [len(batch) for batch in epoch] == sizes
    assert [epoch.global_batch_size(step) for step in range(len(epoch))] == sizes


def test_batch_sizes_over_all_processes():
    sizes: dict[Variant, dict[int, int]] = {
        "standard": {256: 24},
        "main": {160: 60, 192: 42, 256: 24, 288: 18, 320: 15},
    }
    for variant, expected in sizes.items():
        (first, *_) = batches(100, variant=variant, world_size=3)
        assert first.batch_sizes == expected


def test_counting_steps_does_not_shuffle(monkeypatch: pytest.MonkeyPatch):
    drawn, generator = [], np.random.default_rng

    class Generator:
        def __init__(self, seed: tuple[int, ...]):
            self.of = generator(seed)
            self.integers = self.of.integers

        def permutation(self, num: int) -> np.ndarray:
            drawn.append(num)
            return self.of.permutation(num)

    monkeypatch.setattr(np.random, "default_rng", Generator)
    (epoch,) = batches(100)
    assert len(epoch) > 5
    assert epoch.size_px(3) in PAPER_SIZES_PX
    assert epoch.global_batch_size(3) > 1
    assert drawn == []
    assert len(epoch[3]) == epoch.global_batch_size(3)
    assert len(epoch[4]) == epoch.global_batch_size(4)
    assert drawn == [100]


# ---------------------------------------------------------------------------------------------------------------------
# Micro-batches


@pytest.mark.parametrize("num_images", [7, 37, 100, 333])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("micro_batch_size", [0.5, 1, 2, 2.5, 3, 4.75, 7, 16, 1000])
def test_micro_batches_contain_each_image_once(num_images: int, world_size: int, micro_batch_size: float):
    max_pixels = int(micro_batch_size * 256**2)
    for variant, batch_size, first_step in itertools.product(("standard", "main", "v0.1"), (6, 13, 32), (0, 1, 4)):
        epoch = EpochBatches(num_images, shapes(variant, batch_size), min_last=2 * world_size)
        ranks = [
            list(
                micro_batches(
                    epoch, max_pixels=max_pixels, first_step=min(first_step, len(epoch)), rank=r, world_size=world_size
                )
            )
            for r in range(world_size)
        ]
        for step in range(first_step, len(epoch)):
            of_ranks = [[one for one in rank if one.step == step] for rank in ranks]
            assert len({len(rank) for rank in of_ranks}) == 1  # else processes would wait for each other
            found = [one for rank in of_ranks for one in rank]
            (num_micro,) = {one.num_micro_batches for one in found}
            assert num_micro == len(found)
            assert num_micro % world_size == 0
            assert sorted(one.index for one in found) == list(range(num_micro))
            for rank, mine in enumerate(of_ranks):
                assert [one.index for one in mine] == list(range(rank, num_micro, world_size))
            assert sorted(pick for one in found for pick in one.picks) == sorted(epoch[step])
            lengths = [len(one.picks) for one in found]
            assert max(lengths) - min(lengths) <= 1
            assert min(lengths) >= min(2, len(epoch[step]) // world_size)
            assert {one.size_px for one in found} == {epoch.size_px(step)}
            assert [one.weight for one in found] == [length / len(epoch[step]) for length in lengths]
            # Above the limit only if more micro-batches would leave one with a single image.
            fits = max(lengths) * epoch.size_px(step) ** 2 <= max_pixels
            assert fits or len(epoch[step]) < 2 * (num_micro + world_size)
            # No more micro-batches than necessary.
            if num_micro > world_size:
                assert -(-len(epoch[step]) // (num_micro - world_size)) * epoch.size_px(step) ** 2 > max_pixels
        assert all(one.step >= first_step for rank in ranks for one in rank)
        assert [one.step for one in ranks[0]] == sorted(one.step for one in ranks[0])


def test_micro_batches_do_not_depend_on_the_number_of_processes():
    (epoch,) = batches(200, variant="standard", batch_size=48)

    def divide(world_size: int, micro_batch_size: int) -> list:
        found = [
            one
            for rank in range(world_size)
            for one in micro_batches(epoch, max_pixels=micro_batch_size * 256**2, rank=rank, world_size=world_size)
        ]
        return sorted(found, key=lambda one: (one.step, one.index))

    whole_steps = slice(0, 4 * 6)  # the last step is divided by the number of processes
    in_one = divide(1, 8)[whole_steps]
    assert len(in_one) == 24
    assert {one.num_micro_batches for one in in_one} == {6}
    for world_size, micro_batch_size in ((2, 8), (3, 8), (6, 8), (6, 1000)):
        assert divide(world_size, micro_batch_size)[whole_steps] == in_one


def test_micro_batches_from_any_step_on():
    (epoch,) = batches(300)
    division = {"max_pixels": 3 * 256**2, "rank": 1, "world_size": 2}
    everything = list(micro_batches(epoch, **division))
    for first_step in range(len(epoch) + 1):
        rest = [one for one in everything if one.step >= first_step]
        assert list(micro_batches(epoch, first_step=first_step, **division)) == rest


@pytest.mark.parametrize(
    ("num_images", "size_px", "max_pixels", "world_size", "expected"),
    [
        (1024, 256, 128 * 256**2, 8, 8),
        (1024, 256, 128 * 256**2, 2, 8),
        (1024, 256, 128 * 256**2, 1, 8),
        (1025, 256, 128 * 256**2, 1, 9),
        (1025, 256, 128 * 256**2, 2, 10),
        (655, 320, 128 * 256**2, 1, 9),  # 81.92 images fit, that is 81
        (12, 32, int(2.5 * 32**2), 1, 6),  # of five micro-batches, some would have three images
        (12, 32, 1, 1, 6),
        (13, 32, 1, 1, 6),
        (13, 32, 1, 3, 6),
        (3, 32, 1, 2, 2),  # one process gets a single image
    ],
)
def test_number_of_micro_batches(num_images: int, size_px: int, max_pixels: int, world_size: int, expected: int):
    assert count_micro_batches(num_images, size_px, max_pixels=max_pixels, world_size=world_size) == expected


@pytest.mark.parametrize(("num_images", "sizes"), [(1, [1]), (4, [4]), (9, [4, 4, 1])])
def test_evaluation_batches_are_in_order(num_images: int, sizes: list[int]):
    found = eval_batches(num_images, batch_size=4, size_px=32)
    assert [len(batch) for batch in found] == sizes
    assert [pick for batch in found for pick in batch] == [Pick(i, 0, 32) for i in range(num_images)]
