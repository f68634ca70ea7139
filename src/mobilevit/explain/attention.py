"""Which places a place in a MobileViT block attends to.

What is shown is what the network computed: queries and keys are read where the network makes them, and nothing of it
is changed. In a block a place attends to the same pixel position of every patch, and to nothing else of the map; the
3x3 convolution before has told each of those places what is around it.

Shapes as in `models/mobilevit.py`, and L layers of a block, d width of a head. Places are (x, y), shares of the width
and the height of what the network sees, from 0 up to but not including 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mobilevit.models.mobilevit import Attention, Backbone, MobileViTBlock, fold


@dataclass(frozen=True)
class BlockAttention:
    """What the L layers of one MobileViT block attended to in one image.

    The map was cut into `rows` by `columns` patches, N together, of `patch_px` by `patch_px` pixels, P together.
    `queries` and `keys` are (L, P, N, heads, d).
    """

    stage: str
    patch_px: int
    rows: int
    columns: int
    queries: Tensor
    keys: Tensor

    @property
    def name(self) -> str:
        """What the block is called in a caption."""
        return title_of(self.stage)

    @property
    def num_layers(self) -> int:
        """L."""
        return self.queries.shape[0]

    @property
    def num_heads(self) -> int:
        """Of each layer."""
        return self.queries.shape[3]

    def matrices(self, layer: int, position: int) -> Tensor:
        """How much each patch attends to each other at one pixel position, (heads, N, N); rows sum to 1."""
        q_NHd, k_NHd = self.queries[layer, position], self.keys[layer, position]
        return (torch.einsum("nhd,mhd->hnm", q_NHd, k_NHd) / q_NHd.shape[-1] ** 0.5).softmax(dim=-1)

    def find(self, x: float, y: float) -> tuple[int, int]:
        """The pixel position and the patch, both numbered row by row, in which a place lies."""
        p = self.patch_px
        row, column = int(y * self.rows * p), int(x * self.columns * p)
        return row % p * p + column % p, row // p * self.columns + column // p

    def attended(self, x: float, y: float, *, layer: int | None = None, head: int | None = None) -> Tensor:
        """How much the place (x, y) attends to each patch, (rows, columns), which sums to 1.

        It is the mean over all layers and all heads where none is chosen.
        """
        position, patch = self.find(x, y)
        layers = range(self.num_layers) if layer is None else (layer,)
        rows_LHN = torch.stack([self.matrices(i, position)[:, patch] for i in layers])
        if head is not None:
            rows_LHN = rows_LHN[:, head : head + 1]
        return rows_LHN.mean(dim=(0, 1)).reshape(self.rows, self.columns)

    def rollout(self, x: float, y: float) -> Tensor:
        """How much of each patch reaches the place (x, y) through all layers, (rows, columns), which sums to 1.

        Attention rollout (Abnar and Zuidema 2020): heads averaged, and half of every layer is the shortcut around its
        attention. The layers' networks are left out of it, so it says where something may come from, not what.
        """
        position, patch = self.find(x, y)
        reaches_N = torch.zeros_like(self.queries[0, 0, :, 0, 0])
        reaches_N[patch] = 1
        for layer in reversed(range(self.num_layers)):
            reaches_N = 0.5 * reaches_N + 0.5 * reaches_N @ self.matrices(layer, position).mean(dim=0)
        return reaches_N.reshape(self.rows, self.columns)

    def fold_back(self, patches: Tensor, x: float, y: float) -> Tensor:
        """What was attended, (rows, columns), on the map itself, (rows * patch_px, columns * patch_px).

        It is 0 at every pixel but those at the position in their patch at which the place (x, y) is in its own.
        """
        tokens_PNC = patches.new_zeros(self.patch_px**2, patches.numel(), 1)
        tokens_PNC[self.find(x, y)[0], :, 0] = patches.flatten()
        return fold(tokens_PNC, self.patch_px, self.rows * self.patch_px, self.columns * self.patch_px)[0, 0]


def title_of(stage: str) -> str:
    """The name of a stage as a word of English, "Stage 3" for "stage3"."""
    return stage.replace("stage", "Stage ")


def find_blocks(backbone: Backbone) -> dict[str, MobileViTBlock]:
    """The MobileViT blocks by the name of their stage."""
    return {
        name: module
        for name, stage in backbone.named_children()
        for module in stage.modules()
        if isinstance(module, MobileViTBlock)
    }


def record(network: nn.Module, pixels: Tensor, modules: Mapping[str, nn.Module]) -> tuple[Any, dict[str, Tensor]]:
    """What the network answers, and what some of its modules put out on the way, by the names given to them."""
    outputs: dict[str, Tensor] = {}

    def keep_as(name: str) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            outputs[name] = output

        return keep

    handles = [module.register_forward_hook(keep_as(name)) for name, module in modules.items()]
    try:
        return network(pixels), outputs
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def attention_of(backbone: Backbone, pixels: Tensor) -> tuple[BlockAttention, ...]:
    """What every MobileViT block attends to in one preprocessed image (1, 3, H, W), from the first to the last."""
    blocks = find_blocks(backbone)
    projections: dict[str, list[nn.Module]] = {
        stage: [module.qkv for module in block.layers.modules() if isinstance(module, Attention)]
        for stage, block in blocks.items()
    }
    modules: dict[str, nn.Module] = {f"{stage} map": block.to_tokens for stage, block in blocks.items()}
    modules |= {f"{stage} {i}": module for stage, several in projections.items() for i, module in enumerate(several)}
    _, outputs = record(backbone, pixels, modules)
    found = []
    for stage, block in blocks.items():
        p = block.patch_px
        rows, columns = (-(-side // p) for side in outputs[f"{stage} map"].shape[-2:])
        heads = next(module.num_heads for module in block.layers.modules() if isinstance(module, Attention))
        qkv = torch.stack([outputs[f"{stage} {i}"] for i in range(len(projections[stage]))]).float().cpu()
        q, k, _ = qkv.unflatten(-1, (3, heads, -1)).unbind(3)  # each (L, P, N, heads, d)
        found.append(BlockAttention(stage, p, rows, columns, q, k))
    return tuple(found)
