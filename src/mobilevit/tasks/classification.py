"""Classification: one class per image (paper, section 4.1)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilevit.data.loader import Batch, ImageDataset, stack_indices
from mobilevit.data.python_data import Data
from mobilevit.data.transforms import Augmentation, Evaluation, mix
from mobilevit.images import Preprocessing
from mobilevit.models.mobilevit import MobileViT
from mobilevit.recipes import Recipe
from mobilevit.tasks.confidence import TEMPERATURES, LogitSummary, Reliability, fit_temperature, reliability
from mobilevit.tasks.datasets import Stack, evaluation_set, normalized_as, training_sets
from mobilevit.tasks.imbalance import LossCorrection
from mobilevit.tasks.task import ClassMetrics, Described, Gather, merge_images, single_process
from mobilevit.weights import UNCALIBRATED, Calibration, TaskName, Weights


@dataclass(frozen=True)
class ClassificationResults:
    """Predictions for N images; the `mobilevit.tasks.Results` of classification."""

    indices: np.ndarray  # (N,) of the images in their data source, ascending
    labels: np.ndarray  # (N,)
    predictions: np.ndarray  # (N, min(5, num_classes)) most probable classes, best first
    probabilities: np.ndarray  # (N,) of the most probable class
    losses: np.ndarray  # (N,) cross-entropy
    num_classes: int
    logits: LogitSummary | None = None  # of classifiers
    calibration: Calibration = UNCALIBRATED  # that of the weights; the fields above do not depend on it
    main_metric = "top1"

    def metrics(self) -> dict[str, float]:
        """Top-1, top-5 and balanced accuracy, and macro F1, in percent; mean loss; ECE in percent; number of images.

        The balanced accuracy is the mean recall of the classes that have images. The macro F1 is the mean F1 of the
        classes that have images or are predicted. The loss is that of the logits without the temperature. With a
        temperature, "ece" is that of the calibrated probabilities, and "ece_uncalibrated" that without it. With a
        rejection threshold, "coverage" is the percentage of accepted images and "accepted_top1" their accuracy.
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
            **self._trust(),
            "num_images": len(self.labels),
        }

    def _trust(self) -> dict[str, float]:
        """The metrics that depend on probabilities."""
        temperature = self.calibration.temperature
        probabilities = self.probabilities_at(temperature)
        metrics = {"ece": self.reliability_of(probabilities).error}
        if temperature != 1:
            metrics["ece_uncalibrated"] = self.reliability_of(self.probabilities).error
        if self.calibration.min_probability:
            accepted = probabilities >= self.calibration.min_probability
            metrics["coverage"] = 100 * float(accepted.mean())
            if accepted.any():
                metrics["accepted_top1"] = 100 * float(self.is_correct[accepted].mean())
        return metrics

    @property
    def is_correct(self) -> np.ndarray:
        """Whether the most probable class is the label, (N,) bool."""
        return self.predictions[:, 0] == self.labels

    def probabilities_at(self, temperature: float) -> np.ndarray:
        """The probability of the most probable class at a temperature, (N,)."""
        return self.probabilities if temperature == 1 else self.require_logits().probabilities_at(temperature)

    def require_logits(self) -> LogitSummary:
        """`logits`. Raises ValueError if there are none."""
        if self.logits is None:
            raise ValueError("these results are not those of a network with a classifier, so they have no logits")
        return self.logits

    def cross_fitted(self) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities and losses (N,) of each image at a temperature that was fitted without it.

        The temperature of the images at even positions is fitted on those at odd positions, and vice versa. Each half
        has images of all classes, also if the data are sorted by class.

        Raises:
            CalibrationError: a half does not determine the temperature.
        """
        losses = self.require_logits().losses()
        probabilities, losses_after = np.empty(len(losses)), np.empty(len(losses))
        for half, other in ((0, 1), (1, 0)):
            temperature = fit_temperature(losses[other::2])
            probabilities[half::2] = self.probabilities_at(temperature)[half::2]
            losses_after[half::2] = losses[half::2, TEMPERATURES.tolist().index(temperature)]
        return probabilities, losses_after

    def reliability_of(self, probabilities: np.ndarray) -> Reliability:
        """The reliability diagram and the ECE of `probabilities` (N,) of the most probable class."""
        return reliability(probabilities, self.is_correct)

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

    def datasets(self, recipe: Recipe, data: Data) -> tuple[ImageDataset, ImageDataset]:
        return classifier_sets(recipe, data, stack_indices)

    def build(self, recipe: Recipe, train_set: ImageDataset, pretrained: Weights | None) -> Weights:
        return build_classifier("classify", recipe, train_set, pretrained)

    def evaluation_set(self, weights: Described, data: Data, preprocessing: Preprocessing, split: str) -> ImageDataset:
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
            label_logits = logits.gather(1, batch.labels[:, None])[:, 0]
            log_partitions = torch.stack([(logits / t).logsumexp(1) for t in TEMPERATURES.tolist()], dim=1)
            indices = torch.tensor(batch.indices)
            row = indices, batch.labels, top.indices, top.values[:, 0], losses
            rows.append((*row, num_classes, logits.amax(1), label_logits, log_partitions))
        *columns, num_classes, top_logit, label_logit, partitions = merge_images(rows, gather)
        summary = LogitSummary(top_logit, label_logit, partitions)
        return ClassificationResults(*columns, num_classes=int(num_classes[0]), logits=summary)


def classifier_sets(recipe: Recipe, data: Data, stack: Stack) -> tuple[ImageDataset, ImageDataset]:
    """Training and validation sets of a classifier; `stack` makes a batch of the labels."""
    options = recipe.data
    augmentation = Augmentation(
        options.min_scale, options.flip, recipe.seed, options.policy, min_size_px=recipe.distill.size_px
    )
    evaluation = Evaluation(preprocessing_of(recipe))
    return training_sets(recipe, data, (augmentation, stack), (evaluation, stack))


def build_classifier(task: TaskName, recipe: Recipe, train_set: ImageDataset, pretrained: Weights | None) -> Weights:
    """Initial weights; a pretrained classifier is used if it is for the same task and the same classes."""
    class_names = train_set.source.class_names
    if pretrained is None:
        model = MobileViT(recipe.architecture, num_classes=len(class_names))
    else:
        model = pretrained.build()
        if (pretrained.task, pretrained.class_names) != (task, class_names):
            model.reset_classifier(len(class_names))
    return Weights(
        architecture=model.architecture,
        tensors=model.state_dict(),
        preprocessing=normalized_as(pretrained, preprocessing_of(recipe)),
        class_names=class_names,
        output_stride=model.backbone.output_stride,
        task=task,
    )


def preprocessing_of(recipe: Recipe) -> Preprocessing:
    """Preprocessing for evaluation of a model that is trained by `recipe` from random weights."""
    size_px = recipe.data.size_px
    return Preprocessing(resize_px=round(recipe.data.eval_resize * size_px), crop_px=size_px)
