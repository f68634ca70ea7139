"""Descriptions of a run: log lines before the first step, environment and commands in the report."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch

from mobilevit.data.python_data import Data, PythonData
from mobilevit.device import thread_advice
from mobilevit.recipes import Recipe
from mobilevit.training.distillation import DistillationLoss
from mobilevit.training.distributed import Processes
from mobilevit.training.ending import Ending
from mobilevit.training.plan import Plan
from mobilevit.training.run import Run
from mobilevit.training.setup import Setup
from mobilevit.weights import TASK_FORMATS, Weights


def describe_run(setup: Setup, run: Run) -> Iterator[str]:
    """Data, initial weights, steps and the position in the run."""
    recipe, initial, pretrained = setup.options.recipe, setup.initial, setup.options.pretrained
    yield (
        f"{initial.name} from {'pretrained' if pretrained else 'random'} weights; {len(setup.train_set):,} training "
        f"images and {len(setup.val_set):,} validation images of {len(initial.class_names)} classes"
    )
    yield from setup.train_set.notes
    yield from setup.val_set.notes
    if pretrained:
        yield from _describe_pretrained(recipe, pretrained, initial.class_names)
    if isinstance(setup.loss, DistillationLoss):
        yield setup.loss.describe()
    yield from _describe_plan(setup.plan)
    if run.schedule_epochs < recipe.epochs:
        yield (
            f"the learning rate schedule ends after epoch {run.schedule_epochs}; later epochs use the constant "
            f"learning rate {recipe.optimizer.end_lr:g} (optimizer.end_lr)"
        )
    if recipe.patience and recipe.optimizer.schedule == "cosine":
        yield (
            f"early stopping: after {recipe.patience} epochs without an improvement, the run ends in the middle of the "
            "cosine schedule; --optimizer.schedule wsd would end it with a cooldown of the learning rate"
        )
    if run.progress.total_step:
        yield f"resuming after step {run.progress.total_step:,}, in epoch {run.progress.epoch + 1}"
    if setup.processes.device.type == "cpu" and setup.processes.rank == 0 and (advice := thread_advice()):
        yield advice


def _describe_plan(plan: Plan) -> Iterator[str]:
    recipe, world_size = plan.recipe, plan.world_size
    yield f"{plan.num_steps(recipe.epochs):,} steps in {recipe.epochs} epochs"
    if recipe.batch_size > plan.num_images:
        yield (
            f"batch size {recipe.batch_size:,} exceeds the {plan.num_images:,} training images: every step uses all of "
            "them, and an epoch is one step; set a smaller --batch-size for more steps"
        )
    for size_px, batch_size in plan.batch_sizes().items():
        num = plan.num_micro_batches(batch_size, size_px)
        yield (
            f"at {size_px} px, a step has {batch_size:,} images: {world_size} process{'es' * (world_size > 1)} x "
            f"{num // world_size} micro-batch{'es' * (num > world_size)} x "
            f"{'about ' * (batch_size % num > 0)}{round(batch_size / num):,} images"
        )


def _describe_pretrained(recipe: Recipe, pretrained: Weights, class_names: tuple[str, ...]) -> Iterator[str]:
    """Which of the pretrained weights are used, and how they are trained."""
    pretrained_px, size_px = pretrained.preprocessing.crop_px, recipe.data.size_px
    hint = "" if pretrained_px == size_px else f" (--size {pretrained_px} trains at their size)"
    yield f"input size: the weights were trained at {pretrained_px} px, this run uses {size_px} px{hint}"
    frozen = "" if recipe.optimizer.freeze == "nothing" else f"frozen up to {recipe.optimizer.freeze}; "
    yield f"backbone: {frozen}its learning rate is {recipe.optimizer.backbone_lr_scale:g} x that of the head"
    task = "classify" if recipe.task == "distill" else recipe.task
    if (pretrained.task, pretrained.class_names) == (task, class_names):
        yield f"classifier: from the weights, which have the same {len(class_names)} class names"
    else:
        yield f"classifier: new, with random weights, for {len(class_names)} classes"


def environment(processes: Processes, plan: Plan, schedule_epochs: int, ending: Ending) -> dict[str, str]:
    """Software and hardware, for the report."""
    device, recipe = processes.device, plan.recipe
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    extended = {"learning rate": f"schedule of {schedule_epochs} epochs, then constant at optimizer.end_lr"}
    early = {
        "early stopping": f"after {ending.num_epochs} of {recipe.epochs} epochs; no improvement for {recipe.patience} "
        f"epochs in epoch {ending.stopped_after}"
    }
    return {
        **(early if ending.stopped_after else {}),
        **(extended if schedule_epochs < recipe.epochs else {}),
        "mobilevit": version("mobilevit"),
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "system": platform.platform(),
        "device": f"{device} ({name})",
        "processes": str(processes.world_size),
        "threads per process": str(torch.get_num_threads()),
        f"maximum micro-batch size at {recipe.data.size_px} px": f"{plan.max_micro_batch_size():,}",
    }


def next_commands(recipe: Recipe, data: Data, out: Path) -> list[tuple[str, str]]:
    """What to do with the weights: (purpose, command)."""
    weights = shlex.quote(str(out / "model.safetensors"))
    if isinstance(data, PythonData):  # commands cannot name it
        return [
            ("Predict", f"mobilevit predict {weights} IMAGE..."),
            ("Export", f"mobilevit export {weights} --to onnx --images IMAGE..."),
        ]
    data = shlex.quote(str(data))
    evaluate = f"mobilevit evaluate {shlex.quote(str(out))} --data {data} --per-class"
    commands = [
        ("Evaluate EMA weights and raw weights", evaluate),
        ("Predict", f"mobilevit predict {weights} IMAGE..."),
        ("Export, verified against PyTorch on these images", f"mobilevit export {weights} --to onnx --images {data}"),
    ]
    if recipe.task == "classify":
        calibrated = shlex.quote(str(out / "calibrated.safetensors"))
        commands.insert(
            1,
            ("Calibrate the probabilities", f"mobilevit calibrate {weights} --data {data} --out {calibrated}"),
        )
    if recipe.task == "distill":  # its data have no labels
        commands[0] = (
            "Fine-tune on labelled images",
            f"mobilevit train finetune --size {recipe.data.size_px} --data DATA --weights {weights}",
        )
    if recipe.task == "distill" or "transformers" in TASK_FORMATS[recipe.task]:
        commands.append(("Convert to the transformers format", f"mobilevit convert {weights} FOLDER --to transformers"))
    return commands
