"""What a place of a layer depends on: the gradient of its response with respect to the pixels of the image.

Where it is exactly 0, no change of the image, small as it may be, reaches the place. Of convolutions that is all but
a window; behind the first transformer it is nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mobilevit.explain.attention import find_blocks, record, title_of
from mobilevit.models.mobilevit import Attention, Backbone


@dataclass(frozen=True)
class Field:
    """What one place of a layer depends on in one image.

    `gradient` (H, W), of the pixels that the network sees, is the length of the gradient over R, G and B. `window` is
    (left, top, right, bottom) in the same pixels: as far as the place would see through convolutions alone.
    """

    stage: str
    is_before_transformer: bool
    has_attention: bool
    gradient: Tensor
    window: tuple[int, int, int, int]

    @property
    def name(self) -> str:
        """What the layer is called in a caption."""
        name = title_of(self.stage)
        return f"{name}, before its transformer" if self.is_before_transformer else name

    @property
    def share(self) -> float:
        """Of the pixels that the place depends on, 0 to 1."""
        return self.gradient.count_nonzero().item() / self.gradient.numel()


def fields_of(backbone: Backbone, pixels: Tensor, x: float, y: float) -> tuple[Field, ...]:
    """What the place (x, y) of several layers depends on in one preprocessed image (1, 3, H, W), in their order.

    The layers are the last stage without a transformer, the map that the first transformer is given, and every stage
    with a transformer. (x, y) are shares of the width and the height, from 0 up to but not including 1.
    """
    blocks = find_blocks(backbone)
    first = next(iter(blocks))
    modules = dict(backbone.named_children())
    before = [name for name in modules if name not in blocks][-1:]
    layers: dict[tuple[str, bool], nn.Module] = {(name, False): modules[name] for name in before}
    layers[first, True] = blocks[first].local
    layers |= {(stage, False): modules[stage] for stage in blocks}
    named = {f"{stage} {is_before}": module for (stage, is_before), module in layers.items()}
    whole = _gradients(backbone, pixels, named, x, y)
    with _without_attention(backbone):
        windows = {name: _window(gradient) for name, gradient in _gradients(backbone, pixels, named, x, y).items()}
    return tuple(
        Field(stage, is_before, stage in blocks and not is_before, whole[name], windows[name])
        for name, (stage, is_before) in zip(named, layers, strict=True)
    )


def _gradients(
    backbone: Backbone, pixels: Tensor, modules: Mapping[str, nn.Module], x: float, y: float
) -> dict[str, Tensor]:
    with torch.enable_grad():
        pixels = pixels.detach().clone().requires_grad_()
        _, maps = record(backbone, pixels, modules)
        found = {}
        for name, map_BCHW in maps.items():
            response_C = map_BCHW[0, :, int(y * map_BCHW.shape[2]), int(x * map_BCHW.shape[3])]
            # Of half its squared length: a plain sum over channels can cancel where each of them depends on a pixel.
            (gradient,) = torch.autograd.grad(response_C @ response_C.detach(), pixels, retain_graph=True)
            found[name] = gradient[0].norm(dim=0).cpu()
    return found


@contextmanager
def _without_attention(backbone: Backbone) -> Iterator[None]:
    """The same network with nothing added by attention: what is left of it looks through convolutions alone."""

    def nothing(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return torch.zeros_like(output)

    handles = [module.register_forward_hook(nothing) for module in backbone.modules() if isinstance(module, Attention)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _window(gradient_HW: Tensor) -> tuple[int, int, int, int]:
    rows, columns = (gradient_HW.any(dim=dim).nonzero().flatten().tolist() for dim in (1, 0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
