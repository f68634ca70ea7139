"""The models of the comparison, listed in `models.toml`, and their constructors."""

from __future__ import annotations

import pkgutil
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from typing import Any, Literal

import torchvision
from torch import nn

from mobilevit.benchmark.rivals import TransformersLogits
from mobilevit.defaults import MIN_SIZE_PX
from mobilevit.files import require
from mobilevit.messages import nearest

Family = Literal["cnn", "vit", "mobilevit"]
Library = Literal["timm", "torchvision", "transformers", "ours"]
Augmentation = Literal["basic", "advanced"]
OWN_PAPER = "own paper"


@dataclass(frozen=True)
class LibraryWeights:
    """Trained weights of the same model in a library, and their top-1 as the library reports it."""

    id: str
    top1: float


@dataclass(frozen=True, kw_only=True)
class Model:
    """A classifier. `models.toml` describes the fields; `builder` takes the number of classes and the image size."""

    name: str
    family: Family
    library: Library
    builder: Callable[[int, int], nn.Module]
    size_px: int
    paper: str
    size_multiple_px: int = 1

    def build(self, num_classes: int = 1000, size_px: int | None = None) -> nn.Module:
        """The model with random weights: RGB images (B, 3, size, size) -> logits (B, num_classes).

        Args:
            num_classes: 1 or more.
            size_px: image size, by default that of the published figures. CNNs also accept other sizes than the one
                they are built for, most transformers do not.

        Raises:
            ValueError: the library is not installed, or the size or number of classes is not supported.
        """
        size_px = size_px or self.size_px
        self.check_size(size_px)
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; it must be 1 or more")
        return self.builder(num_classes, size_px)

    def check_size(self, size_px: int) -> None:
        """Raise ValueError if the model cannot be built for images of `size_px`."""
        if size_px < MIN_SIZE_PX:
            raise ValueError(f"size_px is {size_px}; {self.name} requires {MIN_SIZE_PX} or more")
        if size_px % self.size_multiple_px:
            raise ValueError(f"size_px is {size_px}; {self.name} requires a multiple of {self.size_multiple_px}")


@dataclass(frozen=True, kw_only=True)
class PublishedModel(Model):
    """A model with published figures."""

    published_parameters: int
    published_top1: float
    augmentation: Augmentation | None
    source: str
    library_weights: tuple[LibraryWeights, ...]


def require_library(library: str) -> Any:
    """Import a library that models of the comparison are from."""
    return require(library, "compare", f"a comparison with models of {library}")


def check_names(names: Sequence[str], known: Collection[str]) -> None:
    """Raise ValueError if one of `names` is not among `known`, with the most similar names."""
    for name in names:
        if name not in known:
            raise ValueError(f"there is no model {name!r}; {nearest(name, known)}the models are {', '.join(known)}")


def network_key(name: str) -> str:
    """Equal for entries that are the same network, trained in two ways."""
    return name.removesuffix("-basic")


def _build(entry: Mapping[str, Any], num_classes: int, size_px: int) -> nn.Module:
    library, constructor, arguments = entry["library"], entry["constructor"], entry.get("arguments", {})
    takes_size = entry.get("takes_size", False)
    if library == "timm":
        size = {"img_size": size_px} if takes_size else {}
        return require_library("timm").create_model(constructor, num_classes=num_classes, **size, **arguments)
    if library == "torchvision":
        return getattr(torchvision.models, constructor)(num_classes=num_classes, **arguments)
    if library == "transformers":
        transformers = require_library("transformers")
        config = getattr(transformers, f"{constructor}Config")(image_size=size_px, num_labels=num_classes)
        return TransformersLogits(getattr(transformers, f"{constructor}ForImageClassification")(config))
    size = {"size_px": size_px} if takes_size else {}
    return pkgutil.resolve_name(constructor)(num_classes=num_classes, **size, **arguments)


def _common_fields(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        **{key: entry[key] for key in ("family", "library", "size_px", "paper")},
        "builder": partial(_build, entry),
        "size_multiple_px": entry.get("size_multiple_px", 32 if entry["family"] == "vit" else 1),
    }


_TABLE = tomllib.loads(resources.files("mobilevit.compare").joinpath("models.toml").read_text(encoding="utf-8"))
MODELS = {
    name: PublishedModel(
        **_common_fields(name, entry),
        **{key: entry[key] for key in ("published_parameters", "published_top1", "source")},
        augmentation=entry.get("augmentation"),
        library_weights=tuple(LibraryWeights(**weights) for weights in entry.get("library_weights", ())),
    )
    for name, entry in _TABLE["published"].items()
}
SCALED = {name: Model(**_common_fields(name, entry)) for name, entry in _TABLE["scaled"].items()}
MOBILEVITS = tuple(name for name, model in MODELS.items() if model.family == "mobilevit")
