"""Segmentation: the class of every pixel, by DeepLabv3 (paper, section 4.2.2)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mobilevit.data.checks import check_images
from mobilevit.data.loader import Batch, ImageDataset
from mobilevit.data.mask_transforms import MaskAugmentation, MaskEvaluation, stack_masks
from mobilevit.data.masks import IGNORE, MaskFile
from mobilevit.data.samples import Source
from mobilevit.data.sources import find_evaluation_split, find_splits
from mobilevit.data.transforms import warp
from mobilevit.images import ImageError, Preprocessing, limit_megapixels, read_image
from mobilevit.models.deeplabv3 import DeepLabHead, DeepLabV3
from mobilevit.recipes import Recipe
from mobilevit.report.results import FIGURE_PX, Painted, confusion_html, figures_html, masks_html
from mobilevit.tasks.classification import Gather, alone
from mobilevit.weights import Weights, backbone_tensors

OUTPUT_STRIDE = 16  # of a new network, as published
AUXILIARY_WEIGHT = 0.4  # of the loss of the auxiliary head, where there is one (as the later release has it)
MAX_ENLARGED = 1 << 26  # logits at the size of the image, a quarter of a gigabyte
NUM_SHOWN = 6  # best and worst images of a report, each


class Seen(NamedTuple):
    """An image to show in a report: its mean IoU (0..1), its number, what was found (h, w), made small."""

    share: float
    number: int
    found: np.ndarray


@dataclass(frozen=True)
class Segmented:
    """What a network made of the pixels of images; `mobilevit.tasks.Results` for segmentation.

    `counts` (C, C) are pixels of the images as they were annotated, a row for the true class and a column for the
    predicted one; what is to be ignored is not in them.
    """

    counts: np.ndarray
    num_images: int
    worst: tuple[Seen, ...]  # worst first
    best: tuple[Seen, ...]  # best first
    main_metric = "miou"

    def metrics(self) -> dict[str, float]:
        """Mean IoU over the classes and right pixels, both in per cent, and the number of images.

        IoU is of all images together. A class that is neither annotated nor found anywhere is left out of its mean.
        """
        ious = _ious(self.counts)
        return {
            "miou": 100 * float(np.nanmean(ious)),
            "pixel_accuracy": 100 * int(np.trace(self.counts)) / int(self.counts.sum()),
            "num_images": self.num_images,
        }

    def per_class(self, class_names: Sequence[str]) -> list[dict[str, Any]]:
        """Annotated pixels of every class and its IoU in per cent, None where it is neither annotated nor found."""
        ious = _ious(self.counts)
        return [
            {
                "class": class_name,
                "num_pixels": int(self.counts[i].sum()),
                "iou": None if math.isnan(ious[i]) else 100 * float(ious[i]),
            }
            for i, class_name in enumerate(class_names)
        ]

    def sections(self, source: Source[MaskFile]) -> list[tuple[str, str]]:
        """Classes, which is taken for which, and the images that came out best and worst."""
        names = source.class_names
        columns = {"num_pixels": "pixels", "iou": "IoU, %"}
        classes = figures_html(self.per_class(names), columns, "The class with the lowest IoU comes first.")
        worst, best = (_painted(source, seen) for seen in (self.worst, self.best))
        none = "<p>No images to show.</p>"
        return [
            ("Classes", classes),
            ("Confusion", confusion_html(self.counts, names, unit="pixels")),
            ("Worst images", masks_html(worst, names) if worst else none),
            ("Best images", masks_html(best, names) if best else none),
        ]


class Segmentation:
    """See `mobilevit.tasks.Task` for what the methods do."""

    def datasets(self, recipe: Recipe, data: str | Path) -> tuple[ImageDataset, ImageDataset]:
        limit_megapixels(recipe.data.max_megapixels)
        train, val = find_splits("segment", data, recipe.data.val_fraction)
        scan = check_images(train, val, max_unreadable=recipe.data.max_unreadable)
        augmentation = MaskAugmentation(recipe.data.min_scale, recipe.data.flip, recipe.seed)
        evaluation = MaskEvaluation(warp(recipe.data.size_px))
        return (
            ImageDataset(train, augmentation, stack_masks, (*train.notes, *scan.notes()), scan.num_transparent),
            ImageDataset(val, evaluation, list, val.notes),
        )

    def evaluation_set(
        self, weights: Weights, data: str | Path, preprocessing: Preprocessing, split: str
    ) -> ImageDataset:
        if not weights.class_names:
            raise ValueError("these weights have no class names, which are required to match the classes of the data")
        source = find_evaluation_split("segment", data, weights.class_names, split, weights.val_fraction)
        # Always the whole image, whatever the preprocessing of the weights: every pixel counts.
        whole = replace(preprocessing, resize_px=(preprocessing.crop_px, preprocessing.crop_px))
        return ImageDataset(source, MaskEvaluation(whole), list, source.notes)

    def build(self, recipe: Recipe, train_set: ImageDataset, pretrained: Weights | None) -> Weights:
        class_names = train_set.source.class_names
        preprocessing = warp(recipe.data.size_px)
        output_stride, head = OUTPUT_STRIDE, DeepLabHead()
        if pretrained is None:
            model = DeepLabV3(recipe.architecture, len(class_names), output_stride, head)
        else:
            if pretrained.task == "segment":
                assert pretrained.head is not None
                output_stride, head = pretrained.output_stride, pretrained.head
                model = pretrained.build(DeepLabV3)
                if pretrained.class_names != class_names:
                    model.reset_classes(len(class_names))
            else:
                model = DeepLabV3(pretrained.architecture, len(class_names), output_stride, head)
                model.backbone.load_state_dict(backbone_tensors(pretrained))
            # Their first convolution has learnt what its input is scaled to.
            preprocessing = replace(preprocessing, mean=pretrained.preprocessing.mean, std=pretrained.preprocessing.std)
        return Weights(
            architecture=model.architecture,
            tensors=model.state_dict(),
            preprocessing=preprocessing,
            class_names=class_names,
            output_stride=output_stride,
            task="segment",
            head=head,
        )

    def blank_labels(self, batch_size: int, size_px: int) -> Tensor:
        return torch.zeros(batch_size, size_px, size_px, dtype=torch.uint8)

    def loss(self, recipe: Recipe, model: nn.Module, batch: Batch) -> Tensor:
        labels, smoothing = batch.labels.long(), recipe.label_smoothing
        # Whatever the loop has wrapped it in.
        network = next(module for module in model.modules() if isinstance(module, DeepLabV3))
        if not network.head.auxiliary_channels:
            return pixel_loss(model(batch.pixels), labels, smoothing)
        # Through the wrappers all the same: they share the gradients, and compile.
        vars(network)["forward"] = network.with_auxiliary
        try:
            logits, auxiliary = model(batch.pixels)
        finally:
            del vars(network)["forward"]
        return pixel_loss(logits, labels, smoothing) + AUXILIARY_WEIGHT * pixel_loss(auxiliary, labels, smoothing)

    @torch.inference_mode()
    def evaluate(self, model: nn.Module, batches: Iterable[Batch], gather: Gather = alone) -> Segmented:
        counts: np.ndarray | int = 0
        num_images = 0
        worst: list[Seen] = []
        best: list[Seen] = []
        for batch in batches:
            if not batch.indices:  # none of it could be read
                continue
            logits = model(batch.pixels)
            for number, mask, of_image in zip(batch.indices, batch.labels, logits, strict=True):
                found = at_size(of_image, *mask.shape)
                of_pixels = confusion(torch.from_numpy(mask).to(found.device), found, logits.shape[1])
                counts += of_pixels
                num_images += 1
                if not of_pixels.any():  # all of it is to be ignored
                    continue
                seen = Seen(float(np.nanmean(_ious(of_pixels))), number, _small(found))
                worst, best = _sorted([*worst, seen]), _sorted([*best, seen], best=True)
        everything = [one for one in gather((counts, num_images, worst, best)) if one[1]]
        if not everything:
            raise ImageError("none of the images to evaluate on can be read")
        all_counts = np.sum([one[0] for one in everything], 0)
        if not all_counts.sum():
            raise ValueError("the masks to evaluate on say of every pixel that it is to be ignored (255); mend them")
        return Segmented(
            all_counts,
            sum(one[1] for one in everything),
            worst=tuple(_sorted([seen for one in everything for seen in one[2]])),
            best=tuple(_sorted([seen for one in everything for seen in one[3]], best=True)),
        )


def pixel_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The mean cross entropy of the pixels that are not to be ignored, a scalar of float32; 0 where all are.

    `logits` (B, C, H, W), `labels` (B, H, W) int64, 255 where they are to be ignored.
    """
    total = F.cross_entropy(
        logits.float(), labels, ignore_index=IGNORE, reduction="sum", label_smoothing=label_smoothing
    )
    return total / (labels != IGNORE).sum().clamp(min=1)


def at_size(logits: Tensor, height: int, width: int) -> Tensor:
    """Logits (C, H, W) of the warped image -> the likeliest classes of the image itself, (height, width) int64."""
    best = classes = None
    # Undoes the warp, which goes by the middles of pixels whatever the head does: `align_corners` is the network's own.
    # Some classes at a time: all of them, enlarged to a large photograph, are gigabytes.
    at_once = max(1, MAX_ENLARGED // (height * width))
    for first in range(0, len(logits), at_once):
        part = logits[None, first : first + at_once].float()
        values, these = F.interpolate(part, (height, width), mode="bilinear", align_corners=False)[0].max(0)
        if best is None or classes is None:
            best, classes = values, these
        else:
            classes = torch.where(values > best, these + first, classes)
            best = torch.maximum(values, best)
    assert classes is not None
    return classes


def confusion(truth: Tensor, found: Tensor, num_classes: int) -> np.ndarray:
    """Pixels by true class (rows) and found class (columns), (C, C) int64; pixels that are 255 in `truth` are left out.

    `truth` (H, W) uint8 and `found` (H, W) int64, on one device.
    """
    counts_here = truth != IGNORE
    pairs = truth[counts_here].long() * num_classes + found[counts_here]
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes).cpu().numpy()


def _ious(counts: np.ndarray) -> np.ndarray:
    """Intersection over union by class, NaN where both are empty."""
    both = np.diag(counts)
    either = counts.sum(0) + counts.sum(1) - both
    return np.divide(both, either, out=np.full(len(counts), np.nan), where=either > 0)


def _sorted(seen: Iterable[Seen], *, best: bool = False) -> list[Seen]:
    """The first that a report shows; the same ones however the images were dealt out."""
    return sorted(seen, key=lambda one: (-one.share if best else one.share, one.number))[:NUM_SHOWN]


def _small(found: Tensor) -> np.ndarray:
    mask = Image.fromarray(found.to(torch.uint8).cpu().numpy())
    if (shrink := max(mask.size) / FIGURE_PX) > 1:
        size = (max(1, round(mask.width / shrink)), max(1, round(mask.height / shrink)))
        mask = mask.resize(size, Image.Resampling.NEAREST)
    return np.asarray(mask)


def _painted(source: Source[MaskFile], seen: Iterable[Seen]) -> list[Painted]:
    painted = []
    for share, number, found in seen:
        sample = source[number]
        try:
            image = read_image(sample.image, sample.name)
            truth = sample.label.read(*image.size)
        except ImageError:  # gone since it was evaluated
            continue
        painted.append(Painted(image, sample.name, truth, found, share))
    return painted
