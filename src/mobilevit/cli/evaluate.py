"""`mobilevit evaluate`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mobilevit.defaults import MAX_MEGAPIXELS

if TYPE_CHECKING:
    from mobilevit.weights import Weights
from mobilevit.cli.console import stdout, warn
from mobilevit.cli.options import (
    WEIGHTS,
    Device,
    Download,
    MaxMegapixels,
    NumThreads,
    choose_device,
    expand_data,
    limit_megapixels,
    use_threads,
    warn_of_assumptions,
    weights_of_run,
)


@dataclass(frozen=True)
class Evaluate:
    """Evaluate weights on labeled images, at one or several sizes.

    Metrics: top-1 and top-5 accuracy of classes, AP of boxes, mIoU of masks.
    """

    weights: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="WEIGHTS...", help=f"Weights: {WEIGHTS}; or the folder of a run, for all it has."),
    ]
    data: str
    """As for train."""
    split: Literal["train", "val", "test", "all"] | None = None
    """Split of the data to evaluate; unless given, val, or test where there is no val. Data without splits are divided
    as in training, if the weights were trained on them; of other data all images are evaluated."""
    size: Annotated[tuple[int, ...], tyro.conf.arg(metavar="PX...")] = ()
    """Sides of the images in pixels; unless given, what the weights were made for."""
    per_class: bool = False
    """The figures of every class as well."""
    json: bool = False
    """A JSON object a line instead of a table."""
    batch_size: int = 32
    """Images at a time."""
    num_workers: int = 2
    """Processes that read images; 0 reads them in the main process."""
    max_unreadable: int = 0
    """Images that may be unreadable and are left out; one more is an error."""
    max_megapixels: MaxMegapixels = MAX_MEGAPIXELS
    device: Device = "auto"
    num_threads: NumThreads = None
    download: Download = False

    def run(self) -> int:
        """Evaluate and print."""
        from rich.box import SIMPLE
        from rich.table import Column, Table

        from mobilevit.tasks import default_split, evaluate_weights
        from mobilevit.weights import read

        use_threads(self.num_threads)
        if not self.weights:
            raise ValueError("no weights are named; give files, hub ids or the folder of a run")
        if any(side < 32 for side in self.size):
            raise ValueError(f"size is {self.size}; sides are from 32 px up")
        if self.max_unreadable < 0:
            raise ValueError(f"max unreadable is {self.max_unreadable}; it must be 0 or more")
        limit_megapixels(self.max_megapixels)
        if self.num_workers < 0:
            raise ValueError(f"num workers is {self.num_workers}; it must be 0 or more")
        # All of them first: a name that is wrong is said before the first one has been evaluated.
        named = {name: read(name, download=self.download) for given in self.weights for name in weights_of_run(given)}
        data = expand_data(self.data)
        tasks = {weights.task for weights in named.values()}
        if len(tasks) > 1:
            raise ValueError(
                f"these weights are to {' and to '.join(sorted(tasks))}; evaluate those of one task at once"
            )
        table: Table | None = None
        classes: list[tuple[str, Table]] = []
        splits: list[str] = []
        notes: list[str] = []

        def say(note: str) -> None:
            if note not in notes:  # once, for all weights and sizes
                notes.append(note)
                warn(note)

        for name, weights in named.items():
            warn_of_assumptions(name, weights)
            split = self.split or default_split(weights, data)
            for size_px in self.size or (weights.preprocessing.crop_px,):
                results = evaluate_weights(
                    weights,
                    data,
                    split=split,
                    size_px=size_px,
                    batch_size=self.batch_size,
                    num_workers=self.num_workers,
                    device=choose_device(self.device),
                    max_unreadable=self.max_unreadable,
                    say=say,
                )
                metrics = results.metrics()
                per_class = results.per_class(weights.class_names)
                if self.json:
                    line: dict[str, Any] = {"weights": name, "size_px": size_px, "split": split, **metrics}
                    print(json.dumps(line | ({"classes": per_class} if self.per_class else {})), flush=True)
                    continue
                if table is None:
                    columns = (Column(_heading(metric), justify="right") for metric in ("px", *metrics))
                    table = Table("weights", "split", *columns, box=SIMPLE)
                table.add_row(name, split, str(size_px), *(_number(metric, value) for metric, value in metrics.items()))
                classes.append((f"{name} at {size_px} px", _class_table(per_class)))
                splits.append(_split_line(weights, split, self.split, metrics["num_images"], data))
        if table:
            console = stdout()
            console.print(table)
            for title, one in classes if self.per_class else ():
                console.print(title)
                console.print(one)
            for which in dict.fromkeys(splits):
                console.print(which)
        return 0


def _split_line(weights: Weights, split: str, asked: str | None, num_images: float, data: str) -> str:
    """What was evaluated."""
    line = f"evaluated: {'all' if split == 'all' else f'the {split} split'} of {data}, {num_images:,} images"
    if split == "all" and asked is None:  # the validation split was not recognized
        line += "; if the weights were trained on some of them, "
        line += "they count as well" if weights.val_fraction is None else "give --split val"
    return line


# The figures of evaluations: what they are called, and with how many decimals they are given. Others are counts.
FIGURES = {
    "loss": ("loss", 4),
    **{
        name: (f"{said} %", 2)
        for name, said in {"top1": "top-1", "top5": "top-5", "miou": "mIoU", "iou": "IoU"}.items()
    },
    **{name: (f"{name} %", 2) for name in ("recall", "precision", "pixel_accuracy")},
    **{
        name: (f"{name.replace('ap', 'AP')} %", 2)
        for name in ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    },
}


def _heading(name: str) -> str:
    return FIGURES[name][0].replace("_", " ") if name in FIGURES else name.removeprefix("num_")


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.{FIGURES[name][1]}f}" if name in FIGURES else f"{value:,}"


def _metric(name: str, value: float) -> str:
    heading, is_share, _ = _heading(name).partition(" %")
    return f"{heading} {_number(name, value)}{is_share}"


def _class_table(rows: list[dict[str, Any]]) -> Any:
    from rich.box import SIMPLE
    from rich.table import Column, Table

    figures = [name for name in rows[0] if name != "class"]
    table = Table("class", *(Column(_heading(name), justify="right") for name in figures), box=SIMPLE)
    for row in rows:
        table.add_row(row["class"], *(_number(name, row[name]) for name in figures))
    return table
