"""SSDLite on MobileViT (arXiv 2110.02178, section 4.2.1; SSD arXiv 1512.02325, SSDLite arXiv 1801.04381).

Six maps of an image, each coarser than the one before, are looked at by one small head each. In every pixel of a map
stand a few anchors, boxes of fixed shapes; for each of them the head says what is there (class logits, 0 means nothing)
and how the anchor is to be moved and stretched to fit it (locations).

Shapes: as in `mobilevit.py`, and A anchors of an image, K logits of an anchor (classes and background). Boxes are in
units of the image: (0, 0) is its upper left corner and (1, 1) its lower right one, whatever its ratio.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilevit.models.mobilevit import Architecture, Backbone, ConvNorm, S

EXTRA_CHANNELS = (256, 128, 128)  # of the maps behind the backbone, each half as wide as the one before
POOLED_CHANNELS = 64  # of the last map, one pixel for the whole image
HEAD_CHANNELS = (512, 256, *EXTRA_CHANNELS)  # in the heads of all maps but the last
RATIOS = ((2, 3), (2, 3), (2, 3), (2, 3), (2, 3), (2,))  # of the sides of the anchors that are no squares, by map
NUM_ANCHORS = tuple(2 + 2 * len(ratios) for ratios in RATIOS)  # in a pixel: two squares, each ratio wide and tall
MIN_SCALE, MAX_SCALE = 0.1, 1.05  # sides of the smallest square, and of the one that a seventh map would begin with
CENTRE_VARIANCE, SIZE_VARIANCE = 0.1, 0.2  # locations are divided by these, so that their size is about 1
MAX_GROWTH = math.log(1000 / 16)  # of an anchor's side; keeps exp finite (torchvision's bound)
MIN_CANDIDATES = 1000  # for NMS to begin with, all classes of an image together


class SeparableConv(nn.Module):
    """A 3x3 convolution channel by channel, then a 1x1 one, ReLU; (B, C, H, W) -> (B, out, H / 2, W / 2)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.depthwise = ConvNorm(in_channels, in_channels, 3, stride=2, groups=in_channels, activation=False)
        self.pointwise = ConvNorm(in_channels, out_channels, 1, activation=False)

    def forward(self, x: Tensor) -> Tensor:
        """A map of half the size, rounded up."""
        if self.training and x.shape[3] == 1:
            # Either stride leaves one column. With 2, oneDNN's gradient of the weights reads in bfloat16 memory that
            # nobody wrote (torch 2.15).
            conv = self.depthwise.conv
            x = self.depthwise.norm(F.conv2d(x, conv.weight, stride=(2, 1), padding=1, groups=conv.groups))
        else:
            x = self.depthwise(x)
        return F.relu(self.pointwise(x))


class MapHead(nn.Module):
    """What the anchors of one map see; (B, C, H, W) -> (B, H * W * anchors, 4 + K), the location first.

    `channels` is the width inside; 0 leaves only the last 1x1 convolution, for a map of one pixel.
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
        """Locations and logits, pixel by pixel in rows and anchor by anchor in a pixel."""
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
        num_classes: without the background, which is class 0 of the logits.

    Raises:
        ValueError: an unknown architecture, a class count below 1.
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
            module.apply(initialise)
        self.to(memory_format=torch.channels_last)

    @property
    def num_classes(self) -> int:
        """How many classes there are besides the background."""
        head = self.heads[-1]
        assert isinstance(head, MapHead)
        return head.out.out_channels // head.num_anchors - 5

    def reset_classes(self, num_classes: int) -> None:
        """Forget the classes and make room for `num_classes` new ones.

        Where things are, and that there is nothing, stays learnt: the rows of locations and background are kept.
        """
        _check_count(num_classes)
        for head in self.heads:
            assert isinstance(head, MapHead)
            old = head.out
            new = nn.Conv2d(old.in_channels, head.num_anchors * (5 + num_classes), 1).apply(initialise).to(old.weight)
            with torch.no_grad():
                for theirs, ours in ((old.weight, new.weight), (old.bias, new.bias)):
                    assert theirs is not None
                    assert ours is not None
                    kept = theirs.unflatten(0, (head.num_anchors, -1))[:, :5]
                    ours.unflatten(0, (head.num_anchors, -1))[:, :5] = kept
            head.out = new.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits (B, A, num_classes + 1) and locations (B, A, 4) of RGB `images` (B, 3, H, W) in [0, 1].

        Any H and W from 32 px up; under torch.export with symbols for them from 257 px up, where no map but the last is
        sure to be one pixel. `decode` makes boxes of locations and `anchors`, `detect` finds what to show.
        """
        maps = list(self.backbone(images).values())
        for layer in self.extra_layers:
            maps.append(layer(maps[-1]))
        maps.append(F.relu(self.pooled(maps[-1].mean(dim=(-2, -1), keepdim=True))))
        found = torch.cat([head(x) for head, x in zip(self.heads, maps, strict=True)], dim=1)
        return found[..., 4:], found[..., :4]

    def anchors(self, height_px: int, width_px: int) -> Tensor:
        """Anchors (A, 4) of an image of this size, in the order of the outputs: centre x, y, width, height.

        In units of the image, each value clipped to [0, 1], float32 on the device of the network.
        """
        strides = list(self.backbone.strides.values())
        for _ in self.extra_layers:
            strides.append(2 * strides[-1])
        # Padded as they are, convolutions of stride 2 round up, and so many of them are one division that rounds up.
        sizes = [(-(-height_px // stride), -(-width_px // stride)) for stride in strides]
        sizes.append((1, 1))
        return anchors_of_maps(sizes).to(self.pooled.weight.device)


def anchors_of_maps(sizes: list[tuple[int, int]]) -> Tensor:
    """Anchors (A, 4) of maps of these heights and widths, centre form, float32 (SSD, section 2.2)."""
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
    """The locations (..., 4) by which `anchors` (..., 4; centre form) become `boxes` (..., 4; x1 y1 x2 y2).

    What a network should answer: the way of the centres in sides of the anchor, and the logarithms of how the sides
    grow, divided by the variances (SSD, equation 2). Boxes have width and height above 0.
    """
    top_left, bottom_right = boxes[..., :2], boxes[..., 2:]
    centres, sides = anchors[..., :2], anchors[..., 2:]
    moved = ((top_left + bottom_right) / 2 - centres) / sides / CENTRE_VARIANCE
    grown = ((bottom_right - top_left) / sides).log() / SIZE_VARIANCE
    return torch.cat((moved, grown), dim=-1)


def decode(locations: Tensor, anchors: Tensor) -> Tensor:
    """Boxes (..., 4; x1 y1 x2 y2, in units of the image) of `locations` (..., 4); undoes `encode`.

    They are not clipped, and may reach out of the image.
    """
    centres = anchors[..., :2] + locations[..., :2] * CENTRE_VARIANCE * anchors[..., 2:]
    sides = anchors[..., 2:] * (locations[..., 2:] * SIZE_VARIANCE).clamp(max=MAX_GROWTH).exp()
    return torch.cat((centres - sides / 2, centres + sides / 2), dim=-1)


class Detections(NamedTuple):
    """What was found in one image, best first."""

    boxes: Tensor
    """(found, 4): x1 y1 x2 y2 in units of the image, not clipped."""
    scores: Tensor
    """(found,): probabilities."""
    labels: Tensor
    """(found,): classes from 0, the background not counted."""


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
    """What the outputs of an `SSDLite` show, image by image.

    Args:
        class_logits: (B, A, num_classes + 1).
        locations: (B, A, 4).
        anchors: (A, 4), of images of this size.
        score_threshold: probability that a class must exceed; 0.01 where mean average precision is measured.
        iou_threshold: of two boxes of a class that overlap more than this, the better one stays.
        max_per_class: how many of a class stay, best first.
        max_per_image: how many of all classes then stay, best first.
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
    from torchvision.ops import batched_nms  # on use: importing it takes a second, and classifiers do not need it

    found = []
    for scores_AK, boxes_A4 in zip(scores, boxes, strict=True):
        of_anchor, labels = (scores_AK > score_threshold).nonzero(as_tuple=True)
        sorted_scores, order = scores_AK[of_anchor, labels].sort(descending=True, stable=True)
        sorted_boxes, labels = boxes_A4[of_anchor[order]], labels[order]
        # A box falls to better ones alone, so what stays of the best few are the first of what stays of all. An
        # untrained network shows nearly all its anchors in every class: all of them would take a second.
        num = max(MIN_CANDIDATES, 4 * max_per_image)
        while True:
            kept = batched_nms(sorted_boxes[:num], sorted_scores[:num], labels[:num], iou_threshold)  # best first
            kept = kept[_rank_in_class(labels[kept]) < max_per_class][:max_per_image]
            if len(kept) == max_per_image or num >= len(order):
                break
            num *= 4
        found.append(Detections(sorted_boxes[kept], sorted_scores[kept], labels[kept]))
    return found


def _rank_in_class(labels: Tensor) -> Tensor:
    """For each label, how many equal ones stand before it."""
    by_class = labels.argsort(stable=True)
    is_first = torch.ones_like(labels, dtype=torch.bool)
    is_first[1:] = labels[by_class][1:] != labels[by_class][:-1]
    place = torch.arange(len(labels), device=labels.device)
    ranks = torch.empty_like(place)
    ranks[by_class] = place - torch.where(is_first, place, 0).cummax(0).values
    return ranks


def initialise(module: nn.Module) -> None:
    """As in the released code: all that stands on the backbone Xavier uniform (Glorot), biases 0.

    No bias against objects: with three negatives to a positive in the loss, background does not drown them.
    """
    if isinstance(module, nn.Conv2d):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _check_count(num_classes: int) -> None:
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}; it must be 1 or more, the background not counted")
