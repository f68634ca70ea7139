"""An explanation as one image: rows of panels, each what the network sees with something painted over it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mobilevit.draw import Colour, shortened
from mobilevit.explain.attention import title_of
from mobilevit.explain.evidence import FINE_STAGE, Evidence
from mobilevit.explain.explanation import Explanation
from mobilevit.explain.receptive import Field

PAPER, INK, SOFT, LINE = (255, 255, 255), (29, 35, 38), (92, 102, 104), (220, 216, 204)
ACCENT, BAR = (31, 111, 92), (217, 230, 223)
# From little to much. Lightness says it as well as hue, for whoever does not tell the hues apart.
RAMP: tuple[Colour, ...] = ((122, 24, 72), (190, 50, 52), (236, 116, 30), (250, 188, 66), (255, 245, 190))
PANEL_PX, GAP_PX, MARGIN_PX = 372, 24, 36
HEADING_PX, CAPTION_PX = 56, 60
LEAST_HEIGHT_PX = 6 * 26  # of a row, however wide the image: that of the bars of the classes
NUM_COLUMNS = 4
WIDTH_PX = 2 * MARGIN_PX + NUM_COLUMNS * PANEL_PX + (NUM_COLUMNS - 1) * GAP_PX
OPACITY = 0.75  # of the lightest colour
DECADES = 4  # of a gradient, from the darkest colour to the lightest
LEAST_GRADIENT = 0.1  # how bright a trace of a gradient is, and all that is weaker
# Attention is bright that is this many times its mean, and as much as the largest where that is more. Relative to the
# largest alone, attention to everything alike would be as bright as attention to one thing.
BRIGHT_TIMES = 3.0
EVEN_TIMES = 1.1  # attention whose largest is below this many times its mean points at nothing
SCALE_PX = (140, 12)
SCALE_GREY = 72.0  # of an image of middle grey, dimmed


@dataclass(frozen=True)
class Panel:
    """What the network sees, with `values` (h, w), 0 to 1, spread over it, and two lines of text below.

    `window` is a dashed frame, (left, top, right, bottom) in shares of the sides.
    """

    title: str
    note: str
    values: np.ndarray
    is_smooth: bool = True
    is_marked: bool = True
    window: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class Scale:
    """What the colours of a row mean: those of `least`, 0 to 1, and those of 1, in words."""

    low: str
    high: str
    least: float = 0.0


ATTENTION_SCALE = Scale("none", f"the panel's most, or {BRIGHT_TIMES:g} times its mean where that is more")
EVIDENCE_SCALE = Scale("none, or against it", "the panel's most")
FIELD_SCALE = Scale(
    f"1/{round(10 ** (DECADES * (1 - LEAST_GRADIENT)), -2):,.0f} and less",
    "the panel's most; logarithmic; unpainted: exactly 0; dashed: as far as convolutions alone see",
    LEAST_GRADIENT,
)


def draw_figure(explanation: Explanation) -> Image.Image:
    """Three rows: what speaks for the class or reaches the place, what it attends to, and what it depends on."""
    e = explanation
    cut = e.view.cut(e.image, PANEL_PX)
    first = (_evidence_panels(e.evidence), EVIDENCE_SCALE) if e.evidence else (_rollout_panels(e), ATTENTION_SCALE)
    rows: list[tuple[str, list[Panel], Scale]] = [
        (_heading(e), *first),
        ("Where the marked place looks: attention to every patch", _attention_panels(e), ATTENTION_SCALE),
        ("What the marked place depends on, layer by layer", _field_panels(e.fields, e.size_px), FIELD_SCALE),
    ]
    height = max(cut.height, LEAST_HEIGHT_PX)
    row_px = HEADING_PX + height + CAPTION_PX
    figure = Image.new("RGB", (WIDTH_PX, MARGIN_PX + len(rows) * row_px), PAPER)
    draw = ImageDraw.Draw(figure)
    for i, (heading, panels, scale) in enumerate(rows):
        top = MARGIN_PX // 2 + i * row_px
        scale_left = _put_scale(figure, WIDTH_PX - MARGIN_PX, top + 34, scale)
        _write(draw, MARGIN_PX, top + 34, heading, 23, INK, scale_left - GAP_PX - MARGIN_PX)
        lefts = [MARGIN_PX + column * (PANEL_PX + GAP_PX) for column in range(NUM_COLUMNS)]
        top += HEADING_PX
        if i == 0:
            _put_image(figure, lefts.pop(0), top, height, e)
        for left, panel in zip(lefts, panels, strict=False):
            painted = _painted(cut, panel, e.place)
            figure.paste(painted, (left, top + (height - cut.height) // 2))
            _write(draw, left, top + height + 23, panel.title, 17, INK, PANEL_PX)
            _write(draw, left, top + height + 44, panel.note, 14, SOFT, PANEL_PX)
        if i == 0 and e.evidence:
            _put_classes(draw, lefts[-1], top, height, e.evidence)
            _write(draw, lefts[-1], top + height + 23, "What it takes the image for", 17, INK, PANEL_PX)
            _write(draw, lefts[-1], top + height + 44, "the likeliest classes", 14, SOFT, PANEL_PX)
    return figure


def scaled(values: Tensor, bright: float = 0.0) -> np.ndarray:
    """Values brought to 0 to 1 by the largest, or by `bright` where that is larger; those below 0 to 0."""
    positive = values.clamp(min=0).double()
    return (positive / positive.max().clamp(min=max(bright, 1e-30))).numpy()


def scaled_attention(patches: Tensor) -> np.ndarray:
    """Attention (rows, columns), which sums to 1, as bright as it is large beside its mean."""
    return scaled(patches, BRIGHT_TIMES / patches.numel())


def strength(times: float) -> str:
    """How pronounced attention is whose largest value is so many times its mean."""
    return "practically even" if times < EVEN_TIMES else f"up to {times:.1f} times the mean"


def in_decades(gradient: Tensor) -> np.ndarray:
    """A gradient on a logarithmic scale: 1 the largest, 0 nothing at all, and 0.1 a trace of it and more."""
    share = (gradient.double() / gradient.max().clamp(min=1e-30)).numpy()
    logarithm = np.log10(share, out=np.full_like(share, -np.inf), where=share > 0)
    return np.where(share > 0, np.clip(1 + logarithm / DECADES, LEAST_GRADIENT, 1), 0)


def _heading(e: Explanation) -> str:
    if e.evidence:
        likeliest = max(e.evidence, key=lambda one: one.probability)
        return f"{e.network}: {likeliest.class_name}, {100 * likeliest.probability:.0f} %"
    does = {"classify": "without a classifier", "detect": "for boxes", "segment": "for masks"}[e.task]
    return f"{e.network} {does}: what reaches the marked place through all layers of a block"


def _evidence_panels(evidence: Sequence[Evidence]) -> list[Panel]:
    chosen = evidence[0]
    height, width = chosen.shares.shape
    fine_height, fine_width = chosen.fine.shape
    title = f"For {chosen.class_name}"
    return [
        Panel(title, f"Grad-CAM of the last map, {width} x {height} places", scaled(chosen.shares), is_marked=False),
        Panel(
            title,
            f"LayerCAM of {title_of(FINE_STAGE).lower()}, {fine_width} x {fine_height} places",
            scaled(chosen.fine),
            is_marked=False,
        ),
    ]


def _rollout_panels(e: Explanation) -> list[Panel]:
    return [Panel(block.name, "attention rollout", scaled_attention(block.rollout(*e.place))) for block in e.blocks]


def _attention_panels(e: Explanation) -> list[Panel]:
    panels = []
    for block in e.blocks:
        patches = block.attended(*e.place)
        times = patches.max().item() * patches.numel()
        note = f"{block.columns} x {block.rows} patches, {block.num_layers} layers, {block.num_heads} heads, mean"
        panels.append(Panel(f"{block.name}: {strength(times)}", note, scaled_attention(patches)))
    block = e.blocks[0]
    exact = block.fold_back(block.attended(*e.place), *e.place)
    bright = BRIGHT_TIMES / (block.rows * block.columns)  # as beside it: of the patches, not of the pixels
    title, note = f"{block.name}, pixel by pixel of its map", "one position of every patch, the others not at all"
    panels.append(Panel(title, note, scaled(exact, bright), is_smooth=False))
    return panels


def _field_panels(fields: Sequence[Field], size_px: int) -> list[Panel]:
    panels = []
    for field in fields[:NUM_COLUMNS]:
        left, top, right, bottom = field.window
        note = f"depends on {100 * field.share:.{0 if field.share > 0.1 else 1}f} % of the pixels"
        if field.has_attention:
            note += f"; by convolution {100 * (right - left) * (bottom - top) / size_px**2:.0f} %"
        panels.append(
            Panel(
                field.name,
                note,
                in_decades(field.gradient),
                is_smooth=False,  # or what is exactly 0 would not look it
                window=(left / size_px, top / size_px, right / size_px, bottom / size_px),
            )
        )
    return panels


def _painted(cut: Image.Image, panel: Panel, place: tuple[float, float]) -> Image.Image:
    """A copy in grey and dimmed, with the values in the colours of the ramp over it."""
    grey = np.asarray(cut.convert("L"), np.float32)[..., None] * 0.5 + 8
    filter = Image.Resampling.BICUBIC if panel.is_smooth else Image.Resampling.NEAREST
    values = Image.fromarray(panel.values.astype(np.float32)).resize(cut.size, filter)
    painted = _coloured(grey, np.clip(np.asarray(values), 0, 1))
    draw = ImageDraw.Draw(painted)
    if panel.window:
        left, top, right, bottom = panel.window
        _dash(draw, (left * cut.width, top * cut.height, right * cut.width - 1, bottom * cut.height - 1))
    if panel.is_marked:
        _mark(draw, place[0] * cut.width, place[1] * cut.height)
    return painted


def _coloured(grey: np.ndarray, values: np.ndarray) -> Image.Image:
    """`grey` (h, w, 1), 0 to 255, under the colours of `values` (h, w), as opaque as those are large."""
    v = values[..., None]
    stops = np.linspace(0, 1, len(RAMP))
    colour = np.concatenate([np.interp(v, stops, [one[c] for one in RAMP]) for c in range(3)], axis=-1)
    opacity = OPACITY * v**0.6
    return Image.fromarray((grey * (1 - opacity) + colour * opacity).clip(0, 255).astype(np.uint8))


def _put_scale(figure: Image.Image, right: int, baseline: int, scale: Scale) -> int:
    """A bar of the colours of a row between what they mean, up to `right`; returns where it begins."""
    width, height = SCALE_PX
    draw, font = ImageDraw.Draw(figure), _font(14)
    draw.text((right, baseline), scale.high, fill=SOFT, font=font, anchor="rs")
    left = right - round(font.getlength(scale.high)) - 8 - width
    values = np.broadcast_to(np.linspace(scale.least, 1, width), (height, width))
    figure.paste(_coloured(np.full((height, width, 1), SCALE_GREY), values), (left, baseline - height + 1))
    draw.text((left - 8, baseline), scale.low, fill=SOFT, font=font, anchor="rs")
    return left - 8 - round(font.getlength(scale.low))


def _put_image(figure: Image.Image, left: int, top: int, height: int, e: Explanation) -> None:
    """The whole image, fitted into a panel, with a frame around what the network sees and a mark at the place."""
    scale = min(PANEL_PX / e.image.width, height / e.image.height)
    size = (max(1, round(e.image.width * scale)), max(1, round(e.image.height * scale)))
    shown = e.image.resize(size, Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(shown)
    for inset, colour, width in ((0, INK, 4), (1, PAPER, 2)):
        left_px, top_px, right_px, bottom_px = (value * scale for value in e.view.box)
        corner = (left_px + inset, top_px + inset)
        end = (max(corner[0], right_px - 1 - inset), max(corner[1], bottom_px - 1 - inset))
        draw.rectangle((corner, end), outline=colour, width=width)
    _mark(draw, (e.at[0] + 0.5) * scale, (e.at[1] + 0.5) * scale)
    figure.paste(shown, (left, top + (height - size[1]) // 2))
    draw = ImageDraw.Draw(figure)
    _write(draw, left, top + height + 23, f"The image, {e.image.width} x {e.image.height} px", 17, INK, PANEL_PX)
    note = f"framed: what the network sees; marked: {e.at[0]:g} {e.at[1]:g}"
    _write(draw, left, top + height + 44, note, 14, SOFT, PANEL_PX)


def _put_classes(draw: ImageDraw.ImageDraw, left: int, top: int, height: int, evidence: Sequence[Evidence]) -> None:
    """The likeliest classes as bars, as long as they are likely."""
    classes = sorted(evidence, key=lambda one: -one.probability)
    pitch = min(46, height // len(classes))
    for i, one in enumerate(classes):
        y = top + i * pitch
        draw.rounded_rectangle((left, y, left + PANEL_PX, y + pitch - 8), 8, outline=LINE)
        length = round(PANEL_PX * one.probability)
        if length > 16:  # a shorter one has no room for its round corners
            draw.rounded_rectangle((left, y, left + length, y + pitch - 8), 8, fill=BAR)
        share = f"{100 * one.probability:.1f} %"
        baseline = y + (pitch - 8) // 2 + 6
        _write(draw, left + 12, baseline, one.class_name, 16, ACCENT if one is evidence[0] else INK, PANEL_PX - 100)
        draw.text((left + PANEL_PX - 12, baseline), share, fill=SOFT, font=_font(16), anchor="rs")


def _mark(draw: ImageDraw.ImageDraw, x: float, y: float) -> None:
    for radius, colour, width in ((9, INK, 5), (8, PAPER, 3)):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour, width=width)


def _dash(draw: ImageDraw.ImageDraw, box: tuple[float, float, float, float], dash_px: int = 7) -> None:
    left, top, right, bottom = box
    for (x1, y1), (x2, y2) in (
        ((left, top), (right, top)),
        ((right, top), (right, bottom)),
        ((right, bottom), (left, bottom)),
        ((left, bottom), (left, top)),
    ):
        length = abs(x2 - x1) + abs(y2 - y1)
        for start in range(0, round(length), 2 * dash_px):
            a, b = start / length, min(start + dash_px, length) / length
            line = (x1 + (x2 - x1) * a, y1 + (y2 - y1) * a, x1 + (x2 - x1) * b, y1 + (y2 - y1) * b)
            draw.line(line, fill=INK, width=4)
            draw.line(line, fill=PAPER, width=2)


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _write(
    draw: ImageDraw.ImageDraw, left: int, baseline: int, text: str, size: int, colour: Colour, width: int
) -> None:
    font = _font(size)
    draw.text((left, baseline), shortened(text, font, width), fill=colour, font=font, anchor="ls")
