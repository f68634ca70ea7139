"""The findings of an inspection as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from markupsafe import Markup

from mobilevit.images import ImageError
from mobilevit.inspect import Inspection
from mobilevit.inspect.duplicates import Group
from mobilevit.inspect.label_errors import LabelError
from mobilevit.report import render
from mobilevit.report.results import Example, Section, table, thumbnail

MAX_SHOWN = 48  # findings of a section, to bound the size of the page
MAX_COPIES = 4  # images of a group
MAX_CLASSES = 100
Finding = TypeVar("Finding")

TITLES = {
    "unreadable": "unreadable",
    "unlabeled": "without a class",
    "exact_duplicates": "exact duplicates",
    "near_duplicates": "near duplicates",
    "leaks": "leaks across splits",
    "class_overlaps": "copies with different classes",
    "label_errors": "likely label errors",
}
"""Short names of the kinds of findings in `Inspection.counts`."""


def render_page(inspection: Inspection) -> str:
    """The HTML page. It loads no other files."""
    i, c = inspection, inspection.collection
    counts = inspection.counts()
    leaks, overlaps = set(i.leaks), set(i.overlaps)
    others = [group for group in i.groups if group not in leaks and group not in overlaps]
    exact, near = ([group for group in others if (group.difference is None) == is_exact] for is_exact in (True, False))

    def copies(group: Group) -> Example:
        return _copies(inspection, group)

    sections = [Section("Classes", _class_table(inspection)), Section("Images", _image_table(inspection))]
    if c.problems:
        rows = [(c.key(image), c.split_name(image), error) for image, error in sorted(c.problems.items())]
        shown = table(("Image", "split", "problem"), rows[:MAX_SHOWN], caption=_shown(len(rows)), is_text=True)
        sections.append(Section("Unreadable images", shown))
    notes = {
        "Leaks across splits": "Images of one split with a copy in another. Metrics on such images are too high.",
        "Copies with different classes": "At least one of the labels is wrong, or the classes overlap.",
        "Exact duplicates": "The same pixels in one split, with the same class.",
        "Near duplicates": "Re-encoded, resized or slightly changed copies in one split, with the same class.",
    }
    for (title, note), groups in zip(notes.items(), (i.leaks, i.overlaps, exact, near), strict=True):
        if groups:
            sections.append(Section(title, _examples(copies, groups, note)))
    if i.label_check and i.label_check.errors:
        note = (
            "Predictions of a model that was fitted without the image and its copies. It predicts the class of "
            f"{i.label_check.accuracy:.1f} % of the images. Check an image before you change its label."
        )
        errors = _examples(lambda error: _label_error(inspection, error), i.label_check.errors, note)
        sections.append(Section("Likely label errors", errors))
    summary = [("images", f"{len(c):,}", ", ".join(f"{n} {len(s.images):,}" for n, s in c.splits.items()))]
    summary += [("classes", f"{len(c.num_images):,}", _balance(inspection))]
    summary += [(TITLES[name], f"{num:,}", _unit(name)) for name, num in counts.items()]
    return render("inspect.html", title=inspection.data, task=c.task, summary=summary, sections=sections)


def _unit(name: str) -> str:
    return "images" if name in ("unreadable", "unlabeled", "label_errors") else "groups of images"


def _shown(total: int) -> str:
    more = f"The first {MAX_SHOWN} of {total:,}; mobilevit inspect --json prints all of them."
    return more if total > MAX_SHOWN else ""


def _balance(inspection: Inspection) -> str:
    totals = [sum(counts.values()) for counts in inspection.collection.num_images.values()]
    return f"{min(totals):,} to {max(totals):,} images each" if totals else ""


def _class_table(inspection: Inspection) -> Markup:
    c = inspection.collection
    columns = [(f"{split}, {unit}", counts, split) for split in c.splits for unit, counts in _counted(inspection)]
    names = sorted(c.num_images, key=lambda name: (-sum(c.num_images[name].values()), name))
    rows = [(name, *(f"{counts[name][split]:,}" for _, counts, split in columns)) for name in names[:MAX_CLASSES]]
    caption = f"The {MAX_CLASSES} largest of {len(names):,} classes." if len(names) > MAX_CLASSES else "Largest first."
    return table(("Class", *(heading for heading, *_ in columns)), rows, caption=caption)


def _counted(inspection: Inspection) -> list[tuple[str, dict]]:
    c = inspection.collection
    return [("images", c.num_images)] + ([("boxes", c.num_boxes)] if c.num_boxes else [])


def _image_table(inspection: Inspection) -> Markup:
    c = inspection.collection
    rows = [
        (
            name.removesuffix("_px").replace("_", " ") + (", px" if name.endswith("px") else ""),
            *(f"{v:,g}" for v in values),
        )
        for name, values in inspection.size_quantiles().items()
    ]
    sizes = table(("", "minimum", "25 %", "median", "75 %", "maximum"), rows)
    listed = [("modes", c.modes), ("formats", c.formats)]
    cells = [(name, ", ".join(f"{value} {num:,}" for value, num in counts.most_common())) for name, counts in listed]
    return sizes + table(("", "number of images"), cells, is_text=True)


def _examples(example: Callable[[Finding], Example], findings: Sequence[Finding], note: str) -> Markup:
    shown = []
    for finding in findings[:MAX_SHOWN]:
        try:
            shown.append(example(finding))
        except ImageError:  # changed since it was inspected
            continue
    note = f"{note} {_shown(len(findings))}".strip()
    return Markup(render("examples.html", examples=shown, none="", note=note))


def _copies(inspection: Inspection, group: Group) -> Example:
    c = inspection.collection
    # An image of each split and class first, so that the page shows the difference.
    order = sorted(range(len(group.images)), key=lambda k: (_rank(inspection, group, k), k))
    images = [group.images[k] for k in order[:MAX_COPIES]]
    lines: list[str | Markup] = [
        Markup("<b>{}</b> {} {}").format(c.labels[i] or "no class", c.split_name(i), c.key(i)) for i in images
    ]
    if more := len(group.images) - len(images):
        lines.append(f"and {more:,} more")
    panels = [(thumbnail(c.read(i), c.key(i)), f"{c.labels[i]}, {c.split_name(i)}: {c.key(i)}") for i in images]
    kind = "equal pixels" if group.difference is None else f"difference {group.difference:.1f} levels"
    return Example(kind, panels, lines)


def _rank(inspection: Inspection, group: Group, k: int) -> int:
    """How many earlier images of the group have the split and the class of image `k`."""
    c, image = inspection.collection, group.images[k]
    kind = (c.split[image], c.labels[image])
    return sum((c.split[other], c.labels[other]) == kind for other in group.images[:k])


def _label_error(inspection: Inspection, error: LabelError) -> Example:
    c = inspection.collection
    lines = (
        Markup("labeled <b>{}</b>, {:.0f}\N{NO-BREAK SPACE}%").format(
            c.labels[error.image], 100 * error.label_probability
        ),
        Markup("predicted <b>{}</b>, {:.0f}\N{NO-BREAK SPACE}%").format(error.predicted, 100 * error.probability),
    )
    alt = f"labeled {c.labels[error.image]}, predicted {error.predicted}"
    image = thumbnail(c.read(error.image), c.key(error.image))
    return Example(f"{c.split_name(error.image)} {c.key(error.image)}", [(image, alt)], lines)
