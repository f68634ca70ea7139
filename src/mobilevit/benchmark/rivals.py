"""Models of other libraries for the same tasks. None of our rewrites for inference applies to them."""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mobilevit.files import require
from mobilevit.messages import nearest
from mobilevit.models.deeplabv3 import PAPER_HEAD, DeepLabHead
from mobilevit.models.mobilevit import ARCHITECTURES
from mobilevit.weights import (
    NETWORKS,
    PAPER_PREPROCESSING,
    PREPROCESSING,
    PUBLISHED_STRIDES,
    TaskName,
    Weights,
    write,
)

Model = TypeVar("Model", bound=nn.Module)
LIBRARIES = ("timm", "transformers", "torchvision")
SAME_MODEL = ("timm", "transformers")  # names of the library's own MobileViT
TORCHVISION = {"classify": torchvision.models, "detect": torchvision.models.detection}
TORCHVISION |= {"segment": torchvision.models.segmentation}


def random_weights(
    name: str,
    seed: int = 0,
    *,
    task: TaskName = "classify",
    num_classes: int | None = None,
    output_stride: int | None = None,
    head: DeepLabHead = PAPER_HEAD,
) -> Weights:
    """Random weights of the published size `name`, suitable for timing (see `randomize`); defaults as published."""
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    stride = output_stride or (PUBLISHED_STRIDES.get(head, 16) if task == "segment" else 32)
    if task != "detect":
        options["output_stride"] = stride
    if task == "segment":
        options["head"] = head
    model = randomize(NETWORKS[task](name, **options), seed)
    return Weights(
        ARCHITECTURES[name],
        model.state_dict(),
        PREPROCESSING[task],
        output_stride=stride,
        task=task,
        head=head if task == "segment" else None,
    )


def build(name: str, weights: Weights, *, exportable: bool = False, seed: int = 0) -> nn.Module:
    """The model `name` of another library for the task of `weights`, in eval mode, with the same kinds of outputs.

    Args:
        name: "timm" or "transformers" for the library's MobileViT with these `weights`. "timm:NAME", "torchvision:NAME"
            or NAME (timm's, else torchvision's) for another model with random weights. Detectors must be SSD models of
            torchvision.
        weights: weights of MobileViT. They determine the task and, for detection and segmentation, the classes.
        exportable: passed to timm, which then avoids operators that converters reject.
        seed: seed of the random weights.

    Raises:
        ValueError: the library is not installed, has no such model, or cannot represent `weights`.
    """
    library, _, model_name = name.partition(":")
    task = weights.task
    if (name in SAME_MODEL or library == "timm") and task != "classify" and (name, task) != ("transformers", "segment"):
        raise ValueError(f"{library} has no model for the task {task!r}; give one of torchvision as torchvision:NAME")
    if name == "timm":
        model = _mobilevit_of_timm(weights, exportable)
    elif name == "transformers":
        model = _mobilevit_of_transformers(weights)
    elif library == "transformers" and model_name:
        raise ValueError(f"transformers is supported for MobileViT only; use 'transformers' instead of {name!r}")
    elif library in LIBRARIES and model_name:
        model = randomize(_create(library, model_name, weights, exportable), seed)
    else:
        found = [library for library in ("timm", "torchvision") if not model_name and _has(library, name, task)]
        if not found:
            raise ValueError(
                f"there is no model {name!r}; {nearest(name, _model_names('timm', task))}the choices are self, timm, "
                "transformers, timm:NAME, torchvision:NAME, and the name of a timm model"
            )
        model = randomize(_create(found[0], name, weights, exportable), seed)
    return protect_silu(model.eval().requires_grad_(False))


def randomize(model: Model, seed: int) -> Model:
    """Random weights that preserve the scale of the activations through the model; also sets eval mode.

    The default initialization is unsuitable for timing: activations decay to denormal numbers, which are many times
    slower to compute with. It is also unsuitable for tests: norms have statistics of 0 and 1, so swapping two of them
    has no effect.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
                module.running_mean.copy_(0.1 * normal(module.running_mean))
                module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=generator))
            for name, x in module.named_parameters(recurse=False):
                if name == "bias":
                    x.copy_(0.1 * normal(x))
                elif x.ndim <= 1:  # the weight of a norm, or a layer scale
                    x.copy_(1 + 0.1 * normal(x))
                else:
                    x.copy_(1.3 * normal(x) / x[0].numel() ** 0.5)
    return model.eval()


class SiLU(nn.Module):
    """`nn.SiLU` as another type, which our rewrites do not recognize; element-wise."""

    def __init__(self, inplace: bool):
        super().__init__()
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x, inplace=self.inplace)


def protect_silu(model: Model) -> Model:
    """Replace every `nn.SiLU` of `model` so that the rewrites for inference leave the model as it is."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.SiLU):
                setattr(parent, name, SiLU(child.inplace))
    return model


def check_scale(name: str, logits: Tensor) -> None:
    """Check that `randomize` preserved the scale of the activations of a model.

    Raises:
        ValueError: `logits` are not finite, or nearly constant.
    """
    std = float(logits.std())
    if not (math.isfinite(std) and std > 1e-4):
        raise ValueError(
            f"{name}: with random weights the standard deviation of its logits is {std:.1e}, so times are meaningless; "
            "choose another model"
        )


class TransformersLogits(nn.Module):
    """The logits of a transformers model; a map of logits is resized to the size of the image."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits = self.model(images, return_dict=False)[0]
        if logits.ndim == 2:
            return logits
        return F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)


class _Detector(nn.Module):
    """The outputs of torchvision's SSD models before box decoding: class logits and box regression."""

    def __init__(self, model: Any):
        super().__init__()
        self.backbone, self.head = model.backbone, model.head

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.head(list(self.backbone(images).values()))
        return outputs["cls_logits"], outputs["bbox_regression"]


class _Segmentation(nn.Module):
    """The logits of torchvision's segmentation models, at the size of the image."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)["out"]


def _mobilevit_of_timm(weights: Weights, exportable: bool) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "timm.safetensors"
        write(replace(weights, preprocessing=PAPER_PREPROCESSING), file, "timm")
        return _require("timm").create_model(
            f"mobilevit_{weights.architecture.name}",
            num_classes=weights.num_classes,
            checkpoint_path=str(file),
            exportable=exportable,
        )


def _mobilevit_of_transformers(weights: Weights) -> nn.Module:
    transformers = _require("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        # Only the model is timed. Its preprocessing is replaced, because the format cannot represent every one.
        write(replace(weights, preprocessing=PAPER_PREPROCESSING), folder, "transformers")
        kind = "ImageClassification" if weights.task == "classify" else "SemanticSegmentation"
        model = getattr(transformers, f"MobileViTFor{kind}").from_pretrained(folder)
    stem = model.mobilevit.conv_stem.convolution
    stem.weight.data = stem.weight.data.flip(1).contiguous()  # BGR -> RGB, the input of all other models
    return TransformersLogits(model)


def _create(library: str, name: str, weights: Weights, exportable: bool) -> nn.Module:
    task = weights.task
    if not _has(library, name, task):
        listing = "timm.list_models()" if library == "timm" else f"list_models({TORCHVISION[task].__name__})"
        hint = nearest(name, _model_names(library, task))
        raise ValueError(f"{library} has no model {name!r}; {hint}{listing} lists the models")
    if library == "timm":
        return _require("timm").create_model(name, exportable=exportable)
    if task == "classify":
        return torchvision.models.get_model(name)
    num_classes = weights.num_classes + (task == "detect")  # torchvision counts the background as a class
    model = torchvision.models.get_model(name, weights_backbone=None, num_classes=num_classes)
    if task == "segment":
        return _Segmentation(model)
    if not isinstance(model, torchvision.models.detection.ssd.SSD):
        raise ValueError(f"{name} is not an SSD; only SSD detectors are comparable with ours")
    return _Detector(model)


def _has(library: str, name: str, task: TaskName) -> bool:
    if library == "timm":  # also accepts a name with the tag of its weights
        return task == "classify" and _require("timm").is_model(name)
    return name in _model_names(library, task)


def _model_names(library: str, task: TaskName) -> list[str]:
    """The models of a library for a task. timm has classifiers only."""
    if library == "timm":
        return _require("timm").list_models() if task == "classify" else []
    return torchvision.models.list_models(TORCHVISION[task])


def _require(library: str) -> Any:
    return require(library, "compare", f"a comparison with {library}")
