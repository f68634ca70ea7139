"""Tasks: what a network is trained for. The training loop knows a task by these four methods alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from mobilevit.data.loader import Batch, PictureDataset
from mobilevit.models.weights import Weights
from mobilevit.recipes import Recipe
from mobilevit.tasks.classification import Classification


class Task(Protocol):
    """The seam between a task and the loop."""

    def datasets(self, recipe: Recipe, data: Path) -> tuple[PictureDataset, PictureDataset]:
        """Training and validation data; raises ValueError for whatever can be known to be wrong before training."""
        ...

    def build(self, recipe: Recipe, train_set: PictureDataset, pretrained: Weights | None) -> Weights:
        """The initial weights, with the preprocessing and class names that will travel with the trained ones."""
        ...

    def loss(self, recipe: Recipe, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of a batch, a scalar."""
        ...

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> Mapping[str, float]:
        """Metrics by name, of a model in eval mode."""
        ...


TASKS: dict[str, Task] = {"classify": Classification()}
