"""Which pictures, at which size, in which batch: arithmetic on (seed, epoch), the same wherever it is computed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Pick(NamedTuple):
    """One picture of a batch: its number in the source, the epoch, and the side in pixels it is wanted at."""

    number: int
    epoch: int
    size_px: int


def train_batches(num_pictures: int, *, batch_size: int, size_px: int, seed: int, epoch: int) -> list[list[Pick]]:
    """The batches of an epoch: every picture once, in a new order each epoch, sizes of batches at most one apart.

    There are ceil(num_pictures / batch_size) of them. A last batch of leftovers could be a single picture, on which
    batch norm fails, so the leftovers are spread; with a batch size of 3 or more no batch is then a single picture.
    """
    order = np.random.default_rng((seed, epoch)).permutation(num_pictures)
    parts = np.array_split(order, -(-num_pictures // batch_size))
    return [[Pick(int(number), epoch, size_px) for number in part] for part in parts]


def eval_batches(num_pictures: int, *, batch_size: int, size_px: int) -> list[list[Pick]]:
    """Every picture once, in its order; the last batch holds what is left."""
    picks = [Pick(number, 0, size_px) for number in range(num_pictures)]
    return [picks[start : start + batch_size] for start in range(0, num_pictures, batch_size)]
