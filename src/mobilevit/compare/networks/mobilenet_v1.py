"""MobileNetv1: Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications",
arXiv 1704.04861.

Characteristic: each convolution is taken apart into one that filters every channel by itself (3x3, depthwise) and one
that mixes the channels of a pixel (1x1), with batch norm and ReLU after both, and no shortcuts. A width multiplier
scales all channels. (B, 3, H, W) -> maps at strides 2 to 32 -> mean -> (B, classes).
"""

from __future__ import annotations

from torch import Tensor, nn

from mobilevit.compare.networks.vit import initialise

LAYERS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *5 * ((512, 1),), (1024, 2), (1024, 1))


class MobileNetV1(nn.Module):
    """The classifier; `width` multiplies the channels of every layer."""

    def __init__(self, num_classes: int, width: float):
        super().__init__()
        channels = int(32 * width)
        layers: list[nn.Module] = [_conv_norm(3, channels, 3, stride=2)]
        for full_channels, stride in LAYERS:
            out_channels = int(full_channels * width)
            layers.append(_conv_norm(channels, channels, 3, stride=stride, groups=channels))
            layers.append(_conv_norm(channels, out_channels, 1))
            channels = out_channels
        self.layers = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)
        self.apply(initialise)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, 3, H, W)."""
        return self.classifier(self.layers(images).mean(dim=(-2, -1)))


def _conv_norm(in_channels: int, out_channels: int, kernel_px: int, *, stride: int = 1, groups: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_px, stride, kernel_px // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )
