"""What an artifact holds besides the network: the scaling of pixels before it, and what makes boxes of its outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mobilevit.export.rewrite import Half
from mobilevit.images import Preprocessing
from mobilevit.models.ssdlite import CENTRE_VARIANCE, MAX_GROWTH, SIZE_VARIANCE, SSDLite, detect
from mobilevit.tasks.detection import MAX_PER_IMAGE, SCORE_THRESHOLD
from mobilevit.weights import TaskName, Weights

Precision = Literal["fp32", "fp16", "bf16", "int8"]
# The names of the outputs, in their order: as the network gives them, and as answers.
OUTPUTS: Mapping[TaskName, tuple[str, ...]] = {
    "classify": ("logits",),
    "detect": ("boxes", "scores"),
    "segment": ("logits",),
}
ANSWERS: Mapping[TaskName, tuple[str, ...]] = {"detect": ("boxes", "scores", "labels"), "segment": ("classes",)}
# What a detector with NMS inside answers is as much as average precision is measured on (`SCORE_THRESHOLD`,
# `MAX_PER_IMAGE`), best first: where to stop is decided by those who read it.
IOU_THRESHOLD = 0.5
NOTHING = -1  # the label where there is no further box


@dataclass(frozen=True)
class Target:
    """What an artifact is to be: its numbers, its input and its outputs.

    The input is float32 (batch, 3, height, width), scaled as the preprocessing says; with `uint8` it is (batch, height,
    width, 3), 0 to 255, as cameras and image files have it. Channels are R, G, B either way. What comes out is
    described in docs/export.md, by the names of `OUTPUTS`, or with `answers` of `ANSWERS`.
    """

    precision: Precision
    height: int
    width: int
    batch_size: int = 1
    dynamic_batch: bool = False
    dynamic_size: bool = False
    uint8: bool = False
    task: TaskName = "classify"
    answers: bool = False

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of what comes out."""
        return (ANSWERS if self.answers else OUTPUTS)[self.task]

    @property
    def open_axes(self) -> dict[int, tuple[str, int]]:
        """The axes of the input that are left open, with a name and the least that each can be."""
        axes = {0: ("batch", 1)} if self.dynamic_batch else {}
        if self.dynamic_size:
            first = 1 if self.uint8 else 2
            axes |= {first: ("height", 65), first + 1: ("width", 65)}
        return axes

    def dynamic_shapes(self) -> tuple[dict[int, torch.export.Dim]] | None:
        """The open axes as `torch.export.export` wants them."""
        dims = {axis: torch.export.Dim(name, min=least) for axis, (name, least) in self.open_axes.items()}
        return (dims,) if dims else None

    def example(self) -> Tensor:
        """An input of the right shape and type."""
        # Of one image torch.export would conclude, without a word, that there is always one.
        batch_size = max(2, self.batch_size) if self.dynamic_batch else self.batch_size
        shape = (batch_size, 3, self.height, self.width)
        if self.uint8:
            return torch.zeros(shape, dtype=torch.uint8).permute(0, 2, 3, 1).contiguous()
        return torch.zeros(shape)


class Deployed(nn.Module):
    """The network with what stands before and behind it in an artifact: images as `Target` says -> its outputs.

    `finish` is what makes them of those of the network. It has no weights to speak of, and lower precisions leave it
    alone: the place of a box wants more digits than int8 and fp16 have.
    """

    scale: Tensor
    shift: Tensor | None

    def __init__(self, network: nn.Module, preprocessing: Preprocessing, uint8: bool, finish: nn.Module | None = None):
        super().__init__()
        self.network = network
        self.finish = finish or nn.Identity()
        self.uint8 = uint8
        scale = torch.tensor([255 * std for std in preprocessing.std])[:, None, None]
        shift = torch.tensor(preprocessing.mean)[:, None, None] / torch.tensor(preprocessing.std)[:, None, None]
        self.register_buffer("scale", 1 / scale)
        self.register_buffer("shift", shift if any(preprocessing.mean) else None)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """What `Target.outputs` names."""
        if self.uint8:
            images = images.permute(0, 3, 1, 2).to(self.scale.dtype) * self.scale
            if self.shift is not None:
                images = images - self.shift
        return self.finish(self.network(images))


def deployed(weights: Weights, target: Target) -> Deployed:
    """The network of `weights` as `target` wants it, in torch: what an artifact is made from and compared with."""
    network, finish = weights.build(), None
    if isinstance(network, SSDLite):
        finish = Boxes(network.anchors(target.height, target.width))
        if target.answers:
            finish = Found(finish)
    elif target.answers:
        finish = Classes()
    return Deployed(network, weights.preprocessing, target.uint8, finish).eval().requires_grad_(False)


def in_half(model: nn.Module) -> nn.Module:
    """`model`, changed so that its network computes in half precision, and what stands around that as it did."""
    if not isinstance(model, Deployed):
        return Half(model)
    model.network = Half(model.network)
    return model


def before_nms(model: nn.Module) -> tuple[nn.Module, bool]:
    """`model`, changed so that it ends where NMS would begin; and whether that had to be taken away."""
    if isinstance(model, Deployed) and isinstance(model.finish, Found):
        model.finish = model.finish.boxes
        return model, True
    return model, False


class Boxes(nn.Module):
    """Of an `SSDLite`'s outputs the boxes (B, A, 4) and the scores (B, A, classes), without the background.

    As `ssdlite.decode` does it, with what only depends on the anchors computed beforehand.
    """

    centres: Tensor
    moves: Tensor
    halves: Tensor

    def __init__(self, anchors: Tensor):
        super().__init__()
        self.register_buffer("anchors", anchors, persistent=False)
        self.register_buffer("centres", anchors[:, :2].contiguous())
        self.register_buffer("moves", CENTRE_VARIANCE * anchors[:, 2:])
        self.register_buffer("halves", anchors[:, 2:] / 2)

    def forward(self, outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """x1 y1 x2 y2 in units of the image, not clipped; probabilities."""
        class_logits, locations = outputs
        centres = self.centres + locations[..., :2] * self.moves
        halves = self.halves * (locations[..., 2:] * SIZE_VARIANCE).clamp(max=MAX_GROWTH).exp()
        return torch.cat((centres - halves, centres + halves), dim=-1), class_logits.softmax(dim=-1)[..., 1:]


class Found(nn.Module):
    """Of an `SSDLite`'s outputs the boxes that it has found, filled up to `MAX_PER_IMAGE` with score 0, best first.

    No exporter takes this as it is: backends that have NMS put it behind `boxes` themselves.
    """

    def __init__(self, boxes: Boxes):
        super().__init__()
        self.boxes = boxes

    def forward(self, outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (B, found, 4), scores (B, found), labels (B, found), int32, -1 where there is none."""
        anchors = self.boxes.get_buffer("anchors")
        of_images = detect(
            *outputs,
            anchors,
            score_threshold=SCORE_THRESHOLD,
            iou_threshold=IOU_THRESHOLD,
            max_per_image=MAX_PER_IMAGE,
        )
        boxes = torch.zeros(len(of_images), MAX_PER_IMAGE, 4)
        scores = torch.zeros(len(of_images), MAX_PER_IMAGE)
        labels = torch.full((len(of_images), MAX_PER_IMAGE), NOTHING, dtype=torch.int32)
        for i, found in enumerate(of_images):
            number = len(found.scores)
            boxes[i, :number], scores[i, :number], labels[i, :number] = found.boxes, found.scores, found.labels.int()
        return boxes, scores, labels


class Classes(nn.Module):
    """Of logits (B, classes, H, W) the class of every pixel, (B, H, W), int32."""

    def forward(self, logits: Tensor) -> Tensor:
        """The class with the largest logit."""
        return logits.argmax(dim=1).to(torch.int32)
