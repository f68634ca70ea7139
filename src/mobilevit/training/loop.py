"""The training loop, the same for every task: epochs of steps, each followed by an evaluation and a checkpoint."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
import math
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from mobilevit import recipes
from mobilevit.data.loader import ImageDataset, Loader, load
from mobilevit.data.sampler import EpochBatches, eval_batches
from mobilevit.data.samples import fingerprint
from mobilevit.device import choose_device, thread_advice
from mobilevit.images import ImageError, megapixel_limit_restored
from mobilevit.logs import CONSOLE, log_to_stderr
from mobilevit.recipes import Recipe
from mobilevit.report.results import sections
from mobilevit.report.training import Origin, write_report
from mobilevit.tasks import TASKS, Results
from mobilevit.training.distributed import Processes, join_processes
from mobilevit.training.external import ExternalClassifier, ExternalWeights, check_recipe, initial_weights
from mobilevit.training.memory import max_micro_batch_pixels
from mobilevit.training.optim import learning_rate_at
from mobilevit.training.plan import Plan
from mobilevit.training.run import open_run
from mobilevit.training.signals import StopOnSignal
from mobilevit.training.step import TrainStep, autocast, blank_batch, prepare_model, to_train_mode
from mobilevit.training.summary import describe_initial_weights, describe_plan, environment, next_commands
from mobilevit.weights import Weights, to_weights, write

logger = logging.getLogger(__name__)
TIMES = ("seconds", "images_per_second", "data_wait_fraction")  # keys of a record that differ from run to run


@dataclass(frozen=True)
class TrainingResult:
    """The weights file of a finished run, the metrics of every epoch, and the name of the main metric."""

    weights: Path
    epochs: list[dict[str, float]]
    main_metric: str


class Stopped(KeyboardInterrupt):
    """Training was stopped by a signal after a complete step. The same call resumes it."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


class DivergedError(ValueError):
    """A loss or a weight is not finite."""


@dataclass(frozen=True)
class TrainOptions:
    """The arguments of `train`, checked."""

    recipe: Recipe
    data: str | Path
    out: Path
    pretrained: Weights | None
    classifier: ExternalClassifier | None
    checkpoint_minutes: float
    tensorboard: bool
    extend: bool
    origin: Origin


def train(
    recipe: Recipe | str,
    data: str | Path,
    out: str | Path,
    *,
    pretrained: Weights | str | os.PathLike[str] | None = None,
    download: bool = False,
    classifier: ExternalClassifier | None = None,
    device: str = "auto",
    checkpoint_minutes: float = 5.0,
    tensorboard: bool = False,
    extend: bool = False,
    origin: Origin | None = None,
) -> TrainingResult:
    """Train on the images in `data` and write weights, logs and a report to the folder `out`.

    Called again after an interruption, it resumes from the newest checkpoint. The weights are then bit-identical to
    those of an uninterrupted run with the same recipe, data, device and number of threads. Processes started by
    torchrun divide each step among them. Messages are logged; see `mobilevit.logs`.

    Examples:
        >>> run = mobilevit.train("finetune", "pets/", "runs/pets", pretrained="apple/mobilevit-x-small", download=True)
        >>> model = mobilevit.load(run.weights)

    Args:
        recipe: a `Recipe`, or the name of one such as "small".
        data: a folder or data set; see docs/training.md.
        out: the run folder; see `mobilevit.training.run`.
        pretrained: initial weights: a path, a hub id, or `Weights`. None: random weights.
        download: fetch a hub id that is not in the local cache.
        classifier: train this classifier of another library, from random weights, instead of the recipe's MobileViT.
        device: "auto" is the first available one of cuda, mps and cpu.
        checkpoint_minutes: interval between checkpoints. Every epoch ends with a checkpoint, too.
        tensorboard: log to TensorBoard as well.
        extend: continue a finished run in `out` if `recipe` has more epochs and is otherwise the same. The learning
            rate of the additional epochs is `optimizer.end_lr`.
        origin: recipe name and command line, for the report.

    Raises:
        ValueError: unusable data, weights, recipe or device, a folder `out` that contains another run, a finished run
            (`FinishedError`), or a loss that is not finite (`DivergedError`).
        TypeError: an argument of the wrong type.
        Stopped: Ctrl-C or SIGTERM.
    """
    log_to_stderr()
    if isinstance(recipe, str):
        origin = origin or Origin(recipe)
        recipe = recipes.named(recipe)
    if not isinstance(recipe, Recipe):
        raise TypeError(
            f"recipe is a {type(recipe).__name__}; use the name of a recipe ({', '.join(recipes.RECIPES)}) or a "
            "Recipe, such as dataclasses.replace(mobilevit.RECIPES['small'], epochs=5)"
        )
    for name, value in (("data", data), ("out", out)):
        if not isinstance(value, str | os.PathLike):
            raise TypeError(f"{name} is a {type(value).__name__}; use a path (str or pathlib.Path)")
    weights = None if pretrained is None else to_weights(pretrained, download=download)
    _check_recipe(recipe, weights, classifier)
    options = TrainOptions(
        recipe, data, Path(out), weights, classifier, checkpoint_minutes, tensorboard, extend, origin or Origin()
    )
    with join_processes(choose_device(device)) as processes, megapixel_limit_restored():
        return _Training(options, processes).fit()


def _check_recipe(recipe: Recipe, pretrained: Weights | None, classifier: ExternalClassifier | None) -> None:
    assert not (pretrained and classifier)
    if classifier:
        check_recipe(recipe)
    if pretrained is None:
        optimizer = recipe.optimizer
        for name, value, default in (
            ("freeze", optimizer.freeze, "nothing"),
            ("backbone_lr_scale", optimizer.backbone_lr_scale, 1),
        ):
            if value != default:
                raise ValueError(
                    f"optimizer.{name} is {value}, which needs a pretrained backbone, and this run starts from random "
                    f"weights; pass pretrained weights (--weights), or set it to {default}"
                )


@dataclass
class _PendingStep:
    """A step whose results have not been copied from the device yet."""

    total_step: int
    step: int  # in the epoch
    learning_rate: float
    sums: torch.Tensor  # of `TrainStep.update`


class _Training:
    """A call of `train`: setup, epochs, evaluation."""

    def __init__(self, options: TrainOptions, processes: Processes):
        self.options, self.recipe, self.processes = options, options.recipe, processes
        self.task = TASKS[self.recipe.task]
        self.train_set, self.val_set = self.task.datasets(self.recipe, options.data)
        _check_data(options, self.train_set, processes.world_size)
        torch.manual_seed(self.recipe.seed)
        self.initial: Weights | ExternalWeights
        if options.classifier:
            self.initial = initial_weights(options.classifier, self.recipe, self.train_set)
        else:
            self.initial = self.task.build(self.recipe, self.train_set, options.pretrained)
        self.model = self.initial.build().to(processes.device)
        self.plan = Plan(self.recipe, len(self.train_set), processes.world_size, self._max_pixels())
        self.model = prepare_model(self.model, self.recipe, processes.device)
        # Written to the weight files: evaluation recognizes the validation split, export reports transparent images.
        self.data_facts = {
            "val_data": fingerprint(self.val_set.source),
            "num_transparent": self.train_set.num_transparent,
        }

    def _max_pixels(self) -> int:
        """The largest micro-batch that fits into the memory of every process."""
        device, size_px = self.processes.device, self.recipe.data.size_px
        with autocast(self.recipe, device):
            model = copy.deepcopy(self.model).train()
            blank = blank_batch(self.task, device, (2, 3, size_px, size_px))
            return min(self.processes.gather(max_micro_batch_pixels(self.recipe, self.task, model, blank, device)))

    def fit(self) -> TrainingResult:
        """Train the epochs that are left."""
        recipe, processes, options = self.recipe, self.processes, self.options
        num_bytes = 4 * sum(tensor.nbytes for tensor in self.model.state_dict().values())  # weights, EMA, two moments
        with open_run(
            options.out,
            self._facts(),
            recipe,
            processes,
            num_bytes=num_bytes,
            extend=options.extend,
            tensorboard=options.tensorboard,
        ) as self.run:
            for line in self._describe():
                logger.info(line)
            self.num_schedule_steps = self.plan.num_steps(self.run.schedule_epochs)
            self.step = TrainStep(self.task, recipe, self.model, self.num_schedule_steps, processes, self.run.state)
            self.run.state = {}
            if recipe.compute.compile:
                self.step.compile(self.plan.shapes())
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps,"))
            bar = ProgressBar(
                *columns, TimeRemainingColumn(), TextColumn("left"), console=CONSOLE, disable=processes.rank > 0
            )
            self.saved_at = time.perf_counter()
            with bar as self.bar, StopOnSignal() as self.stop:
                self.bar.add_task(
                    f"epoch {self.run.progress.epoch + 1}",
                    total=self.plan.num_steps(recipe.epochs),
                    completed=self.run.progress.total_step,
                )
                main_metric = ""
                while self.run.progress.epoch < recipe.epochs:
                    self._train_epoch()
                    main_metric = self._finish_epoch()
        return TrainingResult(options.out / "model.safetensors", self.run.progress.history, main_metric)

    def _facts(self) -> dict[str, Any]:
        """What identifies the run."""
        facts = {
            "recipe": _identity(self.recipe),
            "data": f"{fingerprint(self.train_set.source)} {self.data_facts['val_data']}",
            "weights": _fingerprint(self.options.pretrained) if self.options.pretrained else "random",
        }
        return {**facts, "network": self.initial.name} if self.options.classifier else facts

    def _describe(self) -> list[str]:
        recipe, run, initial = self.recipe, self.run, self.initial
        lines = [
            f"{initial.name} from {'pretrained' if self.options.pretrained else 'random'} weights; "
            f"{len(self.train_set):,} training images and {len(self.val_set):,} validation images of "
            f"{len(initial.class_names)} classes",
            *self.train_set.notes,
            *self.val_set.notes,
        ]
        if self.options.pretrained:
            lines += describe_initial_weights(recipe, self.options.pretrained, initial.class_names)
        lines += describe_plan(self.plan)
        if run.schedule_epochs < recipe.epochs:
            lines.append(
                f"the learning rate schedule ends after epoch {run.schedule_epochs}; later epochs use the constant "
                f"learning rate {recipe.optimizer.end_lr:g} (optimizer.end_lr)"
            )
        if run.state:
            lines.append(f"resuming after step {run.progress.total_step:,}, in epoch {run.progress.epoch + 1}")
        if self.processes.device.type == "cpu" and self.processes.rank == 0 and (advice := thread_advice()):
            lines.append(advice)
        return lines

    # --- An epoch of steps -------------------------------------------------------------------------------------------

    def _train_epoch(self) -> None:
        """The steps of the current epoch that are left."""
        progress, rank = self.run.progress, self.processes.rank
        batches = self.plan.epoch(progress.epoch)
        picks = (micro_batch.picks for micro_batch in self.plan.micro_batches(batches, progress.step, rank))
        # Reading results waits for the device, so a GPU is asked once per ten steps.
        max_pending = 1 if self.processes.device.type == "cpu" else 10
        pending: list[_PendingStep] = []
        self.recorded_at, self.recorded_wait = time.perf_counter(), 0.0
        with contextlib.closing(self._load(self.train_set, picks)) as loader:
            for micro_batch in self.plan.micro_batches(batches, progress.step, rank):
                batch = next(loader)
                if batch.unreadable:
                    logger.warning(f"cannot be read, skipped: {', '.join(batch.unreadable)}")
                if not self.step.accumulate(micro_batch, batch, progress.epoch):
                    continue
                learning_rate = learning_rate_at(
                    self.recipe.optimizer,
                    progress.total_step,
                    self.num_schedule_steps,
                    epoch=progress.epoch,
                    num_epochs=self.run.schedule_epochs,
                )
                sums = self.step.update(learning_rate, micro_batch.num_micro_batches, self.stop.signal_number > 0)
                pending.append(_PendingStep(progress.total_step, progress.step, learning_rate, sums))
                progress.step += 1
                progress.total_step += 1
                if len(pending) == max_pending or progress.step == len(batches):
                    self._record(pending, batches, loader)
                    pending = []

    def _load(self, dataset: ImageDataset, picks: Any, *, replace_unreadable: bool = True) -> Loader:
        return load(
            dataset,
            picks,
            num_workers=self.recipe.data.num_workers,
            device=str(self.processes.device),
            preprocessing=self.initial.preprocessing,
            max_unreadable=self.recipe.data.max_unreadable,
            replace_unreadable=replace_unreadable,
        )

    def _record(self, pending: Sequence[_PendingStep], batches: EpochBatches, loader: Loader) -> None:
        """Log the pending steps; save a checkpoint when it is due; stop after divergence or a signal."""
        progress, epoch = self.run.progress, self.run.progress.epoch
        sums = torch.stack([step.sums for step in pending]).tolist()
        now = time.perf_counter()
        seconds, self.recorded_at = now - self.recorded_at, now
        progress.seconds += seconds
        progress.data_wait_seconds += loader.waited_seconds - self.recorded_wait
        self.recorded_wait = loader.waited_seconds
        images_per_second = sum(batches.global_batch_size(step.step) for step in pending) / seconds
        for step, (loss, num_unreadable, _) in zip(pending, sums, strict=True):
            if not math.isfinite(loss):
                raise DivergedError(_not_finite(loss, epoch, step, batches, self.train_set))
            progress.loss += loss
            progress.num_unreadable += int(num_unreadable)
            self.run.log_step(
                {
                    "step": step.total_step + 1,
                    "epoch": epoch + 1,
                    "size_px": batches.size_px(step.step),
                    "images": batches.global_batch_size(step.step),
                    "loss": loss,
                    "lr": step.learning_rate,
                    "images_per_second": images_per_second,
                }
            )
        self._check_unreadable(progress.num_unreadable, f"epoch {epoch + 1}")
        self.bar.update(
            self.bar.task_ids[0],
            completed=progress.total_step,
            description=f"epoch {epoch + 1}/{self.recipe.epochs}  {batches.size_px(pending[-1].step)} px  "
            f"loss {progress.loss / progress.step:.3f}  {images_per_second:,.0f} images/s",
        )
        is_stopped = any(num_stopped for *_, num_stopped in sums)
        if is_stopped or now - self.saved_at > 60 * self.options.checkpoint_minutes:
            self._save_checkpoint()
            self.recorded_at = self.saved_at
        if is_stopped:
            raise Stopped(
                f"stopped in epoch {epoch + 1} after step {progress.total_step:,} and saved in {self.options.out}; the "
                "same command resumes the run",
                self.stop.signal_number or signal.SIGTERM,
            )

    def _save_checkpoint(self) -> None:
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            step = self.run.progress.total_step
            raise DivergedError(f"the weights are not finite after step {step}; try a lower --lr")
        self.run.save(self.step.state_dict())
        self.saved_at = time.perf_counter()

    def _check_unreadable(self, num: int, where: str) -> None:
        if num > self.recipe.data.max_unreadable:
            raise ImageError(
                f"{num} images of {where} cannot be read, and max_unreadable is {self.recipe.data.max_unreadable}; "
                f"replace them by readable images of the same names, or resume with --max-unreadable {num} or more"
            )

    # --- The end of an epoch -----------------------------------------------------------------------------------------

    def _finish_epoch(self) -> str:
        """Evaluate; write weights, metrics, a checkpoint and the report. Returns the name of the main metric."""
        progress = self.run.progress
        ema, raw, num_unreadable = self._evaluate()
        metrics = ema.metrics()
        weights = self.step.ema.model.state_dict().values()
        if not all(map(math.isfinite, metrics.values())) or not all(tensor.isfinite().all() for tensor in weights):
            raise DivergedError(f"the weights are not finite after epoch {progress.epoch + 1}; try a lower --lr")
        record = {
            "epoch": progress.epoch + 1,
            "step": progress.total_step,
            "train_loss": progress.loss / progress.step,
            **{f"val_{name}": value for name, value in metrics.items()},
            **{f"raw_{name}": value for name, value in raw.metrics().items() if name != "num_images"},
            "unreadable": progress.num_unreadable,
            "val_unreadable": num_unreadable,
            "seconds": progress.seconds,
            "images_per_second": len(self.train_set) / progress.seconds,
            "data_wait_fraction": progress.data_wait_seconds / progress.seconds,
        }
        main = f"val_{ema.main_metric}"
        if self.run.folder:
            self._write_weights(record, is_best=all(record[main] > past[main] for past in progress.history))
        self.run.log_epoch(record)
        logger.info(
            f"epoch {record['epoch']:>3}  loss {record['train_loss']:.3f}  validation {ema.main_metric} "
            f"{record[main]:.2f} %  {record['images_per_second']:,.0f} images/s, "
            f"{100 * record['data_wait_fraction']:.0f} % of the time waiting for data"
        )
        self.run.progress = progress.next_epoch(record)
        if self.run.folder and self.run.progress.epoch == self.recipe.epochs:
            self._write_report(ema)
        self._save_checkpoint()
        return ema.main_metric

    def _evaluate(self) -> tuple[Results, Results, int]:
        """Results of the EMA weights and the raw weights, and the number of unreadable images."""
        rank, world_size = self.processes.rank, self.processes.world_size
        size_px = self.recipe.data.size_px
        batch_size = max(1, min(self.recipe.batch_size // world_size, self.plan.max_micro_batch_size()))
        batches = eval_batches(len(self.val_set), batch_size=batch_size, size_px=size_px)[rank::world_size]
        results, unreadable = [], []
        for model in (self.step.ema.model, self.model):
            model.eval()
            with contextlib.closing(self._load(self.val_set, batches, replace_unreadable=False)) as loader:
                results.append(self.task.evaluate(model, loader, self.processes.gather))
            unreadable = [name for names in self.processes.gather(loader.unreadable) for name in names]
        to_train_mode(self.model, self.recipe)
        if unreadable:
            self._check_unreadable(len(unreadable), "validation")
            if rank == 0:
                logger.warning(f"cannot be read, left out of validation: {', '.join(unreadable)}")
        return results[0], results[1], len(unreadable)

    def _write_weights(self, record: Mapping[str, float], *, is_best: bool) -> None:
        training = {
            "recipe": recipes.to_dict(self.recipe),
            # Without times, so that equal runs write equal files.
            "metrics": {name: value for name, value in record.items() if name not in TIMES},
            **self.data_facts,
        }
        if self.run.schedule_epochs < self.recipe.epochs:
            training["schedule_epochs"] = self.run.schedule_epochs
        ema = self.step.ema.model
        for name, model in (("model", ema), ("raw", self.model), *([("best", ema)] if is_best else [])):
            path = self.options.out / f"{name}.safetensors"
            if isinstance(self.initial, ExternalWeights):
                self.initial.write(model.state_dict(), training, path)
            else:
                write(replace(self.initial, tensors=model.state_dict(), training=training), path)

    def _write_report(self, results: Results) -> None:
        options, run = self.options, self.run
        run.sync_logs()
        write_report(
            options.out / "report.html",
            title=f"{self.initial.name} on {options.data}",
            recipe=self.recipe,
            origin=options.origin,
            epochs=run.progress.history,
            steps=options.out / "steps.jsonl",
            sections=sections(results, self.val_set.source),
            facts=environment(self.processes, self.plan, run.schedule_epochs),
            commands=() if options.classifier else next_commands(self.recipe, options.data, options.out),
        )


def _check_data(options: TrainOptions, train_set: ImageDataset, world_size: int) -> None:
    data, out = Path(options.data), options.out
    if len(train_set) < 2 * world_size:
        raise ValueError(f"{data}: {len(train_set)} training images are too few; add images")
    if data.is_dir() and out.resolve().is_relative_to(data.resolve()) and not (data / "train").is_dir():
        raise ValueError(f"{out}: is inside {data}, where it would be read as a class folder; choose another folder")


def _not_finite(loss: float, epoch: int, step: _PendingStep, batches: EpochBatches, images: ImageDataset) -> str:
    names = [images.source[pick.image_index].name for pick in batches[step.step]]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (
        f"the loss is {loss} at epoch {epoch + 1}, step {step.total_step + 1}, {batches.size_px(step.step)} px, "
        f"images {', '.join(names[:8])}{more}; try a lower --lr"
    )


def _identity(recipe: Recipe) -> dict[str, Any]:
    """The values of the recipe that must not change when a run resumes: those that change computed numbers.

    `max_unreadable` only decides whether a run stops at an image or skips it. The default of `max_megapixels` is left
    out, since earlier versions had no limit.
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
