"""What one image costs: parameters, multiply-accumulates and activation memory, computed without running anything.

The forward passes go through fake tensors, which have a size and a device but no data. Their device is the CPU and not
"meta", because only then does `scaled_dot_product_attention` stay one fused operator, which never stores the N x N
scores; on meta tensors it falls apart into products that do.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mobilevit.models.deeplabv3 import DeepLabV3
from mobilevit.models.mobilevit import Attention, MobileViT
from mobilevit.models.ssdlite import SSDLite

MIB = 2**20


@dataclass(frozen=True)
class Row:
    """The cost of one part of the network; the sizes are those of its output, counts are for one image.

    `num_macs` leaves out the two products of the attention, QK^T and attention times V, which have no weights and which
    many counters do not see; `num_attention_macs` is those alone. Norms, activations and resizes count nothing.
    """

    name: str
    channels: int
    height: int
    width: int
    num_parameters: int
    num_macs: int
    num_attention_macs: int


@dataclass(frozen=True)
class Profile:
    """The cost of a network for one float32 image of `size` = (height, width) in pixels.

    `inference_bytes` is the most that the tensors alive together in an eval forward take, the image among them and
    parameters and buffers not. `training_bytes` is what autograd keeps for the backward pass, again without parameters
    and buffers. Both are for fused attention, and without the scratch memory inside single operators.
    """

    architecture: str
    size: tuple[int, int]
    output_stride: int
    rows: tuple[Row, ...]
    inference_bytes: int
    training_bytes: int

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole network."""
        return sum(row.num_parameters for row in self.rows)

    @property
    def num_macs(self) -> int:
        """Multiply-accumulates of the whole network without the two attention products."""
        return sum(row.num_macs for row in self.rows)

    @property
    def num_attention_macs(self) -> int:
        """Multiply-accumulates of the two attention products."""
        return sum(row.num_attention_macs for row in self.rows)


def profile(model: MobileViT | SSDLite | DeepLabV3, size: tuple[int, int]) -> Profile:
    """The cost of `model` for one image of `size` (height, width) in pixels, from 32 up.

    The model stays as it is, may be on any device, "meta" too, and in any mode.

    Raises:
        ValueError: a side below 32 px.
    """
    if min(size) < 32:
        raise ValueError(f"size is {size}; both sides must be 32 px or more")
    blank = copy.deepcopy(model).to(device="meta", dtype=torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True):  # the inputs that are not fake: the parameters on meta
        blank.to_empty(device="cpu")
        training_bytes = _saved_bytes(blank.train(), size)
        outputs, num_macs, num_attention_macs, inference_bytes = _infer(blank.eval(), size)
    rows = []
    for name, part in _parts(model).items():
        channels, height, width = (*outputs[name], 1, 1)[:3]  # logits have no height and width
        num_parameters = sum(parameter.numel() for parameter in part.parameters())
        rows.append(Row(name, channels, height, width, num_parameters, num_macs[name], num_attention_macs[name]))
    return Profile(
        architecture=model.architecture.name,
        size=size,
        output_stride=model.backbone.output_stride,
        rows=tuple(rows),
        inference_bytes=inference_bytes,
        training_bytes=training_bytes,
    )


def table(profile: Profile) -> Table:
    """A profile to print with rich: the parts of the network, and the totals under them."""
    p = profile
    totals = (
        f"{p.num_parameters:,} parameters",
        f"{_gmacs(p, 3)} GMACs with / without the attention products",
        f"{p.inference_bytes / MIB:.1f} MiB of activations at the peak of inference",
        f"{p.training_bytes / MIB:.1f} MiB of activations kept for the backward pass in training",
        "Activations are per image, in float32, with fused attention.",
    )
    grid = Table(
        title=f"MobileViT-{p.architecture.upper()}, {p.size[0]} x {p.size[1]} px, output stride {p.output_stride}",
        title_justify="left",
        caption="\n".join(totals),
        caption_justify="left",
        caption_style="",
    )
    grid.add_column("part")
    for header in ("channels", "height x width", "parameters", "GMACs with / without attention products"):
        grid.add_column(header, justify="right")
    for row in p.rows:
        grid.add_row(
            row.name, str(row.channels), f"{row.height} x {row.width}", f"{row.num_parameters:,}", _gmacs(row, 4)
        )
    return grid


def _gmacs(cost: Row | Profile, digits: int) -> str:
    return f"{(cost.num_macs + cost.num_attention_macs) / 1e9:.{digits}f} / {cost.num_macs / 1e9:.{digits}f}"


def _parts(model: nn.Module) -> dict[str, nn.Module]:
    """The rows of the table, in the order of the forward pass: what has weights, but for what serves training alone."""
    parts = dict(model.named_children())
    parts = dict(parts.pop("backbone").named_children()) | parts
    return {name: part for name, part in parts.items() if name != "auxiliary" and any(True for _ in part.parameters())}


def _infer(model: nn.Module, size: tuple[int, int]) -> tuple[dict[str, torch.Size], Counter[str], Counter[str], int]:
    """One eval forward: by part its output without the batch, MACs and attention MACs; and the peak of memory."""
    outputs: dict[str, torch.Size] = {}
    num_macs: Counter[str] = Counter()
    num_attention_macs: Counter[str] = Counter()

    def count(part: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            num_macs[part] += output.numel() * module.weight.numel() // module.out_channels
        elif isinstance(module, nn.Linear):
            num_macs[part] += output.numel() * module.in_features
        elif isinstance(module, Attention):
            B, N, D = inputs[0].shape
            num_attention_macs[part] += 2 * B * N * N * D
        outputs[part] = output.shape[1:]  # the part itself comes after all its modules, so its output stays

    for name, part in _parts(model).items():
        for module in part.modules():
            module.register_forward_hook(partial(count, name))
    with torch.no_grad(), _LiveMemory(_own_storages(model)) as memory:
        model(torch.empty(1, 3, *size, device="cpu"))
    return outputs, num_macs, num_attention_macs, memory.peak_bytes


def _saved_bytes(model: nn.Module, size: tuple[int, int]) -> int:
    """What autograd keeps of a train forward, per image.

    Half of what it keeps of two images: with one, batch norm refuses a map that has become a single pixel.
    """
    own = _own_storages(model)
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return x

    with torch.enable_grad(), saved_tensors_hooks(pack, lambda x: x):
        model(torch.empty(2, 3, *size, device="cpu"))
    return sum(storage.nbytes() for storage in saved.values()) // 2


def _own_storages(model: nn.Module) -> set[int]:
    return {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}


class _LiveMemory(TorchDispatchMode):
    """Looks, after every operator, how much memory the tensors made so far and still alive take together."""

    def __init__(self, ignored: set[int]):
        super().__init__()
        self.peak_bytes = 0
        self._ignored = ignored
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self._live = {key: (ref, size) for key, (ref, size) in self._live.items() if not ref.expired()}
        for x in tree_leaves(output):
            if isinstance(x, Tensor) and (storage := x.untyped_storage())._cdata not in self._ignored:
                self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self._live.values()))
        return output
