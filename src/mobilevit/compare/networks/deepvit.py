"""DeepViT: Zhou et al., "DeepViT: Towards Deeper Vision Transformer", arXiv 2103.11886.

Characteristic: re-attention. In deep transformers the attention maps of one layer come to equal those of the next; here
the maps of the heads are mixed by a learned matrix (heads x heads) after the softmax, and normalised, which keeps them
apart. Otherwise a plain vision transformer. DeepViT-16 has 16 layers.
(B, 3, S, S) -> (B, 1 + S*S/256, 384) -> (B, classes).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mobilevit.compare.networks.vit import FeedForward, initialise, join_heads, split_heads, to_tokens

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
        """After the mixing, weights may be negative and need not sum to 1."""
        q, k, v = split_heads(self.qkv(x_BND), 3, self.num_heads)
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        weights = self.mix_norm(self.mix(scores.softmax(dim=-1)))  # (B, heads, N, N)
        return self.out(join_heads(weights @ v))


class Layer(nn.Module):
    """Pre-norm re-attention and feed-forward; (B, N, D) -> (B, N, D)."""

    def __init__(self):
        super().__init__()
        self.attention_norm = nn.LayerNorm(DIM, eps=NORM_EPSILON)
        self.attention = ReAttention(DIM, NUM_HEADS)
        self.ffn_norm = nn.LayerNorm(DIM, eps=NORM_EPSILON)
        self.ffn = FeedForward(DIM, FFN_DIM)

    def forward(self, x: Tensor) -> Tensor:
        """Both with shortcuts."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.ffn(self.ffn_norm(x))


class DeepViT(nn.Module):
    """DeepViT-16, the classifier for images of `size_px` squared, a multiple of 16."""

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
