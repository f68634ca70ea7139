"""Distributed training: the processes that torchrun starts, or a single process."""

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
    """Rank of this process, number of processes, and the device of this process."""

    rank: int
    world_size: int
    device: torch.device

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes."""
        if self.world_size > 1:
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])  # one message for all tensors
            dist.all_reduce(flat)
            for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                tensor.copy_(total.view_as(tensor))

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in every process."""
        if self.world_size == 1:
            return [value]
        values: list[T | None] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values  # pyright: ignore[reportReturnType]

    def from_rank_0(self, compute: Callable[[], T]) -> T:
        """Call `compute` in rank 0 and return its result in every process. ValueError and OSError are raised in all."""
        value: T | None = None
        error: Exception | None = None
        if self.rank == 0:
            try:
                value = compute()
            except (ValueError, OSError) as caught:
                error = caught
        if self.world_size > 1:
            outcome = [(value, error)]
            dist.broadcast_object_list(outcome, src=0)
            value, error = outcome[0]
        if error is not None:
            raise error
        return value  # pyright: ignore[reportReturnType]


@contextlib.contextmanager
def join_processes(device: str) -> Iterator[Processes]:
    """Join the process group of torchrun, with nccl on GPUs and gloo elsewhere. Without torchrun: a single process."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    own_device = torch.device(device)
    if world_size == 1:
        yield Processes(0, 1, own_device)
        return
    if own_device.type == "cuda" and own_device.index is None:
        own_device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(own_device)
    store, rank, world_size = next(rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # On one machine torchrun reuses the store after a restart, and gloo would then connect to the addresses of dead
        # processes. (On several machines the restart counts differ: see docs/training.md.)
        store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)  # pyright: ignore[reportPrivateImportUsage]
    backend = "nccl" if own_device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    try:
        yield Processes(rank, world_size, own_device)
    finally:
        dist.destroy_process_group()
