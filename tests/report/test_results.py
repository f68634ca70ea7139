"""Tables and images of results."""

import base64
import io
import re

import numpy as np
import pytest
from markupsafe import Markup
from PIL import Image

from mobilevit.report.results import class_table, confusion_html, curves_html, thumbnail
from mobilevit.tasks.task import ClassMetrics

HEADINGS = {"num_images": "images", "recall": "recall, %", "precision": "precision, %"}
DASH = "\N{EN DASH}"


def rows_of(html: str) -> list[list[str]]:
    """The cells of the bodies of all tables, as text."""
    bodies = "".join(re.findall(r"<tbody>(.*?)</tbody>", html, re.DOTALL))
    return [
        [Markup(cell).striptags() for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)]
        for row in re.findall(r"<tr>(.*?)</tr>", bodies, re.DOTALL)
    ]


def test_heat_map() -> None:
    html = confusion_html(np.array([[8, 2, 0], [0, 1234, 0], [0, 0, 0]]), ["cat", "dog", "emu"])
    assert rows_of(html) == [["cat", "8", "2", "·"], ["dog", "·", "1,234", "·"], ["emu", "·", "·", "·"]]
    fractions = [float(x) for x in re.findall(r"--fraction:([\d.]+)", html)]
    assert fractions == pytest.approx([0.8 ** (1 / 3), 0.2 ** (1 / 3), 1.0], abs=1e-3)
    assert html.count('class="correct"') == 2
    assert "cat: 2 of 10 images (20.0 %) predicted dog" in html
    pixels = confusion_html(np.array([[75, 25], [0, 10]]), ["a", "b"], "pixels")
    assert rows_of(pixels) == [["a", "75", "25"], ["b", "·", "100"]]


def test_most_frequent_confusions() -> None:
    C = 21
    matrix = np.random.default_rng(0).integers(0, 50, (C, C))
    names = [f"class {i}" for i in range(C)]
    expected = sorted((-int(matrix[i, j]), i, j) for i in range(C) for j in range(C) if i != j)[:20]
    assert rows_of(confusion_html(matrix, names)) == [
        [names[i], names[j], str(-n), f"{100 * -n / matrix[i].sum():.1f}"] for n, i, j in expected
    ]
    assert "No confusions" in confusion_html(np.diag(np.arange(C)), names)


def test_class_table() -> None:
    values = {"cat": (10, 90.0, 56.25), "dog": (10, 50.0, 83.3), "emu": (0, None, None), "ibis": (2, 0.0, None)}
    rows = [ClassMetrics(name, dict(zip(HEADINGS, row, strict=True))) for name, row in values.items()]
    html = class_table(rows, HEADINGS, by=("recall", "precision"))
    assert rows_of(html) == [
        ["ibis", "2", "0.0", DASH],
        ["dog", "10", "50.0", "83.3"],
        ["cat", "10", "90.0", "56.2"],
        ["emu", "0", DASH, DASH],
    ]


@pytest.mark.parametrize(("C", "num_shown"), [(20, 20), (21, 21), (1500, 1000)])
def test_many_classes_are_collapsed(C: int, num_shown: int) -> None:
    rows = [ClassMetrics(f"class {i}", {"recall": float(i % 100)}) for i in range(C)]
    html = class_table(rows, {"recall": "recall, %"}, by=("recall",))
    assert len(rows_of(html)) == num_shown
    first, *more = html.split("<details>")
    assert len(rows_of(first)) == min(C, 20)
    assert len(more) == (C > 20)


def test_curves() -> None:
    curves = np.stack([np.full(101, 0.5), np.full(101, np.nan), np.linspace(1, 0, 101)])
    html = curves_html(curves, ["cat", "<dog>", "emu"], ".")
    assert html.count("<svg") == 3  # the mean of all classes, and two classes with boxes
    assert html.count("<b>cat</b> 50.0") == html.count("<b>emu</b> 50.0") == 1
    assert "dog" not in html
    assert "<svg" not in curves_html(np.full((2, 101), np.nan), ["a", "b"], ".")


def read_url(url: str) -> Image.Image:
    head, data = url.split(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "1", "I;16"])
@pytest.mark.parametrize(("width", "height"), [(1000, 701), (7, 5), (3000, 2), (160, 160), (1, 1)])
def test_size_of_thumbnails(mode: str, width: int, height: int) -> None:
    source = Image.new(mode, (width, height))
    before = source.copy()
    image = read_url(thumbnail(source))
    assert source == before
    assert image.mode == "RGB"
    assert 80 < max(image.size) <= 160
    assert max(image.size) / min(image.size) == pytest.approx(min(width / height, 160), rel=0.02) or width > 999


def test_small_images_are_enlarged_without_interpolation() -> None:
    pixels = np.array([[255, 0], [0, 255]], dtype=np.uint8)
    image = np.asarray(read_url(thumbnail(Image.fromarray(pixels))))[..., 0]
    assert image.shape == (160, 160)
    assert np.abs(image[40::80, 40::80].astype(int) - pixels).max() < 8
