"""Recipes: everything that decides what a training run computes, as plain values. No torch in here."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import partial
from typing import Any, Literal, get_args, get_type_hints

from mobilevit.defaults import MAX_MEGAPIXELS
from mobilevit.names import nearest

Size = Literal["xxs", "xs", "s"]
Task = Literal["classify", "detect", "segment"]
Variant = Literal["standard", "equation", "listing", "v0.1", "main"]
Policy = Literal["basic", "advanced"]
Cosine = Literal["step", "epoch"]
Freeze = Literal["nothing", "stem", "stage1", "stage2", "stage3", "stage4", "stage5"]
Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Data:
    """What is done to the images."""

    size_px: int = 256
    """Side of the square that the network sees."""
    eval_resize: float = 1.125
    """Evaluation: the short side is resized to this many times size_px, then the square is cut from the middle."""
    min_scale: float = 0.08
    """Training: smallest share of the image's area that a random crop keeps; 1 keeps all of it, up to 4:3."""
    policy: Policy = "basic"
    """Training: random crop and mirror image alone (basic, the paper's), or RandAugment, random erasing, Mixup and
    CutMix as well (advanced)."""
    flip: bool = True
    """Training: mirror half of the images. Wrong for digits, letters and everything else that has a side."""
    val_fraction: float = 0.2
    """Fraction of each class that validates, where the data come without a split of their own."""
    num_workers: int = 2
    """Processes that read images; 0 reads them in the main process."""
    max_unreadable: int = 0
    """Unreadable images that an epoch may skip in training, and as many in validation; one more stops the run."""
    max_megapixels: float = MAX_MEGAPIXELS
    """Largest image file to read, width times height in millions of pixels; larger ones count as unreadable."""

    def __post_init__(self) -> None:
        _require(self.size_px >= 32, "data.size_px", self.size_px, "32 or more")
        _require(1 <= self.eval_resize < math.inf, "data.eval_resize", self.eval_resize, "1 or more, and finite")
        _require(0 < self.min_scale <= 1, "data.min_scale", self.min_scale, "above 0, at most 1")
        _require_one_of(Policy, "data.policy", self.policy)
        _require(self.max_unreadable >= 0, "data.max_unreadable", self.max_unreadable, "0 or more")
        _require(self.max_megapixels > 0, "data.max_megapixels", self.max_megapixels, "above 0")
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
        _require_one_of(Variant, "sampler.variant", self.variant)
        smallest = min(self.sizes_px, default=0)
        _require(smallest >= 32, "sampler.sizes_px", self.sizes_px, "one size or more, from 32 px up")


@dataclass(frozen=True)
class Optimizer:
    """AdamW with a linear warm-up and a cosine."""

    start_lr: float = 2e-4
    """Rate of the first step."""
    lr: float = 2e-3
    """Rate at the end of the warm-up."""
    end_lr: float = 2e-4
    """Rate of the last step."""
    warmup_steps: int = 3000
    """Steps from start_lr to lr, at most a tenth of the run."""
    cosine: Cosine = "step"
    """Set the rate anew at every step; or only at every epoch, from a cosine over all of them, as v0.1 does."""
    weight_decay: float = 0.01
    """As published; how much of it works on a step grows with the rate."""
    decay_all: bool = True
    """Decay every parameter, as published, or (off) only the kernels and matrices, not norms and biases."""
    clip_norm: float = 0.0
    """Longest gradient, all parameters together; 0 clips nothing, as published."""
    freeze: Freeze = "nothing"
    """Part of the backbone that stays as it is, with its batch norms: from the stem up to this stage."""
    backbone_lr_scale: float = 1.0
    """Rate of the backbone as a multiple of the head's."""

    def __post_init__(self) -> None:
        _require(0 < self.lr < math.inf, "optimizer.lr", self.lr, "above 0, and finite")
        _require(0 <= self.start_lr < math.inf, "optimizer.start_lr", self.start_lr, "0 or more, and finite")
        _require(0 <= self.end_lr < math.inf, "optimizer.end_lr", self.end_lr, "0 or more, and finite")
        _require(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "0 or more")
        _require_one_of(Cosine, "optimizer.cosine", self.cosine)
        _require(
            0 <= self.weight_decay < math.inf, "optimizer.weight_decay", self.weight_decay, "0 or more, and finite"
        )
        _require(0 <= self.clip_norm < math.inf, "optimizer.clip_norm", self.clip_norm, "0 or more, and finite")
        _require_one_of(Freeze, "optimizer.freeze", self.freeze)
        _require(
            0 < self.backbone_lr_scale <= 1,
            "optimizer.backbone_lr_scale",
            self.backbone_lr_scale,
            "above 0, at most 1 (optimizer.freeze keeps a part as it is)",
        )


@dataclass(frozen=True)
class Compute:
    """How a step is computed."""

    precision: Precision = "float32"
    """Of the multiplications: float32, bfloat16, or float16 with a scaled loss, as published."""
    compile: bool = False
    """Compile the network, once for every size; minutes at the start, which pay on a GPU."""
    sync_batch_norm: bool = False
    """Batch norm over the images of all processes instead of each one's own; on GPUs."""
    micro_batch_size: int = 0
    """Images of data.size_px that a process computes at once, so that batch_size is gathered in several parts; 0: as
    many as there is memory for."""

    def __post_init__(self) -> None:
        _require_one_of(Precision, "compute.precision", self.precision)
        at_once = self.micro_batch_size
        _require(at_once == 0 or at_once >= 2, "compute.micro_batch_size", at_once, "0, or 2 or more")


@dataclass(frozen=True)
class Recipe:
    """A training run."""

    task: Task = "classify"
    """What to find out: the class of an image; objects in boxes (SSDLite); the class of every pixel (DeepLabv3)."""
    architecture: Size = "s"
    """Size of the network; weights to start from bring their own."""
    epochs: int = 300
    """Times that every image is seen."""
    batch_size: int = 128
    """Images a step, in all processes together; where they do not fit into memory, in several parts."""
    label_smoothing: float = 0.1
    """Share of the target spread over all classes."""
    ema_decay: float = 0.9995
    """Share of itself that the average of the weights (evaluated and saved) keeps a step; less in short runs."""
    seed: int = 0
    """Of the initial weights, the order of the images and their augmentation."""
    data: Data = field(default_factory=Data)
    sampler: Sampler = field(default_factory=Sampler)
    optimizer: Optimizer = field(default_factory=Optimizer)
    compute: Compute = field(default_factory=Compute)

    def __post_init__(self) -> None:
        _require_one_of(Task, "task", self.task)
        _require_one_of(Size, "architecture", self.architecture)
        _require(self.epochs >= 1, "epochs", self.epochs, "1 or more")
        # Pairs would leave one of an odd number of images alone, and batch norm fails on a single image.
        _require(self.batch_size >= 2, "batch_size", self.batch_size, "2 or more, for batch norm")
        _require(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "from 0 to below 1")
        _require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "from 0 to below 1")
        _require(0 <= self.seed < 2**64, "seed", self.seed, "from 0 to below 2**64")


def _require(holds: bool, name: str, value: object, range_: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value}; it must be {range_}")


def _require_one_of(literal: Any, name: str, value: object) -> None:
    _require(value in get_args(literal), name, value, f"one of {', '.join(get_args(literal))}")


# ---------------------------------------------------------------------------------------------------------------------
# The named recipes. What they cost and give is in their docstrings, which `mobilevit train NAME --help` prints.
# Ours clip gradients: in a short run one step too long can cost points. The published ones do not, as published.


def plain() -> Recipe:
    """Your own photographs from scratch: XS at 256 px with the paper's optimizer and augmentation, 60 epochs.

    Command: mobilevit train plain --data photos/
    Time and score: whatever your images make of it; from a few thousand a class up. With fewer, use finetune.
    """
    return Recipe(architecture="xs", epochs=60, batch_size=64, optimizer=Optimizer(warmup_steps=1000, clip_norm=1.0))


def finetune() -> Recipe:
    """Your own photographs from pretrained weights: low rates, the backbone at a tenth of the head's, 20 epochs.

    Command: mobilevit train finetune --data photos/ --weights apple/mobilevit-x-small --download
    Time: 200 photographs on two cores, some ten minutes. Score: not measured here, for want of published weights.
    """
    return Recipe(
        architecture="xs",
        epochs=20,
        batch_size=32,
        data=Data(min_scale=0.35),
        optimizer=Optimizer(
            start_lr=1e-5, lr=1e-3, end_lr=1e-5, warmup_steps=100, clip_norm=1.0, backbone_lr_scale=0.1
        ),
    )


def tiny() -> Recipe:
    """Images of 8 to 32 px that must not be mirrored, digits and letters say: XXS at 32 px, 30 epochs.

    Command: mobilevit train tiny --data digits/ (`make demo` makes that folder)
    Time: 1,198 digits of scikit-learn, a minute on two cores. Score: 98 to 99 % of its 599 test digits (`make demo`).
    """
    return Recipe(
        architecture="xxs",
        epochs=30,
        batch_size=32,
        data=Data(size_px=32, eval_resize=1.0, min_scale=0.6, flip=False, num_workers=0),
        optimizer=Optimizer(clip_norm=1.0),
    )


def small() -> Recipe:
    """Images of 28 to 64 px: XXS at 64 px, 30 epochs. For digits and letters add --no-flip.

    Command: mobilevit train small --data /usr/share/datasets/fashion-mnist (Debian package dataset-fashion-mnist);
    on two cores nearly twice as fast with OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 -m before it.
    Time: Fashion-MNIST's 60,000 images, 55 minutes on two cores so. Score: 93.64 % of its 10,000 test images, measured
    without clipping (benchmarks/fashion_mnist_epyc-2-cores_202611.md); with --epochs 17 93.24 %.
    """
    return Recipe(
        architecture="xxs",
        epochs=30,
        batch_size=64,
        data=Data(size_px=64, eval_resize=1.0, min_scale=0.7, num_workers=0),
        optimizer=Optimizer(lr=3e-3, end_lr=1e-5, warmup_steps=500, weight_decay=0.05, clip_norm=1.0),
    )


def paper(architecture: Size) -> Recipe:
    """ImageNet as in the paper (arXiv 2110.02178, section 4.1): 300 epochs, effective batch 1,024, multi-scale.

    Command: torchrun --nproc-per-node 8 -m mobilevit train paper-s --data imagenet/ (docs/training.md)
    Time: the paper had 270 s an epoch with its sampler on 8 GPUs (380 s without), a day in all; not run here.
    Score, top-1: XXS 69.0, XS 74.8, S 78.4 (the paper, table 6; the released weights 69.0, 74.7, 78.3); run to run 0.3.
    The sampler follows the paper's listing at the sizes of its text: 276k updates, where the paper counts 232k.
    """
    return Recipe(
        architecture=architecture,
        epochs=300,
        batch_size=1024,
        data=Data(num_workers=8),
        sampler=Sampler("listing"),
        compute=Compute(precision="bfloat16"),
    )


def v01(architecture: Size) -> Recipe:
    """ImageNet as the released code of the paper trains (tag cvnets-v0.1), where it differs from the paper.

    Command: torchrun --nproc-per-node 8 -m mobilevit train v0.1-s --data imagenet/
    Differs: the cosine steps once an epoch and counts the warm-up in; batches never fall below the base batch; float16.
    Score, top-1: XXS 69.0, XS 74.7, S 78.3 (its release notes). Not run here.
    """
    recipe = paper(architecture)
    return replace(
        recipe,
        sampler=Sampler("v0.1"),
        optimizer=Optimizer(cosine="epoch"),
        compute=Compute(precision="float16"),
    )


def main(architecture: Size) -> Recipe:
    """ImageNet as the later branch `main` of the released code trains.

    Command: torchrun --nproc-per-node 8 -m mobilevit train main-s --data imagenet/
    Differs from v0.1: 20,000 warm-up steps, batches that shrink at the large sizes. Not run here.
    """
    return replace(v01(architecture), sampler=Sampler("main"), optimizer=Optimizer(cosine="epoch", warmup_steps=20_000))


def detect() -> Recipe:
    """Boxes around things in your own photographs: XXS at 320 px, 60 epochs.

    Command: mobilevit train detect --data photos/ (COCO's or VOC's layout; docs/dense.md)
    Better: from a trained backbone, --backbone and a name or file as for predict.
    Time: 3,000 images, 14 epochs at 256 px, an hour on one core. Score: AP50 51.6 on 8 kinds of photographs on
    clutter, never seen before (benchmarks/stamps_epyc-2-cores_202611.md).
    """
    return Recipe(
        task="detect",
        architecture="xxs",
        epochs=60,
        batch_size=32,
        label_smoothing=0.0,
        data=Data(size_px=320, eval_resize=1.0),
        optimizer=Optimizer(start_lr=1e-4, lr=2e-3, end_lr=1e-5, warmup_steps=500, clip_norm=1.0),
    )


def segment() -> Recipe:
    """The class of every pixel of your own photographs: XXS at 256 px, 60 epochs.

    Command: mobilevit train segment --data photos/ (VOC's layout, or images/ and masks/; docs/dense.md)
    Better: from a trained backbone, --backbone and a name or file as for predict.
    Time: 3,000 images, 12 epochs at 192 px and 2 at 288 px, an hour on one core. Score: mIoU 43.1, on the same
    photographs as detect (benchmarks/stamps_epyc-2-cores_202611.md).
    """
    return Recipe(
        task="segment",
        architecture="xxs",
        epochs=60,
        batch_size=16,
        label_smoothing=0.0,
        data=Data(size_px=256, eval_resize=1.0),
        optimizer=Optimizer(start_lr=1e-4, lr=2e-3, end_lr=1e-5, warmup_steps=500, clip_norm=1.0),
    )


def ssdlite(architecture: Size) -> Recipe:
    """COCO as in the paper (section 4.2): SSDLite at 320 px, 200 epochs, batch 128, from an ImageNet backbone.

    Command: torchrun --nproc-per-node 4 -m mobilevit train ssdlite-s --data coco/ --backbone apple/mobilevit-small
    Score, mAP: XXS 19.9, XS 24.8, S 27.7 (the released weights'). Not run here.
    """
    return Recipe(
        task="detect",
        architecture=architecture,
        epochs=200,
        batch_size=128,
        label_smoothing=0.0,
        data=Data(size_px=320, eval_resize=1.0, num_workers=8),
        optimizer=Optimizer(start_lr=9e-5, lr=9e-4, end_lr=1e-6, warmup_steps=500),
        compute=Compute(precision="bfloat16", sync_batch_norm=True),
    )


def deeplabv3(architecture: Size) -> Recipe:
    """PASCAL VOC as in the paper (section 4.3): DeepLabv3 at 512 px, 50 epochs, batch 128, from an ImageNet backbone.

    Command: torchrun --nproc-per-node 4 -m mobilevit train deeplabv3-s --data VOCdevkit/VOC2012 --backbone
    apple/mobilevit-small
    The rates are the head's, ten times the backbone's, which are those of detection. The paper adds SBD and COCO.
    Score, mIoU: XXS 73.6, XS 77.1, S 79.1 (the released weights'). Not run here.
    """
    return Recipe(
        task="segment",
        architecture=architecture,
        epochs=50,
        batch_size=128,
        label_smoothing=0.0,
        data=Data(size_px=512, eval_resize=1.0, num_workers=8),
        optimizer=Optimizer(start_lr=9e-4, lr=9e-3, end_lr=1e-5, warmup_steps=500, backbone_lr_scale=0.1),
        compute=Compute(precision="bfloat16", sync_batch_norm=True),
    )


NAMED: dict[str, Callable[[], Recipe]] = {
    "plain": plain,
    "finetune": finetune,
    "tiny": tiny,
    "small": small,
    "detect": detect,
    "segment": segment,
    **{
        f"{name}-{size}": partial(of, size)
        for name, of in {
            "paper": paper,
            "v0.1": v01,
            "main": main,
            "ssdlite": ssdlite,
            "deeplabv3": deeplabv3,
        }.items()
        for size in get_args(Size)
    },
}
RECIPES: dict[str, Recipe] = {name: make() for name, make in NAMED.items()}


def named(name: str) -> Recipe:
    """The recipe called `name`. Raises ValueError, with the nearest names, for an unknown name."""
    if name not in RECIPES:
        raise ValueError(f"there is no recipe {name!r}; {nearest(name, RECIPES)}the recipes are {', '.join(RECIPES)}")
    return RECIPES[name]


def describe(name: str) -> str:
    """What the docstring of a named recipe says."""
    make = NAMED[name]
    return inspect.getdoc(make.func if isinstance(make, partial) else make) or ""


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
