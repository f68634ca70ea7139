"""The protocol of a task: its interface to the training loop and to evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from mobilevit.data.loader import Batch, ImageDataset
from mobilevit.data.python_data import Data
from mobilevit.images import ImageError, Preprocessing
from mobilevit.recipes import Recipe
from mobilevit.weights import Calibration, TaskName, Weights

Gather = Callable[[Any], list[Any]]
"""All-gather: takes the value of this process and returns the values of all processes, in the order of their ranks."""


def single_process(value: Any) -> list[Any]:
    """The `Gather` of a run with one process."""
    return [value]


def merge_images(rows: Sequence[tuple[Tensor, ...]], gather: Gather) -> list[np.ndarray]:
    """Per-image values of all batches of all processes, by image index, which is the first value of each row.

    The order, in which values are summed later, does not depend on the number of processes.

    Raises:
        ImageError: no process has an image.
    """
    columns = [torch.cat(column).cpu().numpy() for column in zip(*rows, strict=True)]
    gathered = [of_process for of_process in gather(columns) if of_process]
    if not gathered:
        raise ImageError("none of the images to evaluate on can be read")
    merged = [np.concatenate(column) for column in zip(*gathered, strict=True)]
    order = np.argsort(merged[0])
    return [array[order] for array in merged]


@dataclass(frozen=True)
class ClassMetrics:
    """Metrics of one class by name: a count, and values in percent; None where a metric is undefined."""

    class_name: str
    metrics: dict[str, float | None]

    def as_dict(self) -> dict[str, str | float | None]:
        """A flat row for JSON, with the name under "class"."""
        return {"class": self.class_name, **self.metrics}


class Described(Protocol):
    """What an evaluation must know about a network. `Weights` and exported artifacts contain it."""

    @property
    def task(self) -> TaskName: ...
    @property
    def preprocessing(self) -> Preprocessing: ...
    @property
    def class_names(self) -> tuple[str, ...]: ...
    @property
    def thresholds(self) -> tuple[float, ...]: ...
    @property
    def calibration(self) -> Calibration: ...
    @property
    def val_fraction(self) -> float | None: ...
    @property
    def val_data(self) -> str | None: ...


class Results(Protocol):
    """The record of an evaluation. `mobilevit.report.results` renders it."""

    main_metric: str
    """Name of the metric, in percent, that selects the best epoch."""

    def metrics(self) -> dict[str, float]:
        """Metrics of the whole dataset by name, the main metric first."""
        ...

    def per_class(self, class_names: Sequence[str]) -> list[ClassMetrics]:
        """Metrics of every class, in the order of `class_names`."""
        ...


class Task(Protocol):
    """Datasets, model, loss and metrics of a task."""

    def datasets(self, recipe: Recipe, data: Data) -> tuple[ImageDataset, ImageDataset]:
        """Training and validation sets. Raises ValueError for every problem that can be found before training."""
        ...

    def evaluation_set(self, weights: Described, data: Data, preprocessing: Preprocessing, split: str) -> ImageDataset:
        """The images of a split of `data`, to evaluate trained weights on."""
        ...

    def build(self, recipe: Recipe, train_set: ImageDataset, pretrained: Weights | None) -> Weights:
        """Initial weights, with the preprocessing and class names that the trained weights will have."""
        ...

    def blank_labels(self, batch_size: int, size_px: int) -> Any:
        """Dummy labels with the type and shape of training labels, to measure the memory of a training step."""
        ...

    def loss(self, recipe: Recipe, model: nn.Module, batch: Batch) -> Tensor:
        """Mean loss of a batch, a scalar. `model` is in training mode, possibly wrapped in DDP or compiled."""
        ...

    def evaluate(self, model: nn.Module, batches: Iterable[Batch], gather: Gather = single_process) -> Results:
        """Results of a model in evaluation mode on `batches` and on those of the other processes.

        The results do not depend on how images are divided into batches and processes.

        Raises:
            ImageError: none of the images can be read.
        """
        ...
