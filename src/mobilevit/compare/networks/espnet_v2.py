"""ESPNetv2: Mehta et al., "ESPNetv2: A Light-weight, Power Efficient, and General Purpose Convolutional Neural
Network", arXiv 1811.11431.

Characteristic: the EESP unit narrows its input by a grouped 1x1 convolution, looks at it through four depthwise 3x3
convolutions of growing dilation at once, adds each branch to the one of the next larger dilation, so that the holes of
a dilated kernel are filled by its smaller neighbour, and mixes the branches by a grouped 1x1 convolution. Where the map
is halved, an average pool keeps the input and the image itself, pooled to the same size, is added again.
(B, 3, H, W) -> maps at strides 2, 4, 8, 16, 32 -> mean -> (B, classes).

The released code also builds, and never uses, a shortcut from the image to the last stage; it is left out here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilevit.compare.networks.vit import initialise

NUM_BRANCHES = 4
STEM_CHANNELS, HEAD_CHANNELS = 32, 1024
BASE_CHANNELS = 32  # of a width of 1; each stage has twice those of the one before
# For each stage at strides 4, 8, 16, 32: units after the one that halves the map, and the largest receptive field in
# pixels that a branch may have in that one and in the others.
STAGES = ((0, 13, 11), (3, 11, 9), (7, 9, 7), (3, 7, 5))


def dilations(max_field_px: int) -> tuple[int, ...]:
    """Of the branches: 1, 2, 3, 4, but 1 for each whose receptive field (3, 5, 7, 9 px) would be too large; sorted."""
    return tuple(sorted(d if 2 * d + 1 <= max_field_px else 1 for d in range(1, NUM_BRANCHES + 1)))


class EESP(nn.Module):
    """Narrow, filter at four dilations, fuse, widen; (B, C, H, W) -> (B, out, H / stride, W / stride)."""

    def __init__(self, in_channels: int, out_channels: int, max_field_px: int, stride: int = 1):
        super().__init__()
        branch_channels = out_channels // NUM_BRANCHES
        self.narrow = _conv_norm(in_channels, branch_channels, 1, groups=NUM_BRANCHES, activation=True)
        self.branches = nn.ModuleList(
            nn.Conv2d(branch_channels, branch_channels, 3, stride, d, dilation=d, groups=branch_channels, bias=False)
            for d in dilations(max_field_px)
        )
        self.norm = nn.Sequential(nn.BatchNorm2d(out_channels), nn.PReLU(out_channels))
        self.widen = _conv_norm(out_channels, out_channels, 1, groups=NUM_BRANCHES)

    def forward(self, x: Tensor) -> Tensor:
        """Branch i of the concatenation is the sum of the branches up to i; no activation at the end."""
        x = self.narrow(x)
        maps = [self.branches[0](x)]
        for branch in list(self.branches)[1:]:
            maps.append(branch(x) + maps[-1])
        return self.widen(self.norm(torch.cat(maps, dim=1)))


class Residual(nn.Module):
    """An EESP unit that keeps the size, with a shortcut; (B, C, H, W) -> same."""

    def __init__(self, channels: int, max_field_px: int):
        super().__init__()
        self.unit = EESP(channels, channels, max_field_px)
        self.activation = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        """The sum, then the activation."""
        return self.activation(self.unit(x) + x)


class Downsample(nn.Module):
    """Halve a map and look at the image again; (B, C, H, W) -> (B, out, H / 2, W / 2)."""

    def __init__(self, in_channels: int, out_channels: int, max_field_px: int, *, image: bool):
        super().__init__()
        self.unit = EESP(in_channels, out_channels - in_channels, max_field_px, stride=2)
        self.image = None
        if image:
            self.image = nn.Sequential(_conv_norm(3, 3, 3, activation=True), _conv_norm(3, out_channels, 1))
        self.activation = nn.PReLU(out_channels)

    def forward(self, x: Tensor, images: Tensor) -> Tensor:
        """`images` (B, 3, ...) may have any size that is `x`'s halved backwards by pools of stride 2."""
        x = torch.cat((_halve(x), self.unit(x)), dim=1)
        if self.image is not None:
            while images.shape[-1] > x.shape[-1]:
                images = _halve(images)
            x = x + self.image(images)
        return self.activation(x)


class ESPNetV2(nn.Module):
    """The classifier; `width` multiplies the channels of all stages but not of stem and head."""

    def __init__(self, num_classes: int, width: float):
        super().__init__()
        self.stem = _conv_norm(3, STEM_CHANNELS, 3, stride=2, activation=True)
        channels = STEM_CHANNELS
        self.downsamples, self.stages = nn.ModuleList(), nn.ModuleList()
        for i, (num_units, first_field_px, field_px) in enumerate(STAGES):
            out_channels = int(BASE_CHANNELS * width) * 2 ** (i + 1)
            self.downsamples.append(Downsample(channels, out_channels, first_field_px, image=i < len(STAGES) - 1))
            self.stages.append(nn.Sequential(*(Residual(out_channels, field_px) for _ in range(num_units))))
            channels = out_channels
        self.head = nn.Sequential(
            _conv_norm(channels, channels, 3, groups=channels, activation=True),
            _conv_norm(channels, HEAD_CHANNELS, 1, groups=NUM_BRANCHES, activation=True),
        )
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(HEAD_CHANNELS, num_classes)
        self.apply(initialise)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, 3, H, W)."""
        x = self.stem(images)
        for downsample, stage in zip(self.downsamples, self.stages, strict=True):
            x = stage(downsample(x, images))
        return self.classifier(self.dropout(self.head(x).mean(dim=(-2, -1))))


def _halve(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=2, padding=1)


def _conv_norm(
    in_channels: int, out_channels: int, kernel_px: int, *, stride: int = 1, groups: int = 1, activation: bool = False
) -> nn.Module:
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, out_channels, kernel_px, stride, kernel_px // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
    ]
    return nn.Sequential(*layers, nn.PReLU(out_channels)) if activation else nn.Sequential(*layers)
