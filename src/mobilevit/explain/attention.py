"""The attention of every MobileViT block, computed from the queries and keys of a forward pass.

In a block, a pixel of the feature map attends to the pixels at the same position in every patch, and to no others. The
3x3 convolution before the transformer has already mixed each patch.

Shape letters as in `models/mobilevit.py`; in addition, L layers of a block and d dimensions of a head. Points (x, y)
are relative to the network's input, in [0, 1).
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
    """Queries and keys of the L layers of one MobileViT block for one image, each (L, P, N, heads, d).

    The feature map has `rows` x `columns` patches, N in total, of `patch_px` x `patch_px` pixels, P in total.
    """

    stage: str
    patch_px: int
    rows: int
    columns: int
    queries: Tensor
    keys: Tensor

    @property
    def title(self) -> str:
        return stage_title(self.stage)

    @property
    def num_layers(self) -> int:
        return self.queries.shape[0]

    @property
    def num_heads(self) -> int:
        return self.queries.shape[3]

    def matrices(self, layer: int, position: int) -> Tensor:
        """Attention between the patches at one pixel position, (heads, N, N); rows sum to 1."""
        q_NHd, k_NHd = self.queries[layer, position], self.keys[layer, position]
        return (torch.einsum("nhd,mhd->hnm", q_NHd, k_NHd) / q_NHd.shape[-1] ** 0.5).softmax(dim=-1)

    def locate(self, x: float, y: float) -> tuple[int, int]:
        """The pixel position inside its patch and the patch of a point, both as row-major indices."""
        p = self.patch_px
        row, column = int(y * self.rows * p), int(x * self.columns * p)
        return row % p * p + column % p, row // p * self.columns + column // p

    def from_point(self, x: float, y: float, *, layer: int | None = None, head: int | None = None) -> Tensor:
        """Attention from the point to every patch, (rows, columns), which sums to 1.

        Averaged over all layers and all heads unless one is given.
        """
        position, patch = self.locate(x, y)
        layers = range(self.num_layers) if layer is None else (layer,)
        rows_LHN = torch.stack([self.matrices(i, position)[:, patch] for i in layers])
        if head is not None:
            rows_LHN = rows_LHN[:, head : head + 1]
        return rows_LHN.mean(dim=(0, 1)).reshape(self.rows, self.columns)

    def rollout(self, x: float, y: float) -> Tensor:
        """Attention rollout (Abnar and Zuidema 2020) from the point through all layers, (rows, columns); sums to 1.

        Heads are averaged, and the residual connection around the attention counts as half of every layer. The
        feed-forward networks are ignored.
        """
        position, patch = self.locate(x, y)
        rollout_N = torch.zeros_like(self.queries[0, 0, :, 0, 0])
        rollout_N[patch] = 1
        for layer in reversed(range(self.num_layers)):
            rollout_N = 0.5 * rollout_N + 0.5 * rollout_N @ self.matrices(layer, position).mean(dim=0)
        return rollout_N.reshape(self.rows, self.columns)

    def to_map(self, patches: Tensor, x: float, y: float) -> Tensor:
        """Values per patch, (rows, columns), on the feature map, (rows * patch_px, columns * patch_px).

        Only pixels at the point's position inside their patch are nonzero.
        """
        tokens_PNC = patches.new_zeros(self.patch_px**2, patches.numel(), 1)
        tokens_PNC[self.locate(x, y)[0], :, 0] = patches.flatten()
        return fold(tokens_PNC, self.patch_px, self.rows * self.patch_px, self.columns * self.patch_px)[0, 0]


def stage_title(stage: str) -> str:
    """The title of a stage: "Stage 3" for "stage3"."""
    return stage.replace("stage", "Stage ")


def find_blocks(backbone: Backbone) -> dict[str, MobileViTBlock]:
    """The MobileViT blocks by the name of their stage."""
    return {
        name: module
        for name, stage in backbone.named_children()
        for module in stage.modules()
        if isinstance(module, MobileViTBlock)
    }


def capture_outputs(
    network: nn.Module, images: Tensor, modules: Mapping[str, nn.Module]
) -> tuple[Any, dict[str, Tensor]]:
    """The output of the network, and the outputs of `modules` under the same keys."""
    outputs: dict[str, Tensor] = {}

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            outputs[name] = output

        return hook

    handles = [module.register_forward_hook(hook_for(name)) for name, module in modules.items()]
    try:
        return network(images), outputs
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def compute_attention(backbone: Backbone, image: Tensor) -> tuple[BlockAttention, ...]:
    """The attention of every MobileViT block for one preprocessed image (1, 3, H, W), in forward order."""
    blocks = find_blocks(backbone)
    layers = {
        stage: [module for module in block.layers.modules() if isinstance(module, Attention)]
        for stage, block in blocks.items()
    }
    modules: dict[str, nn.Module] = {f"{stage} map": block.to_tokens for stage, block in blocks.items()}
    modules |= {f"{stage} {i}": layer.qkv for stage in blocks for i, layer in enumerate(layers[stage])}
    _, outputs = capture_outputs(backbone, image, modules)
    result = []
    for stage, block in blocks.items():
        p = block.patch_px
        rows, columns = (-(-side // p) for side in outputs[f"{stage} map"].shape[-2:])
        qkv = torch.stack([outputs[f"{stage} {i}"] for i in range(len(layers[stage]))]).float().cpu()
        q, k, _ = qkv.unflatten(-1, (3, layers[stage][0].num_heads, -1)).unbind(3)  # each (L, P, N, heads, d)
        result.append(BlockAttention(stage, p, rows, columns, q, k))
    return tuple(result)
