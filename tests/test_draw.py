"""Boxes, labels, masks and legends; the VOC color map against the values of the VOC development kit."""

from __future__ import annotations

import errno
import os
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mobilevit.draw import (
    OKABE_ITO,
    PALETTE,
    class_color,
    draw_boxes,
    draw_mask,
    voc_colormap,
    write_jpeg,
    write_mask_png,
)

# VOCdevkit, VOClabelcolormap(256): the background, the 20 classes, and the ignore index.
VOC_COLORS = (
    *((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128)),
    *((128, 128, 128), (64, 0, 0), (192, 0, 0), (64, 128, 0), (192, 128, 0), (64, 0, 128), (192, 0, 128)),
    *((64, 128, 128), (192, 128, 128), (0, 64, 0), (128, 64, 0), (0, 192, 0), (128, 192, 0), (0, 64, 128)),
)
VOC = {**dict(enumerate(VOC_COLORS)), 255: (224, 224, 192)}


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


class Text(NamedTuple):
    """A drawn text and its bounding box."""

    text: str
    x1: float
    y1: float
    x2: float
    y2: float


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Text]:
    """All texts that are drawn."""
    texts: list[Text] = []
    draw = ImageDraw.ImageDraw.text

    def record(self: ImageDraw.ImageDraw, xy: tuple[float, float], text: str, **options: Any) -> None:
        if self.mode == "RGB":
            texts.append(Text(text, *self.textbbox(xy, text, font=options["font"], anchor=options["anchor"])))
        draw(self, xy, text, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    return texts


def overlap(a: Text, b: Text) -> bool:
    return a.x1 < b.x2 and b.x1 < a.x2 and a.y1 < b.y2 and b.y1 < a.y2


# ---------------------------------------------------------------------------------------------------------------------
# Boxes


def test_frame_position():
    image = noise(240, 180)
    before = np.asarray(image).copy()
    after = np.asarray(draw_boxes(image, [(50.4, 60.2, 149.7, 139.6)], [5], [""]))
    assert np.array_equal(np.asarray(image), before)
    # The box covers pixels 50 to 149 and 60 to 139. The contrasting line around it is 1 px wide.
    for line in (after[60, 50:150], after[139, 50:150], after[60:140, 50], after[60:140, 149]):
        assert (line == class_color(5)).all()
    changed = (after != before).any(-1)
    rows, columns = changed.any(1).nonzero()[0], changed.any(0).nonzero()[0]
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (59, 140, 49, 150)
    assert not changed[64:136, 54:146].any()


@pytest.mark.parametrize("index", range(len(PALETTE)))
def test_frames_are_visible_on_every_background(index: int):
    def luminance(colors: np.ndarray) -> np.ndarray:
        linear = np.where(colors <= 10, colors / 255 / 12.92, ((colors / 255 + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    for background in (class_color(index), (0, 0, 0), (255, 255, 255), (128, 128, 128)):
        drawn = np.asarray(draw_boxes(Image.new("RGB", (100, 80), background), [(20, 20, 60, 60)], [index], [""]))
        light = luminance(drawn[40, 10:30].astype(float)) + 0.05
        assert light.max() / light.min() > 3  # WCAG 2.2, 1.4.11: graphical objects


@pytest.mark.parametrize("size", [(640, 427), (90, 60), (60, 90), (300, 21), (4000, 3000)], ids=str)
def test_labels_stay_in_the_image(written: list[Text], size: tuple[int, int]):
    width, height = size
    boxes = [
        (x * width, y * height, min(1, x + 0.3) * width, min(1, y + 0.3) * height)
        for x in (0, 0.4, 0.95)
        for y in (0, 0.4, 0.95)
    ]
    labels = ["ant 3 %", "a hippopotamus at the dining table, with its children and theirs 97 %", "Ågy| 5 %"] * 3
    draw_boxes(Image.new("RGB", size), boxes, list(range(9)), labels)
    assert len(written) == 9
    for text in written:
        assert text.x1 >= 0
        assert text.y1 >= 0
        assert text.x2 <= width
        assert text.y2 <= height


@pytest.mark.parametrize("size", [(1, 1), (8, 5), (2, 300), (300, 2)], ids=str)
def test_images_too_small_for_labels(written: list[Text], size: tuple[int, int]):
    boxes = [(0.0, 0.0, float(size[0]), float(size[1])), (0.2, 0.2, 0.7, 0.7)]
    drawn = draw_boxes(Image.new("RGB", size), boxes, [0, 1], ["ant", "bee"])
    assert drawn.size == size
    assert written == []


def test_labels_do_not_overlap(written: list[Text]):
    same = [(100.0, 100.0, 300.0, 250.0)] * 4
    draw_boxes(Image.new("RGB", (640, 427)), [*same, (90, 95, 310, 260)], [0, 1, 2, 3, 4], ["person 97 %"] * 5)
    assert len(written) == 5
    assert not any(overlap(a, b) for a, b in combinations(written, 2))


def test_the_highest_score_is_on_top():
    drawn = draw_boxes(Image.new("RGB", (200, 200)), [(50, 50, 150, 150)] * 2, [3, 1], ["", ""])
    assert drawn.getpixel((50, 100)) == class_color(3)


def test_characters_missing_in_the_font(written: list[Text]):
    labels = {"café  ñandú\n9 %": "cafe nandu 9 %", "日本 9 %": "?? 9 %", "e\u0301 ② ±1": "e 2 ±1"}
    for label, shown in labels.items():
        draw_boxes(Image.new("RGB", (640, 427)), [(100, 100, 300, 250)], [0], [label])
        assert written[-1].text == shown


def test_palette():
    assert len(set(PALETTE)) == 21
    assert class_color(21) == class_color(0)
    # Simulated protanopia and deuteranopia (Vienot, Brettel and Mollon 1999, on linear light).
    linear = (np.array(OKABE_ITO) / 255) ** 2.2
    to_lms = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])
    protan = np.array([[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]])
    deutan = np.array([[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]])
    for kind in (protan, deutan):
        simulated = (linear @ to_lms.T @ kind.T @ np.linalg.inv(to_lms).T).clip(0, 1) ** (1 / 2.2) * 255
        assert min(np.abs(a - b).max() for a, b in combinations(simulated, 2)) > 25


# ---------------------------------------------------------------------------------------------------------------------
# Masks


def test_only_classes_of_the_legend_are_painted():
    image = noise(120, 90)
    mask = np.zeros((90, 120), np.uint8)
    mask[:, 40:80], mask[:, 80:] = 4, 255
    before = np.asarray(image).copy()
    whole = draw_mask(image, mask, {4: "sheep 33.3 %"})
    assert np.array_equal(np.asarray(image), before)
    assert whole.width == 120
    assert whole.height > 90
    after = np.asarray(whole)[:90]
    assert np.array_equal(after[:, :40], before[:, :40])
    assert np.array_equal(after[:, 80:], before[:, 80:])
    assert (after[:, 40] == class_color(4)).all()
    assert (after[:, 79] == class_color(4)).all()
    inner = after[:, 44:76].astype(float).mean((0, 1))
    assert np.abs(inner - (0.65 * np.array(class_color(4)) + 0.35 * 127.5)).max() < 6
    assert after[:, 44:76].std() > 5  # the image shows through
    legend = np.asarray(whole)[90:].reshape(-1, 3).tolist()
    assert list(class_color(4)) in legend
    assert np.array_equal(np.asarray(draw_mask(image, mask, {})), before)


@pytest.mark.parametrize("size", [(640, 427), (90, 60), (21, 300), (3, 3)], ids=str)
def test_legends_stay_in_the_image(written: list[Text], size: tuple[int, int]):
    mask = (np.arange(size[0] * size[1]) % 30).astype(np.uint8).reshape(size[1], size[0])
    whole = draw_mask(noise(*size), mask, {i: f"class number {i}" * (1 + i % 3) for i in range(30)})
    assert whole.width == size[0]
    for text in written:
        assert text.y1 >= size[1]
        assert text.y2 <= whole.height
        assert not text.text or 0 <= text.x1 < text.x2 <= size[0]
    assert not any(overlap(a, b) for a, b in combinations(written, 2))


def test_voc_colormap():
    colors = voc_colormap()
    assert {index: tuple(colors[index].tolist()) for index in VOC} == VOC
    assert len(np.unique(colors, axis=0)) == 256


def test_write_mask_png(tmp_path: Path):
    mask = np.random.default_rng(0).choice(np.array([*VOC], np.uint8), (33, 50))
    write_mask_png(mask, tmp_path / "new" / "mask.png")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["mask.png"]
    with Image.open(tmp_path / "new" / "mask.png") as image:
        assert (image.format, image.mode, image.size) == ("PNG", "P", (50, 33))
        assert np.array_equal(np.asarray(image), mask)
        assert np.array_equal(np.asarray(image.convert("RGB")), np.vectorize(VOC.get, otypes=[object])(mask).tolist())
    write_mask_png(np.full((1, 1), 255, np.uint8), tmp_path / "one.png")
    assert np.asarray(Image.open(tmp_path / "one.png")).tolist() == [[255]]


def test_invalid_masks(tmp_path: Path):
    for mask in (np.zeros((90, 60), np.uint8), np.zeros((60, 90), np.int64)):
        with pytest.raises(ValueError, match=r"uint8 of shape \(60, 90\)"):
            draw_mask(noise(90, 60), mask, {})
    for mask in (np.zeros((3, 3), np.int64), np.zeros((3, 3, 1), np.uint8)):
        with pytest.raises(ValueError, match=r"uint8 of shape \(H, W\)"):
            write_mask_png(mask, tmp_path / "mask.png")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_does_not_damage_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def write_half(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    write_mask_png(np.zeros((3, 3), np.uint8), tmp_path / "mask.png")
    before = (tmp_path / "mask.png").read_bytes()
    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(OSError, match="No space left") as caught:
        write_mask_png(np.ones((3, 3), np.uint8), tmp_path / "mask.png")
    assert caught.value.filename == str(tmp_path / "mask.png")
    with pytest.raises(OSError, match="No space left"):
        write_jpeg(noise(30, 20), tmp_path / "image.jpg")
    assert [path.name for path in tmp_path.iterdir()] == ["mask.png"]
    assert (tmp_path / "mask.png").read_bytes() == before


def test_images_larger_than_jpeg_supports(tmp_path: Path):
    write_jpeg(Image.new("RGB", (70_000, 20)), tmp_path / "wide.jpg")
    with Image.open(tmp_path / "wide.jpg") as image:
        assert image.size == (65_500, 19)
