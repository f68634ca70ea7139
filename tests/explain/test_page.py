"""The HTML page in Chromium, compared with Python."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

import mobilevit
from conftest import ready_page
from mobilevit.explain import Explanation
from mobilevit.explain.heatmap import MIN_BRIGHTEST
from mobilevit.explain.page import render_page
from mobilevit.images import Preprocessing
from mobilevit.models.ssdlite import SSDLite
from mobilevit.weights import Weights
from small_networks import randomize

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("<b>ant</b>", "bee & co", "</script><script>alert(1)</script>")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Explanation, Path]:
    # 76 px: the feature map of stage 4 is 5 x 5, which is resized to whole patches.
    model = randomize(mobilevit.MobileViT("xxs", num_classes=3))
    weights = Weights(model.architecture, model.state_dict(), Preprocessing(86, 76), class_names=NAMES)
    path = tmp_path_factory.mktemp("page") / "china.html"
    photo = Image.fromarray(load_sample_image("china.jpg"))
    return mobilevit.explain_image(weights, photo, at=(301, 222), out=path), path


@contextmanager
def opened(browser: Browser, path: Path, **context: Any) -> Iterator[Page]:
    """The page from its file. It must not request any other file."""
    urls: list[str] = []
    with ready_page(browser, path.as_uri(), on_request=urls.append, **context) as page:
        yield page
    assert not [url for url in urls if not url.startswith(("file:", "data:"))]


@pytest.fixture(scope="module")
def page(browser: Browser, written: tuple[Explanation, Path]) -> Iterator[Page]:
    with opened(browser, written[1], viewport={"width": 1200, "height": 900}) as page:
        yield page


def test_the_file_is_self_contained(written: tuple[Explanation, Path]):
    html = written[1].read_text(encoding="utf-8")
    assert not re.search(r"https?://|src=[\"'](?!data:)|@import|url\(", html)
    assert html.count("</script>") == 2  # class names cannot close a script
    assert "{{" not in html
    assert len(html) < 1_500_000


def test_attention_matches_python(page: Page, written: tuple[Explanation, Path]):
    explanation = written[0]
    attention = """([i, ...options]) =>
        Array.from(explanation.attentionFrom(explanation.data.blocks[i], ...options))"""
    rollout = "([i, x, y]) => Array.from(explanation.rollout(explanation.data.blocks[i], x, y))"
    to_map = """([i, x, y]) => {
        const block = explanation.data.blocks[i];
        const map = explanation.toMap(block, explanation.attentionFrom(block, x, y, "mean", "mean"), x, y);
        return [map.rows, map.columns, ...map.values];
    }"""
    for i, block in enumerate(explanation.attention):
        for x, y in ((0.0, 0.0), explanation.point, (0.37, 0.81), (0.999, 0.5)):
            for layer, head in ((None, None), (0, 3), (block.num_layers - 1, None)):
                choice = ["mean" if one is None else str(one) for one in (layer, head)]
                values = page.evaluate(attention, [i, x, y, *choice])
                expected = block.from_point(x, y, layer=layer, head=head)
                np.testing.assert_allclose(values, expected.flatten(), atol=2e-4)
                assert sum(values) == pytest.approx(1)
            np.testing.assert_allclose(page.evaluate(rollout, [i, x, y]), block.rollout(x, y).flatten(), atol=2e-4)
            rows, columns, *values = page.evaluate(to_map, [i, x, y])
            expected = block.to_map(block.from_point(x, y), x, y)
            assert (rows, columns) == expected.shape
            np.testing.assert_allclose(values, expected.flatten(), atol=2e-4)
            assert (np.array(values) > 0).sum() == block.rows * block.columns


def status(page: Page) -> str:
    page.wait_for_timeout(100)
    return page.locator("#status").text_content() or ""


def from_pixel(text: str) -> list[int]:
    match = re.match(r"Attention from (\d+), (\d+) ", text)
    assert match, text
    return [int(value) for value in match.groups()]


def painted_fraction(page: Page) -> float:
    """The fraction of the image with any heat map color."""
    return page.evaluate(
        """() => {
            const canvas = document.getElementById("heatmap");
            const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            let painted = 0;
            for (let i = 3; i < data.length; i += 4) painted += data[i] > 0;
            return (4 * painted) / data.length;
        }"""
    )


def test_the_point_is_moved_by_mouse_and_by_keys(page: Page, written: tuple[Explanation, Path]):
    page.click("#tab-attention")
    before = status(page)
    assert from_pixel(before) == [301, 222]
    box = page.locator("#stage").bounding_box()
    assert box
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 0.75 * box["height"])
    page.mouse.down()
    left, top, right, bottom = written[0].region.box
    y = top + 0.75 * (bottom - top)
    assert from_pixel(status(page)) == pytest.approx([left + 0.25 * (right - left), y], abs=2)
    x = left + 0.9 * (right - left)
    page.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 0.75 * box["height"])
    page.mouse.up()
    assert from_pixel(status(page)) == pytest.approx([x, y], abs=2)
    page.focus("#stage")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowLeft")
    step = (right - left) / (2 * written[0].attention[0].columns)
    assert from_pixel(status(page)) == pytest.approx([x - step, y - step], abs=2)
    page.keyboard.press("Home")
    assert status(page) == before


def test_layers_heads_and_renderings(page: Page):
    page.click("#tab-attention")
    page.click("#blocks button:nth-child(2)")
    assert page.locator("#grid button").count() == 4 * 5
    mean = status(page)
    page.click("#grid tbody tr:nth-child(3) td:nth-of-type(2) button")
    assert (page.input_value("#layer"), page.input_value("#head")) == ("2", "1")
    assert page.locator("#grid [aria-pressed=true]").get_attribute("aria-label") == "layer 3, head 2"
    assert status(page) != mean
    page.select_option("#rendering", "patches")
    painted = painted_fraction(page)
    assert 0.05 < painted < 0.9  # patches above the mean
    page.select_option("#rendering", "pixels")
    assert painted_fraction(page) == pytest.approx(painted / 4, abs=0.03)  # one of four pixels of these patches
    page.select_option("#layer", "rollout")
    assert page.is_disabled("#head")
    page.select_option("#rendering", "smooth")
    page.click("#blocks button:nth-child(1)")
    assert status(page)


def test_class_evidence_and_receptive_fields(page: Page, written: tuple[Explanation, Path]):
    evidence, fields = written[0].class_evidence, written[0].receptive_fields
    page.click("#tab-evidence")
    rows = page.locator("#classes button").all()
    assert [row.locator("span").first.text_content() for row in rows] == [one.class_name for one in evidence]
    rows[1].click()
    assert evidence[1].class_name in status(page)
    page.select_option("#method", "layerCam")
    assert painted_fraction(page) > 0.01
    page.click("#tab-receptive-field")
    rows = page.locator("#fields button").all()
    for row, field in zip(rows, fields, strict=True):
        row.click()
        assert status(page).startswith(field.title)
        # The edges may fall into a pixel of the screen.
        assert painted_fraction(page) == pytest.approx(field.fraction, abs=0.02)


def test_the_point_is_fixed_outside_the_attention_tab(page: Page):
    for tab in ("evidence", "receptive-field"):
        page.click("#tab-attention")
        before = status(page)
        page.click(f"#tab-{tab}")
        shown, marker = status(page), page.locator("#marker").get_attribute("style")
        page.click("#stage", position={"x": 20, "y": 20})
        page.keyboard.press("ArrowDown")
        assert status(page) == shown
        assert page.locator("#marker").get_attribute("style") == marker
        page.click("#tab-attention")
        assert status(page) == before


def test_uniform_attention_and_legends(browser: Browser, written: tuple[Explanation, Path], tmp_path: Path):
    explanation = written[0]
    first, *others = explanation.attention
    one_patch = torch.zeros_like(first.keys)
    one_patch[:, :, 3] = 1000
    uniform = replace(first, queries=torch.ones_like(first.queries), keys=torch.zeros_like(first.keys))
    blocks = (uniform, replace(uniform, keys=one_patch), *others[1:])
    path = tmp_path / "uniform.html"
    path.write_text(render_page(replace(explanation, attention=blocks)), encoding="utf-8")
    with opened(browser, path) as page:
        page.click("#tab-attention")
        page.select_option("#rendering", "patches")
        assert "nearly uniform" in status(page)
        assert f"{MIN_BRIGHTEST:.1f} times the mean" in (page.text_content("#legend") or "")
        assert painted_fraction(page) == 0  # the image stays visible
        page.click("#blocks button:nth-child(2)")
        times = f"{first.rows * first.columns}.0 times the mean"
        assert times in status(page)
        assert times in (page.text_content("#legend") or "")
        page.click("#tab-receptive-field")
        assert "1/4,000" in (page.text_content("#legend") or "")
        page.click("#image-only")
        assert not page.is_visible("#legend")


def test_controls_are_named_and_fit_a_phone(browser: Browser, written: tuple[Explanation, Path]):
    phone = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
    with opened(browser, written[1], **phone) as page:
        assert page.is_visible("#classes")  # the first tab
        best = max(written[0].class_evidence, key=lambda one: one.probability)
        assert best.class_name in status(page)
        assert best.class_name in (page.text_content("#title") or "")
        for tab in ("attention", "evidence", "receptive-field"):
            page.tap(f"#tab-{tab}")
            assert page.evaluate("document.documentElement.scrollWidth") <= 360
            for control in page.locator("button:visible, select:visible, [role=application]").all():
                script = "e => e.getAttribute('aria-label') || e.labels?.[0]?.textContent || e.textContent"
                assert control.evaluate(script).strip()
        page.tap("#tab-attention")
        before = status(page)
        page.tap("#stage", position={"x": 10, "y": 10})
        assert status(page) != before


def test_a_detector_has_no_class_evidence(browser: Browser, tmp_path: Path):
    model = randomize(SSDLite("xxs", num_classes=2))
    weights = Weights(model.architecture, model.state_dict(), Preprocessing((64, 64), 64), ("a", "b"), task="detect")
    photo = Image.fromarray(load_sample_image("flower.jpg"))
    explanation = mobilevit.explain_image(weights, photo, out=tmp_path / "boxes.html")
    assert explanation.class_evidence == ()
    assert len(explanation.attention) == 3
    with opened(browser, tmp_path / "boxes.html") as page:
        assert not page.locator("#tab-evidence").count()
        assert page.get_attribute("#tab-attention", "aria-selected") == "true"
        page.click("#blocks button:nth-child(3)")
        assert "single patch" in status(page)
        image = page.locator("#stage").bounding_box()
        assert image
        assert image["width"] / image["height"] == pytest.approx(640 / 427, rel=0.01)
