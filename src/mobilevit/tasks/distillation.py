"""Distillation without labels: the student learns the teacher's classes from any images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilevit.data.checks import check_images
from mobilevit.data.loader import Batch, ImageDataset
from mobilevit.data.transforms import Augmentation, Evaluation
from mobilevit.data.unlabeled import cached_short_side, decode_once, find_unlabeled, repeat
from mobilevit.images import ImageError, Preprocessing, limit_megapixels
from mobilevit.models.mobilevit import MobileViT
from mobilevit.recipes import Recipe
from mobilevit.tasks.classification import preprocessing_of
from mobilevit.tasks.task import ClassMetrics, Gather, single_process
from mobilevit.teacher import Teacher
from mobilevit.weights import Weights


@dataclass(frozen=True)
class DistillationResults:
    """Outputs of student and teacher for N images; the `mobilevit.tasks.Results` of distillation without labels."""

    indices: np.ndarray  # (N,) of the images in their data source, ascending
    predictions: np.ndarray  # (N, min(5, num_classes)) most probable classes of the student, best first
    probabilities: np.ndarray  # (N,) the student's, of its most probable class
    teacher: np.ndarray  # (N,) most probable class of the teacher
    divergences: np.ndarray  # (N,) KL divergence of the student's distribution from the teacher's, in nats
    main_metric = "agreement"

    def metrics(self) -> dict[str, float]:
        """Agreement with the teacher in per cent, mean KL divergence, number of images.

        "agreement" counts images with the same most probable class, "agreement5" those where the teacher's most
        probable class is among the student's five.
        """
        agrees = self.predictions == self.teacher[:, None]
        return {
            "agreement": 100 * int(agrees[:, 0].sum()) / len(agrees),
            "agreement5": 100 * int(agrees.any(1).sum()) / len(agrees),
            "kl": float(self.divergences.mean()),
            "num_images": len(agrees),
        }

    def per_class(self, class_names: Sequence[str]) -> list[ClassMetrics]:
        """Number of images and agreement of each class that the teacher predicts at least once."""
        agrees = self.predictions[:, 0] == self.teacher
        return [
            ClassMetrics(
                class_names[i],
                {"num_images": int((self.teacher == i).sum()), "agreement": 100 * float(agrees[self.teacher == i].mean())},
            )
            for i in np.unique(self.teacher).tolist()
        ]


class Distillation:
    """The `mobilevit.tasks.Task` of distillation without labels, from one teacher."""

    def __init__(self, teacher: Teacher):
        self.teacher = teacher

    def datasets(self, recipe: Recipe, data: str | Path) -> tuple[ImageDataset, ImageDataset]:
        options = recipe.data
        limit_megapixels(options.max_megapixels)
        train, val = find_unlabeled(data, options.val_fraction)
        scan = check_images(train, val, max_unreadable=options.max_unreadable)
        size_px = max(options.size_px, *recipe.sampler.sizes_px) if recipe.sampler.variant != "standard" else options.size_px
        min_px = cached_short_side(max(size_px, recipe.distill.size_px), options.min_scale)
        decoded = decode_once(train, min_px=min_px, max_bytes=1e6 * options.cache_mb)
        augmentation = Augmentation(options.min_scale, options.flip, recipe.seed, options.policy)
        notes = (*train.notes, *scan.notes())
        return (
            ImageDataset(
                repeat(decoded, options.crops_per_image),
                augmentation,
                notes=notes,
                num_transparent=scan.num_transparent,
            ),
            ImageDataset(val, Evaluation(preprocessing_of(recipe))),
        )

    def build(self, recipe: Recipe, train_set: ImageDataset, pretrained: Weights | None) -> Weights:
        ...
