"""Batches are arithmetic: complete, equal for all processes, the same at any time, and as often as published."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

from mobilevit.data.sampler import PAPER_SIZES_PX, VARIANTS, EpochBatches, Pick, Variant, batch_size_at, eval_batches

LISTING_SIZES_PX = (128, 192, 256, 320, 384)


def batches(
    num_pictures: int, *, variant: Variant = "main", batch_size: int = 8, seed: int = 0, epoch: int = 0, world: int = 1
) -> list[EpochBatches]:
    """The epoch, once for each process."""
    return [
        EpochBatches(
            num_pictures,
            sizes_px=(256,) if variant == "standard" else PAPER_SIZES_PX,
            batch_size=batch_size,
            base_px=256,
            variant=variant,
            seed=seed,
            epoch=epoch,
            rank=rank,
            world=world,
        )
        for rank in range(world)
    ]


@pytest.mark.parametrize(
    ("variant", "sizes_px", "world", "expected"),
    [
        ("equation", PAPER_SIZES_PX, 1, [512, 355, 200, 158, 128]),
        ("listing", LISTING_SIZES_PX, 1, [512, 227, 128, 81, 56]),
        ("v0.1", PAPER_SIZES_PX, 8, [328, 224, 128, 128, 128]),
        ("main", PAPER_SIZES_PX, 1, [327, 227, 128, 101, 81]),
        ("standard", PAPER_SIZES_PX, 1, [128] * 5),
    ],
)
def test_batch_sizes_as_published(variant: Variant, sizes_px: tuple[int, ...], world: int, expected: list[int]):
    found = [
        batch_size_at(size, variant=variant, batch_size=128, base_px=256, largest_px=320, world=world)
        for size in sizes_px
    ]
    assert found == expected


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
    counts = [
        len(
            EpochBatches(
                1_281_167, sizes_px=sizes_px, batch_size=128, base_px=256, variant=variant, epoch=epoch, world=8
            )
        )
        for epoch in range(10)
    ]
    assert 30 * sum(counts) == pytest.approx(updates, rel=0.015)  # ten epochs of the 300


@pytest.mark.parametrize("num_pictures", [8, 9, 31, 32, 33, 100, 1198])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_picture_once_and_ranks_agree(variant: Variant, world: int, num_pictures: int):
    for seed, epoch, batch_size in itertools.product((0, 7), (0, 3), (2, 8, 5000)):
        ranks = batches(num_pictures, variant=variant, batch_size=batch_size, seed=seed, epoch=epoch, world=world)
        assert len({len(rank) for rank in ranks}) == 1
        seen: list[int] = []
        for step, shares in enumerate(zip(*ranks, strict=True)):
            sizes = [len(share) for share in shares]
            assert max(sizes) - min(sizes) <= (step == len(ranks[0]) - 1)
            share = batch_size_at(
                ranks[0].size_px(step), variant=variant, batch_size=batch_size, base_px=256, largest_px=320, world=world
            )
            assert min(sizes) >= min(2, share, num_pictures // world)
            assert len({(pick.size_px, pick.epoch) for share in shares for pick in share}) == 1
            assert sum(sizes) == ranks[0].global_batch_size(step)
            seen.extend(pick.number for share in shares for pick in share)
        assert sorted(seen) == list(range(num_pictures))


@pytest.mark.parametrize("variant", VARIANTS)
def test_batches_have_the_size_that_their_resolution_asks_for(variant: Variant):
    (epoch,) = batches(2000, variant=variant, batch_size=10)
    for step in range(len(epoch) - 2):
        expected = batch_size_at(
            epoch.size_px(step), variant=variant, batch_size=10, base_px=256, largest_px=320, world=1
        )
        assert len(epoch[step]) == expected
        assert {pick.size_px for pick in epoch[step]} == {epoch.size_px(step)}
    # The last is what is left, or that and the one before it.
    assert len(epoch[-1]) <= 1 + max(
        batch_size_at(size, variant=variant, batch_size=10, base_px=256, largest_px=320) for size in PAPER_SIZES_PX
    )


def test_more_processes_deal_the_same_pictures_at_the_same_steps():
    (alone,) = batches(1005, variant="standard", batch_size=12)
    ranks = batches(1005, variant="standard", batch_size=3, world=4)
    assert len(alone) == len(ranks[0])
    for step in range(len(alone)):
        assert sorted(alone[step]) == sorted(pick for rank in ranks for pick in rank[step])


def test_sizes_are_drawn_evenly():
    (epoch,) = batches(200_000, batch_size=8)
    counts = np.array([sum(epoch.size_px(step) == size for step in range(len(epoch))) for size in PAPER_SIZES_PX])
    expected = len(epoch) / 5
    assert ((counts - expected) ** 2 / expected).sum() < 18.5  # chi-square of 4 degrees, one in a thousand


def test_any_step_is_there_at_once_and_always_the_same():
    (epoch,) = batches(500, epoch=4)
    in_order = list(epoch)
    (again,) = batches(500, epoch=4)
    assert [again[step] for step in reversed(range(len(again)))] == in_order[::-1]
    assert again[7:] == in_order[7:]
    assert again[-1] == in_order[-1]
    with pytest.raises(IndexError):
        again[len(again)]


def test_the_order_is_another_each_epoch_and_seed():
    orders = {
        tuple(pick.number for batch in batches(50, seed=seed, epoch=epoch)[0] for pick in batch)
        for seed in range(4)
        for epoch in range(4)
    }
    assert len({*orders, tuple(range(50))}) == 17


def test_pictures_meet_any_other_pictures():
    firsts = [batches(20, variant="standard", batch_size=10, epoch=epoch)[0][0] for epoch in range(1000)]
    together = sum({0, 1} <= {pick.number for pick in batch} for batch in firsts)
    assert together == pytest.approx(1000 * 10 / 20 * 9 / 19, abs=55)  # four standard deviations


class Sizes(Dataset):
    """Somebody else's dataset: gives what it is asked for."""

    def __getitem__(self, pick: Pick) -> tuple[int, int]:
        return pick.number, pick.size_px


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # where there is one core
@pytest.mark.filterwarnings("ignore:This process .*is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_in_any_data_loader(num_workers: int):
    (epoch,) = batches(100)
    loader = DataLoader(Sizes(), batch_sampler=epoch, num_workers=num_workers)
    assert len(loader) == len(epoch)
    for (numbers, sizes_px), batch in zip(loader, epoch, strict=True):
        assert numbers.tolist() == [pick.number for pick in batch]
        assert set(sizes_px.tolist()) == {batch[0].size_px}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"variant": "cvnets"}, "variant is 'cvnets'.*equation"),
        ({"num_pictures": 0}, "num_pictures is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"sizes_px": ()}, "name at least one size"),
        ({"rank": 2, "world": 2}, "rank is 2 of 2"),
        ({"num_pictures": 3, "world": 4}, "3 pictures are too few for 4 processes"),
    ],
)
def test_wrong_arguments(wrong: dict, message: str):
    right = {"num_pictures": 10, "sizes_px": (32,), "batch_size": 4, "base_px": 32}
    with pytest.raises(ValueError, match=message):
        EpochBatches(**(right | wrong))


@pytest.mark.parametrize(("num_pictures", "sizes"), [(1, [1]), (4, [4]), (9, [4, 4, 1])])
def test_evaluation_goes_in_order(num_pictures: int, sizes: list[int]):
    found = eval_batches(num_pictures, batch_size=4, size_px=32)
    assert [len(batch) for batch in found] == sizes
    assert [pick for batch in found for pick in batch] == [Pick(i, 0, 32) for i in range(num_pictures)]
