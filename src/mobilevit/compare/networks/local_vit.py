"""LocalViT: Li et al., "LocalViT: Bringing Locality to Vision Transformers", arXiv 2104.05707.

DeiT-tiny whose feed-forward networks are MobileNetv2's inverted residuals: the patch tokens form a map, which passes
through a 1x1, a depthwise 3x3 and a 1x1 convolution with batch norm and ReLU6. The class token bypasses them.
(B, 3, S, S) -> (B, 1 + S*S/256, 192) -> (B, classes).

Only the class token of the last layer is used. Its feed-forward network therefore does not affect the logits, as
published.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mobilevit.compare.networks.layers import Attention, initialize, prepend, to_map, to_tokens

PATCH_PX = 16
DIM, NUM_HEADS, NUM_LAYERS = 192, 4, 12
# The MobileViT paper prints 7.7 M parameters and 76.1 %. These are neither LocalViT-T's figures (5.9 M, 74.8 %: an
# expansion of 4, hard swish, squeeze-and-excitation) nor those of another main variant. An expansion of 6 with ReLU6,
# which the released code supports, has 7.66 M parameters; with squeeze-and-excitation it would have 7.83 M.
EXPANSION = 6
NORM_EPSILON = 1e-6


class LocalFeedForward(nn.Module):
    """An inverted residual over the patch tokens; (B, 1 + N, D) -> same, class token unchanged."""

    def __init__(self):
        super().__init__()
        hidden = EXPANSION * DIM
        self.convs = nn.Sequential(
            nn.Conv2d(DIM, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, DIM, 1, bias=False),
            nn.BatchNorm2d(DIM),
        )

    def forward(self, x_BND: Tensor) -> Tensor:
        class_token, patches = x_BND[:, :1], x_BND[:, 1:]
        return torch.cat((class_token, patches + to_tokens(self.convs(to_map(patches)))), dim=1)


class Layer(nn.Module):
    """Pre-norm attention with a shortcut, then the local feed-forward network; (B, 1 + N, D) -> same."""

    def __init__(self):
        super().__init__()
        self.attention_norm = nn.LayerNorm(DIM, eps=NORM_EPSILON)
        self.attention = Attention(DIM, NUM_HEADS, qkv_bias=True)
        self.ffn = LocalFeedForward()

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(x + self.attention(self.attention_norm(x)))


class LocalViT(nn.Module):
    """Images (B, 3, size, size), the size a multiple of 16 -> logits (B, classes)."""

    def __init__(self, num_classes: int, size_px: int):
        super().__init__()
        side = size_px // PATCH_PX
        self.patches = nn.Conv2d(3, DIM, PATCH_PX, stride=PATCH_PX)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, DIM))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + side * side, DIM))
        self.layers = nn.Sequential(*(Layer() for _ in range(NUM_LAYERS)))
        self.norm = nn.LayerNorm(DIM, eps=NORM_EPSILON)
        self.classifier = nn.Linear(DIM, num_classes)
        self.apply(initialize)

    def forward(self, images: Tensor) -> Tensor:
        x = to_tokens(self.patches(images))
        x = prepend(self.class_token, x) + self.positions
        return self.classifier(self.norm(self.layers(x))[:, 0])
