"""An explanation as one image: three rows of panels, each a heat map over the network's input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw

from mobilevit.draw import Color, default_font, shorten
from mobilevit.explain.attention import stage_title
from mobilevit.explain.explanation import Explanation
from mobilevit.explain.grad_cam import LAYER_CAM_STAGE, ClassEvidence
from mobilevit.explain.heatmap import (
    MIN_BRIGHTEST,
    MIN_GRADIENT_VALUE,
    SMALLEST_GRADIENT_TEXT,
    UNIFORM_BELOW,
    overlay,
    scale,
    scale_attention,
    scale_gradient,
)

WHITE, INK, SOFT, LINE = (255, 255, 255), (29, 35, 38), (92, 102, 104), (220, 216, 204)
ACCENT, BAR = (31, 111, 92), (217, 230, 223)
PANEL_PX, GAP_PX, MARGIN_PX = 372, 24, 36
HEADING_PX, CAPTION_PX = 56, 60
MIN_ROW_PX = 6 * 26  # enough for the bars of the classes, however wide the image is
NUM_COLUMNS = 4
WIDTH_PX = 2 * MARGIN_PX + NUM_COLUMNS * PANEL_PX + (NUM_COLUMNS - 1) * GAP_PX
LEGEND_PX = (140, 12)
LEGEND_GRAY = 72.0  # middle gray, dimmed like the images


@dataclass(frozen=True)
class Panel:
    """A heat map `values` (h, w), 0 to 1, over the network's input, with two lines of text below.

    `window`, (left, top, right, bottom) relative to the input, is drawn as a dashed frame.
    """

    title: str
    note: str
    values: np.ndarray
    is_smooth: bool = True
    has_marker: bool = True
    window: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class Legend:
    """What the colors of a row mean: the color of the value `lowest`, 0 to 1, and the color of 1."""

    low: str
    high: str
    lowest: float = 0.0


@dataclass(frozen=True)
class Row:
    heading: str
    panels: list[Panel]
    legend: Legend


ATTENTION_LEGEND = Legend("0", f"panel maximum, or {MIN_BRIGHTEST:g} times the mean if larger")
EVIDENCE_LEGEND = Legend("0 or negative", "panel maximum")
GRADIENT_LEGEND = Legend(
    SMALLEST_GRADIENT_TEXT,
    "panel maximum (log scale); no color: exactly 0; dashed: receptive field of the convolutions",
    MIN_GRADIENT_VALUE,
)


def draw_figure(explanation: Explanation) -> Image.Image:
    """Draw three rows: class evidence (or attention rollout), attention, and receptive fields."""
    e = explanation
    view = e.region.crop(e.image, PANEL_PX)
    height = max(view.height, MIN_ROW_PX)
    row_px = HEADING_PX + height + CAPTION_PX
    rows = [
        _evidence_row(e) if e.class_evidence else _rollout_row(e),
        Row("Attention from the marked point to every patch", _attention_panels(e), ATTENTION_LEGEND),
        Row("Receptive field of the marked point, by layer", _receptive_field_panels(e), GRADIENT_LEGEND),
    ]
    figure = Image.new("RGB", (WIDTH_PX, MARGIN_PX + len(rows) * row_px), WHITE)
    draw = ImageDraw.Draw(figure)
    for i, row in enumerate(rows):
        top = MARGIN_PX // 2 + i * row_px
        legend_left = _draw_legend(figure, WIDTH_PX - MARGIN_PX, top + 34, row.legend)
        _write(draw, MARGIN_PX, top + 34, row.heading, 23, INK, legend_left - GAP_PX - MARGIN_PX)
        lefts = [MARGIN_PX + column * (PANEL_PX + GAP_PX) for column in range(NUM_COLUMNS)]
        top += HEADING_PX
        if i == 0:
            _draw_whole_image(figure, lefts.pop(0), top, height, e)
        for left, panel in zip(lefts, row.panels, strict=False):
            figure.paste(_draw_panel(view, panel, e.point), (left, top + (height - view.height) // 2))
            _write_caption(draw, left, top + height, panel.title, panel.note)
        if i == 0 and e.class_evidence:
            _draw_probabilities(draw, lefts[-1], top, height, e.class_evidence)
            _write_caption(draw, lefts[-1], top + height, "Predicted classes", "the most likely ones")
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def _evidence_row(e: Explanation) -> Row:
    first = e.class_evidence[0]
    maps = {
        "Grad-CAM of the last feature map": first.grad_cam,
        f"LayerCAM of {stage_title(LAYER_CAM_STAGE).lower()}": first.layer_cam,
    }
    panels = []
    for name, values in maps.items():
        rows, columns = values.shape
        # A single value covers the whole input: the panel then shows no location.
        size = f"{columns} x {rows} positions" if values.numel() > 1 else "1 x 1: uniform by construction"
        panels.append(Panel(f"Evidence for {first.class_name}", f"{name}, {size}", scale(values), has_marker=False))
    return Row(f"{e.network}: {e.prediction}", panels, EVIDENCE_LEGEND)


def _rollout_row(e: Explanation) -> Row:
    network = {"detect": "for detection", "segment": "for segmentation"}.get(e.task, "without a classifier")
    panels = [
        Panel(block.title, "attention rollout", scale_attention(block.rollout(*e.point))) for block in e.attention
    ]
    heading = f"{e.network} {network}: attention rollout from the marked point through all layers of a block"
    return Row(heading, panels, ATTENTION_LEGEND)


def _attention_panels(e: Explanation) -> list[Panel]:
    panels = []
    for block in e.attention:
        patches = block.from_point(*e.point)
        max_over_mean = patches.max().item() * patches.numel()
        strength = "nearly uniform" if max_over_mean < UNIFORM_BELOW else f"up to {max_over_mean:.1f} times the mean"
        size = f"{block.columns} x {block.rows} patches" if patches.numel() > 1 else "a single patch"
        note = f"{size}, {block.num_layers} layers, {block.num_heads} heads, mean"
        panels.append(Panel(f"{block.title}: {strength}", note, scale_attention(patches)))
    block = e.attention[0]
    on_map = block.to_map(block.from_point(*e.point), *e.point)
    values = scale(on_map, MIN_BRIGHTEST / (block.rows * block.columns))  # relative to the mean over patches
    title, note = f"{block.title}, on the feature map", "one pixel of every patch, no attention to the others"
    panels.append(Panel(title, note, values, is_smooth=False))
    return panels


def _receptive_field_panels(e: Explanation) -> list[Panel]:
    panels = []
    for field in e.receptive_fields[:NUM_COLUMNS]:
        note = f"{100 * field.fraction:.{0 if field.fraction > 0.1 else 1}f} % of the pixels"
        if field.has_attention:
            note += f"; convolutions alone {100 * field.conv_fraction:.0f} %"
        # Not smooth: interpolation would give pixels a color whose gradient is exactly 0.
        values = scale_gradient(field.gradient)
        panels.append(Panel(field.title, note, values, is_smooth=False, window=field.conv_window_relative))
    return panels


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


def _draw_panel(view: Image.Image, panel: Panel, point: tuple[float, float]) -> Image.Image:
    gray = np.asarray(view.convert("L"), np.float32)[..., None] * 0.5 + 8
    resample = Image.Resampling.BICUBIC if panel.is_smooth else Image.Resampling.NEAREST
    values = Image.fromarray(panel.values.astype(np.float32)).resize(view.size, resample)
    image = overlay(gray, np.clip(np.asarray(values), 0, 1))
    draw = ImageDraw.Draw(image)
    if panel.window:
        left, top, right, bottom = panel.window
        _draw_dashed(draw, (left * view.width, top * view.height, right * view.width - 1, bottom * view.height - 1))
    if panel.has_marker:
        _draw_marker(draw, point[0] * view.width, point[1] * view.height)
    return image


def _draw_legend(figure: Image.Image, right: int, baseline: int, legend: Legend) -> int:
    """Draw a color bar between its two labels, right-aligned; returns the left edge."""
    width, height = LEGEND_PX
    draw, font = ImageDraw.Draw(figure), default_font(14)
    draw.text((right, baseline), legend.high, fill=SOFT, font=font, anchor="rs")
    left = right - round(font.getlength(legend.high)) - 8 - width
    values = np.broadcast_to(np.linspace(legend.lowest, 1, width), (height, width))
    figure.paste(overlay(np.full((height, width, 1), LEGEND_GRAY), values), (left, baseline - height + 1))
    draw.text((left - 8, baseline), legend.low, fill=SOFT, font=font, anchor="rs")
    return left - 8 - round(font.getlength(legend.low))


def _draw_whole_image(figure: Image.Image, left: int, top: int, height: int, e: Explanation) -> None:
    """Draw the whole image with a frame around the network's input and a marker at the point."""
    factor = min(PANEL_PX / e.image.width, height / e.image.height)
    size = (max(1, round(e.image.width * factor)), max(1, round(e.image.height * factor)))
    image = e.image.resize(size, Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(image)
    x1, y1, x2, y2 = (value * factor for value in e.region.box)
    for inset, color, width in ((0, INK, 4), (1, WHITE, 2)):
        x, y = x1 + inset, y1 + inset
        draw.rectangle((x, y, max(x, x2 - 1 - inset), max(y, y2 - 1 - inset)), outline=color, width=width)
    _draw_marker(draw, (e.at[0] + 0.5) * factor, (e.at[1] + 0.5) * factor)
    figure.paste(image, (left, top + (height - size[1]) // 2))
    title = f"Image, {e.image.width} x {e.image.height} px"
    note = f"frame: network input; marker: {e.at[0]:g} {e.at[1]:g}"
    _write_caption(ImageDraw.Draw(figure), left, top + height, title, note)


def _draw_probabilities(
    draw: ImageDraw.ImageDraw, left: int, top: int, height: int, evidence: Sequence[ClassEvidence]
) -> None:
    """Draw one bar per class; its length is the probability."""
    classes = sorted(evidence, key=lambda one: -one.probability)
    pitch = min(46, height // len(classes))
    for i, one in enumerate(classes):
        y = top + i * pitch
        draw.rounded_rectangle((left, y, left + PANEL_PX, y + pitch - 8), 8, outline=LINE)
        length = round(PANEL_PX * one.probability)
        if length > 16:  # the round corners need this much
            draw.rounded_rectangle((left, y, left + length, y + pitch - 8), 8, fill=BAR)
        baseline = y + (pitch - 8) // 2 + 6
        _write(draw, left + 12, baseline, one.class_name, 16, ACCENT if one is evidence[0] else INK, PANEL_PX - 100)
        text = f"{100 * one.probability:.1f} %"
        draw.text((left + PANEL_PX - 12, baseline), text, fill=SOFT, font=default_font(16), anchor="rs")


def _draw_marker(draw: ImageDraw.ImageDraw, x: float, y: float) -> None:
    for radius, color, width in ((9, INK, 5), (8, WHITE, 3)):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=color, width=width)


def _draw_dashed(draw: ImageDraw.ImageDraw, box: tuple[float, float, float, float], dash_px: int = 7) -> None:
    left, top, right, bottom = box
    corners = ((left, top), (right, top), (right, bottom), (left, bottom), (left, top))
    for (x1, y1), (x2, y2) in pairwise(corners):
        length = abs(x2 - x1) + abs(y2 - y1)
        for start in range(0, round(length), 2 * dash_px):
            a, b = start / length, min(start + dash_px, length) / length
            line = (x1 + (x2 - x1) * a, y1 + (y2 - y1) * a, x1 + (x2 - x1) * b, y1 + (y2 - y1) * b)
            draw.line(line, fill=INK, width=4)
            draw.line(line, fill=WHITE, width=2)


def _write_caption(draw: ImageDraw.ImageDraw, left: int, top: int, title: str, note: str) -> None:
    _write(draw, left, top + 23, title, 17, INK, PANEL_PX)
    _write(draw, left, top + 44, note, 14, SOFT, PANEL_PX)


def _write(
    draw: ImageDraw.ImageDraw, left: int, baseline: int, text: str, size: int, color: Color, max_width: int
) -> None:
    font = default_font(size)
    draw.text((left, baseline), shorten(text, font, max_width), fill=color, font=font, anchor="ls")
