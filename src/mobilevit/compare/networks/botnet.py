"""BoTNet: Srinivas et al., "Bottleneck Transformers for Visual Recognition", arXiv 2101.11605.

ResNet-50 with the three 3x3 convolutions of its last stage replaced by self-attention over the whole map, with relative
positions: the product of the query with a learned vector for the distance in rows, and with one for the distance in
columns, is added to that of query and key. The block that halves the map applies attention first, then average pooling.
(B, 3, S, S) -> ResNet-50 -> (B, 2048, S/32, S/32) -> (B, classes).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet, resnet50

from mobilevit.compare.networks.layers import initialize

NUM_HEADS = 4


class RelativeAttention(nn.Module):
    """Attention over the pixels of a square map with relative positions; (B, C, side, side) -> same."""

    distances: Tensor

    def __init__(self, channels: int, side: int):
        super().__init__()
        head_dim = channels // NUM_HEADS
        self.scale = head_dim**-0.5
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        initialize(self.qkv)
        # By distance from query to key, -(side - 1) to side - 1, the same for all heads.
        self.rows = nn.Parameter(self.scale * torch.randn(2 * side - 1, head_dim))
        self.columns = nn.Parameter(self.scale * torch.randn(2 * side - 1, head_dim))
        line = torch.arange(side)
        self.register_buffer("distances", line[None, :] - line[:, None] + side - 1, persistent=False)  # (query, key)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        B, C, H, W = x_BCHW.shape
        q, k, v = self.qkv(x_BCHW).reshape(B, 3, NUM_HEADS, C // NUM_HEADS, H * W).transpose(-2, -1).unbind(1)
        q = q * self.scale  # (B, heads, H * W, C / heads)
        q_map = q.unflatten(2, (H, W))
        by_row = torch.einsum("bnhwd,hkd->bnhwk", q_map, self.rows[self.distances])
        by_column = torch.einsum("bnhwd,wkd->bnhwk", q_map, self.columns[self.distances])
        positions = (by_row[..., :, None] + by_column[..., None, :]).reshape(B, NUM_HEADS, H * W, H * W)
        weights = (q @ k.transpose(-2, -1) + positions).softmax(dim=-1)
        return (weights @ v).transpose(-2, -1).reshape(B, C, H, W)


def botnet50(num_classes: int, size_px: int) -> ResNet:
    """BoTNet-50: images (B, 3, size, size), the size a multiple of 32 -> logits (B, classes)."""
    network = resnet50(num_classes=num_classes)
    side = size_px // 16
    for block in network.layer4:
        assert isinstance(block, Bottleneck)
        attention: nn.Module = RelativeAttention(block.conv2.in_channels, side)
        if block.stride > 1:
            attention = nn.Sequential(attention, nn.AvgPool2d(2))
            side //= 2
        block.add_module("conv2", attention)
    return network
