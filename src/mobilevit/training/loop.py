"""The training loop: one linear program, the same for every task."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import os
import platform
import shlex
import signal
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mobilevit import recipes
from mobilevit.data.loader import Batch, ImageDataset, Loader, load, moved
from mobilevit.data.sampler import EpochBatches, batch_size_at, count_parts, eval_batches, parts
from mobilevit.data.sources import fingerprint
from mobilevit.device import choose_device, thread_advice
from mobilevit.images import ImageError, megapixel_limit_restored
from mobilevit.recipes import Recipe
from mobilevit.report.results import sections
from mobilevit.report.training import Origin, write_report
from mobilevit.tasks import TASKS, Results, Task
from mobilevit.training.batch_norm import RunningStatistics
from mobilevit.training.distributed import Processes, join
from mobilevit.training.ema import MovingAverage
from mobilevit.training.memory import pixels_at_once
from mobilevit.training.optim import build_optimizer, freeze, learning_rate, set_learning_rate
from mobilevit.training.other import OtherNetwork, OtherWeights, check_recipe, start
from mobilevit.training.run import Lines, RunFolder, read_checkpoint, read_facts
from mobilevit.training.signals import StopOnSignal
from mobilevit.weights import TASK_FORMATS, Weights, to_weights, write

TIMES = ("seconds", "images_per_second", "waiting_share")  # of a record: what differs from run to run
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Run:
    """What a finished run leaves: the weights' file, the metrics of every epoch, and which of them matters most."""

    weights: Path
    epochs: list[dict[str, float]]
    main_metric: str


class Stopped(KeyboardInterrupt):
    """A run that was told to stop, did so after a whole step, and can go on from there."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


class FinishedError(ValueError):
    """A run that there is nothing left of to do; `epochs` are the metrics of all of them."""

    def __init__(self, message: str, epochs: list[dict[str, float]]):
        super().__init__(message)
        self.epochs = epochs


class DivergedError(ValueError):
    """A loss or a network that is not finite."""


@dataclass
class Position:
    """Where a run stands: what is to be done next, and what has been added up in the epoch so far."""

    epoch: int = 0
    step: int = 0  # of the epoch
    total_step: int = 0
    loss: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0
    num_unreadable: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


def train(
    recipe: Recipe | str,
    data: str | Path,
    out: str | Path,
    *,
    pretrained: Weights | str | os.PathLike[str] | None = None,
    download: bool = False,
    other: OtherNetwork | None = None,
    device: str = "auto",
    checkpoint_minutes: float = 5.0,
    tensorboard: bool = False,
    extend: bool = False,
    origin: Origin | None = None,
    console: Console | None = None,
) -> Run:
    """Train by `recipe` on the images in `data`; `training/checkpoint.py` lists what is left in `out`.

    `recipe` is a `Recipe` or the name of one ("small"), `pretrained` are weights to start from: a path, a hub id, which
    is fetched only with `download=True`, or `Weights`. `device` "auto" is the first of cuda, mps and cpu that there is.

    >>> run = mobilevit.train("finetune", "pets/", "runs/pets", pretrained="apple/mobilevit-x-small", download=True)
    >>> model = mobilevit.load(run.weights)

    Called again after the process died, it goes on where it was and ends with the same weights to the bit, given the
    same recipe, data, device and number of threads. Started by torchrun, the processes share the work. A checkpoint is
    kept every `checkpoint_minutes` and after every epoch. Progress goes to `console` (standard error unless given).
    With `other` that classifier is trained, from random weights, instead of the recipe's MobileViT.
    With `extend` a finished run in `out` continues where `recipe` differs from its recipe in a larger number of epochs
    alone: for the additional ones at the constant learning rate `optimizer.end_lr`, with the same decay of the average.
    `origin` is for the report.

    Raises:
        ValueError: data that cannot be trained on, a folder `out` of another run or (`FinishedError`) of this one when
            nothing is left to do, a loss that is not finite (`DivergedError`), a recipe that is not for `other`, or
            that spares a backbone which is not `pretrained`, an unknown recipe or device, weights that cannot be read.
        TypeError: an argument of another type.
        Stopped: Ctrl-C or SIGTERM.
    """
    if isinstance(recipe, str):
        origin = origin or Origin(recipe)
        recipe = recipes.named(recipe)
    if not isinstance(recipe, Recipe):
        raise TypeError(
            f"recipe is a {type(recipe).__name__}; give the name of a recipe ({', '.join(recipes.RECIPES)}) or a "
            "Recipe (dataclasses.replace(mobilevit.RECIPES['small'], epochs=5) changes one)"
        )
    for name, value in (("data", data), ("out", out)):
        if not isinstance(value, str | os.PathLike):
            raise TypeError(f"{name} is a {type(value).__name__}; give a path as str or pathlib.Path")
    if pretrained is not None:
        pretrained = to_weights(pretrained, download=download)
    assert not (pretrained and other)
    of_trained = (
        ("freeze", recipe.optimizer.freeze, "nothing"),
        ("backbone_lr_scale", recipe.optimizer.backbone_lr_scale, 1),
    )
    if other:
        check_recipe(recipe)
    for name, value, usual in () if pretrained else of_trained:
        if value != usual:
            raise ValueError(
                f"optimizer.{name} is {value}, for a backbone that has learnt already, and this one begins at random; "
                f"give weights to start from (--weights), or set it to {usual}"
            )
    with join(choose_device(device)) as processes, contextlib.ExitStack() as opened:
        opened.enter_context(megapixel_limit_restored())
        console = console or Console(stderr=True)
        if processes.rank > 0:
            console = Console(quiet=True)
        return _train(
            recipe,
            data,
            Path(out),
            pretrained,
            other,
            processes,
            checkpoint_minutes,
            tensorboard,
            extend,
            origin or Origin(),
            console,
            opened,
        )


def _train(
    recipe: Recipe,
    data: str | Path,
    out: Path,
    pretrained: Weights | None,
    other: OtherNetwork | None,
    processes: Processes,
    checkpoint_minutes: float,
    tensorboard: bool,
    extend: bool,
    origin: Origin,
    console: Console,
    opened: contextlib.ExitStack,
) -> Run:
    task = TASKS[recipe.task]
    device, world, is_first = processes.device, processes.world, processes.rank == 0

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    # --- Data -------------------------------------------------------------------------------------------------------
    train_set, val_set = task.datasets(recipe, data)
    if len(train_set) < 2 * world:
        raise ValueError(f"{data}: {len(train_set)} images are too few to train on")
    if (
        Path(data).is_dir()
        and out.resolve().is_relative_to(Path(data).resolve())
        and not (Path(data) / "train").is_dir()
    ):
        raise ValueError(f"{out}: lies among the class folders of {data} and would be taken for one; name another")
    steps_of_epochs = [len(_batches(recipe, len(train_set), epoch, world)) for epoch in range(recipe.epochs)]
    num_steps = sum(steps_of_epochs)
    # Saved with the weights: evaluation recognizes the validation split, exports tell how transparency was handled.
    data_facts = {"val_data": fingerprint(val_set.source), "num_transparent": train_set.num_transparent}

    # --- Model, its average, optimizer -------------------------------------------------------------------------------
    torch.manual_seed(recipe.seed)
    initial = start(other, recipe, train_set) if other else task.build(recipe, train_set, pretrained)
    model = initial.build().to(device)
    precision = torch.autocast(device.type, DTYPES[recipe.compute.precision], recipe.compute.precision != "float32")
    with precision:
        copied = copy.deepcopy(model).train()
        at_once = min(processes.gather(pixels_at_once(recipe, task, copied, _blank(task, recipe, model), device)))
    del copied
    val_size = max(1, min(recipe.batch_size // world, at_once // recipe.data.size_px**2))
    val_batches = eval_batches(len(val_set), batch_size=val_size, size_px=recipe.data.size_px)
    _to_training(model, recipe)
    if recipe.compute.sync_batch_norm:
        if device.type == "cpu":
            raise ValueError("compute.sync_batch_norm is True; PyTorch has it on GPUs alone, not on the CPU")
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = build_optimizer(model, recipe.optimizer)
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.compute.precision == "float16")

    # --- The folder, and where the run stands ------------------------------------------------------------------------
    facts = {
        "recipe": _without_what_may_change(recipe),
        "data": f"{fingerprint(train_set.source)} {data_facts['val_data']}",
        "weights": _fingerprint(pretrained) if pretrained else "random",
    }
    if other:
        facts["network"] = initial.name
    num_bytes = 4 * sum(tensor.nbytes for tensor in model.state_dict().values())  # weights, average, two moments
    folder: RunFolder | None = None

    def open_folder() -> tuple[Path | None, int]:
        nonlocal folder
        before = read_facts(out)
        num_before = before.get("recipe", {}).get("epochs", recipe.epochs) if extend else recipe.epochs
        if "schedule_epochs" in before:
            facts["schedule_epochs"] = before["schedule_epochs"]
        known = {**facts, "recipe": {**facts["recipe"], "epochs": min(num_before, recipe.epochs)}}
        folder = opened.enter_context(contextlib.closing(RunFolder(out, known, num_bytes=num_bytes)))
        checkpoint = folder.latest(say)
        if num_before < recipe.epochs:
            facts.setdefault("schedule_epochs", num_before)
            num_done = read_checkpoint(checkpoint)["position"]["epoch"] if checkpoint else 0
            _check_extension(recipe, out, num_done, facts["schedule_epochs"])
            folder.describe(facts)
        return checkpoint, facts.get("schedule_epochs", recipe.epochs)

    checkpoint, schedule_epochs = processes.from_first(open_folder)
    schedule_steps = sum(steps_of_epochs[:schedule_epochs])
    average = MovingAverage(model, recipe.ema_decay, schedule_steps)
    training = {"model": model, "average": average.model, "optimizer": optimizer, "scaler": scaler}
    position = Position()
    if checkpoint is not None:
        state = read_checkpoint(checkpoint)
        position = Position(**state["position"])
        for name, part in training.items():
            part.load_state_dict(state[name])
        del state
    if position.epoch == recipe.epochs:
        raise FinishedError(
            f"{out}: this run is finished; continue it with more --epochs (in Python with extend=True), or name "
            "another folder",
            position.history,
        )
    say(
        f"{initial.name} from {'the given' if pretrained else 'random'} weights; "
        f"{len(train_set):,} images of {len(initial.class_names)} classes for training, "
        f"{len(val_set):,} for validation"
    )
    for note in (*train_set.notes, *val_set.notes):
        say(note)
    if pretrained:
        for line in _say_start(recipe, pretrained, initial.class_names):
            say(line)
    for line in _say_steps(recipe, len(train_set), num_steps, at_once, world):
        say(line)
    if schedule_epochs < recipe.epochs:
        say(
            f"after epoch {schedule_epochs}, where its schedule ends, the run continues at the constant learning rate "
            f"{recipe.optimizer.end_lr:g} (optimizer.end_lr)"
        )
    if checkpoint is not None:
        say(f"going on after step {position.total_step:,}, in epoch {position.epoch + 1}")
    if device.type == "cpu" and is_first and (advice := thread_advice()):
        say(advice)
    epoch_lines = step_lines = board = None
    if folder is not None:
        epoch_lines = opened.enter_context(contextlib.closing(Lines(out / "metrics.jsonl", len(position.history))))
        step_lines = opened.enter_context(contextlib.closing(Lines(out / "steps.jsonl", position.total_step)))
        if tensorboard:
            board = opened.enter_context(contextlib.closing(_tensorboard(out, position.total_step)))

    def keep() -> None:
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            raise DivergedError(f"the network is not finite after step {position.total_step}; try a lower --lr")
        if folder is not None and epoch_lines and step_lines:
            epoch_lines.sync()
            step_lines.sync()
            states = {name: part.state_dict() for name, part in training.items()}
            folder.save({"position": vars(position), **states}, position.total_step)

    # --- What computes a step: compiled once for every size, its gradients shared ------------------------------------
    statistics = RunningStatistics(model)
    network: nn.Module = model
    if recipe.compute.compile:
        torch._dynamo.config.recompile_limit = 64  # one graph for each size and for each length of a part
        network = torch.compile(network, dynamic=False)  # pyright: ignore[reportAssignmentType]
    if world > 1:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch 2.11 knows no other name for it
            network = DistributedDataParallel(network, broadcast_buffers=False)
    compiled: set[tuple[int, ...]] = set()  # shapes of batches
    if recipe.compute.compile:
        compiled = _shapes(recipe, len(train_set), at_once, world)
        say(f"compiling {len(compiled)} graphs")
        before = copy.deepcopy(model.state_dict())
        for shape in sorted(compiled):
            with precision:
                loss = task.loss(recipe, network, _blank(task, recipe, model, shape))
            scaler.scale(loss).backward()
        optimizer.zero_grad()
        model.load_state_dict(before)

    images: Loader | None = None  # those being read

    def end_workers() -> None:
        if images is not None:
            images.close()

    opened.callback(end_workers)

    def skipped(names: Sequence[str]) -> None:
        told = console if is_first else Console(stderr=True)  # each process names those that it met
        told.print(f"cannot be read, skipped: {', '.join(names)}", highlight=False, soft_wrap=True, markup=False)

    # --- Epochs ------------------------------------------------------------------------------------------------------
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps,"))
    bar_of_run = Progress(*columns, TimeRemainingColumn(), TextColumn("left"), console=console)
    main_metric = ""
    # Where to look at the loss means to wait for the device, that is done for several steps together.
    look_every = 1 if device.type == "cpu" else 10
    with bar_of_run as progress, StopOnSignal(say) as stop:
        bar = progress.add_task(f"epoch {position.epoch + 1}", total=num_steps, completed=position.total_step)
        kept_at = time.perf_counter()
        while position.epoch < recipe.epochs:
            epoch = position.epoch
            batches = _batches(recipe, len(train_set), epoch, world)
            division: dict[str, Any] = {"rank": processes.rank, "world": world, "pixels_at_once": at_once}
            todo = (part.picks for part in parts(batches, first_step=position.step, **division))
            reading: dict[str, Any] = {
                "num_workers": recipe.data.num_workers,
                "device": str(device),
                "preprocessing": initial.preprocessing,
                "max_unreadable": recipe.data.max_unreadable,
            }
            images = load(train_set, todo, **reading)
            unseen: list[_Step] = []  # steps whose loss has not been looked at
            sums = torch.zeros(3, device=device)  # of the step: its loss, processes told to stop, unreadable images
            looked_at, waited = time.perf_counter(), 0.0
            for part in parts(batches, first_step=position.step, **division):
                batch = next(images)
                rate = learning_rate(
                    recipe.optimizer, position.total_step, schedule_steps, epoch=epoch, num_epochs=schedule_epochs
                )
                set_learning_rate(optimizer, rate)
                # Chance follows from where the run stands, so nothing of it has to be kept for a resume.
                torch.manual_seed(_seed(recipe.seed, epoch, part.step, part.number))
                is_last = part.number + world >= part.num_parts
                with contextlib.ExitStack() as during:
                    if compiled and tuple(batch.pixels.shape) not in compiled:  # the end of an epoch: too seldom to pay
                        during.enter_context(torch.compiler.set_stance("force_eager"))
                    if isinstance(network, DistributedDataParallel) and not is_last:
                        during.enter_context(network.no_sync())
                    with precision:
                        loss = task.loss(recipe, network, batch)
                    # Gradients are averaged over the processes, so the shares are made to add up to `world`.
                    scaler.scale(loss * (part.share * world)).backward()
                sums[0] += loss.detach() * part.share
                sums[2] += len(batch.unreadable)
                if batch.unreadable:
                    skipped(batch.unreadable)
                statistics.note()
                if not is_last:
                    continue
                if recipe.optimizer.clip_norm:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip_norm)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                statistics.update(part.num_parts, processes)
                average.update(model)
                sums[1] += stop.signal_number > 0
                processes.sum([sums])
                unseen.append(_Step(position.total_step, part.step, rate, sums))
                sums = torch.zeros_like(sums)
                position.step += 1
                position.total_step += 1
                if len(unseen) < look_every and position.step < len(batches):
                    continue

                # --- Look at what was computed: say it, stop where it went wrong or was told to ----------------------
                seen = torch.stack([step.sums for step in unseen]).tolist()
                now = time.perf_counter()
                seconds, looked_at = now - looked_at, now
                num_images = sum(batches.global_batch_size(step.of_epoch) for step in unseen)
                position.seconds += seconds
                position.waited += images.waited_seconds - waited
                waited = images.waited_seconds
                told_to_stop = False
                for step, (loss_of_step, num_told, num_unreadable) in zip(unseen, seen, strict=True):
                    if not math.isfinite(loss_of_step):
                        raise DivergedError(_not_finite(loss_of_step, epoch, step, batches, train_set))
                    position.loss += loss_of_step
                    position.num_unreadable += int(num_unreadable)
                    told_to_stop |= num_told > 0
                    line = {
                        "step": step.total + 1,
                        "epoch": epoch + 1,
                        "size_px": batches.size_px(step.of_epoch),
                        "images": batches.global_batch_size(step.of_epoch),
                        "loss": loss_of_step,
                        "lr": step.rate,
                        "images_per_second": num_images / seconds,
                    }
                    if step_lines is not None:
                        step_lines.add(line)
                    if board is not None:
                        for name in ("loss", "lr", "images_per_second"):
                            board.add_scalar(f"train/{name}", line[name], line["step"])
                unseen = []
                _check_unreadable(position.num_unreadable, f"epoch {epoch + 1}", recipe)
                progress.update(
                    bar,
                    completed=position.total_step,
                    description=f"epoch {epoch + 1}/{recipe.epochs}  {batches.size_px(part.step)} px  "
                    f"loss {position.loss / position.step:.3f}  {num_images / seconds:,.0f} images/s",
                )
                if told_to_stop or now - kept_at > 60 * checkpoint_minutes:
                    keep()
                    kept_at = looked_at = time.perf_counter()
                if told_to_stop:
                    raise Stopped(
                        f"stopped in epoch {epoch + 1} after step {position.total_step:,} and kept in {out}; the same "
                        "command goes on from there",
                        stop.signal_number or signal.SIGTERM,
                    )

            # --- Evaluate the average and what it averages, keep both -------------------------------------------------
            evaluated: dict[str, Results] = {}
            for name, network_ in (("average", average.model), ("raw", model)):
                network_.eval()
                images = load(val_set, val_batches[processes.rank :: world], stand_in=False, **reading)
                evaluated[name] = task.evaluate(network_, images, processes.gather)
            val_unreadable = [name for names in processes.gather(images.unreadable) for name in names]
            if val_unreadable:
                _check_unreadable(len(val_unreadable), "validation", recipe)
                say(f"cannot be read, left out of validation: {', '.join(val_unreadable)}")
            _to_training(model, recipe)
            results, raw = evaluated["average"], evaluated["raw"].metrics()
            main_metric = results.main_metric
            metrics = results.metrics()
            averaged = average.model.state_dict().values()
            if not all(map(math.isfinite, metrics.values())) or not all(x.isfinite().all() for x in averaged):
                raise DivergedError(f"the network is not finite after epoch {epoch + 1}; try a lower --lr")
            record = {
                "epoch": epoch + 1,
                "step": position.total_step,
                "train_loss": position.loss / len(batches),
                **{f"val_{name}": value for name, value in metrics.items()},
                **{f"raw_{name}": value for name, value in raw.items() if name != "num_images"},
                "unreadable": position.num_unreadable,
                "val_unreadable": len(val_unreadable),
                "seconds": position.seconds,
                "images_per_second": len(train_set) / position.seconds,
                "waiting_share": position.waited / position.seconds,
            }
            history = [*position.history, record]
            if is_first and epoch_lines is not None:
                best = max(history, key=lambda one: one[f"val_{results.main_metric}"])
                # Without what time it took, so that the same run leaves the same file.
                timeless = {name: value for name, value in record.items() if name not in TIMES}
                of_file = {"recipe": recipes.to_dict(recipe), "metrics": timeless, **data_facts}
                if schedule_epochs < recipe.epochs:
                    of_file["schedule_epochs"] = schedule_epochs
                _save(initial, average.model, of_file, out / "model.safetensors")
                _save(initial, model, of_file, out / "raw.safetensors")
                if best is record:
                    _save(initial, average.model, of_file, out / "best.safetensors")
                epoch_lines.add(record)
                if board is not None:
                    for name, value in record.items():
                        board.add_scalar(f"epoch/{name}", value, position.total_step)
                    board.flush()
            say(
                f"epoch {epoch + 1:>3}  loss {record['train_loss']:.3f}  validation {results.main_metric} "
                f"{record[f'val_{results.main_metric}']:.2f} %  {record['images_per_second']:,.0f} images/s, "
                f"{100 * record['waiting_share']:.0f} % of the time waiting for data"
            )
            position = Position(epoch=epoch + 1, total_step=position.total_step, history=history)
            if position.epoch == recipe.epochs and is_first and step_lines is not None:
                step_lines.sync()
                write_report(
                    out / "report.html",
                    title=f"{initial.name} on {data}",
                    recipe=recipe,
                    origin=origin,
                    epochs=history,
                    steps=out / "steps.jsonl",
                    sections=sections(results, val_set.source),
                    facts=_environment(processes, at_once, recipe, schedule_epochs),
                    commands=() if other else _commands(recipe, data, out),
                )
            keep()
            kept_at = time.perf_counter()
    return Run(out / "model.safetensors", position.history, main_metric)


@dataclass
class _Step:
    total: int
    of_epoch: int
    rate: float
    sums: Tensor


def _to_training(model: nn.Module, recipe: Recipe) -> None:
    model.train()
    freeze(model, recipe.optimizer.freeze)


def _batches(recipe: Recipe, num_images: int, epoch: int, world: int) -> EpochBatches:
    """The batches of all processes together, the same however many there are."""
    sampler = recipe.sampler
    sizes_px = (recipe.data.size_px,) if sampler.variant == "standard" else sampler.sizes_px
    smallest = min(
        batch_size_at(
            size_px,
            variant=sampler.variant,
            batch_size=recipe.batch_size,
            base_px=recipe.data.size_px,
            largest_px=max(sizes_px),
        )
        for size_px in sizes_px
    )
    if smallest < 4 * world and world > 1:
        raise ValueError(f"batch_size is {recipe.batch_size}, with {world} processes too few; give each 4 or more")
    return EpochBatches(
        num_images,
        sizes_px=sizes_px,
        batch_size=recipe.batch_size,
        base_px=recipe.data.size_px,
        variant=sampler.variant,
        seed=recipe.seed,
        epoch=epoch,
        # Half a batch has two images for each process, so that nothing here depends on how many there are.
        min_last=max(2, smallest // 2),
    )


def _blank(task: Task, recipe: Recipe, model: nn.Module, shape: tuple[int, ...] | None = None) -> Batch:
    """A batch of black images, two of the base size unless `shape` says otherwise."""
    shape = shape or (2, 3, recipe.data.size_px, recipe.data.size_px)
    device = next(model.parameters()).device
    pixels = torch.zeros(shape, device=device).to(memory_format=torch.channels_last)
    labels = moved(task.blank_labels(shape[0], shape[2]), str(device))
    return Batch(pixels, labels, tuple(range(shape[0])))


def _shapes(recipe: Recipe, num_images: int, at_once: int, world: int) -> set[tuple[int, ...]]:
    """The shapes of the parts of whole steps: one for each size, or two where a step does not divide evenly."""
    shapes = set()
    for size_px, batch_size in _step_sizes(recipe, num_images, world).items():
        num_parts = count_parts(batch_size, size_px, pixels_at_once=at_once, world=world)
        for length in (batch_size // num_parts, -(-batch_size // num_parts)):
            shapes.add((length, 3, size_px, size_px))
    return shapes


def _step_sizes(recipe: Recipe, num_images: int, world: int) -> dict[int, int]:
    """Images of a whole step by size in pixels; no more than there are."""
    sizes = _batches(recipe, num_images, 0, world).batch_sizes
    return {size_px: min(batch_size, num_images) for size_px, batch_size in sizes.items()}


def _say_steps(recipe: Recipe, num_images: int, num_steps: int, at_once: int, world: int) -> Iterator[str]:
    processes = f"{world} processes" if world > 1 else "1 process"
    yield f"{num_steps:,} steps in {recipe.epochs} epochs"
    if recipe.batch_size > num_images:
        yield (
            f"batch size {recipe.batch_size:,} exceeds the {num_images:,} images for training: every step uses all "
            "of them, and an epoch is one step; for more steps give a smaller --batch-size"
        )
    for size_px, batch_size in _step_sizes(recipe, num_images, world).items():
        num_parts = count_parts(batch_size, size_px, pixels_at_once=at_once, world=world)
        rounds = num_parts // world
        yield (
            f"at {size_px} px {batch_size:,} images a step: {processes} x {rounds} part{'s' if rounds > 1 else ''} x "
            f"{'about ' if batch_size % num_parts else ''}{round(batch_size / num_parts):,} images"
        )


def _check_extension(recipe: Recipe, out: Path, num_done: int, schedule_epochs: int) -> None:
    """Refuse to change the epochs of a run on which its learning rate depends, or to train on at a rate of zero."""
    if num_done < schedule_epochs:
        raise ValueError(
            f"{out}: epochs are {recipe.epochs}, but this run has done {num_done} of {schedule_epochs} epochs, over "
            f"which its learning rate is scheduled; finish it with --epochs {schedule_epochs}, then continue it with "
            f"--epochs {recipe.epochs}, or name another folder"
        )
    if not recipe.optimizer.end_lr:
        raise ValueError(
            f"{out}: optimizer.end_lr is 0, and a finished run continues at that learning rate, which changes nothing; "
            "name another folder for a longer run"
        )


def _say_start(recipe: Recipe, pretrained: Weights, class_names: tuple[str, ...]) -> Iterator[str]:
    """What training makes of the weights that it starts from."""
    made_px, size_px = pretrained.preprocessing.crop_px, recipe.data.size_px
    hint = "" if made_px == size_px else f" (--size {made_px} trains at their size)"
    yield f"input size: the weights were made for {made_px} px, training uses {size_px} px{hint}"
    frozen = "" if recipe.optimizer.freeze == "nothing" else f"frozen up to {recipe.optimizer.freeze}; "
    yield f"backbone: {frozen}its learning rate is {recipe.optimizer.backbone_lr_scale:g} x that of the head"
    if (pretrained.task, pretrained.class_names) == (recipe.task, class_names):
        yield f"classifier: from the weights, which have the same {len(class_names)} class names"
    else:
        yield f"classifier: new, with random weights, for {len(class_names)} classes"


def _check_unreadable(num: int, where: str, recipe: Recipe) -> None:
    if num > recipe.data.max_unreadable:
        raise ImageError(
            f"{num} images of {where} cannot be read; allowed are {recipe.data.max_unreadable}; "
            f"replace them by readable images of the same names, or resume with --max-unreadable {num} or more"
        )


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def _not_finite(loss: float, epoch: int, step: _Step, batches: EpochBatches, images: ImageDataset) -> str:
    names = [images.source[pick.number].name for pick in batches[step.of_epoch]]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (
        f"the loss is {loss} at epoch {epoch + 1}, step {step.total + 1}, {batches.size_px(step.of_epoch)} px, "
        f"images {', '.join(names[:8])}{more}; try a lower --lr"
    )


def _without_what_may_change(recipe: Recipe) -> dict[str, Any]:
    """The recipe without what changes no number that is computed.

    The limit on unreadable images only decides whether a run stops at an image or skips it: what it computed before it
    stopped is the same with any limit. The default limit on large images is left out, since earlier versions had none.
    """
    values = recipes.to_dict(recipe)
    for name in ("num_workers", "max_unreadable"):
        del values["data"][name]
    if recipe.data.max_megapixels == recipes.MAX_MEGAPIXELS:
        del values["data"]["max_megapixels"]
    return values


def _fingerprint(weights: Weights) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.tensors.items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _tensorboard(out: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError('TensorBoard is not installed; pip install "mobilevit[tensorboard]"') from None
    return SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)


def _environment(processes: Processes, at_once: int, recipe: Recipe, schedule_epochs: int) -> dict[str, str]:
    device = processes.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    extended = {"learning rate": f"schedule of {schedule_epochs} epochs, then constant at optimizer.end_lr"}
    return {
        **(extended if schedule_epochs < recipe.epochs else {}),
        "mobilevit": version("mobilevit"),
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "system": platform.platform(),
        "device": f"{device} ({name})",
        "processes": str(processes.world),
        "threads of each": str(torch.get_num_threads()),
        f"images of {recipe.data.size_px} px at once, at most": f"{at_once // recipe.data.size_px**2:,}",
    }


def _commands(recipe: Recipe, data: str | Path, out: Path) -> list[tuple[str, str]]:
    weights, data = shlex.quote(str(out / "model.safetensors")), shlex.quote(str(data))
    evaluate = f"mobilevit evaluate {shlex.quote(str(out))} --data {data} --per-class"
    commands = [
        ("Evaluate, the average and the raw weights", evaluate),
        ("Predict", f"mobilevit predict {weights} IMAGE..."),
        ("Export, compared with torch on these images", f"mobilevit export {weights} --to onnx --images {data}"),
    ]
    if "transformers" in TASK_FORMATS[recipe.task]:
        commands.append(("Write in transformers' layout", f"mobilevit convert {weights} FOLDER --to transformers"))
    return commands


def _save(initial: Weights | OtherWeights, model: nn.Module, training: Mapping[str, Any], path: Path) -> None:
    if isinstance(initial, OtherWeights):
        initial.write(model.state_dict(), training, path)
    else:
        write(replace(initial, tensors=model.state_dict(), training=training), path)
