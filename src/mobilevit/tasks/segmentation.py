"""Semantic segmentation: the class of every pixel by DeepLabv3 (paper, section 4.2.2)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mobilevit.data.loader import Batch, ImageDataset
from mobilevit.data.mask_transforms import MaskAugmentation, MaskEvaluation, stack_masks
from mobilevit.data.masks import IGNORE
from mobilevit.data.python_data import Data
from mobilevit.data.transforms import warp
from mobilevit.images import ImageError, Preprocessing
from mobilevit.models.deeplabv3 import DeepLabHead, DeepLabV3
from mobilevit.recipes import Recipe
from mobilevit.tasks.datasets import evaluation_set, normalized_as, training_sets, whole_image
from mobilevit.tasks.task import ClassMetrics, Described, Gather, single_process
from mobilevit.weights import Weights, backbone_tensors

OUTPUT_STRIDE = 16  # of a new network, as published
AUXILIARY_WEIGHT = 0.4  # of the loss of the auxiliary head, as in the reference implementation
MAX_RESIZED = 1 << 26  # logits per resize to the size of the image: 256 MB
NUM_EXAMPLES = 6  # number of best images in the results, and of worst images
EXAMPLE_PX = 360  # longer side of a mask in an example


@dataclass(frozen=True)
class SegmentationExample:
    """One evaluated image: its mean IoU (0 to 1), its index in the data source, and the predicted mask.

    `prediction` is (h, w) uint8, at most 360 px high and wide.
    """

    iou: float
    index: int
    prediction: np.ndarray


@dataclass(frozen=True)
class SegmentationResults:
    """The confusion matrix of all pixels; the `mobilevit.tasks.Results` of segmentation.

    `confusion_matrix` (C, C) counts pixels of the original images by true class (rows) and predicted class (columns),
    without ignored pixels.
    """

    confusion_matrix: np.ndarray
    num_images: int
    worst: tuple[SegmentationExample, ...]  # lowest IoU first
    best: tuple[SegmentationExample, ...]  # highest IoU first
    main_metric = "miou"

    def metrics(self) -> dict[str, float]:
        """Mean IoU and pixel accuracy in percent over the pixels of all images, and the number of images.

        The mean excludes classes that are neither annotated nor predicted anywhere.
        """
        matrix = self.confusion_matrix
        return {
            "miou": 100 * float(np.nanmean(mask_iou(matrix))),
            "pixel_accuracy": 100 * int(np.trace(matrix)) / int(matrix.sum()),
            "num_images": self.num_images,
        }

    def per_class(self, class_names: Sequence[str]) -> list[ClassMetrics]:
        """Number of annotated pixels and IoU of every class."""
        num_pixels, iou = self.confusion_matrix.sum(1).tolist(), mask_iou(self.confusion_matrix).tolist()
        return [
            ClassMetrics(class_name, {"num_pixels": num_pixels[i], "iou": None if math.isnan(iou[i]) else 100 * iou[i]})
            for i, class_name in enumerate(class_names)
        ]


class Segmentation:
    """The `mobilevit.tasks.Task` of segmentation."""

    def datasets(self, recipe: Recipe, data: Data) -> tuple[ImageDataset, ImageDataset]:
        augmentation = MaskAugmentation(recipe.data.min_scale, recipe.data.flip, recipe.seed)
        evaluation = MaskEvaluation(warp(recipe.data.size_px))
        return training_sets(recipe, data, (augmentation, stack_masks), (evaluation, list))

    def evaluation_set(self, weights: Described, data: Data, preprocessing: Preprocessing, split: str) -> ImageDataset:
        return evaluation_set(weights, data, split, MaskEvaluation(whole_image(preprocessing)), list)

    def build(self, recipe: Recipe, train_set: ImageDataset, pretrained: Weights | None) -> Weights:
        class_names = train_set.source.class_names
        output_stride, head = OUTPUT_STRIDE, DeepLabHead()
        if pretrained is None:
            model = DeepLabV3(recipe.architecture, len(class_names), output_stride, head)
        elif pretrained.task == "segment":
            assert pretrained.head is not None
            output_stride, head = pretrained.output_stride, pretrained.head
            model = pretrained.build(DeepLabV3)
            if pretrained.class_names != class_names:
                model.reset_classes(len(class_names))
        else:
            model = DeepLabV3(pretrained.architecture, len(class_names), output_stride, head)
            model.backbone.load_state_dict(backbone_tensors(pretrained))
        return Weights(
            architecture=model.architecture,
            tensors=model.state_dict(),
            preprocessing=normalized_as(pretrained, warp(recipe.data.size_px)),
            class_names=class_names,
            output_stride=output_stride,
            task="segment",
            head=head,
        )

    def blank_labels(self, batch_size: int, size_px: int) -> Tensor:
        return torch.zeros(batch_size, size_px, size_px, dtype=torch.uint8)

    def loss(self, recipe: Recipe, model: nn.Module, batch: Batch) -> Tensor:
        labels, smoothing = batch.labels.long(), recipe.label_smoothing
        outputs = model(batch.pixels)
        if isinstance(outputs, Tensor):
            return pixel_loss(outputs, labels, smoothing)
        logits, auxiliary = outputs
        return pixel_loss(logits, labels, smoothing) + AUXILIARY_WEIGHT * pixel_loss(auxiliary, labels, smoothing)

    @torch.inference_mode()
    def evaluate(
        self, model: nn.Module, batches: Iterable[Batch], gather: Gather = single_process
    ) -> SegmentationResults:
        total: np.ndarray | int = 0
        num_images = 0
        worst: list[SegmentationExample] = []
        best: list[SegmentationExample] = []
        for batch in batches:
            if not batch.indices:  # no image of the batch could be read
                continue
            logits = model(batch.pixels)
            for index, mask, of_image in zip(batch.indices, batch.labels, logits, strict=True):
                prediction = predict_mask(of_image, *mask.shape)
                matrix = confusion_matrix(torch.from_numpy(mask).to(prediction.device), prediction, logits.shape[1])
                total += matrix
                num_images += 1
                if not matrix.any():  # every pixel is ignored
                    continue
                example = SegmentationExample(float(np.nanmean(mask_iou(matrix))), index, _thumbnail(prediction))
                worst, best = _lowest([*worst, example]), _highest([*best, example])
        gathered = [of_process for of_process in gather((total, num_images, worst, best)) if of_process[1]]
        if not gathered:
            raise ImageError("none of the images to evaluate on can be read")
        totals, nums, all_worst, all_best = zip(*gathered, strict=True)
        matrix = np.sum(totals, 0)
        if not matrix.sum():
            raise ValueError("every pixel of the masks to evaluate on is 255 (ignored); annotate at least one class")
        return SegmentationResults(
            matrix,
            sum(nums),
            worst=tuple(_lowest([example for of_process in all_worst for example in of_process])),
            best=tuple(_highest([example for of_process in all_best for example in of_process])),
        )


def pixel_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy over the pixels that are not ignored, a float32 scalar; 0 if all are ignored.

    `logits` (B, C, H, W), `labels` (B, H, W) int64, 255 for ignored pixels.
    """
    total = F.cross_entropy(
        logits.float(), labels, ignore_index=IGNORE, reduction="sum", label_smoothing=label_smoothing
    )
    return total / (labels != IGNORE).sum().clamp(min=1)


def predict_mask(logits: Tensor, height: int, width: int) -> Tensor:
    """Logits (C, H, W) of a warped image -> predicted classes (height, width) int64 of the original image."""
    best = classes = None
    # Inverts the warp, which aligns pixel centers; the head's own `align_corners` does not matter here. Some classes at
    # a time: all logits at the size of a large photograph take gigabytes.
    step = max(1, MAX_RESIZED // (height * width))
    for start in range(0, len(logits), step):
        chunk = logits[None, start : start + step].float()
        values, indices = F.interpolate(chunk, (height, width), mode="bilinear", align_corners=False)[0].max(0)
        if best is None or classes is None:
            best, classes = values, indices
        else:
            classes = torch.where(values > best, indices + start, classes)
            best = torch.maximum(values, best)
    assert classes is not None
    return classes


def confusion_matrix(truth: Tensor, prediction: Tensor, num_classes: int) -> np.ndarray:
    """Number of pixels by true class (rows) and predicted class (columns), (C, C) int64, without ignored pixels.

    `truth` (H, W) uint8 with 255 for ignored pixels and `prediction` (H, W) int64, on the same device.
    """
    is_counted = truth != IGNORE
    pairs = truth[is_counted].long() * num_classes + prediction[is_counted]
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes).cpu().numpy()


def mask_iou(confusion_matrix: np.ndarray) -> np.ndarray:
    """IoU (C,) of every class from a confusion matrix (C, C); NaN for a class that occurs in neither mask."""
    intersection = np.diag(confusion_matrix)
    union = confusion_matrix.sum(0) + confusion_matrix.sum(1) - intersection
    return np.divide(intersection, union, out=np.full(len(union), np.nan), where=union > 0)


def _lowest(examples: list[SegmentationExample]) -> list[SegmentationExample]:
    return sorted(examples, key=lambda example: (example.iou, example.index))[:NUM_EXAMPLES]


def _highest(examples: list[SegmentationExample]) -> list[SegmentationExample]:
    return sorted(examples, key=lambda example: (-example.iou, example.index))[:NUM_EXAMPLES]


def _thumbnail(prediction: Tensor) -> np.ndarray:
    mask = Image.fromarray(prediction.to(torch.uint8).cpu().numpy())
    if (shrink := max(mask.size) / EXAMPLE_PX) > 1:
        mask = mask.resize([max(1, round(side / shrink)) for side in mask.size], Image.Resampling.NEAREST)
    return np.asarray(mask)
