"""SSDLite on MobileViT (arXiv 2110.02178, section 4.2.1; SSD arXiv 1512.02325, SSDLite arXiv 1801.04381).

Six feature maps of decreasing size have one small head each. Every pixel of a map has a few anchors, boxes of fixed
shapes. For each anchor, the head predicts class logits (class 0 is the background) and the offset of the box from the
anchor (location).

Shapes: as in `mobilevit.py`, A anchors of an image, K logits of an anchor (background and classes). Boxes are in
relative coordinates: (0, 0) is the upper left corner of the image and (1, 1) the lower right one.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilevit.models.mobilevit import Architecture, Backbone, ConvNorm, S

EXTRA_CHANNELS = (256, 128, 128)  # of the maps after the backbone, each with half the size of the one before
POOLED_CHANNELS = 64  # of the last map, one pixel for the whole image
HEAD_CHANNELS = (512, 256, *EXTRA_CHANNELS)  # in the heads of all maps but the last
RATIOS = ((2, 3), (2, 3), (2, 3), (2, 3), (2, 3), (2,))  # aspect ratios of the anchors besides squares, by map
NUM_ANCHORS = tuple(2 + 2 * len(ratios) for ratios in RATIOS)  # per pixel: two squares, each ratio wide and tall
MIN_SCALE, MAX_SCALE = 0.1, 1.05  # side of the smallest square, and of the first one that a seventh map would have
CENTER_VARIANCE, SIZE_VARIANCE = 0.1, 0.2  # divisors of locations, so that they are of order 1
MAX_GROWTH = math.log(1000 / 16)  # of an anchor's side; keeps exp finite (torchvision's bound)
MIN_CANDIDATES = 1000  # initial number of candidates for NMS, all classes of an image together


class SeparableConv(nn.Module):
    """3x3 depthwise convolution of stride 2, 1x1 convolution, ReLU; (B, C, H, W) -> (B, out, H / 2, W / 2)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.depthwise = ConvNorm(in_channels, in_channels, 3, stride=2, groups=in_channels, activation=False)
        self.pointwise = ConvNorm(in_channels, out_channels, 1, activation=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.shape[3] == 1:
            # The output has one column for either stride. With stride 2, oneDNN's bfloat16 weight gradient reads
            # uninitialized memory (torch 2.15).
            conv = self.depthwise.conv
            x = self.depthwise.norm(F.conv2d(x, conv.weight, stride=(2, 1), padding=1, groups=conv.groups))
        else:
            x = self.depthwise(x)
        return F.relu(self.pointwise(x))


class MapHead(nn.Module):
    """Predictions for the anchors of one map; (B, C, H, W) -> (B, H * W * anchors, 4 + K), the location first.

    Anchors are ordered by row, column and shape. `channels` is the hidden width; 0 leaves only the last 1x1
    convolution, for a map of one pixel.
    """

    def __init__(self, in_channels: int, channels: int, num_anchors: int, num_classes: int):
        super().__init__()
        self.num_anchors = num_anchors
        projects = channels not in (0, in_channels)
        self.project = ConvNorm(in_channels, channels, 1, activation=False) if projects else None
        width = channels or in_channels
        self.depthwise = ConvNorm(width, width, 3, groups=width, activation=False) if channels else None
        self.out = nn.Conv2d(width, num_anchors * (5 + num_classes), 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.project is not None:
            x = F.relu(self.project(x))
        if self.depthwise is not None:
            x = self.depthwise(x)
        x = self.out(x).permute(0, 2, 3, 1)
        return x.reshape(x.shape[0], -1, x.shape[3] // self.num_anchors)


class SSDLite(nn.Module):
    """The detector; images (B, 3, H, W) -> class logits (B, A, num_classes + 1) and locations (B, A, 4).

    Args:
        architecture: "xxs", "xs", "s" or an `Architecture`.
        num_classes: without the background.

    Raises:
        ValueError: an unknown architecture, a number of classes below 1.
    """

    def __init__(self, architecture: Architecture | str = S, num_classes: int = 80):
        super().__init__()
        _check_count(num_classes)
        self.backbone = Backbone(architecture, out_stages=("stage4", "stage5"))
        self.architecture = self.backbone.architecture
        maps = (*self.backbone.channels.values(), *EXTRA_CHANNELS)
        self.extra_layers = nn.ModuleList(SeparableConv(maps[i - 1], maps[i]) for i in range(2, len(maps)))
        self.pooled = nn.Conv2d(maps[-1], POOLED_CHANNELS, 1, bias=False)
        self.heads = nn.ModuleList(
            MapHead(in_channels, channels, num_anchors, num_classes)
            for in_channels, channels, num_anchors in zip(
                (*maps, POOLED_CHANNELS), (*HEAD_CHANNELS, 0), NUM_ANCHORS, strict=True
            )
        )
        for module in (self.extra_layers, self.pooled, self.heads):
            module.apply(initialize)
        self.to(memory_format=torch.channels_last)

    @property
    def num_classes(self) -> int:
        """Without the background."""
        head = self.heads[-1]
        assert isinstance(head, MapHead)
        return head.out.out_channels // head.num_anchors - 5

    def reset_classes(self, num_classes: int) -> None:
        """Replace the classifiers by newly initialized ones; the weights of locations and background stay."""
        _check_count(num_classes)
        for head in self.heads:
            assert isinstance(head, MapHead)
            old = head.out
            new = nn.Conv2d(old.in_channels, head.num_anchors * (5 + num_classes), 1).apply(initialize).to(old.weight)
            with torch.no_grad():
                for source, target in zip(old.parameters(), new.parameters(), strict=True):
                    rows = source.unflatten(0, (head.num_anchors, -1))[:, :5]
                    target.unflatten(0, (head.num_anchors, -1))[:, :5] = rows
            head.out = new.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits (B, A, num_classes + 1) and locations (B, A, 4) of RGB `images` (B, 3, H, W) in [0, 1].

        H and W are at least 32, or at least 257 under torch.export with symbolic sizes, where no map but the last can
        have one pixel. `decode` converts locations and `anchors` to boxes, `detect` to detections.
        """
        return self.from_maps(self.backbone(images))

    def from_maps(self, backbone_maps: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The outputs for the maps of the backbone."""
        maps = list(backbone_maps.values())
        for layer in self.extra_layers:
            maps.append(layer(maps[-1]))
        maps.append(F.relu(self.pooled(maps[-1].mean(dim=(-2, -1), keepdim=True))))
        outputs = torch.cat([head(x) for head, x in zip(self.heads, maps, strict=True)], dim=1)
        return outputs[..., 4:], outputs[..., :4]

    def anchors(self, height_px: int, width_px: int) -> Tensor:
        """Anchors (A, 4) of an image of this size, in the order of the outputs: center x, y, width, height.

        Relative coordinates, clipped to [0, 1], float32 on the device of the network.
        """
        strides = list(self.backbone.strides.values())
        for _ in self.extra_layers:
            strides.append(2 * strides[-1])
        # With this padding, a convolution of stride 2 rounds up, and so does a sequence of such convolutions.
        sizes = [(-(-height_px // stride), -(-width_px // stride)) for stride in strides]
        sizes.append((1, 1))
        return anchors_of_maps(sizes).to(self.pooled.weight.device)


def anchors_of_maps(sizes: list[tuple[int, int]]) -> Tensor:
    """Anchors (A, 4) of maps of these heights and widths: center x, y, width, height, float32 (SSD, section 2.2)."""
    step = (MAX_SCALE - MIN_SCALE) / len(sizes)
    scales = [MIN_SCALE + step * i for i in range(len(sizes) + 1)]
    anchors = []
    for (height, width), ratios, small, next_small in zip(sizes, RATIOS, scales[:-1], scales[1:], strict=True):
        shapes = [(small, small), ((small * next_small) ** 0.5,) * 2]
        for ratio in ratios:
            long, short = small * ratio**0.5, small / ratio**0.5
            shapes += [(long, short), (short, long)]
        y = (torch.arange(height, dtype=torch.float64) + 0.5) / height
        x = (torch.arange(width, dtype=torch.float64) + 0.5) / width
        of_map = torch.empty(height, width, len(shapes), 4, dtype=torch.float64)
        of_map[..., 0] = x[None, :, None]
        of_map[..., 1] = y[:, None, None]
        of_map[..., 2:] = torch.tensor(shapes, dtype=torch.float64)
        anchors.append(of_map.reshape(-1, 4))
    return torch.cat(anchors).clamp(0, 1).float()


def encode(boxes: Tensor, anchors: Tensor) -> Tensor:
    """The regression target of a network: the locations (..., 4) of `boxes` (..., 4; x1 y1 x2 y2) for `anchors`.

    A location is the distance of the centers in units of the anchor's sides, and the logarithms of the ratios of the
    sides, both divided by their variances (SSD, equation 2). Boxes must have width and height above 0.
    """
    top_left, bottom_right = boxes[..., :2], boxes[..., 2:]
    centers, sides = anchors[..., :2], anchors[..., 2:]
    shifts = ((top_left + bottom_right) / 2 - centers) / sides / CENTER_VARIANCE
    growths = ((bottom_right - top_left) / sides).log() / SIZE_VARIANCE
    return torch.cat((shifts, growths), dim=-1)


def decode(locations: Tensor, anchors: Tensor) -> Tensor:
    """Boxes (..., 4; x1 y1 x2 y2) of `locations` (..., 4): the inverse of `encode`.

    Boxes are not clipped to the image.
    """
    centers = anchors[..., :2] + locations[..., :2] * CENTER_VARIANCE * anchors[..., 2:]
    sides = anchors[..., 2:] * (locations[..., 2:] * SIZE_VARIANCE).clamp(max=MAX_GROWTH).exp()
    return torch.cat((centers - sides / 2, centers + sides / 2), dim=-1)


class Detections(NamedTuple):
    """The detections in one image, highest score first."""

    boxes: Tensor
    """(n, 4): x1 y1 x2 y2, relative coordinates, not clipped."""
    scores: Tensor
    """(n,): probabilities."""
    labels: Tensor
    """(n,): classes from 0, without the background."""


def detect(
    class_logits: Tensor,
    locations: Tensor,
    anchors: Tensor,
    *,
    score_threshold: float,
    iou_threshold: float = 0.5,
    max_per_class: int = 200,
    max_per_image: int,
) -> list[Detections]:
    """The detections in each image, from the outputs of an `SSDLite`: softmax, box decoding and NMS.

    Args:
        class_logits: (B, A, num_classes + 1).
        locations: (B, A, 4).
        anchors: (A, 4), see `SSDLite.anchors`.
        score_threshold: lower bound of the probability, exclusive; 0.01 to measure mean average precision.
        iou_threshold: of two boxes of a class with a larger IoU, NMS removes the one with the lower score.
        max_per_class: detections per class and image.
        max_per_image: detections per image.
    """
    return suppress(
        decode(locations.float(), anchors),
        class_logits.float().softmax(dim=-1)[..., 1:],
        score_threshold=score_threshold,
        iou_threshold=iou_threshold,
        max_per_class=max_per_class,
        max_per_image=max_per_image,
    )


def suppress(
    boxes: Tensor,
    scores: Tensor,
    *,
    score_threshold: float,
    iou_threshold: float = 0.5,
    max_per_class: int = 200,
    max_per_image: int,
) -> list[Detections]:
    """Non-maximum suppression: the rest of `detect`, from boxes (B, A, 4) and probabilities (B, A, num_classes)."""
    detections = []
    for scores_AK, boxes_A4 in zip(scores, boxes, strict=True):
        of_anchor, labels = (scores_AK > score_threshold).nonzero(as_tuple=True)
        sorted_scores, order = scores_AK[of_anchor, labels].sort(descending=True, stable=True)
        sorted_boxes, labels = boxes_A4[of_anchor[order]], labels[order]
        # Only boxes with higher scores suppress a box, so NMS of the top candidates gives the first survivors of NMS of
        # all candidates. Start with few and widen until `max_per_image` boxes survive: in an untrained network nearly
        # all anchors of every class are candidates, and NMS of all takes a second.
        num = max(MIN_CANDIDATES, 4 * max_per_image)
        while True:
            survivors = _batched_nms(sorted_boxes[:num], sorted_scores[:num], labels[:num], iou_threshold)
            survivors = survivors[_rank_in_class(labels[survivors]) < max_per_class][:max_per_image]
            if len(survivors) == max_per_image or num >= len(order):
                break
            num *= 4
        detections.append(Detections(sorted_boxes[survivors], sorted_scores[survivors], labels[survivors]))
    return detections


def _batched_nms(boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float) -> Tensor:
    """`torchvision.ops.batched_nms`: the indices that survive NMS within each class, highest score first.

    `import torchvision` imports torch's compiler, which takes as long as `import torch`. A prediction of one image
    loads only torchvision's kernels.
    """
    if not len(boxes):
        return torch.empty(0, dtype=torch.int64, device=boxes.device)
    spec = importlib.util.find_spec("torchvision")
    kernels = Path(spec.origin).with_name("_C.so") if spec and spec.origin else Path()
    if len(boxes) > 1000 or "torchvision" in sys.modules or not kernels.is_file():
        from torchvision.ops import batched_nms

        return batched_nms(boxes, scores, labels, iou_threshold)
    torch.ops.load_library(kernels)
    # As torchvision does for up to 1,000 boxes: move the classes apart, so that boxes of two classes do not overlap.
    offsets = labels.to(boxes) * (boxes.max() + 1)
    return torch.ops.torchvision.nms(boxes + offsets[:, None], scores, iou_threshold)


def _rank_in_class(labels: Tensor) -> Tensor:
    """For each label, the number of equal labels before it."""
    by_class = labels.argsort(stable=True)
    is_first = torch.ones_like(labels, dtype=torch.bool)
    is_first[1:] = labels[by_class][1:] != labels[by_class][:-1]
    place = torch.arange(len(labels), device=labels.device)
    ranks = torch.empty_like(place)
    ranks[by_class] = place - torch.where(is_first, place, 0).cummax(0).values
    return ranks


def initialize(module: nn.Module) -> None:
    """As in the released code, for all layers but the backbone: weights Xavier uniform (Glorot), biases 0.

    The background has no prior bias, because the loss uses three negatives per positive.
    """
    if isinstance(module, nn.Conv2d):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _check_count(num_classes: int) -> None:
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}; it must be 1 or more, without the background")
