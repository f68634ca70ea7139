"""int8 sensitivity analysis: the error that quantizing one group of layers causes.

Quantization is simulated in torch by rounding, as static int8 computes it: weights with one scale per output channel,
inputs with one scale, from the smallest to the largest calibration value. One group at a time is quantized and the rest
stays float32. Runtimes round slightly differently.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node

from mobilevit.export.artifact import as_arrays
from mobilevit.export.rewrite import optimize_for_inference
from mobilevit.export.verify import OutputComparison

ALL_LAYERS = "all layers"


@dataclass(frozen=True)
class Sensitivity:
    """Effect of quantizing the layers of `group` alone.

    `rms_error` is the root mean square error of the outputs, in standard deviations of an output;
    `prediction_agreement` is that of `mobilevit.export.verify.Agreement`.
    """

    group: str
    num_layers: int
    num_weights: int
    rms_error: float
    prediction_agreement: float


def int8_sensitivity(
    network: nn.Module,
    inputs: Sequence[Tensor],
    outputs: Sequence[str] = ("logits",),
    thresholds: Sequence[float] = (),
    batch_size: int = 16,
) -> list[Sensitivity]:
    """Measure each group of layers of `network`, and all layers together.

    Args:
        network: in eval mode; it is not modified.
        inputs: (1, ...) each; they also calibrate the ranges.
        outputs: names, see `ArtifactSpec.outputs`.
        thresholds: of a multi-label classifier; empty for other tasks.
        batch_size: inputs per forward pass.
    """
    model = optimize_for_inference(network)
    layers = {name: x for name, x in model.named_modules() if isinstance(x, nn.Conv2d | nn.Linear)}
    batches = [torch.cat(list(inputs[i : i + batch_size])) for i in range(0, len(inputs), batch_size)]
    groups: dict[str, list[str]] = {}
    for name in layers:
        groups.setdefault(group_of(name), []).append(name)

    def predict() -> list[tuple[np.ndarray, ...]]:
        return [as_arrays(model(batch)) for batch in batches]

    sensitivities = []
    with torch.inference_mode():
        ranges: dict[str, tuple[Tensor, Tensor]] = {}
        hooks = [layer.register_forward_pre_hook(_observer(ranges, name)) for name, layer in layers.items()]
        expected = predict()
        for hook in hooks:
            hook.remove()
        for group, names in {**groups, ALL_LAYERS: list(layers)}.items():
            weights = {name: layers[name].weight.data for name in names}
            hooks = [layers[name].register_forward_pre_hook(_rounder(*ranges[name])) for name in names]
            for name in names:
                layers[name].weight.data = _rounded_weight(weights[name])
            comparison = OutputComparison(outputs, thresholds)
            for before, after in zip(expected, predict(), strict=True):
                comparison.update(before, after, len(after[0]))
            for name, hook in zip(names, hooks, strict=True):
                layers[name].weight.data = weights[name]
                hook.remove()
            num_weights = sum(weight.numel() for weight in weights.values())
            errors = comparison.rms_error, comparison.prediction_agreement
            sensitivities.append(Sensitivity(group, len(names), num_weights, *errors))
    return sensitivities


def group_of(name: str) -> str:
    """The group of the layer with this name: "stem", "stage3 convolutions", "stage3 ffn", "classifier"."""
    group = find_group(name)
    assert group, f"layer {name} belongs to no group"
    return group


def find_group(name: str) -> str | None:
    """As `group_of`, for any module, such as an activation; None for modules outside of the groups."""
    match = re.search(r"(stem|stage\d|extra_layers|pooled|heads?|pyramid|classifier)(.*)", name)
    if match is None:
        return None
    group, rest = match.groups()
    if not group.startswith("stage"):
        return group.replace("_", " ")
    of_layer = re.search(r"\.layers\.\d+(\.attention)?", rest)
    if of_layer is None:
        return f"{group} convolutions"
    return f"{group} attention" if of_layer[1] else f"{group} ffn"


def group_of_node(node: Node) -> str | None:
    """The group of the module that a node of an exported program comes from; None outside of the groups."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return find_group(stack[-1][0]) if stack else None


_Hook = Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...] | None]


def _observer(ranges: dict[str, tuple[Tensor, Tensor]], name: str) -> _Hook:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        # The range includes zero: padding contains it, and int8 must represent it exactly.
        low, high = args[0].min().clamp(max=0), args[0].max().clamp(min=0)
        if name in ranges:
            low, high = torch.minimum(low, ranges[name][0]), torch.maximum(high, ranges[name][1])
        ranges[name] = low, high

    return hook


def _rounder(low: Tensor, high: Tensor) -> _Hook:
    scale = ((high - low) / 255).clamp(min=1e-12)
    zero = torch.round(-low / scale)

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return ((torch.round(args[0] / scale + zero).clamp(0, 255) - zero) * scale,)

    return hook


def _rounded_weight(weight: Tensor) -> Tensor:
    largest = weight.flatten(1).abs().amax(dim=1).clamp(min=1e-12)
    scale = (largest / 127).reshape(-1, *[1] * (weight.ndim - 1))
    return torch.round(weight / scale).clamp(-127, 127) * scale
