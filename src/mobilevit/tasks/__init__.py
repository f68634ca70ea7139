"""Tasks: what a network is trained for. The training loop knows a task by these four methods alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from mobilevit.data.loader import Batch, PictureDataset
from mobilevit.data.sources import Source
from mobilevit.models.weights import Weights
from mobilevit.recipes import Recipe
from mobilevit.tasks.classification import Classification, Gather, alone


class Results(Protocol):
    """What came out of an evaluation."""

    main_metric: str
    """Name of the metric, in per cent, that decides which epoch was best."""

    def metrics(self) -> dict[str, float]:
        """Metrics by name."""
        ...

    def sections(self, source: Source) -> list[tuple[str, str]]:
        """Titles and HTML for the report of a run; `source` has the pictures that were evaluated."""
        ...


class Task(Protocol):
    """The seam between a task and the loop."""

    def datasets(self, recipe: Recipe, data: str | Path) -> tuple[PictureDataset, PictureDataset]:
        """Training and validation data; raises ValueError for whatever can be known to be wrong before training."""
        ...

    def build(self, recipe: Recipe, train_set: PictureDataset, pretrained: Weights | None) -> Weights:
        """The initial weights, with the preprocessing and class names that will travel with the trained ones."""
        ...

    def loss(self, recipe: Recipe, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of a batch, a scalar."""
        ...

    def evaluate(self, model: nn.Module, batches: Iterable[Batch], gather: Gather = alone) -> Results:
        """What a model in eval mode makes of pictures; `gather` brings together what several processes found."""
        ...


TASKS: dict[str, Task] = {"classify": Classification()}
