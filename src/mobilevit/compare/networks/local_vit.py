"""LocalViT: Li et al., "LocalViT: Bringing Locality to Vision Transformers", arXiv 2104.05707.

Characteristic: DeiT-tiny whose feed-forward is MobileNetv2's inverted residual: the patch tokens become a map, which
passes a 1x1, a depthwise 3x3 and a 1x1 convolution with batch norm and ReLU6; the class token goes around it.
(B, 3, S, S) -> (B, 1 + S*S/256, 192) -> (B, classes).

Only the class token of the last layer is read, so that as published its feed-forward has no part in the answer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mobilevit.compare.networks.vit import Attention, initialise, to_map, to_tokens

PATCH_PX = 16
DIM, NUM_HEADS, NUM_LAYERS = 192, 4, 12
# MobileViT's comparison prints 7.7 M parameters and 76.1 %, which are neither LocalViT-T's (5.9 M, 74.8 %: an expansion
# of 4, hard swish, squeeze-and-excitation) nor those of another headline variant. An expansion of 6 with ReLU6, which
# the released code has too, makes 7.66 M; with squeeze-and-excitation it would be 7.83 M.
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
        """The tokens after the first are a square map, row by row; the shortcut is theirs."""
        class_token, patches = x_BND[:, :1], x_BND[:, 1:]
        return torch.cat((class_token, patches + to_tokens(self.convs(to_map(patches)))), dim=1)


class Layer(nn.Module):
    """Pre-norm attention, then the local feed-forward, which has norms of its own; (B, 1 + N, D) -> same."""

    def __init__(self):
        super().__init__()
        self.attention_norm = nn.LayerNorm(DIM, eps=NORM_EPSILON)
        self.attention = Attention(DIM, NUM_HEADS, qkv_bias=True)
        self.ffn = LocalFeedForward()

    def forward(self, x: Tensor) -> Tensor:
        """Both with shortcuts."""
        return self.ffn(x + self.attention(self.attention_norm(x)))


class LocalViT(nn.Module):
    """The classifier for images of `size_px` squared, a multiple of 16."""

    def __init__(self, num_classes: int, size_px: int):
        super().__init__()
        side = size_px // PATCH_PX
        self.patches = nn.Conv2d(3, DIM, PATCH_PX, stride=PATCH_PX)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, DIM))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + side * side, DIM))
        self.layers = nn.Sequential(*(Layer() for _ in range(NUM_LAYERS)))
        self.norm = nn.LayerNorm(DIM, eps=NORM_EPSILON)
        self.classifier = nn.Linear(DIM, num_classes)
        self.apply(initialise)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, 3, size, size)."""
        x = to_tokens(self.patches(images))
        x = torch.cat((self.class_token.expand(len(x), -1, -1), x), dim=1) + self.positions
        return self.classifier(self.norm(self.layers(x))[:, 0])
