"""Which images, at which size, in which batch: arithmetic, the same wherever it is computed.

`EpochBatches` is a sequence of batches that follows from its arguments alone. Processes that train together compute it
each for its own rank and agree without talking; a run that starts again takes it up at any step; the number of workers,
what they have read ahead and what was drawn before change nothing. It needs no network of this package: any
`torch.utils.data.DataLoader` takes it as `batch_sampler`, and the dataset is asked for lists of `Pick`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Literal, NamedTuple, get_args, overload

import numpy as np

# What is done about the batch where the size of the images changes; see `batch_size_at`.
Variant = Literal["standard", "equation", "listing", "v0.1", "main"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
# Multiples of 32 nearest to five steps from 160 to 320, and the base size (paper, section 3.3).
PAPER_SIZES_PX = (160, 192, 256, 288, 320)
MIN_SHARE = 2  # images of a batch in each process, if at all possible: batch norm fails on one


class Pick(NamedTuple):
    """One image of a batch: its number in the source, the epoch, and the side in pixels it is wanted at."""

    number: int
    epoch: int
    size_px: int


def batch_size_at(
    size_px: int, *, variant: Variant, batch_size: int, base_px: int, largest_px: int, world: int = 1
) -> int:
    """Images of `size_px` by `size_px` in the batch of one process.

    | variant | rule | published in |
    |---|---|---|
    | standard | `batch_size`, whatever the size | |
    | equation | as many pixels as `batch_size` images of the largest size | the paper's equation |
    | listing, main | as many pixels as `batch_size` images of the base size | its listing; the later released code |
    | v0.1 | the same, but never below `batch_size`, and a multiple of `world` | the released code of the paper |
    """
    if variant == "standard":
        return batch_size
    if variant == "equation":
        return max(1, largest_px**2 * batch_size // size_px**2)
    same_cost = base_px**2 * batch_size / size_px**2
    if variant == "v0.1":
        return max(world, int(max(batch_size, same_cost) + world / 2) // world * world)
    return max(1, int(same_cost))


class EpochBatches(Sequence[list[Pick]]):
    """The batches of an epoch for one process.

    At every step one of `sizes_px` is drawn, each as likely as the others and the same for all processes. The images
    of an epoch, in a new order each epoch, are dealt out until none is left: every image comes once, to one process.

    The last batch is what is left. Where that would be fewer than two images for each process, it joins the batch
    before it instead. Shares of the processes in a batch are equal, but for those of the last step, which differ by
    one at most. `min_last` sets another number of images than two for each process.

    Args:
        num_images: in the source.
        sizes_px: to draw from; for "standard" training at one size, that one.
        batch_size: images in a step of one process, at `base_px` (at the largest size for "equation").
        base_px: the size that `batch_size` is meant for.
        variant: how the batch follows the size; see `batch_size_at`.
        seed, epoch: whence the order and the sizes are drawn.
        rank, world: which of how many processes.
        min_last: fewest images of a last batch of its own, in all processes together.

    Raises:
        ValueError: arguments out of range, or too few images for as many processes.
    """

    def __init__(
        self,
        num_images: int,
        *,
        sizes_px: Sequence[int],
        batch_size: int,
        base_px: int,
        variant: Variant = "standard",
        seed: int = 0,
        epoch: int = 0,
        rank: int = 0,
        world: int = 1,
        min_last: int | None = None,
    ):
        if variant not in VARIANTS:
            raise ValueError(f"variant is {variant!r}; it can be {', '.join(VARIANTS)}")
        for name, value in (("num_images", num_images), ("batch_size", batch_size), ("base_px", base_px)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be 1 or more")
        if not sizes_px or min(sizes_px) < 1:
            raise ValueError(f"sizes_px is {tuple(sizes_px)}; name at least one size, in pixels")
        if not 0 <= rank < world:
            raise ValueError(f"rank is {rank} of {world}; it must be from 0 to {world - 1}")
        if num_images < world:
            raise ValueError(f"{num_images} images are too few for {world} processes")
        self.epoch = epoch
        self.rank = rank
        self.world = world
        sizes = np.array(sorted(sizes_px))
        batch_sizes = world * np.array(
            [
                batch_size_at(
                    size,
                    variant=variant,
                    batch_size=batch_size,
                    base_px=base_px,
                    largest_px=int(sizes[-1]),
                    world=world,
                )
                for size in sizes.tolist()
            ]
        )
        # One generator each: how many sizes are drawn must not move the order of the images, and the other way round.
        draw = np.random.default_rng((seed, epoch, 1)).integers(len(sizes), size=-(-num_images // batch_sizes.min()))
        stops = np.cumsum(batch_sizes[draw])
        num_steps = int(np.searchsorted(stops, num_images)) + 1
        stops = np.minimum(stops[:num_steps], num_images)
        if num_steps > 1 and stops[-1] - stops[-2] < (MIN_SHARE * world if min_last is None else min_last):
            stops = np.append(stops[:-2], num_images)
        self._stops = stops
        self._sizes_px = sizes[draw[: len(stops)]]
        self.batch_sizes = dict(zip(sizes.tolist(), batch_sizes.tolist(), strict=True))
        """Images of a whole step by size, in all processes together."""
        self._seed = seed
        self._num_images = num_images

    @cached_property
    def _order(self) -> np.ndarray:
        return np.random.default_rng((self._seed, self.epoch)).permutation(self._num_images)  # not for `len` alone

    def __len__(self) -> int:
        return len(self._stops)

    @overload
    def __getitem__(self, step: int) -> list[Pick]: ...
    @overload
    def __getitem__(self, step: slice) -> list[list[Pick]]: ...
    def __getitem__(self, step: int | slice) -> list[Pick] | list[list[Pick]]:
        if isinstance(step, slice):
            return [self[i] for i in range(*step.indices(len(self)))]
        step = range(len(self))[step]  # negative steps, and IndexError beyond the end
        start = self._stops[step - 1] if step else 0
        numbers = self._order[start + self.rank : self._stops[step] : self.world]
        return [Pick(number, self.epoch, int(self._sizes_px[step])) for number in numbers.tolist()]

    def global_batch_size(self, step: int) -> int:
        """Images of a step in all processes together."""
        return int(self._stops[step] - (self._stops[step - 1] if step else 0))

    def size_px(self, step: int) -> int:
        """Side of the images of a step."""
        return int(self._sizes_px[step])


class Part(NamedTuple):
    """What one process computes at once: part `number` of the `num_parts` that make up step `step` of an epoch."""

    step: int
    number: int
    num_parts: int
    picks: list[Pick]
    share: float  # of the step's images

    @property
    def size_px(self) -> int:
        """Side of its images."""
        return self.picks[0].size_px


def count_parts(num_images: int, size_px: int, *, pixels_at_once: int, world: int) -> int:
    """Parts that a step of `num_images` is cut into; see `parts`."""
    at_once = max(MIN_SHARE, pixels_at_once // size_px**2)  # whole images
    rounds = -(-num_images // (at_once * world))
    return world * max(1, min(rounds, num_images // (MIN_SHARE * world)))


def parts(
    batches: EpochBatches, *, pixels_at_once: int, first_step: int = 0, rank: int = 0, world: int = 1
) -> Iterator[Part]:
    """The parts that process `rank` of `world` computes, one after the other, from `first_step` on.

    `batches` are those of all processes together. Each step is cut into as many equal parts as it takes for none to
    have more than `pixels_at_once` pixels, a multiple of `world`; process 0 computes part 0, part `world` and so on.
    Only how many parts there are depends on the hardware: four parts in one process or one part in each of four
    processes are the same parts. None has fewer than two images, if at all possible.
    """
    for step in range(first_step, len(batches)):
        picks = batches[step]
        num_parts = count_parts(len(picks), batches.size_px(step), pixels_at_once=pixels_at_once, world=world)
        for number in range(rank, num_parts, world):
            mine = picks[number::num_parts]
            yield Part(step, number, num_parts, mine, len(mine) / len(picks))


def eval_batches(num_images: int, *, batch_size: int, size_px: int) -> list[list[Pick]]:
    """Every image once, in its order; the last batch holds what is left."""
    picks = [Pick(number, 0, size_px) for number in range(num_images)]
    return [picks[start : start + batch_size] for start in range(0, num_images, batch_size)]
