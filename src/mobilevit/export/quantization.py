"""int8 sensitivity analysis: the error that quantizing one group of layers causes.

Quantization is simulated in torch by rounding weights and layer inputs; see `mobilevit.models.rounding`. One group at a
time is quantized and the rest stays float32. Runtimes round slightly differently.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node

from mobilevit.export.artifact import as_arrays
from mobilevit.export.rewrite import optimize_for_inference
from mobilevit.export.verify import OutputComparison
from mobilevit.models.rounding import calibrate, input_rounder, layers_of, round_weight

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
    layers = layers_of(model)
    batches = [torch.cat(list(inputs[i : i + batch_size])) for i in range(0, len(inputs), batch_size)]
    groups: dict[str, list[str]] = {}
    for name in layers:
        groups.setdefault(group_of(name), []).append(name)

    def predict() -> list[tuple[np.ndarray, ...]]:
        return [as_arrays(model(batch)) for batch in batches]

    sensitivities = []
    with torch.inference_mode():
        ranges = calibrate(model, layers, batches)
        expected = predict()
        for group, names in {**groups, ALL_LAYERS: list(layers)}.items():
            weights = {name: layers[name].weight.data for name in names}
            hooks = [layers[name].register_forward_pre_hook(input_rounder(ranges[name])) for name in names]
            for name in names:
                layers[name].weight.data = round_weight(weights[name])
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
