"""What a task adds to the report of a training run: tables and images as HTML that stands on its own.

Every function returns a fragment without scripts and without anything fetched from elsewhere. `STYLE` is the style
sheet of these fragments; its colours are custom properties (`--ink`, `--soft`, `--line`, `--faint`, `--blue-cell`,
`--orange-cell`) that the page around them sets, once for light and once for dark.
"""

from __future__ import annotations

import base64
import colorsys
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mobilevit.images import to_rgb

MAX_CLASSES = 20  # a heat map of more is too small to read, and a longer table is folded away
MAX_ROWS = 1000  # of the table of classes, so that a report stays a file one can send
MAX_MISTAKES = 32
THUMBNAIL_PX = 160
FIGURE_PX = 360  # of an image with boxes or classes drawn on it
LETTER_PX = 11  # height of the letters on it
MAX_TOLD = 5  # boxes of a kind that a caption names
NOTHING = "&ndash;"  # where there is no number

STYLE = """
.scroll { overflow-x: auto; }
.note { color: var(--soft); font-size: .94em; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; line-height: 1.35; }
table.wide { width: 100%; }
caption { text-align: left; color: var(--soft); padding-bottom: .5rem; }
th, td { padding: .32rem 0 .32rem 1.4rem; text-align: right; vertical-align: baseline; font-weight: 400; }
th:first-child, td:first-child { padding-left: 0; text-align: left; }
table.text th, table.text td { text-align: left; }
thead th { color: var(--soft); font-size: .84em; vertical-align: bottom; border-bottom: 1px solid var(--line); }
tbody tr + tr > * { border-top: 1px solid var(--faint); }
td { white-space: nowrap; }
tbody th { overflow-wrap: anywhere; min-width: 6em; }
table.text td { white-space: normal; overflow-wrap: anywhere; }
.bar { display: inline-block; width: 4.5em; height: .5em; margin-right: .7em; background: var(--faint); }
.bar i { display: block; height: 100%; background: var(--blue); }
.bar + span { display: inline-block; text-align: right; }
.heat { font-size: .86em; }
.heat table { border-collapse: separate; border-spacing: 2px; }
.heat tbody tr > * { border: 0; }
.heat thead th { border: 0; padding: 0 0 .3rem; text-align: center; }
.heat thead span { display: inline-block; text-align: left; writing-mode: vertical-rl; transform: rotate(180deg);
  max-height: 9em; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.heat .short thead span { writing-mode: horizontal-tb; transform: none; }
.heat tbody th { padding: 0 .6rem 0 0; text-align: right; max-width: 11em; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; position: sticky; left: 0; background: var(--paper); }
.heat td, .heat td:first-child { --cell: var(--orange-cell); text-align: center; padding: .28rem .3rem;
  min-width: 2.3em; background: color-mix(in srgb, var(--cell) calc(var(--share) * 100%), var(--paper)); }
.heat td.right { --cell: var(--blue-cell); font-weight: 600; }
.heat td.none { color: var(--soft); background: color-mix(in srgb, var(--faint) 55%, var(--paper)); }
.heat thead td:first-child { background: none; text-align: right; color: var(--soft); vertical-align: bottom; }
.mistakes { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: 1.4rem 1rem;
  list-style: none; margin: 0; padding: 0; }
.mistakes figure { margin: 0; }
.mistakes img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--faint); }
.mistakes figcaption { font-size: .86em; line-height: 1.4; padding-top: .45rem; overflow-wrap: anywhere; }
.mistakes span { display: block; }
.mistakes .name { color: var(--soft); font-size: .9em; }
.drawn { grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); }
.mistakes svg { display: block; width: 100%; height: auto; }
.mistakes .three { display: grid; grid-template-columns: repeat(3, 1fr); gap: 3px; }
.mistakes .three img { aspect-ratio: auto; }
.swatch { display: inline-block; width: .8em; height: .8em; margin-right: .35em; vertical-align: -.05em; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 1.2rem 1rem;
  list-style: none; margin: 0; padding: 0; }
.curves svg { display: block; width: 100%; height: auto; }
.curves figure { margin: 0; }
.curves figcaption { font-size: .86em; line-height: 1.35; overflow-wrap: anywhere; }
"""


class Drawn(NamedTuple):
    """An image and boxes to draw on it: corners x1, y1, x2, y2 in its pixels, each with a text."""

    image: Image.Image
    name: str
    truth: Sequence[tuple[Sequence[float], str]]
    found: Sequence[tuple[Sequence[float], str]]


class Painted(NamedTuple):
    """An image and the classes of its pixels, as they are and as they were found; 255 is to be ignored.

    The masks (h, w) are uint8 and may be smaller than the image. `share` is the mean IoU of the image.
    """

    image: Image.Image
    name: str
    truth: np.ndarray
    found: np.ndarray
    share: float


def confusion_html(counts: np.ndarray, class_names: Sequence[str], unit: str = "images") -> str:
    """Which class is taken for which: a heat map up to 20 classes, the 20 most frequent confusions beyond.

    `counts` (C, C) are images, a row for the true class and a column for the predicted one. Of another `unit`, whose
    numbers are too long for a cell, the map gives shares of a row in per cent.
    """
    _check(counts, class_names)
    if len(class_names) <= MAX_CLASSES:
        return _heat_map(counts, class_names, unit)
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    # Stable, so that equal counts stay in the order of the classes.
    most = np.argsort(-wrong, axis=None, kind="stable")[:20]
    pairs = [(int(i), int(j)) for i, j in zip(*np.unravel_index(most, wrong.shape), strict=True) if wrong[i, j]]
    if not pairs:
        return f"<p>No {unit.removesuffix('s')} was taken for another class.</p>"
    rows = [
        (
            escape(class_names[i]),
            escape(class_names[j]),
            f"{wrong[i, j]:,}",
            _share_cell(wrong[i, j] / counts[i].sum()),
        )
        for i, j in pairs
    ]
    columns = ("Class", "taken for", unit, "share of the class, %")
    return table(columns, rows, caption=f"The {len(rows)} most frequent confusions, of {wrong.sum():,} in all.")


def per_class_html(counts: np.ndarray, class_names: Sequence[str]) -> str:
    """A table of the classes, the one found least often first: images, recall, precision; 20 rows, the rest folded.

    `counts` as in `confusion_html`. A class without images has no recall, one never predicted has no precision.
    """
    _check(counts, class_names)
    right, num_true, num_predicted = np.diag(counts), counts.sum(1), counts.sum(0)
    recall = [int(r) / int(n) if n else math.nan for r, n in zip(right, num_true, strict=True)]
    precision = [int(r) / int(n) if n else math.nan for r, n in zip(right, num_predicted, strict=True)]
    # 2 comes behind every share: what cannot be measured is not worst.
    order = sorted(
        range(len(class_names)), key=lambda i: tuple(2 if math.isnan(x[i]) else x[i] for x in (recall, precision))
    )
    rows = [
        (escape(class_names[i]), f"{num_true[i]:,}", _share_cell(recall[i]), _share_cell(precision[i]))
        for i in order[:MAX_ROWS]
    ]
    columns = ("Class", "images", "found (recall), %", "right when named (precision), %")
    shown = table(columns, rows[:MAX_CLASSES], caption="The class that is found least often comes first.", wide=True)
    if len(rows) <= MAX_CLASSES:
        return shown
    rest = f"The next {len(rows) - MAX_CLASSES:,} classes"
    if len(order) > len(rows):
        rest += f" of {len(order) - MAX_CLASSES:,}"
    return f"{shown}\n<details><summary>{rest}</summary>\n{table(columns, rows[MAX_CLASSES:], wide=True)}\n</details>"


def mistakes_html(mistakes: Sequence[tuple[Image.Image, str, str, float, str]]) -> str:
    """A grid of images that the network got wrong, at most 32: (image, truth, predicted, probability, name)."""
    if not mistakes:
        return "<p>No mistakes to show.</p>"
    cells = []
    for image, truth, predicted, probability, name in mistakes[:MAX_MISTAKES]:
        truth, predicted, name = escape(truth), escape(predicted), escape(name)
        sure = f", {100 * probability:.0f}&nbsp;%" if math.isfinite(probability) else ""
        cells.append(
            f'<li><figure><img src="{thumbnail(image, name)}" alt="{truth}, taken for {predicted}" loading="lazy">'
            f"<figcaption><span><b>{truth}</b></span><span>taken for <b>{predicted}</b>{sure}</span>"
            f'<span class="name">{name}</span></figcaption></figure></li>'
        )
    return '<ul class="mistakes">\n' + "\n".join(cells) + "\n</ul>"


def figures_html(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], caption: str) -> str:
    """A table of the classes, the lowest of the last figure first; 20 rows, the rest folded.

    `rows` are those of `mobilevit.tasks.Results.per_class`, `columns` the headings by the names of their figures: whole
    numbers as they are, all else in per cent, None where there is none (such classes come last).
    """
    last = list(columns)[-1]
    order = sorted(rows, key=lambda row: (row[last] is None, row[last] or 0))
    cells = [(escape(row["class"]), *(_figure_cell(row[name]) for name in columns)) for row in order[:MAX_ROWS]]
    headings = ("Class", *columns.values())
    shown = table(headings, cells[:MAX_CLASSES], caption=caption, wide=True)
    if len(cells) <= MAX_CLASSES:
        return shown
    rest = f"The next {len(cells) - MAX_CLASSES:,} classes"
    return f"{shown}\n<details><summary>{rest}</summary>\n{table(headings, cells[MAX_CLASSES:], wide=True)}\n</details>"


def curves_html(curves: np.ndarray, class_names: Sequence[str]) -> str:
    """Precision against recall, one small figure a class, the mean of all first, then the lowest; 20 at most.

    `curves` (C, 101) are precisions at recall 0, 0.01 ... 1; NaN for a class without boxes.
    """
    areas = curves.mean(1)
    measured = [i for i in np.argsort(areas, kind="stable").tolist() if not math.isnan(areas[i])]
    if not measured:
        return "<p>No boxes, no curves.</p>"
    figures = [("all classes", curves[measured].mean(0)), *((class_names[i], curves[i]) for i in measured)]
    if len(measured) == 1:
        figures = figures[1:]
    cells = []
    for name, curve in figures[: MAX_CLASSES + 1]:
        name, percent = escape(name), f"{100 * curve.mean():.1f}"
        points = " ".join(f"{10 + x:.0f},{110 - 100 * y:.1f}" for x, y in enumerate(curve.tolist()))
        cells.append(
            f'<li><figure><svg viewBox="0 0 120 120" role="img" aria-label="{name}: average precision {percent} %">'
            '<path d="M10 10V110H110" fill="none" stroke="var(--line)"/>'
            '<path d="M10 60H110M60 10V110" fill="none" stroke="var(--faint)"/>'
            f'<polyline points="{points}" fill="none" stroke="var(--blue)" stroke-width="1.6"/></svg>'
            f"<figcaption><b>{name}</b> {percent}&nbsp;%</figcaption></figure></li>"
        )
    left = len(figures) - len(cells)
    more = f" The lowest {len(cells) - 1}; {left} more are not drawn." if left else ""
    return (
        '<p class="note">Precision (upwards, 0 to 100 %) at every recall (to the right) for boxes that overlap by an '
        f"IoU of 0.5 or more; the number is the area below.{more}</p>\n"
        f'<ul class="curves">\n{chr(10).join(cells)}\n</ul>'
    )


def boxes_html(images: Sequence[Drawn]) -> str:
    """A grid of images with their boxes: what was annotated in full lines, what was found in dashed ones."""
    cells = []
    for image, name, truth, found in images:
        # In pixels of the page, whatever those of the image are; one that is narrow stands in the middle.
        scale = FIGURE_PX / max(image.size)
        width, height = (scale * side for side in image.size)
        left = (width - FIGURE_PX) / 2
        name = escape(name)
        taken: list[_Corners] = []
        boxes, labels = "", ""
        for is_found, of_kind in ((False, truth), (True, found)):
            for corners, text in of_kind:
                at_page = tuple(scale * x for x in corners)
                boxes += _box_svg(at_page, is_found)
                labels += _label_svg(at_page, text, (width, height), taken, is_found)
        told = [f"{kind}: {_told(these)}" for kind, these in {"annotated": truth, "found": found}.items()]
        frame = f"{left:.1f} 0 {FIGURE_PX} {height:.1f}"
        cells.append(
            f'<li><figure><svg viewBox="{frame}" role="img" aria-label="{"; ".join(told)}">'
            f'<image width="{width:.1f}" height="{height:.1f}" preserveAspectRatio="none" '
            f'href="{thumbnail(image, name, FIGURE_PX)}"/>{boxes}{labels}</svg>'
            f'<figcaption>{"".join(f"<span>{one}</span>" for one in told)}<span class="name">{name}</span>'
            "</figcaption></figure></li>"
        )
    return (
        '<p class="note">Full lines, their names at the upper edge: what was annotated. Dashed lines, names and scores '
        "at the lower edge: what was found. A name for which there is no room is left out.</p>\n"
        '<ul class="mistakes drawn">\n' + "\n".join(cells) + "\n</ul>"
    )


def masks_html(sources: Sequence[Painted], class_names: Sequence[str]) -> str:
    """A grid of images, each three times: painted with the true classes, with those found, and where they differ."""
    cells = []
    for source, name, truth, found, share in sources:
        name = escape(name)
        small = source.copy()
        small.thumbnail((FIGURE_PX, FIGURE_PX), Image.Resampling.LANCZOS)
        truth, found = (_mask_at(mask, small.size) for mask in (truth, found))
        is_wrong = (truth != found) & (truth != 255)
        # Without colour, for whoever cannot tell the classes' colours apart.
        wrong = Image.fromarray(np.where(is_wrong, 255, 40).astype(np.uint8)).convert("RGB")
        panels = [("as annotated", _paint(small, truth, class_names)), ("as found", _paint(small, found, class_names))]
        panels.append(("what is wrong, in white", wrong))
        images = "".join(
            f'<img src="{thumbnail(image, name, FIGURE_PX)}" alt="{name}, {told}" title="{told}" loading="lazy">'
            for told, image in panels
        )
        seen: list[int] = sorted({*np.unique(truth).tolist(), *np.unique(found).tolist()} - {255})
        legend = "".join(
            f'<span><i class="swatch" style="background:rgb{_colour(i)}"></i>{escape(class_names[i])}: '
            f"{_percent(truth == i)} annotated, {_percent((found == i) & (truth != 255))} found</span>"
            for i in seen
        )
        cells.append(
            f'<li><figure><div class="three">{images}</div><figcaption><span><b>{100 * share:.1f}&nbsp;%</b> mean IoU'
            f'</span>{legend}<span class="name">{name}</span></figcaption></figure></li>'
        )
    return (
        '<p class="note">From left to right: as annotated, as found, and in white what is wrong.</p>\n'
        '<ul class="mistakes drawn">\n' + "\n".join(cells) + "\n</ul>"
    )


def thumbnail(source: Image.Image, name: str = "image", size_px: int = THUMBNAIL_PX) -> str:
    """A JPEG of at most `size_px` a side as a data URL; images far smaller than that are enlarged pixel by pixel."""
    image = to_rgb(source, name)
    if image is source:
        image = image.copy()  # thumbnail() works in place
    if (times := size_px // max(image.size)) > 1:
        image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    else:
        image.thumbnail((size_px, size_px), Image.Resampling.LANCZOS)
    return jpeg_url(image, quality=80)


def jpeg_url(image: Image.Image, quality: int) -> str:
    """The image as a JPEG in a data URL; `quality` as Pillow has it, 0 to 95."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    caption: str = "",
    text: bool = False,
    wide: bool = False,
) -> str:
    """A table of HTML cells whose first column names the row; numbers stand right unless it is `text`."""
    kind = " ".join(["text"] * text + ["wide"] * wide)
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    body = "\n".join(
        f'<tr><th scope="row">{name}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
        for name, *cells in rows
    )
    return (
        f'<div class="scroll"><table class="{kind}">'
        + (f"<caption>{caption}</caption>" if caption else "")
        + (f"<thead><tr>{head}</tr></thead>" if any(columns) else "")
        + f"<tbody>\n{body}\n</tbody></table></div>"
    )


def bar(share: float, number: str, num_letters: int) -> str:
    """A small horizontal bar, filled to `share` (0..1), and the `number` that it repeats, as wide as `num_letters`.

    The bars of a column begin at the same place where all their numbers have the same `num_letters`.
    """
    return (
        f'<span class="bar" aria-hidden="true"><i style="width:{100 * share:.1f}%"></i></span>'
        f'<span style="min-width:{num_letters}ch">{number}</span>'
    )


def _share_cell(share: float) -> str:
    return NOTHING if math.isnan(share) else bar(share, f"{100 * share:.1f}", len("100.0"))


def _figure_cell(value: float | None) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return NOTHING if value is None else _share_cell(value / 100)


_Corners = tuple[float, float, float, float]


def _told(boxes: Sequence[tuple[Sequence[float], str]]) -> str:
    more = f" and {len(boxes) - MAX_TOLD} more" if len(boxes) > MAX_TOLD else ""
    return escape(", ".join(text for _, text in boxes[:MAX_TOLD])) + more or "nothing"


def _box_svg(corners: Sequence[float], is_found: bool) -> str:
    left, top, right, bottom = corners
    box = f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}" fill="none" '
    dashes = ' stroke-dasharray="7 4"' if is_found else ""
    # Black below it, so that both can be seen on any image.
    return (
        f'{box}stroke="#000" stroke-width="3.5"{dashes}/>'
        f'{box}stroke="{"#ffb000" if is_found else "#ffffff"}" stroke-width="1.8"{dashes}/>'
    )


def _label_svg(
    corners: Sequence[float], text: str, size: tuple[float, float], taken: list[_Corners], is_found: bool
) -> str:
    """The name of a box on an image of `size`, where none of `taken` is, to which its place is added.

    "" where there is no room. A name that is wider than the image may use the figure's margins beside it. Its looks
    are a style, since the page has one for the text of all figures.
    """
    letters = int(FIGURE_PX / (0.6 * LETTER_PX))  # about as wide as the letters of a page are
    if len(text) > letters:
        text = text[: letters - 1] + "…"
    width = 0.6 * LETTER_PX * len(text)
    right, bottom = size
    x = min(max(corners[0] + 4, 0), right - width) if width <= right else (right - width) / 2
    line = LETTER_PX + 1
    first = corners[3] - 4 - line if is_found else corners[1] + 1
    for step in range(4):  # away from the edge of the box that it belongs to
        y = min(max(first + (-step if is_found else step) * line, 0), bottom - line)
        place = (x, y, x + width, y + line)
        if not any(_meet(place, other) for other in taken):
            taken.append(place)
            return (
                f'<text x="{x:.1f}" y="{y + LETTER_PX:.1f}" style="font-size:{LETTER_PX}px;'
                f'fill:{"#ffb000" if is_found else "#ffffff"};stroke:#000;stroke-width:2.5;paint-order:stroke">'
                f"{escape(text)}</text>"
            )
    return ""


def _meet(a: _Corners, b: _Corners) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _mask_at(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))


def _paint(image: Image.Image, mask: np.ndarray, class_names: Sequence[str]) -> Image.Image:
    """The image in grey with the colours of its classes over it; no colour for the background and what is ignored."""
    grey = np.asarray(image.convert("L").convert("RGB")).astype(np.float32)
    colours = np.zeros((256, 3), np.float32)
    strength = np.zeros((256, 1), np.float32)
    for i, name in enumerate(class_names):
        colours[i] = _colour(i)
        strength[i] = 0 if name.lower() == "background" else 0.6
    mixed = grey * (1 - strength[mask]) + colours[mask] * strength[mask]
    return Image.fromarray(mixed.round().astype(np.uint8))


def _colour(number: int) -> tuple[int, int, int]:
    """Of a class: a turn by the golden angle from the one before it, so that neighbours are far apart."""
    red, green, blue = colorsys.hls_to_rgb((number * 0.381966) % 1, 0.45 if number % 2 else 0.6, 0.85)
    return round(255 * red), round(255 * green), round(255 * blue)


def _percent(where: np.ndarray) -> str:
    return f"{100 * where.mean():.1f}&nbsp;%"


def _heat_map(counts: np.ndarray, class_names: Sequence[str], unit: str) -> str:
    names = [escape(name) for name in class_names]
    head = "".join(f'<th scope="col" title="{name}"><span>{name}</span></th>' for name in names)
    rows = []
    for i, (name, row) in enumerate(zip(names, counts.tolist(), strict=True)):
        total = max(sum(row), 1)
        cells = []
        for j, n in enumerate(row):
            kind = "none" if not n else "right" if i == j else "wrong"
            said = f"{name}: {n:,} of {sum(row):,} {unit} ({100 * n / total:.1f} %) taken for {names[j]}"
            shown = f"{n:,}" if unit == "images" else f"{100 * n / total:.0f}"
            # One mistake among hundreds is still to be seen: the root lifts small shares.
            shade = (n / total) ** (1 / 3)
            style = f' style="--share:{shade:.3f}"' if n else ""
            cells.append(f'<td class="{kind}"{style} title="{said}">{shown if n else "·"}</td>')
        rows.append(f'<tr><th scope="row" title="{name}">{name}</th>{"".join(cells)}</tr>')
    body = "\n".join(rows)
    short = ' class="short"' if all(len(name) <= 3 for name in class_names) else ""
    told = unit.capitalize() if unit == "images" else f"{unit.capitalize()}, in per cent of the row,"
    # Not a caption, which would be as wide as the table and scroll with it on a narrow screen.
    return (
        f'<p class="note">{told} by true class (rows) and predicted class (columns). The diagonal, in bold, is right; '
        "the stronger the colour, the larger the share of the row.</p>\n"
        f'<div class="scroll heat"><table{short} aria-label="{unit.capitalize()} by true and predicted class">'
        f"<thead><tr><td>true \\ predicted</td>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>"
    )


def _check(counts: np.ndarray, class_names: Sequence[str]) -> None:
    C = len(class_names)
    assert counts.shape == (C, C), f"counts of shape {counts.shape} for {C} classes"
    assert counts.dtype.kind in "iu", "images are counted in whole numbers"
