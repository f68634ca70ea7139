"""Detection: boxes around things and their classes, by SSDLite (paper, section 4.2.1)."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert

from mobilevit.data.box_transforms import BoxAugmentation, BoxBatch, BoxEvaluation, BoxTruth, stack_boxes
from mobilevit.data.boxes import Boxes
from mobilevit.data.checks import check_images
from mobilevit.data.loader import Batch, ImageDataset
from mobilevit.data.samples import Source
from mobilevit.data.sources import find_evaluation_split, find_splits
from mobilevit.data.transforms import warp
from mobilevit.images import ImageError, Preprocessing, limit_megapixels, read_image
from mobilevit.models.ssdlite import SSDLite, detect, encode
from mobilevit.recipes import Recipe
from mobilevit.report.results import NOTHING, Drawn, boxes_html, curves_html, figures_html, table
from mobilevit.tasks.classification import Gather, alone
from mobilevit.weights import Weights, backbone_tensors

MATCH_IOU = 0.5  # from which an anchor answers for a box
NEGATIVES_PER_POSITIVE = 3
MIN_NEGATIVES = 3  # in an image without boxes, which teaches nothing otherwise
SCORE_THRESHOLD = 0.01  # of what is found, as published
MAX_PER_IMAGE = 100  # of what COCO's average precision counts
NUM_SHOWN = 8  # best and worst images of a report, each
SHOWN_SCORE = 0.3  # from which a report draws what was found

METRICS = {  # what a report says of them
    "ap": "all, mean over IoU 0.5, 0.55 ... 0.95",
    "ap50": "all, IoU 0.5 or more",
    "ap75": "all, IoU 0.75 or more",
    "ap_small": "up to 32 x 32 px",
    "ap_medium": "from there to 96 x 96 px",
    "ap_large": "beyond 96 x 96 px",
}
COLUMNS = {"num_boxes": "boxes", "ap50": "AP at IoU 0.5, %", "ap": "AP, %"}


class Found(NamedTuple):
    """One image of an evaluation: what is in it, and what a network found there, both in pixels of the image."""

    number: int  # in the source
    truth: BoxTruth
    boxes: np.ndarray  # (F, 4) float32, x1 y1 x2 y2
    scores: np.ndarray  # (F,) float32, best first
    labels: np.ndarray  # (F,) int64


@dataclass(frozen=True)
class Detections:
    """What a network found in images; `mobilevit.tasks.Results` for detection, computed by pycocotools."""

    found: tuple[Found, ...]  # by ascending number
    num_classes: int
    main_metric = "ap"

    def metrics(self) -> dict[str, float]:
        """COCO's average precision in per cent, and the number of images.

        Over the IoU thresholds 0.5 to 0.95, at 0.5, at 0.75, and of boxes of up to 32, up to 96 and more px a side;
        those last three only where the data have any. Without any box at all in the data, "ap" is 0.
        """
        names = {"ap": (None, 0), "ap50": (0.5, 0), "ap75": (0.75, 0), "ap_small": (None, 1)}
        names |= {"ap_medium": (None, 2), "ap_large": (None, 3)}
        values = {name: self._average(*where) for name, where in names.items()}
        found = {name: 100 * value for name, value in values.items() if value is not None}
        return {"ap": 0.0, **found, "num_images": len(self.found)}

    def per_class(self, class_names: Sequence[str]) -> list[dict[str, Any]]:
        """Boxes of every class and its average precisions in per cent; None for a class without boxes."""
        num_boxes = self._num_boxes()
        rows = []
        for i, class_name in enumerate(class_names):
            row: dict[str, Any] = {"class": class_name, "num_boxes": int(num_boxes[i])}
            for name, iou in {"ap": None, "ap50": 0.5}.items():
                value = self._average(iou, 0, i)
                row[name] = None if value is None else 100 * value
            rows.append(row)
        return rows

    def curves(self) -> np.ndarray:
        """Precision (num_classes, 101) at recall 0, 0.01 ... 1 and an IoU of 0.5; NaN for a class without boxes."""
        precision = self._precision[0, :, :, 0].T
        return np.where(precision < 0, np.nan, precision)

    def sections(self, source: Source[Boxes]) -> list[tuple[str, str]]:
        """Average precision, its curves, classes, and the images that came out best and worst."""
        names = source.class_names
        shares = [(_share_right(one), -len(one.truth.boxes.labels), one.number, one) for one in self.found]
        order = [one for share, *_, one in sorted(shares, key=lambda x: x[:3]) if not math.isnan(share)]
        worst = order[:NUM_SHOWN]
        best = sorted(order[len(worst) :], key=lambda one: (-_share_right(one), -len(one.truth.boxes.labels)))
        none = "<p>No more images with boxes.</p>"
        return [
            ("Average precision", table(("Boxes that count", "%"), self._rows())),
            ("Precision and recall", curves_html(self.curves(), names)),
            ("Classes", figures_html(self.per_class(names), COLUMNS, "The class that is found worst comes first.")),
            ("Worst images", boxes_html(_drawn(source, worst)) if worst else none),
            ("Best images", boxes_html(_drawn(source, best[:NUM_SHOWN])) if best else none),
        ]

    def _rows(self) -> list[tuple[str, str]]:
        metrics = self.metrics()
        return [(told, f"{metrics[name]:.1f}" if name in metrics else NOTHING) for name, told in METRICS.items()]

    def _average(self, iou: float | None, area: int, label: int | None = None) -> float | None:
        """The mean of what COCO's table of precisions says; None where there are no boxes to find."""
        precision = self._precision[:, :, :, area]
        if iou is not None:
            precision = precision[[round(20 * (iou - 0.5))]]
        if label is not None:
            precision = precision[:, :, [label]]
        precision = precision[precision > -1]
        return float(precision.mean()) if precision.size else None

    def _num_boxes(self) -> np.ndarray:
        labels = [one.truth.boxes.labels[~one.truth.boxes.crowd] for one in self.found]
        return np.bincount(np.concatenate(labels), minlength=self.num_classes)

    @cached_property
    def _precision(self) -> np.ndarray:
        """COCO's precision by (IoU threshold, recall, class, area), -1 where undefined, at 100 boxes an image."""
        coco, evaluation = _pycocotools()
        truth, answers = coco(), coco()
        classes = [{"id": i} for i in range(self.num_classes)]
        images = [{"id": one.number, "height": one.truth.height, "width": one.truth.width} for one in self.found]
        boxes, found = [], []
        for one in self.found:
            of = one.truth.boxes
            columns = (of.corners.tolist(), of.labels.tolist(), of.areas.tolist(), of.crowd.tolist())
            for corners, label, area, crowd in zip(*columns, strict=True):
                boxes.append(_annotation(len(boxes), one.number, corners, label, iscrowd=int(crowd), area=area))
            for corners, label, score in zip(one.boxes.tolist(), one.labels.tolist(), one.scores.tolist(), strict=True):
                found.append(_annotation(len(found), one.number, corners, label, iscrowd=0, score=score))
        with contextlib.redirect_stdout(io.StringIO()):  # it tells how far it is
            for index, annotations in ((truth, boxes), (answers, found)):
                index.dataset = {"images": images, "categories": classes, "annotations": annotations}
                index.createIndex()
            evaluated = evaluation(truth, answers, "bbox")
            evaluated.evaluate()
            evaluated.accumulate()
        return evaluated.eval["precision"][..., -1]


class Detection:
    """See `mobilevit.tasks.Task` for what the methods do."""

    def datasets(self, recipe: Recipe, data: str | Path) -> tuple[ImageDataset, ImageDataset]:
        _pycocotools()  # that it is missing is to be said before the first epoch, not after it
        limit_megapixels(recipe.data.max_megapixels)
        train, val = find_splits("detect", data, recipe.data.val_fraction)
        scan = check_images(train, val, max_unreadable=recipe.data.max_unreadable)
        augmentation = BoxAugmentation(recipe.data.min_scale, recipe.data.flip, recipe.seed)
        evaluation = BoxEvaluation(warp(recipe.data.size_px))
        return (
            ImageDataset(train, augmentation, stack_boxes, (*train.notes, *scan.notes()), scan.num_transparent),
            ImageDataset(val, evaluation, list, val.notes),
        )

    def evaluation_set(
        self, weights: Weights, data: str | Path, preprocessing: Preprocessing, split: str
    ) -> ImageDataset:
        _pycocotools()
        if not weights.class_names:
            raise ValueError("these weights have no class names, which are required to match the classes of the data")
        source = find_evaluation_split("detect", data, weights.class_names, split, weights.val_fraction)
        # Always the whole image, whatever the preprocessing of the weights: boxes may be at its edge.
        whole = replace(preprocessing, resize_px=(preprocessing.crop_px, preprocessing.crop_px))
        return ImageDataset(source, BoxEvaluation(whole), list, source.notes)

    def build(self, recipe: Recipe, train_set: ImageDataset, pretrained: Weights | None) -> Weights:
        source = train_set.source
        class_names = source.class_names
        preprocessing = warp(recipe.data.size_px)
        if pretrained is None:
            model = SSDLite(recipe.architecture, len(class_names))
        else:
            if pretrained.task == "detect":
                model = pretrained.build(SSDLite)
                if pretrained.class_names != class_names:
                    model.reset_classes(len(class_names))
            else:
                model = SSDLite(pretrained.architecture, len(class_names))
                model.backbone.load_state_dict(backbone_tensors(pretrained))
            # Their first convolution has learnt what its input is scaled to.
            preprocessing = replace(preprocessing, mean=pretrained.preprocessing.mean, std=pretrained.preprocessing.std)
        return Weights(
            architecture=model.architecture,
            tensors=model.state_dict(),
            preprocessing=preprocessing,
            class_names=class_names,
            task="detect",
            category_ids=source.category_ids,
        )

    def blank_labels(self, batch_size: int, size_px: int) -> BoxBatch:
        # As many boxes as few images have: the table of their overlaps with the anchors takes memory too.
        corners = torch.tensor((0.25, 0.25, 0.75, 0.75)).expand(batch_size, 64, 4).clone()
        return BoxBatch(corners, torch.zeros(batch_size, 64, dtype=torch.long))

    def loss(self, recipe: Recipe, model: nn.Module, batch: Batch) -> Tensor:
        class_logits, locations = model(batch.pixels)
        anchors = _anchors(model, batch)
        return ssd_loss(class_logits, locations, anchors, batch.labels, recipe.label_smoothing)

    @torch.inference_mode()
    def evaluate(self, model: nn.Module, batches: Iterable[Batch], gather: Gather = alone) -> Detections:
        found: list[Found] = []
        num_classes = 0
        for batch in batches:
            if not batch.indices:  # none of it could be read
                continue
            class_logits, locations = model(batch.pixels)
            num_classes = class_logits.shape[2] - 1
            anchors = _anchors(model, batch)
            of_images = detect(
                class_logits,
                locations,
                anchors,
                score_threshold=SCORE_THRESHOLD,
                max_per_image=MAX_PER_IMAGE,
            )
            for number, truth, one in zip(batch.indices, batch.labels, of_images, strict=True):
                size = np.array((truth.width, truth.height) * 2, np.float32)
                boxes = (one.boxes.cpu().numpy().clip(0, 1) * size).astype(np.float32)
                found.append(Found(number, truth, boxes, one.scores.cpu().numpy(), one.labels.cpu().numpy()))
        everything = gather((found, num_classes))
        merged = sorted((one for part, _ in everything for one in part), key=lambda one: one.number)
        if not merged:
            raise ImageError("none of the images to evaluate on can be read")
        return Detections(tuple(merged), max(num for _, num in everything))


def match(targets: BoxBatch, anchors: Tensor) -> Tensor:
    """Which box every anchor answers for: (B, A) indices into the boxes of the image, -1 for none.

    `anchors` (A, 4) are in centre form. An anchor answers for the box it overlaps most, if that is by an intersection
    over union of 0.5 or more; and every box has the anchor that overlaps it most, whatever that one's best box is (SSD,
    section 2.2). Where boxes compete for an anchor in this way, the last of them has it.
    """
    is_box = targets.labels >= 0
    overlaps = _overlaps(targets.corners, box_convert(anchors, "cxcywh", "xyxy"))  # (B, M, A)
    overlaps = overlaps.masked_fill(~is_box[:, :, None], -1)
    best, of_anchor = overlaps.max(1)
    of_anchor = of_anchor.masked_fill(best < MATCH_IOU, -1)
    best, of_box = overlaps.max(2)
    index = torch.arange(is_box.shape[1], device=anchors.device).expand_as(of_box)
    # The largest index wins, wherever this runs: writing in place would leave it to chance on a GPU.
    forced = torch.full_like(of_anchor, -1)
    forced.scatter_reduce_(1, of_box, index.masked_fill(best <= 0, -1), "amax")
    return torch.where(forced >= 0, forced, of_anchor)


def ssd_loss(
    class_logits: Tensor, locations: Tensor, anchors: Tensor, targets: BoxBatch, label_smoothing: float = 0.0
) -> Tensor:
    """SSD's loss (section 2.2), a scalar of float32, of an `SSDLite`'s outputs.

    Smooth L1 of the locations of the matched anchors, and the cross entropy of these and of the three times as many
    others of the image that are taken for something with most confidence; the sum of both over the number of matched
    anchors. That number is the batch's: where a step is computed in parts or by several processes, each part is divided
    by its own. An image without boxes counts with its three worst anchors, so that the loss of a batch of such
    images still teaches what nothing looks like.
    """
    class_logits, locations = class_logits.float(), locations.float()
    of_anchor = match(targets, anchors)
    is_matched = of_anchor >= 0
    at = of_anchor.clamp(min=0)
    labels = torch.where(is_matched, targets.labels.gather(1, at) + 1, 0)
    # What is not matched is to stay where it is: its loss is left out, but must be finite.
    corners = targets.corners.gather(1, at[..., None].expand(-1, -1, 4))
    corners = torch.where(is_matched[..., None], corners, box_convert(anchors, "cxcywh", "xyxy"))
    away = F.smooth_l1_loss(locations, encode(corners, anchors), reduction="none").sum(2)
    num_matched = is_matched.sum(1)
    with torch.no_grad():
        surprise = -class_logits.log_softmax(2)[..., 0]
        order = surprise.masked_fill(is_matched, -1).argsort(dim=1, descending=True, stable=True)
        num_negatives = (NEGATIVES_PER_POSITIVE * num_matched).clamp(min=MIN_NEGATIVES)
        rank = torch.arange(order.shape[1], device=order.device).expand_as(order)
        is_hard = torch.empty_like(is_matched).scatter_(1, order, rank < num_negatives[:, None]) & ~is_matched
    wrong = F.cross_entropy(
        class_logits.flatten(0, 1), labels.flatten(), reduction="none", label_smoothing=label_smoothing
    ).view_as(surprise)
    return ((away * is_matched).sum() + (wrong * (is_matched | is_hard)).sum()) / num_matched.sum().clamp(min=1)


def _anchors(model: nn.Module, batch: Batch) -> Tensor:
    # Whatever the loop has wrapped the network in.
    network = next(module for module in model.modules() if isinstance(module, SSDLite))
    return network.anchors(*batch.pixels.shape[2:])


def _overlaps(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of boxes (B, M, 4) and others (A, 4): (B, M, A); 0 for boxes without an area."""
    boxes = boxes[:, :, None]
    sides = (torch.minimum(boxes[..., 2:], others[:, 2:]) - torch.maximum(boxes[..., :2], others[:, :2])).clamp(min=0)
    both = sides[..., 0] * sides[..., 1]
    area, other_area = ((x[..., 2] - x[..., 0]) * (x[..., 3] - x[..., 1]) for x in (boxes, others))
    return both / (area + other_area - both)


def _pycocotools() -> tuple[Callable[..., Any], Callable[..., Any]]:
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        raise ValueError('detection is evaluated by pycocotools; pip install "mobilevit[dense]"') from None
    return COCO, COCOeval


def _annotation(number: int, image: int, corners: list[float], label: int, **values: float) -> dict[str, Any]:
    left, top, right, bottom = corners
    box = [left, top, right - left, bottom - top]
    # From 1: for pycocotools 0 is the number of no box at all.
    return {"id": number + 1, "image_id": image, "category_id": label, "bbox": box, "area": box[2] * box[3], **values}


def _share_right(one: Found) -> float:
    """Twice the boxes found by all there are and all that were drawn (the F1 score); NaN where both are none."""
    boxes = one.truth.boxes
    corners, labels = boxes.corners[~boxes.crowd], boxes.labels[~boxes.crowd]
    is_drawn = one.scores >= SHOWN_SCORE
    answers, answer_labels = one.boxes[is_drawn], one.labels[is_drawn]
    if not len(labels) + len(answer_labels):
        return math.nan
    if not len(labels) or not len(answer_labels):
        return 0.0
    overlaps = _overlaps(torch.from_numpy(answers)[None], torch.from_numpy(corners))[0].numpy()
    overlaps = np.where(answer_labels[:, None] == labels, overlaps, -1)
    num_right = 0
    for row in overlaps:  # best score first; a box is found once
        j = int(row.argmax())
        if row[j] >= MATCH_IOU:
            num_right += 1
            overlaps[:, j] = -1
    return 2 * num_right / (len(labels) + len(answer_labels))


def _drawn(source: Source[Boxes], found: Sequence[Found]) -> list[Drawn]:
    drawn = []
    for one in found:
        sample = source[one.number]
        try:
            image = read_image(sample.image, sample.name)
        except ImageError:  # gone since it was evaluated
            continue
        boxes = one.truth.boxes
        names = source.class_names
        truth = [
            (tuple(corners), names[label] + (" (crowd)" if crowd else ""))
            for corners, label, crowd in zip(boxes.corners.tolist(), boxes.labels, boxes.crowd, strict=True)
        ]
        answers = [
            (tuple(corners), f"{names[label]} {100 * score:.0f} %")
            for corners, label, score in zip(one.boxes.tolist(), one.labels, one.scores, strict=True)
            if score >= SHOWN_SCORE
        ]
        drawn.append(Drawn(image, sample.name, truth, answers))
    return drawn
