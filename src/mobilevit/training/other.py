"""Classifiers that are no MobileViT: what the training loop needs to take one of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from mobilevit.data.loader import ImageDataset
from mobilevit.files import write_whole
from mobilevit.images import Preprocessing
from mobilevit.recipes import Recipe
from mobilevit.tasks.classification import preprocessing_of
from mobilevit.weights import OTHER, to_safetensors


class OtherNetwork(Protocol):
    """A classifier by name, and how to build it."""

    @property
    def name(self) -> str:
        """Tells it from all others: a run is never taken up with a network of another name."""
        ...

    def build(self, num_classes: int, size_px: int) -> nn.Module:
        """The network with random weights: RGB images (B, 3, size, size) from 0 to 1 -> logits (B, num_classes)."""
        ...


@dataclass(frozen=True)
class OtherWeights:
    """What `Weights` is to MobileViT, as far as the loop needs it."""

    name: str
    network: nn.Module
    preprocessing: Preprocessing
    class_names: tuple[str, ...]

    def build(self) -> nn.Module:
        """The network with its initial weights."""
        return self.network

    def write(self, tensors: Mapping[str, Tensor], training: Mapping[str, Any], path: Path) -> None:
        """Write trained `tensors` as a .safetensors file that says what network they belong to.

        The other commands refuse it by that name, since they know MobileViT alone.
        """
        description = {
            "network": self.name,
            "preprocessing": self.preprocessing.to_dict(),
            "class_names": self.class_names,
            "training": dict(training),
        }
        # Copies, since a file holds no two tensors in one memory, which networks of others may have.
        copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        content = to_safetensors(copies, {OTHER: json.dumps(description)})
        write_whole(path, lambda target: target.write_bytes(content))


def check_recipe(recipe: Recipe) -> None:
    """Refuse a recipe that asks for what other networks than MobileViT do not have.

    Raises:
        ValueError: another task than classification, several sizes of images, parts of the network treated apart, or
            batch norm over several processes.
    """
    for name, value, needed in (
        ("task", recipe.task, "classify"),
        ("sampler.variant", recipe.sampler.variant, "standard"),  # transformers are built for one size
        ("optimizer.freeze", recipe.optimizer.freeze, "nothing"),
        ("optimizer.backbone_lr_scale", recipe.optimizer.backbone_lr_scale, 1.0),
        ("compute.sync_batch_norm", recipe.compute.sync_batch_norm, False),  # converting drops timm's activations
    ):
        if value != needed:
            raise ValueError(f"{name} is {value}; to train other networks than MobileViT it must be {needed}")


def start(network: OtherNetwork, recipe: Recipe, train_set: ImageDataset) -> OtherWeights:
    """The initial weights of `network` for the classes of `train_set`."""
    class_names = train_set.source.class_names
    built = network.build(len(class_names), recipe.data.size_px)
    return OtherWeights(network.name, built, preprocessing_of(recipe), class_names)
