"""k-nearest-neighbor accuracy of pooled features, which requires no classifier."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from mobilevit.data.sources import default_split, find_evaluation_split, find_splits
from mobilevit.device import choose_device
from mobilevit.embed import DEFAULT_OPTIONS, EmbedOptions, features_of
from mobilevit.recipes import Recipe
from mobilevit.tasks.classification import ClassificationResults
from mobilevit.tasks.evaluation import EvaluationResult
from mobilevit.weights import Weights

logger = logging.getLogger(__name__)
MAX_SIMILARITIES = 1 << 26  # that are in memory at a time, 256 MB


def evaluate_knn(
    weights: Weights,
    data: str | Path,
    *,
    k: int,
    split: str | None = None,
    size_px: int | None = None,
    max_unreadable: int = 0,
    options: EmbedOptions = DEFAULT_OPTIONS,
) -> EvaluationResult:
    """Classify each image of a split by the most frequent class of its `k` nearest training images.

    The similarity is the cosine of the pooled features. Of several most frequent classes, the first one is predicted.

    Args:
        weights: of a classifier; its own classifier, if it has one, is not used.
        data: a dataset, as for `train`. Data without splits are divided as in the training of the weights, or as the
            default recipe does it.
        k: number of neighbors.
        split: the images to classify. None: val, or test if there is no val.
        size_px: input size; None: the size that the weights were trained at.
        max_unreadable: number of unreadable images to skip in each split.
        options: batch size, processes and device.

    Returns:
        The metrics are "knn_top1", "balanced_accuracy" and "macro_f1" in percent, and "num_images".

    Raises:
        ValueError: as `mobilevit.evaluate`; or fewer than `k` training images.
    """
    if k < 1:
        raise ValueError(f"k is {k}; it must be 1 or more")
    if size_px is not None:
        weights = replace(weights, preprocessing=weights.preprocessing.at_size(size_px))
    if split not in (None, "val", "test"):
        raise ValueError(f"split is {split!r}, but its images are among the neighbors; choose val or test")
    val_fraction = weights.val_fraction or Recipe().data.val_fraction
    train, queries = find_splits("classify", data, val_fraction)
    for note in train.notes:
        logger.info(note)
    if split is None:
        split = "test" if default_split("classify", data) == "test" else "val"
    else:
        queries = find_evaluation_split("classify", data, train.class_names, split, val_fraction)
    if k > len(train):
        raise ValueError(f"k is {k}, but {data} has {len(train)} training images; give fewer neighbors")
    index_indices, index_features = features_of(weights, train, options, max_unreadable=max_unreadable)
    indices, features = features_of(weights, queries, options, max_unreadable=max_unreadable)
    predictions, fractions = nearest_classes(
        features,
        index_features,
        np.array(train.labels)[index_indices],
        num_classes=len(train.class_names),
        k=k,
        device=choose_device(options.device),
    )
    results = ClassificationResults(
        indices,
        np.array(queries.labels)[indices],
        predictions[:, None],
        fractions,
        np.zeros(len(indices), np.float32),  # a vote has no likelihood
        len(train.class_names),
    )
    all_metrics = results.metrics()
    metrics = {
        "knn_top1": all_metrics["top1"],
        **{name: all_metrics[name] for name in ("balanced_accuracy", "macro_f1", "num_images")},
    }
    return EvaluationResult(
        split, weights.preprocessing.crop_px, metrics, results.per_class(train.class_names), results
    )


def nearest_classes(
    queries: np.ndarray, index: np.ndarray, labels: np.ndarray, *, num_classes: int, k: int, device: str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """The most frequent class among the `k` rows of `index` (N, D) with the highest cosine, and its fraction of them.

    `labels` (N,) are the classes of `index`. Returns two arrays (Q,) for `queries` (Q, D).
    """
    index_ND = F.normalize(torch.from_numpy(index).to(device), dim=1)
    classes = torch.from_numpy(labels).to(device)
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for chunk in torch.from_numpy(queries).split(max(1, MAX_SIMILARITIES // len(index))):
        nearest = (F.normalize(chunk.to(device), dim=1) @ index_ND.T).topk(k).indices
        votes = torch.zeros(len(chunk), num_classes, device=device)
        votes.scatter_add_(1, classes[nearest], torch.ones_like(nearest, dtype=votes.dtype))
        best = votes.cpu().numpy().argmax(1)  # the first of several maxima
        found.append((best, votes.amax(1).cpu().numpy() / k))
    predictions, fractions = zip(*found, strict=True)
    return np.concatenate(predictions), np.concatenate(fractions)
