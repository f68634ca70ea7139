"""Classifiers of other libraries, trained by the same loop (`mobilevit compare` uses this)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from mobilevit.data.loader import ImageDataset
from mobilevit.files import write_atomic
from mobilevit.images import Preprocessing
from mobilevit.recipes import Recipe
from mobilevit.tasks.classification import preprocessing_of
from mobilevit.weights import OTHER, to_safetensors


class ExternalClassifier(Protocol):
    """A classifier of another library."""

    @property
    def name(self) -> str:
        """Unique name: a run is never resumed with a network of another name."""
        ...

    def build(self, num_classes: int, size_px: int) -> nn.Module:
        """The network with random weights: RGB images (B, 3, size, size) from 0 to 1 -> logits (B, num_classes)."""
        ...


@dataclass(frozen=True)
class ExternalWeights:
    """The counterpart of `Weights` for an `ExternalClassifier`, as far as the training loop needs it."""

    name: str
    network: nn.Module
    preprocessing: Preprocessing
    class_names: tuple[str, ...]

    def build(self) -> nn.Module:
        """The network with its initial weights."""
        return self.network

    def write(self, tensors: Mapping[str, Tensor], training: Mapping[str, Any], path: Path) -> None:
        """Write `tensors` to a .safetensors file with the name of the network, by which other commands reject it."""
        description = {
            "network": self.name,
            "preprocessing": self.preprocessing.to_dict(),
            "class_names": self.class_names,
            "training": dict(training),
        }
        # The format does not allow tensors that share memory, which these networks may contain.
        copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        content = to_safetensors(copies, {OTHER: json.dumps(description)})
        write_atomic(path, content)


def check_recipe(recipe: Recipe) -> None:
    """Check that `recipe` uses no feature that only MobileViT supports.

    Raises:
        ValueError: a task other than classification with one or several labels per image, several image sizes, a frozen
            or scaled backbone, synchronized batch norm, or quantization-aware training.
    """
    if recipe.task not in ("classify", "multilabel"):
        raise ValueError(
            f"task is {recipe.task}; to train other networks than MobileViT it must be classify or multilabel"
        )
    for name, value, required in (
        ("sampler.variant", recipe.sampler.variant, "standard"),  # transformers are built for one size
        ("optimizer.freeze", recipe.optimizer.freeze, "nothing"),
        ("optimizer.backbone_lr_scale", recipe.optimizer.backbone_lr_scale, 1.0),
        ("compute.sync_batch_norm", recipe.compute.sync_batch_norm, False),  # converting drops timm's activations
        ("compute.quantization_aware", recipe.compute.quantization_aware, False),  # torch's attention skips its layers
    ):
        if value != required:
            raise ValueError(f"{name} is {value}; to train other networks than MobileViT it must be {required}")


def initial_weights(classifier: ExternalClassifier, recipe: Recipe, train_set: ImageDataset) -> ExternalWeights:
    """The initial weights of `classifier` for the classes of `train_set`."""
    class_names = train_set.source.class_names
    network = classifier.build(len(class_names), recipe.data.size_px)
    return ExternalWeights(classifier.name, network, preprocessing_of(recipe), class_names)
