"""The page, in a real browser and against Python."""

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
from conftest import randomise, ready_page
from mobilevit.explain import Explanation
from mobilevit.explain.draw import BRIGHT_TIMES
from mobilevit.explain.page import page_of
from mobilevit.images import Preprocessing
from mobilevit.models.ssdlite import SSDLite
from mobilevit.weights import Weights

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("<b>ant</b>", "bee & co", "</script><script>alert(1)</script>")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Explanation, Path]:
    # 76 px: the map of stage 4 is 5 x 5, and resized to whole patches.
    model = randomise(mobilevit.MobileViT("xxs", num_classes=3))
    weights = Weights(model.architecture, model.state_dict(), Preprocessing(86, 76), class_names=NAMES)
    path = tmp_path_factory.mktemp("page") / "china.html"
    photo = Image.fromarray(load_sample_image("china.jpg"))
    return mobilevit.explain_image(weights, photo, at=(301, 222), out=path), path


@contextmanager
def opened(browser: Browser, path: Path, **context: Any) -> Iterator[Page]:
    """The page from its file; that it asks for anything beside itself fails the test."""
    asked: list[str] = []
    with ready_page(browser, path.as_uri(), on_request=asked.append, **context) as page:
        yield page
    assert not [url for url in asked if not url.startswith(("file:", "data:"))]


@pytest.fixture(scope="module")
def page(browser: Browser, written: tuple[Explanation, Path]) -> Iterator[Page]:
    with opened(browser, written[1], viewport={"width": 1200, "height": 900}) as page:
        yield page


def test_nothing_is_loaded_from_elsewhere(written: tuple[Explanation, Path]):
    html = written[1].read_text(encoding="utf-8")
    assert not re.search(r"https?://|src=[\"'](?!data:)|@import|url\(", html)
    assert html.count("</script>") == 2  # no class name has closed one
    assert "{{" not in html
    assert len(html) < 1_500_000


def test_the_page_computes_what_python_does(page: Page, written: tuple[Explanation, Path]):
    explanation = written[0]
    ask = "([i, x, y, layer, head]) => Array.from(explained.attended(explained.data.blocks[i], x, y, layer, head))"
    roll = "([i, x, y]) => Array.from(explained.rollout(explained.data.blocks[i], x, y))"
    fold = """([i, x, y]) => {
        const block = explained.data.blocks[i];
        const folded = explained.foldBack(block, explained.attended(block, x, y, "mean", "mean"), x, y);
        return [folded.rows, folded.columns, ...folded.values];
    }"""
    for i, block in enumerate(explanation.blocks):
        for x, y in ((0.0, 0.0), explanation.place, (0.37, 0.81), (0.999, 0.5)):
            for layer, head in ((None, None), (0, 3), (block.num_layers - 1, None)):
                said = ["mean" if one is None else str(one) for one in (layer, head)]
                found = page.evaluate(ask, [i, x, y, *said])
                expected = block.attended(x, y, layer=layer, head=head)
                np.testing.assert_allclose(found, expected.flatten(), atol=2e-4)
                assert sum(found) == pytest.approx(1)
            np.testing.assert_allclose(page.evaluate(roll, [i, x, y]), block.rollout(x, y).flatten(), atol=2e-4)
            rows, columns, *values = page.evaluate(fold, [i, x, y])
            expected = block.fold_back(block.attended(x, y), x, y)
            assert (rows, columns) == expected.shape
            np.testing.assert_allclose(values, expected.flatten(), atol=2e-4)
            assert (np.array(values) > 0).sum() == block.rows * block.columns


def said(page: Page) -> str:
    page.wait_for_timeout(100)
    return page.locator("#said").text_content() or ""


def lit(page: Page) -> float:
    """The share of the image that is painted over, however faintly."""
    return page.evaluate(
        """() => {
            const heat = document.getElementById("heat");
            const { data } = heat.getContext("2d").getImageData(0, 0, heat.width, heat.height);
            let painted = 0;
            for (let i = 3; i < data.length; i += 4) painted += data[i] > 0;
            return (4 * painted) / data.length;
        }"""
    )


def test_the_place_is_moved_by_mouse_and_by_keys(page: Page, written: tuple[Explanation, Path]):
    page.click("#tab-attention")
    before = said(page)
    assert before.startswith("From 301, 222 it looks most at ")
    box = page.locator("#stage").bounding_box()
    assert box
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 0.75 * box["height"])
    page.mouse.down()
    left, top, right, bottom = written[0].view.box
    x, y = left + 0.25 * (right - left), top + 0.75 * (bottom - top)
    found = re.match(r"From (\d+), (\d+) ", said(page))
    assert found
    assert [int(one) for one in found.groups()] == pytest.approx([x, y], abs=2)
    page.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 0.75 * box["height"])
    page.mouse.up()
    assert said(page) != found.string
    page.focus("#stage")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowLeft")
    moved = re.match(r"From (\d+), (\d+) ", said(page))
    assert moved
    step = (right - left) / (2 * written[0].blocks[0].columns)
    x = left + 0.9 * (right - left)
    assert [int(one) for one in moved.groups()] == pytest.approx([x - step, y - step], abs=2)
    page.keyboard.press("Home")
    assert said(page) == before


def test_layers_heads_and_drawings_can_be_chosen(page: Page):
    page.click("#tab-attention")
    page.click("#blocks button:nth-child(2)")
    assert page.locator("#all button").count() == 4 * 5
    mean = said(page)
    page.click("#all tbody tr:nth-child(3) td:nth-of-type(2) button")
    assert (page.input_value("#layer"), page.input_value("#head")) == ("2", "1")
    assert page.locator("#all [aria-pressed=true]").get_attribute("aria-label") == "layer 3, head 2"
    assert said(page) != mean
    page.select_option("#drawn", "tiles")
    lit_tiles = lit(page)
    assert 0.05 < lit_tiles < 0.9  # those that are attended to more than the mean
    page.select_option("#drawn", "pixels")
    assert lit(page) == pytest.approx(lit_tiles / 4, abs=0.03)  # one of the four pixels of each of these patches
    page.select_option("#layer", "rollout")
    assert page.is_disabled("#head")
    page.select_option("#drawn", "patches")
    page.click("#blocks button:nth-child(1)")
    assert said(page)


def test_evidence_and_reach(page: Page, written: tuple[Explanation, Path]):
    page.click("#tab-evidence")
    rows = page.locator("#classes button").all()
    assert [row.locator("span").first.text_content() for row in rows] == [one.class_name for one in written[0].evidence]
    rows[1].click()
    assert written[0].evidence[1].class_name in said(page)
    page.select_option("#map", "fine")
    assert lit(page) > 0.01
    page.click("#tab-reach")
    fields = page.locator("#fields button").all()
    assert len(fields) == len(written[0].fields)
    for row, field in zip(fields, written[0].fields, strict=True):
        row.click()
        assert said(page).startswith(f"{field.name}: the marked place depends on ")
        # Its edges may fall into a pixel of the screen.
        assert lit(page) == pytest.approx(field.share, abs=0.02)


def test_the_mark_is_moved_only_where_that_changes_something(page: Page):
    hints = {}
    for tab in ("evidence", "reach"):
        page.click("#tab-attention")
        before = said(page)
        page.click(f"#tab-{tab}")
        shown = said(page)
        hints[tab] = page.text_content("#keys")
        marked = page.locator("#dot").get_attribute("style")
        page.click("#stage", position={"x": 20, "y": 20})
        page.keyboard.press("ArrowDown")
        assert said(page) == shown
        assert page.locator("#dot").get_attribute("style") == marked
        assert page.get_attribute(f"#tab-{tab}", "aria-selected") == "true"
        page.click("#tab-attention")
        assert said(page) == before
        assert "Press or drag" in (page.text_content("#keys") or "")
    assert "not of a place" in (hints["evidence"] or "")
    assert "Computed for 301, 222 alone" in (hints["reach"] or "")


def test_even_attention_is_called_even_and_the_colours_have_a_scale(
    browser: Browser, written: tuple[Explanation, Path], tmp_path: Path
):
    explanation = written[0]
    first, *others = explanation.blocks
    pointed = torch.zeros_like(first.keys)
    pointed[:, :, 3] = 1000
    even = replace(first, queries=torch.ones_like(first.queries), keys=torch.zeros_like(first.keys))
    blocks = (even, replace(even, keys=pointed), *others[1:])
    path = tmp_path / "even.html"
    path.write_text(page_of(replace(explanation, blocks=blocks)), encoding="utf-8")
    with opened(browser, path) as page:
        page.click("#tab-attention")
        page.select_option("#drawn", "tiles")
        assert said(page) == "From 301, 222 it looks practically evenly at all patches."
        assert page.text_content("#scale") == f"the mean or less{BRIGHT_TIMES:.1f} times the mean"
        alpha = "() => document.getElementById('heat').getContext('2d').getImageData(50, 50, 1, 1).data[3]"
        assert page.evaluate(alpha) == 0  # the image stays visible
        page.click("#blocks button:nth-child(2)")
        times = f"{first.rows * first.columns}.0 times the mean"
        assert said(page).endswith(f": {times} of all patches.")
        assert page.text_content("#scale") == f"the mean or less{times}"
        page.click("#tab-reach")
        assert page.text_content("#scale") == "1/4,000 and lessthe most, logarithmic"
        page.click("#tab-evidence")
        assert page.text_content("#scale") == "none, or against itthe most for this class"
        page.click("#plain")
        assert not page.is_visible("#scale")


def test_everything_is_named_and_fits_a_phone(browser: Browser, written: tuple[Explanation, Path]):
    phone = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
    with opened(browser, written[1], **phone) as page:
        for tab in ("attention", "evidence", "reach"):
            page.tap(f"#tab-{tab}")
            assert page.evaluate("document.documentElement.scrollWidth") <= 360
            for one in page.locator("button:visible, select:visible, [role=application]").all():
                script = "e => e.getAttribute('aria-label') || e.labels?.[0]?.textContent || e.textContent"
                assert one.evaluate(script).strip()
        page.tap("#tab-attention")
        before = said(page)
        page.tap("#stage", position={"x": 10, "y": 10})
        assert said(page) != before


def test_the_page_opens_on_the_evidence(browser: Browser, written: tuple[Explanation, Path]):
    with opened(browser, written[1]) as page:
        assert page.get_attribute("#tab-evidence", "aria-selected") == "true"
        assert page.is_visible("#classes")
        assert not page.is_visible("#blocks")
        best = max(written[0].evidence, key=lambda one: one.probability)
        assert best.class_name in said(page)


def test_a_detector_has_no_evidence(browser: Browser, tmp_path: Path):
    model = randomise(SSDLite("xxs", num_classes=2))
    weights = Weights(model.architecture, model.state_dict(), Preprocessing((64, 64), 64), ("a", "b"), task="detect")
    photo = Image.fromarray(load_sample_image("flower.jpg"))
    made = mobilevit.explain_image(weights, photo, out=tmp_path / "boxes.html")
    assert made.evidence == ()
    assert len(made.blocks) == 3
    with opened(browser, tmp_path / "boxes.html") as page:
        assert not page.is_visible("#tab-evidence")
        assert page.get_attribute("#tab-attention", "aria-selected") == "true"
        assert page.text_content("#title") == "Where the network looks"
        image = page.locator("#stage").bounding_box()
        assert image
        assert image["width"] / image["height"] == pytest.approx(640 / 427, rel=0.01)
