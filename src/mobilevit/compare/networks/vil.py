"""ViL: Zhang et al., "Multi-Scale Vision Longformer: A New Vision Transformer for High-Resolution Image Encoding",
arXiv 2103.15358.

Four stages of transformer layers on maps at strides 4, 8, 16, 32. The first two stages, whose maps are large, combine
local and global attention: the map is divided into windows of 7x7 tokens; a token attends to its own window, to the
eight windows around it, and to a global token; the global token attends to all tokens. The last two stages use full
attention. Relative positions are learned biases. Each stage embeds patches of the previous map and has its own global
token; the last stage has none, and its tokens are averaged.
(B, 3, S, S) -> (B, 1 + S*S/16, 48) -> (B, 1 + S*S/64, 96) -> (B, 1 + S*S/256, 192) -> (B, S*S/1024, 384)
-> (B, classes).

To save time in training, the released code can sample one of the eight neighboring windows. Here, all are used, as in
its evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilevit.compare.networks.layers import (
    FeedForward,
    TransformerLayer,
    initialize,
    join_heads,
    prepend,
    split_heads,
    to_map,
    to_tokens,
)

WINDOW_PX = 7  # of the map
NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class Stage:
    """Patch embedding and transformer layers of a stage."""

    patch_px: int
    dim: int
    num_heads: int
    num_layers: int
    windows: bool
    global_token: bool


TINY = (
    Stage(patch_px=4, dim=48, num_heads=1, num_layers=1, windows=True, global_token=True),
    Stage(patch_px=2, dim=96, num_heads=3, num_layers=1, windows=True, global_token=True),
    Stage(patch_px=2, dim=192, num_heads=3, num_layers=9, windows=False, global_token=True),
    Stage(patch_px=2, dim=384, num_heads=6, num_layers=1, windows=False, global_token=False),
)


class DistanceBias(nn.Module):
    """Learned biases of the attention scores, by head and by relative position (rows and columns)."""

    index: Tensor

    def __init__(self, num_heads: int, query_side: int, key_side: int):
        super().__init__()
        distances = torch.arange(query_side)[:, None] - torch.arange(key_side)[None, :] + key_side - 1  # from 0
        num_distances = query_side + key_side - 1
        index = distances[:, None, :, None] * num_distances + distances[None, :, None, :]
        self.register_buffer("index", index.reshape(query_side**2, key_side**2), persistent=False)
        self.table = nn.Parameter(0.02 * torch.randn(num_heads, num_distances**2))

    def forward(self) -> Tensor:
        """(heads, queries, keys), both row by row."""
        return self.table[:, self.index]


class FullAttention(nn.Module):
    """Full self-attention, global token first, if there is one; (B, global tokens + side * side, D) -> same."""

    def __init__(self, dim: int, num_heads: int, side: int, *, global_token: bool):
        super().__init__()
        self.num_heads = num_heads
        self.num_global = int(global_token)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.bias = self._build_bias(num_heads, side)
        # Global query and local keys, local queries and global key, global query and global key.
        self.global_bias = nn.Parameter(0.02 * torch.randn(3, num_heads, 1, 1)) if global_token else None

    def _build_bias(self, num_heads: int, side: int) -> DistanceBias:
        return DistanceBias(num_heads, side, side)

    def forward(self, x_BND: Tensor) -> Tensor:
        q, k, v = split_heads(self.qkv(x_BND), 3, self.num_heads)  # (B, heads, N, D / heads)
        q = q * q.shape[-1] ** -0.5
        y = self.attend_local(q[:, :, self.num_global :], k, v)
        if self.global_bias is not None:
            to_local, _, to_global = self.global_bias
            bias = torch.cat((to_global, to_local.expand(-1, -1, k.shape[2] - 1)), dim=-1)  # (heads, 1, N)
            weights = (q[:, :, :1] @ k.transpose(-2, -1) + bias).softmax(dim=-1)
            y = torch.cat((weights @ v, y), dim=2)
        return self.out(join_heads(y))

    def attend_local(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the map: queries q (B, heads, side * side, d), keys and values of all tokens -> like q."""
        bias = self.bias()
        if self.global_bias is not None:
            bias = torch.cat((self.global_bias[1].expand(-1, bias.shape[1], -1), bias), dim=-1)
        return (q @ k.transpose(-2, -1) + bias).softmax(dim=-1) @ v


class WindowAttention(FullAttention):
    """A token attends to its window, the eight around it and the global token; (B, 1 + side * side, D) -> same."""

    outside: Tensor

    def __init__(self, dim: int, num_heads: int, side: int):
        super().__init__(dim, num_heads, side, global_token=True)
        self.side = side
        self.num_windows = -(-side // WINDOW_PX)  # in a row
        self.padding = self.num_windows * WINDOW_PX - side  # padding of the last window of a row
        outside = self.neighborhoods(torch.ones(1, 1, side * side, 1)) == 0
        self.register_buffer("outside", outside[0].transpose(-2, -1), persistent=False)  # (windows, 1, 1, 9 * window)

    def _build_bias(self, num_heads: int, side: int) -> DistanceBias:
        return DistanceBias(num_heads, WINDOW_PX, 3 * WINDOW_PX)

    def windows(self, x_BhNd: Tensor) -> Tensor:
        """Group tokens by window: (B, heads, side * side, d) -> (B, windows, heads, window, d)."""
        x = F.pad(to_map(x_BhNd.flatten(0, 1)), (0, self.padding, 0, self.padding))
        return self._squares(x, WINDOW_PX, len(x_BhNd))

    def neighborhoods(self, x_BhNd: Tensor) -> Tensor:
        """The tokens of 3x3 windows around each window, 0 outside of the map: -> (B, windows, heads, 9 * window, d)."""
        before, after = WINDOW_PX, WINDOW_PX + self.padding
        x = F.pad(to_map(x_BhNd.flatten(0, 1)), (before, after, before, after))
        return self._squares(x, 3 * WINDOW_PX, len(x_BhNd))

    @staticmethod
    def _squares(x_BdHW: Tensor, side: int, batch: int) -> Tensor:
        x = x_BdHW.unfold(2, side, WINDOW_PX).unfold(3, side, WINDOW_PX)  # (B * heads, d, rows, columns, side, side)
        x = x.permute(0, 2, 3, 4, 5, 1).flatten(3, 4).flatten(1, 2)
        return x.unflatten(0, (batch, -1)).transpose(1, 2)

    def attend_local(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, num_heads, _, d = q.shape
        n, w = self.num_windows, WINDOW_PX
        k, v = (
            torch.cat((x[:, None, :, :1].expand(-1, n * n, -1, -1, -1), self.neighborhoods(x[:, :, 1:])), dim=3)
            for x in (k, v)
        )  # (B, windows, heads, 1 + 9 * window, d)
        assert self.global_bias is not None
        bias = self.bias().masked_fill(self.outside, float("-inf"))  # (windows, heads, window, 9 * window)
        bias = torch.cat((self.global_bias[1].expand(n * n, -1, w * w, -1), bias), dim=-1)
        y = (self.windows(q) @ k.transpose(-2, -1) + bias).softmax(dim=-1) @ v
        y = y.reshape(B, n, n, num_heads, w, w, d).permute(0, 3, 1, 4, 2, 5, 6)
        return y.reshape(B, num_heads, n * w, n * w, d)[:, :, : self.side, : self.side].flatten(2, 3)


def _layer(stage: Stage, side: int) -> TransformerLayer:
    attention = (
        WindowAttention(stage.dim, stage.num_heads, side)
        if stage.windows
        else FullAttention(stage.dim, stage.num_heads, side, global_token=stage.global_token)
    )
    return TransformerLayer(stage.dim, attention, FeedForward(stage.dim, 4 * stage.dim), NORM_EPSILON)


class MultiScaleStage(nn.Module):
    """Patch embedding and layers, global token first: (B, C, H, W) -> (B, global + H * W / patch / patch, D)."""

    def __init__(self, in_channels: int, stage: Stage, side: int):
        super().__init__()
        self.patches = nn.Conv2d(in_channels, stage.dim, stage.patch_px, stride=stage.patch_px)
        self.norm = nn.LayerNorm(stage.dim, eps=NORM_EPSILON)
        self.global_token = nn.Parameter(0.02 * torch.randn(1, 1, stage.dim)) if stage.global_token else None
        self.layers = nn.Sequential(*(_layer(stage, side) for _ in range(stage.num_layers)))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x = self.norm(to_tokens(self.patches(x_BCHW)))
        if self.global_token is not None:
            x = prepend(self.global_token, x)
        return self.layers(x)


class ViL(nn.Module):
    """ViL-Tiny: images (B, 3, size, size), the size a multiple of 32 -> logits (B, classes)."""

    def __init__(self, num_classes: int, size_px: int):
        super().__init__()
        self.stages = nn.ModuleList()
        channels, side = 3, size_px
        for stage in TINY:
            side //= stage.patch_px
            self.stages.append(MultiScaleStage(channels, stage, side))
            channels = stage.dim
        self.norm = nn.LayerNorm(channels, eps=NORM_EPSILON)
        self.classifier = nn.Linear(channels, num_classes)
        self.apply(initialize)

    def forward(self, images: Tensor) -> Tensor:
        first, *later = self.stages
        x = first(images)
        for stage in later:
            x = stage(to_map(x[:, 1:]))  # without the global token
        return self.classifier(self.norm(x).mean(dim=1))
