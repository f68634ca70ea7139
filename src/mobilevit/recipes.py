"""Training recipes: frozen dataclasses of every value that determines a run. Does not import torch."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import cache, partial
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from mobilevit.defaults import MAX_MEGAPIXELS, MIN_SIZE_PX
from mobilevit.messages import nearest

Size = Literal["xxs", "xs", "s"]
Task = Literal["classify", "multilabel", "detect", "segment", "distill"]
Variant = Literal["standard", "equation", "listing", "v0.1", "main"]
Policy = Literal["basic", "advanced"]
Schedule = Literal["cosine", "wsd"]
Cosine = Literal["step", "epoch"]
MultilabelLoss = Literal["bce", "asymmetric"]
Metric = Literal[
    "auto",
    "top1",
    "balanced_accuracy",
    "macro_f1",
    "map",
    "micro_f1",
    "ap",
    "ap50",
    "miou",
    "pixel_accuracy",
    "agreement",
]
Freeze = Literal["nothing", "stem", "stage1", "stage2", "stage3", "stage4", "stage5"]
Precision = Literal["float32", "bfloat16", "float16"]

METRICS: dict[Task, tuple[Metric, ...]] = {
    "classify": ("top1", "balanced_accuracy", "macro_f1"),
    "multilabel": ("map", "micro_f1", "macro_f1"),
    "detect": ("ap", "ap50"),
    "segment": ("miou", "pixel_accuracy"),
    "distill": ("agreement",),
}
"""The metrics that can select the best epoch, by task. The first one is the default."""


@dataclass(frozen=True)
class Range:
    """The allowed values of a number: `min` and `max` are included, `above` and `below` are not."""

    min: float = -math.inf
    max: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.min <= value <= self.max and self.above < value < self.below

    def __str__(self) -> str:
        low = f"{self.min} or more" if self.min > -math.inf else f"above {self.above}"
        if self.max < math.inf:
            return f"{low}, at most {self.max}"
        return f"{low}, below {self.below}" if self.below < math.inf else low


class _Checked:
    """Base of the dataclasses below. The constructor checks the type and the `Range` of every field.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range.
    """

    def __post_init__(self) -> None:
        prefix = "" if isinstance(self, Recipe) else f"{type(self).__name__.lower()}."
        for name, hint in _type_hints(type(self)).items():
            _check(prefix + name, getattr(self, name), hint)


@cache
def _type_hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def _check(name: str, value: Any, hint: Any) -> None:
    type_, allowed = get_args(hint) if get_origin(hint) is Annotated else (hint, None)
    if get_origin(type_) is Literal:
        if value not in get_args(type_):
            raise ValueError(f"{name} is {value}; it must be one of {', '.join(get_args(type_))}")
    elif get_origin(type_) is tuple:
        if not isinstance(value, tuple):
            raise TypeError(f"{name} is {value!r}; it must be of type tuple")
        if not value:
            raise ValueError(f"{name} is empty; it must have one value or more")
        for item in value:
            _check(name, item, Annotated[get_args(type_)[0], allowed])
    else:
        is_bool_as_number = isinstance(value, bool) and type_ is not bool
        if not isinstance(value, (int, float) if type_ is float else type_) or is_bool_as_number:
            raise TypeError(f"{name} is {value!r}; it must be of type {type_.__name__}")
        if allowed and value not in allowed:
            raise ValueError(f"{name} is {value}; it must be {allowed}{'' if math.isfinite(value) else ', and finite'}")


@dataclass(frozen=True)
class Data(_Checked):
    """Images: size, augmentation, validation split."""

    size_px: Annotated[int, Range(min=MIN_SIZE_PX)] = 256
    """Input size of the network in pixels, height and width."""
    eval_resize: Annotated[float, Range(min=1)] = 1.125
    """Evaluation: resize the short side to this factor times the input size, then crop the center."""
    min_scale: Annotated[float, Range(above=0, max=1)] = 0.08
    """Training: smallest area of a random crop, as a fraction of the image. With 1, crops contain the whole image up to
    an aspect ratio of 4:3."""
    policy: Policy = "basic"
    """Training: augmentation. basic: random crops and horizontal flips, as in the paper; advanced: RandAugment, random
    erasing, Mixup and CutMix as well."""
    flip: bool = True
    """Training: flip images horizontally with probability 0.5. Unsuitable for digits, letters and other images whose
    orientation matters."""
    val_fraction: Annotated[float, Range(above=0, below=1)] = 0.2
    """Validation split: fraction of the images of each class, if the data have no split."""
    num_workers: Annotated[int, Range(min=0)] = 2
    """Number of processes that read images; 0 reads them in the main process."""
    max_unreadable: Annotated[int, Range(min=0)] = 0
    """Maximum number of unreadable images to skip per epoch, in training and in validation each."""
    max_megapixels: Annotated[float, Range(above=0)] = MAX_MEGAPIXELS
    """Largest image to read, in megapixels; larger ones count as unreadable."""
    crops_per_image: Annotated[int, Range(min=1)] = 1
    """Distillation without labels: random crops per image and epoch."""
    cache_mb: Annotated[float, Range(min=0)] = 2000.0
    """Distillation without labels: megabytes of decoded images to store in a temporary file. The other images are
    decoded for each crop."""


@dataclass(frozen=True)
class Sampler(_Checked):
    """Image sizes: one size, or a random size per batch (paper, section 3.3)."""

    variant: Variant = "standard"
    """standard: one image size. Others: multi-scale sampling; the variant determines the batch size at each image size
    (docs/sampler.md)."""
    sizes_px: Annotated[tuple[int, ...], Range(min=MIN_SIZE_PX)] = (160, 192, 256, 288, 320)
    """Image sizes in pixels for multi-scale sampling."""


@dataclass(frozen=True)
class Optimizer(_Checked):
    """AdamW with a linear warm-up and a learning rate schedule."""

    start_lr: Annotated[float, Range(min=0)] = 2e-4
    """Learning rate of the first step."""
    lr: Annotated[float, Range(above=0)] = 2e-3
    """Learning rate at the end of the warm-up."""
    end_lr: Annotated[float, Range(min=0)] = 2e-4
    """Learning rate of the last step."""
    warmup_steps: Annotated[int, Range(min=0)] = 3000
    """Number of warm-up steps, limited to a tenth of the run."""
    schedule: Schedule = "cosine"
    """After the warm-up: a cosine from lr to end_lr; or wsd (warmup-stable-decay), a constant lr and then a cooldown to
    end_lr. wsd suits early stopping, because the cooldown can start at any epoch."""
    cooldown_fraction: Annotated[float, Range(above=0, below=1)] = 0.2
    """wsd: length of the cooldown as a fraction of the run, rounded up to whole epochs."""
    cosine: Cosine = "step"
    """Cosine: update the learning rate every step or, as in v0.1, every epoch."""
    weight_decay: Annotated[float, Range(min=0)] = 0.01
    """Weight decay of AdamW, multiplied by the learning rate in each step."""
    decay_all: bool = True
    """Apply weight decay to all parameters, as published; if off, not to norms and biases."""
    clip_norm: Annotated[float, Range(min=0)] = 0.0
    """Maximum norm of the gradient of all parameters; 0: no clipping, as published."""
    freeze: Freeze = "nothing"
    """Freeze the backbone from the stem up to this stage, including batch norm."""
    backbone_lr_scale: Annotated[float, Range(above=0, max=1)] = 1.0
    """Learning rate of the backbone, as a factor of that of the head."""


@dataclass(frozen=True)
class Compute(_Checked):
    """Precision, compilation and micro-batches."""

    precision: Precision = "float32"
    """float32, or mixed precision: bfloat16, or float16 with loss scaling, as published."""
    compile: bool = False
    """Compile the network once per image size. Takes minutes at the start; intended for GPUs."""
    sync_batch_norm: bool = False
    """Synchronize batch norm across all processes. GPUs only."""
    micro_batch_size: Annotated[int, Range(min=0)] = 0
    """Micro-batch size: images per process and forward pass, at the input size. Gradients are accumulated over the
    batch. 0: as many as fit into memory."""
    quantization_aware: bool = False
    """Round weights and activations to int8 during training: a short fine-tuning of trained weights, if int8 exports
    lose too much accuracy (docs/training.md)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.micro_batch_size == 1:  # batch norm needs two images
            raise ValueError("compute.micro_batch_size is 1; it must be 0, or 2 or more")


@dataclass(frozen=True)
class Distill(_Checked):
    """Knowledge distillation. The options apply to runs with a teacher (--teacher)."""

    soft_weight: Annotated[float, Range(min=0, max=1)] = 0.5
    """Weight of the teacher's class probabilities in the loss; the label loss has the rest. 0: labels only."""
    temperature: Annotated[float, Range(above=0)] = 2.0
    """Temperature of the class probabilities of teacher and student. Higher values weight improbable classes more."""
    feature_weight: Annotated[float, Range(min=0)] = 0.0
    """Weight of the cosine distance between the features of teacher and student. 0: no feature distillation."""
    size_px: Annotated[int, Range(min=0)] = 0
    """Input size of the teacher in pixels; it sees the same crop as the student. 0: that of the student."""


@dataclass(frozen=True)
class Multilabel(_Checked):
    """The loss for several labels per image. The options apply to the task multilabel."""

    loss: MultilabelLoss = "bce"
    """bce: binary cross-entropy of each class; asymmetric: the loss of Ridnik et al. 2021 (arXiv 2009.14119), which
    reduces the effect of the many classes that an image does not have."""
    gamma_negative: Annotated[float, Range(min=0)] = 4.0
    """Asymmetric loss: exponent of the probability p of a class that the image does not have. Higher values reduce the
    effect of classes with a low p."""
    gamma_positive: Annotated[float, Range(min=0)] = 0.0
    """Asymmetric loss: exponent of 1 - p of a class that the image has."""
    margin: Annotated[float, Range(min=0, below=1)] = 0.05
    """Asymmetric loss: p of a class that the image does not have is reduced by this value, to 0 or more. Classes with a
    lower p have no effect."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in fields(self)[1:]:
            value = getattr(self, option.name)
            if self.loss == "bce" and value != option.default:
                raise ValueError(
                    f"multilabel.{option.name} is {value}, but multilabel.loss is bce; set it to asymmetric"
                )


@dataclass(frozen=True)
class Imbalance(_Checked):
    """Classification of imbalanced data. At most one of the options can be used (docs/training.md)."""

    class_weights: Annotated[float, Range(min=0, max=1)] = 0.0
    """Weights of the images in the loss: the inverse number of images of the class, to this power. 1: inverse
    frequency; 0.5: its square root; 0: equal weights."""
    balanced_sampler: bool = False
    """Sample all classes equally often. An epoch has as many images as without the option."""
    logit_adjustment: Annotated[float, Range(min=0)] = 0.0
    """Training: add the logarithm of the class frequencies, times this factor, to the logits. 1: predictions then
    optimize the balanced accuracy; 0: off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        used = [name for name, value in vars(self).items() if value]
        if len(used) > 1:
            values = " and ".join(f"imbalance.{name} is {getattr(self, name)}" for name in used)
            raise ValueError(
                f"{values}, but each of them corrects the class frequencies by itself, and together they overcorrect; "
                "use one of them"
            )


@dataclass(frozen=True)
class Recipe(_Checked):
    """A training run."""

    task: Task = "classify"
    """Task: image classification with one label or with several labels per image, object detection (SSDLite), semantic
    segmentation (DeepLabv3), or distillation of a classifier without labels."""
    architecture: Size = "s"
    """Network size. Default with pretrained weights: their size."""
    epochs: Annotated[int, Range(min=1)] = 300
    """Number of epochs."""
    batch_size: Annotated[int, Range(min=2)] = 128
    """Images per optimizer step, in all processes together. Divided into micro-batches if memory requires it."""
    label_smoothing: Annotated[float, Range(min=0, below=1)] = 0.1
    """Label smoothing: fraction of the target distributed over all classes."""
    ema_decay: Annotated[float, Range(min=0, below=1)] = 0.9995
    """EMA decay per step; reduced in short runs."""
    seed: Annotated[int, Range(min=0, below=2**64)] = 0
    """Random seed of the initial weights, the order of the images and their augmentation."""
    patience: Annotated[int, Range(min=0)] = 0
    """Early stopping: end the run after this number of epochs without an improvement of the metric; 0: never."""
    metric: Metric = "auto"
    """Validation metric for the best epoch and for early stopping. auto: the first one of the task. Classification:
    top1, balanced_accuracy (mean recall of the classes) or macro_f1 (mean F1 of the classes); multilabel: map, micro_f1
    or macro_f1; detection: ap or ap50; segmentation: miou or pixel_accuracy; distill: agreement."""
    data: Data = field(default_factory=Data)
    sampler: Sampler = field(default_factory=Sampler)
    optimizer: Optimizer = field(default_factory=Optimizer)
    compute: Compute = field(default_factory=Compute)
    distill: Distill = field(default_factory=Distill)
    multilabel: Multilabel = field(default_factory=Multilabel)
    imbalance: Imbalance = field(default_factory=Imbalance)


# ---------------------------------------------------------------------------------------------------------------------
# The named recipes. Their docstrings give training time and accuracy; `mobilevit train NAME --help` prints them.
# Recipes of this project clip gradients, which matters in short runs. The published recipes do not.


def plain() -> Recipe:
    """Photographs from scratch: XS at 256 px with the optimizer and augmentation of the paper, 60 epochs.

    Command: mobilevit train plain --data photos/

    Time and accuracy depend on the data. Intended for a few thousand images per class; with fewer, use finetune.
    """
    return Recipe(architecture="xs", epochs=60, batch_size=64, optimizer=Optimizer(warmup_steps=1000, clip_norm=1.0))


def finetune() -> Recipe:
    """Photographs from pretrained weights: XS at 256 px, low learning rates (backbone: a tenth), 20 epochs.

    Command: mobilevit train finetune --data photos/ --weights apple/mobilevit-x-small --download

    Time: about ten minutes for 200 photographs on two cores. Accuracy: not measured.
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


def multilabel() -> Recipe:
    """Photographs with several labels per image, from pretrained weights: the recipe finetune with a sigmoid per class.

    Command: mobilevit train multilabel --data photos/labels.csv --weights apple/mobilevit-x-small --download
    (docs/data.md)

    Images may have no label. --multilabel.loss asymmetric is an alternative for many classes with few labels each.
    The threshold of each class is chosen on the validation split and stored with the weights.

    Time: as finetune. Accuracy: not measured on photographs.
    """
    return replace(finetune(), task="multilabel", label_smoothing=0.0)


def tiny() -> Recipe:
    """Images of 8 to 32 px without horizontal flips, such as digits and letters: XXS at 32 px, 30 epochs.

    Command: mobilevit train tiny --data digits/ (`make demo` creates that folder)

    Time: one minute for 1,198 digits of scikit-learn on two cores. Accuracy: 98 to 99 % on its 599 test digits.
    """
    return Recipe(
        architecture="xxs",
        epochs=30,
        batch_size=32,
        data=Data(size_px=32, eval_resize=1.0, min_scale=0.6, flip=False, num_workers=0),
        optimizer=Optimizer(clip_norm=1.0),
    )


def small() -> Recipe:
    """Images of 28 to 64 px: XXS at 64 px, 30 epochs. Add --no-flip for digits and letters.

    Command: mobilevit train small --data /usr/share/datasets/fashion-mnist (Debian package dataset-fashion-mnist)

    Two processes nearly double the speed on two cores: put OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2
    -m in front of the command.

    Time: 55 minutes for the 60,000 images of Fashion-MNIST on two cores. Accuracy: 93.64 % on its 10,000 test images,
    measured without gradient clipping (benchmarks/fashion_mnist_epyc-2-cores_202611.md); 93.24 % with --epochs 17.
    """
    return Recipe(
        architecture="xxs",
        epochs=30,
        batch_size=64,
        data=Data(size_px=64, eval_resize=1.0, min_scale=0.7, num_workers=0),
        optimizer=Optimizer(lr=3e-3, end_lr=1e-5, warmup_steps=500, weight_decay=0.05, clip_norm=1.0),
    )


def paper(architecture: Size) -> Recipe:
    """ImageNet as in the paper (arXiv 2110.02178, section 4.1): 300 epochs, batch size 1,024, multi-scale.

    Command: torchrun --nproc-per-node 8 -m mobilevit train paper-s --data imagenet/ (docs/training.md)

    Time in the paper: 270 s per epoch on 8 GPUs with multi-scale sampling (380 s without), one day. Not run here.

    Published top-1: XXS 69.0, XS 74.8, S 78.4 (paper, table 6); released weights: 69.0, 74.7, 78.3. Expect +- 0.3.

    The sampler combines the rule of the paper's code listing with the image sizes of its text. This gives 276k updates;
    the paper reports 232k.
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
    """ImageNet as in the released code of the paper (tag cvnets-v0.1), which differs from the paper.

    Command: torchrun --nproc-per-node 8 -m mobilevit train v0.1-s --data imagenet/

    Differences: the cosine schedule changes once per epoch and includes the warm-up; batches are never smaller than the
    base batch size; float16.

    Published top-1: XXS 69.0, XS 74.7, S 78.3 (release notes). Not run here.
    """
    recipe = paper(architecture)
    return replace(
        recipe,
        sampler=Sampler("v0.1"),
        optimizer=Optimizer(cosine="epoch"),
        compute=Compute(precision="float16"),
    )


def main(architecture: Size) -> Recipe:
    """ImageNet as in the later branch `main` of the released code.

    Command: torchrun --nproc-per-node 8 -m mobilevit train main-s --data imagenet/

    Differences from v0.1: 20,000 warm-up steps, smaller batches at large sizes. Not run here.
    """
    return replace(v01(architecture), sampler=Sampler("main"), optimizer=Optimizer(cosine="epoch", warmup_steps=20_000))


def detect() -> Recipe:
    """Object detection in photographs: XXS at 320 px, 60 epochs.

    Command: mobilevit train detect --data photos/ (COCO or VOC layout; docs/detection_segmentation.md)

    A pretrained backbone (--backbone, a hub id or file) improves the AP.

    Time: one hour for 3,000 images, 14 epochs at 256 px, on one core. AP50 51.6 on composite images with 8 classes
    (benchmarks/stamps_epyc-2-cores_202611.md).
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
    """Semantic segmentation of photographs: XXS at 256 px, 60 epochs.

    Command: mobilevit train segment --data photos/ (VOC layout, or images/ and masks/; docs/detection_segmentation.md)

    A pretrained backbone (--backbone, a hub id or file) improves the mIoU.

    Time: one hour for 3,000 images, 12 epochs at 192 px and 2 at 288 px, on one core. mIoU 43.1 on the same composite
    images as detect (benchmarks/stamps_epyc-2-cores_202611.md).
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


def distill() -> Recipe:
    """A classifier from a teacher and images without labels: XXS at 128 px, 30 epochs.

    Command: mobilevit train distill --data photos/ --teacher apple/mobilevit-small --download (docs/distill.md)
    The student learns the classes of the teacher. It serves as --weights or --backbone of other recipes.
    Time: 0.6 hours for 286,000 crops at 64 px with a teacher at 128 px, on two cores. Weights distilled that way raise
    the top-1 accuracy of XXS on 17 classes with few images from 51.1 to 66.5 % (docs/distill.md).
    """
    return Recipe(
        task="distill",
        architecture="xxs",
        epochs=30,
        batch_size=64,
        data=Data(size_px=128),
        optimizer=Optimizer(lr=3e-3, end_lr=1e-5, warmup_steps=500, weight_decay=0.05, clip_norm=1.0),
        distill=Distill(soft_weight=1.0, feature_weight=1.0),
    )


def ssdlite(architecture: Size) -> Recipe:
    """COCO as in the paper (section 4.2): SSDLite at 320 px, 200 epochs, batch size 128, ImageNet backbone.

    Command: torchrun --nproc-per-node 4 -m mobilevit train ssdlite-s --data coco/ --backbone apple/mobilevit-small

    Published AP: XXS 19.9, XS 24.8, S 27.7 (released weights). Not run here.
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
    """PASCAL VOC as in the paper (section 4.2): DeepLabv3 at 512 px, 50 epochs, batch size 128, ImageNet backbone.

    Command: torchrun --nproc-per-node 4 -m mobilevit train deeplabv3-s --data VOCdevkit/VOC2012 --backbone
    apple/mobilevit-small

    The backbone has the learning rate of detection, the head ten times that rate. The paper also trains on SBD and
    COCO.

    Published mIoU: XXS 73.6, XS 77.1, S 79.1 (released weights). Not run here.
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
    "multilabel": multilabel,
    "tiny": tiny,
    "small": small,
    "detect": detect,
    "segment": segment,
    "distill": distill,
    **{
        f"{name}-{size}": partial(make, size)
        for name, make in {
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
"""The recipes by name; `describe` returns the description of one."""


def named(name: str) -> Recipe:
    """The recipe called `name`. Raises ValueError, with the nearest names, for an unknown name."""
    if name not in RECIPES:
        raise ValueError(f"there is no recipe {name!r}; {nearest(name, RECIPES)}the recipes are {', '.join(RECIPES)}")
    return RECIPES[name]


def describe(name: str) -> str:
    """The docstring of a named recipe."""
    make = NAMED[name]
    return inspect.getdoc(make.func if isinstance(make, partial) else make) or ""


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """As plain JSON values; the inverse of `from_dict`."""
    return asdict(recipe)


def from_dict(values: Mapping[str, Any]) -> Recipe:
    """The inverse of `to_dict`. Missing fields have their defaults. Raises ValueError on an unknown field."""
    return _from_dict(Recipe, values)


def _from_dict(cls: type, values: Mapping[str, Any]) -> Any:
    types = get_type_hints(cls)
    if unknown := set(values) - {f.name for f in fields(cls)}:
        raise ValueError(f"this version has no {cls.__name__.lower()} field called {', '.join(sorted(unknown))}")

    def convert(name: str, value: Any) -> Any:
        if is_dataclass(types[name]):
            return _from_dict(types[name], value)
        return tuple(value) if isinstance(value, list) else value  # JSON has no tuples

    return cls(**{name: convert(name, value) for name, value in values.items()})
