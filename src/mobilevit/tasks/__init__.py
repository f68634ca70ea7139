"""Tasks: what a network is trained for. The training loop knows a task by these methods alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from mobilevit.data.loader import Batch, PictureDataset, load
from mobilevit.data.sampler import eval_batches
from mobilevit.data.sources import Source
from mobilevit.models.weights import Weights
from mobilevit.pictures import Preprocessing
from mobilevit.recipes import Recipe
from mobilevit.tasks.classification import Classification, Gather, alone
from mobilevit.tasks.detection import Detection
from mobilevit.tasks.segmentation import Segmentation


class Results(Protocol):
    """What came out of an evaluation."""

    main_metric: str
    """Name of the metric, in per cent, that decides which epoch was best."""

    def metrics(self) -> dict[str, float]:
        """Metrics by name."""
        ...

    def per_class(self, class_names: Sequence[str]) -> list[dict[str, Any]]:
        """A row a class: its name under "class", its figures, None where one is undefined."""
        ...

    def sections(self, source: Source) -> list[tuple[str, str]]:
        """Titles and HTML for the report of a run; `source` has the pictures that were evaluated."""
        ...


class Task(Protocol):
    """The seam between a task and the loop."""

    def datasets(self, recipe: Recipe, data: str | Path) -> tuple[PictureDataset, PictureDataset]:
        """Training and validation data; raises ValueError for whatever can be known to be wrong before training."""
        ...

    def evaluation_set(self, weights: Weights, data: str | Path, preprocessing: Preprocessing) -> PictureDataset:
        """What is held out of `data`, or all of it, for weights that are trained already."""
        ...

    def held_out_name(self, data: str | Path) -> str | None:
        """Which split of `data` evaluation takes; None where it takes all there is."""
        ...

    def build(self, recipe: Recipe, train_set: PictureDataset, pretrained: Weights | None) -> Weights:
        """The initial weights, with the preprocessing and class names that will travel with the trained ones."""
        ...

    def blank_labels(self, batch_size: int, size_px: int) -> Any:
        """Labels for black pictures, of the kind that training data come with: to try what a step costs."""
        ...

    def loss(self, recipe: Recipe, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of a batch, a scalar."""
        ...

    def evaluate(self, model: nn.Module, batches: Iterable[Batch], gather: Gather = alone) -> Results:
        """What a model in eval mode makes of pictures; `gather` brings together what several processes found."""
        ...


TASKS: dict[str, Task] = {"classify": Classification(), "detect": Detection(), "segment": Segmentation()}


def evaluate_weights(
    weights: Weights,
    data: str | Path,
    *,
    size_px: int | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
    device: str = "cpu",
) -> Results:
    """What `weights` make of `val/` or `test/` of `data`, or of all of it, at the size they are for or at `size_px`.

    Raises:
        ValueError: weights without class names, a class that is none of them, a picture that cannot be read.
    """
    if batch_size < 1:
        raise ValueError(f"batch size is {batch_size}; it must be 1 or more")
    preprocessing = weights.preprocessing
    if size_px is not None:
        if size_px < 32:
            raise ValueError(f"size is {size_px}; it must be 32 px or more")
        preprocessing = preprocessing.at_size(size_px)
    task = TASKS[weights.task]
    dataset = task.evaluation_set(weights, data, preprocessing)
    batches = eval_batches(len(dataset), batch_size=batch_size, size_px=preprocessing.crop_px)
    loaded = load(dataset, batches, num_workers=num_workers, device=device, preprocessing=preprocessing)
    with contextlib.closing(loaded):
        return task.evaluate(weights.build().to(device), loaded)
