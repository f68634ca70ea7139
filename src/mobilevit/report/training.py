"""The report of a training run: one self-contained HTML file without scripts."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from mobilevit.files import write_atomic
from mobilevit.recipes import RECIPES, Recipe
from mobilevit.report import render
from mobilevit.report.charts import Band, Chart, Line, line_chart
from mobilevit.report.results import DASH, Bar, Section, table

MAX_POINTS = 240  # of a line in a chart
MAX_EPOCH_ROWS = 200
STEP_FIELDS = ("step", "size_px", "images", "loss", "lr", "images_per_second")
# Units by the name of a field or by its last word.
UNITS = {
    "batch_size": "images",
    "max_unreadable": "images",
    "micro_batch_size": "images",
    "epochs": "epochs",
    "patience": "epochs",
    "px": "px",
    "steps": "steps",
    "workers": "processes",
    **dict.fromkeys(("top1", "top5", "ap", "ap50", "ap75", "small", "medium", "large", "miou", "accuracy"), "%"),
    **dict.fromkeys(("agreement", "agreement5", "ece", "map", "f1"), "%"),
}
NAMES = {
    "top1": "top-1",
    "top5": "top-5",
    "miou": "mIoU",
    "map": "mAP",
    "micro_f1": "micro F1",
    "macro_f1": "macro F1",
    "agreement5": "top-5 agreement",
    "ece": "calibration error (ECE)",
    "kl": "KL",
    "unreadable": "unreadable images",
}

Epochs = Sequence[Mapping[str, float]]
"""Records of metrics.jsonl."""


@dataclass(frozen=True)
class Origin:
    """How a run was started: the name of its recipe and the command; "" if unknown."""

    recipe_name: str = ""
    command: str = ""


class Setting(NamedTuple):
    """A field of the recipe, its value, and the value in the original recipe; "" if it is the same."""

    name: str
    value: str
    original: str


@dataclass(frozen=True)
class Report:
    """The contents of a training report.

    Args:
        title: the heading of the page.
        recipe: the recipe of the run.
        origin: see `Origin`.
        epochs: the metrics of every epoch.
        steps: the file with a JSON object per step; it may be missing.
        sections: the task's results; see `mobilevit.report.results.sections`.
        facts: hardware, software and settings by name.
        commands: (purpose, command) to run next.
    """

    title: str
    recipe: Recipe
    origin: Origin
    epochs: Epochs
    steps: Path
    sections: Sequence[Section]
    facts: Mapping[str, str]
    commands: Sequence[tuple[str, str]]


def write_report(path: Path, report: Report) -> None:
    """Write the report of a run to the HTML file `path`, atomically."""
    epochs, facts = report.epochs, report.facts
    records = _read_steps(report.steps)
    settings, original = _settings(report.recipe, report.origin.recipe_name)
    page = render(
        "training.html",
        title=report.title,
        summary=_summary(epochs, records, report.recipe.metric),
        epoch_charts=_epoch_charts(epochs),
        epoch_interval=math.ceil(len(epochs) / MAX_POINTS),
        epoch_table=_epoch_table(epochs),
        table_interval=math.ceil(len(epochs) / MAX_EPOCH_ROWS),
        step_charts=_step_charts(records),
        size_table=_size_table(records),
        num_unreadable=records.num_unreadable,
        sections=report.sections,
        commands=report.commands,
        settings=settings,
        original=original,
        origin=report.origin,
        facts=table(("", ""), list(facts.items()), is_text=True) if facts else "",
    )
    # File names that are not valid UTF-8 contain lone surrogates, which UTF-8 cannot encode.
    write_atomic(path, page.encode("utf-8", "backslashreplace"))


# ---------------------------------------------------------------------------------------------------------------------
# Steps


@dataclass(frozen=True)
class Steps:
    """Columns of steps.jsonl by ascending step; NaN for missing values. `num_unreadable` lines are not JSON."""

    step: np.ndarray
    size_px: np.ndarray
    images: np.ndarray
    loss: np.ndarray
    lr: np.ndarray
    images_per_second: np.ndarray
    num_unreadable: int = 0


def _read_steps(path: Path) -> Steps:
    columns = {name: array("d") for name in STEP_FIELDS}  # 8 bytes per number: a long run has millions of steps
    num_unreadable = 0
    if path.exists():
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    record = json.loads(line)
                    # Records of earlier versions have "pictures" in the names.
                    values = [
                        _number(record.get(name, record.get(name.replace("images", "pictures"))))
                        for name in STEP_FIELDS
                    ]
                except (json.JSONDecodeError, AttributeError):  # truncated when the run was interrupted
                    num_unreadable += bool(line.strip())
                    continue
                if math.isfinite(values[0]):
                    for column, value in zip(columns.values(), values, strict=True):
                        column.append(value)
    arrays = {name: np.array(column, dtype=np.float64) for name, column in columns.items()}
    # A resumed run repeats the steps after its checkpoint: the last record of a step is valid.
    _, last = np.unique(arrays["step"][::-1], return_index=True)
    order = len(arrays["step"]) - 1 - last
    return Steps(**{name: column[order] for name, column in arrays.items()}, num_unreadable=num_unreadable)


def _number(value: object) -> float:
    return float(value) if isinstance(value, Real) else math.nan


def _over_finite(function: Callable[[np.ndarray], Any], values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(function(finite)) if len(finite) else math.nan


def _step_charts(steps: Steps) -> list[Chart]:
    n = len(steps.step)
    if not n:
        return []
    # Up to 60 steps: a point per step. More: a point is the mean of at least four steps.
    groups = np.array_split(np.arange(n), n if n <= 60 else min(max(60, n // 4), MAX_POINTS))
    x = [float(steps.step[group].mean()) for group in groups]
    low, mean, high = (
        [_over_finite(function, steps.loss[group]) for group in groups] for function in (np.min, np.mean, np.max)
    )
    size = len(groups[0])
    name = f"mean of {size:,} steps" if size > 1 else "every step"
    band = Band("minimum to maximum", x, low, high) if size > 1 else None
    labels = [f"steps {steps.step[g[0]]:,.0f} to {steps.step[g[-1]]:,.0f}" for g in groups]
    # Points, not means: the first learning rate, the highest and the last must be readable.
    chosen = np.unique(np.linspace(0, n - 1, min(n, MAX_POINTS)).round().astype(int))
    chosen = np.union1d(chosen, [np.nan_to_num(steps.lr, nan=-1.0).argmax()])
    rate = Line("learning rate", steps.step[chosen].tolist(), steps.lr[chosen].tolist())
    charts = [
        line_chart("Training loss", [Line(name, x, mean)], band, x_name="step", x_labels=labels),
        line_chart("Learning rate", [rate], x_name="step", from_zero=True),
    ]
    return [chart for chart in charts if chart]


def _size_table(steps: Steps) -> Markup | str:
    """Numbers by image size."""
    rows = []
    for size in np.unique(steps.size_px[np.isfinite(steps.size_px)]):
        tail = steps.step > steps.step[-1] - 0.1 * (steps.step[-1] - steps.step[0] + 1)
        is_size = steps.size_px == size
        loss = _over_finite(np.mean, steps.loss[is_size & tail])
        rows.append(
            (
                f"{size:g}\N{NO-BREAK SPACE}px",
                Bar(float(is_size.mean()), f"{is_size.sum():,}", len(f"{len(steps.step):,}")),
                _amount(_over_finite(np.sum, steps.images[is_size])),
                f"{loss:.3f}" if math.isfinite(loss) else DASH,
                _amount(_over_finite(np.median, steps.images_per_second[is_size])),
            )
        )
    columns = ("Image size", "steps", "images", "mean loss of the last 10 % of the run", "images/s, median")
    return table(columns, rows) if rows else ""


# ---------------------------------------------------------------------------------------------------------------------
# Epochs


def _summary(epochs: Epochs, steps: Steps, metric: str) -> list[tuple[str, str, str]]:
    """(label, value, note) of the most important numbers; `metric` as in `Recipe`."""
    cards: list[tuple[str, str, str]] = []
    # A task's main metric comes first.
    metric = (_metrics(epochs) or ["val_loss"])[0] if metric == "auto" else f"val_{metric}"
    values = _values(epochs, metric)
    if values:
        best_epoch, best = _best(metric, values)
        num_images = _number(epochs[-1].get("val_num_images"))
        on = f", on {num_images:,.0f} images" if math.isfinite(num_images) else ""
        label = f"Validation {_metric_name(metric)}"
        cards.append((f"{label}, best", _value(metric, best), f"epoch {best_epoch:g} of {len(epochs):,}"))
        cards.append((f"{label}, last", _value(metric, values[-1][1]), f"epoch {values[-1][0]:g}{on}"))
    seconds = [s for _, s in _values(epochs, "seconds")]
    if seconds:
        cards.append(("Time", duration(sum(seconds)), f"{duration(sum(seconds) / len(seconds))} per epoch"))
    if len(steps.step):
        num_images = _over_finite(np.sum, steps.images)
        speed = _over_finite(np.median, steps.images_per_second)
        note = f"{_amount(speed)} per second, median" if math.isfinite(speed) else ""
        if math.isfinite(num_images):
            cards.append(("Training images", _amount(num_images), note))
            note = f"{_amount(num_images / len(steps.step))} images per step, on average"
        cards.append(("Steps", _amount(len(steps.step)), note))
    for title, field in (("Waiting for data", "data_wait_fraction"), ("In the teacher", "teacher_fraction")):
        fractions = [(_number(record.get(field)), _number(record.get("seconds"))) for record in epochs]
        fractions = [(ratio, s if math.isfinite(s) else 1.0) for ratio, s in fractions if math.isfinite(ratio)]
        if total := sum(s for _, s in fractions):
            ratio = sum(ratio * s for ratio, s in fractions) / total
            cards.append((title, f"{100 * ratio:.1f} %", "of the training time"))
    return cards


def _epoch_charts(epochs: Epochs) -> list[Chart]:
    shown = _every(epochs, MAX_POINTS)
    x = [epoch for epoch, _ in shown]

    def line(name: str, field: str, style: str = "main") -> Line:
        return Line(name, x, [_number(record.get(field)) for _, record in shown], style)

    losses = [
        line("training", "train_loss", "second"),
        line("validation (EMA)", "val_loss"),
        line("validation (raw)", "raw_loss", "third"),
    ]
    charts = [line_chart("Loss", losses, x_name="epoch", note=_best_note(epochs, "val_loss"))]
    for field in _metrics(epochs):
        unit = _unit(field)
        lines = [
            line("EMA weights", field),
            line("raw weights", field.replace("val_", "raw_", 1), "second"),
            line("EMA weights in int8, simulated", field.replace("val_", "int8_", 1), "third"),  # if there are any
        ]
        title = f"Validation {_metric_name(field)}" + (f", {unit}" if unit else "")
        charts.append(line_chart(title, lines, x_name="epoch", unit=unit, note=_best_note(epochs, field)))
    speed = line("speed", "images_per_second")
    charts.append(line_chart("Training speed, images/s", [speed], x_name="epoch", from_zero=True))
    return [chart for chart in charts if chart]


def _epoch_table(epochs: Epochs) -> Markup | str:
    validation = ["val_loss", *_metrics(epochs)]
    raw = [name.replace("val_", "raw_", 1) for name in validation]
    fields = ["train_loss", *validation, *raw, "images_per_second", "data_wait_fraction", "seconds"]
    fields = [field for field in fields if _values(epochs, field)]
    headings = {
        "train_loss": "training loss",
        "images_per_second": "images/s",
        "data_wait_fraction": "waiting for data, %",
        "seconds": "time, s",
    }

    def heading(field: str) -> str:
        unit = f", {_unit(field)}" if _unit(field) else ""
        weights = "validation" if field.startswith("val_") else "raw weights"
        return headings.get(field) or f"{weights} {_metric_name(field)}{unit}"

    def cell(field: str, value: float) -> str:
        if not math.isfinite(value):
            return DASH
        if field == "data_wait_fraction":
            return f"{100 * value:.1f}"
        return _amount(value) if field in ("images_per_second", "seconds") else _plain(field, value)

    rows = [
        (f"{epoch:g}", *(cell(field, _number(record.get(field))) for field in fields))
        for epoch, record in _every(epochs, MAX_EPOCH_ROWS)
    ]
    return table(("Epoch", *map(heading, fields)), rows) if rows else ""


def _every(epochs: Epochs, max_num: int) -> list[tuple[float, Mapping[str, float]]]:
    """At most `max_num` evenly spaced (epoch, record), always with the last."""
    interval = max(1, math.ceil(len(epochs) / max_num))
    numbered = [(_epoch(record, i), record) for i, record in enumerate(epochs)]
    return numbered[(len(epochs) - 1) % interval :: interval]


def _epoch(record: Mapping[str, float], index: int) -> float:
    epoch = _number(record.get("epoch"))
    return epoch if math.isfinite(epoch) else index + 1.0


def _values(epochs: Epochs, field: str) -> list[tuple[float, float]]:
    """(epoch, value) where the value is finite."""
    values = [(_epoch(record, i), _number(record.get(field))) for i, record in enumerate(epochs)]
    return [(epoch, value) for epoch, value in values if math.isfinite(value)]


def _metrics(epochs: Epochs) -> list[str]:
    """Fields of validation metrics without the loss and counts. Unreadable images only if there were any."""
    fields = dict.fromkeys(field for record in epochs for field in record if field.startswith("val_"))
    if not any(record.get("val_unreadable") for record in epochs):
        fields.pop("val_unreadable", None)
    return [field for field in fields if field != "val_loss" and not field.startswith("val_num_")]


def _best(field: str, values: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The first best (epoch, value); a loss or an error is best where it is lowest."""
    sign = -1 if field.endswith(("loss", "error", "kl", "ece")) else 1
    return max(values, key=lambda pair: (sign * pair[1], -pair[0]))


def _best_note(epochs: Epochs, field: str) -> str:
    values = _values(epochs, field)
    if not values:
        return ""
    epoch, value = _best(field, values)
    start = "Validation, best" if field == "val_loss" else "Best"
    return f"{start} {_value(field, value)} in epoch {epoch:g}; last {_value(field, values[-1][1])}"


# ---------------------------------------------------------------------------------------------------------------------
# Recipe


def _settings(recipe: Recipe, name: str) -> tuple[list[Setting], str]:
    """All fields of the recipe, and a description of the original recipe that they are compared with."""
    name = name or ("" if recipe.task == "classify" else recipe.task)
    base, description = (RECIPES[name], f"the recipe {name}") if name else (Recipe(), "the defaults")
    original = dict(_fields(asdict(base)))
    settings = [
        Setting(name, _setting(name, value), "" if value == original[name] else _setting(name, original[name]))
        for name, value in _fields(asdict(recipe))
    ]
    return settings, description


def _fields(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _setting(name: str, value: Any) -> str:
    unit = _unit(name)
    if isinstance(value, tuple | list):
        text = ", ".join(map(str, value))
    elif value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    else:
        text = f"{value:,}" if isinstance(value, int) else str(value)
    if value == 1 and unit:
        unit = {"processes": "process", "px": "px"}.get(unit, unit.removesuffix("s"))
    return f"{text} {unit}".rstrip() or "none"


# ---------------------------------------------------------------------------------------------------------------------
# Text


def duration(seconds: float) -> str:
    """A duration in its two largest units, such as "2 h 1 min"."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours < 1:
        return f"{minutes} min {s} s"
    days, h = divmod(hours, 24)
    return f"{days} d {h} h" if days else f"{hours} h {minutes} min"


def _amount(value: float) -> str:
    if not math.isfinite(value):
        return DASH
    if abs(value) >= 1e6:
        return f"{value / 1e6:,.2f} million"
    return f"{value:,.0f}" if abs(value) >= 100 or value == round(value) else f"{value:.1f}"


def _unit(name: str) -> str:
    name = name.rpartition(".")[2]
    return UNITS.get(name) or UNITS.get(name.rpartition("_")[2], "")


def _metric_name(field: str) -> str:
    name = field.partition("_")[2]
    if name in NAMES:
        return NAMES[name]
    return name.replace("ap", "AP", 1).replace("_", " ") if name.startswith("ap") else name.replace("_", " ")


def _plain(field: str, value: float) -> str:
    if _unit(field) == "%":
        return f"{value:.2f}"
    return f"{value:.3f}" if 0.01 <= abs(value) < 1000 else f"{value:.3g}"


def _value(field: str, value: float) -> str:
    return f"{_plain(field, value)} {_unit(field)}".rstrip()
