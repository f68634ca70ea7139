"""The training loop, the same for every task: epochs of steps, each followed by an evaluation and a checkpoint."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import signal
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from torch import nn

from mobilevit import recipes
from mobilevit.data.loader import ImageDataset, Loader, load
from mobilevit.data.python_data import MapDataset, PythonData, to_data
from mobilevit.data.sampler import EpochBatches, Pick, eval_batches
from mobilevit.defaults import NUM_CALIBRATION_IMAGES, TrackerName
from mobilevit.device import choose_device
from mobilevit.images import ImageError, megapixel_limit_restored
from mobilevit.logs import CONSOLE, log_to_stderr
from mobilevit.models.rounding import simulate_int8
from mobilevit.recipes import Recipe
from mobilevit.report.results import sections
from mobilevit.report.training import Origin, Report, write_report
from mobilevit.tasks import Results
from mobilevit.tasks.distillation import student_view
from mobilevit.tasks.multilabel import chosen_thresholds
from mobilevit.teacher import TeacherNetwork, read_teacher
from mobilevit.training.distillation import DistillationLoss, network_of
from mobilevit.training.distributed import join_processes
from mobilevit.training.ending import Ending
from mobilevit.training.external import ExternalClassifier, ExternalWeights
from mobilevit.training.optim import learning_rate_at
from mobilevit.training.run import EpochMetrics, Run, StepRecord, open_run
from mobilevit.training.setup import Setup, TrainOptions, blank_batch, prepare
from mobilevit.training.signals import StopOnSignal
from mobilevit.training.step import TrainStep, to_train_mode
from mobilevit.training.summary import describe_run, environment, next_commands
from mobilevit.weights import Weights, to_weights, write

logger = logging.getLogger(__name__)
TIMES = (
    "seconds",
    "images_per_second",
    "data_wait_fraction",
    "teacher_fraction",
)  # keys of epoch metrics that differ from run to run


@dataclass(frozen=True)
class TrainingResult:
    """The weights file of a finished run, the metrics of every epoch, and the name of the main metric."""

    weights: Path
    epochs: list[EpochMetrics]
    main_metric: str


class Stopped(KeyboardInterrupt):
    """Training was stopped by a signal after a complete step. The same call resumes it."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


class DivergedError(ValueError):
    """A loss or a weight is not finite."""


def train(
    recipe: Recipe | str,
    data: str | os.PathLike[str] | MapDataset | tuple[MapDataset, MapDataset] | PythonData,
    out: str | Path,
    *,
    pretrained: Weights | str | os.PathLike[str] | None = None,
    download: bool = False,
    classifier: ExternalClassifier | None = None,
    teacher: TeacherNetwork | nn.Module | str | os.PathLike[str] | None = None,
    device: str = "auto",
    checkpoint_minutes: float = 5.0,
    trackers: Sequence[TrackerName] = (),
    extend: bool = False,
    self_check: bool = True,
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
        data: a folder, a file or the name of a dataset, see docs/training.md; or a dataset in Python (`MapDataset`),
            or a pair of datasets for training and validation, see docs/data.md.
        out: the run folder; see `mobilevit.training.run`.
        pretrained: initial weights: a path, a hub id, or `Weights`. None: random weights.
        download: fetch a hub id that is not in the local cache.
        classifier: train this classifier of another library, from random weights, instead of the recipe's MobileViT.
        teacher: distil from this classifier: a source that `mobilevit.teacher.read_teacher` reads, a `TeacherNetwork`,
            or a module that maps images in [0, 1] (B, 3, H, W) to logits; see docs/distill.md.
        device: "auto" is the first available one of cuda, mps and cpu.
        checkpoint_minutes: interval between checkpoints. Every epoch ends with a checkpoint, too.
        trackers: send the logs to these experiment trackers as well; see `mobilevit.training.track`.
        extend: continue a finished run in `out` if `recipe` has more epochs and is otherwise the same. The learning
            rate of the additional epochs is `optimizer.end_lr`.
        self_check: on another device than the CPU, first compare a training step with the CPU; see
            `mobilevit.self_check`.
        origin: recipe name and command line, for the report.

    Raises:
        ValueError: unusable data, weights, recipe or device, a device that computes other results than the CPU
            (`mobilevit.self_check.DeviceError`), a folder `out` that contains another run, a finished run
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
    if not isinstance(out, str | os.PathLike):
        raise TypeError(f"out is a {type(out).__name__}; use a path (str or pathlib.Path)")
    options = TrainOptions(
        recipe=recipe,
        data=to_data(data),
        out=Path(out),
        pretrained=None if pretrained is None else to_weights(pretrained, download=download),
        classifier=classifier,
        teacher=read_teacher(teacher, download=download) if isinstance(teacher, str | os.PathLike) else teacher,
        checkpoint_minutes=checkpoint_minutes,
        trackers=tuple(trackers),
        extend=extend,
        self_check=self_check,
        origin=origin or Origin(),
    )
    with join_processes(choose_device(device)) as processes, megapixel_limit_restored():
        setup = prepare(options, processes)
        with open_run(
            options.out,
            setup.identity,
            processes,
            num_bytes=setup.checkpoint_bytes,
            extend=extend,
            trackers=options.trackers,
        ) as run:
            return _Loop(setup, run).fit()


@dataclass(frozen=True)
class _PendingStep:
    """A step whose results have not been copied from the device yet."""

    total_step: int
    step: int  # in the epoch
    learning_rate: float
    sums: torch.Tensor  # of `TrainStep.update`


class _Timer:
    """Measures laps and the time of each that was spent waiting for data, in seconds."""

    def __init__(self, loader: Loader):
        self._loader, self._started, self._waited = loader, time.perf_counter(), 0.0

    def lap(self) -> tuple[float, float]:
        now, waited = time.perf_counter(), self._loader.waited_seconds
        seconds, waited_seconds = now - self._started, waited - self._waited
        self._started, self._waited = now, waited
        return seconds, waited_seconds


class _Loop:
    """The remaining epochs of a run."""

    def __init__(self, setup: Setup, run: Run):
        self.setup, self.run, self.plan = setup, run, setup.plan
        self.options, self.recipe, self.processes = setup.options, setup.options.recipe, setup.processes
        for line in describe_run(setup, run):
            logger.info(line)
        self.num_schedule_steps = self.plan.num_steps(run.schedule_epochs)
        self.step = TrainStep(
            setup.model, setup.loss, self.recipe, self.num_schedule_steps, self.processes, run.take_state()
        )
        if self.recipe.compute.compile:
            device, shapes = self.processes.device, sorted(self.plan.shapes())
            self.step.compile([blank_batch(setup.task, self.recipe, device, shape) for shape in shapes])
        self.ending, self.cooldown = self._find_ending()
        self.stop = StopOnSignal()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps,"))
        is_hidden = self.processes.rank > 0
        self.bar = ProgressBar(*columns, TimeRemainingColumn(), TextColumn("left"), console=CONSOLE, disable=is_hidden)
        self.saved_at = time.perf_counter()
        if isinstance(setup.loss, DistillationLoss):
            setup.loss.take_teacher_seconds()  # of setup and compilation

    def fit(self) -> TrainingResult:
        progress = self.run.progress
        self.bar.add_task(
            f"epoch {progress.epoch + 1}",
            total=self.plan.num_steps(self.ending.num_epochs),
            completed=progress.total_step,
        )
        with self.bar, self.stop:
            while self.run.progress.epoch < self.ending.num_epochs:
                self._train_epoch()
                self._finish_epoch()
        progress = self.run.progress
        return TrainingResult(self.options.out / "model.safetensors", progress.history, progress.main_metric)

    def _find_ending(self) -> tuple[Ending, range]:
        """When the run ends, and the steps of the cooldown. Decided by rank 0, so that all processes agree."""
        ending = self.processes.from_rank_0(lambda: self.run.progress.ending(self.recipe, self.run.schedule_epochs))
        if ending.cooldown_start == ending.num_epochs:
            return ending, range(0)
        last_epoch = min(ending.num_epochs, self.run.schedule_epochs)
        return ending, range(self.plan.num_steps(ending.cooldown_start), self.plan.num_steps(last_epoch))

    # --- An epoch of steps -------------------------------------------------------------------------------------------

    def _train_epoch(self) -> None:
        """Run the remaining steps of the current epoch."""
        progress = self.run.progress
        batches = self.plan.epoch(progress.epoch)
        # Reading results synchronizes with the device, so on a GPU they are read once per ten steps.
        max_pending = 1 if self.processes.device.type == "cpu" else 10
        pending: list[_PendingStep] = []
        micro_batches, to_load = itertools.tee(self.plan.micro_batches(batches, progress.step, self.processes.rank))
        with contextlib.closing(self._load(self.setup.train_set, (one.picks for one in to_load))) as loader:
            timer = _Timer(loader)
            for micro_batch, batch in zip(micro_batches, loader, strict=False):
                if batch.unreadable:
                    logger.warning(f"cannot be read, skipped: {', '.join(batch.unreadable)}")
                is_last = self.step.accumulate(micro_batch, batch, progress.epoch)
                if not is_last:
                    continue
                learning_rate = self._learning_rate()
                is_stopped = self.stop.signal_number > 0
                sums = self.step.update(learning_rate, micro_batch.num_micro_batches, is_stopped)
                pending.append(_PendingStep(progress.total_step, progress.step, learning_rate, sums))
                progress.step += 1
                progress.total_step += 1
                if len(pending) == max_pending or progress.step == len(batches):
                    self._record(pending, batches, timer)
                    pending = []

    def _learning_rate(self) -> float:
        """The learning rate of the current step."""
        progress = self.run.progress
        return learning_rate_at(
            self.recipe.optimizer,
            progress.total_step,
            self.num_schedule_steps,
            epoch=progress.epoch,
            num_epochs=self.run.schedule_epochs,
            cooldown=self.cooldown,
        )

    def _load(self, dataset: ImageDataset, picks: Iterable[list[Pick]], *, replace_unreadable: bool = True) -> Loader:
        return load(
            dataset,
            picks,
            num_workers=self.recipe.data.num_workers,
            device=str(self.processes.device),
            preprocessing=self.setup.initial.preprocessing,
            max_unreadable=self.recipe.data.max_unreadable,
            replace_unreadable=replace_unreadable,
        )

    def _record(self, pending: Sequence[_PendingStep], batches: EpochBatches, timer: _Timer) -> None:
        """Log the pending steps; save a checkpoint when it is due; stop after divergence or a signal."""
        progress, epoch = self.run.progress, self.run.progress.epoch
        sums = torch.stack([step.sums for step in pending]).tolist()
        seconds, waited_seconds = timer.lap()
        progress.seconds += seconds
        progress.data_wait_seconds += waited_seconds
        if isinstance(self.setup.loss, DistillationLoss):
            progress.teacher_seconds += self.setup.loss.take_teacher_seconds()
        images_per_second = sum(batches.global_batch_size(step.step) for step in pending) / seconds
        for step, (loss, num_unreadable, _) in zip(pending, sums, strict=True):
            if not math.isfinite(loss):
                raise DivergedError(_not_finite(loss, epoch, step, batches, self.setup.train_set))
            progress.loss += loss
            progress.num_unreadable += int(num_unreadable)
            self.run.log_step(
                StepRecord(
                    step=step.total_step + 1,
                    epoch=epoch + 1,
                    size_px=batches.size_px(step.step),
                    images=batches.global_batch_size(step.step),
                    loss=loss,
                    lr=step.learning_rate,
                    images_per_second=images_per_second,
                )
            )
        self._check_unreadable(progress.num_unreadable, f"epoch {epoch + 1}")
        self.bar.update(
            self.bar.task_ids[0],
            completed=progress.total_step,
            description=f"epoch {epoch + 1}/{self.ending.num_epochs}  {batches.size_px(pending[-1].step)} px  "
            f"loss {progress.loss / progress.step:.3f}  {images_per_second:,.0f} images/s",
        )
        is_stopped = any(num_stopped for *_, num_stopped in sums)
        if is_stopped or time.perf_counter() - self.saved_at > 60 * self.options.checkpoint_minutes:
            self._save_checkpoint()
            timer.lap()  # exclude the time of saving from the speed
        if is_stopped:
            raise Stopped(
                f"stopped in epoch {epoch + 1} after step {progress.total_step:,} and saved in {self.options.out}; the "
                "same command resumes the run",
                self.stop.signal_number or signal.SIGTERM,
            )

    def _save_checkpoint(self) -> None:
        if not all(parameter.isfinite().all() for parameter in self.setup.model.parameters()):
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

    def _finish_epoch(self) -> None:
        """Evaluate; write weights, metrics, a checkpoint and the report; decide on early stopping."""
        progress = self.run.progress
        results, num_unreadable = self._evaluate()
        metrics = {prefix: one.metrics() for prefix, one in results.items()}
        tensors = self.step.ema.model.state_dict().values()
        if not all(map(math.isfinite, metrics["val"].values())) or not all(x.isfinite().all() for x in tensors):
            raise DivergedError(f"the weights are not finite after epoch {progress.epoch + 1}; try a lower --lr")
        record: EpochMetrics = {
            "epoch": progress.epoch + 1,
            "step": progress.total_step,
            "train_loss": progress.loss / progress.step,
            **{
                f"{prefix}_{name}": value
                for prefix, values in metrics.items()
                for name, value in values.items()
                if prefix == "val" or name != "num_images"
            },
            "unreadable": progress.num_unreadable,
            "val_unreadable": num_unreadable,
            "seconds": progress.seconds,
            "images_per_second": len(self.setup.train_set) / progress.seconds,
            "data_wait_fraction": progress.data_wait_seconds / progress.seconds,
        }
        if isinstance(self.setup.loss, DistillationLoss):
            record["teacher_fraction"] = progress.teacher_seconds / progress.seconds
        ema = results["val"]
        main_metric = ema.main_metric if self.recipe.metric == "auto" else self.recipe.metric
        main = f"val_{main_metric}"
        if self.run.folder:
            self._write_weights(
                record, ema, results["raw"], is_best=all(record[main] > past[main] for past in progress.history)
            )
        self.run.log_epoch(record)
        in_int8 = f" ({record[f'int8_{main_metric}']:.2f} % in int8)" if "int8" in results else ""
        logger.info(
            f"epoch {record['epoch']:>3}  loss {record['train_loss']:.3f}  validation {main_metric} "
            f"{record[main]:.2f} %{in_int8}  {record['images_per_second']:,.0f} images/s, "
            f"{100 * record['data_wait_fraction']:.0f} % of the time waiting for data"
            + (f", {100 * record['teacher_fraction']:.0f} % in the teacher" if "teacher_fraction" in record else "")
        )
        self.run.progress = progress.next_epoch(record, main_metric)
        self._stop_early()
        if self.run.folder and self.run.progress.epoch == self.ending.num_epochs:
            self._write_report(ema)
        self._save_checkpoint()

    def _stop_early(self) -> None:
        """Shorten the run if the metric has not improved for `patience` epochs."""
        before = self.ending
        self.ending, self.cooldown = self._find_ending()
        if self.ending != before:
            num_left = self.ending.num_epochs - self.ending.stopped_after
            logger.info(
                f"no improvement of {self.run.progress.main_metric} in {self.recipe.patience} epochs: the run ends "
                + (f"after a cooldown until epoch {self.ending.num_epochs}" if num_left else "here")
            )
            self.bar.update(self.bar.task_ids[0], total=self.plan.num_steps(self.ending.num_epochs))

    def _evaluate(self) -> tuple[dict[str, Results], int]:
        """Results by the prefix of their metrics, and the number of unreadable images.

        "val" are the EMA weights, "raw" the raw weights, and "int8" the EMA weights in quantization-aware training.
        """
        setup, rank, world_size = self.setup, self.processes.rank, self.processes.world_size
        batches = eval_batches(
            len(setup.val_set),
            batch_size=max(1, min(self.recipe.batch_size // world_size, self.plan.max_micro_batch_size())),
            size_px=self.recipe.data.size_px,
        )[rank::world_size]
        models = {"val": network_of(self.step.ema.model).eval(), "raw": network_of(setup.model).eval()}
        if self.recipe.compute.quantization_aware:
            models["int8"] = self._in_int8(models["val"])
        results, unreadable = {}, []
        for prefix, model in models.items():
            with contextlib.closing(self._load(setup.val_set, batches, replace_unreadable=False)) as loader:
                results[prefix] = setup.task.evaluate(model, loader, self.processes.gather)
            unreadable = [name for names in self.processes.gather(loader.unreadable) for name in names]
        to_train_mode(setup.model, self.recipe)
        if unreadable:
            self._check_unreadable(len(unreadable), "validation")
            if rank == 0:
                logger.warning(f"cannot be read, left out of validation: {', '.join(unreadable)}")
        return results, len(unreadable)

    def _in_int8(self, network: nn.Module) -> nn.Module:
        """Simulate an int8 artifact. All processes calibrate it on the same validation images."""
        num = len(self.setup.val_set)
        picks = eval_batches(num, batch_size=1, size_px=self.recipe.data.size_px)[:: -(-num // NUM_CALIBRATION_IMAGES)]
        with contextlib.closing(self._load(self.setup.val_set, picks, replace_unreadable=False)) as loader:
            return simulate_int8(network, (student_view(x.pixels, x.size_px) for x in loader if x.indices))

    def _write_weights(self, record: EpochMetrics, ema: Results, raw: Results, *, is_best: bool) -> None:
        setup, ema_model, raw_model = self.setup, network_of(self.step.ema.model), network_of(self.setup.model)
        training = {
            "recipe": recipes.to_dict(self.recipe),
            # Without times, so that identical runs write identical files.
            "metrics": {name: value for name, value in record.items() if name not in TIMES},
            "val_data": setup.val_fingerprint,  # evaluation recognizes the validation split
            "num_transparent": setup.train_set.num_transparent,  # export reports transparent images
        }
        if self.run.schedule_epochs < self.recipe.epochs:
            training["schedule_epochs"] = self.run.schedule_epochs
        files = (("model", ema_model, ema), ("raw", raw_model, raw), *([("best", ema_model, ema)] if is_best else []))
        for name, model, results in files:
            path = self.options.out / f"{name}.safetensors"
            if isinstance(setup.initial, ExternalWeights):
                setup.initial.write(model.state_dict(), training, path)
            else:
                weights = replace(setup.initial, tensors=model.state_dict(), training=training)
                write(replace(weights, thresholds=chosen_thresholds(results)), path)

    def _write_report(self, results: Results) -> None:
        options, run, loss = self.options, self.run, self.setup.loss
        run.sync_logs()
        facts = environment(self.processes, self.plan, run.schedule_epochs, self.ending)
        if isinstance(loss, DistillationLoss):
            facts = {"teacher": loss.describe().removeprefix("teacher "), **facts}
        write_report(
            options.out / "report.html",
            Report(
                title=f"{self.setup.initial.name} on {options.data}",
                recipe=self.recipe,
                origin=options.origin,
                epochs=run.progress.history,
                steps=options.out / "steps.jsonl",
                sections=sections(results, self.setup.val_set.source),
                facts=facts,
                commands=() if options.classifier else next_commands(self.recipe, options.data, options.out),
            ),
        )


def _not_finite(loss: float, epoch: int, step: _PendingStep, batches: EpochBatches, images: ImageDataset) -> str:
    names = [images.source[pick.image_index].name for pick in batches[step.step]]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (
        f"the loss is {loss} at epoch {epoch + 1}, step {step.total_step + 1}, {batches.size_px(step.step)} px, "
        f"images {', '.join(names[:8])}{more}; try a lower --lr"
    )
