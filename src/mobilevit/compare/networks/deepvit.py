"""DeepViT: Zhou et al., "DeepViT: Towards Deeper Vision Transformer", arXiv 2103.11886.

A vision transformer with re-attention. In deep transformers the attention maps of successive layers become similar.
Re-attention mixes the maps of the heads by a learned matrix (heads x heads) after the softmax, and normalizes them.
DeepViT-16 has 16 layers.
(B, 3, S, S) -> (B, 1 + S*S/256, 384) -> (B, classes).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mobilevit.compare.networks.layers import (
    FeedForward,
    TransformerLayer,
    initialize,
    join_heads,
    prepend,
    split_heads,
    to_tokens,
)

PATCH_PX = 16
DIM, NUM_HEADS, FFN_DIM, NUM_LAYERS = 384, 12, 1152, 16
NORM_EPSILON = 1e-6


class ReAttention(nn.Module):
    """Self-attention whose maps are mixed across heads; (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.mix = nn.Conv2d(num_heads, num_heads, 1, bias=False)
        self.mix_norm = nn.BatchNorm2d(num_heads)
        self.out = nn.Linear(dim, dim)

    def forward(self, x_BND: Tensor) -> Tensor:
        q, k, v = split_heads(self.qkv(x_BND), 3, self.num_heads)
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        weights = self.mix_norm(self.mix(scores.softmax(dim=-1)))  # (B, heads, N, N); may be negative
        return self.out(join_heads(weights @ v))


class DeepViT(nn.Module):
    """DeepViT-16: images (B, 3, size, size), the size a multiple of 16 -> logits (B, classes)."""

    def __init__(self, num_classes: int, size_px: int):
        super().__init__()
        side = size_px // PATCH_PX
        self.patches = nn.Conv2d(3, DIM, PATCH_PX, stride=PATCH_PX)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, DIM))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + side * side, DIM))
        self.layers = nn.Sequential(
            *(
                TransformerLayer(DIM, ReAttention(DIM, NUM_HEADS), FeedForward(DIM, FFN_DIM), NORM_EPSILON)
                for _ in range(NUM_LAYERS)
            )
        )
        self.norm = nn.LayerNorm(DIM, eps=NORM_EPSILON)
        self.classifier = nn.Linear(DIM, num_classes)
        self.apply(initialize)

    def forward(self, images: Tensor) -> Tensor:
        x = to_tokens(self.patches(images))
        x = prepend(self.class_token, x) + self.positions
        return self.classifier(self.norm(self.layers(x))[:, 0])
