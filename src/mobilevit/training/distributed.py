"""Training in several processes, as torchrun starts them, or in this one alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes that train together: how many, which one this is, and the device it computes on."""

    rank: int
    world: int
    device: torch.device

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes."""
        if self.world > 1:
            together = torch.cat([tensor.reshape(-1) for tensor in tensors])  # one message for all of them
            dist.all_reduce(together)
            for tensor, part in zip(tensors, together.split([t.numel() for t in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in every process."""
        if self.world == 1:
            return [value]
        values: list[T | None] = [None] * self.world
        dist.all_gather_object(values, value)
        return values  # pyright: ignore[reportReturnType]

    def from_first(self, compute: Callable[[], T]) -> T:
        """What `compute` gives in the first process, in every process; the user's mistakes are raised in all."""
        value: T | None = None
        error: Exception | None = None
        if self.rank == 0:
            try:
                value = compute()
            except (ValueError, OSError) as caught:
                error = caught
        if self.world > 1:
            both = [(value, error)]
            dist.broadcast_object_list(both, src=0)
            value, error = both[0]
        if error is not None:
            raise error
        return value  # pyright: ignore[reportReturnType]


@contextlib.contextmanager
def join(device: str) -> Iterator[Processes]:
    """Join the processes that torchrun started, over nccl on GPUs and gloo elsewhere; without torchrun stay alone."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    where = torch.device(device)
    if world == 1:
        yield Processes(0, 1, where)
        return
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(where)
    store, rank, world = next(rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun on one machine hands the store of the start before to the processes that it brings back, and gloo
        # then calls at addresses of the dead. (On several machines the counts of starts differ; docs/training.md.)
        store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo", store=store, rank=rank, world_size=world)
    try:
        yield Processes(rank, world, where)
    finally:
        dist.destroy_process_group()
