"""A report as a table in the terminal, and as Markdown, CSV, JSON and figures in a folder."""

from __future__ import annotations

import csv
import io
import json
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.box import SIMPLE
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

from mobilevit.benchmark.cost import MIB, Cost, format_gmacs
from mobilevit.benchmark.timing import Spread
from mobilevit.compare import figures
from mobilevit.compare.reports import (
    METRIC_TITLES,
    RUNTIME_TITLES,
    DenseRow,
    PublishedReport,
    Report,
    Row,
    TrainedReport,
    TrainedRow,
)
from mobilevit.files import write_atomic

Columns = list[tuple[str, list[str]]]  # headings and cells
T = TypeVar("T")
TIMING_NOTE = (
    "Times: median (10th - 90th percentile). Ratio: the time divided by that of the named MobileViT, same round."
)
PUBLISHED_NOTES = (
    "Top-1 and published parameters: from the figure, table or text of the MobileViT paper named as the source.",
    "Best weights: the highest top-1 of the libraries' weights for the same model; table.md names them.",
    "GMACs: with / without the attention products. Activations: peak of inference, for one image in float32.",
    TIMING_NOTE,
)
TRAINED_NOTES = (
    "Accuracy: {metric} of the EMA weights after the last epoch (no epoch is selected).",
    "+-: standard deviation over the seeds.",
    "Difference: in points of {metric}, with the 95 % confidence interval of Welch's t-test; p is Holm-corrected.",
    "Seeds change initial weights, order and augmentation. They do not cover other images or other recipes.",
    "Epoch: median time, without evaluation. GMACs: with / without the attention products.",
)


def header(report: Report) -> str:
    """Data, date, processor and settings, in one line."""
    setting = report.setting
    machine, num_threads = setting.machine, setting.num_timing_threads
    timed = f"{num_threads} thread{'s' if num_threads > 1 else ''}, {setting.num_rounds} rounds"
    if not isinstance(report, TrainedReport):
        text = f"{machine.date}, {machine.processor}" + (f", {setting.device}" if setting.device != "cpu" else "")
        return text + (f", {timed}, load average {machine.load_average}" if setting.num_rounds else "")
    data = report.recipe["data"]
    split = f"its {report.val_split}/" if report.val_split else "a validation split of its images"
    text = (
        f"{report.data}: trained on {report.num_train:,} images of {report.num_classes} classes at {data['size_px']} "
        f"px, evaluated on {report.num_val:,} images of {split}; {report.recipe['epochs']} epochs, {data['policy']} "
        f"augmentation, seeds {', '.join(map(str, report.seeds))}; {machine.date}, {setting.where}"
    )
    return text + (f"; times per image with {timed}" if setting.num_rounds else "")


def notes(report: Report) -> list[str]:
    """Explanations of the columns."""
    if isinstance(report, TrainedReport):
        texts = [text.format(metric=report.metric_title) for text in TRAINED_NOTES]
        return [*texts, *([TIMING_NOTE] if report.timed else [])]
    return [*PUBLISHED_NOTES]


def findings(report: Report) -> list[str]:
    """Claims, comparisons, failures and other notes, one line each."""
    if isinstance(report, PublishedReport):
        return [*(claim.describe() for claim in report.claims), *_speed_lines(report), *report.notes]
    assert isinstance(report, TrainedReport)
    rows = report.rows
    return [
        *(comparison.describe() for comparison in report.comparisons),
        *(f"{row.name}, {when}: {reason}" for row in rows for when, reason in row.failures.items()),
        *(f"{row.name}: not compared, because some of its seeds failed" for row in rows if row.runs and row.failures),
        *(
            f"{row.name}: not better than equal predictions for all images ({report.metric_title} "
            f"{report.constant_score:.2f} %); train longer, with more --epochs"
            for row in rows
            if row.runs and min(run.score for run in row.runs) <= report.constant_score
        ),
        *report.notes,
    ]


def write(report: Report, folder: Path) -> list[Path]:
    """Write table.md, table.csv, table.json and the figures to `folder`; returns their paths."""
    drawn = figures.draw(report)
    for name, figure in drawn.items():
        write_atomic(folder / name, lambda path, figure=figure: figure.savefig(path, format="png"))
    lines = [_csv_line(row, report) for row in report.rows]
    grid = io.StringIO(newline="")
    writer = csv.DictWriter(grid, fieldnames=list(lines[0]))
    writer.writeheader()
    writer.writerows(lines)
    values = json.dumps(report.to_dict(), ensure_ascii=False) + "\n"
    contents = {"table.md": markdown(report, list(drawn)), "table.csv": grid.getvalue(), "table.json": values}
    for name, content in contents.items():
        write_atomic(folder / name, content)
    return [folder / name for name in (*contents, *drawn)]


# ---------------------------------------------------------------------------------------------------------------------
# Terminal


@dataclass(frozen=True)
class TerminalTable:
    """A report for rich: as many tables as the width of the terminal requires, each with the first column."""

    report: Report

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        yield Text(header(self.report))
        first, *others = columns(self.report)
        shown: Columns = []
        for column in others:
            wider = _rich_table([first, *shown, column])
            if shown and console.measure(wider, options=options.update(max_width=100_000)).maximum > options.max_width:
                yield _rich_table([first, *shown])
                shown = []
            shown.append(column)
        yield _rich_table([first, *shown])
        yield from map(Text, notes(self.report))


def _rich_table(cells: Columns) -> Table:
    result = Table(box=SIMPLE)
    for i, (heading, column) in enumerate(cells):
        width = max(map(len, (*column, *heading.split())))
        result.add_column(textwrap.fill(heading, width), justify="right" if i else "left", no_wrap=True)
    for row in zip(*(column for _, column in cells), strict=True):
        result.add_row(*row)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Columns


def columns(report: Report) -> Columns:
    """Headings and cells of the table."""
    rows = report.rows
    specific = _trained_columns(report) if isinstance(report, TrainedReport) else _published_columns(report)
    digits = 4 if isinstance(report, TrainedReport) else 3
    return [
        ("model", [row.name for row in rows]),
        ("px", [str(row.size_px) for row in rows]),
        ("M parameters", [_or_dash(row.cost, lambda cost: f"{cost.num_parameters / 1e6:.2f}") for row in rows]),
        ("GMACs", [_or_dash(row.cost, lambda cost: format_gmacs(cost, digits)) for row in rows]),
        ("activations MiB", [_or_dash(row.cost, lambda cost: f"{cost.inference_bytes / MIB:.2f}") for row in rows]),
        *specific,
        *_timing_columns(report),
    ]


def _published_columns(report: Report) -> Columns:
    assert isinstance(report, PublishedReport)
    rows = report.rows
    return [
        ("M parameters, published", [f"{row.published_parameters / 1e6:.1f}" for row in rows]),
        ("top-1", [f"{row.published_top1:.1f}" for row in rows]),
        ("augmentation", [row.augmentation or "-" for row in rows]),
        ("source", [row.source for row in rows]),
        ("best weights", [_or_dash(row.best_weights, lambda weights: f"{weights.top1:.2f}") for row in rows]),
    ]


def _trained_columns(report: TrainedReport) -> Columns:
    rows = report.rows
    comparisons = {comparison.name: comparison for comparison in report.comparisons}

    def score(row: TrainedRow) -> str:
        if row.score is None:
            return "-"
        return f"{row.score:.2f}" + ("" if row.score_std is None else f" +- {row.score_std:.2f}")

    def difference(row: TrainedRow) -> str:
        c = comparisons.get(row.name)
        if c is None:
            return "-"
        interval = "" if c.low is None else f" ({c.low:+.2f} to {c.high:+.2f})"
        return f"{c.difference:+.2f}{interval} {_short(c.baseline)}"

    p_values = [comparisons[row.name].p_holm if row.name in comparisons else None for row in rows]
    title = report.metric_title
    others = [(name, [row.mean_of(name) for row in rows]) for name in report.metrics[1:]]
    return [
        (title, [score(row) for row in rows]),
        (f"{title} by seed", [", ".join(f"{run.score:.2f}" for run in row.runs) or "failed" for row in rows]),
        ("difference", [difference(row) for row in rows]),
        ("p", [_or_dash(p, lambda p: f"{p:.2g}") for p in p_values]),
        *(
            (METRIC_TITLES[name], [_or_dash(value, lambda value: f"{value:.2f}") for value in of])
            for name, of in others
        ),
        ("training: s per epoch", [_or_dash(row.seconds_per_epoch, lambda s: f"{s:.1f}") for row in rows]),
        ("training: images/s", [_or_dash(row.images_per_second, lambda speed: f"{speed:.0f}") for row in rows]),
    ]


def _timing_columns(report: Report) -> Columns:
    result: Columns = []
    for runtime, batch_size in report.timed:
        timings = [row.timing(runtime, batch_size) for row in report.rows]
        heading = f"{RUNTIME_TITLES[runtime]}, batch {batch_size}"
        ratios = [f"{_spread(t.ratio)} {_short(t.baseline)}" if t and t.ratio and t.baseline else "-" for t in timings]
        result += [
            (f"{heading}: ms", [_or_dash(t, lambda t: _spread(t.latency_ms)) for t in timings]),
            (f"{heading}: images/s", [_or_dash(t, lambda t: f"{t.images_per_second:.1f}") for t in timings]),
            (f"{heading}: ratio", ratios),
        ]
    return result


def _or_dash(value: T | None, text: Callable[[T], str]) -> str:
    return "-" if value is None else text(value)


def _short(name: str) -> str:
    return name.removeprefix("mobilevit-").upper()


def _spread(values: Spread) -> str:
    return f"{values.median:.2f} ({values.p10:.2f} - {values.p90:.2f})"


# ---------------------------------------------------------------------------------------------------------------------
# Files


def markdown(report: Report, figure_names: Sequence[str]) -> str:
    """The report as a Markdown page, with links to the figures beside it."""
    title = "# MobileViT and the models it was compared with"
    if isinstance(report, TrainedReport):
        title = "# MobileViT and other models, trained with the same recipe"
    text = [title, header(report), _grid(columns(report)), *notes(report)]
    if isinstance(report, PublishedReport):
        text += _published_sections(report)
    elif isinstance(report, TrainedReport):
        text += [_list(findings(report))]
        text += ["## Recipe", f"```json\n{json.dumps(report.recipe, indent=2)}\n```"]
    text += [f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in figure_names]
    versions = ", ".join(f"{library} {version}" for library, version in report.setting.machine.versions.items())
    return "\n\n".join([*text, f"Versions: {versions}."]) + "\n"


def _published_sections(report: PublishedReport) -> list[str]:
    text = []
    if report.claims:
        text += ["## Claims of the paper", _list([claim.describe() for claim in report.claims])]
    if report.speeds:
        text += ["## Speed compared with the paper", _list(_speed_lines(report))]
    for task, title, metric in (
        ("detection", "Detection: COCO, SSDLite at 320 px (VGG: SSD300)", "mAP"),
        ("segmentation", "Segmentation: PASCAL VOC, DeepLabv3", "mIoU"),
    ):
        text += [f"## {title}", _grid(_dense_columns(report.dense[task], metric))]
    weights = [(row.name, weights) for row in report.rows for weights in row.library_weights]
    if weights:
        cells = [
            ("model", [name for name, _ in weights]),
            ("weights", [one.id for _, one in weights]),
            ("top-1 measured by the library", [f"{one.top1:.2f}" for _, one in weights]),
        ]
        text += ["## Trained weights in the libraries", _grid(cells)]
    if report.notes:
        text += ["## Notes", _list(report.notes)]
    return text


def _dense_columns(rows: Sequence[DenseRow], metric: str) -> Columns:
    return [
        ("backbone", [row.backbone for row in rows]),
        ("M parameters, published", [f"{row.published_parameters / 1e6:.1f}" for row in rows]),
        ("counted", [_or_dash(row.num_parameters, lambda number: f"{number / 1e6:.2f}") for row in rows]),
        (f"{metric}, published", [f"{row.published:.1f}" for row in rows]),
    ]


def _speed_lines(report: PublishedReport) -> list[str]:
    processor = report.setting.machine.processor
    return [
        f"{one.other} takes {one.published_ratio:.2f} times as long as {one.ours} on the CPU of an iPhone 12 "
        f"(published), {one.ratio:.2f} times here ({processor}, {one.runtime}, batch {one.batch_size})"
        for one in report.speeds
    ]


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _grid(cells: Columns) -> str:
    lines = [[heading for heading, _ in cells], ["---"] + ["---:"] * (len(cells) - 1)]
    lines += [list(row) for row in zip(*(column for _, column in cells), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _csv_line(row: Row, report: Report) -> dict[str, Any]:
    """A row as a flat record; timings, seeds and the comparison have separate columns."""
    values = asdict(row)
    nested = {name: values.pop(name, None) for name in ("cost", "timings", "library_weights", "runs", "failures")}
    values |= nested["cost"] or dict.fromkeys(Cost.__dataclass_fields__)
    if isinstance(report, TrainedReport):
        assert isinstance(row, TrainedRow)
        score = {run.seed: run.score for run in row.runs}
        values |= {f"score_seed_{seed}": score.get(seed) for seed in report.seeds}
        values |= {name: row.mean_of(name) for name in report.metrics[1:]}
        comparison = next((asdict(one) for one in report.comparisons if one.name == row.name), {})
        keys = ("baseline", "difference", "low", "high", "p", "p_holm")
        values |= {key: comparison.get(key) for key in keys}
        values["failures"] = "; ".join(f"{when}: {reason}" for when, reason in nested["failures"].items())
    else:
        best = max(nested["library_weights"], key=lambda weights: weights["top1"], default={})
        values |= {"best_weights": best.get("id"), "best_weights_top1": best.get("top1")}
    for runtime, batch_size in report.timed:
        timing = row.timing(runtime, batch_size)
        prefix = f"{runtime}_b{batch_size}"
        for key in ("latency_ms", "ratio"):
            spread: Spread | None = timing and getattr(timing, key)
            for quantile in ("median", "p10", "p90"):
                values[f"{prefix}_{key}_{quantile}"] = spread and getattr(spread, quantile)
        values[f"{prefix}_images_per_second"] = timing and timing.images_per_second
        values[f"{prefix}_baseline"] = timing and timing.baseline
    return values
