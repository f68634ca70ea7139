"""Render the results of an evaluation: sections of HTML for the training report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image, ImageDraw

from mobilevit.data.masks import IGNORE
from mobilevit.data.sources import Source
from mobilevit.draw import class_color, draw_boxes
from mobilevit.images import ImageError, read_image, to_rgb
from mobilevit.report import jpeg_url, render
from mobilevit.report.confidence import confidence_html
from mobilevit.tasks.classification import ClassificationResults
from mobilevit.tasks.detection import SHOWN_SCORE, DetectionResults, ImageDetections
from mobilevit.tasks.distillation import DistillationResults
from mobilevit.tasks.multilabel import MultilabelResults
from mobilevit.tasks.segmentation import SegmentationExample, SegmentationResults
from mobilevit.tasks.task import ClassMetrics, Results

MAX_CLASSES = 20  # of a heat map, and rows of a table before the rest is collapsed
MAX_ROWS = 1000  # of a table of classes, to bound the size of the file
MAX_ERRORS = 24  # most confident errors
MAX_EXAMPLES = 8  # best and worst images, each
MAX_LABELS = 5  # boxes that a caption lists
THUMBNAIL_PX = 160
FIGURE_PX = 360  # longer side of an image with boxes or masks
DASH = "\N{EN DASH}"  # an undefined value


@dataclass(frozen=True)
class Section:
    """A titled part of a report."""

    title: str
    html: Markup


@dataclass(frozen=True)
class Bar:
    """A table cell with a horizontal bar, filled to `fraction` (0 to 1), and a number of at most `num_chars`."""

    fraction: float
    text: str
    num_chars: int


@dataclass(frozen=True)
class Example:
    """Images of one sample with their alternative texts, and the lines of its caption."""

    name: str
    images: Sequence[tuple[str, str]]  # data URL, alternative text
    lines: Sequence[str | Markup]


def sections(results: Results, source: Source[Any]) -> list[Section]:
    """Tables and example images of `results`; `source` has the evaluated images.

    Raises:
        TypeError: results of an unknown task.
    """
    match results:
        case ClassificationResults():
            return _classification(results, source)
        case MultilabelResults():
            return _multilabel(results, source)
        case DetectionResults():
            return _detection(results, source)
        case SegmentationResults():
            return _segmentation(results, source)
        case DistillationResults():
            return _distillation(results, source)
    raise TypeError(f"no report for {type(results).__name__}")


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str | Bar]], *, caption: str | Markup = "", is_text: bool = False
) -> Markup:
    """An HTML table whose first column names the row. No rows are collapsed."""
    return Markup(render("table.html", columns=columns, rows=rows, more=[], caption=caption, is_text=is_text))


# ---------------------------------------------------------------------------------------------------------------------
# Tasks


def _classification(results: ClassificationResults, source: Source[Any]) -> list[Section]:
    names, matrix = source.class_names, results.confusion_matrix()

    def error(i: int) -> Example:
        predicted = names[results.predictions[i, 0]], float(results.probabilities[i])
        return _classified(source, int(results.indices[i]), "", names[results.labels[i]], "predicted ", *predicted)

    headings = {"num_images": "images", "recall": "recall, %", "precision": "precision, %"}
    return [
        Section("Confusion matrix", confusion_html(matrix, names)),
        Section("Classes", class_table(results.per_class(names), headings, by=("recall", "precision"))),
        Section("Calibration", confidence_html(results)),
        Section("Most confident errors", _examples(error, results.most_confident_errors(MAX_ERRORS), "No errors.")),
    ]


def _classified(
    source: Source[Any], index: int, before: str, expected: str, between: str, predicted: str, probability: float
) -> Example:
    """An image with its expected class, the predicted class and the probability of that, and a word before each."""
    sample = source[index]
    image = thumbnail(read_image(sample.image, sample.name), sample.name)
    percent = f"{100 * probability:.0f}\N{NO-BREAK SPACE}%"
    lines = (
        Markup("{}<b>{}</b>").format(before, expected),
        Markup("{}<b>{}</b>, {}").format(between, predicted, percent),
    )
    return Example(sample.name, [(image, f"{before}{expected}, {between}{predicted}")], lines)


def _multilabel(results: MultilabelResults, source: Source[Any]) -> list[Section]:
    names = source.class_names

    def error(item: tuple[int, int]) -> Example:
        row, index = item
        sample, score = source[int(results.indices[row])], float(results.scores[row, index])
        kind = "false" if results.predictions[row, index] else "missing"
        annotated = _listed([names[i] for i in np.flatnonzero(results.labels[row])])
        percents = (f"{100 * value:.0f}\N{NO-BREAK SPACE}%" for value in (score, results.thresholds[index]))
        lines = (
            Markup("{}: <b>{}</b>, {} (threshold {})").format(kind, names[index], *percents),
            f"annotated: {annotated}",
        )
        image = thumbnail(read_image(sample.image, sample.name), sample.name)
        return Example(sample.name, [(image, f"annotated: {annotated}; {kind}: {names[index]}")], lines)

    headings = {"num_images": "images", "ap": "AP, %", "f1": "F1, %", "threshold": "threshold"}
    curves = np.stack([curve.precisions() for curve in results.curves])
    of_curves = ", at this recall or a higher one. The number is the mean of the curve."
    note = (
        "false: predicted, but not annotated; missing: annotated, but not predicted. Errors whose probability is "
        "farthest from the threshold first."
    )
    return [
        Section("Classes", class_table(results.per_class(names), headings, by=("ap", "f1"))),
        Section("Precision and recall", curves_html(curves, names, of_curves)),
        Section(
            "Most confident errors", _examples(error, results.most_confident_errors(MAX_ERRORS), "No errors.", note)
        ),
    ]


def _detection(results: DetectionResults, source: Source[Any]) -> list[Section]:
    names, metrics = source.class_names, results.metrics()
    rows = {
        "ap": "all, mean over IoU 0.5, 0.55 ... 0.95",
        "ap50": "all, IoU 0.5 or more",
        "ap75": "all, IoU 0.75 or more",
        "ap_small": "up to 32 x 32 px",
        "ap_medium": "from there to 96 x 96 px",
        "ap_large": "beyond 96 x 96 px",
    }
    cells = [(text, f"{metrics[name]:.1f}" if name in metrics else DASH) for name, text in rows.items()]
    ranked = results.ranked()
    worst = ranked[:MAX_EXAMPLES]
    best = sorted(ranked[len(worst) :], key=lambda image: (-image.f1_score(), -len(image.truth.boxes.labels)))
    of_boxes = " at an IoU of 0.5. The number is the average precision."
    headings = {"num_boxes": "boxes", "ap50": "AP at IoU 0.5, %", "ap": "AP, %"}
    note = "White frames: annotated boxes. Colored frames with labels: predicted boxes."

    example = partial(_boxes_example, source=source)
    none = "No more images with boxes."
    return [
        Section("Average precision", table(("Boxes", "AP, %"), cells)),
        Section("Precision and recall", curves_html(results.precision_recall_curves(), names, of_boxes)),
        Section("Classes", class_table(results.per_class(names), headings, by=("ap",))),
        Section("Worst images", _examples(example, worst, none, note)),
        Section("Best images", _examples(example, best[:MAX_EXAMPLES], none, note)),
    ]


def _segmentation(results: SegmentationResults, source: Source[Any]) -> list[Section]:
    names = source.class_names
    headings = {"num_pixels": "pixels", "iou": "IoU, %"}
    note = "From left to right: annotated classes, predicted classes, and errors in white."

    example = partial(_masks_example, source=source)
    none = "No images."
    return [
        Section("Classes", class_table(results.per_class(names), headings, by=("iou",))),
        Section("Confusion matrix", confusion_html(results.confusion_matrix, names, "pixels")),
        Section("Worst images", _examples(example, results.worst, none, note)),
        Section("Best images", _examples(example, results.best, none, note)),
    ]


def _distillation(results: DistillationResults, source: Source[Any]) -> list[Section]:
    names = source.class_names

    def example(i: int) -> Example:
        student = names[results.predictions[i, 0]], float(results.probabilities[i])
        return _classified(source, int(results.indices[i]), "teacher ", names[results.teacher[i]], "student ", *student)

    metrics = results.metrics()
    rows = (
        ("most probable class", f"{metrics['agreement']:.1f}"),
        ("teacher's class among the student's five most probable", f"{metrics['agreement5']:.1f}"),
    )
    headings = {"num_images": "images", "agreement": "agreement, %"}
    return [
        Section("Agreement with the teacher", table(("Classes", "images, %"), rows)),
        Section("Agreement by class", class_table(results.per_class(names), headings, by=("agreement",))),
        Section("Most confident disagreements", _examples(example, results.disagreements(MAX_ERRORS), "None.")),
        Section("Agreements", _examples(example, results.agreements(MAX_EXAMPLES), "None.")),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def confusion_html(matrix: np.ndarray, class_names: Sequence[str], unit: str = "images") -> Markup:
    """A heat map for up to 20 classes, a table of the 20 most frequent confusions for more.

    `matrix` (C, C) counts images or pixels by true class (rows) and predicted class (columns). Cells are counts of
    images, or percent of the row for pixels, whose counts are too long.
    """
    totals = matrix.sum(1)
    if len(class_names) <= MAX_CLASSES:
        # The cube root makes small fractions visible: one error in hundreds is still colored.
        shades = np.cbrt(matrix / np.maximum(totals, 1)[:, None])
        rows = list(zip(class_names, matrix.tolist(), shades.tolist(), totals.tolist(), strict=True))
        return Markup(render("confusion.html", class_names=class_names, rows=rows, unit=unit))
    errors = matrix.copy()
    np.fill_diagonal(errors, 0)
    order = np.argsort(-errors, axis=None, kind="stable")[:MAX_CLASSES]
    pairs = [(int(i), int(j)) for i, j in zip(*np.unravel_index(order, errors.shape), strict=True) if errors[i, j]]
    if not pairs:
        return Markup("<p>No confusions.</p>")
    cells = [
        (class_names[i], class_names[j], f"{errors[i, j]:,}", _percent_bar(100 * errors[i, j] / totals[i]))
        for i, j in pairs
    ]
    caption = f"The {len(cells)} most frequent confusions of {errors.sum():,} wrong {unit}."
    return table(("Class", "predicted class", unit, "of the class, %"), cells, caption=caption)


def class_table(rows: Sequence[ClassMetrics], headings: Mapping[str, str], by: Sequence[str]) -> Markup:
    """A table of classes, the lowest of the metrics `by` first; undefined values last. Rows after 20 are collapsed.

    `headings` are the titles of the columns by metric: counts as whole numbers, other metrics in percent.
    """

    def key(row: ClassMetrics) -> list[float]:
        return [math.inf if (value := row.metrics[name]) is None else value for name in by]

    cells = [
        (row.class_name, *(_metric_cell(name, row.metrics[name]) for name in headings))
        for row in sorted(rows, key=key)[:MAX_ROWS]
    ]
    caption = f"Lowest {headings[by[0]].removesuffix(', %')} first."
    columns = ("Class", *headings.values())
    first, more = cells[:MAX_CLASSES], cells[MAX_CLASSES:]
    return Markup(render("table.html", columns=columns, rows=first, more=more, caption=caption, is_text=False))


def curves_html(curves: np.ndarray, class_names: Sequence[str], note: str) -> Markup:
    """Precision-recall curves as small charts: the mean of all classes, then the classes with the lowest AP.

    `note` ends the sentence about the axes. `curves` (C, 101) are precisions at recall 0, 0.01 ... 1; NaN for a class
    without boxes or images.
    """
    areas = curves.mean(1)
    measured = [i for i in np.argsort(areas, kind="stable").tolist() if not math.isnan(areas[i])]
    named = [(class_names[i], curves[i]) for i in measured]
    if len(named) > 1:
        named.insert(0, ("all classes", curves[measured].mean(0)))
    shown = [(name, 100 * curve.mean(), (100 * curve).tolist()) for name, curve in named[: MAX_CLASSES + 1]]
    return Markup(render("curves.html", curves=shown, note=note, num_hidden=len(named) - len(shown)))


def _percent_bar(percent: float) -> Bar:
    return Bar(percent / 100, f"{percent:.1f}", len("100.0"))


def _metric_cell(name: str, value: float | None) -> str | Bar:
    if value is None:
        return DASH
    if name == "threshold":  # a probability
        return f"{value:.3f}"
    return f"{value:,}" if name.startswith("num_") else _percent_bar(value)


# ---------------------------------------------------------------------------------------------------------------------
# Images


def thumbnail(image: Image.Image, name: str = "image", size_px: int = THUMBNAIL_PX) -> str:
    """A JPEG data URL of an image, its longer side resized to about `size_px`; enlarged by integer factors only."""
    return jpeg_url(_resized(to_rgb(image, name), size_px), quality=85)


def _resized(image: Image.Image, size_px: int) -> Image.Image:
    if (factor := size_px // max(image.size)) > 1:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    small = image.copy()
    small.thumbnail((size_px, size_px), Image.Resampling.LANCZOS)
    return small


def _examples(example: Callable[[Any], Example], items: Sequence[Any], none: str, note: str = "") -> Markup:
    def readable() -> Iterator[Example]:
        for item in items:
            try:
                yield example(item)
            except ImageError:  # deleted or damaged since the evaluation
                continue

    return Markup(render("examples.html", examples=list(readable()), none=none, note=note))


def _boxes_example(detections: ImageDetections, source: Source[Any]) -> Example:
    sample, names = source[detections.index], source.class_names
    image = read_image(sample.image, sample.name)
    figure = _resized(image, FIGURE_PX)
    scale = figure.width / image.width
    annotated = detections.truth.boxes
    draw = ImageDraw.Draw(figure)
    for width, color in ((4, "black"), (2, "white")):
        for corners in (scale * annotated.corners).tolist():
            draw.rectangle(corners, outline=color, width=width)
    is_shown = detections.scores >= SHOWN_SCORE
    labels = detections.labels[is_shown].tolist()
    texts = [f"{names[i]} {100 * s:.0f} %" for i, s in zip(labels, detections.scores[is_shown], strict=True)]
    figure = draw_boxes(figure, [tuple(box) for box in (scale * detections.boxes[is_shown]).tolist()], labels, texts)
    truth = [
        names[label] + (" (crowd)" if crowd else "")
        for label, crowd in zip(annotated.labels, annotated.crowd, strict=True)
    ]
    lines = (f"annotated: {_listed(truth)}", f"predicted: {_listed(texts)}")
    return Example(sample.name, [(jpeg_url(figure, quality=90), "; ".join(lines))], lines)


def _listed(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - MAX_LABELS} more" if len(texts) > MAX_LABELS else ""
    return ", ".join(texts[:MAX_LABELS]) + more or "nothing"


def _masks_example(example: SegmentationExample, source: Source[Any]) -> Example:
    sample, names = source[example.index], source.class_names
    image = read_image(sample.image, sample.name)
    truth = sample.label.read(*image.size)
    figure = _resized(image, FIGURE_PX)
    truth, prediction = (
        np.asarray(Image.fromarray(mask).resize(figure.size, Image.Resampling.NEAREST))
        for mask in (truth, example.prediction)
    )
    is_counted = truth != IGNORE
    # Black and white: readable without seeing the colors of the classes.
    errors = np.where((truth != prediction) & is_counted, 255, 40).astype(np.uint8)
    panels = {
        "annotated": _paint(figure, truth, names),
        "predicted": _paint(figure, prediction, names),
        "errors": Image.fromarray(errors).convert("RGB"),
    }
    lines = [Markup("<b>{:.1f}\N{NO-BREAK SPACE}%</b> mean IoU").format(100 * example.iou)]
    for i in np.union1d(truth[is_counted], prediction[is_counted]).tolist():
        swatch = Markup('<i class="swatch" style="background:rgb{}"></i>').format(class_color(i))
        percents = [100 * ((mask == i) & is_counted).mean() for mask in (truth, prediction)]
        lines.append(swatch + f"{names[i]}: {percents[0]:.1f} % annotated, {percents[1]:.1f} % predicted")
    urls = [(jpeg_url(panel, quality=85), f"{sample.name}, {title}") for title, panel in panels.items()]
    return Example(sample.name, urls, lines)


def _paint(image: Image.Image, mask: np.ndarray, class_names: Sequence[str]) -> Image.Image:
    """The image in grey with the colors of its classes over it, except for the background and ignored pixels."""
    grey = np.asarray(image.convert("L"), np.float32)[..., None]
    colors = np.array([class_color(i) for i in range(256)], np.float32)
    opacity = np.zeros((256, 1), np.float32)
    opacity[[i for i, name in enumerate(class_names) if name.lower() != "background"]] = 0.6
    return Image.fromarray((grey * (1 - opacity[mask]) + colors[mask] * opacity[mask]).round().astype(np.uint8))
