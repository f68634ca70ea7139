"""Evaluate trained weights on data: `mobilevit.evaluate` and `mobilevit evaluate`."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from mobilevit.data import sources
from mobilevit.data.corruptions import Corrupted, Corruption
from mobilevit.data.loader import Batch, ImageDataset, Loader, load
from mobilevit.data.python_data import Data, MapDataset, PythonData, to_data
from mobilevit.data.sampler import eval_batches
from mobilevit.data.samples import fingerprint
from mobilevit.data.transforms import Evaluation
from mobilevit.defaults import MIN_SIZE_PX
from mobilevit.device import choose_device
from mobilevit.images import ImageError, Preprocessing
from mobilevit.messages import join_names
from mobilevit.self_check import check_device
from mobilevit.tasks import TASKS
from mobilevit.tasks.classification import ClassificationResults
from mobilevit.tasks.confidence import auroc
from mobilevit.tasks.multilabel import MultilabelResults
from mobilevit.tasks.task import ClassMetrics, Described, Results, Task
from mobilevit.weights import Weights, to_weights

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics of weights on a split of the data; `mobilevit evaluate --json --per-class` prints the same numbers.

    `metrics` are "top1", "top5", "balanced_accuracy", "macro_f1", "loss", "ece" and others of a classifier, "map",
    "micro_f1", "macro_f1" and "loss" of a multi-label classifier, "ap", "ap50" and others of a detector, "miou" and
    others of a segmentation network, all in percent except the loss; and "num_images". `results` has the predictions.
    """

    split: str
    size_px: int
    metrics: dict[str, float]
    per_class: list[ClassMetrics]
    results: Results = field(repr=False)


@dataclass(frozen=True)
class EvaluationOptions:
    """The options of `evaluate` that select and read images."""

    split: str | None = None
    batch_size: int = 32
    num_workers: int = 0
    max_unreadable: int = 0
    corruption: Corruption | None = None
    ood: str | Path | None = None


@dataclass(frozen=True)
class Runner:
    """How a network is evaluated: `build` returns it, after the data are checked, and `task` computes the results.

    The network takes images (B, 3, H, W) on `device`: normalized, or uint8 with `takes_uint8`.
    """

    task: Task
    build: Callable[[], nn.Module]
    device: str = "cpu"
    takes_uint8: bool = False


def evaluate(
    weights: Weights | str | os.PathLike[str],
    data: str | os.PathLike[str] | MapDataset | tuple[MapDataset, MapDataset] | PythonData,
    *,
    split: str | None = None,
    size_px: int | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
    max_unreadable: int = 0,
    device: str = "auto",
    download: bool = False,
    self_check: bool = True,
    corruption: Corruption | None = None,
    ood: str | Path | None = None,
) -> EvaluationResult:
    """Evaluate trained weights on a split of the data.

    Examples:
        >>> mobilevit.evaluate("runs/pets/model.safetensors", "pets/").metrics["top1"]

    Args:
        weights: a path, a hub id or `Weights`.
        data: a folder or dataset, or a dataset in Python, as for `train`.
        split: "train", "val", "test" or "all". None: val, or test if there is no val. Data without splits are split as
            in training if the weights were trained on them; otherwise all images are evaluated.
        size_px: input size; None: the size that the weights were trained at.
        batch_size: images per batch.
        num_workers: processes that read images; 0 reads them in this process.
        max_unreadable: number of unreadable images to skip. Their names are logged.
        device: "auto" is the first available one of cuda, mps and cpu.
        download: fetch a hub id that is not in the local cache.
        self_check: on another device than the CPU, first compare a batch with the CPU; see `mobilevit.self_check`.
        corruption: corrupt every image after resizing and cropping, to measure robustness.
        ood: images of another source, for classifiers: a folder of images, or a dataset, whose labels are not used. The
            metric "ood_auroc" is the AUROC of the energy, in percent; "num_ood_images" is their number.

    Raises:
        ValueError: the weights cannot be read or have no class names; the data have other classes; an image cannot be
            read; the size is below 32 px; `data` lacks the split; the device is not available, or wrong
            (`mobilevit.self_check.DeviceError`).
        TypeError: `weights` has another type.
    """
    weights, data = to_weights(weights, download=download), to_data(data)
    device = choose_device(device)
    if size_px is not None and size_px < MIN_SIZE_PX:
        raise ValueError(f"size is {size_px}; it must be {MIN_SIZE_PX} px or more")
    preprocessing = weights.preprocessing if size_px is None else weights.preprocessing.at_size(size_px)

    def build() -> nn.Module:
        model = weights.build().to(device)
        if self_check:
            check_device(model, preprocessing.crop_px)
        return model

    options = EvaluationOptions(split, batch_size, num_workers, max_unreadable, corruption, ood)
    return evaluate_network(weights, data, preprocessing, Runner(TASKS[weights.task], build, device), options)


def evaluate_network(
    weights: Described, data: Data, preprocessing: Preprocessing, runner: Runner, options: EvaluationOptions
) -> EvaluationResult:
    """Evaluate the network of `runner`, which `weights` describes, with `preprocessing`; see `evaluate`."""
    if options.batch_size < 1:
        raise ValueError(f"batch size is {options.batch_size}; it must be 1 or more")
    others = None if options.ood is None else _images_of_another_source(weights, options.ood, preprocessing)
    split = options.split or default_split(weights, data)
    dataset = runner.task.evaluation_set(weights, data, preprocessing, split)
    _warn_of_data(weights, dataset, data, split)
    if options.corruption:
        dataset.prepare = Corrupted(dataset.prepare, options.corruption)
    model = runner.build()

    def over_images_of(dataset: ImageDataset, function: Callable[[nn.Module, Loader], T]) -> T:
        loaded = load(
            dataset,
            eval_batches(len(dataset), batch_size=options.batch_size, size_px=preprocessing.crop_px),
            num_workers=options.num_workers,
            device=runner.device,
            preprocessing=None if runner.takes_uint8 else preprocessing,
            max_unreadable=options.max_unreadable,
            replace_unreadable=False,
        )
        with contextlib.closing(loaded):
            result = function(model, loaded)
        _check_unreadable(loaded.unreadable, options.max_unreadable)
        return result

    results = over_images_of(dataset, runner.task.evaluate)
    if isinstance(results, MultilabelResults):
        results = replace(results, stored_thresholds=weights.thresholds)
    metrics_of_others: dict[str, float] = {}
    if isinstance(results, ClassificationResults):
        results = replace(results, calibration=weights.calibration)
        if others:
            energies = over_images_of(others, _energies)
            area = auroc(results.require_logits().energies(), energies)
            metrics_of_others = {"ood_auroc": 100 * area, "num_ood_images": len(energies)}
    metrics = {**results.metrics(), **metrics_of_others}
    return EvaluationResult(split, preprocessing.crop_px, metrics, results.per_class(weights.class_names), results)


def _images_of_another_source(weights: Described, data: str | Path, preprocessing: Preprocessing) -> ImageDataset:
    if weights.task != "classify":
        raise ValueError(f"ood is {data}, but the weights are for the task {weights.task!r}; it requires a classifier")
    return ImageDataset(sources.find_any_images(data), Evaluation(preprocessing))


@torch.inference_mode()
def _energies(model: nn.Module, batches: Iterable[Batch]) -> np.ndarray:
    """The energies of all readable images, (N,); see `LogitSummary.energies`.

    Raises:
        ImageError: none can be read.
    """
    energies = [-model(batch.pixels).float().logsumexp(1) for batch in batches if batch.indices]
    if not energies:
        raise ImageError("none of the images of the other source can be read")
    return torch.cat(energies).cpu().numpy()


def _check_unreadable(names: Sequence[str], max_unreadable: int) -> None:
    if len(names) > max_unreadable:
        raise ImageError(
            f"{len(names)} images cannot be read ({join_names(names)}), and max_unreadable is {max_unreadable}; "
            f"replace them, or skip them with --max-unreadable {len(names)}"
        )
    if names:
        _warn_once(f"skipped images that cannot be read: {', '.join(names)}")


def default_split(weights: Described, data: Data) -> str:
    """The split of `data` to evaluate `weights` on if none is given: "val", "test" or "all".

    Data with splits: val, or else test. Data without splits: val if the weights were trained on them, split in the
    same way; otherwise all.
    """
    split = sources.default_split(weights.task, data)
    if split == "all" and weights.val_data is not None:
        with contextlib.suppress(ValueError):  # other data may have too few images to split
            val = TASKS[weights.task].evaluation_set(weights, data, weights.preprocessing, "val")
            if _is_val_of_training(weights, val):
                return "val"
    return split


def _warn_of_data(weights: Described, dataset: ImageDataset, data: Data, split: str) -> None:
    for note in dataset.notes:
        _warn_once(note)
    was_split_by_us = split == "val" and sources.default_split(weights.task, data) == "all"
    if was_split_by_us and not _is_val_of_training(weights, dataset):
        _warn_once(
            f"{data}: this is not the validation split of the training run: image names or labels have changed since, "
            "or another version split the data; the split may contain training images"
        )


@cache
def _warn_once(message: str) -> None:
    """Log a warning the first time only: a command evaluates the same data with several weights and sizes."""
    logger.warning(message)


def _is_val_of_training(weights: Described, dataset: ImageDataset) -> bool:
    return fingerprint(dataset.source) == weights.val_data
