"""The figures of a comparison: accuracy against parameters, measured time, and epochs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from mobilevit.compare.models import OWN_PAPER, Augmentation, Family
from mobilevit.compare.reports import (
    RUNTIME_TITLES,
    PublishedReport,
    PublishedRow,
    Report,
    Row,
    Runtime,
    TrainedReport,
    TrainedRow,
)

# The palette of Okabe and Ito, which is distinguishable with every kind of color vision.
INK, GREY, GRID = "#22262b", "#6b7178", "#e4e7ea"
COLORS = {"cnn": "#d98200", "vit": "#0a6eb0", "mobilevit": "#b8322a"}
FAMILIES = {"cnn": "CNN", "vit": "vision transformer", "mobilevit": "MobileViT"}
MARKERS = {"basic": "o", "advanced": "^", None: "s"}
AUGMENTATIONS = {"basic": "basic augmentation", "advanced": "advanced augmentation", None: "augmentation not stated"}
TICKS = (0.5, 1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 300, 500, 1000, 2000, 3000, 5000)
# Candidate positions of a label around its point: directions, starting on the right, and distances in points.
ANGLES, RADII = (
    grid.ravel() for grid in np.meshgrid(np.linspace(0, 2 * np.pi, 16, endpoint=False), (9, 13, 20, 28, 38))
)
LEADER_PT = 13  # labels at a larger distance get a line to their point
# Lines of learning curves, without the red of MobileViT.
LINE_COLORS = ("#0a6eb0", "#d98200", "#00845c", "#a0569b", "#3aa6dd", "#6b7178")
DASHES = ("-", "--", ":")


@dataclass(frozen=True)
class Point:
    """A model in a scatter plot; `x_range` and `y_range` are the limits of its error bars."""

    name: str
    family: Family
    augmentation: Augmentation | None
    own_paper: bool
    x: float
    y: float
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None

    @property
    def bars(self) -> list[np.ndarray]:
        """The error bars as their two end points."""
        horizontal = [np.array([(x, self.y) for x in self.x_range])] if self.x_range else []
        return horizontal + ([np.array([(self.x, y) for y in self.y_range])] if self.y_range else [])


def draw(report: Report) -> dict[str, Figure]:
    """All figures of a report, by file name."""
    figures = {}
    if isinstance(report, PublishedReport):
        for family in ("cnn", "vit"):
            if any(row.family == family for row in report.rows):
                figures[f"accuracy_parameters_{family}.png"] = accuracy_against_parameters(report, family)
    elif isinstance(report, TrainedReport) and any(row.runs for row in report.rows):
        figures["accuracy_parameters.png"] = accuracy_against_parameters(report)
        figures["learning_curves.png"] = learning_curves(report)
    for runtime, batch_size in report.timed:
        suffix = f"_b{batch_size}" if isinstance(report, PublishedReport) else ""
        name = f"accuracy_latency_{runtime}{suffix}.png"
        figures[name] = accuracy_against_latency(report, runtime, batch_size)
    return figures


def accuracy_against_parameters(report: Report, family: Family | None = None) -> Figure:
    """Accuracy against parameters, of the models of `family` and MobileViT, by default of all."""
    points = [
        _point(report, row, row.cost.num_parameters / 1e6)
        for row in report.rows
        if row.cost and _has_score(row) and (family is None or row.family in (family, "mobilevit"))
    ]
    title = f"ImageNet top-1 against parameters: MobileViT and {FAMILIES[family]}s" if family else ""
    return _scatter(report, points, "parameters in millions", title)


def accuracy_against_latency(report: Report, runtime: Runtime, batch_size: int) -> Figure:
    """Accuracy against the time in a runtime; error bars from the 10th to the 90th percentile."""
    timed = [(row, timing.latency_ms) for row in report.rows if (timing := row.timing(runtime, batch_size))]
    points = [_point(report, row, x.median, (x.p10, x.p90)) for row, x in timed]
    images = "image" if batch_size == 1 else f"{batch_size} images"
    sizes = {row.size_px for row, _ in timed}
    size = f", {sizes.pop()} px" if len(sizes) == 1 else ""
    x_label = f"ms per {images}, {RUNTIME_TITLES[runtime]}, float32{size}"
    setting = report.setting
    return _scatter(report, points, x_label, f"ImageNet top-1 against time ({setting.where}, {setting.machine.date})")


def learning_curves(report: TrainedReport) -> Figure:
    """The score after every epoch: the mean over the seeds, and their range."""
    metric = report.metric_title
    several = f", mean and range of {len(report.seeds)} seeds" if len(report.seeds) > 1 else ""
    figure, axes = _axes(f"Validation {metric} after every epoch{several}")
    styles = iter((color, dash) for dash in DASHES for color in LINE_COLORS)
    for row in sorted((row for row in report.rows if row.runs), key=lambda row: -(row.score or 0)):
        ours = row.family == "mobilevit"
        color, dash = (COLORS["mobilevit"], "-") if ours else next(styles, (GREY, "-."))
        scores = np.array([run.score_by_epoch for run in row.runs])
        epochs = np.arange(1, scores.shape[1] + 1)
        width = 2.4 if ours else 1.4
        axes.plot(epochs, scores.mean(axis=0), dash, color=color, linewidth=width, label=row.name, marker=".")
        axes.fill_between(epochs, scores.min(axis=0), scores.max(axis=0), color=color, alpha=0.15, linewidth=0)
    axes.set_xlabel("epoch", color=INK)
    axes.set_ylabel(f"{metric} of the EMA weights in percent", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    return figure


def _has_score(row: Row) -> bool:
    return isinstance(row, PublishedRow) or (isinstance(row, TrainedRow) and row.score is not None)


def _point(report: Report, row: Row, x: float, x_range: tuple[float, float] | None = None) -> Point:
    if isinstance(row, PublishedRow):
        own_paper = row.source == OWN_PAPER
        return Point(row.name, row.family, row.augmentation, own_paper, x, row.published_top1, x_range)
    assert isinstance(row, TrainedRow)
    assert isinstance(report, TrainedReport)
    y, std = row.score or 0.0, row.score_std or 0.0
    return Point(row.name, row.family, report.recipe["data"]["policy"], False, x, y, x_range, (y - std, y + std))


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


def _scatter(report: Report, points: Sequence[Point], x_label: str, title: str) -> Figure:
    """A labeled scatter plot with a logarithmic x axis; a line connects the MobileViTs.

    `title` is that of published figures. The title of trained models names their data and recipe.
    """
    y_label = "ImageNet top-1 in percent, published"
    if isinstance(report, TrainedReport):
        num_seeds, recipe = len(report.seeds), report.recipe
        y_label = f"{report.metric_title} in percent, mean of {num_seeds} seed{'s' if num_seeds > 1 else ''}"
        title = f"Trained on {Path(report.data).name}: {recipe['epochs']} epochs at {recipe['data']['size_px']} px"
        title += f" ({report.setting.machine.date})"
    figure, axes = _axes(title)
    axes.set_xscale("log")
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    for point in points:
        for bar in point.bars:
            axes.plot(*bar.T, color=COLORS[point.family], alpha=0.5, linewidth=1.4)
    for point in points:
        _draw_marker(axes, point)
    ours = sorted((point.x, point.y) for point in points if point.family == "mobilevit")
    if ours:
        axes.plot(*zip(*ours, strict=True), color=COLORS["mobilevit"], linewidth=1.2, alpha=0.6, zorder=2)
    xs = [x for point in points for x in (point.x, *(point.x_range or ()))]
    if max(xs) < 3 * min(xs):
        axes.set_xlim(min(xs) / 1.05, max(xs) * 1.1)
        axes.xaxis.set_major_locator(MaxNLocator(6))
    else:
        axes.set_xlim(min(xs) / 1.25, max(xs) * 1.35)
        axes.xaxis.set_major_locator(FixedLocator(TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.margins(y=0.08)
    figure.legend(handles=_legend(points), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    _draw_labels(axes, points)
    return figure


def _draw_marker(axes: Axes, point: Point) -> None:
    color, ours = COLORS[point.family], point.family == "mobilevit"
    axes.scatter(
        point.x,
        point.y,
        s=200 if ours else 50,
        marker="*" if ours else MARKERS[point.augmentation],
        facecolor="white" if point.own_paper else color,
        edgecolor=color if point.own_paper else "white",
        linewidth=1.3 if point.own_paper else 0.8,
        zorder=3,
    )


def _legend(points: Sequence[Point]) -> list[Line2D]:
    """A marker for every combination of family and augmentation, MobileViT first."""
    kinds = dict.fromkeys((point.family, point.augmentation) for point in points if not point.own_paper)
    entries = []  # label, color, marker, fill color
    for family, augmentation in sorted(kinds, key=lambda kind: kind[0] != "mobilevit"):
        color, marker = COLORS[family], "*" if family == "mobilevit" else MARKERS[augmentation]
        entries.append((f"{FAMILIES[family]}, {AUGMENTATIONS[augmentation]}", color, marker, color))
    if any(point.own_paper for point in points):
        entries.append(("top-1 from the model's own paper", GREY, MARKERS[None], "white"))
    return [
        Line2D([], [], ls="none", label=label, marker=marker, mec=color, mfc=fill, ms=12 if marker == "*" else 7)
        for label, color, marker, fill in entries
    ]


def _draw_labels(axes: Axes, points: Sequence[Point]) -> None:
    """Write the names beside the points, each where it overlaps points, error bars and other names the least."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.canvas.draw()  # computes the layout, and with it positions in pixels
    figure.set_layout_engine("none")
    renderer = figure.canvas.get_renderer()  # pyright: ignore[reportAttributeAccessIssue] - of Agg
    scale = figure.dpi / 72  # pixels per point, the unit of font sizes
    xy = [(point.x, point.y) for point in points]
    centers = axes.transData.transform(xy)
    occupied = np.concatenate((centers - 5 * scale, centers + 5 * scale), axis=1)  # boxes x0 y0 x1 y1
    for bar in (bar for point in points for bar in point.bars):
        ends = axes.transData.transform(bar)
        occupied = np.vstack((occupied, [*(ends[0] - scale), *(ends[1] + scale)]))
    ours = [i for i, point in enumerate(points) if point.family == "mobilevit"]
    for start, end in pairwise(centers[sorted(ours, key=lambda i: centers[i][0])]):
        on_line = start + np.linspace(0, 1, 40)[:, None] * (end - start)
        occupied = np.vstack((occupied, np.concatenate((on_line - 2 * scale, on_line + 2 * scale), axis=1)))
    frame = np.array(axes.get_window_extent(renderer).extents)[None]
    # Ours first, then the points with the most neighbors.
    num_neighbors = (np.linalg.norm(centers[:, None] - centers, axis=2) < 90 * scale).sum(axis=1)
    for i in sorted(range(len(points)), key=lambda i: (i not in ours, -num_neighbors[i])):
        text = axes.annotate(
            points[i].name.removesuffix("-basic"),  # the marker shows the augmentation
            xy[i],
            xytext=(0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8.5,
            fontweight="bold" if i in ours else "normal",
            color=COLORS["mobilevit"] if i in ours else INK,
            zorder=4,
        )
        extent = text.get_window_extent(renderer)
        half = np.array([extent.width, extent.height]) / 2
        # On ellipses, so that the nearest edge of a name of any length is equally far from the point.
        offsets = np.stack((np.cos(ANGLES), np.sin(ANGLES)), axis=1) * (RADII[:, None] * scale + half)
        boxes = np.concatenate((centers[i] + offsets - half, centers[i] + offsets + half), axis=1)
        others = np.delete(occupied, i, axis=0)
        outside = 4 * half.prod() - _overlaps(boxes, frame)[:, 0]
        costs = _overlaps(boxes, others).sum(axis=1) + 3 * outside + 2 * scale**2 * RADII
        best = int(costs.round().argmin())
        text.set_position(tuple(offsets[best] / scale))
        occupied = np.vstack((occupied, boxes[best]))
        if RADII[best] > LEADER_PT:
            end = centers[i].clip(boxes[best][:2], boxes[best][2:])
            x, y = axes.transData.inverted().transform([centers[i], end]).T
            axes.plot(x, y, color=GREY, linewidth=0.6, zorder=1.5)


def _overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The intersection areas (A, B) of boxes (A, 4) and (B, 4), each x0 y0 x1 y1."""
    sides = np.minimum(a[:, None, 2:], b[:, 2:]) - np.maximum(a[:, None, :2], b[:, :2])
    return sides.clip(min=0).prod(axis=2)
