"""Division of a run into steps and micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mobilevit.data.sampler import BatchShapes, EpochBatches, MicroBatch, count_micro_batches, micro_batches
from mobilevit.recipes import Recipe


@dataclass(frozen=True)
class Plan:
    """The steps of a run. The order and the sizes of the images do not depend on the number of processes.

    Args:
        num_images: in the training split.
        world_size: number of processes.
        max_pixels: height times width times images of the largest micro-batch.
        labels: class index of every image, (num_images,), to sample the classes equally often; None: no balancing.
    """

    recipe: Recipe
    num_images: int
    world_size: int
    max_pixels: int
    labels: np.ndarray | None = None

    def epoch(self, epoch: int) -> EpochBatches:
        """The batches of an epoch, of all processes together."""
        recipe, sampler, size_px = self.recipe, self.recipe.sampler, self.recipe.data.size_px
        sizes_px = (size_px,) if sampler.variant == "standard" else sampler.sizes_px
        shapes = BatchShapes(sizes_px, recipe.batch_size, size_px, sampler.variant)
        smallest = min(shapes.batch_size_at(size) for size in sizes_px)
        if self.world_size > 1 and smallest < 4 * self.world_size:
            raise ValueError(
                f"batch_size is {recipe.batch_size}, too few for {self.world_size} processes; use 4 or more per process"
            )
        return EpochBatches(
            self.num_images,
            shapes,
            seed=recipe.seed,
            epoch=epoch,
            # Half a batch has two images per process, so the division does not depend on the number of processes.
            min_last=max(2, smallest // 2),
            labels=self.labels,
        )

    def num_steps(self, num_epochs: int) -> int:
        """Number of steps in the first `num_epochs` epochs."""
        return sum(len(self.epoch(epoch)) for epoch in range(num_epochs))

    def micro_batches(self, batches: EpochBatches, first_step: int, rank: int) -> Iterator[MicroBatch]:
        """The micro-batches of process `rank` from `first_step` on."""
        return micro_batches(
            batches, max_pixels=self.max_pixels, first_step=first_step, rank=rank, world_size=self.world_size
        )

    def num_micro_batches(self, batch_size: int, size_px: int) -> int:
        """Number of micro-batches of a step, in all processes together."""
        return count_micro_batches(batch_size, size_px, max_pixels=self.max_pixels, world_size=self.world_size)

    def max_micro_batch_size(self) -> int:
        """Maximum number of images in a micro-batch at the base size."""
        return self.max_pixels // self.recipe.data.size_px**2

    def batch_sizes(self) -> dict[int, int]:
        """Number of images in a full step by image size in pixels; at most `num_images`."""
        return {size_px: min(size, self.num_images) for size_px, size in self.epoch(0).batch_sizes.items()}

    def shapes(self) -> set[tuple[int, ...]]:
        """Shapes of the micro-batches of full steps: per image size one, or two if a step does not divide evenly."""
        shapes = set()
        for size_px, batch_size in self.batch_sizes().items():
            num = self.num_micro_batches(batch_size, size_px)
            shapes |= {(length, 3, size_px, size_px) for length in (batch_size // num, -(-batch_size // num))}
        return shapes
