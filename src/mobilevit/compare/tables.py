"""What to look at of a comparison: a table in the terminal; Markdown, CSV, JSON and figures in a folder."""

from __future__ import annotations

import csv
import io
import json
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobilevit.benchmark.cost import MIB
from mobilevit.compare import statistics
from mobilevit.compare.claims import sentence
from mobilevit.files import write_whole

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.table import Table

Report = Mapping[str, Any]
Columns = list[tuple[str, list[str]]]  # headings and cells
TITLES = {"torch": "torch", "onnx": "ONNX Runtime"}
TIMES = "Times: median (10th - 90th percentile). Ratio: the time divided by the named MobileViT's in the same round."
NOTES = (
    "Top-1 and published parameters: the MobileViT paper's where its figure, table or text is named as the source.",
    "Best weights: the highest top-1 of the libraries' weights of the same network that table.md names.",
    "GMACs: with / without the products of attention. Activations: the peak of inference, for one image in float32.",
    TIMES,
)
NOTES_OF_TRAINING = (
    "Top-1: of the averaged weights of the last epoch, none was chosen; mean +- standard deviation over seeds.",
    "Difference: in points of top-1, with the 95 % interval of Welch's t test; p is Holm's, for all comparisons here.",
    "Seeds change initial weights, order and augmentation. What they say nothing about: other images, other recipes.",
    "Epoch: the median, without evaluation. GMACs: with / without the products of attention.",
)


def table(report: Report) -> Any:
    """A report of `compare` to print with rich."""
    return _Printed(columns(report), circumstances(report), NOTES)


def table_of_training(report: Report) -> Any:
    """A report of `compare_trained` to print with rich."""
    return _Printed(columns_of_training(report), circumstances_of_training(report), _notes_of_training(report))


@dataclass(frozen=True)
class _Printed:
    """Columns for rich, in as many tables as the terminal's width asks for, each with the first column."""

    cells: Columns
    title: str
    notes: Sequence[str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        from rich.text import Text

        yield Text(self.title)
        first, *others = self.cells
        shown: Columns = []
        for column in others:
            wider = _rich_table([first, *shown, column])
            if shown and console.measure(wider, options=options.update(max_width=100_000)).maximum > options.max_width:
                yield _rich_table([first, *shown])
                shown = []
            shown.append(column)
        yield _rich_table([first, *shown])
        yield from map(Text, self.notes)


def _rich_table(cells: Columns) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table

    result = Table(box=SIMPLE)
    for i, (heading, column) in enumerate(cells):
        width = max(map(len, (*column, *heading.split())))
        result.add_column(textwrap.fill(heading, width), justify="right" if i else "left", no_wrap=True)
    for row in zip(*(column for _, column in cells), strict=True):
        result.add_row(*row)
    return result


def findings(report: Report) -> list[str]:
    """The claims and the notes, a line each."""
    return [*(sentence(claim) for claim in report["claims"]), *_speed_lines(report), *report["notes"]]


def findings_of_training(report: Report) -> list[str]:
    """What the comparisons say and what failed, a line each."""
    failed = [f"{row['name']}, {when}: {why}" for row in report["rows"] for when, why in row["failures"].items()]
    uncompared = [
        f"{row['name']}: not compared, for want of all its seeds" for row in report["rows"] if _is_in_part(row)
    ]
    idle = [
        f"{row['name']}: no better than always saying the commonest class ({report['commonest']:.2f} %), so nothing is "
        "learnt yet; give more --epochs"
        for row in report["rows"]
        if row["runs"] and min(run["top1"] for run in row["runs"]) <= report["commonest"]
    ]
    compared = [statistics.sentence(comparison) for comparison in report["comparisons"]]
    return [*compared, *failed, *uncompared, *idle, *report["notes"]]


def _notes_of_training(report: Report) -> list[str]:
    return [*NOTES_OF_TRAINING, *([TIMES] if _timed(report) else [])]


def _is_in_part(row: Mapping[str, Any]) -> bool:
    return bool(row["runs"] and row["failures"])


def write(report: Report, folder: Path) -> list[Path]:
    """Write table.md, table.csv, table.json and the figures into `folder`; their paths."""
    from mobilevit.compare.figures import accuracy_against_latency, accuracy_against_parameters

    rows = report["rows"]
    figures = {
        f"accuracy_parameters_{family}.png": accuracy_against_parameters(rows, family)
        for family in ("cnn", "vit")
        if any(row["family"] == family for row in rows)
    }
    for runtime, batch_size in _timed(report):
        figure = accuracy_against_latency(report, runtime, batch_size)
        figures[f"accuracy_latency_{runtime}_b{batch_size}.png"] = figure
    return _write(report, folder, markdown(report, list(figures)), [_flat(row, report) for row in rows], figures)


def write_training(report: Report, folder: Path) -> list[Path]:
    """Write table.md, table.csv, table.json and the figures of a report of `compare_trained`; their paths."""
    from mobilevit.compare.figures import learning_curves, measured_against_latency, measured_against_parameters

    figures = {}
    if any(row["runs"] for row in report["rows"]):
        figures = {
            "accuracy_parameters.png": measured_against_parameters(report),
            "learning_curves.png": learning_curves(report),
        }
    for runtime, batch_size in _timed(report):
        figures[f"accuracy_latency_{runtime}.png"] = measured_against_latency(report, runtime, batch_size)
    text = markdown_of_training(report, list(figures))
    return _write(report, folder, text, [_flat_of_training(row, report) for row in report["rows"]], figures)


def _write(
    report: Report, folder: Path, text: str, lines: Sequence[Mapping[str, Any]], figures: Mapping[str, Any]
) -> list[Path]:
    grid = io.StringIO(newline="")
    writer = csv.DictWriter(grid, fieldnames=list(lines[0]))
    writer.writeheader()
    writer.writerows(lines)
    for name, figure in figures.items():
        write_whole(folder / name, lambda aside, figure=figure: figure.savefig(aside, format="png"))
    values = json.dumps(report, ensure_ascii=False) + "\n"
    for name, content in (("table.json", values), ("table.md", text), ("table.csv", grid.getvalue())):
        write_whole(folder / name, lambda aside, content=content: aside.write_bytes(content.encode()))
    return [folder / name for name in ("table.md", "table.csv", "table.json", *figures)]


def circumstances(report: Report) -> str:
    """When and where it was, in a line."""
    text = f"{report['date']}, {report['processor']}"
    if report["device"] != "cpu":
        text += f", {report['device']}"
    if report["num_rounds"]:
        text += f", {_threads(report)}, {report['num_rounds']} rounds, load average {report['load_average']}"
    return text


def circumstances_of_training(report: Report) -> str:
    """What was trained on what, when and where, in a line."""
    recipe, seeds = report["recipe"], report["seeds"]
    held_out = (
        f"evaluated on the {report['num_val']:,} of its {report['held_out']}/"
        if report["held_out"]
        else f"evaluated on {report['num_val']:,} that were cut off by chance, since it holds none out"
    )
    timing = report["timing"]
    return (
        f"{report['data']}: trained on {report['num_train']:,} images of {report['num_classes']} classes at "
        f"{recipe['data']['size_px']} px, {held_out}; {recipe['epochs']} epochs, {recipe['data']['policy']} "
        f"augmentation, seeds {', '.join(map(str, seeds))}; {report['date']}, {where(report)}"
        + (f"; times of an image with {_threads(timing)}, {timing['num_rounds']} rounds" if timing else "")
    )


def where(report: Report) -> str:
    """What torch computed on: the accelerator, or the processor and how much of it."""
    return report["device"] if report["device"] != "cpu" else f"{report['processor']}, {_threads(report)}"


def _threads(report: Report) -> str:
    return f"{report['num_threads']} thread{'s' if report['num_threads'] > 1 else ''}"


def columns_of_training(report: Report) -> Columns:
    """Headings and cells of the table of what was trained."""
    rows = report["rows"]
    compared = {comparison["name"]: comparison for comparison in report["comparisons"]}

    def cells(of: Callable[[Mapping[str, Any]], str], key: str) -> list[str]:
        return [of(row) if row[key] is not None else "-" for row in rows]

    def difference(row: Mapping[str, Any]) -> str:
        found = compared.get(row["name"])
        if found is None:
            return "-"
        interval = "" if found["low"] is None else f" ({found['low']:+.2f} to {found['high']:+.2f})"
        return f"{found['difference']:+.2f}{interval} {found['against'].removeprefix('mobilevit-').upper()}"

    def macs(row: Mapping[str, Any]) -> str:
        return f"{row['num_macs'] / 1e9:.4f} / {row['num_macs_without_attention'] / 1e9:.4f}"

    def top1(row: Mapping[str, Any]) -> str:
        return f"{row['top1']:.2f}" + (f" +- {row['top1_std']:.2f}" if row["top1_std"] is not None else "")

    ps = [compared[row["name"]]["p_holm"] if row["name"] in compared else None for row in rows]
    return [
        ("system", [row["name"] for row in rows]),
        ("M parameters", cells(lambda row: f"{row['num_parameters'] / 1e6:.2f}", "num_parameters")),
        ("GMACs", cells(macs, "num_macs")),
        ("activations MiB", cells(lambda row: f"{row['activation_bytes'] / MIB:.2f}", "activation_bytes")),
        ("top-1", cells(top1, "top1")),
        ("of each seed", [", ".join(f"{run['top1']:.2f}" for run in row["runs"]) or "failed" for row in rows]),
        ("difference", [difference(row) for row in rows]),
        ("p", ["-" if p is None else f"{p:.2g}" for p in ps]),
        ("training: s an epoch", cells(lambda row: f"{row['seconds_per_epoch']:.1f}", "seconds_per_epoch")),
        ("training: images/s", cells(lambda row: f"{row['images_per_second']:.0f}", "images_per_second")),
        *_columns_of_times(report),
    ]


def columns(report: Report) -> Columns:
    """Headings and cells of the table."""
    rows = report["rows"]
    return [
        ("system", [row["name"] for row in rows]),
        ("px", [str(row["size_px"]) for row in rows]),
        (
            "M parameters (published)",
            [f"{row['num_parameters'] / 1e6:.2f} ({row['published_parameters'] / 1e6:.1f})" for row in rows],
        ),
        ("GMACs", [f"{row['num_macs'] / 1e9:.3f} / {row['num_macs_without_attention'] / 1e9:.3f}" for row in rows]),
        ("activations MiB", [f"{row['activation_bytes'] / MIB:.1f}" for row in rows]),
        ("top-1", [f"{row['published_top1']:.1f}" for row in rows]),
        ("augmentation", [row["augmentation"] or "-" for row in rows]),
        ("source", [row["source"] for row in rows]),
        ("best weights", [f"{_best(row)['top1']:.2f}" if row["library_weights"] else "-" for row in rows]),
        *_columns_of_times(report),
    ]


def _columns_of_times(report: Report) -> Columns:
    result: Columns = []
    for runtime, batch_size in _timed(report):
        timings = [_timing(row, runtime, batch_size) for row in report["rows"]]
        heading = f"{TITLES[runtime]}, batch {batch_size}"
        result += [
            (
                f"{heading}: ms",
                [_spread(timing["latency_ms"]) if timing else "-" for timing in timings],
            ),
            (
                f"{heading}: images/s",
                [f"{timing['images_per_second']:.1f}" if timing else "-" for timing in timings],
            ),
            (
                f"{heading}: ratio",
                [
                    f"{_spread(timing['ratio'])} {timing['against'].removeprefix('mobilevit-').upper()}"
                    if timing and timing["ratio"]
                    else "-"
                    for timing in timings
                ],
            ),
        ]
    return result


def markdown(report: Report, figures: list[str]) -> str:
    """Everything of a report, with the figures that lie beside it."""
    text = ["# MobileViT and what it was compared with", circumstances(report), _grid(columns(report)), *NOTES]
    if report["claims"]:
        text += ["## Claims of the paper", "\n".join(f"- {sentence(claim)}" for claim in report["claims"])]
    if report["speeds"]:
        text += ["## Time beside the paper's", "\n".join(f"- {line}" for line in _speed_lines(report))]
    for task, title, metric in (
        ("detection", "Detection: COCO, SSDLite at 320 px (VGG: SSD300)", "mAP"),
        ("segmentation", "Segmentation: PASCAL VOC, DeepLabv3", "mIoU"),
    ):
        rows = report["dense"][task]
        cells = [
            ("backbone", [row["backbone"] for row in rows]),
            ("M parameters, published", [f"{row['published_parameters'] / 1e6:.1f}" for row in rows]),
            ("counted", [f"{row['num_parameters'] / 1e6:.2f}" if row["num_parameters"] else "-" for row in rows]),
            (f"{metric}, published", [f"{row['published']:.1f}" for row in rows]),
        ]
        text += [f"## {title}", _grid(cells)]
    weights = [(row["name"], found) for row in report["rows"] for found in row["library_weights"]]
    if weights:
        cells = [
            ("system", [name for name, _ in weights]),
            ("weights", [found["id"] for _, found in weights]),
            ("top-1 by the library", [f"{found['top1']:.2f}" for _, found in weights]),
        ]
        text += ["## Trained weights in the libraries", _grid(cells)]
    if report["notes"]:
        text += ["## Notes", "\n".join(f"- {note}" for note in report["notes"])]
    return _page(text, report, figures)


def markdown_of_training(report: Report, figures: list[str]) -> str:
    """Everything of a report of `compare_trained`, with the figures that lie beside it."""
    text = ["# MobileViT and others, trained alike", circumstances_of_training(report)]
    text += [_grid(columns_of_training(report)), "\n".join(f"- {line}" for line in findings_of_training(report))]
    text += [*_notes_of_training(report), "## Recipe", f"```json\n{json.dumps(report['recipe'], indent=2)}\n```"]
    return _page(text, report, figures)


def _page(text: Sequence[str], report: Report, figures: Sequence[str]) -> str:
    shown = [f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in figures]
    versions = ", ".join(f"{library} {version}" for library, version in report["versions"].items())
    return "\n\n".join([*text, *shown, f"Versions: {versions}."]) + "\n"


def _grid(cells: Columns) -> str:
    lines = [[heading for heading, _ in cells], ["---"] + ["---:"] * (len(cells) - 1)]
    lines += [list(row) for row in zip(*(column for _, column in cells), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _flat(row: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """A line of the CSV: the row's plain values, the best weights, and the times in columns of their own."""
    best = _best(row) if row["library_weights"] else {"id": None, "top1": None}
    line = {key: value for key, value in row.items() if key not in ("library_weights", "timings")}
    return line | {"best_weights": best["id"], "best_weights_top1": best["top1"]} | _flat_times(row, report)


def _flat_times(row: Mapping[str, Any], report: Report) -> dict[str, Any]:
    line: dict[str, Any] = {}
    for runtime, batch_size in _timed(report):
        timing = _timing(row, runtime, batch_size) or {}
        for key in ("latency_ms", "ratio"):
            found = timing.get(key) or {}
            line |= {f"{runtime}_b{batch_size}_{key}_{q}": found.get(q) for q in ("median", "p10", "p90")}
        for key in ("images_per_second", "against"):
            line[f"{runtime}_b{batch_size}_{key}"] = timing.get(key)
    return line


def _flat_of_training(row: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """A line of the CSV: the row's plain values, the top-1 of every seed, and the comparison."""
    line = {key: value for key, value in row.items() if key not in ("runs", "failures", "timings")}
    top1 = {run["seed"]: run["top1"] for run in row["runs"]}
    line |= {f"top1_seed_{seed}": top1.get(seed) for seed in report["seeds"]}
    found = next((one for one in report["comparisons"] if one["name"] == row["name"]), {})
    line |= {key: found.get(key) for key in ("against", "difference", "low", "high", "p", "p_holm")}
    line |= _flat_times(row, report)
    return line | {"failures": "; ".join(f"{when}: {why}" for when, why in row["failures"].items())}


def _speed_lines(report: Report) -> list[str]:
    return [
        f"{row['other']} takes {row['published_ratio']:.2f} times as long as {row['ours']} on an iPhone 12's CPU, as "
        f"published; here {row['ratio']:.2f} times ({TITLES[row['runtime']]}, batch {row['batch_size']})"
        for row in report["speeds"]
    ]


def _timed(report: Report) -> list[tuple[str, int]]:
    """The runtimes and batch sizes that were timed."""
    timings = [timing for row in report["rows"] for timing in row["timings"]]
    return list(dict.fromkeys((timing["runtime"], timing["batch_size"]) for timing in timings))


def _timing(row: Mapping[str, Any], runtime: str, batch_size: int) -> Mapping[str, Any] | None:
    return next((t for t in row["timings"] if (t["runtime"], t["batch_size"]) == (runtime, batch_size)), None)


def _best(row: Mapping[str, Any]) -> Mapping[str, Any]:
    return max(row["library_weights"], key=lambda weights: weights["top1"])


def _spread(values: Mapping[str, float]) -> str:
    return f"{values['median']:.2f} ({values['p10']:.2f} - {values['p90']:.2f})"
