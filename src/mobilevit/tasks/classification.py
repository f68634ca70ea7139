"""Classification: one class an image (paper, section 4.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilevit.data.checks import check_images
from mobilevit.data.loader import Batch, ImageDataset
from mobilevit.data.samples import Source
from mobilevit.data.sources import find_evaluation_split, find_splits
from mobilevit.data.transforms import Augmentation, Evaluation, mix
from mobilevit.images import ImageError, Preprocessing, limit_megapixels, read_image
from mobilevit.models.mobilevit import MobileViT
from mobilevit.recipes import Recipe
from mobilevit.report.results import confusion_html, mistakes_html, per_class_html
from mobilevit.weights import Weights

Gather = Callable[[Any], list[Any]]
"""From what one process has to the list of what all have."""

NUM_MISTAKES = 24  # shown in a report


def alone(value: Any) -> list[Any]:
    """A `Gather` where there is one process."""
    return [value]


@dataclass(frozen=True)
class Answers:
    """What a network made of N images; `mobilevit.tasks.Results` for classification."""

    numbers: np.ndarray  # (N,) of the images in their source, ascending
    labels: np.ndarray  # (N,) the right classes
    answers: np.ndarray  # (N, 5 or as many as there are classes) the likeliest classes, best first
    probabilities: np.ndarray  # (N,) of the likeliest
    losses: np.ndarray  # (N,) cross entropy
    num_classes: int
    main_metric = "top1"

    def metrics(self) -> dict[str, float]:
        """Top-1 and top-5 in per cent, the mean loss, the number of images."""
        hits = self.answers == self.labels[:, None]
        return {
            "top1": 100 * int(hits[:, 0].sum()) / len(hits),
            "top5": 100 * int(hits.any(1).sum()) / len(hits),
            "loss": float(self.losses.mean()),
            "num_images": len(self.labels),
        }

    def counts(self) -> np.ndarray:
        """Images by right class (rows) and first answer (columns)."""
        counts = np.zeros((self.num_classes, self.num_classes), np.int64)
        np.add.at(counts, (self.labels, self.answers[:, 0]), 1)
        return counts

    def per_class(self, class_names: Sequence[str]) -> list[dict[str, Any]]:
        """Images of every class, recall and precision in per cent; None where they are undefined."""
        counts = self.counts()
        return [
            {
                "class": class_name,
                "num_images": int(counts[i].sum()),
                "recall": 100 * int(counts[i, i]) / int(counts[i].sum()) if counts[i].sum() else None,
                "precision": 100 * int(counts[i, i]) / int(counts[:, i].sum()) if counts[:, i].sum() else None,
            }
            for i, class_name in enumerate(class_names)
        ]

    def sections(self, source: Source) -> list[tuple[str, str]]:
        """Confusion matrix, classes, and the mistakes that the network was surest of."""
        names = source.class_names
        wrong = np.flatnonzero(self.answers[:, 0] != self.labels)
        worst = wrong[np.argsort(-self.probabilities[wrong], kind="stable")][:NUM_MISTAKES]
        mistakes = []
        for i in worst:
            sample = source[int(self.numbers[i])]
            try:
                image = read_image(sample.image, sample.name)
            except ImageError:  # gone since it was evaluated: the report has one mistake less
                continue
            answer = names[self.answers[i, 0]]
            mistakes.append((image, names[self.labels[i]], answer, float(self.probabilities[i]), sample.name))
        counts = self.counts()
        return [
            ("Confusion", confusion_html(counts, names)),
            ("Classes", per_class_html(counts, names)),
            ("Surest mistakes", mistakes_html(mistakes) if mistakes else "<p>None: every image was right.</p>"),
        ]


class Classification:
    """See `mobilevit.tasks.Task` for what the methods do."""

    def datasets(self, recipe: Recipe, data: str | Path) -> tuple[ImageDataset, ImageDataset]:
        limit_megapixels(recipe.data.max_megapixels)
        train, val = find_splits("classify", data, recipe.data.val_fraction)
        scan = check_images(train, val, max_unreadable=recipe.data.max_unreadable)
        augmentation = Augmentation(recipe.data.min_scale, recipe.data.flip, recipe.seed, recipe.data.policy)
        notes = (*train.notes, *scan.notes())
        return (
            ImageDataset(train, augmentation, notes=notes, num_transparent=scan.num_transparent),
            ImageDataset(val, Evaluation(preprocessing_of(recipe)), notes=val.notes),
        )

    def build(self, recipe: Recipe, train_set: ImageDataset, pretrained: Weights | None) -> Weights:
        class_names = train_set.source.class_names
        preprocessing = preprocessing_of(recipe)
        if pretrained is None:
            model = MobileViT(recipe.architecture, num_classes=len(class_names))
        else:
            model = pretrained.build()
            if pretrained.class_names != class_names:
                model.reset_classifier(len(class_names))
            # Their first convolution has learnt what its input is scaled to.
            preprocessing = replace(preprocessing, mean=pretrained.preprocessing.mean, std=pretrained.preprocessing.std)
        return Weights(
            architecture=model.architecture,
            tensors=model.state_dict(),
            preprocessing=preprocessing,
            class_names=class_names,
            output_stride=model.backbone.output_stride,
        )

    def evaluation_set(
        self, weights: Weights, data: str | Path, preprocessing: Preprocessing, split: str
    ) -> ImageDataset:
        if not weights.class_names:
            raise ValueError("these weights have no class names, which are required to match the classes of the data")
        source = find_evaluation_split("classify", data, weights.class_names, split, weights.val_fraction)
        return ImageDataset(source, Evaluation(preprocessing), notes=source.notes)

    def blank_labels(self, batch_size: int, size_px: int) -> Tensor:
        return torch.zeros(batch_size, dtype=torch.long)

    def loss(self, recipe: Recipe, model: nn.Module, batch: Batch) -> Tensor:
        if recipe.data.policy == "basic":
            return F.cross_entropy(model(batch.pixels), batch.labels, label_smoothing=recipe.label_smoothing)
        # Rows: how much of which image of the batch is in each mixed one. How many classes there are, logits say.
        random = np.random.default_rng(int(torch.randint(2**62, ())))
        pixels, shares = mix(batch.pixels, torch.eye(len(batch.labels), device=batch.labels.device), random)
        logits = model(pixels)
        targets = shares @ F.one_hot(batch.labels, logits.shape[1]).float()
        return F.cross_entropy(logits, targets, label_smoothing=recipe.label_smoothing)

    @torch.inference_mode()
    def evaluate(self, model: nn.Module, batches: Iterable[Batch], gather: Gather = alone) -> Answers:
        columns: list[list[Tensor]] = [[], [], [], [], []]
        num_classes = 0
        for batch in batches:
            if not batch.indices:  # none of it could be read
                continue
            logits = model(batch.pixels).float()
            num_classes = logits.shape[1]
            likeliest = logits.softmax(1).topk(min(5, num_classes))
            losses = F.cross_entropy(logits, batch.labels, reduction="none")
            numbers = torch.tensor(batch.indices)
            found = (numbers, batch.labels, likeliest.indices, likeliest.values[:, 0], losses)
            for column, values in zip(columns, found, strict=True):
                column.append(values)
        mine = [torch.cat(column).cpu().numpy() for column in columns] if columns[0] else None
        everything = [one for one in gather((mine, num_classes)) if one[0] is not None]
        if not everything:
            raise ImageError("none of the images to evaluate on can be read")
        merged = [np.concatenate(arrays) for arrays in zip(*(one[0] for one in everything), strict=True)]
        order = np.argsort(merged[0])  # the same sums in the same order, however many processes there were
        return Answers(*(array[order] for array in merged), num_classes=everything[0][1])


def preprocessing_of(recipe: Recipe) -> Preprocessing:
    """How a network that is trained by `recipe` from random weights gets to see an image in evaluation."""
    size_px = recipe.data.size_px
    return Preprocessing(resize_px=round(recipe.data.eval_resize * size_px), crop_px=size_px)
