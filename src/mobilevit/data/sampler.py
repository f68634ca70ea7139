"""The batches of an epoch: which images, at which size. A pure function of its arguments.

`EpochBatches` is a sequence of batches. Processes of distributed training compute their batches independently and
agree without communication. A resumed run starts at any step. Nothing depends on the number of workers, on what they
have prefetched, or on other users of random numbers. The module works with any model: `EpochBatches` is a
`batch_sampler` of `torch.utils.data.DataLoader`, which requests items of the dataset by `Pick`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, get_args, overload

import numpy as np

# How the batch size depends on the image size; see `BatchShapes`.
Variant = Literal["standard", "equation", "listing", "v0.1", "main"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
# Multiples of 32 nearest to five steps from 160 to 320, and the base size (paper, section 3.3).
PAPER_SIZES_PX = (160, 192, 256, 288, 320)
MIN_IMAGES = 2  # of a micro-batch, if possible: batch normalization fails on one image


class Pick(NamedTuple):
    """One image of a batch: its index in the source, the epoch, and the requested side in pixels.

    `repeat` counts the earlier uses of the image in the epoch. A balanced sampler uses images of rare classes again.
    """

    image_index: int
    epoch: int
    size_px: int
    repeat: int = 0


@dataclass(frozen=True)
class BatchShapes:
    """The image sizes to sample from, and the batch size at each.

    | variant | number of images | published in |
    |---|---|---|
    | standard | `batch_size` at every size | |
    | equation | as many pixels as `batch_size` images of the largest size | the equation of the paper |
    | listing, main | as many pixels as `batch_size` images of the base size | the listing of the paper; later code |
    | v0.1 | the same, but at least `batch_size`, and a multiple of the number of processes | the paper's code |

    Args:
        sizes_px: image sizes; a single one for training at one size.
        batch_size: images per step and process at `base_px` (for "equation": at the largest size).
        base_px: the image size that `batch_size` refers to.
        variant: how the batch size depends on the image size.

    Raises:
        ValueError: arguments out of range.
    """

    sizes_px: tuple[int, ...]
    batch_size: int
    base_px: int
    variant: Variant = "standard"

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"variant is {self.variant!r}; expected one of {', '.join(VARIANTS)}")
        for name, value in (("batch_size", self.batch_size), ("base_px", self.base_px)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be 1 or more")
        if not self.sizes_px or min(self.sizes_px) < 1:
            raise ValueError(f"sizes_px is {self.sizes_px}; give at least one size, in pixels")

    def batch_size_at(self, size_px: int, world_size: int = 1) -> int:
        """Images of `size_px` x `size_px` in the batch of one of `world_size` processes."""
        if self.variant == "standard":
            return self.batch_size
        if self.variant == "equation":
            return max(1, max(self.sizes_px) ** 2 * self.batch_size // size_px**2)
        equal_cost = self.base_px**2 * self.batch_size / size_px**2
        if self.variant == "v0.1":
            return max(world_size, int(max(self.batch_size, equal_cost) + world_size / 2) // world_size * world_size)
        return max(1, int(equal_cost))


class EpochBatches(Sequence[list[Pick]]):
    """The batches of an epoch for one process.

    Each step samples one of the image sizes uniformly, the same for all processes. The images of an epoch are shuffled
    and distributed until none is left: every image occurs once, in one process.

    The last batch contains the remaining images. If these are fewer than `min_last`, they are added to the previous
    batch. The processes get equal numbers of images in each step; in the last step, these differ by at most one.

    With `labels`, the classes occur equally often instead: their numbers of images in an epoch differ by at most one.
    Across epochs, the images of a class are used in shuffled passes, so none is left out. See `balanced_order`.

    Args:
        num_images: number of images in the source.
        shapes: image sizes and batch sizes.
        seed: with `epoch`, the seed of the order and the sizes.
        epoch: index of the epoch.
        rank: index of this process.
        world_size: number of processes.
        min_last: minimum size of the last batch over all processes; the default is two images per process.
        labels: class index of every image, (num_images,), for balanced classes; None: every image once.

    Attributes:
        batch_sizes: images per step over all processes, by image size.

    Raises:
        ValueError: arguments out of range, or fewer images than processes.
    """

    def __init__(
        self,
        num_images: int,
        shapes: BatchShapes,
        *,
        seed: int = 0,
        epoch: int = 0,
        rank: int = 0,
        world_size: int = 1,
        min_last: int | None = None,
        labels: np.ndarray | None = None,
    ):
        if num_images < 1:
            raise ValueError(f"num_images is {num_images}; it must be 1 or more")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank} of {world_size} processes; it must be from 0 to {world_size - 1}")
        if num_images < world_size:
            raise ValueError(f"{num_images} images are too few for {world_size} processes")
        if labels is not None and len(labels) != num_images:
            raise ValueError(f"labels has {len(labels)} entries; it must have one for each of the {num_images} images")
        self.epoch = epoch
        self.rank = rank
        self.world_size = world_size
        self._seed = seed
        self._num_images = num_images
        self._labels = labels
        sizes = sorted(shapes.sizes_px)
        self.batch_sizes = {size: world_size * shapes.batch_size_at(size, world_size) for size in sizes}
        batch_sizes = np.array([self.batch_sizes[size] for size in sizes])
        # Two generators: the number of sampled sizes must not change the order of the images, and vice versa.
        sampled = np.random.default_rng((seed, epoch, 1)).integers(len(sizes), size=-(-num_images // batch_sizes.min()))
        stops = np.cumsum(batch_sizes[sampled])
        num_steps = int(np.searchsorted(stops, num_images)) + 1
        stops = np.minimum(stops[:num_steps], num_images)
        if num_steps > 1 and stops[-1] - stops[-2] < (MIN_IMAGES * world_size if min_last is None else min_last):
            stops = np.append(stops[:-2], num_images)
        self._stops = stops
        self._sizes_px = np.array(sizes)[sampled[: len(stops)]]

    @cached_property
    def _order(self) -> np.ndarray:
        order = np.random.default_rng((self._seed, self.epoch)).permutation(self._num_images)
        if self._labels is None:
            return order
        return balanced_order(self._labels, seed=self._seed, epoch=self.epoch)[order]

    @cached_property
    def _repeats(self) -> np.ndarray:
        """The number of earlier uses of each image of `_order`."""
        return np.zeros(self._num_images, np.int64) if self._labels is None else count_earlier(self._order)

    def __len__(self) -> int:
        return len(self._stops)

    @overload
    def __getitem__(self, step: int) -> list[Pick]: ...
    @overload
    def __getitem__(self, step: slice) -> list[list[Pick]]: ...
    def __getitem__(self, step: int | slice) -> list[Pick] | list[list[Pick]]:
        if isinstance(step, slice):
            return [self[i] for i in range(*step.indices(len(self)))]
        step = range(len(self))[step]  # resolves negative steps, raises IndexError
        start = self._stops[step - 1] if step else 0
        chosen = slice(start + self.rank, self._stops[step], self.world_size)
        uses = zip(self._order[chosen].tolist(), self._repeats[chosen].tolist(), strict=True)
        return [Pick(index, self.epoch, int(self._sizes_px[step]), repeat) for index, repeat in uses]

    def global_batch_size(self, step: int) -> int:
        """Images of a step over all processes."""
        return int(self._stops[step] - (self._stops[step - 1] if step else 0))

    def size_px(self, step: int) -> int:
        """Side of the images of a step in pixels."""
        return int(self._sizes_px[step])


def balanced_order(labels: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """The images of an epoch with balanced classes, not shuffled: image indices (N,) for N labels.

    The places of all epochs form one sequence, and the classes that have images take turns in it. The images of a
    class follow in passes. A pass is a permutation that depends on the seed, the class and the number of the pass. So
    any epoch can be computed directly, and no two images of a class differ by more than one use.
    """
    classes, counts = np.unique(labels, return_counts=True)
    images = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
    places = np.arange(epoch * len(labels), (epoch + 1) * len(labels))
    order = np.empty(len(labels), np.int64)
    for i, (name, of_class) in enumerate(zip(classes.tolist(), images, strict=True)):
        is_own = places % len(classes) == i
        uses = places[is_own] // len(classes)  # of images of this class, counted from the first epoch on
        passes, position = np.divmod(uses, len(of_class))
        first = int(passes[0]) if len(passes) else 0
        last = int(passes[-1]) if len(passes) else -1
        # The last number sets these generators apart: numpy pads seeds with zeros.
        shuffled = [
            np.random.default_rng((seed, name, number, 2**31)).permutation(of_class)
            for number in range(first, last + 1)
        ]
        order[is_own] = np.array(shuffled)[passes - first, position] if shuffled else []
    return order


def count_earlier(values: np.ndarray) -> np.ndarray:
    """For each of N values: how many of the values before it are equal. (N,) int64."""
    by_value = np.argsort(values, kind="stable")
    is_first = np.append(True, np.diff(values[by_value]) > 0)
    positions = np.arange(len(values))
    earlier = np.empty(len(values), np.int64)
    earlier[by_value] = positions - np.maximum.accumulate(np.where(is_first, positions, 0))
    return earlier


@dataclass(frozen=True)
class MicroBatch:
    """The images of one forward and backward pass: micro-batch `index` of `num_micro_batches` of step `step`."""

    step: int
    index: int
    num_micro_batches: int
    picks: list[Pick]
    weight: float  # fraction of the images of the step

    @property
    def size_px(self) -> int:
        """Side of the images in pixels."""
        return self.picks[0].size_px


def count_micro_batches(num_images: int, size_px: int, *, max_pixels: int, world_size: int) -> int:
    """Micro-batches of a step with `num_images`; see `micro_batches`."""
    max_images = max(MIN_IMAGES, max_pixels // size_px**2)
    per_process = -(-num_images // (max_images * world_size))
    return world_size * max(1, min(per_process, num_images // (MIN_IMAGES * world_size)))


def micro_batches(
    batches: EpochBatches, *, max_pixels: int, first_step: int = 0, rank: int = 0, world_size: int = 1
) -> Iterator[MicroBatch]:
    """The micro-batches of process `rank` of `world_size`, from `first_step` on.

    `batches` are those of all processes together. A step is divided evenly into the smallest multiple of `world_size`
    micro-batches with at most `max_pixels` pixels each; process 0 computes micro-batch 0, `world_size` and so on. Only
    their number depends on the hardware: four micro-batches in one process, or one in each of four processes, contain
    the same images. Each has at least two images, if possible.
    """
    for step in range(first_step, len(batches)):
        picks = batches[step]
        num = count_micro_batches(len(picks), batches.size_px(step), max_pixels=max_pixels, world_size=world_size)
        for index in range(rank, num, world_size):
            chosen = picks[index::num]
            yield MicroBatch(step, index, num, chosen, len(chosen) / len(picks))


def eval_batches(num_images: int, *, batch_size: int, size_px: int) -> list[list[Pick]]:
    """Every image once, in order; the last batch contains the remaining images."""
    picks = [Pick(index, 0, size_px) for index in range(num_images)]
    return [picks[start : start + batch_size] for start in range(0, num_images, batch_size)]
