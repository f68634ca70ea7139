"""Distillation without labels: the student learns the teacher's classes from any images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilevit.data.checks import check_images
from mobilevit.data.loader import Batch, ImageDataset
from mobilevit.data.python_data import Data, PythonData
from mobilevit.data.transforms import Augmentation, Evaluation, mix
from mobilevit.data.unlabeled import cached_short_side, decode_once, find_unlabeled, repeat
from mobilevit.images import Preprocessing, limit_megapixels
from mobilevit.recipes import Recipe
from mobilevit.tasks.classification import Classification, preprocessing_of
from mobilevit.tasks.task import ClassMetrics, Described, Gather, merge_images, single_process
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

    def disagreements(self, num: int) -> list[int]:
        """Positions in the arrays of the `num` most confident predictions of another class than the teacher's."""
        return self._most_confident(self.predictions[:, 0] != self.teacher, num)

    def agreements(self, num: int) -> list[int]:
        """Positions in the arrays of the `num` most confident predictions of the teacher's class."""
        return self._most_confident(self.predictions[:, 0] == self.teacher, num)

    def _most_confident(self, mask: np.ndarray, num: int) -> list[int]:
        chosen = np.flatnonzero(mask)
        return chosen[np.argsort(-self.probabilities[chosen], kind="stable")][:num].tolist()

    def per_class(self, class_names: Sequence[str]) -> list[ClassMetrics]:
        """Number of images and agreement of each class that the teacher predicts at least once."""
        agrees = self.predictions[:, 0] == self.teacher
        metrics: list[ClassMetrics] = []
        for i in map(int, np.unique(self.teacher)):
            of_class = agrees[self.teacher == i]
            values = {"num_images": len(of_class), "agreement": 100 * float(of_class.mean())}
            metrics.append(ClassMetrics(class_names[i], values))
        return metrics


class Distillation:
    """The `mobilevit.tasks.Task` of distillation without labels, from one teacher."""

    def __init__(self, teacher: Teacher):
        self.teacher = teacher
        # Log-probabilities of the teacher (num_classes,) by index of the validation image: they never change, and both
        # the raw and the EMA weights are compared with them after every epoch.
        self._targets: dict[int, Tensor] = {}

    def datasets(self, recipe: Recipe, data: Data) -> tuple[ImageDataset, ImageDataset]:
        assert not isinstance(data, PythonData)  # checked before
        options, sampler = recipe.data, recipe.sampler
        limit_megapixels(options.max_megapixels)
        train, val = find_unlabeled(data, options.val_fraction, self.teacher.class_names)
        scan = check_images(train, val, max_unreadable=options.max_unreadable)
        sizes_px = (options.size_px,) if sampler.variant == "standard" else sampler.sizes_px
        short_px = cached_short_side(max(*sizes_px, recipe.distill.size_px), options.min_scale)
        decoded = decode_once(train, min_px=short_px, max_bytes=1e6 * options.cache_mb)
        augmentation = Augmentation(
            options.min_scale, options.flip, recipe.seed, options.policy, min_size_px=recipe.distill.size_px
        )
        preprocessing = preprocessing_of(recipe)
        larger = preprocessing.at_size(max(preprocessing.crop_px, recipe.distill.size_px))
        return (
            ImageDataset(
                repeat(decoded, options.crops_per_image),
                augmentation,
                notes=(*train.notes, *scan.notes()),
                num_transparent=scan.num_transparent,
            ),
            ImageDataset(val, Evaluation(larger)),
        )

    def build(self, recipe: Recipe, train_set: ImageDataset, pretrained: Weights | None) -> Weights:
        return Classification().build(recipe, train_set, pretrained)

    def evaluation_set(self, weights: Described, data: Data, preprocessing: Preprocessing, split: str) -> ImageDataset:
        raise AssertionError("the trained weights are those of a classifier")

    def blank_labels(self, batch_size: int, size_px: int) -> Tensor:
        return torch.zeros(batch_size, dtype=torch.long)

    def loss(self, recipe: Recipe, model: nn.Module, batch: Batch) -> Tensor:
        """0: without labels, the whole loss is that of `mobilevit.training.distillation`."""
        pixels = batch.pixels
        if recipe.data.policy == "advanced":
            pixels, _ = mix(pixels, torch.eye(len(pixels), device=pixels.device))
        return model(pixels).new_zeros(())

    @torch.inference_mode()
    def evaluate(
        self, model: nn.Module, batches: Iterable[Batch], gather: Gather = single_process
    ) -> DistillationResults:
        rows: list[tuple[Tensor, ...]] = []
        for batch in batches:
            if not batch.indices:  # no image of the batch could be read
                continue
            student = model(student_view(batch.pixels, batch.size_px)).float().log_softmax(1)
            teacher = self._teacher_of(batch)
            top = student.topk(min(5, student.shape[1]))
            divergences = F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
            indices = torch.tensor(batch.indices)
            rows.append((indices, top.indices, top.values[:, 0].exp(), teacher.argmax(1), divergences))
        return DistillationResults(*merge_images(rows, gather))

    def _teacher_of(self, batch: Batch) -> Tensor:
        """Log-probabilities of the teacher (B, num_classes) for a batch of validation images."""
        if not all(index in self._targets for index in batch.indices):
            outputs = self.teacher(batch.pixels)[0].float().log_softmax(1).cpu()
            self._targets.update(zip(batch.indices, outputs, strict=True))
        return torch.stack([self._targets[index] for index in batch.indices]).to(batch.pixels.device)


def student_view(pixels: Tensor, size_px: int) -> Tensor:
    """Images that are loaded at the larger input size of the teacher, at that of the student."""
    if not size_px or pixels.shape[-1] == size_px:
        return pixels
    return F.interpolate(pixels, (size_px, size_px), mode="bilinear", antialias=True)
