"""What a task adds to the report of a training run: tables and pictures as HTML that stands on its own.

Every function returns a fragment without scripts and without anything fetched from elsewhere. `STYLE` is the style
sheet of these fragments; its colours are custom properties (`--ink`, `--soft`, `--line`, `--faint`, `--blue-cell`,
`--orange-cell`) that the page around them sets, once for light and once for dark.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
from PIL import Image

from mobilevit.pictures import to_rgb

MAX_CLASSES = 20  # a heat map of more is too small to read, and a longer table is folded away
MAX_ROWS = 1000  # of the table of classes, so that a report stays a file one can send
MAX_MISTAKES = 32
THUMBNAIL_PX = 160
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
"""


def confusion_html(counts: np.ndarray, class_names: Sequence[str]) -> str:
    """Which class is taken for which: a heat map up to 20 classes, the 20 most frequent confusions beyond.

    `counts` (C, C) are pictures, a row for the true class and a column for the predicted one.
    """
    _check(counts, class_names)
    if len(class_names) <= MAX_CLASSES:
        return _heat_map(counts, class_names)
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    # Stable, so that equal counts stay in the order of the classes.
    most = np.argsort(-wrong, axis=None, kind="stable")[:20]
    pairs = [(int(i), int(j)) for i, j in zip(*np.unravel_index(most, wrong.shape), strict=True) if wrong[i, j]]
    if not pairs:
        return "<p>No picture was taken for another class.</p>"
    rows = [
        (
            escape(class_names[i]),
            escape(class_names[j]),
            f"{wrong[i, j]:,}",
            _share_cell(wrong[i, j] / counts[i].sum()),
        )
        for i, j in pairs
    ]
    columns = ("Class", "taken for", "pictures", "share of the class, %")
    return table(columns, rows, caption=f"The {len(rows)} most frequent confusions, of {wrong.sum():,} in all.")


def per_class_html(counts: np.ndarray, class_names: Sequence[str]) -> str:
    """A table of the classes, the one found least often first: pictures, recall, precision; 20 rows, the rest folded.

    `counts` as in `confusion_html`. A class without pictures has no recall, one never predicted has no precision.
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
    columns = ("Class", "pictures", "found (recall), %", "right when named (precision), %")
    shown = table(columns, rows[:MAX_CLASSES], caption="The class that is found least often comes first.", wide=True)
    if len(rows) <= MAX_CLASSES:
        return shown
    rest = f"The next {len(rows) - MAX_CLASSES:,} classes"
    if len(order) > len(rows):
        rest += f" of {len(order) - MAX_CLASSES:,}"
    return f"{shown}\n<details><summary>{rest}</summary>\n{table(columns, rows[MAX_CLASSES:], wide=True)}\n</details>"


def mistakes_html(mistakes: Sequence[tuple[Image.Image, str, str, float, str]]) -> str:
    """A grid of pictures that the network got wrong, at most 32: (picture, truth, predicted, probability, name)."""
    if not mistakes:
        return "<p>No mistakes to show.</p>"
    cells = []
    for picture, truth, predicted, probability, name in mistakes[:MAX_MISTAKES]:
        truth, predicted, name = escape(truth), escape(predicted), escape(name)
        sure = f", {100 * probability:.0f}&nbsp;%" if math.isfinite(probability) else ""
        cells.append(
            f'<li><figure><img src="{thumbnail(picture, name)}" alt="{truth}, taken for {predicted}" loading="lazy">'
            f"<figcaption><span><b>{truth}</b></span><span>taken for <b>{predicted}</b>{sure}</span>"
            f'<span class="name">{name}</span></figcaption></figure></li>'
        )
    return '<ul class="mistakes">\n' + "\n".join(cells) + "\n</ul>"


def thumbnail(picture: Image.Image, name: str = "picture") -> str:
    """A JPEG of at most 160 px a side as a data URL; pictures far smaller than that are enlarged pixel by pixel."""
    image = to_rgb(picture, name)
    if image is picture:
        image = image.copy()  # thumbnail() works in place
    if (times := THUMBNAIL_PX // max(image.size)) > 1:
        image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    else:
        image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80, optimize=True)
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


def bar(share: float) -> str:
    """A small horizontal bar, filled to `share` (0..1); it repeats a number beside it and says nothing by itself."""
    return f'<span class="bar" aria-hidden="true"><i style="width:{100 * share:.1f}%"></i></span>'


def _share_cell(share: float) -> str:
    return NOTHING if math.isnan(share) else f"{bar(share)}{100 * share:.1f}"


def _heat_map(counts: np.ndarray, class_names: Sequence[str]) -> str:
    names = [escape(name) for name in class_names]
    head = "".join(f'<th scope="col" title="{name}"><span>{name}</span></th>' for name in names)
    rows = []
    for i, (name, row) in enumerate(zip(names, counts.tolist(), strict=True)):
        total = max(sum(row), 1)
        cells = []
        for j, n in enumerate(row):
            kind = "none" if not n else "right" if i == j else "wrong"
            said = f"{name}: {n:,} of {sum(row):,} pictures ({100 * n / total:.1f} %) taken for {names[j]}"
            # One mistake among hundreds is still to be seen: the root lifts small shares.
            shade = (n / total) ** (1 / 3)
            style = f' style="--share:{shade:.3f}"' if n else ""
            cells.append(f'<td class="{kind}"{style} title="{said}">{f"{n:,}" if n else "·"}</td>')
        rows.append(f'<tr><th scope="row" title="{name}">{name}</th>{"".join(cells)}</tr>')
    body = "\n".join(rows)
    short = ' class="short"' if all(len(name) <= 3 for name in class_names) else ""
    # Not a caption, which would be as wide as the table and scroll with it on a narrow screen.
    return (
        '<p class="note">Pictures by true class (rows) and predicted class (columns). The diagonal, in bold, is right; '
        "the stronger the colour, the larger the share of the row.</p>\n"
        f'<div class="scroll heat"><table{short} aria-label="Pictures by true and predicted class">'
        f"<thead><tr><td>true \\ predicted</td>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>"
    )


def _check(counts: np.ndarray, class_names: Sequence[str]) -> None:
    C = len(class_names)
    assert counts.shape == (C, C), f"counts of shape {counts.shape} for {C} classes"
    assert counts.dtype.kind in "iu", "pictures are counted in whole numbers"
