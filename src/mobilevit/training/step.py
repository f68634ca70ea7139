"""One optimizer step: micro-batches, mixed precision, gradient clipping, EMA, batch norm statistics."""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mobilevit.data.loader import Batch
from mobilevit.data.sampler import MicroBatch
from mobilevit.models.rounding import round_layers, twin
from mobilevit.recipes import Recipe
from mobilevit.training.distillation import network_of
from mobilevit.training.distributed import Processes
from mobilevit.training.optim import EMA, BatchNormStatistics, build_optimizer, freeze, set_learning_rate

logger = logging.getLogger(__name__)
Loss = Callable[[nn.Module, Batch], Tensor]
"""`loss(model, batch)`: the mean loss of a micro-batch, a scalar. `model` is in training mode, and possibly wrapped in
DDP or compiled."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def to_train_mode(model: nn.Module, recipe: Recipe) -> None:
    """Training mode, except for the frozen stages."""
    model.train()
    freeze(model, recipe.optimizer.freeze)


def prepare_model(model: nn.Module, recipe: Recipe, device: torch.device) -> nn.Module:
    """`model` in training mode, with synchronized batch norm if the recipe enables it."""
    to_train_mode(model, recipe)
    if not recipe.compute.sync_batch_norm:
        return model
    if device.type == "cpu":
        raise ValueError("compute.sync_batch_norm is True, but PyTorch supports it on GPUs only; set it to False")
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def trained_network(model: nn.Module, recipe: Recipe) -> nn.Module:
    """The network that a step computes: `model`, or for quantization-aware training its twin with rounded layers.

    `model` itself stays float. It is saved, averaged and evaluated.

    Raises:
        ValueError: rounding on a device for which PyTorch has no such operators.
    """
    if not recipe.compute.quantization_aware:
        return model
    device = next(model.parameters()).device
    if device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"compute.quantization_aware is True, but PyTorch rounds on cpu and cuda only, not on {device.type}; train "
            "with --device cpu, or set it to False"
        )
    network = twin(model)
    round_layers(network_of(network))  # not the projection of a student, which is not exported
    return network


def autocast(recipe: Recipe, device: torch.device) -> torch.autocast:
    """The autocast context for the precision of the recipe."""
    return torch.autocast(device.type, DTYPES[recipe.compute.precision], recipe.compute.precision != "float32")


class TrainStep:
    """The state that optimizer steps change: weights, EMA, optimizer, gradient scaler, batch norm statistics.

    A step is a call of `accumulate` per micro-batch of this process, then one call of `update`.

    Args:
        model: as returned by `prepare_model`.
        loss: called with the model and each micro-batch.
        num_schedule_steps: number of steps in the learning rate schedule; limits the decay of the EMA.
        processes: each holds its own `TrainStep`; gradients are averaged over them.
        state: of a checkpoint, to resume from.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        recipe: Recipe,
        num_schedule_steps: int,
        processes: Processes,
        state: Mapping[str, Any] | None,
    ):
        self.model, self.loss, self.recipe, self.processes = model, loss, recipe, processes
        self.optimizer = build_optimizer(model, recipe.optimizer)
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=recipe.compute.precision == "float16")
        self.ema = EMA(model, recipe.ema_decay, num_schedule_steps)
        if state:
            for name, component in self._stateful().items():
                component.load_state_dict(state[name])
        self.statistics = BatchNormStatistics(model)
        self.autocast = autocast(recipe, processes.device)
        self.network: nn.Module = trained_network(model, recipe)  # possibly compiled and wrapped in DDP
        if recipe.compute.compile:
            torch._dynamo.config.recompile_limit = 64  # one graph per size and length of a micro-batch
            self.network = torch.compile(self.network, dynamic=False)  # pyright: ignore[reportAttributeAccessIssue]
        if processes.world_size > 1:
            # torch 2.11 deprecates this name without a replacement.
            with warnings.catch_warnings(action="ignore", category=FutureWarning):
                self.network = DistributedDataParallel(self.network, broadcast_buffers=False)
        self.compiled_shapes: set[tuple[torch.Size, int]] = set()  # of the pixels, and the input size
        self._reset_sums()

    def _stateful(self) -> dict[str, Any]:
        return {"model": self.model, "ema": self.ema.model, "optimizer": self.optimizer, "scaler": self.scaler}

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; the argument `state` restores it."""
        return {name: component.state_dict() for name, component in self._stateful().items()}

    def compile(self, batches: Sequence[Batch]) -> None:
        """Compile a graph for the shape of each batch. `accumulate` computes other shapes without compilation."""
        logger.info(f"compiling {len(batches)} graphs")
        before = copy.deepcopy(self.model.state_dict())
        for batch in batches:
            with self.autocast:
                loss = self.loss(self.network, batch)
            self.scaler.scale(loss).backward()
        self.optimizer.zero_grad()
        self.model.load_state_dict(before)
        self.compiled_shapes = {(batch.pixels.shape, batch.size_px) for batch in batches}

    def accumulate(self, micro_batch: MicroBatch, batch: Batch, epoch: int) -> bool:
        """Add the gradients of a micro-batch; True if it is the last one of this process in the step."""
        # The random state follows from the position in the run, so that checkpoints need not contain it.
        torch.manual_seed(_seed(self.recipe.seed, epoch, micro_batch.step, micro_batch.index))
        is_last = micro_batch.index + self.processes.world_size >= micro_batch.num_micro_batches
        with contextlib.ExitStack() as stack:
            if self.compiled_shapes and (batch.pixels.shape, batch.size_px) not in self.compiled_shapes:
                # The last batch of an epoch is too rare to compile.
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            if isinstance(self.network, DistributedDataParallel) and not is_last:
                stack.enter_context(self.network.no_sync())
            with self.autocast:
                loss = self.loss(self.network, batch)
            # DistributedDataParallel averages gradients over the processes, so the weights of all micro-batches of a
            # step add up to the number of processes.
            self.scaler.scale(loss * (micro_batch.weight * self.processes.world_size)).backward()
        self._sums[0] += loss.detach() * micro_batch.weight
        self._sums[1] += len(batch.unreadable)
        self.statistics.add_micro_batch()
        return is_last

    def update(self, learning_rate: float, num_micro_batches: int, stop: bool) -> Tensor:
        """Update the weights with the accumulated gradients.

        Returns, summed over all processes and not yet synchronized with the CPU: the mean loss over the images of the
        step, the number of unreadable images, and the number of processes whose `stop` is True.
        """
        set_learning_rate(self.optimizer, learning_rate)
        if self.recipe.optimizer.clip_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.optimizer.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.statistics.update(num_micro_batches, self.processes)
        self.ema.update(self.model)
        sums = self._sums
        sums[2] += stop
        self.processes.sum([sums])
        self._reset_sums()
        return sums

    def _reset_sums(self) -> None:
        self._sums = torch.zeros(3, device=self.processes.device)


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
