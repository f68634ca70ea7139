"""T2T-ViT: Yuan et al., "Tokens-to-Token ViT: Training Vision Transformers from Scratch on ImageNet", arXiv 2101.11986.

Characteristic: the image becomes tokens in three soft splits, which cut overlapping windows (7x7, 3x3, 3x3 pixels
at strides 4, 2, 2), so that neighbouring tokens share pixels; between them a thin transformer mixes the tokens. There
are thousands of these, so its attention is a Performer's, linear in their number: softmax is replaced by a product of
random positive features. A deep and narrow vision transformer with a class token and fixed sine positions follows.
(B, 3, S, S) -> (B, S*S/16, 147) -> (B, S*S/64, 576) -> (B, S*S/256, D) -> (B, classes).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilevit.compare.networks.vit import Attention, FeedForward, initialise, to_map

SPLITS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))  # kernel, stride and padding in pixels
TOKEN_DIM = 64  # between the splits
DIM, NUM_HEADS, FFN_DIM = 256, 4, 512
EPSILON = 1e-8


def soft_split(x_BCHW: Tensor, kernel_px: int, stride_px: int, padding_px: int) -> Tensor:
    """Overlapping windows as tokens: (B, C, H, W) -> (B, windows, C * kernel * kernel)."""
    return F.unfold(x_BCHW, kernel_px, padding=padding_px, stride=stride_px).transpose(1, 2)


class Performer(nn.Module):
    """A transformer layer with one head and attention linear in N; (B, N, in) -> (B, N, D)."""

    random: Tensor

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(in_dim)
        self.qkv = nn.Linear(in_dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.ffn_norm = nn.LayerNorm(dim)
        self.ffn = FeedForward(dim, dim)
        self.dropout = nn.Dropout(0.1)
        num_features = dim // 2
        orthogonal = nn.init.orthogonal_(torch.empty(num_features, dim))
        self.register_buffer("random", orthogonal * math.sqrt(num_features))

    def features(self, x_BND: Tensor) -> Tensor:
        """Positive features (B, N, D / 2); the products of two tokens' stand for the exponential of theirs."""
        x = F.linear(x_BND, self.random) - (x_BND * x_BND).sum(dim=-1, keepdim=True) / 2
        return x.exp() / math.sqrt(len(self.random))

    def forward(self, x_BNC: Tensor) -> Tensor:
        """The shortcut around the attention is the value, since the width changes."""
        q, k, v = self.qkv(self.norm(x_BNC)).chunk(3, dim=-1)
        q, k = self.features(q), self.features(k)
        y = q @ (k.transpose(1, 2) @ v)  # (B, N, D), and never N x N
        y = y / (q @ k.sum(dim=1).unsqueeze(2)).clamp(min=EPSILON)  # added, the ONNX exporter takes it for 0
        x = v + self.dropout(self.out(y))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class TransformerLayer(nn.Module):
    """Pre-norm attention and feed-forward; (B, N, D) -> (B, N, D)."""

    def __init__(self):
        super().__init__()
        self.attention_norm = nn.LayerNorm(DIM)
        self.attention = Attention(DIM, NUM_HEADS, qkv_bias=False)
        self.ffn_norm = nn.LayerNorm(DIM)
        self.ffn = FeedForward(DIM, FFN_DIM)

    def forward(self, x: Tensor) -> Tensor:
        """Both with shortcuts."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.ffn(self.ffn_norm(x))


class T2TViT(nn.Module):
    """The classifier for images of `size_px` squared; 7 layers are T2T-ViT-7, 12 are T2T-ViT-12."""

    positions: Tensor

    def __init__(self, num_classes: int, num_layers: int, size_px: int):
        super().__init__()
        side, in_dims = size_px, []
        channels = 3
        for kernel, stride, padding in SPLITS:
            side = (side + 2 * padding - kernel) // stride + 1
            in_dims.append(channels * kernel * kernel)
            channels = TOKEN_DIM
        self.performers = nn.ModuleList(Performer(in_dim, TOKEN_DIM) for in_dim in in_dims[:-1])
        self.project = nn.Linear(in_dims[-1], DIM)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, DIM))
        self.register_buffer("positions", sine_positions(1 + side * side, DIM))
        self.layers = nn.Sequential(*(TransformerLayer() for _ in range(num_layers)))
        self.norm = nn.LayerNorm(DIM)
        self.classifier = nn.Linear(DIM, num_classes)
        self.apply(initialise)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, 3, size, size)."""
        x = soft_split(images, *SPLITS[0])
        for performer, split in zip(self.performers, SPLITS[1:], strict=True):
            x = soft_split(to_map(performer(x)), *split)
        x = torch.cat((self.class_token.expand(len(x), -1, -1), self.project(x)), dim=1) + self.positions
        return self.classifier(self.norm(self.layers(x))[:, 0])


def sine_positions(num_tokens: int, dim: int) -> Tensor:
    """Sines in the even and cosines in the odd places, of wavelengths from 2 pi to 20,000 pi tokens; (tokens, dim)."""
    rates = 10_000 ** (-torch.arange(0, dim, 2) / dim)
    angles = torch.arange(num_tokens)[:, None] * rates
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)
