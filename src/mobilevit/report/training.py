"""The report of a training run: one HTML file with everything in it, to be opened anywhere and shown to anyone.

Nothing is fetched: figures are SVG drawn here, images are part of the file, fonts are those of the reader's machine.
There is no script either; a browser shows the values behind a figure while the pointer rests on it.
"""

from __future__ import annotations

import json
import math
import re
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from itertools import pairwise
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from mobilevit.files import write_whole
from mobilevit.recipes import RECIPES, Recipe
from mobilevit.report.results import NOTHING, STYLE, bar, table

MAX_POINTS = 240  # of a line; more than one in two pixels cannot be told apart
MAX_EPOCH_ROWS = 200
WIDTH, HEIGHT, TOP, RIGHT, BOTTOM = 420, 236, 10, 14, 40  # of a figure and of its margins; the left one fits its labels
STEP_FIELDS = ("step", "size_px", "images", "loss", "lr", "images_per_second")
# What a number is counted in, by the name of its field or by the end of that name.
UNITS = {
    "batch_size": "images",
    "max_unreadable": "images",
    "micro_batch_size": "images",
    "epochs": "epochs",
    "px": "px",
    "steps": "updates",
    "workers": "processes",
    "top1": "%",
    "top5": "%",
    **dict.fromkeys(("ap", "ap50", "ap75", "small", "medium", "large", "miou", "accuracy"), "%"),
}

NAMES = {"top1": "top-1", "top5": "top-5", "miou": "mIoU", "unreadable": "images that cannot be read"}


@dataclass(frozen=True)
class Origin:
    """How a run was started: the named recipe that its recipe was derived from, and the command; "" if unknown."""

    recipe_name: str = ""
    command: str = ""


@dataclass(frozen=True)
class Line:
    """A line of a chart: where it goes and what it is called; NaN leaves a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    kind: str = "main"  # main, second or third: colour and dashes


@dataclass(frozen=True)
class Band:
    """An area behind the lines of a chart, from `low` to `high`."""

    name: str
    x: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def write_report(
    path: Path,
    *,
    title: str,
    recipe: Recipe,
    origin: Origin,
    epochs: Sequence[Mapping[str, float]],
    steps: Path,
    sections: Sequence[tuple[str, str]],
    facts: Mapping[str, str],
    commands: Sequence[tuple[str, str]],
) -> None:
    """Write the report of a run to `path`, whole or not at all.

    `epochs` are the metrics of the epochs, `steps` the file with a JSON object an update, which may be missing.
    `sections` are (title, HTML) of the task, `facts` the circumstances, `commands` (purpose, command) what to do next.
    """
    updates = _read_steps(steps)
    parts = [
        ("Epochs", _epochs_html(epochs)),
        ("Updates", _updates_html(updates)),
        *sections,
        ("What to do next", _commands_html(commands)),
        ("Recipe", _recipe_html(recipe, origin)),
        ("Environment", _facts_html(facts)),
    ]
    parts = [(heading, html) for heading, html in parts if html]
    links = "".join(f'<li><a href="#part-{i}">{escape(heading)}</a></li>' for i, (heading, _) in enumerate(parts))
    body = "\n".join(
        f'<section id="part-{i}" aria-labelledby="heading-{i}"><h2 id="heading-{i}">{escape(heading)}</h2>\n'
        f"{html}\n</section>"
        for i, (heading, html) in enumerate(parts)
    )
    page = PAGE.format(
        title=escape(title), style=STYLE + PAGE_STYLE, summary=_summary_html(epochs, updates), links=links, body=body
    )
    # File names that are not UTF-8 come as lone surrogates, which UTF-8 cannot hold.
    write_whole(path, lambda aside: aside.write_text(page, encoding="utf-8", errors="backslashreplace"))


# ---------------------------------------------------------------------------------------------------------------------
# What the file of updates holds


@dataclass(frozen=True)
class Updates:
    """Columns of steps.jsonl, in the order of the updates; NaN for what a line did not say."""

    step: np.ndarray
    size_px: np.ndarray
    images: np.ndarray
    loss: np.ndarray
    lr: np.ndarray
    images_per_second: np.ndarray
    num_unreadable: int = 0


def _read_steps(path: Path) -> Updates:
    columns = {name: array("d") for name in STEP_FIELDS}  # 8 bytes a number: a long run has millions
    num_unreadable = 0
    if path.exists():
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    record = json.loads(line)
                    values = [_number(record.get(name)) for name in STEP_FIELDS]
                except (json.JSONDecodeError, AttributeError):  # cut short when the run was stopped
                    num_unreadable += bool(line.strip())
                    continue
                if math.isfinite(values[0]):
                    for column, value in zip(columns.values(), values, strict=True):
                        column.append(value)
    arrays = {name: np.array(column, dtype=np.float64) for name, column in columns.items()}
    # A resumed run repeats the updates after its checkpoint: the last line about an update is the one that counts.
    _, last = np.unique(arrays["step"][::-1], return_index=True)
    order = len(arrays["step"]) - 1 - last
    return Updates(**{name: column[order] for name, column in arrays.items()}, num_unreadable=num_unreadable)


def _number(value: object) -> float:
    return float(value) if isinstance(value, Real) else math.nan


def _over_finite(function: Callable[[np.ndarray], Any], values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(function(finite)) if len(finite) else math.nan


# ---------------------------------------------------------------------------------------------------------------------
# The parts of the page


def _summary_html(epochs: Sequence[Mapping[str, float]], updates: Updates) -> str:
    cards: list[tuple[str, str, str]] = []
    name = _headline(epochs)
    values = [(_epoch(record, i), _number(record.get(name))) for i, record in enumerate(epochs)]
    values = [(epoch, value) for epoch, value in values if math.isfinite(value)]
    if values:
        best = _best(name, values)
        num_images = _number(epochs[-1].get("val_num_images"))
        on = f", on {num_images:,.0f} images" if math.isfinite(num_images) else ""
        what = f"Validation {_metric_name(name)}"
        cards.append((f"{what}, best", _value(name, best[1]), f"epoch {best[0]:g} of {len(epochs):,}"))
        cards.append((f"{what}, last", _value(name, values[-1][1]), f"epoch {values[-1][0]:g}{on}"))
    seconds = [_number(record.get("seconds")) for record in epochs]
    known = [s for s in seconds if math.isfinite(s)]
    if known:
        cards.append(("Time", duration(sum(known)), f"{duration(sum(known) / len(known))} an epoch"))
    if len(updates.step):
        seen = _over_finite(np.sum, updates.images)
        speed = _over_finite(np.median, updates.images_per_second)
        note = f"{_amount(speed)} a second, median" if math.isfinite(speed) else ""
        if math.isfinite(seen):
            cards.append(("Images seen", _amount(seen), note))
            note = f"{_amount(seen / len(updates.step))} images each, on average"
        cards.append(("Updates", _amount(len(updates.step)), note))
    shares = [
        (_number(record.get("data_wait_fraction")), s if math.isfinite(s) else 1.0)
        for record, s in zip(epochs, seconds, strict=True)
    ]
    shares = [(share, s) for share, s in shares if math.isfinite(share)]
    if total := sum(s for _, s in shares):
        share = sum(share * s for share, s in shares) / total
        cards.append(("Waiting for data", f"{100 * share:.1f} %", "of the time in training"))
    if not cards:
        return "<p>This run has left no figures.</p>"
    return (
        '<dl class="summary">\n'
        + "\n".join(
            f"<div><dt>{escape(label)}</dt><dd><strong>{escape(value).replace(' ', '&nbsp;')}</strong>"
            + (f"<span>{escape(note)}</span>" if note else "")
            + "</dd></div>"
            for label, value, note in cards
        )
        + "\n</dl>"
    )


def _epochs_html(epochs: Sequence[Mapping[str, float]]) -> str:
    if not epochs:
        return ""
    # The same epochs for every line of the page; the last one always belongs to them.
    every = math.ceil(len(epochs) / MAX_POINTS)
    kept = [(_epoch(record, i), record) for i, record in enumerate(epochs) if (len(epochs) - 1 - i) % every == 0]
    x = [epoch for epoch, _ in kept]

    def line(name: str, field: str, kind: str = "main") -> Line:
        return Line(name, x, [_number(record.get(field)) for _, record in kept], kind)

    raw, averaged = "raw weights", "averaged weights"
    losses = [
        line("training", "train_loss", "second"),
        line("validation", "val_loss"),
        line(f"validation, {raw}", "raw_loss", "third"),
    ]
    figures = [
        chart(
            "Loss",
            losses,
            x_name="epoch",
            note=_best_note("val_loss", epochs),
        )
    ]
    for field in _metrics(epochs):
        name, unit = _metric_name(field), _unit(field)
        lines = [line(averaged, field), line(raw, field.replace("val_", "raw_", 1), "second")]
        what = f"Validation {name}" + (f", {unit}" if unit else "")
        figures.append(chart(what, lines, x_name="epoch", unit=unit, note=_best_note(field, epochs)))
    speed = line("speed", "images_per_second")
    figures.append(chart("Training speed, images a second", [speed], x_name="epoch", from_zero=True))
    note = f"<p>Every {_nth(every)} epoch is drawn.</p>" if every > 1 else ""
    return f'<div class="figures">\n{"".join(figures)}</div>\n{note}{_epoch_table(epochs)}'


def _epoch_table(epochs: Sequence[Mapping[str, float]]) -> str:
    fields = ["train_loss", "val_loss", *_metrics(epochs)]
    fields += [f for f in (name.replace("val_", "raw_", 1) for name in fields[1:]) if any(f in e for e in epochs)]
    fields += ["images_per_second", "data_wait_fraction", "seconds"]
    fields = [f for f in fields if any(math.isfinite(_number(record.get(f))) for record in epochs)]
    heads = {
        "train_loss": "loss in training",
        "images_per_second": "images a second",
        "data_wait_fraction": "waiting for data, %",
        "seconds": "time, s",
    }

    def head(field: str) -> str:
        unit = f", {_unit(field)}" if _unit(field) else ""
        where = "validation" if field.startswith("val_") else "raw weights"
        return heads.get(field) or escape(f"{where} {_metric_name(field)}{unit}")

    def cell(field: str, record: Mapping[str, float]) -> str:
        value = _number(record.get(field))
        if not math.isfinite(value):
            return NOTHING
        if field == "data_wait_fraction":
            return f"{100 * value:.1f}"
        return _amount(value) if field in ("images_per_second", "seconds") else _plain(field, value)

    every = math.ceil(len(epochs) / MAX_EPOCH_ROWS)
    rows = [
        (f"{_epoch(record, i):g}", *(cell(field, record) for field in fields))
        for i, record in enumerate(epochs)
        if (len(epochs) - 1 - i) % every == 0
    ]
    name = "The numbers of every epoch" if every == 1 else f"The numbers of every {_nth(every)} epoch"
    columns = ("Epoch", *map(head, fields))
    return f"<details><summary>{name}</summary>\n{table(columns, rows, wide=True)}\n</details>"


def _updates_html(updates: Updates) -> str:
    n = len(updates.step)
    lost = f"<p>Lines of the record that could not be read: {updates.num_unreadable:,}.</p>"
    lost = lost if updates.num_unreadable else ""
    if not n:
        return lost
    # Up to 60 updates stand for themselves; beyond, a point is the mean of four or more, as few as MAX_POINTS allows.
    groups = np.array_split(np.arange(n), n if n <= 60 else min(max(60, n // 4), MAX_POINTS))
    x = [float(updates.step[g].mean()) for g in groups]
    low, mean, high = (
        [_over_finite(function, updates.loss[g]) for g in groups] for function in (np.min, np.mean, np.max)
    )
    size = len(groups[0])
    together = f"mean of {size:,} updates" if size > 1 else "every update"
    bands = [Band("smallest to largest", x, low, high)] if size > 1 else []
    spans = [f"updates {updates.step[g[0]]:,.0f} to {updates.step[g[-1]]:,.0f}" for g in groups]
    figures = [chart("Loss by update", [Line(together, x, mean)], bands, x_name="update", at=spans)]
    # Not means: the first rate, the highest and the last are to be read off.
    chosen = np.unique(np.linspace(0, n - 1, min(n, MAX_POINTS)).round().astype(int))
    chosen = np.union1d(chosen, [np.nan_to_num(updates.lr, nan=-1.0).argmax()])
    line = Line("learning rate", updates.step[chosen].tolist(), updates.lr[chosen].tolist())
    figures.append(chart("Learning rate", [line], x_name="update", from_zero=True))
    return f'<div class="figures">\n{"".join(figures)}</div>\n{_sizes_html(updates)}{lost}'


def _sizes_html(updates: Updates) -> str:
    tail = updates.step > updates.step[-1] - 0.1 * (updates.step[-1] - updates.step[0] + 1)
    rows = []
    for size in np.unique(updates.size_px[np.isfinite(updates.size_px)]):
        these = updates.size_px == size
        loss = _over_finite(np.mean, updates.loss[these & tail])
        speed = _over_finite(np.median, updates.images_per_second[these])
        images = _over_finite(np.sum, updates.images[these])
        rows.append(
            (
                f"{size:g}&nbsp;px",
                bar(float(these.mean()), f"{these.sum():,}", len(f"{len(updates.step):,}")),
                _amount(images),
                f"{loss:.3f}" if math.isfinite(loss) else NOTHING,
                _amount(speed),
            )
        )
    if not rows:
        return ""
    columns = ("Image side", "updates", "images", "mean loss, last tenth of the run", "images a second, median")
    return f"<h3>By resolution</h3>\n{table(columns, rows, wide=True)}\n"


def _commands_html(commands: Sequence[tuple[str, str]]) -> str:
    return "\n".join(
        f'<div class="command"><p>{escape(purpose)}</p><pre><code>{_unbroken(command)}</code></pre></div>'
        for purpose, command in commands
    )


def _unbroken(command: str) -> str:
    """Escaped, every word an element of its own: browsers like to break a line behind the hyphens of an option."""
    return re.sub(r"\S+", r"<span>\g<0></span>", escape(command))


def _recipe_html(recipe: Recipe, origin: Origin) -> str:
    if origin.recipe_name:
        base, caption = RECIPES[origin.recipe_name], f"Recipe <b>{origin.recipe_name}</b>."
        than = "in this recipe"
    else:  # from Python, of an unknown origin
        base, caption = (Recipe() if recipe.task == "classify" else RECIPES[recipe.task]), ""
        than = "the default" if recipe.task == "classify" else f"in the recipe {recipe.task}"
    defaults = dict(_fields(asdict(base)))
    rows = []
    for name, value in _fields(asdict(recipe)):
        unit, default = _unit(name), defaults[name]
        said = _setting(value, unit)
        if value == default:
            rows.append((f"<code>{escape(name)}</code>", said, ""))
        else:
            mark = f'<b class="changed"><code>{escape(name)}</code></b>'
            rows.append((mark, f"<b>{said}</b>", f"instead of {_setting(default, unit)}"))
    caption = f"{caption} Bold and marked with a dot: other than {than}.".strip()
    command = _commands_html([("Started by", origin.command)]) if origin.command else ""
    return f"{command}\n{table(('Field', 'value', ''), rows, caption=caption, text=True)}"


def _facts_html(facts: Mapping[str, str]) -> str:
    rows = [(escape(name), escape(value)) for name, value in facts.items()]
    return table(("", ""), rows, text=True) if rows else ""


def _fields(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


# ---------------------------------------------------------------------------------------------------------------------
# Words and numbers


def duration(seconds: float) -> str:
    """A time in the two units that a person would name."""
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
        return NOTHING
    if abs(value) >= 1e6:
        return f"{value / 1e6:,.2f} million"
    return f"{value:,.0f}" if abs(value) >= 100 or value == round(value) else f"{value:.1f}"


def _nth(n: int) -> str:
    return {2: "second", 3: "third"}.get(n, f"{n}th")


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


def _setting(value: Any, unit: str) -> str:
    if isinstance(value, tuple | list):
        said = ", ".join(map(str, value))
    elif value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    else:
        said = f"{value:,}" if isinstance(value, int) else str(value)
    if value == 1 and unit:
        unit = {"processes": "process", "px": "px"}.get(unit, unit.removesuffix("s"))
    return escape(f"{said} {unit}".rstrip())


def _epoch(record: Mapping[str, float], index: int) -> float:
    epoch = _number(record.get("epoch"))
    return epoch if math.isfinite(epoch) else index + 1.0


def _metrics(epochs: Sequence[Mapping[str, float]]) -> list[str]:
    """The fields of validation metrics but for the loss and for counts, in the order of their first appearance.

    Unreadable images are among them if there were any.
    """
    fields = dict.fromkeys(field for record in epochs for field in record if field.startswith("val_"))
    if not any(record.get("val_unreadable") for record in epochs):
        fields.pop("val_unreadable", None)
    return [f for f in fields if f != "val_loss" and not f.startswith("val_num_")]


def _headline(epochs: Sequence[Mapping[str, float]]) -> str:
    metrics = _metrics(epochs)
    return (metrics or ["val_loss"])[0]  # tasks give the one that matters most first


def _best(field: str, values: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """(epoch, value), the first of equal ones; a loss or an error is best where it is smallest."""
    sign = -1 if field.endswith(("loss", "error")) else 1
    return max(values, key=lambda pair: (sign * pair[1], -pair[0]))


def _best_note(field: str, epochs: Sequence[Mapping[str, float]]) -> str:
    values = [(_epoch(record, i), _number(record.get(field))) for i, record in enumerate(epochs)]
    values = [(epoch, value) for epoch, value in values if math.isfinite(value)]
    if not values:
        return ""
    epoch, value = _best(field, values)
    of = "validation, best" if field == "val_loss" else "best"
    return f"{of} {_value(field, value)} in epoch {epoch:g}; last {_value(field, values[-1][1])}".capitalize()


def _any_finite(values: Iterable[float]) -> bool:
    return any(map(math.isfinite, values))


# ---------------------------------------------------------------------------------------------------------------------
# Charts


def chart(
    title: str,
    lines: Sequence[Line],
    bands: Sequence[Band] = (),
    *,
    x_name: str,
    unit: str = "",
    note: str = "",
    at: Sequence[str] = (),
    from_zero: bool = False,
) -> str:
    """A figure with `lines` over whole numbers (epochs, updates), or nothing where no line has a finite point.

    Several lines share their x. The y axis is logarithmic where the lines span more than a factor of 100. `at` says
    where the points are, for the values that appear under the pointer.
    """
    lines = [line for line in lines if _any_finite(line.y)]
    xs = sorted({x for line in lines for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)})
    if not xs:
        return ""
    ys = [y for line in lines for y in line.y if math.isfinite(y)]
    logarithmic = not from_zero and min(ys) > 0 and max(ys) > 100 * min(ys)
    # The lines have their full height; a band is led along by them, for one bad update must not flatten everything.
    extra = [y for band in bands for y in (*band.low, *band.high) if math.isfinite(y) and (y > 0 or not logarithmic)]
    middle, reach = (min(ys) + max(ys)) / 2, (max(ys) - min(ys)) or 1.0
    near = [y for y in extra if logarithmic or abs(y - middle) <= 1.5 * reach]
    if len(near) < len(extra):
        note = f"Beyond the edge of the figure: from {_readable(min(extra))} to {_readable(max(extra))}"
    floor = [0.0] if from_zero else []
    y_ticks = (log_ticks if logarithmic else ticks)(min(ys + near + floor), max(ys + near + floor))
    if unit == "%" and min(ys) >= 0 and max(ys) <= 100:  # nor does the axis leave what a share can be
        y_ticks = [y for y in y_ticks if 0 <= y <= 100]
    x_ticks = [x for x in ticks(xs[0], xs[-1], 6, whole=True) if xs[0] <= x <= xs[-1]]
    y_names = tick_names(y_ticks) if not logarithmic else [f"{y:g}" for y in y_ticks]
    left = max(34.0, 12 + 7 * max(map(len, y_names)))
    padding = 0.5 if len(xs) == 1 else 0.0
    x_low, x_high = xs[0] - padding, xs[-1] + padding

    def place_x(x: float) -> float:
        return left + (x - x_low) / (x_high - x_low) * (WIDTH - RIGHT - left)

    def place_y(y: float) -> float:
        scale: Callable[[float], float] = math.log if logarithmic else float
        low, high = scale(y_ticks[0]), scale(y_ticks[-1])
        y = max(y, y_ticks[0]) if logarithmic else y
        share = (scale(y) - low) / (high - low)
        return HEIGHT - BOTTOM - min(max(share, 0.0), 1.0) * (HEIGHT - BOTTOM - TOP)

    # --- Axes ---
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for y, name in zip(y_ticks, y_names, strict=True):
        h = f"{place_y(y):.1f}"
        kind = "axis" if y == y_ticks[0] else "grid"
        parts.append(f'<line class="{kind}" x1="{left:.1f}" x2="{right}" y1="{h}" y2="{h}"/>')
        parts.append(f'<text class="y" x="{left - 7:.1f}" y="{h}" dy=".35em">{name}</text>')
    for x, name in zip(x_ticks, tick_names(x_ticks), strict=True):
        parts.append(
            f'<line class="axis" x1="{place_x(x):.1f}" x2="{place_x(x):.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
        )
        parts.append(f'<text class="x" x="{place_x(x):.1f}" y="{bottom + 17}">{name}</text>')
    parts.append(f'<text class="name" x="{right}" y="{HEIGHT - 5}">{escape(x_name)}</text>')

    # --- Bands and lines ---
    for band in bands:
        for run in _runs(band.x, band.low, band.high):
            there = " L".join(f"{place_x(x):.1f} {place_y(high):.1f}" for x, _, high in run)
            back = " L".join(f"{place_x(x):.1f} {place_y(low):.1f}" for x, low, _ in reversed(run))
            parts.append(f'<path class="band" d="M{there} L{back} Z"/>')
    for line in lines:
        d = ""
        dots = []
        for run in _runs(line.x, line.y):
            points = [f"{place_x(x):.1f} {place_y(y):.1f}" for x, y in run]
            d += "M" + " L".join(points) if len(points) > 1 else ""
            # A point without neighbours would not be seen; the last one is where the run stands.
            if len(points) == 1 or run[-1] == _last(line):
                dots.append(points[-1].split())
        if d:
            parts.append(f'<path class="line {line.kind}" d="{d}"/>')
        parts += [f'<circle class="dot {line.kind}" cx="{cx}" cy="{cy}" r="3.2"/>' for cx, cy in dots]

    # --- What appears under the pointer: a strip for each x ---
    heard = dict(zip(lines[0].x, at, strict=True)) if at else {}
    values = [dict(zip(line.x, line.y, strict=True)) for line in lines]
    edges = [place_x(x_low), *(place_x((a + b) / 2) for a, b in pairwise(xs)), place_x(x_high)]
    for x, start, end in zip(xs, edges, edges[1:], strict=False):
        said = "; ".join(
            f"{line.name if len(lines) > 1 else ''} {_readable(value[x])} {unit}".strip()
            for line, value in zip(lines, values, strict=True)
            if math.isfinite(value.get(x, math.nan))
        )
        where = heard.get(x) or f"{x_name} {x:,.0f}"
        parts.append(
            f'<rect class="strip" x="{start:.1f}" y="{TOP}" width="{end - start:.1f}" height="{bottom - TOP}">'
            f"<title>{escape(f'{where}: {said}')}</title></rect>"
        )

    # The last values and the range, for who hears the figure instead of seeing it.
    told = "; ".join(f"{line.name}: {_course(line, x_name, unit)}" for line in lines)
    scale = "; the axis is logarithmic" if logarithmic else ""
    keys = [(line.kind, line.name) for line in lines] if len(lines) > 1 or bands else []
    keys += [("band", band.name) for band in bands]
    legend = "".join(f'<span class="key"><i class="{kind}"></i>{escape(name)}</span>' for kind, name in keys)
    return (
        f'<figure class="chart"><figcaption><strong>{escape(title)}</strong>'
        + (f'<span class="keys">{legend}</span>' if legend else "")
        + f'</figcaption>\n<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(f"{title} by {x_name}. {told}{scale}.")}">\n'
        + "\n".join(parts)
        + "\n</svg>"
        + (f"<p>{escape(note)}.</p>" if note else "")
        + "</figure>\n"
    )


def ticks(low: float, high: float, num: int = 5, *, whole: bool = False) -> list[float]:
    """About `num` round numbers whose first and last enclose `low` and `high`; whole numbers where so wanted."""
    if not high - low > 1e-9 * max(abs(low), abs(high)):
        around = abs(low) * 0.1 or 1.0
        low, high = (low, low) if whole else (low - around, low + around)
    step = (high - low) / num
    power = 10.0 ** math.floor(math.log10(step)) if step > 0 else 1.0
    step = next((m * power for m in (1, 2, 5, 10) if m * power >= step * (1 - 1e-9)), power)
    if whole:
        step = max(1.0, round(step))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    # Rounded, for 3 x 0.1 is not 0.3.
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 times them, that enclose `low` and `high` (above 0)."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [float(f"{m}e{p}") for p in powers for m in (1, 2, 5)]
    start = max(i for i, value in enumerate(values) if value <= low or i == 0)
    end = min(i for i, value in enumerate(values) if value >= high or i == len(values) - 1)
    values = values[start : end + 1]
    inner = [v for v in values[1:-1] if len(values) <= 7 or f"{v:e}".startswith("1")]
    return [values[0], *inner, values[-1]]


def tick_names(values: Sequence[float]) -> list[str]:
    """The numbers as text, all with the decimals that the finest of them needs."""
    fine = 1e-9 * max(map(abs, values))
    for decimals in range(7):
        names = [f"{value:,.{decimals}f}" if value else "0" for value in values]
        if all(
            math.isclose(float(n.replace(",", "")), v, rel_tol=0, abs_tol=fine)
            for n, v in zip(names, values, strict=True)
        ):
            return names
    return [f"{value:g}" for value in values]


def _runs(*columns: Sequence[float]) -> list[list[tuple[float, ...]]]:
    """The rows of `columns`, cut where one of their numbers is not finite."""
    runs: list[list[tuple[float, ...]]] = [[]]
    for row in zip(*columns, strict=True):
        if all(map(math.isfinite, row)):
            runs[-1].append(row)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _last(line: Line) -> tuple[float, ...]:
    return _runs(line.x, line.y)[-1][-1]


def _readable(value: float) -> str:
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _course(line: Line, x_name: str, unit: str) -> str:
    points = [point for run in _runs(line.x, line.y) for point in run]
    (x0, y0), (x1, y1) = points[0], points[-1]
    if len(points) == 1:
        return f"{_readable(y0)} {unit}".strip() + f" at {x_name} {x0:,.0f}"
    lowest, highest = (f"{_readable(f(y for _, y in points))} {unit}".strip() for f in (min, max))
    return (
        f"from {_readable(y0)} {unit}".strip()
        + f" at {x_name} {x0:,.0f} to {_readable(y1)} {unit}".rstrip()
        + f" at {x_name} {x1:,.0f}, between {lowest} and {highest}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# The page

# The policy makes the browser itself refuse whatever a section might fetch or run.
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<header>
<p class="kind">Training report</p>
<h1>{title}</h1>
{summary}
<nav aria-label="Parts of this page"><ul>{links}</ul></nav>
</header>
<main>
{body}
</main>
</body>
</html>
"""

# Blue and orange after Okabe and Ito, which stay apart for every kind of colour vision.
PAGE_STYLE = """
:root { color-scheme: light dark;
  --paper: #fdfdfc; --ink: #22262b; --soft: #5d656e; --line: #cfd4d9; --faint: #eff1f3;
  --blue: #0a6eb0; --orange: #c27400; --blue-cell: #62a9d8; --orange-cell: #eba52a; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #15181b; --ink: #e3e6e9; --soft: #9ba4ad; --line: #3a4148; --faint: #22272c;
  --blue: #62b0e6; --orange: #eba52a; --blue-cell: #24618d; --orange-cell: #9a620c; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0 auto; padding: 3.2rem 1.25rem 5rem; max-width: 60rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif; }
h1, h2, h3 { font-family: Charter, "Bitstream Charter", "Iowan Old Style", "Sitka Text", Cambria, Georgia,
  "Liberation Serif", serif; font-weight: 600; line-height: 1.2; text-wrap: balance; }
h1 { font-size: clamp(1.7rem, 5vw, 2.4rem); margin: 0 0 2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.45rem; margin: 0 0 1.3rem; }
h3 { font-size: 1.08rem; margin: 2rem 0 .7rem; }
p { margin: 0 0 .8rem; max-width: 42rem; }
a { color: var(--blue); text-underline-offset: .2em; text-decoration-thickness: 1px; }
a:focus-visible, summary:focus-visible { outline: 2px solid var(--blue); outline-offset: 3px; }
.kind { margin: 0 0 .35rem; color: var(--soft); }
section { margin-top: 3.2rem; padding-top: 1.5rem; border-top: 1px solid var(--line); scroll-margin-top: 1rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; margin: 2rem 0 0; padding: 0; list-style: none;
  font-size: .92em; }
.summary { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 1.5rem 1.6rem; margin: 0; }
.summary dt { color: var(--soft); font-size: .88em; }
.summary dd { margin: 0; }
.summary strong { display: block; font-size: 1.6rem; line-height: 1.3; font-weight: 600;
  font-variant-numeric: tabular-nums; }
.summary span { color: var(--soft); font-size: .88em; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 23rem), 1fr)); gap: 2rem 2.2rem;
  margin-bottom: 1.6rem; }
.chart { margin: 0; max-width: 34rem; break-inside: avoid; }
.chart figcaption { min-height: 3.1em; }
.chart figcaption strong { display: block; font-weight: 600; }
.chart p { margin: .1rem 0 0; color: var(--soft); font-size: .88em; }
.keys { display: flex; flex-wrap: wrap; gap: 0 1.2rem; font-size: .88em; color: var(--soft); }
.key i { display: inline-block; width: 1.5rem; margin-right: .45rem; vertical-align: .25em;
  border-top: 2px solid var(--blue); }
.key i.second { border-top: 2px dashed var(--orange); }
.key i.third { border-top: 2px dotted var(--soft); }
.key i.band { border-top: .6rem solid color-mix(in srgb, var(--blue) 22%, transparent); vertical-align: 0; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-size: 12px; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .x { text-anchor: middle; }
svg .y, svg .name { text-anchor: end; }
.grid { stroke: var(--faint); }
.axis { stroke: var(--line); }
.line { fill: none; stroke: var(--blue); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.line.second { stroke: var(--orange); stroke-dasharray: 6 4; stroke-linecap: butt; }
.line.third { stroke: var(--soft); stroke-dasharray: .1 4; }
.dot { fill: var(--blue); }
.dot.second { fill: var(--orange); }
.dot.third { fill: var(--soft); }
.band { fill: var(--blue); fill-opacity: .2; }
.strip { fill: transparent; }
.strip:hover { fill: var(--ink); fill-opacity: .08; }
details { margin-top: 1.2rem; }
summary { cursor: pointer; color: var(--blue); }
details[open] > summary { margin-bottom: .9rem; }
section > .scroll, details > .scroll { font-size: .94em; }
code, pre { font-family: ui-monospace, "SF Mono", "Cascadia Mono", Consolas, "Liberation Mono", monospace;
  font-size: .92em; }
.command + .command { margin-top: 1.2rem; }
.command p { margin-bottom: .35rem; }
pre { margin: 0; padding: .7rem .9rem; background: var(--faint); white-space: pre-wrap; overflow-wrap: anywhere;
  -webkit-user-select: all; user-select: all; }
pre span { display: inline-block; max-width: 100%; }
.changed::before { content: "•"; position: absolute; margin-left: -.75em; color: var(--orange); }
section > .scroll:has(.changed) { padding-left: .8em; margin-left: -.8em; }
@media (max-width: 34rem) {
  body { padding-top: 2rem; }
  .summary { grid-template-columns: 1fr 1fr; gap: 1.2rem 1rem; }
  .summary strong { font-size: 1.3rem; }
  .chart figcaption { min-height: 0; margin-bottom: .3rem; }
  svg text { font-size: 14px; }
  th, td { padding-left: .9rem; }
  .bar { display: none; }
  tbody th { min-width: 4.5em; }
}
@media print {
  @page { margin: 16mm; }
  :root { color-scheme: light;
    --paper: #fff; --ink: #000; --soft: #444; --line: #bbb; --faint: #eee;
    --blue: #0a6eb0; --orange: #c27400; --blue-cell: #62a9d8; --orange-cell: #eba52a; }
  body { padding: 0; max-width: none; font-size: 10pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .figures { grid-template-columns: 1fr 1fr; }
  .summary { grid-template-columns: 1fr 1fr 1fr; }
  .scroll { overflow: visible; }
  section { margin-top: 1.6rem; padding-top: 1rem; }
  h2, h3, summary { break-after: avoid; }
  figure, tr, .command, .summary div { break-inside: avoid; }
  nav { display: none; }
}
"""
