"""The `Weights` record, and the tasks and file formats that it can have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, overload

import torch
from torch import Tensor, nn

from mobilevit.images import Preprocessing
from mobilevit.models.deeplabv3 import DeepLabHead, DeepLabV3
from mobilevit.models.mobilevit import Architecture, MobileViT
from mobilevit.models.ssdlite import NUM_ANCHORS, SSDLite

if TYPE_CHECKING:
    from hashlib import _Hash

Format = Literal["mobilevit", "apple", "timm", "transformers"]
FORMATS: tuple[Format, ...] = get_args(Format)
TaskName = Literal["classify", "multilabel", "detect", "segment"]
NETWORKS: dict[TaskName, type[nn.Module]] = {
    "classify": MobileViT,
    "multilabel": MobileViT,
    "detect": SSDLite,
    "segment": DeepLabV3,
}
# Formats that have a network for the task.
TASK_FORMATS: dict[TaskName, tuple[Format, ...]] = {
    "classify": FORMATS,
    "multilabel": ("mobilevit", "transformers"),
    "detect": ("mobilevit", "apple"),
    "segment": ("mobilevit", "apple", "transformers"),
}
# The tensor whose number of rows gives the number of classes.
CLASSIFIERS: dict[TaskName, str] = {
    "classify": "classifier.weight",
    "multilabel": "classifier.weight",
    "detect": f"heads.{len(NUM_ANCHORS) - 1}.out.weight",
    "segment": "classifier.weight",
}
Network = TypeVar("Network", bound=nn.Module)

# Assumed for files without preprocessing: the evaluation of the paper, and timm's configuration of the same weights.
# Detection and segmentation resize the whole image to a square, because they predict its borders too.
PAPER_PREPROCESSING = Preprocessing(resize_px=288, crop_px=256, interpolation="bilinear")
TIMM_PREPROCESSING = Preprocessing(resize_px=284, crop_px=256, interpolation="bicubic")
PREPROCESSING: dict[TaskName, Preprocessing] = {
    "classify": PAPER_PREPROCESSING,
    "multilabel": PAPER_PREPROCESSING,
    "detect": Preprocessing(resize_px=(320, 320), crop_px=320, interpolation="bilinear"),
    "segment": Preprocessing(resize_px=(512, 512), crop_px=512, interpolation="bilinear"),
}


# Beyond it, probabilities are almost 0 and 1, or almost uniform.
TEMPERATURE_RANGE = (0.2, 11.0)


class WeightsError(ValueError):
    """Weights that cannot be used. The message is one line: file, key, value found, value expected, fix."""


@dataclass(frozen=True)
class Calibration:
    """How logits of a classifier become probabilities, and which predictions are rejected; see docs/calibration.md.

    Attributes:
        temperature: probabilities are softmax(logits / temperature).
        min_probability: predictions with a lower probability are rejected.
        min_precision: the fraction of correct predictions that `min_probability` was chosen for; None without one.

    Raises:
        ValueError: a temperature outside of `TEMPERATURE_RANGE`; another value that is not from 0 to 1.
    """

    temperature: float = 1.0
    min_probability: float = 0.0
    min_precision: float | None = None

    def __post_init__(self) -> None:
        low, high = TEMPERATURE_RANGE
        if not low <= self.temperature <= high:
            raise ValueError(f"temperature is {self.temperature}; it must be from {low} to {high}")
        for name, value in (("min_probability", self.min_probability), ("min_precision", self.min_precision)):
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; it must be from 0 to 1")


UNCALIBRATED = Calibration()


@dataclass(frozen=True)
class Weights:
    """Tensors with the names of this package, for RGB images, and the metadata that is required to use them.

    Attributes:
        class_names: empty if unknown. Background is a class of a segmentation network, but not of a detector.
        training: any JSON: the recipe, the number of epochs and so on.
        has_description: False if the file has no description and the published preprocessing is assumed.
        head: of a segmentation network, else None.
        category_ids: ids of a detector's classes in COCO annotations, which may have gaps; empty if unknown.
        thresholds: of a multi-label classifier: the lowest probability, 0 to 1, at which an image is predicted to have
            each class; empty if unknown.
        calibration: of a classifier; `UNCALIBRATED` unless it was fitted.

    Raises:
        ValueError: an unknown task; `head` without segmentation or segmentation without `head`; a detector with an
            output stride other than 32; a calibration without classification; a number of class names, category ids or
            thresholds that is not the number of classes.
    """

    architecture: Architecture
    tensors: Mapping[str, Tensor]
    preprocessing: Preprocessing = PAPER_PREPROCESSING
    class_names: tuple[str, ...] = ()
    output_stride: int = 32
    training: Mapping[str, Any] = field(default_factory=dict)
    has_description: bool = True
    task: TaskName = "classify"
    head: DeepLabHead | None = None
    category_ids: tuple[int, ...] = ()
    thresholds: tuple[float, ...] = ()
    calibration: Calibration = UNCALIBRATED

    def __post_init__(self) -> None:
        if self.task not in NETWORKS:
            raise ValueError(f"task is {self.task!r}; it can be {', '.join(NETWORKS)}")
        if (self.head is not None) != (self.task == "segment"):
            raise ValueError(
                f"head is {self.head} for the task {self.task!r}; segmentation needs one, other tasks none"
            )
        if self.task == "detect" and self.output_stride != 32:
            raise ValueError(f"output_stride is {self.output_stride}; it must be 32 for a detector")
        if self.category_ids and (self.task != "detect" or len(self.category_ids) != len(self.class_names)):
            raise ValueError(
                f"category_ids are {len(self.category_ids)} for {len(self.class_names)} class names and the task "
                f"{self.task!r}; give one for each named class of a detector, or none"
            )
        if self.thresholds and (self.task != "multilabel" or len(self.thresholds) != self.num_classes):
            raise ValueError(
                f"thresholds are {len(self.thresholds)} for {self.num_classes} classes and the task {self.task!r}; "
                "give one for each class of a multi-label classifier, or none"
            )
        if self.calibration != UNCALIBRATED and self.task != "classify":
            raise ValueError(f"calibration is {self.calibration}, but the task is {self.task!r}; leave it out")
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(f"{len(self.class_names)} class names for {self.num_classes} classes; give one per class")

    @property
    def name(self) -> str:
        """Display name, for example "MobileViT-XXS"."""
        return f"MobileViT-{self.architecture.name.upper()}"

    @property
    def val_fraction(self) -> float | None:
        """Fraction of the training data used for validation if the data have no split; None if unknown."""
        return self.training.get("recipe", {}).get("data", {}).get("val_fraction")

    @property
    def val_data(self) -> str | None:
        """Fingerprint of the validation split of the training run; None if unknown."""
        return self.training.get("val_data")

    @property
    def num_classes(self) -> int:
        """Without the background of a detector; 0 without a classifier."""
        classifier = self.tensors.get(CLASSIFIERS[self.task])
        if classifier is None:
            return 0
        return classifier.shape[0] // NUM_ANCHORS[-1] - 5 if self.task == "detect" else classifier.shape[0]

    @overload
    def build(self) -> Any: ...
    @overload
    def build(self, network: type[Network]) -> Network: ...
    def build(self, network: type[nn.Module] | None = None) -> nn.Module:
        """The network with these weights: float32, in eval mode.

        `network` is a subclass of `MobileViT`, `SSDLite` or `DeepLabV3`, depending on the task; by default that class.

        Raises:
            WeightsError: `network` is for another task.
        """
        base = NETWORKS[self.task]
        network = network or base
        if not issubclass(network, base):
            raise WeightsError(f"weights for the task {self.task!r} need a {base.__name__}, not a {network.__name__}")
        options: dict[str, Any] = {} if self.task == "detect" else {"output_stride": self.output_stride}
        if self.head is not None:
            options["head"] = self.head
        # On the meta device: initial values would be overwritten, and cost time and random numbers.
        with torch.device("meta"):
            model = network(self.architecture, num_classes=self.num_classes, **options)
        # As `to_empty(device="cpu")`, which imports sympy to compute the strides: a fifth of torch's import time.
        model._apply(lambda tensor: torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype))
        model.load_state_dict(self.tensors)
        return model.eval()


def backbone_tensors(weights: Weights) -> dict[str, Tensor]:
    """The backbone's state dict, from weights of any task: a detector can start from a classifier."""
    prefix = "backbone."
    return {key.removeprefix(prefix): value for key, value in weights.tensors.items() if key.startswith(prefix)}


def hash_tensors(digest: _Hash, tensors: Mapping[str, Tensor]) -> None:
    """Update `digest`, such as `hashlib.sha256()`, with the names and the values of tensors, in the order of names."""
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
