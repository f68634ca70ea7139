"""What int8 costs, part by part: which of them a user may want to keep in float, and why.

Every part alone is computed as static int8 would compute it, weights with a scale for each output channel and inputs
with one scale for all, from the smallest to the largest value seen; the rest stays in float. It is done in torch, by
rounding, so it needs no runtime and holds for all of them in the first place; each then rounds a little differently.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mobilevit.export.rewrite import fast
from mobilevit.export.verify import Tally, as_arrays

EVERYTHING = "everything"


@dataclass(frozen=True)
class Cost:
    """What happens when `part` alone is in int8: `error` is the root mean square difference of an output, in its
    standard deviations, `same` the share of answers that are the same; see `mobilevit.export.verify.Agreement`.
    """

    part: str
    num_layers: int
    num_weights: int
    error: float
    same: float


def costs_of_int8(
    network: nn.Module, inputs: Sequence[Tensor], outputs: Sequence[str] = ("logits",), batch_size: int = 16
) -> list[Cost]:
    """The cost of every part of `network` and of everything, on `inputs`, (1, ...) each, which also calibrate.

    `outputs` are names as `Target.outputs` has them.
    """
    model = fast(network)
    layers = {name: x for name, x in model.named_modules() if isinstance(x, nn.Conv2d | nn.Linear)}
    batches = [torch.cat(list(inputs[i : i + batch_size])) for i in range(0, len(inputs), batch_size)]
    ranges: dict[str, tuple[Tensor, Tensor]] = {}

    def observe(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            # Zero is always among the values: padding has it, and int8 must have a number for it.
            low, high = args[0].min().clamp(max=0), args[0].max().clamp(min=0)
            if name in ranges:
                low, high = torch.minimum(low, ranges[name][0]), torch.maximum(high, ranges[name][1])
            ranges[name] = low, high

        return hook

    def answers() -> list[tuple[np.ndarray, ...]]:
        return [as_arrays(model(batch)) for batch in batches]

    with torch.inference_mode():
        hooks = [layer.register_forward_pre_hook(observe(name)) for name, layer in layers.items()]
        expected = answers()
        for hook in hooks:
            hook.remove()
        parts: dict[str, list[str]] = {}
        for name in layers:
            parts.setdefault(part_of(name), []).append(name)
        costs = []
        for part, names in {**parts, EVERYTHING: list(layers)}.items():
            weights = {name: layers[name].weight.data for name in names}
            hooks = [layers[name].register_forward_pre_hook(_rounder(*ranges[name])) for name in names]
            for name in names:
                layers[name].weight.data = _rounded_weight(weights[name])
            tally = Tally(outputs)
            for theirs, ours in zip(expected, answers(), strict=True):
                tally.add(theirs, ours, len(ours[0]))
            for name, hook in zip(names, hooks, strict=True):
                layers[name].weight.data = weights[name]
                hook.remove()
            costs.append(
                Cost(
                    part,
                    len(names),
                    sum(weight.numel() for weight in weights.values()),
                    tally.mean_error,
                    tally.num_same / max(tally.num_answers, 1),
                )
            )
    return costs


def part_of(name: str) -> str:
    """The part that the layer of this name belongs to: "stem", "stage3 convolutions", "stage3 ffn", "classifier"."""
    found = re.search(r"(stem|stage\d|extra_layers|pooled|heads?|pyramid|classifier)(.*)", name)
    assert found, f"{name} is in no part of the network"
    part, rest = found.groups()
    if not part.startswith("stage"):
        return part.replace("_", " ")
    if ".attention." in rest:
        return f"{part} attention"
    if ".ffn_" in rest:
        return f"{part} ffn"
    return f"{part} convolutions"


def _rounder(low: Tensor, high: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    scale = ((high - low) / 255).clamp(min=1e-12)
    zero = torch.round(-low / scale)

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return ((torch.round(args[0] / scale + zero).clamp(0, 255) - zero) * scale,)

    return hook


def _rounded_weight(weight: Tensor) -> Tensor:
    largest = weight.flatten(1).abs().amax(dim=1).clamp(min=1e-12)
    scale = (largest / 127).reshape(-1, *[1] * (weight.ndim - 1))
    return torch.round(weight / scale).clamp(-127, 127) * scale
