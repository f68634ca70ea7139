"""Every system of the paper's comparison in one table: what was published about it, and how to build it.

The figures are those that the MobileViT paper (arXiv 2110.02178) prints, read from two independent conversions of its
text, or from one where `source` says so. Top-1 is on ImageNet-1k, in per cent.

`SCALED` has a few of them again, made as large as MobileViT-XXS: for training side by side, where nothing is published.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torchvision
from torch import Tensor, nn

from mobilevit.compare.networks.botnet import botnet50
from mobilevit.compare.networks.ceit import CeiT
from mobilevit.compare.networks.deepvit import DeepViT
from mobilevit.compare.networks.espnet_v2 import ESPNetV2
from mobilevit.compare.networks.local_vit import LocalViT
from mobilevit.compare.networks.mobile_former import M96, M214, MobileFormer
from mobilevit.compare.networks.mobilenet_v1 import MobileNetV1
from mobilevit.compare.networks.t2t_vit import T2TViT
from mobilevit.compare.networks.vil import ViL
from mobilevit.models.mobilevit import MobileViT

Builder = Callable[[int, int], nn.Module]  # of the class count and the side of the images in pixels

LIGHT_CNNS, HEAVY_CNNS, VITS = "figure 6b", "figure 6c", "figure 7"
VITS_ONCE = f"{VITS}, one reading"
OWN_PAPER = "the system's own paper"


@dataclass(frozen=True)
class LibraryWeights:
    """Trained weights of the same network, by a library's id, and their top-1 by the library's own measurement."""

    id: str
    top1: float


@dataclass(frozen=True, kw_only=True)
class Network:
    """A classifier that can be built: for a number of classes, and images of `size_px` or another side.

    `paper` is the arXiv id of its own paper. `size_multiple_px` divides every side that it can be built for: 32 unless
    given if it is a transformer, else 1. No side is below 32.
    """

    name: str
    family: Literal["cnn", "vit", "mobilevit"]
    size_px: int
    builder: Builder
    library: Literal["timm", "torchvision", "transformers", "ours"]
    paper: str
    size_multiple_px: int | None = None

    def build(self, num_classes: int = 1000, size_px: int | None = None) -> nn.Module:
        """The network with random weights: RGB images (B, 3, size, size) -> logits (B, num_classes).

        Args:
            num_classes: 1 or more.
            size_px: the side of the images, `size_px` of the network unless given. Convolutional networks take other
                sizes than the one they were built for, most transformers do not.

        Raises:
            ValueError: a library that is not installed, a size or class count that cannot be.
        """
        size_px = self.size_px if size_px is None else size_px
        self.check_size(size_px)
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; it must be 1 or more")
        return self.builder(num_classes, size_px)

    def check_size(self, size_px: int) -> None:
        """Refuse a side of the images that the network cannot be built for.

        Raises:
            ValueError: `size_px` is none that it takes.
        """
        multiple = self.size_multiple_px or (32 if self.family == "vit" else 1)
        if size_px < 32:
            raise ValueError(f"size_px is {size_px}; {self.name} takes 32 or more")
        if size_px % multiple:
            raise ValueError(f"size_px is {size_px}; {self.name} takes multiples of {multiple}")


@dataclass(frozen=True, kw_only=True)
class System(Network):
    """A row of the comparison.

    `published_parameters` and `published_top1` belong together and are from `source`; where that is a figure or table,
    it is the MobileViT paper's. `augmentation` is what that paper says of how the figure was reached: "basic" is random
    crop and flip, "advanced" more than that, None if it says nothing.
    """

    published_parameters: int
    published_top1: float
    augmentation: Literal["basic", "advanced"] | None
    source: str
    library_weights: tuple[LibraryWeights, ...] = ()


class _Logits(nn.Module):
    """The answers of a network of transformers alone."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images, return_dict=False)[0]


def _timm(name: str, *, sized: bool = False, **structure: object) -> Builder:
    """A network of timm; `sized` if it is built for one size of images."""

    def build(num_classes: int, size_px: int) -> nn.Module:
        size = {"img_size": size_px} if sized else {}
        return import_library("timm").create_model(name, num_classes=num_classes, **size, **structure)

    return build


def _torchvision(name: str, **structure: object) -> Builder:
    return lambda num_classes, size_px: torchvision.models.get_model(name, num_classes=num_classes, **structure)


def _shufflenet_v2(channels: int) -> Builder:
    """ShuffleNetv2 of any width; `channels` are those of its second stage, of the published 1.0 116."""
    widths = [24, channels, 2 * channels, 4 * channels, 1024]
    return lambda num_classes, size_px: torchvision.models.ShuffleNetV2([4, 8, 4], widths, num_classes=num_classes)


def _pvt_tiny(num_classes: int, size_px: int) -> nn.Module:
    transformers = import_library("transformers")
    config = transformers.PvtConfig(image_size=size_px, num_labels=num_classes)  # whose defaults are PVT-Tiny
    return _Logits(transformers.PvtForImageClassification(config))


def import_library(library: str) -> ModuleType:
    """The module of that name.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module(library)
    except ImportError:
        raise ValueError(
            f"{library} is not installed, and it has some of the systems to compare with: "
            "pip install 'mobilevit[compare]'"
        ) from None


_ROWS = (
    System(
        name="mobilenetv1-0.75",
        family="cnn",
        published_parameters=2_600_000,
        published_top1=68.4,
        augmentation=None,
        source=LIGHT_CNNS,
        size_px=224,
        builder=lambda num_classes, size_px: MobileNetV1(num_classes, width=0.75),
        library="ours",
        paper="1704.04861",
    ),
    System(
        name="mobilenetv2-0.75",
        family="cnn",
        published_parameters=2_600_000,
        published_top1=69.8,
        augmentation=None,
        source=LIGHT_CNNS,
        size_px=224,
        builder=_timm("mobilenetv2_075"),
        library="timm",
        paper="1801.04381",
    ),
    System(
        name="mobilenetv2-1.0",
        family="cnn",
        published_parameters=3_500_000,
        published_top1=73.3,
        augmentation=None,
        source="table 3",
        size_px=224,
        builder=_timm("mobilenetv2_100"),
        library="timm",
        paper="1801.04381",
        library_weights=(LibraryWeights("mobilenetv2_100.ra_in1k", 72.98),),
    ),
    System(
        name="mobilenetv3-small",
        family="cnn",
        published_parameters=2_500_000,
        published_top1=67.4,
        augmentation=None,
        source=LIGHT_CNNS,
        size_px=224,
        builder=_timm("mobilenetv3_small_100"),
        library="timm",
        paper="1905.02244",
        library_weights=(LibraryWeights("mobilenetv3_small_100.lamb_in1k", 67.66),),
    ),
    System(
        name="mobilenetv3-large",
        family="cnn",
        published_parameters=5_400_000,
        published_top1=75.2,
        augmentation=None,
        source=OWN_PAPER,
        size_px=224,
        builder=_timm("mobilenetv3_large_100"),
        library="timm",
        paper="1905.02244",
        library_weights=(
            LibraryWeights("mobilenetv3_large_100.ra_in1k", 75.77),
            LibraryWeights("mobilenetv3_large_100.miil_in21k_ft_in1k", 77.92),
        ),
    ),
    System(
        name="mobilenetv4-conv-small",
        family="cnn",
        published_parameters=3_800_000,
        published_top1=73.8,
        augmentation=None,
        source=OWN_PAPER,
        size_px=224,
        builder=_timm("mobilenetv4_conv_small"),
        library="timm",
        paper="2404.10518",
        library_weights=(LibraryWeights("mobilenetv4_conv_small.e2400_r224_in1k", 73.76),),
    ),
    System(
        name="shufflenetv2",
        family="cnn",
        published_parameters=2_300_000,
        published_top1=69.4,
        augmentation=None,
        source=LIGHT_CNNS,
        size_px=224,
        builder=_torchvision("shufflenet_v2_x1_0"),
        library="torchvision",
        paper="1807.11164",
        library_weights=(LibraryWeights("ShuffleNet_V2_X1_0_Weights.IMAGENET1K_V1", 69.36),),
    ),
    System(
        name="espnetv2",
        family="cnn",
        published_parameters=2_300_000,
        published_top1=69.2,
        augmentation=None,
        source=LIGHT_CNNS,
        size_px=224,
        builder=lambda num_classes, size_px: ESPNetV2(num_classes, width=1.5),
        library="ours",
        paper="1811.11431",
    ),
    System(
        name="densenet-169",
        family="cnn",
        published_parameters=14_000_000,
        published_top1=76.2,
        augmentation=None,
        source=HEAVY_CNNS,
        size_px=224,
        builder=_timm("densenet169"),
        library="timm",
        paper="1608.06993",
        library_weights=(LibraryWeights("densenet169.tv_in1k", 75.90),),
    ),
    System(
        name="efficientnet-b0",
        family="cnn",
        published_parameters=5_300_000,
        published_top1=76.3,
        augmentation=None,
        source=HEAVY_CNNS,
        size_px=224,
        builder=_timm("efficientnet_b0"),
        library="timm",
        paper="1905.11946",
        library_weights=(
            LibraryWeights("efficientnet_b0.ra_in1k", 77.69),
            LibraryWeights("efficientnet_b0.ra4_e3600_r224_in1k", 79.4),
        ),
    ),
    System(
        name="resnet-101",
        family="cnn",
        published_parameters=44_500_000,
        published_top1=77.4,
        augmentation=None,
        source=HEAVY_CNNS,
        size_px=224,
        builder=_timm("resnet101"),
        library="timm",
        paper="1512.03385",
        library_weights=(
            LibraryWeights("resnet101.tv_in1k", 77.38),
            LibraryWeights("resnet101.a1_in1k", 82.32),
        ),
    ),
    System(
        name="resnet-101-se",
        family="cnn",
        published_parameters=49_300_000,
        published_top1=77.6,
        augmentation=None,
        source=HEAVY_CNNS,
        size_px=224,
        builder=_timm("legacy_seresnet101"),
        library="timm",
        paper="1709.01507",
        library_weights=(LibraryWeights("legacy_seresnet101.in1k", 78.39),),
    ),
    System(
        name="deit-tiny-basic",
        family="vit",
        published_parameters=5_700_000,
        published_top1=68.7,
        augmentation="basic",
        source=VITS_ONCE,
        size_px=224,
        builder=_timm("deit_tiny_patch16_224", sized=True),
        library="timm",
        paper="2012.12877",
    ),
    System(
        name="deit-tiny",
        family="vit",
        published_parameters=5_700_000,
        published_top1=72.2,
        augmentation="advanced",
        source=VITS,
        size_px=224,
        builder=_timm("deit_tiny_patch16_224", sized=True),
        library="timm",
        paper="2012.12877",
        library_weights=(LibraryWeights("deit_tiny_patch16_224.fb_in1k", 72.17),),
    ),
    System(
        name="deit-10m",
        family="vit",
        published_parameters=10_000_000,
        published_top1=75.9,
        augmentation="advanced",
        source=VITS_ONCE,
        size_px=224,
        builder=_timm("deit_tiny_patch16_224", sized=True, embed_dim=256, num_heads=4),
        library="timm",
        paper="2012.12877",
    ),
    System(
        name="t2t-vit-7",
        family="vit",
        published_parameters=4_300_000,
        published_top1=71.7,
        augmentation="advanced",
        source=VITS_ONCE,
        size_px=224,
        builder=lambda num_classes, size_px: T2TViT(num_classes, 7, size_px),
        library="ours",
        paper="2101.11986",
    ),
    System(
        name="t2t-vit-12",
        family="vit",
        published_parameters=6_900_000,
        published_top1=76.5,
        augmentation="advanced",
        source=VITS_ONCE,
        size_px=224,
        builder=lambda num_classes, size_px: T2TViT(num_classes, 12, size_px),
        library="ours",
        paper="2101.11986",
    ),
    System(
        name="pit-tiny",
        family="vit",
        published_parameters=4_900_000,
        published_top1=73.0,
        augmentation="advanced",
        source=VITS_ONCE,
        size_px=224,
        builder=_timm("pit_ti_224", sized=True),
        library="timm",
        paper="2103.16302",
        library_weights=(LibraryWeights("pit_ti_224.in1k", 72.91),),
    ),
    System(
        name="pit-xs-basic",
        family="vit",
        published_parameters=10_600_000,
        published_top1=72.4,
        augmentation="basic",
        source=VITS_ONCE,
        size_px=224,
        builder=_timm("pit_xs_224", sized=True),
        library="timm",
        paper="2103.16302",
    ),
    System(
        name="pit-xs",
        family="vit",
        published_parameters=10_600_000,
        published_top1=78.1,
        augmentation="advanced",
        source=VITS_ONCE,
        size_px=224,
        builder=_timm("pit_xs_224", sized=True),
        library="timm",
        paper="2103.16302",
        library_weights=(LibraryWeights("pit_xs_224.in1k", 78.18),),
    ),
    System(
        name="mobile-former-96m",
        family="vit",
        published_parameters=4_600_000,
        published_top1=72.8,
        augmentation="advanced",
        source=VITS_ONCE,
        size_px=224,
        builder=lambda num_classes, size_px: MobileFormer(num_classes, M96),
        library="ours",
        paper="2108.05895",
    ),
    System(
        name="mobile-former-214m",
        family="vit",
        published_parameters=9_400_000,
        published_top1=76.7,
        augmentation="advanced",
        source=VITS_ONCE,
        size_px=224,
        builder=lambda num_classes, size_px: MobileFormer(num_classes, M214),
        library="ours",
        paper="2108.05895",
    ),
    System(
        name="crossvit-tiny",
        family="vit",
        published_parameters=6_900_000,
        published_top1=73.4,
        augmentation="advanced",
        source=VITS_ONCE,
        size_px=240,
        builder=_timm("crossvit_tiny_240", sized=True),
        library="timm",
        paper="2103.14899",
        library_weights=(LibraryWeights("crossvit_tiny_240.in1k", 73.34),),
        size_multiple_px=120,  # in patches of 12 pixels, and at 14/15 of the size in patches of 16
    ),
    System(
        name="ceit-tiny",
        family="vit",
        published_parameters=6_400_000,
        published_top1=76.4,
        augmentation="advanced",
        source=VITS_ONCE,
        size_px=224,
        builder=CeiT,
        library="ours",
        paper="2103.11816",
    ),
    System(
        name="vil-tiny",
        family="vit",
        published_parameters=6_700_000,
        published_top1=76.7,
        augmentation="advanced",
        source=VITS_ONCE,
        size_px=224,
        builder=ViL,
        library="ours",
        paper="2103.15358",
    ),
    System(
        name="localvit",
        family="vit",
        published_parameters=7_700_000,
        published_top1=76.1,
        augmentation="advanced",
        source=VITS_ONCE,
        size_px=224,
        builder=LocalViT,
        library="ours",
        paper="2104.05707",
    ),
    System(
        name="pvt-tiny",
        family="vit",
        published_parameters=13_200_000,
        published_top1=75.1,
        augmentation="advanced",
        source=VITS_ONCE,
        size_px=224,
        builder=_pvt_tiny,
        library="transformers",
        paper="2102.12122",
        library_weights=(LibraryWeights("Zetatech/pvt-tiny-224", 75.1),),
    ),
    System(
        name="convit-10m",
        family="vit",
        published_parameters=10_000_000,
        published_top1=76.7,
        augmentation="advanced",
        source=VITS_ONCE,
        size_px=224,
        builder=_timm("convit_tiny", sized=True, embed_dim=64),
        library="timm",
        paper="2103.10697",
    ),
    System(
        name="botnet-50-basic",
        family="vit",
        published_parameters=20_800_000,
        published_top1=77.0,
        augmentation="basic",
        source=VITS_ONCE,
        size_px=224,
        builder=botnet50,
        library="ours",
        paper="2101.11605",
    ),
    System(
        name="botnet-50",
        family="vit",
        published_parameters=20_800_000,
        published_top1=78.3,
        augmentation="advanced",
        source=VITS_ONCE,
        size_px=224,
        builder=botnet50,
        library="ours",
        paper="2101.11605",
    ),
    System(
        name="cait-xxs24",  # the MobileViT paper has it only as a point in a figure
        family="vit",
        published_parameters=12_000_000,
        published_top1=77.6,
        augmentation=None,
        source=OWN_PAPER,
        size_px=224,
        builder=_timm("cait_xxs24_224", sized=True),
        library="timm",
        paper="2103.17239",
        library_weights=(LibraryWeights("cait_xxs24_224.fb_dist_in1k", 78.38),),
    ),
    System(
        name="deepvit-16",  # the same
        family="vit",
        published_parameters=24_500_000,
        published_top1=79.1,
        augmentation=None,
        source=OWN_PAPER,
        size_px=224,
        builder=DeepViT,
        library="ours",
        paper="2103.11886",
    ),
    System(
        name="mobilevit-xxs",
        family="mobilevit",
        published_parameters=1_300_000,
        published_top1=69.0,
        augmentation="basic",
        source="the text",
        size_px=256,
        builder=lambda num_classes, size_px: MobileViT("xxs", num_classes=num_classes),
        library="ours",
        paper="2110.02178",
        library_weights=(LibraryWeights("timm/mobilevit_xxs.cvnets_in1k", 68.93),),
    ),
    System(
        name="mobilevit-xs",
        family="mobilevit",
        published_parameters=2_300_000,
        published_top1=74.8,
        augmentation="basic",
        source=VITS,
        size_px=256,
        builder=lambda num_classes, size_px: MobileViT("xs", num_classes=num_classes),
        library="ours",
        paper="2110.02178",
        library_weights=(LibraryWeights("timm/mobilevit_xs.cvnets_in1k", 74.64),),
    ),
    System(
        name="mobilevit-s",
        family="mobilevit",
        published_parameters=5_600_000,
        published_top1=78.4,
        augmentation="basic",
        source=VITS,
        size_px=256,
        builder=lambda num_classes, size_px: MobileViT("s", num_classes=num_classes),
        library="ours",
        paper="2110.02178",
        library_weights=(LibraryWeights("timm/mobilevit_s.cvnets_in1k", 78.31),),
    ),
)
SYSTEMS = {system.name: system for system in _ROWS}

# With 10 classes MobileViT-XXS has 0.95 M parameters, and these 1.03 to 1.08 M. All of them keep their depth.
_SCALED_ROWS = (
    Network(
        name="mobilenetv2-0.65",
        family="cnn",
        size_px=64,
        builder=_torchvision("mobilenet_v2", width_mult=0.65),
        library="torchvision",
        paper="1801.04381",
    ),
    Network(
        name="mobilenetv3-small-0.75",
        family="cnn",
        size_px=64,
        builder=_timm("mobilenetv3_small_075"),
        library="timm",
        paper="1905.02244",
    ),
    Network(
        name="shufflenetv2-0.9",
        family="cnn",
        size_px=64,
        builder=_shufflenet_v2(104),
        library="torchvision",
        paper="1807.11164",
    ),
    Network(
        name="deit-84-patch8",  # 84 wide, DeiT-tiny 192; of 64 px its patches of 16 would leave but 16
        family="vit",
        size_px=64,
        builder=_timm("deit_tiny_patch16_224", sized=True, patch_size=8, embed_dim=84),
        library="timm",
        paper="2012.12877",
        size_multiple_px=8,
    ),
)
SCALED = {network.name: network for network in _SCALED_ROWS}
