"""Detection: boxes and their classes by SSDLite (paper, section 4.2.1)."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert, box_iou

from mobilevit.data.box_transforms import BoxAugmentation, BoxBatch, BoxEvaluation, BoxTruth, stack_boxes
from mobilevit.data.loader import Batch, ImageDataset
from mobilevit.data.python_data import Data
from mobilevit.data.transforms import warp
from mobilevit.files import require
from mobilevit.images import ImageError, Preprocessing
from mobilevit.models.ssdlite import Detections, SSDLite, detect, encode
from mobilevit.recipes import Recipe
from mobilevit.tasks.datasets import evaluation_set, normalized_as, training_sets, whole_image
from mobilevit.tasks.task import ClassMetrics, Described, Gather, single_process
from mobilevit.weights import Weights, backbone_tensors

MATCH_IOU = 0.5  # smallest IoU at which an anchor matches a box
NEGATIVES_PER_POSITIVE = 3
MIN_NEGATIVES = 3  # per image, so that images without boxes contribute to the loss
SCORE_THRESHOLD = 0.01  # of detections in an evaluation, as published
MAX_PER_IMAGE = 100  # detections that COCO's average precision counts
SHOWN_SCORE = 0.3  # score threshold of the boxes that a report draws

IOU_THRESHOLDS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))  # COCO's
AREAS = ("all", "small", "medium", "large")  # COCO's, in the order of pycocotools


@dataclass(frozen=True)
class ImageDetections:
    """Annotated and predicted boxes of one image, in pixels of the image."""

    index: int  # of the image in its data source
    truth: BoxTruth
    boxes: np.ndarray  # (K, 4) float32, x1 y1 x2 y2
    scores: np.ndarray  # (K,) float32, descending
    labels: np.ndarray  # (K,) int64

    def f1_score(self, score_threshold: float = SHOWN_SCORE) -> float:
        """F1 score (0 to 1) at an IoU of 0.5; NaN if there are neither annotated nor predicted boxes."""
        annotated = self.truth.boxes
        corners, labels = annotated.corners[~annotated.crowd], annotated.labels[~annotated.crowd]
        is_shown = self.scores >= score_threshold
        boxes, predicted_labels = self.boxes[is_shown], self.labels[is_shown]
        if not len(labels) + len(predicted_labels):
            return math.nan
        if not len(labels) or not len(predicted_labels):
            return 0.0
        iou = box_iou(torch.from_numpy(boxes), torch.from_numpy(corners)).numpy()
        iou = np.where(predicted_labels[:, None] == labels, iou, -1)
        num_correct = 0
        for row in iou:  # highest score first; an annotated box matches once
            j = int(row.argmax())
            if row[j] >= MATCH_IOU:
                num_correct += 1
                iou[:, j] = -1
        return 2 * num_correct / (len(labels) + len(predicted_labels))


@dataclass(frozen=True)
class DetectionResults:
    """Detections in all images; the `mobilevit.tasks.Results` of detection. pycocotools computes the metrics."""

    images: tuple[ImageDetections, ...]  # by ascending index
    num_classes: int
    main_metric = "ap"

    def metrics(self) -> dict[str, float]:
        """COCO's average precisions in percent, and the number of images.

        "ap" is the mean over the IoU thresholds 0.5 to 0.95, "ap50" and "ap75" are at one threshold. "ap_small",
        "ap_medium" and "ap_large" are of boxes up to 32 x 32 px, up to 96 x 96 px and above, present only if the data
        have such boxes. Without any boxes in the data, "ap" is 0.
        """
        values = {
            "ap": self._average_precision(),
            "ap50": self._average_precision(iou=0.5),
            "ap75": self._average_precision(iou=0.75),
            **{f"ap_{area}": self._average_precision(area=area) for area in AREAS[1:]},
        }
        defined = {name: value for name, value in values.items() if value is not None}
        return {"ap": 0.0, **defined, "num_images": len(self.images)}

    def per_class(self, class_names: Sequence[str]) -> list[ClassMetrics]:
        """Number of boxes and average precisions of every class."""
        labels = [image.truth.boxes.labels[~image.truth.boxes.crowd] for image in self.images]
        num_boxes = np.bincount(np.concatenate(labels), minlength=self.num_classes).tolist()
        return [
            ClassMetrics(
                class_name,
                {
                    "num_boxes": num_boxes[i],
                    "ap": self._average_precision(label=i),
                    "ap50": self._average_precision(iou=0.5, label=i),
                },
            )
            for i, class_name in enumerate(class_names)
        ]

    def precision_recall_curves(self) -> np.ndarray:
        """Precision (C, 101) at recall 0, 0.01 ... 1 and an IoU of 0.5; NaN for a class without boxes."""
        precision = self._precision[0, :, :, 0].T
        return np.where(precision < 0, np.nan, precision)

    def ranked(self) -> list[ImageDetections]:
        """Images with boxes by ascending F1 score; for equal scores, those with more boxes first."""
        scores = [(image.f1_score(), -len(image.truth.boxes.labels), image.index, image) for image in self.images]
        return [image for f1, *_, image in sorted(scores, key=lambda x: x[:3]) if not math.isnan(f1)]

    def _average_precision(
        self, *, iou: float | None = None, area: str = "all", label: int | None = None
    ) -> float | None:
        """Average precision in percent; None if there are no such boxes in the data."""
        precision = self._precision[:, :, :, AREAS.index(area)]
        if iou is not None:
            precision = precision[[IOU_THRESHOLDS.index(iou)]]
        if label is not None:
            precision = precision[:, :, [label]]
        precision = precision[precision > -1]
        return 100 * float(precision.mean()) if precision.size else None

    @cached_property
    def _precision(self) -> np.ndarray:
        """COCO's precision by (IoU threshold, recall, class, area) at 100 detections per image, -1 where undefined."""
        COCO, COCOeval = _pycocotools()
        truth, predictions = COCO(), COCO()
        annotated: list[dict[str, Any]] = []
        predicted: list[dict[str, Any]] = []
        for image in self.images:
            of = image.truth.boxes
            columns = (of.corners.tolist(), of.labels.tolist(), of.areas.tolist(), of.crowd.tolist())
            for corners, label, area, crowd in zip(*columns, strict=True):
                row = _annotation(len(annotated), image.index, corners, label)
                annotated.append({**row, "iscrowd": int(crowd), "area": area})
            columns = (image.boxes.tolist(), image.labels.tolist(), image.scores.tolist())
            for corners, label, score in zip(*columns, strict=True):
                row = _annotation(len(predicted), image.index, corners, label)
                predicted.append({**row, "iscrowd": 0, "score": score})
        images = [{"id": one.index, "height": one.truth.height, "width": one.truth.width} for one in self.images]
        categories = [{"id": i} for i in range(self.num_classes)]
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
            for coco, annotations in ((truth, annotated), (predictions, predicted)):
                coco.dataset = {"images": images, "categories": categories, "annotations": annotations}
                coco.createIndex()
            evaluation = COCOeval(truth, predictions, "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
        return evaluation.eval["precision"][..., -1]


class Detection:
    """The `mobilevit.tasks.Task` of detection."""

    def datasets(self, recipe: Recipe, data: Data) -> tuple[ImageDataset, ImageDataset]:
        _pycocotools()  # report a missing library before the first epoch
        augmentation = BoxAugmentation(recipe.data.min_scale, recipe.data.flip, recipe.seed)
        evaluation = BoxEvaluation(warp(recipe.data.size_px))
        return training_sets(recipe, data, (augmentation, stack_boxes), (evaluation, list))

    def evaluation_set(self, weights: Described, data: Data, preprocessing: Preprocessing, split: str) -> ImageDataset:
        _pycocotools()
        return evaluation_set(weights, data, split, BoxEvaluation(whole_image(preprocessing)), list)

    def build(self, recipe: Recipe, train_set: ImageDataset, pretrained: Weights | None) -> Weights:
        source = train_set.source
        class_names = source.class_names
        if pretrained is None:
            model = SSDLite(recipe.architecture, len(class_names))
        elif pretrained.task == "detect":
            model = pretrained.build(SSDLite)
            if pretrained.class_names != class_names:
                model.reset_classes(len(class_names))
        else:
            model = SSDLite(pretrained.architecture, len(class_names))
            model.backbone.load_state_dict(backbone_tensors(pretrained))
        return Weights(
            architecture=model.architecture,
            tensors=model.state_dict(),
            preprocessing=normalized_as(pretrained, warp(recipe.data.size_px)),
            class_names=class_names,
            task="detect",
            category_ids=source.category_ids,
        )

    def blank_labels(self, batch_size: int, size_px: int) -> BoxBatch:
        # More boxes than most images have: the IoU matrix of boxes and anchors takes memory, too.
        corners = torch.tensor((0.25, 0.25, 0.75, 0.75)).expand(batch_size, 64, 4).clone()
        return BoxBatch(corners, torch.zeros(batch_size, 64, dtype=torch.long))

    def loss(self, recipe: Recipe, model: nn.Module, batch: Batch) -> Tensor:
        class_logits, locations = model(batch.pixels)
        anchors = _anchors(model, batch)
        return ssd_loss(class_logits, locations, anchors, batch.labels, recipe.label_smoothing)

    def detect(self, model: nn.Module, batch: Batch) -> tuple[list[Detections], int]:
        """The detections in each image of a batch, with the limits of an evaluation, and the number of classes."""
        class_logits, locations = model(batch.pixels)
        limits = {"score_threshold": SCORE_THRESHOLD, "max_per_image": MAX_PER_IMAGE}
        return detect(class_logits, locations, _anchors(model, batch), **limits), class_logits.shape[2] - 1

    @torch.inference_mode()
    def evaluate(self, model: nn.Module, batches: Iterable[Batch], gather: Gather = single_process) -> DetectionResults:
        images: list[ImageDetections] = []
        num_classes = 0
        for batch in batches:
            if not batch.indices:  # no image of the batch could be read
                continue
            detections, num_classes = self.detect(model, batch)
            for index, truth, of_image in zip(batch.indices, batch.labels, detections, strict=True):
                size = np.array((truth.width, truth.height) * 2, np.float32)
                boxes = (of_image.boxes.cpu().numpy().clip(0, 1) * size).astype(np.float32)
                scores, labels = of_image.scores.cpu().numpy(), of_image.labels.cpu().numpy()
                images.append(ImageDetections(index, truth, boxes, scores, labels))
        gathered = gather((images, num_classes))
        merged = sorted((image for of_process, _ in gathered for image in of_process), key=lambda image: image.index)
        if not merged:
            raise ImageError("none of the images to evaluate on can be read")
        return DetectionResults(tuple(merged), max(num for _, num in gathered))


def match(targets: BoxBatch, anchors: Tensor) -> Tensor:
    """Match anchors to boxes (SSD, section 2.2): (B, A) indices into the boxes of the image, -1 for the background.

    `anchors` (A, 4) are in center form. An anchor matches the box with the highest IoU if that is 0.5 or more. In
    addition, each box matches its anchor with the highest IoU; if several boxes have the same such anchor, it
    matches the last of them.
    """
    is_box = targets.labels >= 0
    iou = box_iou(targets.corners.flatten(0, 1), box_convert(anchors, "cxcywh", "xyxy"))
    iou = iou.view(*is_box.shape, -1).masked_fill(~is_box[:, :, None], -1)  # (B, M, A)
    best, matched = iou.max(1)
    matched = matched.masked_fill(best < MATCH_IOU, -1)
    best, best_anchor = iou.max(2)
    index = torch.arange(is_box.shape[1], device=anchors.device).expand_as(best_anchor)
    # "amax" makes the last box win on every device; indexed assignment is not deterministic on a GPU.
    forced = torch.full_like(matched, -1)
    forced.scatter_reduce_(1, best_anchor, index.masked_fill(best <= 0, -1), "amax")
    return torch.where(forced >= 0, forced, matched)


def ssd_loss(
    class_logits: Tensor, locations: Tensor, anchors: Tensor, targets: BoxBatch, label_smoothing: float = 0.0
) -> Tensor:
    """The loss of SSD (section 2.2) for the outputs of an `SSDLite`, a float32 scalar.

    Smooth L1 of the locations of matched anchors, plus cross-entropy of matched anchors and of hard negatives: in each
    image, the unmatched anchors with the lowest background probability, three per matched anchor. The sum is divided by
    the number of matched anchors in this (micro-)batch. An image without boxes has three hard negatives.
    """
    class_logits, locations = class_logits.float(), locations.float()
    matched = match(targets, anchors)
    is_matched = matched >= 0
    box_index = matched.clamp(min=0)
    labels = torch.where(is_matched, targets.labels.gather(1, box_index) + 1, 0)
    # Unmatched anchors regress to themselves: their loss is masked out below, but must be finite.
    corners = targets.corners.gather(1, box_index[..., None].expand(-1, -1, 4))
    corners = torch.where(is_matched[..., None], corners, box_convert(anchors, "cxcywh", "xyxy"))
    location_loss = F.smooth_l1_loss(locations, encode(corners, anchors), reduction="none").sum(2)
    num_matched = is_matched.sum(1)
    with torch.no_grad():
        background_loss = -class_logits.log_softmax(2)[..., 0]
        order = background_loss.masked_fill(is_matched, -1).argsort(dim=1, descending=True, stable=True)
        num_negatives = (NEGATIVES_PER_POSITIVE * num_matched).clamp(min=MIN_NEGATIVES)
        rank = torch.arange(order.shape[1], device=order.device).expand_as(order)
        is_hard = torch.empty_like(is_matched).scatter_(1, order, rank < num_negatives[:, None]) & ~is_matched
    class_loss = F.cross_entropy(
        class_logits.flatten(0, 1), labels.flatten(), reduction="none", label_smoothing=label_smoothing
    ).view_as(background_loss)
    total = (location_loss * is_matched).sum() + (class_loss * (is_matched | is_hard)).sum()
    return total / num_matched.sum().clamp(min=1)


def _anchors(model: nn.Module, batch: Batch) -> Tensor:
    network = next(module for module in model.modules() if isinstance(module, SSDLite))  # inside any wrappers
    return network.anchors(*batch.pixels.shape[2:])


def _pycocotools() -> tuple[Any, Any]:
    purpose = "the average precision of detections"
    coco = require("pycocotools.coco", "dense", purpose)
    return coco.COCO, require("pycocotools.cocoeval", "dense", purpose).COCOeval


def _annotation(index: int, image: int, corners: list[float], label: int) -> dict[str, Any]:
    left, top, right, bottom = corners
    box = [left, top, right - left, bottom - top]
    # Ids start at 1: pycocotools uses 0 for "not matched".
    return {"id": index + 1, "image_id": image, "category_id": label, "bbox": box, "area": box[2] * box[3]}
