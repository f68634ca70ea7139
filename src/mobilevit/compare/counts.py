"""What one image costs any network: parameters, multiply-accumulates and activations, without running anything.

`mobilevit.benchmark.cost` knows our own network part by part. This counts by operator, so that it takes whatever
torch can run, and comes to the same totals.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# Before 2.15 PyTorch's registry lacks the fused attention of CPUs, whose first arguments are those of the one on GPUs.
FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        torch.ops.aten._scaled_dot_product_flash_attention
    ],
    **flop_registry,
}


@dataclass(frozen=True)
class Counts:
    """The cost of a network for one float32 image.

    `num_attention_macs` are those of products of two things that were both computed from the image, as the two of
    attention are; `num_macs` are all others, in which one factor is a weight. Norms, activations and resizes count
    nothing. `inference_bytes` is the most that the tensors alive together in an eval forward take, the image among
    them and parameters and buffers not, without the scratch memory inside single operators.
    """

    num_parameters: int
    num_macs: int
    num_attention_macs: int
    inference_bytes: int


def count(build: Callable[[], nn.Module], size_px: int) -> Counts:
    """The cost of the network that `build` makes, for one image of `size_px` by `size_px`."""
    with torch.device("meta"):
        network = build()
    # Fake tensors on the CPU and not on meta, where fused attention would fall apart; see mobilevit.benchmark.cost.
    with FakeTensorMode(allow_non_fake_inputs=True):
        network.to_empty(device="cpu").eval()
        image = torch.empty(1, 3, size_px, size_px, device="cpu")
        with torch.no_grad(), _Counter(image, [*network.parameters(), *network.buffers()]) as counter:
            network(image)
    return Counts(
        count_parameters(network), counter.num_macs, counter.num_attention_macs, inference_bytes=counter.peak_bytes
    )


def count_parameters(network: nn.Module) -> int:
    """Weights that are learnt."""
    return sum(parameter.numel() for parameter in network.parameters())


class _Counter(TorchDispatchMode):
    """Follows an image through a network: the products it takes part in, and the memory of what is alive."""

    def __init__(self, image: Tensor, own: list[Tensor]):
        super().__init__()
        self._kept = own  # a buffer that the network replaces would leave its address to a tensor of the image
        self.num_macs = self.num_attention_macs = 0
        self.peak_bytes = _num_bytes(image)
        self._own = {_key(x) for x in own}
        self._live = {_key(image): _Storage.of(image, from_image=True)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func.overloadpacket in FLOPS:
            # Of addmm and baddbmm the first argument is added. Of the others the first two are the factors.
            first = int(func.overloadpacket in (torch.ops.aten.addmm, torch.ops.aten.baddbmm))
            num_macs = FLOPS[func.overloadpacket](*args, **(kwargs or {}), out_val=output) // 2
            if all(self._is_from_image(x) for x in inputs[first : first + 2]):
                self.num_attention_macs += num_macs
            else:
                self.num_macs += num_macs
        from_image = any(self._is_from_image(x) for x in inputs)
        for x in tree_leaves(output):
            if isinstance(x, Tensor) and _key(x) not in self._own:
                known = self._live.get(_key(x))
                if known is None or known.reference.expired() or from_image:
                    self._live[_key(x)] = _Storage.of(x, from_image)
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

    @classmethod
    def of(cls, x: Tensor, from_image: bool) -> _Storage:
        return cls(StorageWeakRef(x.untyped_storage()), _num_bytes(x), from_image)


def _key(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _num_bytes(x: Tensor) -> int:
    return x.untyped_storage().nbytes()
