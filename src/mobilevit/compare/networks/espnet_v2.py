"""ESPNetv2: Mehta et al., "ESPNetv2: A Light-weight, Power Efficient, and General Purpose Convolutional Neural
Network", arXiv 1811.11431.

The EESP unit reduces the channels by a grouped 1x1 convolution and applies four parallel depthwise 3x3 convolutions of
increasing dilation. Each branch is added to the branch with the next larger dilation, which fills the gaps of the
dilated kernel. A grouped 1x1 convolution mixes the branches. Where the map is halved, the average-pooled input is
concatenated, and the image, pooled to the same size, is added after two convolutions.
(B, 3, H, W) -> maps at strides 2, 4, 8, 16, 32 -> mean -> (B, classes).

The released code also builds a shortcut from the image to the last stage, which it never uses. It is omitted here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilevit.compare.networks.layers import conv_norm, initialize

NUM_BRANCHES = 4
STEM_CHANNELS, HEAD_CHANNELS = 32, 1024
BASE_CHANNELS = 32  # for a width of 1; each stage doubles the channels
# For each stage, at strides 4, 8, 16, 32: the number of units after the one that halves the map, and the largest
# receptive field of a branch in pixels, in the first unit and in the others.
STAGES = ((0, 13, 11), (3, 11, 9), (7, 9, 7), (3, 7, 5))


def dilations(max_field_px: int) -> tuple[int, ...]:
    """Sorted dilations of the branches: 1, 2, 3, 4, but 1 if the receptive field (3, 5, 7, 9 px) would be too large."""
    return tuple(sorted(d if 2 * d + 1 <= max_field_px else 1 for d in range(1, NUM_BRANCHES + 1)))


class EESP(nn.Module):
    """Reduce, filter at four dilations, add up, expand; (B, C, H, W) -> (B, out, H / stride, W / stride)."""

    def __init__(self, in_channels: int, out_channels: int, max_field_px: int, stride: int = 1):
        super().__init__()
        branch_channels = out_channels // NUM_BRANCHES
        self.narrow = conv_norm(in_channels, branch_channels, 1, nn.PReLU(branch_channels), groups=NUM_BRANCHES)
        self.branches = nn.ModuleList(
            nn.Conv2d(branch_channels, branch_channels, 3, stride, d, dilation=d, groups=branch_channels, bias=False)
            for d in dilations(max_field_px)
        )
        self.norm = nn.Sequential(nn.BatchNorm2d(out_channels), nn.PReLU(out_channels))
        self.widen = conv_norm(out_channels, out_channels, 1, groups=NUM_BRANCHES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.narrow(x)
        maps = [self.branches[0](x)]
        for branch in list(self.branches)[1:]:
            maps.append(branch(x) + maps[-1])
        return self.widen(self.norm(torch.cat(maps, dim=1)))


class Residual(nn.Module):
    """An EESP unit with a shortcut; (B, C, H, W) -> same."""

    def __init__(self, channels: int, max_field_px: int):
        super().__init__()
        self.unit = EESP(channels, channels, max_field_px)
        self.activation = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.unit(x) + x)


class Downsample(nn.Module):
    """Halve a map and add the image again; (B, C, H, W) -> (B, out, H / 2, W / 2)."""

    def __init__(self, in_channels: int, out_channels: int, max_field_px: int, *, image: bool):
        super().__init__()
        self.unit = EESP(in_channels, out_channels - in_channels, max_field_px, stride=2)
        self.image = None
        if image:
            self.image = nn.Sequential(conv_norm(3, 3, 3, nn.PReLU(3)), conv_norm(3, out_channels, 1))
        self.activation = nn.PReLU(out_channels)

    def forward(self, x: Tensor, images: Tensor) -> Tensor:
        """`images` (B, 3, H * n, W * n) are halved until they have the size of the output; n is a power of two."""
        x = torch.cat((_halve(x), self.unit(x)), dim=1)
        if self.image is not None:
            while images.shape[-1] > x.shape[-1]:
                images = _halve(images)
            x = x + self.image(images)
        return self.activation(x)


class ESPNetV2(nn.Module):
    """Images (B, 3, H, W) -> logits (B, classes); `width` multiplies the channels of the stages only."""

    def __init__(self, num_classes: int, width: float):
        super().__init__()
        self.stem = conv_norm(3, STEM_CHANNELS, 3, nn.PReLU(STEM_CHANNELS), stride=2)
        channels = STEM_CHANNELS
        self.downsamples, self.stages = nn.ModuleList(), nn.ModuleList()
        for i, (num_units, first_field_px, field_px) in enumerate(STAGES):
            out_channels = int(BASE_CHANNELS * width) * 2 ** (i + 1)
            self.downsamples.append(Downsample(channels, out_channels, first_field_px, image=i < len(STAGES) - 1))
            self.stages.append(nn.Sequential(*(Residual(out_channels, field_px) for _ in range(num_units))))
            channels = out_channels
        self.head = nn.Sequential(
            conv_norm(channels, channels, 3, nn.PReLU(channels), groups=channels),
            conv_norm(channels, HEAD_CHANNELS, 1, nn.PReLU(HEAD_CHANNELS), groups=NUM_BRANCHES),
        )
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(HEAD_CHANNELS, num_classes)
        self.apply(initialize)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for downsample, stage in zip(self.downsamples, self.stages, strict=True):
            x = stage(downsample(x, images))
        return self.classifier(self.dropout(self.head(x).mean(dim=(-2, -1))))


def _halve(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=2, padding=1)
