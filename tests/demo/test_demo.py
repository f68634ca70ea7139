"""The page, in a real browser and against torch; its scaling of images, in node and against Pillow."""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from PIL import __version__ as pillow_version
from sklearn.datasets import load_sample_image

import mobilevit
from conftest import randomise, ready_page
from mobilevit.cli import parse
from mobilevit.demo import DRAWINGS, STATIC, Server, drawing_for, runtime, write_page
from mobilevit.draw import OPACITY, colour_of
from mobilevit.images import FILTERS, Preprocessing
from mobilevit.models.deeplabv3 import PAPER_HEAD, DeepLabV3
from mobilevit.models.ssdlite import SSDLite
from mobilevit.predict import Classifier, detector, segmenter
from mobilevit.recipes import RECIPES
from mobilevit.training.loop import train
from mobilevit.weights import Weights, read

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_MS = 120_000
NODE = shutil.which("node")
# Digits as somebody may draw them, each one a list of strokes, in shares of the pad's side.
DRAWN = {
    "0": [[(0.5, 0.17), (0.34, 0.28), (0.3, 0.5), (0.36, 0.73), (0.52, 0.83), (0.67, 0.72), (0.71, 0.5), (0.5, 0.17)]],
    "1": [[(0.34, 0.37), (0.52, 0.19), (0.52, 0.83)]],
    "2": [[(0.28, 0.34), (0.37, 0.22), (0.53, 0.19), (0.69, 0.3), (0.56, 0.55), (0.28, 0.81), (0.73, 0.81)]],
    "4": [[(0.53, 0.19), (0.3, 0.59), (0.72, 0.59)], [(0.59, 0.4), (0.58, 0.83)]],
    "7": [[(0.28, 0.22), (0.72, 0.2), (0.6, 0.44), (0.47, 0.83)]],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the digits of scikit-learn as files, data/test/ never trained on, and of model.safetensors for them."""
    folder = tmp_path_factory.mktemp("digits")
    runpy.run_path(str(ROOT / "examples" / "digits.py"))["write_images"](folder / "data")
    train(replace(RECIPES["tiny"], epochs=8), folder / "data", folder)
    return folder


@pytest.fixture(scope="module")
def weights(folder: Path) -> Weights:
    return read(folder / "model.safetensors")


@pytest.fixture(scope="module")
def ort() -> Path:
    try:
        return runtime.find()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def page_folder(weights: Weights, ort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime", reason="the page's network is exported by mobilevit[onnx]")
    folder = tmp_path_factory.mktemp("page")
    write_page(weights, folder, source="model.safetensors", ort=ort)
    return folder


@contextmanager
def running(server: ThreadingHTTPServer) -> Iterator[str]:
    """The server's URL while it runs in a thread."""
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


opened = partial(ready_page, patience_ms=PATIENCE_MS)  # with its network loaded


@pytest.fixture(scope="module")
def page(browser: Browser, page_folder: Path) -> Iterator[Page]:
    with running(Server(page_folder)) as url, opened(browser, url, permissions=["camera"]) as page:
        yield page


def num_answers(page: Page) -> int:
    return int(page.locator("#bars").get_attribute("data-answers") or 0)


def wait_for_answer(page: Page, after: int) -> None:
    # A function: a bare expression would be evaluated in the page, which forbids that.
    script = "n => document.getElementById('bars').dataset.answers > n"
    page.wait_for_function(script, arg=after, timeout=PATIENCE_MS)


def answers(page: Page) -> list[tuple[str, float]]:
    """The five bars, likeliest first."""
    script = "bars => bars.map(bar => [bar.querySelector('.name').textContent, Number(bar.dataset.probability)])"
    return [(name, probability) for name, probability in page.locator("#bars li").evaluate_all(script)]


def give(page: Page, file: str | Path | dict[str, Any]) -> list[tuple[str, float]]:
    page.click("#tab-files")
    before = num_answers(page)
    page.set_input_files("#files", file)  # pyright: ignore[reportArgumentType]
    wait_for_answer(page, before)
    return answers(page)


def draw(page: Page, digit: str) -> str:
    page.click("#tab-draw")
    page.click("#clear")
    box = page.locator("#pad").bounding_box()
    assert box is not None
    before = num_answers(page)
    for stroke in DRAWN[digit]:
        places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in stroke]
        page.mouse.move(*places[0])
        page.mouse.down()
        for place in places[1:]:
            page.mouse.move(*place, steps=3)
        page.mouse.up()
    wait_for_answer(page, before)
    page.wait_for_timeout(300)  # for the answers to the last of the strokes
    return answers(page)[0][0]


def assert_same(shown: list[tuple[str, float]], model: Classifier, image: Any) -> None:
    expected = model.predict(image)
    assert shown[0][0] == expected[0].class_name
    # Below the first, two classes that are nearly as likely as one another may change places.
    np.testing.assert_allclose([share for _, share in shown], [p.probability for p in expected], atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# In the browser


def test_answers_are_those_of_torch(page: Page, folder: Path):
    model = mobilevit.load(folder / "model.safetensors")
    files = [file for digit in range(10) for file in sorted((folder / "data" / "test" / str(digit)).iterdir())[:3]]
    assert len(files) == 30
    num_right = 0
    for file in files:
        shown = give(page, file)
        assert_same(shown, model, file)
        num_right += shown[0][0] == file.parent.name
    assert num_right >= 24  # a page that always gave the same answer would be as like torch, were torch as bad
    assert page.locator("#thumbs button").count() == 30
    page.locator("#thumbs button").first.click()
    assert_same(answers(page), model, files[0])


def test_photos_are_read_as_pillow_reads_them(page: Page, folder: Path):
    """Large ones, turned by a tag, see-through, narrow: the digits themselves are never made smaller."""
    model = mobilevit.load(folder / "model.safetensors")
    digit = Image.open(next((folder / "data" / "test" / "3").iterdir())).convert("RGB")
    large = digit.resize((450, 301), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    see_through = digit.resize((90, 90), Image.Resampling.BICUBIC).convert("RGBA")
    see_through.putalpha(Image.linear_gradient("L").resize((90, 90)))
    images = {
        "large.png": (large, {}),
        "turned.png": (large, {"exif": exif}),
        "photo.jpg": (large, {"exif": exif, "quality": 95, "subsampling": 0}),
        "see-through.png": (see_through, {}),
        "narrow.png": (digit.resize((20, 500), Image.Resampling.BICUBIC), {}),
    }
    for name, (image, options) in images.items():
        file = io.BytesIO()
        image.save(file, {"jpg": "JPEG", "png": "PNG"}[name[-3:]], **options)
        shown = give(page, {"name": name, "mimeType": f"image/{name[-3:]}", "buffer": file.getvalue()})
        with Image.open(file) as again:
            expected = model.predict(again)
        assert shown[0][0] == expected[0].class_name, name
        found = [share for _, share in shown]
        # Where decoders and blending round otherwise, a grey level may differ.
        np.testing.assert_allclose(found, [p.probability for p in expected], atol=1e-2, err_msg=name)


def test_digits_drawn_by_mouse_are_read(page: Page):
    read_as = {digit: draw(page, digit) for digit in DRAWN}
    assert sum(digit == answer for digit, answer in read_as.items()) >= 4, read_as
    assert page.locator("#live").text_content()  # said to screen readers
    page.click("#clear")
    page.wait_for_selector("body.waiting")


def test_everything_can_be_done_by_keys(page: Page):
    page.click("#tab-draw")
    page.click("#clear")
    page.focus("#tab-draw")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-files"
    assert page.is_visible("#panel-files")
    assert not page.is_visible("#panel-draw")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "files"
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Home")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "pad"
    outline = page.evaluate("getComputedStyle(document.getElementById('pad')).outlineStyle")
    assert outline == "solid"  # where the focus is can be seen
    before = num_answers(page)
    page.keyboard.press("Space")
    for _ in range(14):
        page.keyboard.press("ArrowDown")
    wait_for_answer(page, before)
    page.wait_for_timeout(300)
    assert answers(page)[0][0] == "1"
    page.keyboard.press("Backspace")
    page.wait_for_selector("body.waiting")


def test_controls_have_names(page: Page):
    for selector in ("button", "input", "select", "canvas", "video", "[role=tablist]", "section"):
        for i in range(page.locator(selector).count()):
            script = "e => e.ariaLabel || e.labels?.[0]?.textContent || e.textContent || e.getAttribute('aria-label')"
            assert page.locator(selector).nth(i).evaluate(script).strip(), (selector, i)


def test_the_camera_is_read_until_it_is_left(page: Page):
    page.click("#tab-camera")
    before = num_answers(page)
    page.click("#camera-switch")
    wait_for_answer(page, before + 2)
    stream = page.evaluate_handle("document.getElementById('video').srcObject")
    page.click("#tab-draw")
    assert stream.evaluate("stream => stream.getTracks().every(track => track.readyState === 'ended')")


def test_what_is_no_image_is_said_and_the_rest_read(page: Page, folder: Path):
    page.click("#tab-files")
    before = num_answers(page)
    image = next((folder / "data" / "test" / "5").iterdir())
    files: list[Any] = [
        {"name": "thesis.txt", "mimeType": "text/plain", "buffer": b"precious"},
        {"name": "digit.png", "mimeType": "image/png", "buffer": image.read_bytes()},
    ]
    page.set_input_files("#files", files)
    wait_for_answer(page, before)
    page.wait_for_selector("#trouble:not([hidden])")
    assert page.locator("#trouble").text_content() == "thesis.txt: not an image that this browser reads"
    assert_same(answers(page), mobilevit.load(folder / "model.safetensors"), image)


def test_the_page_says_what_it_is(page: Page):
    facts = page.locator("#facts").inner_text()
    for part in ("MobileViT-XXS", "0.95 M", "10", "32 \u00d7 32 px", "threads"):
        assert part in facts
    assert page.evaluate("crossOriginIsolated")
    assert page.evaluate("document.body.dataset.provider") == "wasm"
    assert page.title().startswith("Which digit is it")


def test_without_a_graphics_card_the_processor_takes_over(page: Page, folder: Path):
    page.evaluate(
        """() => {
            const select = document.getElementById("runs-on");
            select.add(new Option("graphics card", "webgpu"));
            select.value = "webgpu";
            select.dispatchEvent(new Event("change"));
        }"""
    )
    page.wait_for_selector("body[data-state=ready]", timeout=PATIENCE_MS)
    assert page.evaluate("document.body.dataset.provider") == "wasm"
    assert page.locator("#runs-on").input_value() == "wasm"
    file = next((folder / "data" / "test" / "6").iterdir())
    assert_same(give(page, file), mobilevit.load(folder / "model.safetensors"), file)


def test_a_plain_server_and_a_phones_screen_do(browser: Browser, page_folder: Path, folder: Path):
    """No headers, so one thread; nothing is wider than the screen; drawn by finger."""
    handler = partial(_Plain, directory=str(page_folder))
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    with (
        running(ThreadingHTTPServer(("127.0.0.1", 0), handler)) as url,
        opened(browser, url, **phone) as page,
    ):
        assert not page.evaluate("crossOriginIsolated")
        assert "1 thread" in page.locator("#facts").inner_text()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.tap("#pad")
        wait_for_answer(page, 0)
        file = next((folder / "data" / "test" / "8").iterdir())
        assert_same(give(page, file), mobilevit.load(folder / "model.safetensors"), file)


class _Plain(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


# ---------------------------------------------------------------------------------------------------------------------
# Boxes and masks in the browser

WHOLE = Preprocessing((96, 96), 96)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(load_sample_image("china.jpg"))


@pytest.fixture(scope="module")
def boxes_weights() -> Weights:
    """Random, with so much background that a few boxes are above the page's first score and many below."""
    model = randomise(SSDLite("xxs", 4), 2)
    tensors = model.state_dict()
    for i in range(6):
        tensors[f"heads.{i}.out.bias"].unflatten(0, (-1, 9))[:, 4] += 3.0
    return Weights(model.architecture, tensors, WHOLE, ("roof", "tree", "wall", "<b>sky"), task="detect")


@pytest.fixture(scope="module")
def mask_weights() -> Weights:
    model = randomise(DeepLabV3("xxs", 5, 16, PAPER_HEAD), 2)
    names = ("background", "roof", "tree", "wall", "sky")
    options: dict[str, Any] = {"task": "segment", "head": PAPER_HEAD, "output_stride": 16}
    return Weights(model.architecture, model.state_dict(), WHOLE, names, **options)


@contextmanager
def of_weights(browser: Browser, weights: Weights, ort: Path, folder: Path) -> Iterator[Page]:
    pytest.importorskip("onnxruntime", reason="the page's network is exported by mobilevit[onnx]")
    write_page(weights, folder, ort=ort)
    size = {"width": 1280, "height": 900}
    with running(Server(folder)) as url, opened(browser, url, permissions=["camera"], viewport=size) as page:
        yield page


@pytest.fixture(scope="module")
def boxes_page(
    browser: Browser, boxes_weights: Weights, ort: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Page]:
    with of_weights(browser, boxes_weights, ort, tmp_path_factory.mktemp("boxes")) as page:
        yield page


@pytest.fixture(scope="module")
def mask_page(
    browser: Browser, mask_weights: Weights, ort: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Page]:
    with of_weights(browser, mask_weights, ort, tmp_path_factory.mktemp("mask")) as page:
        yield page


def as_file(image: Image.Image) -> dict[str, Any]:
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"name": "photo.png", "mimeType": "image/png", "buffer": file.getvalue()}


def rows(page: Page) -> list[dict[str, str]]:
    """What the list says, and what lies behind it."""
    script = "all => all.map(row => ({ ...row.dataset, text: row.innerText }))"
    return page.locator("#bars li").evaluate_all(script)


def marks(page: Page) -> np.ndarray:
    """What is drawn over the image, RGBA (H, W, 4)."""
    url = page.locator("canvas.marks").evaluate("canvas => canvas.toDataURL()")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGBA"))


def slide(page: Page, *keys: str) -> str:
    """What the slider says after these keys."""
    page.focus("#slider")
    for key in keys:
        page.keyboard.press(key)
    return page.locator(".setting output").inner_text()


def share_drawn(page: Page, places: np.ndarray, colours: np.ndarray) -> float:
    """The share of places (N, 2), x and y in shares of the image, that have nearly the colour (N, 3) in the marks."""
    drawn = marks(page)
    x, y = (places * drawn.shape[1::-1]).astype(int).T
    found = drawn[y, x]
    return float(((np.abs(found[:, :3].astype(int) - colours).max(axis=1) < 8) & (found[:, 3] > 250)).mean())


def test_boxes_are_those_of_torch(boxes_page: Page, boxes_weights: Weights, photo: Image.Image):
    page, model = boxes_page, detector(boxes_weights)
    give(page, as_file(photo))
    assert slide(page) == "30 %"
    numbers = []
    for keys, score in (((), 0.3), (("ArrowRight",) * 5, 0.35), (("Home",), 0.01), (("End",), 0.99)):
        assert slide(page, *keys) == f"{100 * score:.0f} %"
        shown, expected = rows(page), model.predict(photo, score)
        numbers.append(len(shown))
        assert [row["text"].split("\n")[0] for row in shown] == [one.class_name for one in expected]
        scores = [float(row["score"]) for row in shown]
        np.testing.assert_allclose(scores, [one.score for one in expected], atol=1e-3)
        found = np.array([row["box"].split() for row in shown], float).reshape(-1, 4)
        np.testing.assert_allclose(found, np.array([one.box for one in expected]).reshape(-1, 4), atol=0.5)
        thumb = page.locator("#thumbs button").last
        assert thumb.inner_text() == (f"{len(shown)} found" if shown else "nothing")
    assert numbers[2] > numbers[0] > numbers[1] > numbers[3] == 0
    assert numbers[0] > 2
    assert page.locator("#best-class").inner_text() == "Nothing above 99 %"


def test_boxes_are_drawn_where_they_are(boxes_page: Page, boxes_weights: Weights, photo: Image.Image):
    page = boxes_page
    give(page, as_file(photo))
    slide(page, "Home", *("ArrowRight",) * 29)
    best = detector(boxes_weights).predict(photo)[0]
    x1, y1, x2, y2 = best.box
    drawn = marks(page)
    scale = drawn.shape[1] / photo.width
    assert drawn.shape[0] == pytest.approx(scale * photo.height, abs=1)  # of the image's own ratio
    sides = [(x1 * scale + 1.5, y) for y in np.linspace(y1, y2, 40)[2:-2] * scale]
    sides += [(x2 * scale - 1.5, y) for y in np.linspace(y1, y2, 40)[2:-2] * scale]
    colours = np.tile(colour_of(best.class_index), (len(sides), 1))
    # Labels of others may lie on it.
    assert share_drawn(page, np.array(sides) / drawn.shape[1::-1], colours) > 0.6
    page.wait_for_function("() => document.getElementById('live').textContent.includes('found, ')")
    assert f"{best.class_name} {100 * best.score:.0f} percent" in (page.locator("#live").text_content() or "")


def test_many_boxes_are_a_list_that_keys_scroll(boxes_page: Page, photo: Image.Image):
    page = boxes_page
    give(page, as_file(photo))
    slide(page, "Home")
    heights = page.locator("#bars li").evaluate_all("all => all.map(row => row.offsetHeight)")
    assert len(heights) > 30
    assert min(heights) > 24
    assert page.evaluate("document.getElementById('bars').offsetHeight") < 500
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "bars"
    page.keyboard.press("End")
    page.wait_for_function("() => document.getElementById('bars').scrollTop > 100")
    slide(page, "End")
    assert not page.locator("#bars[tabindex]").count()


def test_masks_are_those_of_torch(mask_page: Page, mask_weights: Weights, photo: Image.Image):
    page, model = mask_page, segmenter(mask_weights)
    square = photo.crop((100, 100, 196, 196))
    for image, tolerance in ((square, 3 / 96**2), (photo, 0.01)):  # at the network's size there is nothing to scale
        give(page, as_file(image))
        mask = model.predict(image)
        shares = np.bincount(mask.ravel(), minlength=5) / mask.size
        assert (shares > 0.01).sum() >= 3
        shown = rows(page)
        listed = {int(row["index"]): float(row["share"]) for row in shown}
        np.testing.assert_allclose([listed.get(c, 0) for c in range(5)], shares, atol=tolerance)
        assert list(listed.values()) == sorted(listed.values(), reverse=True)
        names = [mask_weights.class_names[index] for index in listed]
        assert [row["text"].split("\n")[0] for row in shown] == names
        assert slide(page, "End") == "100 %"
        # Away from edges, where a pixel has one class to all sides.
        side = 7
        y, x = (a.ravel() for a in np.mgrid[side : mask.shape[0] - side : 3, side : mask.shape[1] - side : 3])
        around = np.stack([mask[y + i, x + j] for i in (-side, 0, side) for j in (-side, 0, side)])
        clear = (around == around[0]).all(axis=0)
        painted = clear & (around[4] != 0)
        assert painted.sum() > 30
        places = (np.stack([x, y], 1) + 0.5) / image.size
        colours = np.array([colour_of(int(c)) for c in around[4]])
        assert share_drawn(page, places[painted], colours[painted]) > 0.8  # names stand on the rest


def test_masks_are_as_opaque_as_the_slider_says(mask_page: Page, photo: Image.Image):
    page = mask_page
    give(page, as_file(photo))
    assert slide(page, "Home") == "0 %"
    assert not marks(page)[..., 3].any()
    assert slide(page, *("ArrowRight",) * round(100 * OPACITY)) == f"{100 * OPACITY:.0f} %"
    opacities, counts = np.unique(marks(page)[..., 3], return_counts=True)
    assert opacities[counts[1:].argmax() + 1] == pytest.approx(255 * OPACITY, abs=2)
    said = page.locator("#live").text_content() or ""
    assert "tree" in said
    assert "percent" in said


@pytest.mark.parametrize("name", ["boxes_page", "mask_page"])
def test_pages_of_boxes_and_masks_fit_and_are_operable(name: str, request: pytest.FixtureRequest, photo: Image.Image):
    page: Page = request.getfixturevalue(name)
    give(page, as_file(photo))
    assert not page.is_visible("#tab-draw")
    for selector in ("button:visible", "input", "select", "video", "#bars"):
        for one in page.locator(selector).all():
            script = "e => e.labels?.[0]?.textContent || e.textContent || e.getAttribute('aria-label')"
            assert one.evaluate(script).strip(), selector
    page.focus("#tab-files")
    seen = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id"))
    assert {"files", "slider", "runs-on"} <= seen
    assert page.locator("#slider").get_attribute("aria-valuetext", timeout=1000).endswith(" percent")  # pyright: ignore
    size = page.viewport_size
    assert size is not None
    try:
        for width, beside in ((1280, True), (390, False), (320, False)):
            page.set_viewport_size({"width": width, "height": 844})
            page.wait_for_timeout(200)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            stage, answer = (page.locator(s).bounding_box() for s in ("#drop", ".answer"))
            assert stage
            assert answer
            assert (answer["y"] < stage["y"] + stage["height"]) == beside
            ratio = marks(page).shape[1] / marks(page).shape[0]
            assert ratio == pytest.approx(photo.width / photo.height, rel=0.02)
            assert stage["width"] / stage["height"] == pytest.approx(ratio, rel=0.05)
    finally:
        page.set_viewport_size(size)


@pytest.mark.parametrize("name", ["boxes_page", "mask_page"])
def test_boxes_and_masks_follow_the_camera(name: str, request: pytest.FixtureRequest, photo: Image.Image):
    page: Page = request.getfixturevalue(name)
    give(page, as_file(photo))
    listed = rows(page)
    page.click("#tab-camera")
    assert rows(page) == []
    assert page.locator("canvas.marks").count() == 0
    before = num_answers(page)
    page.click("#camera-switch")
    wait_for_answer(page, before + 2)
    assert (marks(page)[..., 3] == 255).all()  # the frame that the answer is of lies below it
    page.click("#tab-files")
    assert rows(page) == listed
    page.wait_for_timeout(500)
    assert rows(page) == listed  # what was on its way for the camera is not shown
    assert page.locator("#drop canvas.marks").count() == 1


def test_pages_of_boxes_and_masks_show_whole_images_and_no_pad(
    boxes_weights: Weights, mask_weights: Weights, tmp_path: Path
):
    for weights in (boxes_weights, mask_weights):
        with pytest.raises(ValueError, match=f"for classifiers; these are weights to {weights.task}"):
            write_page(weights, tmp_path, drawing="mnist")
        part = replace(weights, preprocessing=Preprocessing(110, 96))
        with pytest.raises(ValueError, match="resize_px is 110 and crop_px 96; where things are"):
            write_page(part, tmp_path)
        assert drawing_for(replace(weights, class_names=tuple("01234"))) is None
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Scaling


@pytest.mark.skipif(NODE is None, reason="there is no node on this machine")
@pytest.mark.skipif(int(pillow_version.split(".")[0]) < 13, reason="Pillow before 13 orders its passes otherwise")
@pytest.mark.parametrize("interpolation", FILTERS)
def test_images_are_scaled_as_pillow_does(interpolation: str, tmp_path: Path):
    rng = np.random.default_rng(0)
    p = Preprocessing(36, 32, interpolation, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))
    cases = [
        *((size, p) for size in ((8, 8), (100, 300), (301, 97), (36, 36), (37, 35), (640, 51), (5, 90), (1, 40))),
        ((100, 300), replace(p, resize_px=(40, 33))),
        ((33, 300), replace(p, resize_px=(250, 90), crop_px=31)),
    ]
    images = [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for (width, height), _ in cases]
    given = [
        {
            "width": image.shape[1],
            "height": image.shape[0],
            "data": np.dstack([image, np.full(image.shape[:2], 255, np.uint8)]).ravel().tolist(),
            "preprocessing": one.to_dict(),
        }
        for image, (_, one) in zip(images, cases, strict=True)
    ]
    (tmp_path / "cases.json").write_text(json.dumps(given))
    shutil.copyfile(STATIC / "pixels.js", tmp_path / "pixels.mjs")
    (tmp_path / "run.mjs").write_text(
        'import { readFileSync } from "node:fs"; import { prepare } from "./pixels.mjs";'
        'const cases = JSON.parse(readFileSync("cases.json"));'
        "for (const one of cases) one.data = Uint8ClampedArray.from(one.data);"
        "console.log(JSON.stringify(cases.map((one) => Array.from(prepare(one, one.preprocessing).input))));"
    )
    assert NODE is not None
    out = subprocess.run([NODE, "run.mjs"], cwd=tmp_path, check=True, capture_output=True).stdout
    for image, (size, one), values in zip(images, cases, json.loads(out), strict=True):
        expected = one(image).numpy()
        std = np.array(one.std)[:, None, None]
        levels = np.abs(np.array(values).reshape(expected.shape) - expected) * std * 255
        assert levels.max() < 1e-3, size


# ---------------------------------------------------------------------------------------------------------------------
# What is written and served


def test_a_page_has_all_it_needs_and_tells_of_nothing_else(page_folder: Path, folder: Path):
    files = {str(file.relative_to(page_folder)) for file in page_folder.rglob("*") if file.is_file()}
    assert {"index.html", "style.css", "model.onnx", "network.json", "_headers", "ort/ort.wasm.js"} <= files
    html = (page_folder / "index.html").read_text() + (page_folder / "main.js").read_text()
    assert "http://" not in html  # nothing from elsewhere
    assert "https://" not in html
    network = json.loads((page_folder / "network.json").read_text())
    assert network["class_names"] == list("0123456789")
    assert network["drawing"]["side_px"] == 8
    for name in ("network.json", "model.onnx"):
        assert str(folder).encode() not in (page_folder / name).read_bytes()


def test_opened_from_disk_the_page_says_how_to_serve_it(browser: Browser, tmp_path: Path):
    folder = tmp_path / "a page"
    shutil.copytree(STATIC, folder, ignore=shutil.ignore_patterns("ort"))
    page = browser.new_page()
    page.goto((folder / "index.html").as_uri())
    assert f'python -m http.server -b 127.0.0.1 -d "{folder}"' in page.locator("#server").inner_text()
    page.close()
    with running(Server(folder)) as url:
        page = browser.new_page()
        page.goto(url)
        assert page.locator("#server").is_hidden()
        page.close()


def test_drawings_are_for_digits_and_letters(weights: Weights):
    assert drawing_for(weights) == "optdigits"
    assert drawing_for(replace(weights, preprocessing=Preprocessing(64, 64))) == "mnist"
    assert drawing_for(replace(weights, class_names=tuple("abcdefghij"))) == "optdigits"
    assert drawing_for(replace(weights, class_names=("cat", *"123456789"))) is None
    assert drawing_for(replace(weights, class_names=())) is None
    assert set(DRAWINGS) == {"optdigits", "mnist"}


def test_the_server_allows_threads_and_stays_in_its_folder(tmp_path: Path):
    (tmp_path / "secret.txt").write_text("secret")
    folder = tmp_path / "page"
    (folder / "ort").mkdir(parents=True)
    for name in ("a.js", "a.wasm", "index.html"):
        (folder / name).write_text("x")
    server = Server(folder)
    assert server.server_address[0] == "127.0.0.1"
    with running(server):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
        for path, kind in (("/", "text/html"), ("/a.js", "text/javascript"), ("/a.wasm", "application/wasm")):
            connection.request("GET", path)
            response = connection.getresponse()
            assert response.read() == b"x"
            assert response.headers["Content-Type"].startswith(kind)
            assert response.headers["Cross-Origin-Opener-Policy"] == "same-origin"
            assert response.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        connection.request("GET", "/../secret.txt")
        response = connection.getresponse()
        response.read()
        assert response.status == 404
        connection.close()


def test_ports_that_cannot_be_had_are_said(tmp_path: Path):
    with Server(tmp_path) as server, pytest.raises(ValueError, match=f"port {server.server_port} cannot be used"):
        Server(tmp_path, server.server_port)
    with pytest.raises(ValueError, match="port is 65536"):
        Server(tmp_path, 65536)


def test_the_command_serves_until_stopped(folder: Path, page_folder: Path):
    command = [sys.executable, "-m", "mobilevit", "demo", str(folder / "model.safetensors"), "--no-open"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[0]
            connection = http.client.HTTPConnection(url.removeprefix("http://").rstrip("/"), timeout=30)
            connection.request("GET", "/network.json")
            served = connection.getresponse().read()
            connection.close()
            process.send_signal(signal.SIGTERM)  # as Ctrl-C, which is ignored where a shell put us aside
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert json.loads(served) == json.loads((page_folder / "network.json").read_text())


def test_the_command_writes_a_page(
    folder: Path, page_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    seen: dict[str, Any] = {}

    def write(weights: Weights, out: Path, **options: Any) -> None:
        seen.update(options)
        shutil.copytree(page_folder, out)

    monkeypatch.setattr("mobilevit.demo.write_page", write)
    arguments = [str(folder / "model.safetensors"), "--out", str(tmp_path / "page"), "--drawing", "mnist"]
    arguments += ["--images", str(folder / "data" / "test" / "3")]
    assert parse(["demo", *arguments]).run() == 0
    assert "page of" in capsys.readouterr().out
    assert seen["source"] == "model.safetensors"  # without the folders that it lies in
    assert seen["drawing"] == "mnist"
    assert len(seen["images"]) == len(list((folder / "data" / "test" / "3").iterdir()))
    assert seen["ort"] is None


# ---------------------------------------------------------------------------------------------------------------------
# The runtime's files


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with nothing in it, and a wheel without the files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(runtime, "IN_WHEEL", tmp_path / "nothing")
    return runtime.cache()


def npm(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """An npm on the path that does what `script` says."""
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_without_npm_the_remedy_is_said(empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"npm is not here; install it, or name a folder that has its files \(--ort\)"):
        runtime.find()


@pytest.mark.skipif(sys.platform == "win32", reason="the npm of the test is a shell script")
def test_without_a_network_the_remedy_is_said(empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    npm(tmp_path / "bin", monkeypatch, "echo npm error code ENOTFOUND >&2; exit 1")
    with pytest.raises(ValueError, match=r"could not fetch onnxruntime-web@[\d.]+ \(npm error code ENOTFOUND\)"):
        runtime.find()
    assert not empty_cache.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="the npm of the test is a shell script")
def test_fetched_files_are_checked_and_kept(empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    contents = {name: name.encode() for name in runtime.FILES}
    monkeypatch.setattr(
        runtime, "FILES", {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    )
    archive = tmp_path / "ort.tgz"

    def pack(contents: dict[str, bytes]) -> None:
        with tarfile.open(archive, "w:gz") as tar:
            for name, content in contents.items():
                entry = tarfile.TarInfo(f"package/dist/{name}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))

    npm(tmp_path / "bin", monkeypatch, f'cp "{archive}" .')
    pack({**contents, "ort-wasm-simd-threaded.wasm": b"another"})
    with pytest.raises(runtime.ChecksumError, match=r"ort-wasm-simd-threaded.wasm is not the file that was tested"):
        runtime.find()
    pack(contents)
    said: list[str] = []
    assert runtime.find(say=said.append) == empty_cache
    assert len(said) == 1
    assert {file.name: file.read_bytes() for file in empty_cache.iterdir()} == contents
    archive.unlink()
    assert runtime.find(say=said.append) == empty_cache  # without npm
    assert len(said) == 1


def test_files_of_ones_own_must_be_there(tmp_path: Path):
    with pytest.raises(ValueError, match=r"has no ort.wasm.bundle.min.mjs; what is wanted is dist/ of npm's"):
        runtime.find(tmp_path)
    for name in runtime.FILES:
        (tmp_path / name).touch()
    assert runtime.find(tmp_path) == tmp_path


def test_the_wheel_carries_page_and_runtime(ort: Path, tmp_path: Path):
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="wheels are built by hatchling")
    (path,) = wheel.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(path) as archive:
        root = "mobilevit/demo/static/"
        packed = {name.removeprefix(root): name for name in archive.namelist() if name.startswith(root)}
        assert {file.name for file in STATIC.iterdir() if file.is_file()} <= set(packed)
        for name, checksum in runtime.FILES.items():
            assert hashlib.sha256(archive.read(packed[f"ort/{name}"])).hexdigest() == checksum
