"""Multi-label classification: any number of classes per image, each with a probability and a threshold of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilevit.data.class_sets import ClassSet
from mobilevit.data.loader import Batch, ImageDataset
from mobilevit.data.python_data import Data
from mobilevit.data.transforms import Evaluation, mix
from mobilevit.defaults import LABEL_THRESHOLD
from mobilevit.images import Preprocessing
from mobilevit.recipes import Multilabel, Recipe
from mobilevit.tasks.classification import build_classifier, classifier_sets
from mobilevit.tasks.datasets import evaluation_set
from mobilevit.tasks.task import ClassMetrics, Described, Gather, Results, merge_images, single_process
from mobilevit.weights import Weights

NO_CLASS = -1  # fills the rows of images with fewer classes


class Curve(NamedTuple):
    """Counts of one class at each score that occurs, highest first: images with that score or a higher one."""

    scores: np.ndarray
    num_true: np.ndarray  # of these, those that have the class
    num_predicted: np.ndarray  # all of these
    num_labeled: int  # images that have the class, at any score

    @classmethod
    def of(cls, scores: np.ndarray, labels: np.ndarray) -> Curve:
        """From the scores and labels (N,) of one class."""
        order = np.argsort(-scores, kind="stable")
        scores, labels = scores[order], labels[order]
        last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))  # of equal scores
        return cls(scores[last], np.cumsum(labels)[last], last + 1, int(labels.sum()))

    def average_precision(self) -> float | None:
        """The mean of the precision over the steps of the recall, 0 to 1, without interpolation."""
        if not self.num_labeled:
            return None
        steps = np.diff(self.num_true, prepend=0) / self.num_labeled
        return float((steps * self.num_true / self.num_predicted).sum())

    def best_threshold(self) -> float:
        """The threshold with the highest F1, halfway between two scores; the highest one of several."""
        if not self.num_labeled:
            return LABEL_THRESHOLD
        best = int((self.num_true / (self.num_predicted + self.num_labeled)).argmax())
        following = self.scores[best + 1] if best + 1 < len(self.scores) else 0.0
        return (float(self.scores[best]) + float(following)) / 2

    def precisions(self) -> np.ndarray:
        """The highest precision at recall 0, 0.01 ... 1 or above, (101,); NaN for a class without images."""
        if not self.num_labeled:
            return np.full(101, np.nan)
        envelope = np.maximum.accumulate((self.num_true / self.num_predicted)[::-1])[::-1]
        needed = np.ceil(np.linspace(0, 1, 101) * self.num_labeled - 1e-9)
        return envelope[np.searchsorted(self.num_true, needed)]


@dataclass(frozen=True)
class MultilabelResults:
    """Probabilities of N images and C classes; the `mobilevit.tasks.Results` of multi-label classification.

    `stored_thresholds` are those of the weights. Without them, thresholds are chosen on these images.
    """

    indices: np.ndarray  # (N,) of the images in their data source, ascending
    labels: np.ndarray  # (N, C) bool
    scores: np.ndarray  # (N, C) probabilities
    losses: np.ndarray  # (N,) binary cross-entropy, summed over the classes
    stored_thresholds: tuple[float, ...] = ()
    main_metric = "map"

    @cached_property
    def curves(self) -> list[Curve]:
        """The curve of each class."""
        return [Curve.of(scores, labels) for scores, labels in zip(self.scores.T, self.labels.T, strict=True)]

    @cached_property
    def thresholds(self) -> tuple[float, ...]:
        """The threshold of each class: an image is predicted to have the class if its score is at least that.

        The stored ones, or those with the highest F1 on these images; 0.5 for a class that no image has.
        """
        return self.stored_thresholds or tuple(curve.best_threshold() for curve in self.curves)

    @cached_property
    def predictions(self) -> np.ndarray:
        """Whether each image is predicted to have each class, (N, C) bool."""
        return self.scores >= np.array(self.thresholds)

    def metrics(self) -> dict[str, float]:
        """mAP, micro and macro F1 in percent, mean loss, number of images.

        mAP and macro F1 are means over the classes that at least one image has. The micro F1 counts all pairs of image
        and class together. Both F1 use the thresholds, and are optimistic for images on which these were chosen.
        """
        rows = self.per_class([str(i) for i in range(len(self.curves))])
        true_or_predicted = int(self.labels.sum()) + int(self.predictions.sum())
        num_true = int((self.labels & self.predictions).sum())
        return {
            "map": _mean([row.metrics["ap"] for row in rows]),
            "micro_f1": 200 * num_true / max(1, true_or_predicted),
            "macro_f1": _mean([row.metrics["f1"] for row in rows]),
            "loss": float(self.losses.mean()),
            "num_images": len(self.labels),
        }

    def per_class(self, class_names: Sequence[str]) -> list[ClassMetrics]:
        """Number of images that have the class, AP and F1 in percent, and the threshold (a probability)."""
        counts = (self.labels.sum(0), self.predictions.sum(0), (self.labels & self.predictions).sum(0))
        rows = zip(class_names, self.curves, self.thresholds, *(x.tolist() for x in counts), strict=True)
        return [
            ClassMetrics(
                class_name,
                {
                    "num_images": num_labeled,
                    "ap": None if (ap := curve.average_precision()) is None else 100 * ap,
                    "f1": 200 * num_true / (num_labeled + num_predicted) if num_labeled else None,
                    "threshold": threshold,
                },
            )
            for class_name, curve, threshold, num_labeled, num_predicted, num_true in rows
        ]

    def most_confident_errors(self, num: int) -> list[tuple[int, int]]:
        """(position in the arrays, class) of the `num` wrong decisions that are farthest from the threshold.

        The distance is relative to the largest possible one on its side of the threshold.
        """
        thresholds = np.array(self.thresholds)
        sides = np.where(self.predictions, 1 - thresholds, thresholds)
        distances = np.abs(self.scores - thresholds) / np.maximum(sides, np.finfo(np.float32).tiny)
        rows, columns = np.nonzero(self.predictions != self.labels)
        order = np.argsort(-distances[rows, columns], kind="stable")[:num]
        return list(zip(rows[order].tolist(), columns[order].tolist(), strict=True))


def _mean(values: Sequence[float | None]) -> float:
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else 0.0


def chosen_thresholds(results: Results) -> tuple[float, ...]:
    """The thresholds to store with the weights that have these validation results; empty for other tasks."""
    return results.thresholds if isinstance(results, MultilabelResults) else ()


class MultilabelClassification:
    """The `mobilevit.tasks.Task` of multi-label classification."""

    def datasets(self, recipe: Recipe, data: Data) -> tuple[ImageDataset, ImageDataset]:
        return classifier_sets(recipe, data, stack_class_sets)

    def build(self, recipe: Recipe, train_set: ImageDataset, pretrained: Weights | None) -> Weights:
        return build_classifier("multilabel", recipe, train_set, pretrained)

    def evaluation_set(self, weights: Described, data: Data, preprocessing: Preprocessing, split: str) -> ImageDataset:
        dataset = evaluation_set(weights, data, split, Evaluation(preprocessing), stack_class_sets)
        if not any(label.indices for label in dataset.source.labels):
            raise ValueError(
                f"{data}: none of the {len(dataset):,} images has a label, so no metric is defined; add some"
            )
        return dataset

    def blank_labels(self, batch_size: int, size_px: int) -> Tensor:
        return torch.full((batch_size, 1), NO_CLASS)

    def loss(self, recipe: Recipe, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of the recipe, summed over the classes, mean over the images."""
        pixels, weights = batch.pixels, None
        if recipe.data.policy == "advanced":
            # Row i of the mixed unit matrix has the weights of the original images in mixed image i.
            pixels, weights = mix(pixels, torch.eye(len(pixels), device=pixels.device))
        logits = model(pixels).float()
        targets = multi_hot(batch.labels, logits.shape[1])
        if weights is not None:
            targets = weights @ targets
        targets = (1 - recipe.label_smoothing) * targets + recipe.label_smoothing / 2
        if recipe.multilabel.loss == "bce":
            losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        else:
            losses = asymmetric_losses(logits, targets, recipe.multilabel)
        return losses.sum(1).mean()

    @torch.inference_mode()
    def evaluate(
        self, model: nn.Module, batches: Iterable[Batch], gather: Gather = single_process
    ) -> MultilabelResults:
        rows: list[tuple[Tensor, ...]] = []
        for batch in batches:
            if not batch.indices:  # no image of the batch could be read
                continue
            logits = model(batch.pixels).float()
            targets = multi_hot(batch.labels, logits.shape[1])
            losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)
            rows.append((torch.tensor(batch.indices), targets.bool(), logits.sigmoid(), losses))
        indices, labels, scores, losses = merge_images(rows, gather)
        return MultilabelResults(indices, labels, scores, losses)


def stack_class_sets(labels: Sequence[ClassSet]) -> Tensor:
    """The class indices of each image, (B, max(1, largest number)) int64, filled with `NO_CLASS`."""
    width = max([1, *(len(label.indices) for label in labels)])
    rows = [[*label.indices, *[NO_CLASS] * (width - len(label.indices))] for label in labels]
    return torch.tensor(rows, dtype=torch.long).reshape(len(rows), width)


def multi_hot(indices: Tensor, num_classes: int) -> Tensor:
    """Rows of `stack_class_sets` -> targets (B, num_classes), float 0 or 1."""
    targets = torch.zeros(len(indices), num_classes + 1, device=indices.device)  # the last column is for NO_CLASS
    return targets.scatter_(1, indices % (num_classes + 1), 1.0)[:, :num_classes]


def asymmetric_losses(logits: Tensor, targets: Tensor, options: Multilabel) -> Tensor:
    """The asymmetric loss of each image and class, (B, C), from logits and targets in [0, 1].

    Ridnik et al. 2021 (arXiv 2009.14119), equations 4 to 6. A mixed image has a target between 0 and 1; its loss is the
    weighted sum of both terms.
    """
    probabilities = logits.sigmoid()
    positive = F.logsigmoid(logits)
    if options.gamma_positive:
        positive = (1 - probabilities) ** options.gamma_positive * positive
    negative = F.logsigmoid(-logits)
    if options.margin:
        probabilities = probabilities - options.margin
        negative = (1 - probabilities).clamp(max=1).log()
    if options.gamma_negative:
        # Not 0: the derivative of a power below 1 is infinite there.
        negative = probabilities.clamp(min=1e-8) ** options.gamma_negative * negative
    return -(targets * positive + (1 - targets) * negative)
