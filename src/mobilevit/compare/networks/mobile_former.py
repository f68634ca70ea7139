"""Mobile-Former: Chen et al., "Mobile-Former: Bridging MobileNet and Transformer", arXiv 2108.05895.

Characteristic: two networks side by side, a MobileNet on a map and a transformer on a handful of learned tokens, and in
each block a bridge in both directions: the tokens attend to the pixels of the map, then to each other; the MobileNet
block takes the slopes of its activation from the first token; at last the pixels attend to the tokens. On the side of
the map the bridge has no projections, which would cost most.
B batch, C channels, H W the map, M tokens, D their width. (B, 3, S, S) -> maps at strides 2 to 32, tokens (B, M, D)
-> both -> (B, classes).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilevit.compare.networks.vit import FeedForward, initialise, join_heads, split_heads, to_tokens

BRIDGE_HEADS, TOKEN_HEADS = 2, 4
HEAD_EXPANSION = 6
SLOPE_SQUEEZE = 4  # of the token's width, in the network that turns it into slopes


@dataclass(frozen=True)
class Block:
    """Its width, and how many times its input it is inside; one that halves the map is wide a second time."""

    channels: int
    expansion: int
    halves: bool = False
    second_expansion: int = 4


@dataclass(frozen=True)
class Architecture:
    """What fixes the function of the network except the class count and the weights."""

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
    """The bridge from Mobile to Former: tokens gather pixels; (B, M, D) and (B, C, H, W) -> (B, M, D)."""

    def __init__(self, token_dim: int, channels: int):
        super().__init__()
        self.query = nn.Linear(token_dim, channels)
        self.gate = nn.Linear(token_dim, channels)  # in the released code, not in the paper's text
        self.out = nn.Linear(channels, token_dim)
        self.norm = nn.LayerNorm(token_dim)

    def forward(self, tokens: Tensor, x_BCHW: Tensor) -> Tensor:
        """Key and value are the pixels as they are."""
        (q,) = split_heads(self.query(tokens), 1, BRIDGE_HEADS)
        (pixels,) = split_heads(to_tokens(x_BCHW), 1, BRIDGE_HEADS)
        y = join_heads(F.scaled_dot_product_attention(q, pixels, pixels))
        return self.norm(tokens + self.out(2 * F.hardsigmoid(self.gate(tokens)) * y))


class Former(nn.Module):
    """A post-norm transformer layer over the tokens, key and value the tokens as they are; (B, M, D) -> (B, M, D)."""

    def __init__(self, dim: int):
        super().__init__()
        self.query = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.attention_norm = nn.LayerNorm(dim)
        self.ffn = FeedForward(dim, 2 * dim)
        self.ffn_norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Both parts with shortcuts."""
        (q,) = split_heads(self.query(tokens), 1, TOKEN_HEADS)
        (kv,) = split_heads(tokens, 1, TOKEN_HEADS)
        tokens = self.attention_norm(tokens + self.out(join_heads(F.scaled_dot_product_attention(q, kv, kv))))
        return self.ffn_norm(tokens + self.ffn(tokens))


class ToMap(nn.Module):
    """The bridge from Former to Mobile: pixels gather tokens; (B, C, H, W) and (B, M, D) -> (B, C, H, W)."""

    def __init__(self, token_dim: int, channels: int):
        super().__init__()
        self.key = nn.Linear(token_dim, channels)
        self.value = nn.Linear(token_dim, channels)

    def forward(self, x_BCHW: Tensor, tokens: Tensor) -> Tensor:
        """The query is the pixels as they are."""
        (pixels,) = split_heads(to_tokens(x_BCHW), 1, BRIDGE_HEADS)
        (k,) = split_heads(self.key(tokens), 1, BRIDGE_HEADS)
        (v,) = split_heads(self.value(tokens), 1, BRIDGE_HEADS)
        y = join_heads(F.scaled_dot_product_attention(pixels, k, v))
        return x_BCHW + y.transpose(1, 2).reshape(x_BCHW.shape)


class DynamicReLU(nn.Module):
    """The larger of two multiples of the input, their slopes functions of the first token; (B, C, H, W) -> same."""

    def __init__(self, channels: int, token_dim: int):
        super().__init__()
        hidden = token_dim // SLOPE_SQUEEZE
        self.slopes = nn.Sequential(
            nn.Linear(token_dim, hidden), nn.ReLU(), nn.Linear(hidden, 2 * channels), nn.Hardsigmoid()
        )

    def forward(self, x_BCHW: Tensor, tokens: Tensor) -> Tensor:
        """Slopes from 0 to 2 and from -1 to 1, of which 1 and 0, ReLU itself, are the middle."""
        first, second = (2 * self.slopes(tokens[:, 0]) - 1)[:, :, None, None].chunk(2, dim=1)
        return torch.maximum((1 + first) * x_BCHW, second * x_BCHW)


class Mobile(nn.Module):
    """MobileNet's inverted residual with dynamic ReLU; (B, C, H, W) -> (B, out, H, W)."""

    def __init__(self, in_channels: int, block: Block, token_dim: int):
        super().__init__()
        hidden = in_channels * block.expansion
        self.residual = in_channels == block.channels
        self.expand = _conv_norm(in_channels, hidden, 1)
        self.expand_activation = DynamicReLU(hidden, token_dim)
        self.depthwise = _conv_norm(hidden, hidden, 3, groups=hidden)
        self.depthwise_activation = DynamicReLU(hidden, token_dim)
        self.reduce = _conv_norm(hidden, block.channels, 1)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """A shortcut where the channels stay."""
        y = self.expand_activation(self.expand(x), tokens)
        y = self.reduce(self.depthwise_activation(self.depthwise(y), tokens))
        return x + y if self.residual else y


class MobileDown(nn.Module):
    """Halve the map and widen, twice depthwise and 1x1 convolution; (B, C, H, W) -> (B, out, H / 2, W / 2)."""

    def __init__(self, in_channels: int, block: Block, token_dim: int):
        super().__init__()
        first, second = in_channels * block.expansion, block.channels * block.second_expansion
        self.down = _conv_norm(in_channels, first, 3, stride=2, groups=in_channels)
        self.down_activation = DynamicReLU(first, token_dim)
        self.reduce = _conv_norm(first, block.channels, 1)
        self.depthwise = _conv_norm(block.channels, second, 3, groups=block.channels)
        self.depthwise_activation = DynamicReLU(second, token_dim)
        self.project = _conv_norm(second, block.channels, 1)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """A shortcut around the second pair."""
        x = self.reduce(self.down_activation(self.down(x), tokens))
        return x + self.project(self.depthwise_activation(self.depthwise(x), tokens))


class MobileFormerBlock(nn.Module):
    """Map to tokens, tokens, map, tokens to map; (B, C, H, W) and (B, M, D) -> the next of both."""

    def __init__(self, in_channels: int, block: Block, token_dim: int):
        super().__init__()
        self.to_tokens = ToTokens(token_dim, in_channels)
        self.former = Former(token_dim)
        self.mobile = (MobileDown if block.halves else Mobile)(in_channels, block, token_dim)
        self.to_map = ToMap(token_dim, block.channels)

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The map sees the tokens of this block, the tokens the map of the one before."""
        tokens = self.former(self.to_tokens(tokens, x))
        return self.to_map(self.mobile(x, tokens), tokens), tokens


class MobileFormer(nn.Module):
    """The classifier of the architecture `name`, "96m" or "214m"."""

    def __init__(self, num_classes: int, name: str):
        super().__init__()
        a = ARCHITECTURES[name]
        channels = a.stem_channels
        self.stem = nn.Sequential(_conv_norm(3, channels, 3, stride=2), nn.ReLU6())
        self.lite = nn.Sequential(  # the block at stride 2, still without a bridge
            _conv_norm(channels, 2 * channels, 3, groups=channels), nn.ReLU6(), _conv_norm(2 * channels, channels, 1)
        )
        self.tokens = nn.Parameter(torch.randn(1, a.num_tokens, a.token_dim))
        self.blocks = nn.ModuleList()
        for block in a.blocks:
            self.blocks.append(MobileFormerBlock(channels, block, a.token_dim))
            channels = block.channels
        self.to_tokens = ToTokens(a.token_dim, channels)
        self.head = nn.Sequential(_conv_norm(channels, HEAD_EXPANSION * channels, 1), nn.ReLU6())
        self.hidden = nn.Sequential(
            nn.Linear(HEAD_EXPANSION * channels + a.token_dim, a.head_dim), nn.BatchNorm1d(a.head_dim), nn.Hardswish()
        )
        self.classifier = nn.Linear(a.head_dim, num_classes)
        self.apply(initialise)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, 3, H, W)."""
        x = self.stem(images)
        x = x + self.lite(x)
        tokens = self.tokens.expand(len(x), -1, -1)
        for block in self.blocks:
            x, tokens = block(x, tokens)
        tokens = self.to_tokens(tokens, x)
        x = F.hardswish(self.head(x).mean(dim=(-2, -1)))
        return self.classifier(self.hidden(torch.cat((x, tokens[:, 0]), dim=1)))


def _conv_norm(in_channels: int, out_channels: int, kernel_px: int, *, stride: int = 1, groups: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_px, stride, kernel_px // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
    )
