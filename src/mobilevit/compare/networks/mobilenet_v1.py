"""MobileNetv1: Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications",
arXiv 1704.04861.

Depthwise separable convolutions: a 3x3 depthwise and a 1x1 convolution, each followed by batch norm and ReLU, without
shortcuts. A width multiplier scales all channels.
(B, 3, H, W) -> maps at strides 2 to 32 -> mean -> (B, classes).
"""

from __future__ import annotations

from torch import Tensor, nn

from mobilevit.compare.networks.layers import conv_norm, initialize

LAYERS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *5 * ((512, 1),), (1024, 2), (1024, 1))


class MobileNetV1(nn.Module):
    """Images (B, 3, H, W) -> logits (B, classes); `width` multiplies the channels of every layer."""

    def __init__(self, num_classes: int, width: float):
        super().__init__()
        channels = int(32 * width)
        layers: list[nn.Module] = [conv_norm(3, channels, 3, nn.ReLU(inplace=True), stride=2)]
        for full_channels, stride in LAYERS:
            out_channels = int(full_channels * width)
            layers.append(conv_norm(channels, channels, 3, nn.ReLU(inplace=True), stride=stride, groups=channels))
            layers.append(conv_norm(channels, out_channels, 1, nn.ReLU(inplace=True)))
            channels = out_channels
        self.layers = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)
        self.apply(initialize)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.layers(images).mean(dim=(-2, -1)))
