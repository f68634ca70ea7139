"""Imbalanced classes in classification: class weights and logit adjustment in the loss, and advice before training.

Class weights multiply the loss of an image. Logit adjustment adds the logarithms of the class frequencies to the logits
of the training loss (Menon et al. 2021, arXiv 2007.07314). The network then learns the logits for equally frequent
classes. The third option, the balanced sampler, is `mobilevit.data.sampler.balanced_order`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mobilevit.recipes import Imbalance, Recipe

MAX_RATIO = 10  # of the largest to the smallest class; a warning suggests the options above it


def count_classes(labels: Sequence[int], num_classes: int) -> np.ndarray:
    """Number of images of every class, (num_classes,) int64."""
    return np.bincount(labels, minlength=num_classes)


def advice(counts: np.ndarray, class_names: Sequence[str]) -> str | None:
    """A warning if the largest class has more than ten times the images of the smallest one, else None.

    `counts` are the images of every class, (C,), all above 0.
    """
    largest, smallest = int(counts.argmax()), int(counts.argmin())
    if counts[largest] <= MAX_RATIO * counts[smallest]:
        return None
    return (
        f"the classes are imbalanced ({counts[largest] / counts[smallest]:,.0f}:1): {class_names[largest]} has "
        f"{counts[largest]:,} training images, {class_names[smallest]} has {counts[smallest]:,}; if rare classes "
        "matter as much as frequent ones, use --imbalance.balanced-sampler and --metric balanced_accuracy "
        "(docs/training.md)"
    )


def check(recipe: Recipe, *, has_teacher: bool) -> None:
    """Check that the imbalance options have an effect and do not contradict others.

    Raises:
        ValueError: a task without single labels, or an option that contradicts the targets of a teacher.
    """
    for name, value in vars(recipe.imbalance).items():
        if value and recipe.task != "classify":
            raise ValueError(
                f"imbalance.{name} is {value}, but the task is {recipe.task}; the imbalance options apply to "
                "classification with one class per image only"
            )
        if value and name != "balanced_sampler" and has_teacher and recipe.distill.soft_weight:
            raise ValueError(
                f"imbalance.{name} is {value}, but distill.soft_weight is {recipe.distill.soft_weight}: the class "
                "probabilities of the teacher contain the class frequencies that the option removes; use "
                "imbalance.balanced_sampler, or set distill.soft_weight to 0"
            )


@dataclass(frozen=True)
class LossCorrection:
    """Class weights and additions to the logits, both (C,) float32 on the device of the network.

    The weights have the mean 1 over the training images. They are constants: the loss of an image does not depend on
    the other images of its batch, and neither does the result on the division into micro-batches.
    """

    class_weights: Tensor
    log_priors: Tensor

    @classmethod
    def from_counts(cls, options: Imbalance, counts: np.ndarray, device: torch.device) -> LossCorrection:
        """The correction for classes with `counts` training images each, (C,), all above 0."""
        weights = counts ** -float(options.class_weights)
        weights *= counts.sum() / (weights * counts).sum()
        log_priors = options.logit_adjustment * np.log(counts / counts.sum())
        tensors = (torch.tensor(values, dtype=torch.float32, device=device) for values in (weights, log_priors))
        return cls(*tensors)

    def cross_entropy(self, logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
        """Mean loss of logits (B, C) for class indices (B,) or class probabilities (B, C).

        The weight of an image with a mixed target is that of a mixture of two losses, each with its class weight.
        """
        logits = logits + self.log_priors
        if targets.ndim == 1:
            weights = self.class_weights[targets]
        else:
            targets = targets * self.class_weights
            weights = targets.sum(1)
            targets = targets / weights[:, None]
        losses = F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="none")
        return (weights * losses).mean()
