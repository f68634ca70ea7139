"""Classification: one class a picture (paper, section 4.1)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilevit.data.loader import Batch, PictureDataset, load
from mobilevit.data.sampler import eval_batches
from mobilevit.data.sources import check_headers, find_evaluation, find_splits
from mobilevit.data.transforms import Augmentation, Evaluation
from mobilevit.models.mobilevit import MobileViT
from mobilevit.models.weights import Weights
from mobilevit.pictures import Preprocessing
from mobilevit.recipes import Recipe


class Classification:
    """See `mobilevit.tasks.Task` for what the methods do."""

    def datasets(self, recipe: Recipe, data: Path) -> tuple[PictureDataset, PictureDataset]:
        train, val = find_splits(data, recipe.data.val_fraction)
        check_headers(train, val)
        augmentation = Augmentation(recipe.data.min_scale, recipe.data.flip, recipe.seed)
        return PictureDataset(train, augmentation), PictureDataset(val, Evaluation(_preprocessing(recipe)))

    def build(self, recipe: Recipe, train_set: PictureDataset, pretrained: Weights | None) -> Weights:
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
            preprocessing=_preprocessing(recipe),
            class_names=class_names,
            output_stride=model.backbone.output_stride,
        )

    def loss(self, recipe: Recipe, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(_scale(batch.pixels)), batch.labels, label_smoothing=recipe.label_smoothing)

    @torch.inference_mode()
    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        right_1 = right_5 = num_pictures = 0
        loss = 0.0
        for batch in batches:
            logits = model(_scale(batch.pixels)).float()
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


def evaluate_weights(
    weights: Weights, data: Path, *, batch_size: int = 32, num_workers: int = 0, device: str = "cpu"
) -> dict[str, float]:
    """Top-1 and top-5 in per cent and the mean loss of `weights` on `val/` or `test/` of `data`, or on all of it.

    Raises:
        ValueError: weights without class names, a folder that is none of them, a picture that cannot be read.
    """
    if not weights.class_names:
        raise ValueError("these weights name no classes, so nothing says which folder is which of their outputs")
    if batch_size < 1:
        raise ValueError(f"batch size is {batch_size}; it must be 1 or more")
    source = find_evaluation(data, weights.class_names)
    dataset = PictureDataset(source, Evaluation(weights.preprocessing))
    batches = eval_batches(len(source), batch_size=batch_size, size_px=weights.preprocessing.crop_px)
    model = weights.build().to(device)
    # The task hands the network pixels in [0, 1], as ours want them; weights from elsewhere may want them normalised.
    p = weights.preprocessing
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (p.mean, p.std))
    model.register_forward_pre_hook(lambda _, inputs: ((inputs[0] - mean) / std,))
    return Classification().evaluate(model, load(dataset, batches, num_workers=num_workers, device=device))


def _preprocessing(recipe: Recipe) -> Preprocessing:
    size_px = recipe.data.size_px
    return Preprocessing(resize_px=round(recipe.data.eval_resize * size_px), crop_px=size_px)


def _scale(pixels: Tensor) -> Tensor:
    """uint8 pixels -> float32 in [0, 1], on the device where they are."""
    return pixels.float() / 255
