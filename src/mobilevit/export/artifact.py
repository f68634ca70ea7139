"""The exported model, its inputs and its metadata: a network with normalization before and postprocessing after it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from mobilevit.export.rewrite import HalfPrecision
from mobilevit.export_options import Precision
from mobilevit.images import ImageInput, Preprocessing, read_image
from mobilevit.models.ssdlite import CENTER_VARIANCE, MAX_GROWTH, SIZE_VARIANCE, SSDLite, detect
from mobilevit.tasks.detection import MAX_PER_IMAGE, SCORE_THRESHOLD
from mobilevit.weights import UNCALIBRATED, TaskName, Weights

T = TypeVar("T")
# Names of the outputs, in order: the network's outputs, and the decoded outputs.
RAW_OUTPUTS: Mapping[TaskName, tuple[str, ...]] = {
    "classify": ("logits",),
    "multilabel": ("logits",),
    "detect": ("boxes", "scores"),
    "segment": ("logits",),
}
DECODED_OUTPUTS: Mapping[TaskName, tuple[str, ...]] = {
    "detect": ("boxes", "scores", "labels"),
    "segment": ("classes",),
}
# Limits of NMS in an artifact. They are those of an evaluation; applications raise the score threshold.
IOU_THRESHOLD = 0.5
NMS_LIMITS: dict[str, Any] = {
    "score_threshold": SCORE_THRESHOLD,
    "iou_threshold": IOU_THRESHOLD,
    "max_per_image": MAX_PER_IMAGE,
}
NO_LABEL = -1  # label of padding rows


@dataclass(frozen=True)
class ArtifactSpec:
    """Precision, input and outputs of an artifact.

    The input is normalized float32 (batch, 3, height, width) in RGB order. With `uint8` it is (batch, height, width, 3)
    in 0 to 255, as cameras and image files provide it. docs/export.md describes the outputs.
    """

    precision: Precision
    height: int
    width: int
    batch_size: int = 1
    dynamic_batch: bool = False
    dynamic_size: bool = False
    uint8: bool = False
    task: TaskName = "classify"
    postprocess: bool = False
    browser: bool = False  # int8 for WebAssembly
    float_groups: tuple[str, ...] = ()  # of an int8 artifact; see `quantization.group_of`

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs."""
        return (DECODED_OUTPUTS if self.postprocess else RAW_OUTPUTS)[self.task]

    @property
    def dynamic_axes(self) -> dict[int, tuple[str, int]]:
        """Dynamic axes of the input: axis -> (name, minimum)."""
        axes = {0: ("batch", 1)} if self.dynamic_batch else {}
        if self.dynamic_size:
            height_axis = 1 if self.uint8 else 2
            axes |= {height_axis: ("height", 65), height_axis + 1: ("width", 65)}
        return axes

    def dynamic_shapes(self) -> tuple[dict[int, torch.export.Dim]] | None:
        """The dynamic axes, in the format of `torch.export.export`."""
        dims = {axis: torch.export.Dim(name, min=minimum) for axis, (name, minimum) in self.dynamic_axes.items()}
        return (dims,) if dims else None

    def example(self) -> Tensor:
        """Zeros of the input's shape and type."""
        # torch.export would specialize a dynamic batch of 1 to the constant 1.
        batch_size = max(2, self.batch_size) if self.dynamic_batch else self.batch_size
        shape = (batch_size, 3, self.height, self.width)
        if self.uint8:
            return torch.zeros(shape, dtype=torch.uint8).permute(0, 2, 3, 1).contiguous()
        return torch.zeros(shape)

    def file_stem(self, prefix: str) -> str:
        """File name of the artifact, without its ending."""
        task = [] if self.task in ("classify", "multilabel") else [self.task]  # the same network
        flags = [name for name in ("uint8", "postprocess", "browser") if getattr(self, name)]
        return "_".join([prefix, *task, f"{self.height}x{self.width}", self.precision, *flags])


class ExportModel(nn.Module):
    """A network with normalization and postprocessing: images as `ArtifactSpec` describes them -> its outputs.

    Lower precisions apply to `network` only. Box coordinates need more digits than int8 and fp16 have.
    """

    scale: Tensor
    shift: Tensor | None

    def __init__(
        self, network: nn.Module, preprocessing: Preprocessing, uint8: bool, postprocess: nn.Module | None = None
    ):
        super().__init__()
        self.network = network
        self.postprocess = postprocess or nn.Identity()
        self.uint8 = uint8
        scale = torch.tensor([255 * std for std in preprocessing.std])[:, None, None]
        shift = torch.tensor(preprocessing.mean)[:, None, None] / torch.tensor(preprocessing.std)[:, None, None]
        self.register_buffer("scale", 1 / scale)
        self.register_buffer("shift", shift if any(preprocessing.mean) else None)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        if self.uint8:
            images = images.permute(0, 3, 1, 2).to(self.scale.dtype) * self.scale
            if self.shift is not None:
                images = images - self.shift
        return self.postprocess(self.network(images))


def build_export_model(weights: Weights, spec: ArtifactSpec) -> ExportModel:
    """Build the model that is exported, and that the artifact is compared with."""
    network, postprocess = weights.build(), None
    if isinstance(network, SSDLite):
        postprocess = DecodeBoxes(network.anchors(spec.height, spec.width))
        if spec.postprocess:
            postprocess = DetectBoxes(postprocess)
    elif spec.postprocess:
        postprocess = ArgMax()
    return ExportModel(network, weights.preprocessing, spec.uint8, postprocess).eval().requires_grad_(False)


def to_half(model: nn.Module) -> nn.Module:
    """Convert the network of `model` to half precision, in place; inputs, outputs and postprocessing stay float32."""
    if not isinstance(model, ExportModel):
        return HalfPrecision(model)
    model.network = HalfPrecision(model.network)
    return model


def remove_postprocess(model: nn.Module) -> nn.Module:
    """Remove the postprocessing of `model`, in place, and return it; `nn.Identity` if there is none."""
    if not isinstance(model, ExportModel):
        return nn.Identity()
    removed, model.postprocess = model.postprocess, nn.Identity()
    return removed


def remove_nms(model: nn.Module) -> bool:
    """Remove NMS from the end of `model`, in place. Returns whether `model` had NMS."""
    if isinstance(model, ExportModel) and isinstance(model.postprocess, DetectBoxes):
        model.postprocess = model.postprocess.decode_boxes
        return True
    return False


class DecodeBoxes(nn.Module):
    """Outputs of an `SSDLite` -> boxes (B, A, 4) and scores (B, A, classes) without the background class.

    The same as `ssdlite.decode`, with the terms precomputed that depend on the anchors only. Boxes are x1 y1 x2 y2 in
    relative coordinates, not clipped.
    """

    centers: Tensor
    center_scales: Tensor
    half_sides: Tensor

    def __init__(self, anchors: Tensor):
        super().__init__()
        self.register_buffer("anchors", anchors, persistent=False)
        self.register_buffer("centers", anchors[:, :2].contiguous())
        self.register_buffer("center_scales", CENTER_VARIANCE * anchors[:, 2:])
        self.register_buffer("half_sides", anchors[:, 2:] / 2)

    def forward(self, outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        class_logits, locations = outputs
        centers = self.centers + locations[..., :2] * self.center_scales
        half_sides = self.half_sides * (locations[..., 2:] * SIZE_VARIANCE).clamp(max=MAX_GROWTH).exp()
        return torch.cat((centers - half_sides, centers + half_sides), dim=-1), class_logits.softmax(dim=-1)[..., 1:]


class DetectBoxes(nn.Module):
    """Outputs of an `SSDLite` -> boxes (B, M, 4), scores (B, M), labels (B, M) int32 after NMS, by decreasing score.

    M is `MAX_PER_IMAGE`; padding has score 0 and label `NO_LABEL`. This module is only a reference: backends with NMS
    remove it and append their own operators to `decode_boxes`.
    """

    def __init__(self, decode_boxes: DecodeBoxes):
        super().__init__()
        self.decode_boxes = decode_boxes

    def forward(self, outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        detections = detect(*outputs, self.decode_boxes.get_buffer("anchors"), **NMS_LIMITS)
        boxes = torch.zeros(len(detections), MAX_PER_IMAGE, 4)
        scores = torch.zeros(len(detections), MAX_PER_IMAGE)
        labels = torch.full((len(detections), MAX_PER_IMAGE), NO_LABEL, dtype=torch.int32)
        for i, (image_boxes, image_scores, image_labels) in enumerate(detections):
            num = len(image_scores)
            boxes[i, :num], scores[i, :num], labels[i, :num] = image_boxes, image_scores, image_labels.int()
        return boxes, scores, labels


class ArgMax(nn.Module):
    """Logits (B, classes, H, W) -> the class of each pixel (B, H, W), int32."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits.argmax(dim=1).to(torch.int32)


# ---------------------------------------------------------------------------------------------------------------------
# Inputs, outputs and metadata


def artifact_input(source: ImageInput, preprocessing: Preprocessing, spec: ArtifactSpec) -> Tensor:
    """Preprocess one image for the artifact; (1, ...)."""
    if (spec.height, spec.width) == (preprocessing.crop_px, preprocessing.crop_px):
        image = preprocessing.resize_and_crop(read_image(source))
    elif spec.height == spec.width:
        image = preprocessing.at_size(spec.height).resize_and_crop(read_image(source))
    else:  # preprocessing is defined for squares only: resize without cropping
        image = read_image(source).resize((spec.width, spec.height))
    pixels = torch.from_numpy(np.array(image))[None]
    return pixels if spec.uint8 else preprocessing.scale(pixels.permute(0, 3, 1, 2)).contiguous()


def fill_batches(inputs: Sequence[Tensor], batch_size: int) -> Iterator[Tensor]:
    """Yield `inputs`, (1, ...) each, in batches of `batch_size`; the last batch is filled up with the first inputs."""
    for start in range(0, len(inputs), batch_size):
        yield torch.cat([inputs[(start + i) % len(inputs)] for i in range(batch_size)])


def as_arrays(outputs: Tensor | tuple[Tensor, ...]) -> tuple[np.ndarray, ...]:
    """Outputs of a network in the format of an `InferenceFn`."""
    return tuple(x.numpy() for x in ([outputs] if isinstance(outputs, Tensor) else outputs))


def evenly_spaced(items: Sequence[T], num: int) -> list[T]:
    """At most `num` of `items`, evenly spaced, starting with the first."""
    num = min(num, len(items))
    return [items[i * len(items) // num] for i in range(num)]


def metadata_of(weights: Weights, spec: ArtifactSpec, source: str) -> dict[str, str]:
    """The metadata that an artifact stores; values are strings or JSON."""
    training = {"val_fraction": weights.val_fraction, "val_data": weights.val_data}  # to find the validation split
    training = {name: value for name, value in training.items() if value is not None}
    layout = "uint8 (batch, height, width, 3), RGB" if spec.uint8 else "float32 (batch, 3, height, width), RGB"
    return {
        "mobilevit": version("mobilevit"),
        "architecture": weights.architecture.name,
        "task": weights.task,
        "num_classes": str(weights.num_classes),
        "output_stride": str(weights.output_stride),
        **({"head": json.dumps(asdict(weights.head))} if weights.head else {}),
        "outputs": " ".join(spec.outputs),
        **({"nms": json.dumps(NMS_LIMITS)} if weights.task == "detect" and spec.postprocess else {}),
        "precision": spec.precision,
        "size": f"{spec.height} {spec.width}",
        "batch_size": str(spec.batch_size),
        "input": layout,
        "preprocessing": json.dumps(weights.preprocessing.to_dict() | {"scaled_inside": spec.uint8}),
        "class_names": json.dumps(list(weights.class_names), ensure_ascii=False),
        **({"thresholds": json.dumps(weights.thresholds)} if weights.thresholds else {}),
        **({"category_ids": json.dumps(weights.category_ids)} if weights.category_ids else {}),
        **({"calibration": json.dumps(asdict(weights.calibration))} if weights.calibration != UNCALIBRATED else {}),
        **({"training": json.dumps(training)} if training else {}),
        "source": source,
    }
