"""Line charts by matplotlib, as SVG to embed in HTML. Importing this module takes half a second.

Colors are the custom properties of the stylesheet, so that charts follow its light and dark schemes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

WIDTH_PX, HEIGHT_PX = 420, 236
# Line styles: color and dashes. After Okabe and Ito; distinguishable without color vision.
STYLES = {"main": ("#0a6eb0", "-"), "second": ("#c27400", "--"), "third": ("#5d656e", ":")}
LINE, FAINT = "#cfd4d9", "#eff1f3"
PROPERTIES = {"#0a6eb0": "blue", "#c27400": "orange", "#5d656e": "soft", LINE: "line", FAINT: "faint"}
RC_PARAMS: dict[Any, Any] = {
    "axes.autolimit_mode": "round_numbers",  # logarithmic axes end at ticks
    "axes.unicode_minus": False,
    "axes.xmargin": 0.01,
    "axes.ymargin": 0,
    "figure.dpi": 72,  # 1 px of the SVG is 1 pt
    "font.size": 12,
    "path.simplify": False,
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Line:
    """A line of a chart; NaN leaves a gap. `style` is a key of `STYLES`."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = "main"


@dataclass(frozen=True)
class Band:
    """An area from `low` to `high` behind the lines of a chart."""

    name: str
    x: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


@dataclass(frozen=True)
class Chart:
    """A chart for the template: its SVG, the entries of its legend (style, name), and a note below it."""

    title: str
    svg: Markup
    legend: list[tuple[str, str]] = field(default_factory=list)
    note: str = ""


def line_chart(
    title: str,
    lines: Sequence[Line],
    band: Band | None = None,
    *,
    x_name: str,
    unit: str = "",
    note: str = "",
    x_labels: Sequence[str] = (),
    from_zero: bool = False,
) -> Chart | None:
    """A chart of `lines` over epochs or steps; None if no line has a finite point.

    All lines have the same x. The y axis is logarithmic if the values span more than a factor of 100. The tooltips
    show the values at every x, named by `x_labels` if given.
    """
    lines = [line for line in lines if np.isfinite(line.y).any()]
    if not lines:
        return None
    with mpl.rc_context({**RC_PARAMS, "svg.hashsalt": title}):
        figure = Figure(figsize=(WIDTH_PX / 72, HEIGHT_PX / 72), layout="constrained", facecolor="none")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot(facecolor="none")
        axes.set_xlabel(x_name, loc="right")
        axes.spines[["left", "right", "top"]].set_visible(False)
        axes.spines["bottom"].set_color(LINE)
        axes.grid(axis="y", color=FAINT, linewidth=1)
        axes.tick_params(axis="x", color=LINE, length=4)
        axes.tick_params(axis="y", length=0)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        for line in lines:
            color, dashes = STYLES[line.style]
            marked = _isolated_and_last(np.isfinite(line.y))
            axes.plot(
                line.x,
                line.y,
                dashes,
                color=color,
                linewidth=2,
                marker="o",
                markersize=5,
                markevery=marked,
                clip_on=False,
            )
        _scale_y(axes, lines, band, from_zero=from_zero, is_percent=unit == "%")
        if band:
            y_limits = axes.get_ylim()  # the lines and most of the band; outliers of the band are clipped
            axes.fill_between(band.x, band.low, band.high, color=STYLES["main"][0], alpha=0.2, linewidth=0)
            axes.set_ylim(y_limits)
        axes.set_xlim(*_x_limits(lines[0].x))
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        tooltips = _tooltips(axes, lines, x_name, unit, x_labels)
    names = {line.name: f"{_number(line.y[-1])} {unit}".strip() for line in lines if math.isfinite(line.y[-1])}
    last = "; ".join(f"{name}: {value} at the end" for name, value in names.items())
    label = f"{title} by {x_name}" + (f". {last}" if last else "")
    legend = [(line.style, line.name) for line in lines] if len(lines) > 1 or band else []
    legend += [("band", band.name)] if band else []
    return Chart(title, _inline(file.getvalue(), label, tooltips), legend, note)


def _scale_y(axes: Axes, lines: Sequence[Line], band: Band | None, *, from_zero: bool, is_percent: bool) -> None:
    y = np.concatenate([np.asarray(line.y, float) for line in lines])
    low, high = float(y[np.isfinite(y)].min()), float(y[np.isfinite(y)].max())
    highest = high
    if low > 0 and high > 100 * low and not from_zero:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.9g}"))
        axes.autoscale_view()
    else:
        if band:  # one outlier must not flatten the lines
            low = min(low, float(np.nanpercentile(band.low, 2)))
            high = max(high, float(np.nanpercentile(band.high, 98)))
        low = min(low, 0) if from_zero else low
        if high - low < 1e-9 * max(abs(low), abs(high)) or high == low:
            low, high = low - 0.1 * (abs(low) or 10), high + 0.1 * (abs(high) or 10)
        ticks = np.asarray(MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high))
        if is_percent and highest <= 100:
            ticks = ticks[(ticks >= 0) & (ticks <= 100)]
        axes.set_yticks(ticks)
        axes.set_ylim(ticks[0], ticks[-1])
        decimals = max(0, -min(int(Decimal(f"{tick:.9g}").normalize().as_tuple().exponent) for tick in ticks))
        axes.yaxis.set_major_formatter(StrMethodFormatter(f"{{x:,.{decimals}f}}"))


def _x_limits(x: Sequence[float]) -> tuple[float, float]:
    return (x[0], x[-1]) if len(x) > 1 else (x[0] - 1, x[0] + 1)


def _isolated_and_last(is_finite: np.ndarray) -> list[int]:
    """Indices of points to mark: those without neighbours, which draw no line, and the last one."""
    padded = np.pad(is_finite, 1)
    isolated = np.flatnonzero(is_finite & ~padded[:-2] & ~padded[2:])
    return sorted({*isolated.tolist(), int(np.flatnonzero(is_finite)[-1])})


def _tooltips(axes: Axes, lines: Sequence[Line], x_name: str, unit: str, x_labels: Sequence[str]) -> str:
    """A transparent strip per x, with its values as the title that browsers show under the pointer."""
    x = list(map(float, lines[0].x))
    low, high = axes.get_xlim()
    edges = [low, *((a + b) / 2 for a, b in pairwise(x)), high]
    pixels = axes.transData.transform([(edge, axes.get_ylim()[0]) for edge in edges])[:, 0]
    box = axes.get_window_extent()
    strips = []
    for i, (start, end) in enumerate(pairwise(pixels)):
        values = "; ".join(
            f"{line.name if len(lines) > 1 else ''} {_number(line.y[i])} {unit}".strip()
            for line in lines
            if math.isfinite(line.y[i])
        )
        where = x_labels[i] if x_labels else f"{x_name} {x[i]:,.0f}"
        strips.append(
            f'<rect class="strip" x="{start:.1f}" y="{HEIGHT_PX - box.y1:.1f}" width="{end - start:.1f}" '
            f'height="{box.height:.1f}"><title>{escape(f"{where}: {values}")}</title></rect>'
        )
    return "".join(strips)


def _number(value: float) -> str:
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _inline(svg: str, label: str, tooltips: str) -> Markup:
    """The SVG element of matplotlib's file with the page's fonts and colors, an accessible name and tooltips."""
    svg = svg[svg.index("<svg") : svg.rindex("</svg>")]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)  # of groups; the same in every chart
    svg = re.sub(r"font-(size|family): [^;]*; ?", "", svg).replace("xlink:href", "href")
    for color, name in PROPERTIES.items():
        svg = svg.replace(color, f"var(--{name})")
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    start = f'<svg viewBox="0 0 {WIDTH_PX} {HEIGHT_PX}" role="img" aria-label="{escape(label)}">'
    return Markup(re.sub(r"^<svg[^>]*>", lambda _: start, svg) + tooltips + "</svg>")
