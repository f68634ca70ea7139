"""What the vision transformers in this folder share. B batch, N tokens, D width of a token."""

from __future__ import annotations

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
        """Every token attends to all."""
        q, k, v = split_heads(self.qkv(x_BND), 3, self.num_heads)
        return self.out(join_heads(F.scaled_dot_product_attention(q, k, v)))


class FeedForward(nn.Sequential):
    """Two linear layers with GELU between; (..., D) -> (..., D)."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__(nn.Linear(dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, dim))


def split_heads(x_BND: Tensor, num_parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """Parts that lie side by side in the width, each by head: (B, N, parts * D) -> (B, heads, N, D / heads) each."""
    x = x_BND.reshape(*x_BND.shape[:2], num_parts, num_heads, -1)
    return tuple(part.transpose(1, 2) for part in x.unbind(2))


def join_heads(x_BhNd: Tensor) -> Tensor:
    """The heads side by side again: (B, heads, N, D / heads) -> (B, N, D)."""
    return x_BhNd.transpose(1, 2).flatten(2)


def to_map(x_BND: Tensor) -> Tensor:
    """Tokens of a square map, row by row, as that map: (B, N, D) -> (B, D, side, side)."""
    side = round(x_BND.shape[1] ** 0.5)
    return x_BND.transpose(1, 2).unflatten(2, (side, side))


def to_tokens(x_BDHW: Tensor) -> Tensor:
    """Undo `to_map`: (B, D, H, W) -> (B, H * W, D)."""
    return x_BDHW.flatten(2).transpose(1, 2)


def initialise(module: nn.Module) -> None:
    """Linears normal of 0.02 truncated at two deviations, convolutions Kaiming normal over fan-out, biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)
