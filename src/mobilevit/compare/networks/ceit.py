"""CeiT: Yuan et al., "Incorporating Convolution Designs into Visual Transformers", arXiv 2103.11816.

A vision transformer with three changes. Image-to-tokens: a stem of 7x7 convolution and max pooling at stride 4 precedes
the patch embedding with 4x4 patches. Locally-enhanced feed-forward (LeFF): the patch tokens form a map, and a 3x3
depthwise convolution is inserted between the two linear layers; the class token bypasses it. Layer-wise class token
attention (LCA): the class token of the last layer attends to the class tokens of all layers.
(B, 3, S, S) -> (B, 64, S/4, S/4) -> (B, 1 + S*S/256, 192) -> 12 class tokens (B, 12, 192) -> (B, classes).

Only the class token of the last layer is used. Its LeFF therefore does not affect the logits, as published.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilevit.compare.networks.layers import (
    Attention,
    FeedForward,
    initialize,
    join_heads,
    prepend,
    split_heads,
    to_map,
    to_tokens,
)

STEM_CHANNELS, PATCH_PX = 64, 4
DIM, NUM_HEADS, FFN_DIM, NUM_LAYERS = 192, 3, 768, 12
NORM_EPSILON = 1e-6


class LeFF(nn.Module):
    """1x1, depthwise 3x3 and 1x1 convolution over the patch tokens; (B, 1 + N, D) -> same, class token unchanged."""

    def __init__(self):
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(DIM, FFN_DIM, 1),
            nn.BatchNorm2d(FFN_DIM),
            nn.GELU(),
            nn.Conv2d(FFN_DIM, FFN_DIM, 3, padding=1, groups=FFN_DIM),
            nn.BatchNorm2d(FFN_DIM),
            nn.GELU(),
            nn.Conv2d(FFN_DIM, DIM, 1),
            nn.BatchNorm2d(DIM),
        )

    def forward(self, x_BND: Tensor) -> Tensor:
        class_token, patches = x_BND[:, :1], x_BND[:, 1:]
        return torch.cat((class_token, to_tokens(self.convs(to_map(patches)))), dim=1)


class Layer(nn.Module):
    """Pre-norm attention and LeFF, both with shortcuts; (B, 1 + N, D) -> same."""

    def __init__(self):
        super().__init__()
        self.attention_norm = nn.LayerNorm(DIM, eps=NORM_EPSILON)
        self.attention = Attention(DIM, NUM_HEADS, qkv_bias=True)
        self.leff_norm = nn.LayerNorm(DIM, eps=NORM_EPSILON)
        self.leff = LeFF()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.leff(self.leff_norm(x))


class LayerwiseClassAttention(nn.Module):
    """The last class token attends to those of all layers; (B, layers, D) -> (B, D)."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(1, NUM_LAYERS, DIM))
        self.attention_norm = nn.LayerNorm(DIM, eps=NORM_EPSILON)
        self.query = nn.Linear(DIM, DIM)
        self.key_value = nn.Linear(DIM, 2 * DIM)
        self.out = nn.Linear(DIM, DIM)
        self.ffn_norm = nn.LayerNorm(DIM, eps=NORM_EPSILON)
        self.ffn = FeedForward(DIM, FFN_DIM)

    def forward(self, class_tokens_BLD: Tensor) -> Tensor:
        x = class_tokens_BLD + self.positions
        y = self.attention_norm(x)
        (q,) = split_heads(self.query(y[:, -1:]), 1, NUM_HEADS)
        k, v = split_heads(self.key_value(y), 2, NUM_HEADS)
        x = x[:, -1:] + self.out(join_heads(F.scaled_dot_product_attention(q, k, v)))
        return (x + self.ffn(self.ffn_norm(x)))[:, 0]


class CeiT(nn.Module):
    """CeiT-T: images (B, 3, size, size), the size a multiple of 16 -> logits (B, classes)."""

    def __init__(self, num_classes: int, size_px: int):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, STEM_CHANNELS, 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(STEM_CHANNELS),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.patches = nn.Conv2d(STEM_CHANNELS, DIM, PATCH_PX, stride=PATCH_PX)
        side = size_px // (4 * PATCH_PX)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, DIM))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + side * side, DIM))
        self.layers = nn.ModuleList(Layer() for _ in range(NUM_LAYERS))
        self.class_attention = LayerwiseClassAttention()
        self.norm = nn.LayerNorm(DIM, eps=NORM_EPSILON)
        self.classifier = nn.Linear(DIM, num_classes)
        self.apply(initialize)

    def forward(self, images: Tensor) -> Tensor:
        x = to_tokens(self.patches(self.stem(images)))
        x = prepend(self.class_token, x) + self.positions
        class_tokens = []
        for layer in self.layers:
            x = layer(x)
            class_tokens.append(x[:, 0])
        return self.classifier(self.norm(self.class_attention(torch.stack(class_tokens, dim=1))))
