"""DeepLabv3 on MobileViT (arXiv 2110.02178, section 4.2.2; DeepLabv3 arXiv 1706.05587): semantic segmentation.

The last stages of the backbone do not downsample. Parallel convolutions with different dilations and global average
pooling follow (atrous spatial pyramid pooling, ASPP). Their concatenated outputs are classified pixel by pixel, and the
logits are resized to the size of the image.

Shapes as in `mobilevit.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilevit.models.mobilevit import Architecture, Backbone, ConvNorm, S, initialize


@dataclass(frozen=True)
class DeepLabHead:
    """The segmentation head; the defaults are the paper's.

    Attributes:
        channels: width of the pyramid.
        rates: dilations of its 3x3 convolutions.
        auxiliary_channels: width of the auxiliary head, a second classifier on stage 4 for training; 0 for none.
        dropout: probability of dropping a channel.
        align_corners: of `torch.nn.functional.interpolate`, which resizes the logits to the image.

    Raises:
        ValueError: a width or a rate below 1, or not three rates.
    """

    channels: int = 256
    rates: tuple[int, int, int] = (6, 12, 18)
    auxiliary_channels: int = 0
    dropout: float = 0.1
    align_corners: bool = False

    def __post_init__(self) -> None:
        if len(self.rates) != 3 or min(self.rates) < 1:
            raise ValueError(f"rates is {self.rates}; it must be three integers above 0")
        if self.channels < 1 or self.auxiliary_channels < 0:
            raise ValueError(
                f"channels is {self.channels} and auxiliary_channels {self.auxiliary_channels}; they must be at least "
                "1 and 0"
            )


# Apple published weights with both heads: first this one at output stride 16, later, for S only, the other one at 8.
PAPER_HEAD = DeepLabHead()
LATER_HEAD = DeepLabHead(channels=512, rates=(12, 24, 36), auxiliary_channels=128, align_corners=True)


class Pyramid(nn.Module):
    """Atrous spatial pyramid pooling; (B, C, H, W) -> (B, out, H, W).

    A 1x1 convolution, three dilated 3x3 convolutions and global average pooling, in parallel; then a 1x1 projection. In
    training mode, the batch norm after the pooling requires at least two images.
    """

    def __init__(self, in_channels: int, head: DeepLabHead):
        super().__init__()
        out = head.channels
        self.convs = nn.ModuleList([ConvNorm(in_channels, out, 1, activation=False)])
        self.convs.extend(ConvNorm(in_channels, out, 3, dilation=rate, activation=False) for rate in head.rates)
        self.pooled = ConvNorm(in_channels, out, 1, activation=False)
        self.project = ConvNorm((len(self.convs) + 1) * out, out, 1, activation=False)
        self.dropout = nn.Dropout2d(head.dropout)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pooled(x.mean(dim=(-2, -1), keepdim=True)).expand(-1, -1, x.shape[2], x.shape[3])
        # If its inputs differ in memory format, cat returns the default one, and the next convolution converts it back.
        pooled = pooled.contiguous(memory_format=torch.channels_last)
        maps = [conv(x) for conv in self.convs]
        return self.dropout(F.relu(self.project(F.relu(torch.cat((*maps, pooled), dim=1)))))


class AuxiliaryHead(nn.Module):
    """Auxiliary classifier on stage 4, for training only; (B, C, H, W) -> (B, num_classes, H, W)."""

    def __init__(self, in_channels: int, channels: int, num_classes: int, dropout: float):
        super().__init__()
        self.project = ConvNorm(in_channels, channels, 3, activation=False)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(F.relu(self.project(x))))


class DeepLabV3(nn.Module):
    """The segmentation network; images (B, 3, H, W) -> logits (B, num_classes, H, W).

    Args:
        architecture: "xxs", "xs", "s" or an `Architecture`.
        num_classes: including the background, if there is one.
        output_stride: of the classified map; see `Backbone`.
        head: see `DeepLabHead`.

    Raises:
        ValueError: an unknown architecture or output stride, a number of classes below 1.
    """

    def __init__(
        self,
        architecture: Architecture | str = S,
        num_classes: int = 21,
        output_stride: int = 16,
        head: DeepLabHead = PAPER_HEAD,
    ):
        super().__init__()
        _check_count(num_classes)
        out_stages = ("stage4", "stage5") if head.auxiliary_channels else ("stage5",)
        self.backbone = Backbone(architecture, out_stages=out_stages, output_stride=output_stride)
        self.architecture = a = self.backbone.architecture
        self.head = head
        channels = self.backbone.channels
        self.pyramid = Pyramid(channels["stage5"], head)
        self.dropout = nn.Dropout2d(a.classifier_dropout)
        self.classifier = nn.Conv2d(head.channels, num_classes, 1)
        self.auxiliary = (
            AuxiliaryHead(channels["stage4"], head.auxiliary_channels, num_classes, a.classifier_dropout)
            if head.auxiliary_channels
            else None
        )
        self.pyramid.apply(initialize)
        for classifier in (self.classifier, self.auxiliary):
            if classifier is not None:
                classifier.apply(_initialize_with_bias)
        self.to(memory_format=torch.channels_last)

    @property
    def num_classes(self) -> int:
        """Including the background, if there is one."""
        return self.classifier.out_channels

    def reset_classes(self, num_classes: int) -> None:
        """Replace the classifiers by newly initialized ones."""
        _check_count(num_classes)
        for module in (self, self.auxiliary):
            if module is not None:
                old = module.classifier
                new = nn.Conv2d(old.in_channels, num_classes, 1).apply(_initialize_with_bias)
                module.classifier = new.to(old.weight).to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, num_classes, H, W) of RGB `images` (B, 3, H, W) in [0, 1] with H, W >= 32.

        In training mode, a network with an auxiliary head returns a tuple: its logits and those of the auxiliary head.
        """
        return self.from_maps(self.backbone(images), images)

    def from_maps(self, backbone_maps: Mapping[str, Tensor], images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The outputs for the maps of the backbone, which are resized to the size of `images`."""
        logits = self._resize(self._classify(backbone_maps["stage5"]), images)
        if not self.training or self.auxiliary is None:
            return logits
        return logits, self._resize(self.auxiliary(backbone_maps["stage4"]), images)

    def coarse(self, images: Tensor) -> Tensor:
        """Logits before they are resized: (B, num_classes, H / output_stride, W / output_stride), rounded up."""
        return self._classify(self.backbone(images)["stage5"])

    def _classify(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.pyramid(x)))

    def _resize(self, logits: Tensor, images: Tensor) -> Tensor:
        size = images.shape[-2:]
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=self.head.align_corners)


def _initialize_with_bias(module: nn.Module) -> None:
    initialize(module)
    if isinstance(module, nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)


def _check_count(num_classes: int) -> None:
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}; it must be 1 or more")
