"""Batches: every picture once, evenly, in an order of its own for each epoch and seed."""

import pytest

from mobilevit.data.sampler import Pick, eval_batches, train_batches


@pytest.mark.parametrize("num_pictures", [2, 3, 4, 31, 32, 33, 100, 1198])
@pytest.mark.parametrize("batch_size", [3, 4, 32, 5000])
def test_every_picture_once_in_even_batches(num_pictures: int, batch_size: int):
    batches = train_batches(num_pictures, batch_size=batch_size, size_px=48, seed=1, epoch=2)
    sizes = [len(batch) for batch in batches]
    assert sorted(pick for batch in batches for pick in batch) == [Pick(i, 2, 48) for i in range(num_pictures)]
    assert len(batches) == num_pictures // batch_size + (num_pictures % batch_size > 0)
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 2  # batch norm fails on a single picture


def test_the_order_is_another_each_epoch_and_seed_and_the_same_each_time():
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        batches = train_batches(50, batch_size=8, size_px=32, seed=seed, epoch=epoch)
        return tuple(pick.number for batch in batches for pick in batch)

    orders = {(seed, epoch): order(seed, epoch) for seed in range(4) for epoch in range(4)}
    assert len({*orders.values(), tuple(range(50))}) == 17
    assert all(order(*key) == value for key, value in orders.items())


def test_pictures_meet_any_other_pictures():
    firsts = [train_batches(20, batch_size=10, size_px=32, seed=0, epoch=epoch)[0] for epoch in range(1000)]
    together = sum({0, 1} <= {pick.number for pick in batch} for batch in firsts)
    assert together == pytest.approx(1000 * 10 / 20 * 9 / 19, abs=55)  # four standard deviations


@pytest.mark.parametrize(("num_pictures", "sizes"), [(1, [1]), (4, [4]), (9, [4, 4, 1])])
def test_evaluation_goes_in_order(num_pictures: int, sizes: list[int]):
    batches = eval_batches(num_pictures, batch_size=4, size_px=32)
    assert [len(batch) for batch in batches] == sizes
    assert [pick for batch in batches for pick in batch] == [Pick(i, 0, 32) for i in range(num_pictures)]
