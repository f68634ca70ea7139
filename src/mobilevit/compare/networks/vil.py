"""ViL: Zhang et al., "Multi-Scale Vision Longformer: A New Vision Transformer for High-Resolution Image Encoding",
arXiv 2103.15358.

Characteristic: four stages of transformers on maps at strides 4, 8, 16, 32. In the first two, whose maps are large,
attention is local and global at once: the map is cut into windows of 7x7, a token sees the tokens of its own window and
of the eight around it, and one global token; the global token sees all and is seen by all. The last two stages attend
fully. Positions are learned biases by distance. A stage starts from the patches of the map before and from a global
token of its own; the last has none and is averaged.
(B, 3, S, S) -> (B, 1 + S*S/16, 48) -> (B, 1 + S*S/64, 96) -> (B, 1 + S*S/256, 192) -> (B, S*S/1024, 384)
-> (B, classes).

In training the released code may draw one of the eight windows at random instead of seeing all, to save time; here, as
in its evaluation, all are seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilevit.compare.networks.vit import FeedForward, initialise, join_heads, split_heads, to_map, to_tokens

WINDOW_PX = 7  # of the map
NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class Stage:
    """Patches of a map, then transformer layers."""

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
    """A learned bias for each head and each distance in rows and columns between two squares of pixels."""

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
    """Every token attends to all; (B, global tokens + side * side, D) -> same."""

    def __init__(self, dim: int, num_heads: int, side: int, *, global_token: bool):
        super().__init__()
        self.num_heads = num_heads
        self.num_global = int(global_token)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.bias = self._build_bias(num_heads, side)
        # For a global query and local keys, for local queries and the global key, for the global token and itself.
        self.global_bias = nn.Parameter(0.02 * torch.randn(3, num_heads, 1, 1)) if global_token else None

    def _build_bias(self, num_heads: int, side: int) -> DistanceBias:
        return DistanceBias(num_heads, side, side)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Global token first, if there is one."""
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
        """What the tokens of the map gather: queries of the map, keys and values of all; by head."""
        bias = self.bias()
        if self.global_bias is not None:
            bias = torch.cat((self.global_bias[1].expand(-1, bias.shape[1], -1), bias), dim=-1)
        return (q @ k.transpose(-2, -1) + bias).softmax(dim=-1) @ v


class WindowAttention(FullAttention):
    """A token of the map sees its window, the eight around it and the global token; (B, 1 + side * side, D) -> same."""

    outside: Tensor

    def __init__(self, dim: int, num_heads: int, side: int):
        super().__init__(dim, num_heads, side, global_token=True)
        self.side = side
        self.num_windows = -(-side // WINDOW_PX)  # in a row
        self.filling = self.num_windows * WINDOW_PX - side  # pixels that the last window of a row lacks
        outside = self.neighbourhoods(torch.ones(1, 1, side * side, 1)) == 0
        self.register_buffer("outside", outside[0].transpose(-2, -1), persistent=False)  # (windows, 1, 1, 9 * window)

    def _build_bias(self, num_heads: int, side: int) -> DistanceBias:
        return DistanceBias(num_heads, WINDOW_PX, 3 * WINDOW_PX)

    def windows(self, x_BhNd: Tensor) -> Tensor:
        """Tokens of the map by window: (B, heads, side * side, d) -> (B, windows, heads, window, d)."""
        x = F.pad(to_map(x_BhNd.flatten(0, 1)), (0, self.filling, 0, self.filling))
        return self._squares(x, WINDOW_PX, len(x_BhNd))

    def neighbourhoods(self, x_BhNd: Tensor) -> Tensor:
        """And those of the nine windows around each, 0 outside of the map: -> (B, windows, heads, 9 * window, d)."""
        before, after = WINDOW_PX, WINDOW_PX + self.filling
        x = F.pad(to_map(x_BhNd.flatten(0, 1)), (before, after, before, after))
        return self._squares(x, 3 * WINDOW_PX, len(x_BhNd))

    @staticmethod
    def _squares(x_BdHW: Tensor, side: int, batch: int) -> Tensor:
        x = x_BdHW.unfold(2, side, WINDOW_PX).unfold(3, side, WINDOW_PX)  # (B * heads, d, rows, columns, side, side)
        x = x.permute(0, 2, 3, 4, 5, 1).flatten(3, 4).flatten(1, 2)
        return x.unflatten(0, (batch, -1)).transpose(1, 2)

    def attend_local(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As in full attention, window by window."""
        B, num_heads, _, d = q.shape
        n, w = self.num_windows, WINDOW_PX
        k, v = (
            torch.cat((x[:, None, :, :1].expand(-1, n * n, -1, -1, -1), self.neighbourhoods(x[:, :, 1:])), dim=3)
            for x in (k, v)
        )  # (B, windows, heads, 1 + 9 * window, d)
        assert self.global_bias is not None
        bias = self.bias().masked_fill(self.outside, float("-inf"))  # (windows, heads, window, 9 * window)
        bias = torch.cat((self.global_bias[1].expand(n * n, -1, w * w, -1), bias), dim=-1)
        y = (self.windows(q) @ k.transpose(-2, -1) + bias).softmax(dim=-1) @ v
        y = y.reshape(B, n, n, num_heads, w, w, d).permute(0, 3, 1, 4, 2, 5, 6)
        return y.reshape(B, num_heads, n * w, n * w, d)[:, :, : self.side, : self.side].flatten(2, 3)


class Layer(nn.Module):
    """Pre-norm attention and feed-forward; (B, N, D) -> (B, N, D)."""

    def __init__(self, stage: Stage, side: int):
        super().__init__()
        self.attention_norm = nn.LayerNorm(stage.dim, eps=NORM_EPSILON)
        self.attention = (
            WindowAttention(stage.dim, stage.num_heads, side)
            if stage.windows
            else FullAttention(stage.dim, stage.num_heads, side, global_token=stage.global_token)
        )
        self.ffn_norm = nn.LayerNorm(stage.dim, eps=NORM_EPSILON)
        self.ffn = FeedForward(stage.dim, 4 * stage.dim)

    def forward(self, x: Tensor) -> Tensor:
        """Both with shortcuts."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.ffn(self.ffn_norm(x))


class MultiScaleStage(nn.Module):
    """A map -> tokens of its patches, global token first: (B, C, H, W) -> (B, global + H * W / patch / patch, D)."""

    def __init__(self, in_channels: int, stage: Stage, side: int):
        super().__init__()
        self.patches = nn.Conv2d(in_channels, stage.dim, stage.patch_px, stride=stage.patch_px)
        self.norm = nn.LayerNorm(stage.dim, eps=NORM_EPSILON)
        self.global_token = nn.Parameter(0.02 * torch.randn(1, 1, stage.dim)) if stage.global_token else None
        self.layers = nn.Sequential(*(Layer(stage, side) for _ in range(stage.num_layers)))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The tokens after the layers."""
        x = self.norm(to_tokens(self.patches(x_BCHW)))
        if self.global_token is not None:
            x = torch.cat((self.global_token.expand(len(x), -1, -1), x), dim=1)
        return self.layers(x)


class ViL(nn.Module):
    """ViL-Tiny, the classifier for images of `size_px` squared, a multiple of 32."""

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
        self.apply(initialise)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, 3, size, size)."""
        first, *later = self.stages
        x = first(images)
        for stage in later:
            x = stage(to_map(x[:, 1:]))  # the global token stays behind
        return self.classifier(self.norm(x).mean(dim=1))
