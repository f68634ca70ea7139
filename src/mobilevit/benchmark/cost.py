"""Parameters, multiply-accumulates (MACs) and activation memory of a model for one image, computed without running it.

The forward pass uses fake tensors, which have a shape, a dtype and a device but no data. Their device is "cpu" and not
"meta": on "cpu", `scaled_dot_product_attention` stays one fused operator that never stores the N x N scores; on "meta"
it is decomposed into matrix products that do.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
from torch.utils.flop_counter import flop_registry

from mobilevit.defaults import MIN_SIZE_PX
from mobilevit.models.deeplabv3 import DeepLabV3
from mobilevit.models.mobilevit import MobileViT
from mobilevit.models.ssdlite import SSDLite

MIB = 2**20
# Before version 2.15, PyTorch's registry lacks the fused CPU attention. Its first arguments are those of the CUDA one.
FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        torch.ops.aten._scaled_dot_product_flash_attention
    ],
    **flop_registry,
}


@dataclass(frozen=True)
class Cost:
    """The cost of a model for one float32 image.

    `num_attention_macs` counts products of two factors that both depend on the image, such as QK^T and attention times
    V. `num_macs` counts all other products, in which one factor is a weight. Norms, activations and resizes count as 0.
    `inference_bytes` is the peak size of all live tensors in an eval forward pass. It includes the image, and excludes
    parameters, buffers and the scratch memory inside single operators.
    """

    num_parameters: int
    num_macs: int
    num_attention_macs: int
    inference_bytes: int


@dataclass(frozen=True)
class Row:
    """The cost of one submodule; `channels`, `height` and `width` are those of its output. See `Cost`."""

    name: str
    channels: int
    height: int
    width: int
    num_parameters: int
    num_macs: int
    num_attention_macs: int


@dataclass(frozen=True)
class Profile:
    """The cost of a MobileViT for one float32 image of `size` = (height, width) in pixels, by submodule.

    For `inference_bytes` see `Cost`. `training_bytes` is the size of the tensors that autograd saves for the backward
    pass, without parameters and buffers. Both assume fused attention.
    """

    architecture: str
    size: tuple[int, int]
    output_stride: int
    rows: tuple[Row, ...]
    inference_bytes: int
    training_bytes: int

    @property
    def num_parameters(self) -> int:
        return sum(row.num_parameters for row in self.rows)

    @property
    def num_macs(self) -> int:
        return sum(row.num_macs for row in self.rows)

    @property
    def num_attention_macs(self) -> int:
        return sum(row.num_attention_macs for row in self.rows)


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def count(model: nn.Module, size: tuple[int, int]) -> Cost:
    """The cost of any model for one image of `size` = (height, width) in pixels.

    The model is not changed. It may be in any mode and on any device, "meta" included.
    """
    with _fake_copy(model) as fake:
        counter = _count(fake, size, {})
    return Cost(
        count_parameters(model), counter.num_macs.total(), counter.num_attention_macs.total(), counter.peak_bytes
    )


def profile(model: MobileViT | SSDLite | DeepLabV3, size: tuple[int, int]) -> Profile:
    """The cost of `model` by submodule for one image of `size` = (height, width) in pixels, 32 or more each.

    The model is not changed. It may be in any mode and on any device, "meta" included.

    Raises:
        ValueError: a side below 32 px.
    """
    if min(size) < MIN_SIZE_PX:
        raise ValueError(f"size is {size}; both sides must be {MIN_SIZE_PX} px or more")
    with _fake_copy(model) as fake:
        training_bytes = _saved_bytes(fake.train(), size)
        modules = _submodules(fake)
        counter = _count(fake, size, modules)
    rows = []
    for name, module in modules.items():
        channels, height, width = (*counter.shapes[name], 1, 1)[:3]  # logits have no height and width
        macs = counter.num_macs[name], counter.num_attention_macs[name]
        rows.append(Row(name, channels, height, width, count_parameters(module), *macs))
    return Profile(
        architecture=model.architecture.name,
        size=size,
        output_stride=model.backbone.output_stride,
        rows=tuple(rows),
        inference_bytes=counter.peak_bytes,
        training_bytes=training_bytes,
    )


def table(profile: Profile) -> Table:
    """A profile as a rich table: one row per submodule, the totals below."""
    p = profile
    totals = (
        f"{p.num_parameters:,} parameters",
        f"{format_gmacs(p, 3)} GMACs with / without the attention products",
        f"{p.inference_bytes / MIB:.1f} MiB peak activation memory in inference",
        f"{p.training_bytes / MIB:.1f} MiB of activations saved for the backward pass in training",
        "Activations are per image, in float32, with fused attention.",
    )
    grid = Table(
        title=f"MobileViT-{p.architecture.upper()}, {p.size[0]} x {p.size[1]} px, output stride {p.output_stride}",
        title_justify="left",
        caption="\n".join(totals),
        caption_justify="left",
        caption_style="",
    )
    grid.add_column("module")
    for header in ("channels", "height x width", "parameters", "GMACs with / without attention products"):
        grid.add_column(header, justify="right")
    for row in p.rows:
        numbers = (f"{row.height} x {row.width}", f"{row.num_parameters:,}", format_gmacs(row, 4))
        grid.add_row(row.name, str(row.channels), *numbers)
    return grid


def format_gmacs(cost: Cost | Row | Profile, digits: int) -> str:
    """GMACs with / without the attention products."""
    return f"{(cost.num_macs + cost.num_attention_macs) / 1e9:.{digits}f} / {cost.num_macs / 1e9:.{digits}f}"


def _submodules(model: nn.Module) -> dict[str, nn.Module]:
    """The submodules with parameters, in the order of the forward pass, without those that only training uses."""
    modules = dict(model.named_children())
    modules = dict(modules.pop("backbone").named_children()) | modules
    return {name: module for name, module in modules.items() if name != "auxiliary" and count_parameters(module)}


@contextmanager
def _fake_copy(model: nn.Module) -> Iterator[nn.Module]:
    """A float32 copy of `model` without data, inside the mode that computes with such tensors."""
    fake = copy.deepcopy(model).to(device="meta", dtype=torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True):  # the parameters on "meta" are not fake tensors
        yield fake.to_empty(device="cpu")


def _count(model: nn.Module, size: tuple[int, int], modules: Mapping[str, nn.Module]) -> _Counter:
    """Count one eval forward pass; MACs and output shapes separately for each of `modules`."""
    image = torch.empty(1, 3, *size, device="cpu")
    counter = _Counter(image, model)

    def enter(name: str, module: nn.Module, inputs: Any) -> None:
        counter.module = name

    def leave(name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        counter.shapes[name] = output.shape[1:]  # the last module of a submodule to return sets its shape

    for name, parent in modules.items():
        for module in parent.modules():  # a ModuleList is never called itself
            module.register_forward_pre_hook(partial(enter, name))
            module.register_forward_hook(partial(leave, name))
    with torch.no_grad(), counter:
        model.eval()(image)
    return counter


class _Counter(TorchDispatchMode):
    """Counts the MACs of every operator, by the submodule that runs, and the peak size of all live tensors."""

    def __init__(self, image: Tensor, model: nn.Module):
        super().__init__()
        self.module = ""
        self.shapes: dict[str, torch.Size] = {}
        self.num_macs: Counter[str] = Counter()
        self.num_attention_macs: Counter[str] = Counter()
        self.peak_bytes = image.nbytes
        # References to the tensors, because a tensor that replaces a buffer could otherwise get its address.
        self._weights = {_key(x): x for x in (*model.parameters(), *model.buffers())}
        self._live = {_key(image): _Storage(StorageWeakRef(image.untyped_storage()), image.nbytes, from_image=True)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func.overloadpacket in FLOPS:
            # The first argument of addmm and baddbmm is added. The first two of all other operators are the factors.
            first = int(func.overloadpacket in (torch.ops.aten.addmm, torch.ops.aten.baddbmm))
            num_macs = FLOPS[func.overloadpacket](*args, **(kwargs or {}), out_val=output) // 2
            is_attention = all(self._is_from_image(x) for x in inputs[first : first + 2])
            (self.num_attention_macs if is_attention else self.num_macs)[self.module] += num_macs
        from_image = any(self._is_from_image(x) for x in inputs)
        for x in tree_leaves(output):
            if isinstance(x, Tensor) and _key(x) not in self._weights:
                known = self._live.get(_key(x))
                if known is None or known.reference.expired() or from_image:
                    storage = x.untyped_storage()
                    self._live[_key(x)] = _Storage(StorageWeakRef(storage), storage.nbytes(), from_image)
        self._live = {key: storage for key, storage in self._live.items() if not storage.reference.expired()}
        self.peak_bytes = max(self.peak_bytes, sum(storage.num_bytes for storage in self._live.values()))
        return output

    def _is_from_image(self, x: Tensor) -> bool:
        storage = self._live.get(_key(x))
        return storage is not None and storage.from_image


@dataclass(frozen=True)
class _Storage:
    reference: StorageWeakRef
    num_bytes: int
    from_image: bool


def _saved_bytes(model: nn.Module, size: tuple[int, int]) -> int:
    """Bytes that autograd saves in a training forward pass, per image.

    Half of those for two images, because batch norm refuses a batch with a single value per channel.
    """
    weights = {_key(x) for x in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(x: Tensor) -> Tensor:
        if _key(x) not in weights:
            saved[_key(x)] = x.untyped_storage()
        return x

    with torch.enable_grad(), saved_tensors_hooks(pack, lambda x: x):
        model(torch.empty(2, 3, *size, device="cpu"))
    return sum(storage.nbytes() for storage in saved.values()) // 2


def _key(x: Tensor) -> int:
    return x.untyped_storage()._cdata
