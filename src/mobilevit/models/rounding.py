"""int8 rounding of weights and layer inputs in PyTorch: simulation of int8, and quantization-aware training.

Weights have one scale per output channel, symmetric with 127 steps on each side. Inputs have one scale and a zero
point, with 255 steps from their smallest to their largest value. PyTorch's `fake_quantize` operators round, and pass
gradients through the rounding unchanged (straight-through estimator).

Batch norm needs no attention: it multiplies each output channel by a factor, which changes the scale of the channel and
not the integers, so it does not matter whether it is folded into the weights before or after rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilevit.models.fuse import Network, frozen_copy, replace_modules

MIN_SCALE = 1e-12  # of weights or inputs that are all 0
Range = tuple[Tensor, Tensor]
"""Smallest and largest input of a layer, float32 scalars."""


def round_weight(weight: Tensor) -> Tensor:
    """`weight` (out, ...), rounded per output channel."""
    largest = weight.detach().flatten(1).abs().amax(dim=1).float()
    scale = (largest / 127).clamp(min=MIN_SCALE)
    return torch.fake_quantize_per_channel_affine(weight, scale, torch.zeros_like(scale).int(), 0, -127, 127)


def round_input(x: Tensor, range_: Range) -> Tensor:
    """`x`, clipped to a range and rounded to 256 values."""
    low, high = range_
    scale = ((high - low) / 255).clamp(min=MIN_SCALE)
    return torch.fake_quantize_per_tensor_affine(x, scale, torch.round(-low / scale).int(), 0, 255)


def range_of(x: Tensor) -> Range:
    """The range of `x`. It includes zero: padding contains it, and int8 must represent it exactly."""
    low, high = torch.aminmax(x.detach())
    return low.float().clamp(max=0), high.float().clamp(min=0)


def layers_of(model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """The convolutions and linear layers by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}


# ---------------------------------------------------------------------------------------------------------------------
# Static ranges, as in an artifact


def calibrate(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, Range]:
    """The range of the inputs of every layer of `layers_of` over all `batches`."""
    ranges: dict[str, Range] = {}

    def observe(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            low, high = range_of(args[0])
            if name in ranges:
                low, high = torch.minimum(low, ranges[name][0]), torch.maximum(high, ranges[name][1])
            ranges[name] = low, high

        return hook

    hooks = [layer.register_forward_pre_hook(observe(name)) for name, layer in layers_of(model).items()]
    with torch.inference_mode():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    return ranges


def input_rounder(range_: Range) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """A forward pre-hook that rounds the input of a layer."""
    return lambda _, args: (round_input(args[0], range_),)


def simulate_int8(model: Network, batches: Iterable[Tensor]) -> Network:
    """A copy of `model`, for inference, that computes approximately what an int8 artifact computes.

    `batches` calibrate the ranges of the inputs. Attention, norms, activations and sums stay float32; some runtimes
    quantize these, too.
    """
    model = frozen_copy(model)
    ranges = calibrate(model, batches)
    for name, layer in layers_of(model).items():
        if name in ranges:  # not the auxiliary head of segmentation, which is for training only
            layer.weight.data = round_weight(layer.weight)
            layer.register_forward_pre_hook(input_rounder(ranges[name]))
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Ranges of the batch, for training


class RoundedConv2d(nn.Conv2d):
    """A convolution with rounded weights and a rounded input; the range of the input is that of the batch."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(round_input(input, range_of(input)), round_weight(self.weight), self.bias)


class RoundedLinear(nn.Linear):
    """A linear layer with rounded weights and a rounded input; the range of the input is that of the batch."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(round_input(input, range_of(input)), round_weight(self.weight), self.bias)


def twin(model: Network) -> Network:
    """A copy of `model` that shares its parameters and buffers; modes and modules are its own."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def round_layers(model: Network) -> Network:
    """Replace the convolutions and linear layers inside `model` by rounded ones with the same parameters, in place."""
    return replace_modules(model, _rounded)


def _rounded(layer: nn.Module) -> nn.Module:
    if type(layer) is nn.Conv2d:
        new = RoundedConv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,  # pyright: ignore[reportArgumentType]
            layer.stride,  # pyright: ignore[reportArgumentType]
            layer.padding,  # pyright: ignore[reportArgumentType]
            layer.dilation,  # pyright: ignore[reportArgumentType]
            layer.groups,
            device="meta",
        )
    elif type(layer) is nn.Linear:
        new = RoundedLinear(layer.in_features, layer.out_features, device="meta")
    else:
        return layer
    new.weight, new.bias = layer.weight, layer.bias
    return new.train(layer.training)
