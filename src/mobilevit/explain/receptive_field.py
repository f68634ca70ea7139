"""Receptive fields: the gradient of a layer's response at one point with respect to the pixels of the image.

Where the gradient is exactly 0, no small change of the image affects the response. For convolutions that is everything
outside a window; after the first transformer the receptive field is the whole image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mobilevit.explain.attention import capture_outputs, find_blocks, stage_title
from mobilevit.models.mobilevit import Attention, Backbone


@dataclass(frozen=True)
class ReceptiveField:
    """The receptive field of one point of a layer in one image.

    `gradient` (H, W) is the norm of the gradient over R, G and B for every pixel of the network's input. `conv_window`
    (left, top, right, bottom), in the same pixels, is the receptive field without attention.
    """

    stage: str
    is_before_transformer: bool
    has_attention: bool
    gradient: Tensor
    conv_window: tuple[int, int, int, int]

    @property
    def title(self) -> str:
        return stage_title(self.stage) + (", before its transformer" if self.is_before_transformer else "")

    @property
    def fraction(self) -> float:
        """The fraction of the pixels with a nonzero gradient."""
        return self.gradient.count_nonzero().item() / self.gradient.numel()

    @property
    def conv_window_relative(self) -> tuple[float, float, float, float]:
        """`conv_window` relative to the size of the input."""
        (left, top, right, bottom), (height, width) = self.conv_window, self.gradient.shape
        return left / width, top / height, right / width, bottom / height

    @property
    def conv_fraction(self) -> float:
        """The fraction of the pixels inside `conv_window`."""
        left, top, right, bottom = self.conv_window
        return (right - left) * (bottom - top) / self.gradient.numel()


def compute_receptive_fields(backbone: Backbone, image: Tensor, x: float, y: float) -> tuple[ReceptiveField, ...]:
    """Receptive fields at the point (x, y), in [0, 1), for one preprocessed image (1, 3, H, W), in forward order.

    The layers are the last stage without a transformer, the input of the first transformer, and the output of every
    stage with a transformer.
    """
    blocks = find_blocks(backbone)
    stages = dict(backbone.named_children())
    first = next(iter(blocks))
    last_conv_stages = [stage for stage in stages if stage not in blocks][-1:]
    layers: dict[tuple[str, bool], nn.Module] = {(stage, False): stages[stage] for stage in last_conv_stages}
    layers[first, True] = blocks[first].local
    layers |= {(stage, False): stages[stage] for stage in blocks}
    modules = {f"{stage} {is_before}": module for (stage, is_before), module in layers.items()}
    gradients = _gradients(backbone, image, modules, x, y)
    with _without_attention(backbone):
        conv_gradients = _gradients(backbone, image, modules, x, y)
    return tuple(
        ReceptiveField(
            stage,
            is_before,
            has_attention=stage in blocks and not is_before,
            gradient=gradients[name],
            conv_window=_bounding_box(conv_gradients[name]),
        )
        for name, (stage, is_before) in zip(modules, layers, strict=True)
    )


def _gradients(
    backbone: Backbone, image: Tensor, modules: Mapping[str, nn.Module], x: float, y: float
) -> dict[str, Tensor]:
    with torch.enable_grad():
        image = image.detach().clone().requires_grad_()
        _, maps = capture_outputs(backbone, image, modules)
        gradients = {}
        for name, map_BCHW in maps.items():
            response_C = map_BCHW[0, :, int(y * map_BCHW.shape[2]), int(x * map_BCHW.shape[3])]
            # The gradient of half the squared norm: the gradients of single channels can cancel in a plain sum.
            (gradient,) = torch.autograd.grad(response_C @ response_C.detach(), image, retain_graph=True)
            gradients[name] = gradient[0].norm(dim=0).cpu()
    return gradients


@contextmanager
def _without_attention(backbone: Backbone) -> Iterator[None]:
    """Replaces the output of every attention layer by zeros, so that only convolutions mix pixels."""

    def zero(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return torch.zeros_like(output)

    handles = [module.register_forward_hook(zero) for module in backbone.modules() if isinstance(module, Attention)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _bounding_box(gradient_HW: Tensor) -> tuple[int, int, int, int]:
    rows, columns = (gradient_HW.any(dim=dim).nonzero().flatten().tolist() for dim in (1, 0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
