"""Classification: one class a picture."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from mobilevit.data.sampler import Pick
from mobilevit.data.sources import Source, find_splits
from mobilevit.data.transforms import random_flip, random_resized_crop
from mobilevit.models.mobilevit import MobileViT
from mobilevit.models.weights import Weights
from mobilevit.pictures import PictureError, Preprocessing
from mobilevit.recipes import Recipe


class Batch(NamedTuple):
    """Pictures as uint8 (B, 3, H, W), to be scaled where the network runs, and their labels (B,)."""

    pixels: Tensor
    labels: Tensor


class PictureDataset(Dataset):
    """Pictures of a source as uint8 (3, size, size), augmented for training or preprocessed for evaluation.

    An item is asked for by a `Pick`. A picture that cannot be read is handed on as its PictureError, so that the loop
    can say which one it was, from whichever process it was read in.
    """

    def __init__(self, source: Source, recipe: Recipe, *, augment: bool):
        self.source = source
        self.recipe = recipe
        self.augment = augment
        self.class_names = source.class_names

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, pick: Pick) -> tuple[Tensor, int] | PictureError:
        try:
            sample = self.source[pick.number]
        except PictureError as error:
            return error
        data = self.recipe.data
        if self.augment:
            random = np.random.default_rng((self.recipe.seed, pick.epoch, pick.number))
            image = random_resized_crop(sample.picture, pick.size_px, data.min_scale, random)
            image = random_flip(image, random) if data.flip else image
        else:
            image = preprocessing(self.recipe).resize_and_crop(sample.picture)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), sample.label


def collate(items: list[tuple[Tensor, int] | PictureError]) -> Batch | PictureError:
    """A batch, or the first error in it."""
    for item in items:
        if isinstance(item, PictureError):
            return item
    pixels, labels = zip(*items, strict=True)  # pyright: ignore[reportArgumentType]  the errors are gone
    return Batch(torch.stack(pixels), torch.tensor(labels))


def preprocessing(recipe: Recipe) -> Preprocessing:
    """What the trained network will expect of its input."""
    return Preprocessing(resize_px=recipe.data.resize_px, crop_px=recipe.data.size_px)


class Classification:
    """The task of the paper's section 4.1."""

    # What the methods do is said in `mobilevit.tasks.Task`.

    def datasets(self, recipe: Recipe, data: Path) -> tuple[PictureDataset, PictureDataset]:
        train, val = find_splits(data, recipe.data.val_fraction)
        return PictureDataset(train, recipe, augment=True), PictureDataset(val, recipe, augment=False)

    def build(self, recipe: Recipe, train: PictureDataset, pretrained: Weights | None) -> Weights:
        num_classes = len(train.class_names)
        if pretrained is None:
            model = MobileViT(recipe.architecture, num_classes=num_classes)
        else:
            model = pretrained.build()
            if pretrained.class_names != train.class_names:
                model.reset_classifier(num_classes)
        return Weights(
            architecture=model.architecture,
            tensors=model.state_dict(),
            preprocessing=preprocessing(recipe),
            class_names=train.class_names,
        )

    def loss(self, recipe: Recipe, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(scale(batch.pixels))
        return F.cross_entropy(logits, batch.labels, label_smoothing=recipe.label_smoothing)

    @torch.inference_mode()
    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        right_1 = right_5 = num_pictures = 0
        loss = 0.0
        for batch in batches:
            logits = model(scale(batch.pixels)).float()
            loss += F.cross_entropy(logits, batch.labels, reduction="sum").item()
            hits = logits.topk(min(5, logits.shape[1])).indices == batch.labels[:, None]
            right_1 += int(hits[:, 0].sum())
            right_5 += int(hits.sum())
            num_pictures += len(batch.labels)
        return {
            "top1": 100 * right_1 / num_pictures,
            "top5": 100 * right_5 / num_pictures,
            "loss": loss / num_pictures,
            "num_pictures": num_pictures,
        }


def scale(pixels: Tensor) -> Tensor:
    """uint8 pixels -> float32 in [0, 1], on the device where they are."""
    return pixels.float() / 255
