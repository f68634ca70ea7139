"""Evaluation from Python: `mobilevit.evaluate`."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobilevit.device import choose_device
from mobilevit.tasks import default_split, evaluate_weights
from mobilevit.weights import Weights, to_weights


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics of weights on data, those that `mobilevit evaluate --json --per-class` prints.

    `metrics` has a number by name: "top1", "top5" and "loss" of a classifier, "ap", "ap50" and others of a detector,
    "miou" and others of a segmentation network, in per cent except for the loss, and "num_images". `per_class` has a
    row per class with its name under "class"; a metric that is undefined for a class is None.
    """

    split: str
    size_px: int
    metrics: dict[str, float]
    per_class: list[dict[str, Any]]


def evaluate(
    weights: Weights | str | os.PathLike[str],
    data: str | Path,
    *,
    split: str | None = None,
    size_px: int | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
    max_unreadable: int = 0,
    device: str = "auto",
    download: bool = False,
) -> EvaluationResult:
    """Evaluate `weights` (a path, a hub id or `Weights`) on a split of `data`: "train", "val", "test" or "all".

    The default is val, or test where there is no val. Data without splits are divided as in training if the weights
    were trained on them; of other data all images are evaluated. Images are resized for the size that the weights were
    trained at, or for `size_px`. `num_workers` processes read them; 0 reads them in
    this process. Up to `max_unreadable` images that cannot be read are left out. Notes, such as their names, are
    warnings. A hub id is fetched only with `download=True`.

    >>> mobilevit.evaluate("runs/pets/model.safetensors", "pets/").metrics["top1"]

    Raises:
        ValueError: weights that cannot be read or name no classes, data of other classes, an image that cannot be read,
            a size below 32 px, a split that `data` lacks, a device that is not available.
        TypeError: `weights` of another type.
    """
    weights = to_weights(weights, download=download)
    split = split or default_split(weights, data)
    results = evaluate_weights(
        weights,
        data,
        split=split,
        size_px=size_px,
        batch_size=batch_size,
        num_workers=num_workers,
        device=choose_device(device),
        max_unreadable=max_unreadable,
        say=lambda note: warnings.warn(note, stacklevel=3),
    )
    size_px = size_px or weights.preprocessing.crop_px
    return EvaluationResult(split, size_px, results.metrics(), results.per_class(weights.class_names))
