"""The networks that ours is timed against, from the libraries that have them. None of our rewrites reaches them."""

from __future__ import annotations

import importlib
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mobilevit.models.deeplabv3 import PAPER_HEAD, DeepLabHead
from mobilevit.models.mobilevit import ARCHITECTURES
from mobilevit.names import nearest
from mobilevit.weights import (
    NETWORKS,
    PAPER_PREPROCESSING,
    PREPROCESSING,
    PUBLISHED_STRIDES,
    TaskName,
    Weights,
    write,
)

Network = TypeVar("Network", bound=nn.Module)
LIBRARIES = ("timm", "transformers", "torchvision")
TORCHVISION: dict[TaskName, str] = {"detect": "detection", "segment": "segmentation"}  # its parts for the tasks
SAME = ("timm", "transformers")  # names that mean the MobileViT itself, as that library has it


def random_weights(
    name: str,
    seed: int = 0,
    *,
    task: TaskName = "classify",
    num_classes: int | None = None,
    output_stride: int | None = None,
    head: DeepLabHead = PAPER_HEAD,
) -> Weights:
    """Weights of the published size `name` that are good for timing, see `randomise`; for a task as published."""
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    stride = output_stride or (PUBLISHED_STRIDES.get(head, 16) if task == "segment" else 32)
    if task != "detect":
        options["output_stride"] = stride
    if task == "segment":
        options["head"] = head
    model = randomise(NETWORKS[task](name, **options), seed)
    return Weights(
        ARCHITECTURES[name],
        model.state_dict(),
        PREPROCESSING[task],
        output_stride=stride,
        task=task,
        head=head if task == "segment" else None,
    )


def build(name: str, weights: Weights, *, exportable: bool = False, seed: int = 0) -> nn.Module:
    """The network `name` of another library for the same task, in eval mode, with outputs of the kind of ours.

    Args:
        name: "timm" or "transformers" for their MobileViT with these very `weights`; "timm:NAME", "torchvision:NAME" or
            a name alone, which is looked for in timm first, for another network with random weights. For segmentation
            timm has nothing, for detection torchvision alone has, and of that the SSD networks are taken.
        weights: of our network; another one for detection and segmentation gets as many classes.
        exportable: as timm wants it for conversion; other libraries know no difference.
        seed: of the random weights.

    Raises:
        ValueError: a library that is not installed, a network it does not have, weights it cannot express.
    """
    library, _, network = name.partition(":")
    task = weights.task
    if (name in SAME or library == "timm") and task != "classify" and (name, task) != ("transformers", "segment"):
        raise ValueError(f"{library} has no MobileViT for the task {task!r}; name a network as torchvision:NAME")
    if name == "timm":
        module = _mobilevit_of_timm(weights, exportable)
    elif name == "transformers":
        module = _mobilevit_of_transformers(weights)
    elif library == "transformers" and network:
        raise ValueError(f"of transformers only its MobileViT can be timed; say transformers instead of {name}")
    elif library in LIBRARIES and network:
        module = randomise(_create(library, network, weights, exportable), seed)
    elif not network and task == "classify" and _has("timm", name, task):
        module = randomise(_create("timm", name, weights, exportable), seed)
    elif not network and _has("torchvision", name, task):
        module = randomise(_create("torchvision", name, weights, exportable), seed)
    else:
        raise ValueError(
            f"there is no network {name!r} to compare with; {nearest(name, _names('timm', task))}there are self, timm, "
            "transformers, timm:NAME, torchvision:NAME, or the name of a network of timm"
        )
    return keep_silu(module.eval().requires_grad_(False))


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Random weights whose activations keep their scale through the network, for eval.

    Not a default initialisation: where activations fade to denormal numbers, a processor takes its slow path and the
    times mean nothing; where the statistics of the norms are 0 and 1, a mix-up of them goes unseen.
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
                elif x.ndim <= 1:  # of a norm, or a scale of its own
                    x.copy_(1 + 0.1 * normal(x))
                else:
                    x.copy_(1.3 * normal(x) / x[0].numel() ** 0.5)
    return model.eval()


class SiLU(nn.Module):
    """What torch calls `nn.SiLU`, under another type: our rewrites put that in another form, and only ours."""

    def __init__(self, inplace: bool):
        super().__init__()
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        """Element by element."""
        return F.silu(x, inplace=self.inplace)


def keep_silu(network: Network) -> Network:
    """`network`, changed so that `optimize_for_inference` finds nothing in it to rewrite."""
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.SiLU):
                setattr(parent, name, SiLU(child.inplace))
    return network


def check_scale(name: str, logits: Tensor) -> None:
    """Refuse a network in which random weights do not keep their scale.

    Raises:
        ValueError: `logits` that are not finite, or as good as constant.
    """
    spread = float(logits.std())
    if not (math.isfinite(spread) and spread > 1e-4):
        raise ValueError(
            f"{name}: with random weights its logits have a standard deviation of {spread:.1e}, and times of such "
            "numbers mean nothing; name another network"
        )


class _Logits(nn.Module):
    """The answers of transformers' network alone; of a map of them, at the size of the image."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits = self.network(images, return_dict=False)[0]
        if logits.ndim == 2:
            return logits
        return F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)


class _Detector(nn.Module):
    """What torchvision's SSD networks compute before Python makes boxes of it: class logits and locations."""

    def __init__(self, network: Any):
        super().__init__()
        self.backbone, self.head = network.backbone, network.head

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.head(list(self.backbone(images).values()))
        return outputs["cls_logits"], outputs["bbox_regression"]


class _Segmentation(nn.Module):
    """The logits of torchvision's segmentation networks, at the size of the image as they come."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)["out"]


def _mobilevit_of_timm(weights: Weights, exportable: bool) -> nn.Module:
    timm = _import("timm")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "timm.safetensors"
        write(replace(weights, preprocessing=PAPER_PREPROCESSING), file, "timm")
        return timm.create_model(
            f"mobilevit_{weights.architecture.name}",
            num_classes=weights.num_classes,
            checkpoint_path=str(file),
            exportable=exportable,
        )


def _mobilevit_of_transformers(weights: Weights) -> nn.Module:
    transformers = _import("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        # Timed is the network and not its preprocessing, of which it can express only the published one.
        write(replace(weights, preprocessing=PAPER_PREPROCESSING), folder, "transformers")
        kind = "ImageClassification" if weights.task == "classify" else "SemanticSegmentation"
        network = getattr(transformers, f"MobileViTFor{kind}").from_pretrained(folder)
    stem = network.mobilevit.conv_stem.convolution
    stem.weight.data = stem.weight.data.flip(1).contiguous()  # it wants BGR; so it takes the same input as all
    return _Logits(network)


def _create(library: str, network: str, weights: Weights, exportable: bool) -> nn.Module:
    task = weights.task
    if not _has(library, network, task):
        raise ValueError(
            f"{library} has no network {network!r}; {nearest(network, _names(library, task))}"
            f"{_listing(library, task)} lists those it has"
        )
    if library == "timm":
        return _import("timm").create_model(network, exportable=exportable)
    models = _import("torchvision").models
    if task == "classify":
        return models.get_model(network)
    num_classes = weights.num_classes + (task == "detect")  # theirs counts the background
    created = models.get_model(network, weights_backbone=None, num_classes=num_classes)
    if task == "segment":
        return _Segmentation(created)
    if not isinstance(created, models.detection.ssd.SSD):
        raise ValueError(f"{network} is no SSD; of torchvision's detectors only those are timed, as ours is one")
    return _Detector(created)


def _has(library: str, network: str, task: TaskName) -> bool:
    if library == "timm":
        return _import("timm").is_model(network)
    return network in _names(library, task)


def _names(library: str, task: TaskName) -> list[str]:
    """The networks of a library for a task; those of timm are for classification."""
    if library == "timm":
        return _import("timm").list_models() if task == "classify" else []
    models = _import("torchvision").models
    return models.list_models(getattr(models, TORCHVISION[task]) if task in TORCHVISION else models)


def _listing(library: str, task: TaskName) -> str:
    if library == "timm":
        return "timm.list_models()"
    return f"torchvision.models.list_models({'torchvision.models.' + TORCHVISION[task] if task in TORCHVISION else ''})"


def _import(library: str) -> Any:
    try:
        return importlib.import_module(library)
    except ImportError:
        raise ValueError(
            f"{library} is not installed, so nothing can be compared with it: pip install 'mobilevit[compare]'"
        ) from None
