"""The figures of the comparison: accuracy against parameters, against the time measured here, against epochs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from mobilevit.compare.models import OWN_PAPER
from mobilevit.compare.tables import TITLES, where

Row = Mapping[str, Any]
Place = tuple[float, float]
Bar = tuple[Place, Place]

# Colours after Okabe and Ito, which stay apart for every kind of colour vision.
INK, GREY, GRID = "#22262b", "#6b7178", "#e4e7ea"
COLOURS = {"cnn": "#d98200", "vit": "#0a6eb0", "mobilevit": "#b8322a"}
FAMILIES = {"cnn": "CNN", "vit": "vision transformer", "mobilevit": "MobileViT"}
MARKERS = {"basic": "o", "advanced": "^", None: "s"}
AUGMENTATIONS = {"basic": "basic augmentation", "advanced": "advanced augmentation", None: "augmentation not said"}
TICKS = (0.5, 1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 300, 500, 1000, 2000, 3000, 5000)
# Where a name may stand: so far from its point, in points, in so many directions, to the right first.
ANGLES, RADII = (
    grid.ravel() for grid in np.meshgrid(np.linspace(0, 2 * np.pi, 16, endpoint=False), (9, 13, 20, 28, 38))
)
LEADER_PT = 13  # farther away a line leads to it
# For lines that are to be told apart one by one; MobileViT's red is not among them.
LINES = ("#0a6eb0", "#d98200", "#00845c", "#a0569b", "#3aa6dd", "#6b7178")
DASHES = ("-", "--", ":")
PUBLISHED = "ImageNet top-1, in per cent, as published"


def accuracy_against_parameters(rows: Sequence[Row], family: str) -> Figure:
    """The systems of `family`, "cnn" or "vit", and MobileViT's."""
    shown = [row for row in rows if row["family"] in (family, "mobilevit")]
    return _figure(
        shown,
        x_of=lambda row: row["num_parameters"] / 1e6,
        x_label="parameters, in millions, counted",
        title=f"MobileViT and {FAMILIES[family]}s: ImageNet top-1 against parameters",
    )


def accuracy_against_latency(report: Mapping[str, Any], runtime: str, batch_size: int) -> Figure:
    """All systems timed in `runtime` in batches of `batch_size`; the bars go from the 10th to the 90th percentile."""
    timings = _latencies(report, runtime, batch_size)
    shown = [row for row in report["rows"] if row["name"] in timings]
    (size, *others) = {row["size_px"] for row in shown}
    return _figure(
        shown,
        x_of=lambda row: timings[row["name"]]["median"],
        bars_of=lambda row: [_across(timings[row["name"]], row["published_top1"])],
        x_label=_time_label(runtime, batch_size) + ("" if others else f", {size} px"),
        title=f"ImageNet top-1 against time ({where(report)}, {report['date']})",
    )


def measured_against_parameters(report: Mapping[str, Any]) -> Figure:
    """What was trained here; the bars are one standard deviation over the seeds to either side."""
    return _measured(report, lambda row: row["num_parameters"] / 1e6, "parameters, in millions, counted")


def measured_against_latency(report: Mapping[str, Any], runtime: str, batch_size: int) -> Figure:
    """The same against the time that an image takes, of what was timed in `runtime` in batches of `batch_size`; the
    bars across go from the 10th to the 90th percentile."""
    timings = _latencies(report, runtime, batch_size)
    timed = {**report, "rows": [row for row in report["rows"] if row["name"] in timings]}
    return _measured(
        timed,
        lambda row: timings[row["name"]]["median"],
        _time_label(runtime, batch_size),
        lambda row: [_across(timings[row["name"]], row["top1"])],
    )


def _measured(
    report: Mapping[str, Any],
    x_of: Callable[[Row], float],
    x_label: str,
    more_bars_of: Callable[[Row], list[Bar]] = lambda row: [],
) -> Figure:
    policy = report["recipe"]["data"]["policy"]
    num_seeds = len(report["seeds"])
    return _figure(
        [row | {"augmentation": policy, "source": "measured"} for row in report["rows"] if row["runs"]],
        x_of=x_of,
        y_of=lambda row: row["top1"],
        bars_of=lambda row: [
            ((x_of(row), row["top1"] - (row["top1_std"] or 0)), (x_of(row), row["top1"] + (row["top1_std"] or 0))),
            *more_bars_of(row),
        ],
        x_label=x_label,
        y_label=f"top-1, in per cent, mean of {num_seeds} seed{'s' if num_seeds > 1 else ''}",
        title=f"Trained on {Path(report['data']).name}: {report['recipe']['epochs']} epochs at "
        f"{report['recipe']['data']['size_px']} px ({report['date']})",
    )


def _latencies(report: Mapping[str, Any], runtime: str, batch_size: int) -> dict[str, dict[str, float]]:
    return {
        row["name"]: timing["latency_ms"]
        for row in report["rows"]
        for timing in row["timings"]
        if (timing["runtime"], timing["batch_size"]) == (runtime, batch_size)
    }


def _across(latency_ms: Mapping[str, float], y: float) -> Bar:
    return (latency_ms["p10"], y), (latency_ms["p90"], y)


def _time_label(runtime: str, batch_size: int) -> str:
    images = "an image" if batch_size == 1 else f"{batch_size} images"
    return f"ms for {images}, {TITLES[runtime]}, float32"


def learning_curves(report: Mapping[str, Any]) -> Figure:
    """Top-1 after every epoch: the mean over the seeds, and shaded from the lowest to the highest."""
    figure, axes = _axes(
        f"Top-1 after every epoch, mean and range of {len(report['seeds'])} seeds"
        if len(report["seeds"]) > 1
        else "Top-1 after every epoch"
    )
    styles = iter((colour, dash) for dash in DASHES for colour in LINES)
    for row in sorted((row for row in report["rows"] if row["runs"]), key=lambda row: -row["top1"]):
        ours = row["family"] == "mobilevit"
        colour, dash = (COLOURS["mobilevit"], "-") if ours else next(styles, (GREY, "-."))
        top1 = np.array([run["top1_by_epoch"] for run in row["runs"]])
        epochs = np.arange(1, top1.shape[1] + 1)
        width = 2.4 if ours else 1.4
        axes.plot(epochs, top1.mean(axis=0), dash, color=colour, linewidth=width, label=row["name"], marker=".")
        axes.fill_between(epochs, top1.min(axis=0), top1.max(axis=0), color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("epoch", color=INK)
    axes.set_ylabel("top-1 of the averaged weights, in per cent", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    return figure


def _axes(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(10, 6.4), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=GREY, labelcolor=INK)
    axes.set_title(title, loc="left", color=INK, fontsize=12, pad=12)
    return figure, axes


def _figure(
    rows: Sequence[Row],
    x_of: Callable[[Row], float],
    x_label: str,
    title: str,
    y_of: Callable[[Row], float] = lambda row: row["published_top1"],
    y_label: str = PUBLISHED,
    bars_of: Callable[[Row], list[Bar]] = lambda row: [],
) -> Figure:
    figure, axes = _axes(title)
    axes.set_xscale("log")
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    bars: list[Bar] = []
    for row in rows:
        for bar in bars_of(row):
            axes.plot(*zip(*bar, strict=True), color=COLOURS[row["family"]], alpha=0.5, linewidth=1.4)
            bars.append(bar)
    places = [(x_of(row), y_of(row)) for row in rows]
    for place, row in zip(places, rows, strict=True):
        _point(axes, place, row)
    ours = sorted(place for place, row in zip(places, rows, strict=True) if row["family"] == "mobilevit")
    if ours:
        axes.plot(*zip(*ours, strict=True), color=COLOURS["mobilevit"], linewidth=1.2, alpha=0.6, zorder=2)
    xs = [x for x, _ in (*places, *(end for bar in bars for end in bar))]
    if max(xs) < 3 * min(xs):
        axes.set_xlim(min(xs) / 1.05, max(xs) * 1.1)
        axes.xaxis.set_major_locator(MaxNLocator(6))
    else:
        axes.set_xlim(min(xs) / 1.25, max(xs) * 1.35)
        axes.xaxis.set_major_locator(FixedLocator(TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.margins(y=0.08)
    figure.legend(handles=_legend(rows), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    _label(axes, rows, bars, places)
    return figure


def _point(axes: Axes, place: Place, row: Row) -> None:
    colour, of_mobilevit = COLOURS[row["family"]], row["family"] == "mobilevit"
    axes.scatter(
        *place,
        s=200 if of_mobilevit else 50,
        marker="*" if of_mobilevit else MARKERS[row["augmentation"]],
        facecolor="white" if row["source"] == OWN_PAPER else colour,
        edgecolor=colour if row["source"] == OWN_PAPER else "white",
        linewidth=1.3 if row["source"] == OWN_PAPER else 0.8,
        zorder=3,
    )


def _legend(rows: Sequence[Row]) -> list[Line2D]:
    def handle(label: str, colour: str, marker: str, *, hollow: bool = False) -> Line2D:
        face = "white" if hollow else colour
        size = 12 if marker == "*" else 7
        style = {"markerfacecolor": face, "markeredgecolor": colour, "markersize": size}
        return Line2D([], [], linestyle="none", label=label, marker=marker, **style)

    others = [row for row in rows if row["family"] != "mobilevit"]
    kinds = dict.fromkeys((row["family"], row["augmentation"]) for row in others if row["source"] != OWN_PAPER)
    handles = [
        handle(f"{FAMILIES['mobilevit']}, {AUGMENTATIONS[augmentation]}", COLOURS["mobilevit"], "*")
        for augmentation in dict.fromkeys(row["augmentation"] for row in rows if row["family"] == "mobilevit")
    ]
    for family, augmentation in kinds:
        handles.append(
            handle(f"{FAMILIES[family]}, {AUGMENTATIONS[augmentation]}", COLOURS[family], MARKERS[augmentation])
        )
    if any(row["source"] == OWN_PAPER for row in others):
        handles.append(handle("top-1 from the system's own paper", GREY, MARKERS[None], hollow=True))
    return handles


def _label(axes: Axes, rows: Sequence[Row], bars: Sequence[Bar], places_of_rows: Sequence[Place]) -> None:
    """Write the names beside the points, each where it covers the least of points, `bars` and other names."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.canvas.draw()  # lays everything out, so that places in pixels are known
    figure.set_layout_engine("none")
    renderer = figure.canvas.get_renderer()  # pyright: ignore[reportAttributeAccessIssue] - of Agg
    pixels = figure.dpi / 72  # of a point, the unit of letters
    places = axes.transData.transform(places_of_rows)
    taken = np.concatenate((places - 5 * pixels, places + 5 * pixels), axis=1)
    for bar in bars:
        ends = axes.transData.transform(bar)
        taken = np.vstack((taken, [*(ends[0] - pixels), *(ends[1] + pixels)]))
    line = places[sorted(np.flatnonzero([row["family"] == "mobilevit" for row in rows]), key=lambda i: places[i][0])]
    for start, end in pairwise(line):
        on_line = start + np.linspace(0, 1, 40)[:, None] * (end - start)
        taken = np.vstack((taken, np.concatenate((on_line - 2 * pixels, on_line + 2 * pixels), axis=1)))
    frame = np.array(axes.get_window_extent(renderer).extents)[None]
    # Ours first, then those with the most neighbours.
    crowd = (np.linalg.norm(places[:, None] - places, axis=2) < 90 * pixels).sum(axis=1)
    for i in sorted(range(len(rows)), key=lambda i: (rows[i]["family"] != "mobilevit", -crowd[i])):
        ours = rows[i]["family"] == "mobilevit"
        text = axes.annotate(
            rows[i]["name"].removesuffix("-basic"),  # which the marker says
            places_of_rows[i],
            xytext=(0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8.5,
            fontweight="bold" if ours else "normal",
            color=COLOURS["mobilevit"] if ours else INK,
            zorder=4,
        )
        extent = text.get_window_extent(renderer)
        half = np.array([extent.width, extent.height]) / 2
        # On ellipses around the point, so that of every name the near end is as far from it.
        offsets = np.stack((np.cos(ANGLES), np.sin(ANGLES)), axis=1) * (RADII[:, None] * pixels + half)
        boxes = np.concatenate((places[i] + offsets - half, places[i] + offsets + half), axis=1)
        others = np.delete(taken, i, axis=0)
        outside = 4 * half.prod() - _overlaps(boxes, frame)[:, 0]
        costs = _overlaps(boxes, others).sum(axis=1) + 3 * outside + 2 * pixels**2 * RADII
        best = int(costs.round().argmin())  # the first of those that are as good
        text.set_position(tuple(offsets[best] / pixels))
        taken = np.vstack((taken, boxes[best]))
        if RADII[best] > LEADER_PT:
            end = places[i].clip(boxes[best][:2], boxes[best][2:])
            x, y = axes.transData.inverted().transform([places[i], end]).T
            axes.plot(x, y, color=GREY, linewidth=0.6, zorder=1.5)


def _overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Areas (A, B) that boxes (A, 4) and (B, 4), each x0 y0 x1 y1, have in common."""
    sides = np.minimum(a[:, None, 2:], b[:, 2:]) - np.maximum(a[:, None, :2], b[:, :2])
    return sides.clip(min=0).prod(axis=2)
