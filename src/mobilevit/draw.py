"""Draw predictions on an image: boxes with labels, or a mask with a legend. Write masks as palette PNG files.

Images are upright RGB images of Pillow. Classes are indices, which select the color.
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

from mobilevit.files import write_atomic

Color = tuple[int, int, int]
Box = tuple[float, float, float, float]

BLACK, WHITE = (0, 0, 0), (255, 255, 255)
# Distinguishable with any color vision deficiency (Okabe and Ito, Color Universal Design, 2008, without black). Ordered
# so that neighbors also differ in lightness.
OKABE_ITO: tuple[Color, ...] = (
    (230, 159, 0),  # orange
    (0, 114, 178),  # blue
    (86, 180, 233),  # sky blue
    (213, 94, 0),  # vermilion
    (240, 228, 66),  # yellow
    (0, 158, 115),  # bluish green
    (204, 121, 167),  # reddish purple
)
# Original, darker and lighter: 21 colors.
PALETTE: tuple[Color, ...] = (
    *OKABE_ITO,
    *((r * 11 // 20, g * 11 // 20, b * 11 // 20) for r, g, b in OKABE_ITO),
    *((r + (255 - r) * 11 // 20, g + (255 - g) * 11 // 20, b + (255 - b) * 11 // 20) for r, g, b in OKABE_ITO),
)
MASK_OPACITY = 0.65
MAX_JPEG_PX = 65_500  # longest side that libjpeg supports


def class_color(class_index: int) -> Color:
    """The color of a class, the same in every image. It repeats after 21 classes."""
    return PALETTE[class_index % len(PALETTE)]


def draw_boxes(
    image: Image.Image, boxes: Sequence[Box], class_indices: Sequence[int], labels: Sequence[str]
) -> Image.Image:
    """Draw boxes (x1, y1, x2, y2) in pixels and their labels on a copy of `image`, highest score first.

    Labels stay inside the image and do not overlap if there is room. They are shortened, or omitted in tiny images.
    """
    result = image.copy()
    draw = ImageDraw.Draw(result)
    line, font = _line_width(image), _font_for(image)
    ascent, descent = _font_extent(font)
    padding = 2 * line
    for box, index in reversed(list(zip(boxes, class_indices, strict=True))):  # the highest score on top
        _draw_frame(draw, box, class_color(index), line, image.size)
    occupied: list[Box] = []
    for box, index, label in zip(boxes, class_indices, labels, strict=True):
        text = shorten(label, font, image.width - 2 * padding)
        width, height = math.ceil(font.getlength(text)) + 2 * padding, ascent + descent + padding
        if not text or height > image.height:
            continue
        x, y = _place_label(box, width, height, image.size, occupied)
        occupied.append((x, y, x + width, y + height))
        color = class_color(index)
        draw.rectangle((x, y, x + width - 1, y + height - 1), fill=color)
        draw.text((x + padding, y + padding // 2 + ascent), text, fill=_contrast(color), font=font, anchor="ls")
    return result


def draw_mask(image: Image.Image, mask: np.ndarray, legend: Mapping[int, str]) -> Image.Image:
    """Blend the classes of `legend` over `image` and add a legend below.

    `mask` (H, W) contains class indices, uint8, and has the size of the image. Other classes stay transparent. The
    image is mostly desaturated below the colors, and regions have an opaque edge.

    Raises:
        ValueError: the mask has another dtype or shape.
    """
    if mask.shape != (image.height, image.width) or mask.dtype != np.uint8:
        raise ValueError(
            f"mask is {mask.dtype} of shape {mask.shape}; it must be uint8 of shape {(image.height, image.width)}"
        )
    opacity = np.zeros(256, np.uint8)
    opacity[list(legend)] = round(255 * MASK_OPACITY)
    # Pillow's bytes: floating point would take ten times the memory, which matters for 12 megapixels.
    colors = Image.fromarray(mask)
    colors.putpalette([value for index in range(256) for value in class_color(index)])
    colors = colors.convert("RGB")
    gray = Image.blend(image, image.convert("L").convert("RGB"), 0.7)
    is_painted = opacity[mask] > 0
    blended = Image.composite(colors, gray, Image.fromarray(opacity[mask]))
    blended = Image.composite(blended, image, Image.fromarray(np.where(is_painted, 255, 0).astype(np.uint8)))
    blended.paste(colors, mask=Image.fromarray(_edges(mask, _line_width(image)) & is_painted))
    return _add_legend(blended, [(class_color(index), text) for index, text in legend.items()])


def voc_colormap() -> np.ndarray:
    """The color map of Pascal VOC, uint8 (256, 3); as in VOClabelcolormap.m of the VOC development kit.

    Bits 0, 3 and 6 of the index are bits 7, 6 and 5 of red. The bits next to them belong to green and blue.
    """
    indices = np.arange(256)
    colors = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        channel, shift = bit % 3, 7 - bit // 3
        colors[:, channel] |= ((indices >> bit & 1) << shift).astype(np.uint8)
    return colors


def write_mask_png(mask: np.ndarray, path: Path) -> None:
    """Write class indices, uint8 (H, W), as a PNG with VOC's palette, atomically. 255 marks ignored pixels.

    Raises:
        ValueError: the mask has another dtype or shape.
    """
    if mask.dtype != np.uint8 or mask.ndim != 2:
        raise ValueError(f"mask is {mask.dtype} of shape {mask.shape}; it must be uint8 of shape (H, W)")
    image = Image.fromarray(mask)
    image.putpalette(voc_colormap().tobytes())
    _write(image, path, "PNG")


def write_jpeg(image: Image.Image, path: Path) -> None:
    """Write an RGB image as JPEG, atomically. Images that exceed the format's maximum size are resized."""
    if max(image.size) > MAX_JPEG_PX:
        image = image.copy()
        image.thumbnail((MAX_JPEG_PX, MAX_JPEG_PX))
    _write(image, path, "JPEG", quality=90)


def _write(image: Image.Image, path: Path, format: str, **options: int) -> None:
    file = io.BytesIO()
    image.save(file, format, **options)
    # Python's errors name the cause, such as a full disk; those of Pillow's encoders do not.
    write_atomic(path, file.getvalue(), sync=False)


# ---------------------------------------------------------------------------------------------------------------------
# Lines


def _line_width(image: Image.Image) -> int:
    return max(2, round(math.sqrt(image.width * image.height) / 240))


def _draw_frame(draw: ImageDraw.ImageDraw, box: Box, color: Color, line: int, size: tuple[int, int]) -> None:
    """Draw a frame between two thin lines of contrasting lightness, so that it is visible on every background."""
    thin = max(1, line // 3)
    x1, y1 = (max(0, math.floor(value)) for value in box[:2])
    x2, y2 = (min(side, math.ceil(value)) - 1 for value, side in zip(box[2:], size, strict=True))
    for inset, width, outline in ((-thin, line + 2 * thin, _contrast(color)), (0, line, color)):
        left, top, right, bottom = x1 + inset, y1 + inset, x2 - inset, y2 - inset
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=outline, width=width)


def _edges(mask: np.ndarray, line: int) -> np.ndarray:
    """Pixels within about `line` pixels of another class, bool (H, W)."""
    padded = np.pad(mask, 1, mode="edge")
    neighbors = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    edge = np.logical_or.reduce([mask != neighbor for neighbor in neighbors])
    for _ in range(line - 1):
        wider = edge.copy()
        wider[1:] |= edge[:-1]
        wider[:-1] |= edge[1:]
        wider[:, 1:] |= edge[:, :-1]
        wider[:, :-1] |= edge[:, 1:]
        edge = wider
    return edge


def _contrast(color: Color) -> Color:
    """Black or white, whichever has the higher contrast ratio to `color` (WCAG 2.2)."""
    r, g, b = ((c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4) for c in (v / 255 for v in color))
    luminance = 0.2126 * r + 0.7152 * g + 0.0722 * b
    return BLACK if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else WHITE


# ---------------------------------------------------------------------------------------------------------------------
# Text


def default_font(size: float) -> ImageFont.FreeTypeFont:
    """Pillow's built-in font."""
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _font_for(image: Image.Image) -> ImageFont.FreeTypeFont:
    return default_font(max(11, round(math.sqrt(image.width * image.height) / 34)))


def _font_extent(font: ImageFont.FreeTypeFont) -> tuple[int, int]:
    """Ascent and descent of the letters in pixels."""
    _, top, _, bottom = font.getbbox("Ag|", anchor="ls")
    return math.ceil(-top), math.ceil(bottom)


def shorten(text: str, font: ImageFont.FreeTypeFont, max_width: float) -> str:
    """The text on one line in characters of the font, cut with "…" if it is wider; "" if nothing fits."""
    text = "".join(_replace_missing(character) for character in " ".join(text.split()))
    if font.getlength(text) <= max_width:
        return text
    while text and font.getlength(f"{text}…") > max_width:
        text = text[:-1]
    return f"{text.rstrip()}…" if text else ""


@cache
def _replace_missing(character: str) -> str:
    """The character, its base character without accents, or "?": Pillow's font covers little more than ASCII."""
    if _has_glyph(character):
        return character
    decomposed = unicodedata.normalize("NFKD", character)
    base = "".join(one for one in decomposed if not unicodedata.combining(one) and _has_glyph(one))
    return base or ("" if unicodedata.combining(character) else "?")


def _has_glyph(character: str) -> bool:
    def render(text: str) -> bytes:
        image = Image.new("L", (40, 40))
        ImageDraw.Draw(image).text((8, 8), text, fill=255, font=default_font(20))
        return image.tobytes()

    return render(character) != render("\uffff")  # no font has U+FFFF, so this is the placeholder


def _place_label(box: Box, width: int, height: int, size: tuple[int, int], occupied: Sequence[Box]) -> tuple[int, int]:
    """The upper left corner of a label: above its box, else inside at the top, below, or inside at the bottom.

    The first of these that is inside the image and free, else the first that is inside the image.
    """
    x1, y1, x2, y2 = math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3])
    candidates = [
        (min(max(x, 0), size[0] - width), y)
        for y in (y1 - height, y1, y2, y2 - height)
        for x in (x1, x2 - width)
        if 0 <= y <= size[1] - height
    ]
    for x, y in candidates:
        if not any(x < b[2] and b[0] < x + width and y < b[3] and b[1] < y + height for b in occupied):
            return x, y
    return candidates[0] if candidates else (min(max(x1, 0), size[0] - width), min(max(y1, 0), size[1] - height))


def _add_legend(image: Image.Image, entries: Sequence[tuple[Color, str]]) -> Image.Image:
    """Add a white strip below the image with a color swatch and a text per entry."""
    if not entries:
        return image
    font = _font_for(image)
    ascent, descent = _font_extent(font)
    gap, row_px = max(3, ascent // 2), round(1.6 * (ascent + descent))
    x, y = gap, image.height + gap
    placed = []
    for color, text in entries:
        text = shorten(text, font, image.width - ascent - 3 * gap)
        width = ascent + gap + math.ceil(font.getlength(text))
        if x > gap and x + width + gap > image.width:
            x, y = gap, y + row_px
        placed.append((x, y, color, text))
        x += width + 3 * gap
    result = Image.new("RGB", (image.width, y + row_px + gap // 2), WHITE)
    result.paste(image)
    draw = ImageDraw.Draw(result)
    for x, y, color, text in placed:
        top = y + (row_px - ascent) // 2
        draw.rectangle((x, top, x + ascent - 1, top + ascent - 1), fill=color, outline=BLACK)
        draw.text((x + ascent + gap, top + ascent), text, fill=BLACK, font=font, anchor="ls")
    return result
