"""Tasks: what a network is trained for. The training loop knows a task by these methods alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from mobilevit.data import sources
from mobilevit.data.loader import Batch, ImageDataset, load
from mobilevit.data.sampler import eval_batches
from mobilevit.data.samples import Source, fingerprint
from mobilevit.images import ImageError, Preprocessing
from mobilevit.names import join_names
from mobilevit.recipes import Recipe
from mobilevit.tasks.classification import Classification, Gather, alone
from mobilevit.tasks.detection import Detection
from mobilevit.tasks.segmentation import Segmentation
from mobilevit.weights import Weights


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
        """Titles and HTML for the report of a run; `source` has the images that were evaluated."""
        ...


class Task(Protocol):
    """The seam between a task and the loop."""

    def datasets(self, recipe: Recipe, data: str | Path) -> tuple[ImageDataset, ImageDataset]:
        """Training and validation data; raises ValueError for whatever can be known to be wrong before training."""
        ...

    def evaluation_set(
        self, weights: Weights, data: str | Path, preprocessing: Preprocessing, split: str
    ) -> ImageDataset:
        """A split of `data` for trained weights; see `mobilevit.data.sources.find_evaluation_split`."""
        ...

    def build(self, recipe: Recipe, train_set: ImageDataset, pretrained: Weights | None) -> Weights:
        """The initial weights, with the preprocessing and class names that will travel with the trained ones."""
        ...

    def blank_labels(self, batch_size: int, size_px: int) -> Any:
        """Labels for black images, of the kind that training data come with: to try what a step costs."""
        ...

    def loss(self, recipe: Recipe, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of a batch, a scalar."""
        ...

    def evaluate(self, model: nn.Module, batches: Iterable[Batch], gather: Gather = alone) -> Results:
        """What a model in eval mode makes of images; `gather` brings together what several processes found."""
        ...


TASKS: dict[str, Task] = {"classify": Classification(), "detect": Detection(), "segment": Segmentation()}


def default_split(weights: Weights, data: str | Path) -> str:
    """The split of `data` that `weights` are evaluated on by default: "val", "test" or "all".

    As `mobilevit.data.sources.default_split`; but if `data` is not divided and the weights were trained on it, "val":
    the validation split of the training run.
    """
    split = sources.default_split(weights.task, data)
    if split == "all" and "val_data" in weights.training:
        with contextlib.suppress(ValueError):  # other data may be too few to divide
            val = TASKS[weights.task].evaluation_set(weights, data, weights.preprocessing, "val")
            if _is_val_of_training(weights, val):
                return "val"
    return split


def _is_val_of_training(weights: Weights, dataset: ImageDataset) -> bool:
    return fingerprint(dataset.source) == weights.training.get("val_data")


def evaluate_weights(
    weights: Weights,
    data: str | Path,
    *,
    split: str | None = None,
    size_px: int | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
    device: str = "cpu",
    max_unreadable: int = 0,
    say: Callable[[str], object] = lambda note: None,
) -> Results:
    """Metrics of `weights` on a `split` of `data` (see `default_split`), at the size they are for or at `size_px`.

    Up to `max_unreadable` images that cannot be read are left out. `say` gets notes: their names, ignored files.

    Raises:
        ValueError: weights without class names, a class that is none of them, a split that `data` lacks, more images
            that cannot be read.
    """
    if batch_size < 1:
        raise ValueError(f"batch size is {batch_size}; it must be 1 or more")
    preprocessing = weights.preprocessing
    if size_px is not None:
        if size_px < 32:
            raise ValueError(f"size is {size_px}; it must be 32 px or more")
        preprocessing = preprocessing.at_size(size_px)
    task = TASKS[weights.task]
    split = split or default_split(weights, data)
    dataset = task.evaluation_set(weights, data, preprocessing, split)
    for note in dataset.notes:
        say(note)
    is_divided_here = split == "val" and sources.default_split(weights.task, data) == "all"
    if is_divided_here and not _is_val_of_training(weights, dataset):
        say(
            f"{data}: divided anew: not the validation split of the training run, because names or labels of the "
            "images have changed or an earlier version divided them; images of the training split may be among them"
        )
    batches = eval_batches(len(dataset), batch_size=batch_size, size_px=preprocessing.crop_px)
    loaded = load(
        dataset,
        batches,
        num_workers=num_workers,
        device=device,
        preprocessing=preprocessing,
        max_unreadable=max_unreadable,
        replace_unreadable=False,
    )
    with contextlib.closing(loaded):
        results = task.evaluate(weights.build().to(device), loaded)
    if len(loaded.unreadable) > max_unreadable:
        raise ImageError(
            f"{len(loaded.unreadable)} images cannot be read ({join_names(loaded.unreadable)}), and max_unreadable is "
            f"{max_unreadable}; replace them, or skip them with --max-unreadable {len(loaded.unreadable)}"
        )
    if loaded.unreadable:
        say(f"cannot be read, left out: {', '.join(loaded.unreadable)}")
    return results
