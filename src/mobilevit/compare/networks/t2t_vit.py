"""T2T-ViT: Yuan et al., "Tokens-to-Token ViT: Training Vision Transformers from Scratch on ImageNet", arXiv 2101.11986.

Three soft splits convert the image to tokens: overlapping windows (7x7, 3x3, 3x3 pixels at strides 4, 2, 2), so that
neighboring tokens share pixels. A narrow transformer layer follows each of the first two splits. Because
there are thousands of tokens, its attention is that of a Performer, linear in their number: random positive features
approximate the softmax. A deep and narrow vision transformer with a class token and fixed sinusoidal positions follows.
(B, 3, S, S) -> (B, S*S/16, 147) -> (B, S*S/64, 576) -> (B, S*S/256, D) -> (B, classes).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilevit.compare.networks.layers import Attention, FeedForward, TransformerLayer, initialize, prepend, to_map

SPLITS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))  # kernel, stride and padding in pixels
TOKEN_DIM = 64  # between the splits
DIM, NUM_HEADS, FFN_DIM = 256, 4, 512
EPSILON = 1e-8


def soft_split(x_BCHW: Tensor, kernel_px: int, stride_px: int, padding_px: int) -> Tensor:
    """Overlapping windows as tokens: (B, C, H, W) -> (B, windows, C * kernel * kernel)."""
    return F.unfold(x_BCHW, kernel_px, padding=padding_px, stride=stride_px).transpose(1, 2)


class Performer(nn.Module):
    """A transformer layer with one head and linear attention; (B, N, in) -> (B, N, D)."""

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
        """Random features (B, N, D / 2). The product of two approximates the exponential of the tokens' product."""
        x = F.linear(x_BND, self.random) - (x_BND * x_BND).sum(dim=-1, keepdim=True) / 2
        return x.exp() / math.sqrt(len(self.random))

    def forward(self, x_BNC: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x_BNC)).chunk(3, dim=-1)
        q, k = self.features(q), self.features(k)
        y = q @ (k.transpose(1, 2) @ v)  # (B, N, D), and never N x N
        y = y / (q @ k.sum(dim=1).unsqueeze(2)).clamp(min=EPSILON)  # the ONNX exporter would drop an added epsilon
        x = v + self.dropout(self.out(y))  # the shortcut is the value, because the width changes
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class T2TViT(nn.Module):
    """T2T-ViT-`num_layers`: images (B, 3, size, size) -> logits (B, classes)."""

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
        self.layers = nn.Sequential(
            *(
                TransformerLayer(DIM, Attention(DIM, NUM_HEADS, qkv_bias=False), FeedForward(DIM, FFN_DIM), 1e-5)
                for _ in range(num_layers)
            )
        )
        self.norm = nn.LayerNorm(DIM)
        self.classifier = nn.Linear(DIM, num_classes)
        self.apply(initialize)

    def forward(self, images: Tensor) -> Tensor:
        x = soft_split(images, *SPLITS[0])
        for performer, split in zip(self.performers, SPLITS[1:], strict=True):
            x = soft_split(to_map(performer(x)), *split)
        x = prepend(self.class_token, self.project(x)) + self.positions
        return self.classifier(self.norm(self.layers(x))[:, 0])


def sine_positions(num_tokens: int, dim: int) -> Tensor:
    """Sinusoidal positions (tokens, dim): sines at even and cosines at odd indices, wavelengths 2 pi to 20,000 pi."""
    frequencies = 10_000 ** (-torch.arange(0, dim, 2) / dim)
    angles = torch.arange(num_tokens)[:, None] * frequencies
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)
