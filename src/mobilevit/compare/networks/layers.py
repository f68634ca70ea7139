"""Layers that several networks of this package share. B batch, N tokens, D token width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention; (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.out = nn.Linear(dim, dim)

    def forward(self, x_BND: Tensor) -> Tensor:
        q, k, v = split_heads(self.qkv(x_BND), 3, self.num_heads)
        return self.out(join_heads(F.scaled_dot_product_attention(q, k, v)))


class FeedForward(nn.Sequential):
    """Linear, GELU, linear; (..., D) -> (..., D)."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__(nn.Linear(dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, dim))


class TransformerLayer(nn.Module):
    """Pre-norm attention and feed-forward network, both with shortcuts; (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, attention: nn.Module, ffn: nn.Module, epsilon: float):
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim, eps=epsilon)
        self.attention = attention
        self.ffn_norm = nn.LayerNorm(dim, eps=epsilon)
        self.ffn = ffn

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.ffn(self.ffn_norm(x))


def conv_norm(
    in_channels: int,
    out_channels: int,
    kernel_px: int,
    activation: nn.Module | None = None,
    *,
    stride: int = 1,
    groups: int = 1,
) -> nn.Sequential:
    """Convolution without bias, batch norm and, if given, an activation; (B, C, H, W) -> (B, out, H, W) / stride."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_px, stride, kernel_px // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), *([activation] if activation else []))


def prepend(token: Tensor, x_BND: Tensor) -> Tensor:
    """Put a learned token (1, 1, D) in front of the others: (B, N, D) -> (B, 1 + N, D)."""
    return torch.cat((token.expand(len(x_BND), -1, -1), x_BND), dim=1)


def split_heads(x_BND: Tensor, num_parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """Split e.g. queries, keys and values, and their heads: (B, N, parts * D) -> parts x (B, heads, N, D / heads)."""
    x = x_BND.reshape(*x_BND.shape[:2], num_parts, num_heads, -1)
    return tuple(part.transpose(1, 2) for part in x.unbind(2))


def join_heads(x_BhNd: Tensor) -> Tensor:
    """Concatenate the heads: (B, heads, N, D / heads) -> (B, N, D)."""
    return x_BhNd.transpose(1, 2).flatten(2)


def to_map(x_BND: Tensor) -> Tensor:
    """Arrange tokens, row by row, as a square map: (B, N, D) -> (B, D, side, side)."""
    side = round(x_BND.shape[1] ** 0.5)
    return x_BND.transpose(1, 2).unflatten(2, (side, side))


def to_tokens(x_BDHW: Tensor) -> Tensor:
    """Undo `to_map`: (B, D, H, W) -> (B, H * W, D)."""
    return x_BDHW.flatten(2).transpose(1, 2)


def initialize(module: nn.Module) -> None:
    """Truncated normal (std 0.02) for linear layers, Kaiming normal (fan-out) for convolutions, 0 for biases."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)
