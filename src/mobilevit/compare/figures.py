"""The figures of the comparison: accuracy against parameters, and against the time measured here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from mobilevit.compare.systems import OWN_PAPER

Row = Mapping[str, Any]

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
    timings = {
        row["name"]: timing["latency_ms"]
        for row in report["rows"]
        for timing in row["timings"]
        if (timing["runtime"], timing["batch_size"]) == (runtime, batch_size)
    }
    threads = f"{report['num_threads']} thread{'s' if report['num_threads'] > 1 else ''}"
    where = report["device"] if report["device"] != "cpu" else f"{report['processor']}, {threads}"
    name = {"torch": "torch", "onnx": "ONNX Runtime"}[runtime]
    return _figure(
        [row for row in report["rows"] if row["name"] in timings],
        x_of=lambda row: timings[row["name"]]["median"],
        spread_of=lambda row: (timings[row["name"]]["p10"], timings[row["name"]]["p90"]),
        x_label=f"ms for {'a picture' if batch_size == 1 else f'{batch_size} pictures'}, {name}, float32",
        title=f"ImageNet top-1 against time ({where}, {report['date']})",
    )


def _figure(
    rows: Sequence[Row],
    x_of: Callable[[Row], float],
    x_label: str,
    title: str,
    spread_of: Callable[[Row], tuple[float, float]] | None = None,
) -> Figure:
    figure = Figure(figsize=(10, 6.4), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xscale("log")
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=GREY, labelcolor=INK)
    axes.set_title(title, loc="left", color=INK, fontsize=12, pad=12)
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel("ImageNet top-1, in per cent, as published", color=INK)
    bars = [(*spread_of(row), row["published_top1"]) for row in rows] if spread_of else []
    for (x0, x1, y), row in zip(bars, rows, strict=bool(bars)):
        axes.plot((x0, x1), (y, y), color=COLOURS[row["family"]], alpha=0.5, linewidth=1.4)
    for row in rows:
        _point(axes, x_of(row), row)
    ours = sorted((x_of(row), row["published_top1"]) for row in rows if row["family"] == "mobilevit")
    axes.plot(*zip(*ours, strict=True), color=COLOURS["mobilevit"], linewidth=1.2, alpha=0.6, zorder=2)
    xs = [x_of(row) for row in rows] + [x for x0, x1, _ in bars for x in (x0, x1)]
    axes.set_xlim(min(xs) / 1.25, max(xs) * 1.35)
    axes.xaxis.set_major_locator(FixedLocator(TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.margins(y=0.08)
    figure.legend(handles=_legend(rows), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    _label(axes, rows, bars, x_of)
    return figure


def _point(axes: Axes, x: float, row: Row) -> None:
    colour, of_mobilevit = COLOURS[row["family"]], row["family"] == "mobilevit"
    axes.scatter(
        x,
        row["published_top1"],
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
    handles = [handle(f"{FAMILIES['mobilevit']}, {AUGMENTATIONS['basic']}", COLOURS["mobilevit"], "*")]
    for family, augmentation in kinds:
        handles.append(
            handle(f"{FAMILIES[family]}, {AUGMENTATIONS[augmentation]}", COLOURS[family], MARKERS[augmentation])
        )
    if any(row["source"] == OWN_PAPER for row in others):
        handles.append(handle("top-1 from the system's own paper", GREY, MARKERS[None], hollow=True))
    return handles


def _label(
    axes: Axes, rows: Sequence[Row], bars: Sequence[tuple[float, float, float]], x_of: Callable[[Row], float]
) -> None:
    """Write the names beside the points, each where it covers the least of points, `bars` and other names."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.canvas.draw()  # lays everything out, so that places in pixels are known
    figure.set_layout_engine("none")
    renderer = figure.canvas.get_renderer()  # pyright: ignore[reportAttributeAccessIssue] - of Agg
    pixels = figure.dpi / 72  # of a point, the unit of letters
    places = axes.transData.transform([(x_of(row), row["published_top1"]) for row in rows])
    taken = np.concatenate((places - 5 * pixels, places + 5 * pixels), axis=1)
    for x0, x1, y in bars:
        ends = axes.transData.transform([(x0, y), (x1, y)])
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
            (x_of(rows[i]), rows[i]["published_top1"]),
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
