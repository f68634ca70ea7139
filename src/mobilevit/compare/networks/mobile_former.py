"""Mobile-Former: Chen et al., "Mobile-Former: Bridging MobileNet and Transformer", arXiv 2108.05895.

Two parallel networks, a MobileNet on a map and a transformer on a few learned tokens, with cross-attention in both
directions in every block: the tokens attend to the pixels of the map, then to each other; the MobileNet block computes
the slopes of its activations from the first token; then the pixels attend to the tokens. The cross-attention does not
project the pixels, which would be its largest cost.
B batch, C channels, H W pixels of the map, M tokens, D token width.
(B, 3, S, S) -> maps at strides 2 to 32 and tokens (B, M, D) -> (B, classes).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilevit.compare.networks.layers import (
    FeedForward,
    conv_norm,
    initialize,
    join_heads,
    split_heads,
    to_tokens,
)

BRIDGE_HEADS, TOKEN_HEADS = 2, 4
HEAD_EXPANSION = 6
SLOPE_SQUEEZE = 4  # reduction of the token width in the network that computes the slopes


@dataclass(frozen=True)
class Block:
    """Output channels and expansion of a block. A block that halves the map has a second expansion."""

    channels: int
    expansion: int
    halves: bool = False
    second_expansion: int = 4


@dataclass(frozen=True)
class Architecture:
    """Widths and blocks of a network."""

    stem_channels: int
    blocks: tuple[Block, ...]
    num_tokens: int
    token_dim: int
    head_dim: int


# Named after millions of multiply-accumulates.
ARCHITECTURES = {
    "96m": Architecture(
        stem_channels=12,
        blocks=(
            Block(16, 6, halves=True),
            Block(32, 6, halves=True),
            Block(32, 3),
            Block(64, 6, halves=True),
            Block(64, 4),
            Block(88, 6),
            Block(128, 6, halves=True),
            Block(128, 6),
        ),
        num_tokens=4,
        token_dim=128,
        head_dim=1280,
    ),
    "214m": Architecture(
        stem_channels=12,
        blocks=(
            Block(20, 6, halves=True),
            Block(20, 3),
            Block(40, 6, halves=True),
            Block(40, 4),
            Block(80, 6, halves=True),
            Block(80, 4),
            Block(112, 6),
            Block(112, 6),
            Block(160, 6, halves=True),
            Block(160, 6),
            Block(160, 6),
        ),
        num_tokens=6,
        token_dim=192,
        head_dim=1600,
    ),
}


class ToTokens(nn.Module):
    """Cross-attention, tokens to pixels; (B, M, D) and (B, C, H, W) -> (B, M, D)."""

    def __init__(self, token_dim: int, channels: int):
        super().__init__()
        self.query = nn.Linear(token_dim, channels)
        self.gate = nn.Linear(token_dim, channels)  # in the released code, not in the paper's text
        self.out = nn.Linear(channels, token_dim)
        self.norm = nn.LayerNorm(token_dim)

    def forward(self, tokens: Tensor, x_BCHW: Tensor) -> Tensor:
        (q,) = split_heads(self.query(tokens), 1, BRIDGE_HEADS)
        (pixels,) = split_heads(to_tokens(x_BCHW), 1, BRIDGE_HEADS)  # keys and values, not projected
        y = join_heads(F.scaled_dot_product_attention(q, pixels, pixels))
        return self.norm(tokens + self.out(2 * F.hardsigmoid(self.gate(tokens)) * y))


class Former(nn.Module):
    """A post-norm transformer layer without key and value projections; (B, M, D) -> (B, M, D)."""

    def __init__(self, dim: int):
        super().__init__()
        self.query = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.attention_norm = nn.LayerNorm(dim)
        self.ffn = FeedForward(dim, 2 * dim)
        self.ffn_norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor) -> Tensor:
        (q,) = split_heads(self.query(tokens), 1, TOKEN_HEADS)
        (kv,) = split_heads(tokens, 1, TOKEN_HEADS)
        tokens = self.attention_norm(tokens + self.out(join_heads(F.scaled_dot_product_attention(q, kv, kv))))
        return self.ffn_norm(tokens + self.ffn(tokens))


class ToMap(nn.Module):
    """Cross-attention, pixels to tokens; (B, C, H, W) and (B, M, D) -> (B, C, H, W)."""

    def __init__(self, token_dim: int, channels: int):
        super().__init__()
        self.key = nn.Linear(token_dim, channels)
        self.value = nn.Linear(token_dim, channels)

    def forward(self, x_BCHW: Tensor, tokens: Tensor) -> Tensor:
        (pixels,) = split_heads(to_tokens(x_BCHW), 1, BRIDGE_HEADS)  # queries, not projected
        (k,) = split_heads(self.key(tokens), 1, BRIDGE_HEADS)
        (v,) = split_heads(self.value(tokens), 1, BRIDGE_HEADS)
        y = join_heads(F.scaled_dot_product_attention(pixels, k, v))
        return x_BCHW + y.transpose(1, 2).reshape(x_BCHW.shape)


class DynamicReLU(nn.Module):
    """The maximum of two multiples of the input, with slopes computed from the first token; (B, C, H, W) -> same."""

    def __init__(self, channels: int, token_dim: int):
        super().__init__()
        hidden = token_dim // SLOPE_SQUEEZE
        self.slopes = nn.Sequential(
            nn.Linear(token_dim, hidden), nn.ReLU(), nn.Linear(hidden, 2 * channels), nn.Hardsigmoid()
        )

    def forward(self, x_BCHW: Tensor, tokens: Tensor) -> Tensor:
        # The slopes are 0 to 2 and -1 to 1; the middles, 1 and 0, make a ReLU.
        first, second = (2 * self.slopes(tokens[:, 0]) - 1)[:, :, None, None].chunk(2, dim=1)
        return torch.maximum((1 + first) * x_BCHW, second * x_BCHW)


class Mobile(nn.Module):
    """An inverted residual with dynamic ReLU; a shortcut if channels are equal; (B, C, H, W) -> (B, out, H, W)."""

    def __init__(self, in_channels: int, block: Block, token_dim: int):
        super().__init__()
        hidden = in_channels * block.expansion
        self.residual = in_channels == block.channels
        self.expand = conv_norm(in_channels, hidden, 1)
        self.expand_activation = DynamicReLU(hidden, token_dim)
        self.depthwise = conv_norm(hidden, hidden, 3, groups=hidden)
        self.depthwise_activation = DynamicReLU(hidden, token_dim)
        self.reduce = conv_norm(hidden, block.channels, 1)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        y = self.expand_activation(self.expand(x), tokens)
        y = self.reduce(self.depthwise_activation(self.depthwise(y), tokens))
        return x + y if self.residual else y


class MobileDown(nn.Module):
    """Two depthwise separable convolutions, the first with stride 2, the second with a shortcut.

    (B, C, H, W) -> (B, out, H / 2, W / 2).
    """

    def __init__(self, in_channels: int, block: Block, token_dim: int):
        super().__init__()
        first, second = in_channels * block.expansion, block.channels * block.second_expansion
        self.down = conv_norm(in_channels, first, 3, stride=2, groups=in_channels)
        self.down_activation = DynamicReLU(first, token_dim)
        self.reduce = conv_norm(first, block.channels, 1)
        self.depthwise = conv_norm(block.channels, second, 3, groups=block.channels)
        self.depthwise_activation = DynamicReLU(second, token_dim)
        self.project = conv_norm(second, block.channels, 1)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        x = self.reduce(self.down_activation(self.down(x), tokens))
        return x + self.project(self.depthwise_activation(self.depthwise(x), tokens))


class MobileFormerBlock(nn.Module):
    """Map (B, C, H, W) and tokens (B, M, D) -> the next map and the next tokens."""

    def __init__(self, in_channels: int, block: Block, token_dim: int):
        super().__init__()
        self.to_tokens = ToTokens(token_dim, in_channels)
        self.former = Former(token_dim)
        self.mobile = (MobileDown if block.halves else Mobile)(in_channels, block, token_dim)
        self.to_map = ToMap(token_dim, block.channels)

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.former(self.to_tokens(tokens, x))
        return self.to_map(self.mobile(x, tokens), tokens), tokens


class MobileFormer(nn.Module):
    """Images (B, 3, H, W) -> logits (B, classes); `name` is "96m" or "214m"."""

    def __init__(self, num_classes: int, name: str):
        super().__init__()
        a = ARCHITECTURES[name]
        channels = a.stem_channels
        self.stem = nn.Sequential(conv_norm(3, channels, 3, stride=2), nn.ReLU6())
        self.lite = nn.Sequential(  # the block at stride 2, without tokens
            conv_norm(channels, 2 * channels, 3, groups=channels), nn.ReLU6(), conv_norm(2 * channels, channels, 1)
        )
        self.tokens = nn.Parameter(torch.randn(1, a.num_tokens, a.token_dim))
        self.blocks = nn.ModuleList()
        for block in a.blocks:
            self.blocks.append(MobileFormerBlock(channels, block, a.token_dim))
            channels = block.channels
        self.to_tokens = ToTokens(a.token_dim, channels)
        self.head = nn.Sequential(conv_norm(channels, HEAD_EXPANSION * channels, 1), nn.ReLU6())
        self.hidden = nn.Sequential(
            nn.Linear(HEAD_EXPANSION * channels + a.token_dim, a.head_dim), nn.BatchNorm1d(a.head_dim), nn.Hardswish()
        )
        self.classifier = nn.Linear(a.head_dim, num_classes)
        self.apply(initialize)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        x = x + self.lite(x)
        tokens = self.tokens.expand(len(x), -1, -1)
        for block in self.blocks:
            x, tokens = block(x, tokens)
        tokens = self.to_tokens(tokens, x)
        x = F.hardswish(self.head(x).mean(dim=(-2, -1)))
        return self.classifier(self.hidden(torch.cat((x, tokens[:, 0]), dim=1)))
