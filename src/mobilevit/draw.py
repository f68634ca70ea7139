"""What was found, drawn on the image: boxes with names, masks with a legend, and masks as files with a palette.

Nothing here knows networks: images are Pillow's, upright RGB; a class is its number, which gives it its colour.
"""

from __future__ import annotations

import io
import math
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mobilevit.files import write_whole

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]

BLACK, WHITE = (0, 0, 0), (255, 255, 255)
# Seven colours that stay apart for people who do not see red, green or blue (Okabe and Ito, Color Universal Design,
# 2008; without their black), ordered so that neighbours differ in lightness as well.
OKABE_ITO: tuple[Colour, ...] = (
    (230, 159, 0),  # orange
    (0, 114, 178),  # blue
    (86, 180, 233),  # sky blue
    (213, 94, 0),  # vermilion
    (240, 228, 66),  # yellow
    (0, 158, 115),  # bluish green
    (204, 121, 167),  # reddish purple
)
# As they are, then darker, then lighter: 21 colours, and class 21 has that of class 0 again.
PALETTE: tuple[Colour, ...] = (
    *OKABE_ITO,
    *((r * 11 // 20, g * 11 // 20, b * 11 // 20) for r, g, b in OKABE_ITO),
    *((r + (255 - r) * 11 // 20, g + (255 - g) * 11 // 20, b + (255 - b) * 11 // 20) for r, g, b in OKABE_ITO),
)
OPACITY = 0.65  # of the colour over a region
MAX_JPEG_PX = 65_500  # the longest side that libjpeg writes
LOOK = (
    Path(__file__).with_name("report") / "templates" / "style.css"
)  # colours, letters and cards of the pages for browsers


def colour_of(class_index: int) -> Colour:
    """The colour of a class, the same in every image."""
    return PALETTE[class_index % len(PALETTE)]


def draw_boxes(
    image: Image.Image, boxes: Sequence[Box], class_indices: Sequence[int], labels: Sequence[str]
) -> Image.Image:
    """A copy of `image` with boxes (x1, y1, x2, y2, in pixels) and a label at each, the most important first.

    Labels lie inside the image and, as far as there is room, on no other label; one for which the image is too
    small is shortened or left out.
    """
    drawn = image.copy()
    draw = ImageDraw.Draw(drawn)
    line, font = _line_px(image), _font(image)
    ascent, descent = _metrics(font)
    padding = 2 * line
    for box, index in reversed(list(zip(boxes, class_indices, strict=True))):  # the most important on top
        _frame(draw, box, colour_of(index), line, image.size)
    taken: list[Box] = []
    for box, index, label in zip(boxes, class_indices, labels, strict=True):
        text = shortened(label, font, image.width - 2 * padding)
        width, height = math.ceil(font.getlength(text)) + 2 * padding, ascent + descent + padding
        if not text or height > image.height:
            continue
        x, y = _place(box, width, height, image.size, taken)
        taken.append((x, y, x + width, y + height))
        colour = colour_of(index)
        draw.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
        draw.text((x + padding, y + padding // 2 + ascent), text, fill=_contrast(colour), font=font, anchor="ls")
    return drawn


def draw_mask(image: Image.Image, mask: np.ndarray, legend: Mapping[int, str]) -> Image.Image:
    """`image` with the classes of `legend` painted over it, and a strip below it that says what they are called.

    `mask` (H, W) are the class numbers, uint8, of the size of the image. Classes that `legend` does not name stay
    clear. Painted regions lose most of their own colours, so that green over grass is seen to be paint, and have an
    edge of the pure colour.
    """
    if mask.shape != (image.height, image.width) or mask.dtype != np.uint8:
        raise ValueError(
            f"mask of {mask.dtype} and shape {mask.shape} for an image of {image.width} x {image.height} px; "
            f"it must be uint8 of shape {(image.height, image.width)}"
        )
    opacity = np.zeros(256, np.uint8)
    opacity[list(legend)] = round(255 * OPACITY)
    # Whole images in Pillow's bytes: as floating point, one of 12 megapixels would take ten times its memory.
    paint = Image.fromarray(mask)
    paint.putpalette([value for index in range(256) for value in colour_of(index)])
    grey = Image.blend(image, image.convert("L").convert("RGB"), 0.7)
    painted = Image.composite(paint.convert("RGB"), grey, Image.fromarray(opacity[mask]))
    painted = Image.composite(painted, image, Image.fromarray(np.where(opacity[mask] > 0, 255, 0).astype(np.uint8)))
    edge = _edges(mask, _line_px(image)) & (opacity[mask] > 0)
    painted.paste(paint.convert("RGB"), mask=Image.fromarray(edge))
    return _with_legend(painted, [(colour_of(index), text) for index, text in legend.items()])


def voc_colours() -> np.ndarray:
    """Pascal VOC's colour map, uint8 (256, 3): three bits of the class number for R, G, B each, the lowest as highest.

    Bits 0, 3 and 6 of the number are bits 7, 6 and 5 of red; those beside them green's and blue's (VOCdevkit,
    VOClabelcolormap.m).
    """
    numbers = np.arange(256)
    colours = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        channel, place = bit % 3, 7 - bit // 3
        colours[:, channel] |= ((numbers >> bit & 1) << place).astype(np.uint8)
    return colours


def palette_png(mask: np.ndarray, path: Path) -> None:
    """Write class numbers, uint8 (H, W), as VOC does: a PNG whose pixels are the numbers, shown in VOC's colours.

    255, pixels of no class, is written as it is. The file is written whole or not at all.

    Raises:
        ValueError: a mask of another type or shape.
    """
    if mask.dtype != np.uint8 or mask.ndim != 2:
        raise ValueError(f"mask of {mask.dtype} and shape {mask.shape}; it must be uint8 of shape (H, W)")
    image = Image.fromarray(mask)
    image.putpalette(voc_colours().tobytes())
    _write(image, path, "PNG")


def write_jpeg(image: Image.Image, path: Path) -> None:
    """Write an RGB image as JPEG, whole or not at all; one that is wider than JPEG can hold, smaller."""
    if max(image.size) > MAX_JPEG_PX:
        image = image.copy()
        image.thumbnail((MAX_JPEG_PX, MAX_JPEG_PX))
    _write(image, path, "JPEG", quality=90)


def _write(image: Image.Image, path: Path, format: str, **options: int) -> None:
    file = io.BytesIO()
    image.save(file, format, **options)
    # Python writes the file, since its errors say what is wrong, a full disk for one; Pillow's do not.
    write_whole(path, lambda aside: aside.write_bytes(file.getvalue()), synced=False)


# ---------------------------------------------------------------------------------------------------------------------
# Lines


def _line_px(image: Image.Image) -> int:
    return max(2, round(math.sqrt(image.width * image.height) / 240))


def _frame(draw: ImageDraw.ImageDraw, box: Box, colour: Colour, line: int, size: tuple[int, int]) -> None:
    """A frame in the colour between two thin ones of the opposite lightness: seen on every ground."""
    thin = max(1, line // 3)
    x1, y1 = (max(0, math.floor(value)) for value in box[:2])
    x2, y2 = (min(side, math.ceil(value)) - 1 for value, side in zip(box[2:], size, strict=True))
    for inset, width, ink in ((-thin, line + 2 * thin, _contrast(colour)), (0, line, colour)):
        left, top, right, bottom = x1 + inset, y1 + inset, x2 - inset, y2 - inset
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=ink, width=width)


def _edges(mask: np.ndarray, line: int) -> np.ndarray:
    """Where another class is nearer than about `line` pixels; bool (H, W)."""
    padded = np.pad(mask, 1, mode="edge")
    inner = padded[1:-1, 1:-1]
    others = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    edge = np.logical_or.reduce([inner != other for other in others])
    for _ in range(line - 1):
        wider = edge.copy()
        wider[1:] |= edge[:-1]
        wider[:-1] |= edge[1:]
        wider[:, 1:] |= edge[:, :-1]
        wider[:, :-1] |= edge[:, 1:]
        edge = wider
    return edge


def _contrast(colour: Colour) -> Colour:
    """Black or white, whichever is further from `colour` in lightness (WCAG 2.2, contrast ratio)."""
    r, g, b = ((c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4) for c in (v / 255 for v in colour))
    luminance = 0.2126 * r + 0.7152 * g + 0.0722 * b
    return BLACK if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else WHITE


# ---------------------------------------------------------------------------------------------------------------------
# Text


def _font(image: Image.Image) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(max(11, round(math.sqrt(image.width * image.height) / 34)))
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _metrics(font: ImageFont.FreeTypeFont) -> tuple[int, int]:
    """How far letters of the font reach above and below their line, in pixels."""
    _, top, _, bottom = font.getbbox("Ag|", anchor="ls")
    return math.ceil(-top), math.ceil(bottom)


def shortened(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text in one line of letters that the font has, with … for what does not fit; "" where nothing fits."""
    text = "".join(_drawable(character) for character in " ".join(text.split()))
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text.rstrip()}…" if text else ""


@cache
def _drawable(character: str) -> str:
    """The character, or without its accent, or "?": Pillow's own font knows little more than ASCII."""
    if _has_glyph(character):
        return character
    base = unicodedata.normalize("NFKD", character)
    kept = "".join(one for one in base if not unicodedata.combining(one) and _has_glyph(one))
    return kept or ("" if unicodedata.combining(character) else "?")


def _has_glyph(character: str) -> bool:
    def shape(text: str) -> bytes:
        image = Image.new("L", (40, 40))
        ImageDraw.Draw(image).text((8, 8), text, fill=255, font=ImageFont.load_default(20))
        return image.tobytes()

    return shape(character) != shape("\uffff")  # which no font has, and which shows what is drawn instead


def _place(box: Box, width: int, height: int, size: tuple[int, int], taken: Sequence[Box]) -> tuple[int, int]:
    """The upper left corner of a label: above its box, else in it at the top, below it, in it at the bottom.

    The first of these that lies in the image and on no label, else the first that lies in the image.
    """
    x1, y1, x2, y2 = math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3])
    places = [
        (min(max(x, 0), size[0] - width), y)
        for y in (y1 - height, y1, y2, y2 - height)
        for x in (x1, x2 - width)
        if 0 <= y <= size[1] - height
    ]
    for x, y in places:
        if not any(x < b[2] and b[0] < x + width and y < b[3] and b[1] < y + height for b in taken):
            return x, y
    return places[0] if places else (min(max(x1, 0), size[0] - width), min(max(y1, 0), size[1] - height))


def _with_legend(image: Image.Image, entries: Sequence[tuple[Colour, str]]) -> Image.Image:
    """The image, and below it a white strip with a swatch and a text for each entry, in as many rows as needed."""
    if not entries:
        return image
    font = _font(image)
    ascent, descent = _metrics(font)
    gap, row = max(3, ascent // 2), round(1.6 * (ascent + descent))
    x, y = gap, image.height + gap
    placed = []
    for colour, text in entries:
        text = shortened(text, font, image.width - ascent - 3 * gap)
        width = ascent + gap + math.ceil(font.getlength(text))
        if x > gap and x + width + gap > image.width:
            x, y = gap, y + row
        placed.append((x, y, colour, text))
        x += width + 3 * gap
    whole = Image.new("RGB", (image.width, y + row + gap // 2), WHITE)
    whole.paste(image)
    draw = ImageDraw.Draw(whole)
    for x, y, colour, text in placed:
        top = y + (row - ascent) // 2
        draw.rectangle((x, top, x + ascent - 1, top + ascent - 1), fill=colour, outline=BLACK)
        draw.text((x + ascent + gap, top + ascent), text, fill=BLACK, font=font, anchor="ls")
    return whole
