"""Classification: one class per image (paper, section 4.1)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilevit.data.loader import Batch, ImageDataset, stack_indices
from mobilevit.data.transforms import Augmentation, Evaluation, mix
from mobilevit.images import Preprocessing
from mobilevit.models.mobilevit import MobileViT
from mobilevit.recipes import Recipe
from mobilevit.tasks.datasets import evaluation_set, normalized_as, training_sets
from mobilevit.tasks.imbalance import LossCorrection
from mobilevit.tasks.task import ClassMetrics, Gather, merge_images, single_process
from mobilevit.weights import Weights


@dataclass(frozen=True)
class ClassificationResults:
    """Predictions for N images; the `mobilevit.tasks.Results` of classification."""

    indices: np.ndarray  # (N,) of the images in their data source, ascending
    labels: np.ndarray  # (N,)
    predictions: np.ndarray  # (N, min(5, num_classes)) most probable classes, best first
    probabilities: np.ndarray  # (N,) of the most probable class
    losses: np.ndarray  # (N,) cross-entropy
    num_classes: int
    main_metric = "top1"

    def metrics(self) -> dict[str, float]:
        """Top-1, top-5 and balanced accuracy, and macro F1, in percent; mean loss; number of images.

        The balanced accuracy is the mean recall of the classes that have images. The macro F1 is the mean F1 of the
        classes that have images or are predicted.
        """
        is_correct = self.predictions == self.labels[:, None]
        matrix = self.confusion_matrix()
        correct, num_true, num_predicted = np.diag(matrix), matrix.sum(1), matrix.sum(0)
        has_images, occurs = num_true > 0, num_true + num_predicted > 0
        return {
            "top1": 100 * int(is_correct[:, 0].sum()) / len(is_correct),
            "top5": 100 * int(is_correct.any(1).sum()) / len(is_correct),
            "balanced_accuracy": 100 * float((correct[has_images] / num_true[has_images]).mean()),
            "macro_f1": 100 * float((2 * correct[occurs] / (num_true + num_predicted)[occurs]).mean()),
            "loss": float(self.losses.mean()),
            "num_images": len(self.labels),
        }

    def confusion_matrix(self) -> np.ndarray:
        """Number of images by true class (rows) and predicted class (columns), (C, C) int64."""
        matrix = np.zeros((self.num_classes, self.num_classes), np.int64)
        np.add.at(matrix, (self.labels, self.predictions[:, 0]), 1)
        return matrix

    def per_class(self, class_names: Sequence[str]) -> list[ClassMetrics]:
        """Number of images, recall and precision of every class."""
        matrix = self.confusion_matrix()
        correct, num_true, num_predicted = (x.tolist() for x in (np.diag(matrix), matrix.sum(1), matrix.sum(0)))
        return [
            ClassMetrics(
                class_name,
                {
                    "num_images": num_true[i],
                    "recall": 100 * correct[i] / num_true[i] if num_true[i] else None,
                    "precision": 100 * correct[i] / num_predicted[i] if num_predicted[i] else None,
                },
            )
            for i, class_name in enumerate(class_names)
        ]

    def most_confident_errors(self, num: int) -> list[int]:
        """Positions in the arrays of the `num` wrong predictions with the highest probability, highest first."""
        wrong = np.flatnonzero(self.predictions[:, 0] != self.labels)
        return wrong[np.argsort(-self.probabilities[wrong], kind="stable")][:num].tolist()


@dataclass(frozen=True)
class Classification:
    """The `mobilevit.tasks.Task` of classification, with a correction of the training loss for imbalanced classes."""

    correction: LossCorrection | None = None

    def datasets(self, recipe: Recipe, data: str | Path) -> tuple[ImageDataset, ImageDataset]:
        options = recipe.data
        augmentation = Augmentation(
            options.min_scale, options.flip, recipe.seed, options.policy, min_size_px=recipe.distill.size_px
        )
        evaluation = Evaluation(preprocessing_of(recipe))
        return training_sets(recipe, data, (augmentation, stack_indices), (evaluation, stack_indices))

    def build(self, recipe: Recipe, train_set: ImageDataset, pretrained: Weights | None) -> Weights:
        class_names = train_set.source.class_names
        if pretrained is None:
            model = MobileViT(recipe.architecture, num_classes=len(class_names))
        else:
            model = pretrained.build()
            if pretrained.class_names != class_names:
                model.reset_classifier(len(class_names))
        return Weights(
            architecture=model.architecture,
            tensors=model.state_dict(),
            preprocessing=normalized_as(pretrained, preprocessing_of(recipe)),
            class_names=class_names,
            output_stride=model.backbone.output_stride,
        )

    def evaluation_set(
        self, weights: Weights, data: str | Path, preprocessing: Preprocessing, split: str
    ) -> ImageDataset:
        return evaluation_set(weights, data, split, Evaluation(preprocessing), stack_indices)

    def blank_labels(self, batch_size: int, size_px: int) -> Tensor:
        return torch.zeros(batch_size, dtype=torch.long)

    def loss(self, recipe: Recipe, model: nn.Module, batch: Batch) -> Tensor:
        cross_entropy = self.correction.cross_entropy if self.correction else F.cross_entropy
        if recipe.data.policy == "basic":
            return cross_entropy(model(batch.pixels), batch.labels, label_smoothing=recipe.label_smoothing)
        # Mix one-hot rows of image indices: row i has the weights of the original images in mixed image i.
        pixels, weights = mix(batch.pixels, torch.eye(len(batch.labels), device=batch.labels.device))
        logits = model(pixels)
        targets = weights @ F.one_hot(batch.labels, logits.shape[1]).float()
        return cross_entropy(logits, targets, label_smoothing=recipe.label_smoothing)

    @torch.inference_mode()
    def evaluate(
        self, model: nn.Module, batches: Iterable[Batch], gather: Gather = single_process
    ) -> ClassificationResults:
        rows: list[tuple[Tensor, ...]] = []
        for batch in batches:
            if not batch.indices:  # no image of the batch could be read
                continue
            logits = model(batch.pixels).float()
            num_classes = torch.full_like(batch.labels, logits.shape[1])
            top = logits.softmax(1).topk(min(5, logits.shape[1]))
            losses = F.cross_entropy(logits, batch.labels, reduction="none")
            rows.append((torch.tensor(batch.indices), batch.labels, top.indices, top.values[:, 0], losses, num_classes))
        *columns, num_classes = merge_images(rows, gather)
        return ClassificationResults(*columns, num_classes=int(num_classes[0]))


def preprocessing_of(recipe: Recipe) -> Preprocessing:
    """Preprocessing for evaluation of a model that is trained by `recipe` from random weights."""
    size_px = recipe.data.size_px
    return Preprocessing(resize_px=round(recipe.data.eval_resize * size_px), crop_px=size_px)
