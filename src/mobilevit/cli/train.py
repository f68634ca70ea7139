"""`mobilevit train`."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from mobilevit.cli import parser
from mobilevit.cli.console import warn
from mobilevit.cli.evaluate import format_metric
from mobilevit.cli.options import (
    FLAT,
    SELF_CHECK,
    WEIGHTS,
    DeviceOptions,
    Flag,
    WeightsOptions,
    choices,
    expand,
    expand_data,
    require,
)
from mobilevit.defaults import TrackerName
from mobilevit.recipes import RECIPES, Recipe, describe


@dataclass(frozen=True)
class Train:
    """Train a network on your images, or resume an interrupted run.

    Usage: mobilevit train [RECIPE] --data DATA [OPTIONS]. The same command resumes the run.
    """

    recipe_name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")] = "plain"
    """Recipe: the defaults of the options."""
    data: Annotated[str, tyro.conf.arg(metavar="DATA")] = field(kw_only=True)
    """Dataset. Classification: a folder per class, optionally below train/ and val/; a label file (.csv, .tsv, .jsonl,
    .parquet); idx files, tar shards, parquet or arrow files; or hf:OWNER/NAME on the hub. Recipe multilabel: a label
    file, or tar shards with .json files. Detection: COCO or VOC layout. Segmentation: VOC layout, or images/ and
    masks/. Recipe distill: a folder of any images."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Run folder: checkpoints, weights, metrics and report. Default: runs/ and the name of the data."""
    weights: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="WEIGHTS",
            aliases=["--backbone"],
            help=f"Pretrained weights: {WEIGHTS}. From weights of another task, only the backbone is used.",
        ),
    ] = None
    teacher: Annotated[str | None, tyro.conf.arg(metavar="TEACHER")] = None
    """Teacher for knowledge distillation: weights as for --weights, a run folder, an ONNX file, timm:NAME or
    torchvision:NAME; NAME@FILE for weights of that model in a local file."""
    weights_options: Annotated[WeightsOptions, FLAT] = WeightsOptions()
    device_options: Annotated[DeviceOptions, FLAT] = DeviceOptions()
    self_check: Annotated[Flag, SELF_CHECK] = True
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints. Every epoch also ends with a checkpoint."""
    track: Annotated[tuple[TrackerName, ...], tyro.conf.arg(metavar=f"{choices(TrackerName)}...")] = ()
    """Send the logs to these experiment trackers as well, after each checkpoint (docs/training.md)."""
    tensorboard: Flag = False
    """The same as --track tensorboard."""
    recipe: Annotated[Recipe, FLAT] = Recipe()
    command: tyro.conf.Suppress[str] = ""

    def run(self) -> int:
        """Train, then print the results and a next command."""
        from mobilevit.data.tables import is_label_file
        from mobilevit.report.training import Origin
        from mobilevit.training.loop import train
        from mobilevit.training.run import FinishedError

        self.device_options.set_threads()
        require(self.checkpoint_minutes > 0, "--checkpoint-minutes", self.checkpoint_minutes, "above 0")
        data = expand_data(self.data)
        path = Path(data).resolve()
        out = expand(self.out or Path("runs") / (path.stem if is_label_file(path) else path.name))
        pretrained = self.weights_options.read(self.weights) if self.weights else None
        teacher = self.weights_options.read_teacher(self.teacher) if self.teacher else None
        architecture = self.recipe.architecture
        # The weights override the default of the recipe, but not an option of the command.
        is_given = any(arg.partition("=")[0] == "--architecture" for arg in shlex.split(self.command))
        if pretrained and is_given and architecture != pretrained.architecture.name:
            raise ValueError(
                f"--architecture is {architecture}, but {self.weights} is {pretrained.name}; leave out --architecture, "
                f"or use weights of MobileViT-{architecture.upper()}"
            )
        trackers = self.track
        if self.tensorboard and "tensorboard" not in trackers:
            trackers = (*trackers, "tensorboard")
        try:
            run = train(
                self.recipe,
                data,
                out,
                pretrained=pretrained,
                teacher=teacher,
                device=self.device_options.device,
                checkpoint_minutes=self.checkpoint_minutes,
                trackers=trackers,
                extend=True,
                self_check=self.self_check,
                origin=Origin(self.recipe_name, self.command),
            )
        except FinishedError as finished:  # success, for scripts that repeat the command until it succeeds
            warn(str(finished))
            return 0
        if os.environ.get("RANK", "0") == "0":
            value = run.epochs[-1][f"val_{run.main_metric}"]
            print(
                f"{run.weights}: weights of the last epoch, validation {format_metric(run.main_metric, value)}\n"
                f"{out / 'report.html'}: curves, metrics by class, images\n"
                f"try next: mobilevit predict {run.weights} IMAGE..."
            )
        return 0


def recipe_list() -> str:
    """The recipes with the first line of their descriptions. Recipes that differ in size only share a line."""
    purposes: dict[str, list[str]] = {}
    for name in RECIPES:
        purposes.setdefault(describe(name).partition("\n")[0], []).append(name)
    lines = ["  Recipes (mobilevit train RECIPE --help shows the defaults of one):"]
    for purpose, names in purposes.items():
        family = names[0].rpartition("-")[0]
        title = names[0] if len(names) == 1 else f"{family}-{{{','.join(n.removeprefix(f'{family}-') for n in names)}}}"
        lines.append(f"  {title:22}{parser.wrapped(purpose, 24).strip()}")
    return "\n".join(lines)
