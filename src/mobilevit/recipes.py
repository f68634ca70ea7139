"""Recipes: everything that decides what a training run computes, as plain values. No torch in here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal, get_args, get_type_hints

Size = Literal["xxs", "xs", "s"]
Variant = Literal["standard", "equation", "listing", "v0.1", "main"]


@dataclass(frozen=True)
class Data:
    """What is done to the pictures."""

    size_px: int = 256
    """Side of the square that the network sees."""
    eval_resize: float = 1.125
    """Evaluation: the short side is resized to this many times size_px, then the square is cut from the middle."""
    min_scale: float = 0.08
    """Training: smallest share of the picture's area that a random crop keeps; 1 keeps all of it, up to 4:3."""
    flip: bool = True
    """Training: mirror half of the pictures. Wrong for digits, letters and everything else that has a side."""
    val_fraction: float = 0.2
    """Share of the pictures held out for validation, where the data come without a split of their own."""
    num_workers: int = 2
    """Processes that read pictures; 0 reads them in the main process."""

    def __post_init__(self) -> None:
        _require(self.size_px >= 32, "data.size_px", self.size_px, "32 or more")
        _require(1 <= self.eval_resize < math.inf, "data.eval_resize", self.eval_resize, "1 or more, and finite")
        _require(0 < self.min_scale <= 1, "data.min_scale", self.min_scale, "above 0, at most 1")
        _require(0 < self.val_fraction < 1, "data.val_fraction", self.val_fraction, "between 0 and 1")
        _require(self.num_workers >= 0, "data.num_workers", self.num_workers, "0 or more")


@dataclass(frozen=True)
class Sampler:
    """Training at one size, or at a size drawn for every batch (paper, section 3.3)."""

    variant: Variant = "standard"
    """Training at data.size_px alone (standard), or at several sizes, and how the batch then follows the size."""
    sizes_px: tuple[int, ...] = (160, 192, 256, 288, 320)
    """The sizes to draw from; nothing to "standard"."""

    def __post_init__(self) -> None:
        variants = get_args(Variant)
        _require(self.variant in variants, "sampler.variant", self.variant, f"one of {', '.join(variants)}")
        smallest = min(self.sizes_px, default=0)
        _require(smallest >= 32, "sampler.sizes_px", self.sizes_px, "one size or more, from 32 px up")


@dataclass(frozen=True)
class Optimizer:
    """AdamW with a linear warm-up and a cosine, set anew at every step."""

    start_lr: float = 2e-4
    """Rate of the first step."""
    lr: float = 2e-3
    """Rate at the end of the warm-up."""
    end_lr: float = 2e-4
    """Rate of the last step."""
    warmup_steps: int = 3000
    """Steps from start_lr to lr, at most a tenth of the run."""
    weight_decay: float = 0.01
    """On every parameter, as published."""

    def __post_init__(self) -> None:
        _require(0 < self.lr < math.inf, "optimizer.lr", self.lr, "above 0, and finite")
        _require(0 <= self.start_lr < math.inf, "optimizer.start_lr", self.start_lr, "0 or more, and finite")
        _require(0 <= self.end_lr < math.inf, "optimizer.end_lr", self.end_lr, "0 or more, and finite")
        _require(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "0 or more")
        _require(
            0 <= self.weight_decay < math.inf, "optimizer.weight_decay", self.weight_decay, "0 or more, and finite"
        )


@dataclass(frozen=True)
class Recipe:
    """A training run."""

    architecture: Size = "s"
    """Size of the network; weights to start from bring their own."""
    epochs: int = 300
    """Times that every picture is seen."""
    batch_size: int = 128
    """Pictures a step."""
    label_smoothing: float = 0.1
    """Share of the target spread over all classes."""
    ema_decay: float = 0.9995
    """Share of itself that the average of the weights (evaluated and saved) keeps a step; less in short runs."""
    seed: int = 0
    """Of the initial weights, the order of the pictures and their augmentation."""
    data: Data = field(default_factory=Data)
    sampler: Sampler = field(default_factory=Sampler)
    optimizer: Optimizer = field(default_factory=Optimizer)

    def __post_init__(self) -> None:
        _require(self.architecture in get_args(Size), "architecture", self.architecture, ", ".join(get_args(Size)))
        _require(self.epochs >= 1, "epochs", self.epochs, "1 or more")
        # Pairs would leave one of an odd number of pictures alone, and batch norm fails on a single picture.
        _require(self.batch_size >= 2, "batch_size", self.batch_size, "2 or more, for batch norm")
        _require(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "from 0 to below 1")
        _require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "from 0 to below 1")
        _require(0 <= self.seed < 2**64, "seed", self.seed, "from 0 to below 2**64")


def _require(holds: bool, name: str, value: object, range_: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value}; it must be {range_}")


RECIPES: dict[str, Recipe] = {
    # The paper's optimizer and augmentation on a folder of photographs, one process, for as long as a patient person
    # waits: mobilevit train plain --data photos/
    "plain": Recipe(architecture="xs", epochs=60, batch_size=64),
    # Pictures of 8 to 64 px. The handwritten digits of scikit-learn (1,198 for training): two minutes on two cores,
    # at least 98 % of the 599 test digits right (`make demo`): mobilevit train small --data digits/
    "small": Recipe(
        architecture="xxs",
        epochs=30,
        batch_size=32,
        data=Data(size_px=32, eval_resize=1.0, min_scale=0.6, flip=False, num_workers=0),
    ),
}


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """As plain JSON values; `from_dict` undoes it."""
    return asdict(recipe)


def from_dict(values: Mapping[str, Any]) -> Recipe:
    """The recipe of `to_dict`. Raises ValueError on a field that this version does not have."""
    return _from_dict(Recipe, values)


def _from_dict(cls: type, values: Mapping[str, Any]) -> Any:
    types = get_type_hints(cls)
    if unknown := set(values) - {f.name for f in fields(cls)}:
        raise ValueError(f"this version has no {cls.__name__.lower()} field called {', '.join(sorted(unknown))}")

    def convert(name: str, value: Any) -> Any:
        if is_dataclass(types[name]):
            return _from_dict(types[name], value)
        return tuple(value) if isinstance(value, list) else value  # JSON knows no tuples

    return cls(**{name: convert(name, value) for name, value in values.items()})
