"""The demo page in Chromium, compared with torch; its preprocessing in node, compared with Pillow."""

from __future__ import annotations

import base64
import http.client
import io
import json
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator, Mapping
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
from conftest import launched, ready_page
from mobilevit.cli import parse
from mobilevit.demo import Server, runtime, write_page
from mobilevit.demo.page import MODEL, STATIC, default_drawing
from mobilevit.draw import MASK_OPACITY, class_color
from mobilevit.images import FILTERS, Preprocessing
from mobilevit.models.deeplabv3 import PAPER_HEAD, DeepLabV3
from mobilevit.models.mobilevit import MobileViT
from mobilevit.models.ssdlite import SSDLite
from mobilevit.predict import Classifier, Detector, MultilabelClassifier, Segmenter
from mobilevit.recipes import RECIPES
from mobilevit.training.loop import train
from mobilevit.weights import Calibration, Weights, read
from small_networks import randomize

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page, Playwright

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_MS = 120_000
NODE = shutil.which("node")
# Handwritten digits: lists of strokes, relative to the side of the pad.
DIGIT_STROKES = {
    "0": [[(0.5, 0.17), (0.34, 0.28), (0.3, 0.5), (0.36, 0.73), (0.52, 0.83), (0.67, 0.72), (0.71, 0.5), (0.5, 0.17)]],
    "1": [[(0.34, 0.37), (0.52, 0.19), (0.52, 0.83)]],
    "2": [[(0.28, 0.34), (0.37, 0.22), (0.53, 0.19), (0.69, 0.3), (0.56, 0.55), (0.28, 0.81), (0.73, 0.81)]],
    "4": [[(0.53, 0.19), (0.3, 0.59), (0.72, 0.59)], [(0.59, 0.4), (0.58, 0.83)]],
    "7": [[(0.28, 0.22), (0.72, 0.2), (0.6, 0.44), (0.47, 0.83)]],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scikit-learn's digits as image files, with data/test/ as the test split, and model.safetensors.

    It is calibrated: half of the images of `digit_files` are rejected.
    """
    folder = tmp_path_factory.mktemp("digits")
    runpy.run_path(str(ROOT / "examples" / "digits.py"))["write_images"](folder / "data")
    train(replace(RECIPES["tiny"], epochs=8), folder / "data", folder)
    model = mobilevit.load(folder / "model.safetensors")
    model.calibration = Calibration(1.5)
    probabilities = [one[0].probability for one in model.predict(digit_files(folder))]
    model.calibration = Calibration(1.5, min_probability=float(np.median(probabilities)))
    mobilevit.save(model, folder / "model.safetensors")
    return folder


def digit_files(folder: Path) -> list[Path]:
    return [file for digit in range(10) for file in sorted((folder / "data" / "test" / str(digit)).iterdir())[:3]]


@pytest.fixture(scope="module")
def weights(folder: Path) -> Weights:
    return read(folder / "model.safetensors")


@pytest.fixture(scope="module")
def ort() -> Path:
    try:
        return runtime.find_runtime()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def page_folder(weights: Weights, ort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime", reason="the demo requires mobilevit[onnx]")
    folder = tmp_path_factory.mktemp("page")
    write_page(weights, folder, source="model.safetensors", runtime_folder=ort)
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


opened = partial(ready_page, timeout_ms=TIMEOUT_MS)  # waits until the network is loaded


@pytest.fixture(scope="module")
def page(browser: Browser, page_folder: Path) -> Iterator[Page]:
    with running(Server(page_folder)) as url, opened(browser, url, permissions=["camera"]) as page:
        yield page


def num_predictions(page: Page) -> int:
    return int(page.locator("#results").get_attribute("data-count") or 0)


def wait_for_prediction(page: Page, after: int) -> None:
    # A function, because the page's CSP forbids evaluating strings.
    script = "n => document.getElementById('results').dataset.count > n"
    page.wait_for_function(script, arg=after, timeout=TIMEOUT_MS)


def predictions(page: Page) -> list[tuple[str, float]]:
    """The five bars, most likely first."""
    script = "bars => bars.map(bar => [bar.querySelector('.name').textContent, Number(bar.dataset.probability)])"
    return [(name, probability) for name, probability in page.locator("#results li").evaluate_all(script)]


def open_file(page: Page, file: str | Path | dict[str, Any]) -> list[tuple[str, float]]:
    page.click("#tab-files")
    before = num_predictions(page)
    page.set_input_files("#files", file)  # pyright: ignore[reportArgumentType]
    wait_for_prediction(page, before)
    return predictions(page)


def draw(page: Page, digit: str) -> str:
    page.click("#tab-draw")
    page.click("#clear")
    box = page.locator("#pad").bounding_box()
    assert box is not None
    before = num_predictions(page)
    for stroke in DIGIT_STROKES[digit]:
        points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in stroke]
        page.mouse.move(*points[0])
        page.mouse.down()
        for point in points[1:]:
            page.mouse.move(*point, steps=3)
        page.mouse.up()
    wait_for_prediction(page, before)
    page.wait_for_timeout(300)  # until the last stroke is predicted
    return predictions(page)[0][0]


def assert_same(shown: list[tuple[str, float]], model: Classifier, image: Any) -> None:
    expected = model.predict(image)
    assert shown[0][0] == expected[0].class_name
    # Below the first, classes with nearly equal probabilities may swap places.
    np.testing.assert_allclose([probability for _, probability in shown], [p.probability for p in expected], atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Classification


def test_predictions_match_torch(page: Page, folder: Path):
    model = mobilevit.load(folder / "model.safetensors")
    files = digit_files(folder)
    assert len(files) == 30
    num_right = num_rejected = 0
    for file in files:
        shown = open_file(page, file)
        assert_same(shown, model, file)
        num_right += shown[0][0] == file.parent.name
        is_rejected = model.predict(file)[0].rejected
        threshold = f"below {100 * model.calibration.min_probability:.1f} %"
        assert (f"rejected, {threshold}" in page.locator("#headline-value").inner_text()) == is_rejected
        num_rejected += is_rejected
    assert num_right >= 24  # otherwise the comparison would be weak
    assert num_rejected == 15
    assert page.locator("#thumbnails button").count() == 30
    page.locator("#thumbnails button").first.click()
    assert_same(predictions(page), model, files[0])


def test_image_files_match_pillow(page: Page, folder: Path):
    """Large, EXIF-rotated, transparent and narrow images."""
    model = mobilevit.load(folder / "model.safetensors")
    digit = Image.open(next((folder / "data" / "test" / "3").iterdir())).convert("RGB")
    large = digit.resize((450, 301), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    transparent = digit.resize((90, 90), Image.Resampling.BICUBIC).convert("RGBA")
    transparent.putalpha(Image.linear_gradient("L").resize((90, 90)))
    images = {
        "large.png": (large, {}),
        "rotated.png": (large, {"exif": exif}),
        "photo.jpg": (large, {"exif": exif, "quality": 95, "subsampling": 0}),
        "transparent.png": (transparent, {}),
        "narrow.png": (digit.resize((20, 500), Image.Resampling.BICUBIC), {}),
    }
    for name, (image, options) in images.items():
        file = io.BytesIO()
        image.save(file, {"jpg": "JPEG", "png": "PNG"}[name[-3:]], **options)
        shown = open_file(page, {"name": name, "mimeType": f"image/{name[-3:]}", "buffer": file.getvalue()})
        with Image.open(file) as again:
            expected = model.predict(again)
        assert shown[0][0] == expected[0].class_name, name
        # Decoders and blending may round differently by one gray level.
        np.testing.assert_allclose([p for _, p in shown], [p.probability for p in expected], atol=1e-2, err_msg=name)


def test_int8(browser: Browser, weights: Weights, ort: Path, folder: Path, tmp_path: Path):
    files = digit_files(folder)
    weights = replace(weights, training={"metrics": {"val_top1": 91.23}})
    write_page(weights, tmp_path, precision="int8", images=files, runtime_folder=ort)
    assert (tmp_path / MODEL).stat().st_size < 0.4 * 4 * sum(x.numel() for x in weights.tensors.values())
    torch_probabilities = [one[0].probability for one in mobilevit.load(folder / "model.safetensors").predict(files)]
    with running(Server(tmp_path)) as url, opened(browser, url) as page:
        shown = [open_file(page, file)[0] for file in files]
        assert "91.2 %\ntop-1 accuracy after training, before int8" in page.locator("#facts").inner_text()
    names = [file.parent.name for file in files]
    assert np.mean([name == digit for (name, _), digit in zip(shown, names, strict=True)]) > 0.8
    differences = np.abs([probability for _, probability in shown] - np.array(torch_probabilities))
    assert 0 < np.median(differences) < 0.05


def test_digits_drawn_with_the_mouse(page: Page):
    predicted = {digit: draw(page, digit) for digit in DIGIT_STROKES}
    assert sum(digit == prediction for digit, prediction in predicted.items()) >= 4, predicted
    assert page.locator("#live").text_content()  # for screen readers
    page.click("#clear")
    page.wait_for_selector("body.empty")


def test_keyboard_operation(page: Page):
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
    assert outline == "solid"  # the focus is visible
    before = num_predictions(page)
    page.keyboard.press("Space")
    for _ in range(14):
        page.keyboard.press("ArrowDown")
    wait_for_prediction(page, before)
    page.wait_for_timeout(300)
    assert predictions(page)[0][0] == "1"
    page.keyboard.press("Backspace")
    page.wait_for_selector("body.empty")


def assert_controls_have_names(page: Page) -> None:
    controls = "button, input, select, canvas:not(.overlay), video, ol, [role=tablist], section"
    for control in page.locator(controls).all():
        script = "e => e.ariaLabel || e.labels?.[0]?.textContent || e.textContent || e.getAttribute('aria-label')"
        assert control.evaluate(script).strip()


def test_the_camera_stops_with_its_tab(page: Page):
    page.click("#tab-camera")
    before = num_predictions(page)
    page.click("#camera-switch")
    wait_for_prediction(page, before + 2)
    stream = page.evaluate_handle("document.getElementById('video').srcObject")
    page.click("#tab-draw")
    assert stream.evaluate("stream => stream.getTracks().every(track => track.readyState === 'ended')")


def test_files_that_are_not_images(page: Page, folder: Path):
    page.click("#tab-files")
    before = num_predictions(page)
    image = next((folder / "data" / "test" / "5").iterdir())
    files: list[Any] = [
        {"name": "thesis.txt", "mimeType": "text/plain", "buffer": b"precious"},
        {"name": "digit.png", "mimeType": "image/png", "buffer": image.read_bytes()},
    ]
    page.set_input_files("#files", files)
    wait_for_prediction(page, before)
    page.wait_for_selector("#error:not([hidden])")
    assert "thesis.txt" in (page.locator("#error").text_content() or "")
    assert_same(predictions(page), mobilevit.load(folder / "model.safetensors"), image)


def test_facts_and_names_of_controls(page: Page):
    assert_controls_have_names(page)
    facts = page.locator("#facts").inner_text()
    num_threads = page.evaluate("Math.min(4, navigator.hardwareConcurrency)")
    for part in ("MobileViT-XXS", "0.95 M", "10", "32 \u00d7 32 px", f"WASM SIMD, {num_threads} thread"):
        assert part in facts
    assert page.evaluate("crossOriginIsolated")
    assert page.evaluate("document.body.dataset.provider") == "wasm"
    page.wait_for_selector("body[data-trial=done]")
    assert "WebGPU: no GPU found" in page.locator("#facts").inner_text()
    assert re.fullmatch(r"CPU \u00b7 [\d.]+ ms", page.locator("#provider option").first.inner_text())
    assert page.locator("#provider option").last.is_disabled()
    assert page.title().startswith("Which digit is it")


def test_a_phone_and_a_server_without_headers(browser: Browser, page_folder: Path, folder: Path):
    handler = partial(_QuietHandler, directory=str(page_folder))
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    with (
        running(ThreadingHTTPServer(("127.0.0.1", 0), handler)) as url,
        opened(browser, url, **phone) as page,
    ):
        assert not page.evaluate("crossOriginIsolated")
        assert "1 thread" in page.locator("#facts").inner_text()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.tap("#pad")
        wait_for_prediction(page, 0)
        file = next((folder / "data" / "test" / "8").iterdir())
        assert_same(open_file(page, file), mobilevit.load(folder / "model.safetensors"), file)


class _QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


# ---------------------------------------------------------------------------------------------------------------------
# The GPU: chosen if its results are correct and it is faster

# Chromium finds no GPU here. These changes of worker.js compute on the CPU in place of the GPU.
FAKE_GPU = {
    "await import(`./ort/ort.${provider}.js`)": 'await import("./ort/ort.wasm.js")',
    "executionProviders: [provider]": 'executionProviders: ["wasm"]',
}
SLOW_CPU = {"milliseconds: times[times.length >> 1]": 'milliseconds: provider === "webgpu" ? 1 : 1000'}
SLOW_GPU = {"milliseconds: times[times.length >> 1]": 'milliseconds: provider === "webgpu" ? 1000 : 1'}
HAS_GPU = """Object.defineProperty(navigator, "gpu", {
    value: { requestAdapter: async () => ({ info: { isFallbackAdapter: false } }) },
});"""


@contextmanager
def opened_with_gpu(
    browser: Browser, page_folder: Path, folder: Path, changes: Mapping[str, str]
) -> Iterator[tuple[Page, str]]:
    """The page with `changes` of worker.js when it has tried the GPU, and the text about engines."""
    for file in page_folder.iterdir():
        if file.name != "worker.js":
            (folder / file.name).symlink_to(file)
    script = (page_folder / "worker.js").read_text()
    for old, new in {**FAKE_GPU, **changes}.items():
        assert old in script
        script = script.replace(old, new)
    (folder / "worker.js").write_text(script)
    with running(Server(folder)) as url, opened(browser, url, init_script=HAS_GPU) as page:
        page.wait_for_selector("body[data-trial=done]", timeout=TIMEOUT_MS)
        yield page, page.locator("#facts").inner_text()


def gpu_option(page: Page) -> Locator:
    return page.locator("#provider option[value=webgpu]")


def provider(page: Page) -> str:
    used = page.evaluate("document.body.dataset.provider")
    assert page.locator("#provider").input_value() == used
    return used


def select_provider(page: Page, name: str) -> None:
    page.select_option("#provider", name)
    page.wait_for_selector(f"body[data-provider={name}][data-state=ready]", timeout=TIMEOUT_MS)


def test_a_faster_gpu_is_used(browser: Browser, page_folder: Path, folder: Path, tmp_path: Path):
    model, file = mobilevit.load(folder / "model.safetensors"), digit_files(folder)[4]
    with opened_with_gpu(browser, page_folder, tmp_path, SLOW_CPU) as (page, text):
        assert provider(page) == "webgpu"
        assert gpu_option(page).inner_text() == "GPU \u00b7 1.00 ms"
        assert "WASM: 1000 ms" in text
        assert_same(open_file(page, file), model, file)
        select_provider(page, "wasm")
        assert "WASM SIMD" in page.locator("#facts").inner_text()
        assert_same(open_file(page, file), model, file)


def test_a_slower_gpu_can_be_selected(browser: Browser, page_folder: Path, folder: Path, tmp_path: Path):
    model, file = mobilevit.load(folder / "model.safetensors"), digit_files(folder)[4]
    with opened_with_gpu(browser, page_folder, tmp_path, SLOW_GPU) as (page, text):
        assert provider(page) == "wasm"
        assert "WebGPU: 1000 ms, not used because it is slower" in text
        select_provider(page, "webgpu")
        assert_same(open_file(page, file), model, file)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            "for (const x of Object.values(outputs)) x[0] += 1;",
            r"its results are wrong.* by [\d.]+ standard deviations",
        ),
        ("for (const x of Object.values(outputs)) x[0] = NaN;", "NaN"),
        ('throw new Error("no shader for this");', "no shader for this"),
    ],
    ids=["wrong", "NaN", "failure"],
)
def test_a_faulty_gpu_is_not_used(
    browser: Browser, page_folder: Path, folder: Path, tmp_path: Path, change: str, expected: str
):
    check = "  requireFinite(outputs);\n  const times"
    changes = {**SLOW_CPU, check: f'  if (provider === "webgpu") {{ {change} }}\n{check}'}
    with opened_with_gpu(browser, page_folder, tmp_path, changes) as (page, text):
        assert provider(page) == "wasm"
        assert re.search(f"WebGPU: not used, .*{expected}", text.replace("\n", " "))
        assert gpu_option(page).is_disabled()
        file = digit_files(folder)[4]
        assert_same(open_file(page, file), mobilevit.load(folder / "model.safetensors"), file)


def test_the_cpu_takes_over_when_the_gpu_fails(browser: Browser, page_folder: Path, folder: Path, tmp_path: Path):
    changes = {
        "let session;": "let session;\nlet used;",
        "session = await": "used = provider;\n  session = await",
        "async function predict(image) {": """async function predict(image) {
            if (used === "webgpu") throw new Error("device lost");""",
    }
    with opened_with_gpu(browser, page_folder, tmp_path, {**SLOW_CPU, **changes}) as (page, _):
        assert provider(page) == "webgpu"
        file = digit_files(folder)[4]
        assert_same(open_file(page, file), mobilevit.load(folder / "model.safetensors"), file)
        assert provider(page) == "wasm"
        assert "WebGPU: not used, it failed (device lost)" in page.locator("#facts").inner_text()
        assert gpu_option(page).is_disabled()


@pytest.mark.slow
def test_webgpu(playwright: Playwright, page_folder: Path, folder: Path):
    """WebGPU as emulated by Chromium, which the page would not use."""
    flags = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"]
    script = 'Object.defineProperty(GPUAdapterInfo.prototype, "isFallbackAdapter", { get: () => false });'
    with (
        launched(playwright, flags) as browser,
        running(Server(page_folder)) as url,
        opened(browser, url, init_script=script) as page,
    ):
        page.wait_for_selector("body[data-trial=done]", timeout=3 * TIMEOUT_MS)
        assert not gpu_option(page).is_disabled(), page.locator("#facts").inner_text()
        if provider(page) == "wasm":
            page.select_option("#provider", "webgpu")
            page.wait_for_selector("body[data-provider=webgpu][data-state=ready]", timeout=3 * TIMEOUT_MS)
        for file in digit_files(folder)[:3]:
            assert_same(open_file(page, file), mobilevit.load(folder / "model.safetensors"), file)


BOXES = {"boxes": [0.1, 0.1, 0.5, 0.5, 0, 0, 0, 0], "scores": [0.9, 0], "labels": [2, -1]}


@pytest.mark.skipif(NODE is None, reason="node is not installed")
@pytest.mark.parametrize(
    ("task", "expected", "outputs", "problem"),
    [
        ("classify", {"logits": [1, 3, 5]}, {"logits": [1.01, 3, 5]}, ""),
        ("classify", {"logits": [1, 3, 5]}, {"logits": [1, 3, 4]}, "0.61 standard deviations"),
        ("multilabel", {"logits": [2]}, {"logits": [2.01]}, ""),
        ("multilabel", {"logits": [2]}, {"logits": [-2]}, "2.00 standard deviations"),
        ("segment", {"classes": [1] * 200}, {"classes": [1] * 199 + [0]}, ""),
        ("segment", {"classes": [1] * 200}, {"classes": [1] * 100 + [0] * 100}, "50 % of the pixels"),
        ("detect", BOXES, {**BOXES, "scores": [0.89, 0.01]}, ""),
        ("detect", BOXES, {**BOXES, "labels": [1, -1]}, "100 % of the boxes"),
        ("detect", BOXES, {**BOXES, "boxes": [0.2, *BOXES["boxes"][1:]]}, "100 % of the boxes"),
        ("detect", BOXES, {**BOXES, "scores": [0, 0]}, "100 % of the boxes"),
        ("detect", {**BOXES, "scores": [0, 0]}, {**BOXES, "scores": [0, 0]}, "no objects"),
    ],
)
def test_comparison_of_engines(
    task: str, expected: dict[str, Any], outputs: dict[str, Any], problem: str, tmp_path: Path
):
    shutil.copyfile(STATIC / "trial.js", tmp_path / "trial.mjs")
    arguments = ", ".join(json.dumps(x) for x in (task, expected, outputs))
    (tmp_path / "run.mjs").write_text(
        'import { findDifference } from "./trial.mjs";' + f"console.log(findDifference({arguments}));"
    )
    assert NODE is not None
    out = subprocess.run([NODE, "run.mjs"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()
    assert problem in out if problem else out == ""


# ---------------------------------------------------------------------------------------------------------------------
# Multi-label classification


def test_labels_match_torch(browser: Browser, ort: Path, tmp_path: Path):
    """Labels, those of other classes, thresholds, and an image without labels."""
    names = ("roof", "tree", "<b>sky", "wall", "water", "person", "dog")
    network = randomize(MobileViT("xxs", num_classes=len(names)), 4)
    weights = Weights(network.architecture, network.state_dict(), Preprocessing(64, 64), names, task="multilabel")
    images = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    photos = [Image.fromarray(image) for image in images]
    every = MultilabelClassifier.from_weights(weights).predict(photos[0], 0)
    probability = {one.class_name: one.probability for one in every}
    # Two labels, of which one is not among the most likely classes.
    labels = {every[0].class_name, every[-1].class_name}
    thresholds = tuple(
        probability[name] - 0.02 if name in labels else min(1, probability[name] + 0.02) for name in names
    )
    weights = replace(weights, thresholds=tuple(max(0.0, t) for t in thresholds))
    model = MultilabelClassifier.from_weights(weights)
    with opened_for(browser, weights, ort, tmp_path) as page:
        for photo in photos:
            open_file(page, as_file(photo))
            predicted = model.predict(photo)
            shown = rows(page)
            listed = [row for row in shown if row["label"] == "true"]
            assert [names[int(row["index"])] for row in listed] == [one.class_name for one in predicted]
            assert len(shown) == max(5, len(listed))
            assert page.locator("#headline").inner_text() == (
                ", ".join(one.class_name for one in predicted) or "No label"
            )
            expected = {one.class_index: one.probability for one in model.predict(photo, 0)}
            for row in shown:
                index = int(row["index"])
                assert float(row["probability"]) == pytest.approx(expected[index], abs=1e-3)
                assert f"(from {100 * weights.thresholds[index]:.1f} %)" in row["text"]
                assert row["text"].startswith(names[index] if row["label"] == "true" else f"not {names[index]}")
            thumb = page.locator("#thumbnails button").last
            assert thumb.inner_text() == (", ".join(one.class_name for one in predicted) or "no label")
            label = thumb.get_attribute("aria-label") or ""
            assert all(f"{one.class_name}, {100 * one.probability:.1f} %" in label for one in predicted)
        assert_controls_have_names(page)
        page.set_viewport_size({"width": 320, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= 320


# ---------------------------------------------------------------------------------------------------------------------
# Detection and segmentation

WHOLE_IMAGE = Preprocessing((96, 96), 96)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(load_sample_image("china.jpg"))


@pytest.fixture(scope="module")
def boxes_weights() -> Weights:
    """Random weights, with a background bias so that few boxes exceed the default score and many do not."""
    model = randomize(SSDLite("xxs", 4), 2)
    tensors = model.state_dict()
    for i in range(6):
        tensors[f"heads.{i}.out.bias"].unflatten(0, (-1, 9))[:, 4] += 3.0
    return Weights(model.architecture, tensors, WHOLE_IMAGE, ("roof", "tree", "wall", "<b>sky"), task="detect")


@pytest.fixture(scope="module")
def mask_weights() -> Weights:
    model = randomize(DeepLabV3("xxs", 5, 16, PAPER_HEAD), 2)
    names = ("background", "roof", "tree", "wall", "sky")
    options: dict[str, Any] = {"task": "segment", "head": PAPER_HEAD, "output_stride": 16}
    return Weights(model.architecture, model.state_dict(), WHOLE_IMAGE, names, **options)


@contextmanager
def opened_for(browser: Browser, weights: Weights, ort: Path, folder: Path) -> Iterator[Page]:
    pytest.importorskip("onnxruntime", reason="the demo requires mobilevit[onnx]")
    write_page(weights, folder, runtime_folder=ort)
    size = {"width": 1280, "height": 900}
    with running(Server(folder)) as url, opened(browser, url, permissions=["camera"], viewport=size) as page:
        yield page


@pytest.fixture(scope="module")
def boxes_page(
    browser: Browser, boxes_weights: Weights, ort: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Page]:
    with opened_for(browser, boxes_weights, ort, tmp_path_factory.mktemp("boxes")) as page:
        yield page


@pytest.fixture(scope="module")
def mask_page(
    browser: Browser, mask_weights: Weights, ort: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Page]:
    with opened_for(browser, mask_weights, ort, tmp_path_factory.mktemp("mask")) as page:
        yield page


def as_file(image: Image.Image) -> dict[str, Any]:
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"name": "photo.png", "mimeType": "image/png", "buffer": file.getvalue()}


def rows(page: Page) -> list[dict[str, str]]:
    """The text and the data attributes of the result rows."""
    script = "all => all.map(row => ({ ...row.dataset, text: row.innerText }))"
    return page.locator("#results li").evaluate_all(script)


def overlay(page: Page) -> np.ndarray:
    """The overlay on the image, RGBA (H, W, 4)."""
    url = page.locator("canvas.overlay").evaluate("canvas => canvas.toDataURL()")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGBA"))


def move_slider(page: Page, *keys: str) -> str:
    """Press keys on the slider; returns its text."""
    page.focus("#slider")
    for key in keys:
        page.keyboard.press(key)
    return page.locator(".setting output").inner_text()


def fraction_drawn(page: Page, points: np.ndarray, colors: np.ndarray) -> float:
    """The fraction of relative points (N, 2) at which the overlay has nearly the colors (N, 3)."""
    drawn = overlay(page)
    x, y = (points * drawn.shape[1::-1]).astype(int).T
    pixels = drawn[y, x]
    return float(((np.abs(pixels[:, :3].astype(int) - colors).max(axis=1) < 8) & (pixels[:, 3] > 250)).mean())


def test_boxes_match_torch(boxes_page: Page, boxes_weights: Weights, photo: Image.Image):
    page, model = boxes_page, Detector.from_weights(boxes_weights)
    open_file(page, as_file(photo))
    assert move_slider(page) == "30 %"
    numbers = []
    for keys, score in (((), 0.3), (("ArrowRight",) * 5, 0.35), (("Home",), 0.01), (("End",), 0.99)):
        assert move_slider(page, *keys) == f"{100 * score:.0f} %"
        shown, expected = rows(page), model.predict(photo, score)
        numbers.append(len(shown))
        assert [row["text"].split("\n")[0] for row in shown] == [one.class_name for one in expected]
        scores = [float(row["score"]) for row in shown]
        np.testing.assert_allclose(scores, [one.score for one in expected], atol=1e-3)
        boxes = np.array([row["box"].split() for row in shown], float).reshape(-1, 4)
        np.testing.assert_allclose(boxes, np.array([one.box for one in expected]).reshape(-1, 4), atol=0.5)
        thumb = page.locator("#thumbnails button").last
        assert thumb.inner_text().split()[0] == str(len(shown) or "none")
    assert numbers[2] > numbers[0] > numbers[1] > numbers[3] == 0
    assert numbers[0] > 2
    assert "99 %" in page.locator("#headline").inner_text()


def test_boxes_are_drawn_at_their_positions(boxes_page: Page, boxes_weights: Weights, photo: Image.Image):
    page = boxes_page
    open_file(page, as_file(photo))
    move_slider(page, "Home", *("ArrowRight",) * 29)
    best = Detector.from_weights(boxes_weights).predict(photo)[0]
    x1, y1, x2, y2 = best.box
    drawn = overlay(page)
    scale = drawn.shape[1] / photo.width
    assert drawn.shape[0] == pytest.approx(scale * photo.height, abs=1)  # the aspect ratio of the image
    sides = [(x1 * scale + 1.5, y) for y in np.linspace(y1, y2, 40)[2:-2] * scale]
    sides += [(x2 * scale - 1.5, y) for y in np.linspace(y1, y2, 40)[2:-2] * scale]
    colors = np.tile(class_color(best.class_index), (len(sides), 1))
    # Labels of other boxes may cover it.
    assert fraction_drawn(page, np.array(sides) / drawn.shape[1::-1], colors) > 0.6
    page.wait_for_function("() => document.getElementById('live').textContent.includes('objects, ')")
    assert f"{best.class_name} {100 * best.score:.0f} percent" in (page.locator("#live").text_content() or "")


def test_long_lists_scroll_by_keyboard(boxes_page: Page, photo: Image.Image):
    page = boxes_page
    open_file(page, as_file(photo))
    move_slider(page, "Home")
    heights = page.locator("#results li").evaluate_all("all => all.map(row => row.offsetHeight)")
    assert len(heights) > 30
    assert min(heights) > 24
    assert page.evaluate("document.getElementById('results').offsetHeight") < 500
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "results"
    page.keyboard.press("End")
    page.wait_for_function("() => document.getElementById('results').scrollTop > 100")
    move_slider(page, "End")
    assert not page.locator("#results[tabindex]").count()


def test_masks_match_torch(mask_page: Page, mask_weights: Weights, photo: Image.Image):
    page, model = mask_page, Segmenter.from_weights(mask_weights)
    square = photo.crop((100, 100, 196, 196))
    for image, tolerance in ((square, 3 / 96**2), (photo, 0.01)):  # the first one is not resized
        open_file(page, as_file(image))
        mask = model.predict(image)
        fractions = np.bincount(mask.ravel(), minlength=5) / mask.size
        assert (fractions > 0.01).sum() >= 3
        shown = rows(page)
        listed = {int(row["index"]): float(row["fraction"]) for row in shown}
        np.testing.assert_allclose([listed.get(c, 0) for c in range(5)], fractions, atol=tolerance)
        assert list(listed.values()) == sorted(listed.values(), reverse=True)
        names = [mask_weights.class_names[index] for index in listed]
        assert [row["text"].split("\n")[0] for row in shown] == names
        assert move_slider(page, "End") == "100 %"
        # Pixels whose neighborhood has a single class.
        side = 7
        y, x = (a.ravel() for a in np.mgrid[side : mask.shape[0] - side : 3, side : mask.shape[1] - side : 3])
        around = np.stack([mask[y + i, x + j] for i in (-side, 0, side) for j in (-side, 0, side)])
        clear = (around == around[0]).all(axis=0)
        painted = clear & (around[4] != 0)
        assert painted.sum() > 30
        points = (np.stack([x, y], 1) + 0.5) / image.size
        colors = np.array([class_color(int(c)) for c in around[4]])
        assert fraction_drawn(page, points[painted], colors[painted]) > 0.8  # labels cover the rest


def test_the_slider_sets_the_opacity_of_masks(mask_page: Page, photo: Image.Image):
    page = mask_page
    open_file(page, as_file(photo))
    assert move_slider(page, "Home") == "0 %"
    assert not overlay(page)[..., 3].any()
    assert move_slider(page, *("ArrowRight",) * round(100 * MASK_OPACITY)) == f"{100 * MASK_OPACITY:.0f} %"
    opacities, counts = np.unique(overlay(page)[..., 3], return_counts=True)
    assert opacities[counts[1:].argmax() + 1] == pytest.approx(255 * MASK_OPACITY, abs=2)
    announcement = page.locator("#live").text_content() or ""
    assert "tree" in announcement
    assert "percent" in announcement


@pytest.mark.parametrize("name", ["boxes_page", "mask_page"])
def test_layout_and_keyboard_of_dense_pages(name: str, request: pytest.FixtureRequest, photo: Image.Image):
    page: Page = request.getfixturevalue(name)
    open_file(page, as_file(photo))
    assert not page.is_visible("#tab-draw")
    assert_controls_have_names(page)
    page.focus("#tab-files")
    focused = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        focused.add(page.evaluate("document.activeElement.id"))
    assert {"files", "slider", "provider"} <= focused
    assert page.locator("#slider").get_attribute("aria-valuetext", timeout=1000).endswith(" percent")  # pyright: ignore
    size = page.viewport_size
    assert size is not None
    try:
        for width, is_side_by_side in ((1280, True), (390, False), (320, False)):
            page.set_viewport_size({"width": width, "height": 844})
            page.wait_for_timeout(200)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            stage, prediction = (page.locator(s).bounding_box() for s in ("#drop", ".prediction"))
            assert stage
            assert prediction
            assert (prediction["y"] < stage["y"] + stage["height"]) == is_side_by_side
            ratio = overlay(page).shape[1] / overlay(page).shape[0]
            assert ratio == pytest.approx(photo.width / photo.height, rel=0.02)
            assert stage["width"] / stage["height"] == pytest.approx(ratio, rel=0.05)
    finally:
        page.set_viewport_size(size)


@pytest.mark.parametrize("name", ["boxes_page", "mask_page"])
def test_dense_predictions_of_the_camera(name: str, request: pytest.FixtureRequest, photo: Image.Image):
    page: Page = request.getfixturevalue(name)
    open_file(page, as_file(photo))
    listed = rows(page)
    page.click("#tab-camera")
    assert rows(page) == []
    assert page.locator("canvas.overlay").count() == 0
    before = num_predictions(page)
    page.click("#camera-switch")
    wait_for_prediction(page, before + 2)
    assert (overlay(page)[..., 3] == 255).all()  # the predicted frame is drawn below
    page.click("#tab-files")
    assert rows(page) == listed
    page.wait_for_timeout(500)
    assert rows(page) == listed  # late camera results are discarded
    assert page.locator("#drop canvas.overlay").count() == 1


def test_dense_tasks_require_whole_images_and_have_no_pad(
    boxes_weights: Weights, mask_weights: Weights, tmp_path: Path
):
    for weights in (boxes_weights, mask_weights):
        with pytest.raises(ValueError, match=f"mnist.*{weights.task}"):
            write_page(weights, tmp_path, drawing="mnist")
        cropping = replace(weights, preprocessing=Preprocessing(110, 96))
        with pytest.raises(ValueError, match=r"110.*96"):
            write_page(cropping, tmp_path)
        assert default_drawing(replace(weights, class_names=tuple("01234"[: len(weights.class_names)]))) is None
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Preprocessing


@pytest.mark.skipif(NODE is None, reason="node is not installed")
@pytest.mark.skipif(int(pillow_version.split(".")[0]) < 13, reason="older Pillow orders the passes differently")
@pytest.mark.parametrize("interpolation", FILTERS)
def test_preprocessing_matches_pillow(interpolation: str, tmp_path: Path):
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
    shutil.copyfile(STATIC / "preprocessing.js", tmp_path / "preprocessing.mjs")
    (tmp_path / "run.mjs").write_text(
        'import { readFileSync } from "node:fs"; import { preprocess } from "./preprocessing.mjs";'
        'const cases = JSON.parse(readFileSync("cases.json"));'
        "for (const one of cases) one.data = Uint8ClampedArray.from(one.data);"
        "console.log(JSON.stringify(cases.map((one) => Array.from(preprocess(one, one.preprocessing).input))));"
    )
    assert NODE is not None
    out = subprocess.run([NODE, "run.mjs"], cwd=tmp_path, check=True, capture_output=True).stdout
    for image, (size, one), values in zip(images, cases, json.loads(out), strict=True):
        expected = one(image).numpy()
        std = np.array(one.std)[:, None, None]
        levels = np.abs(np.array(values).reshape(expected.shape) - expected) * std * 255
        assert levels.max() < 1e-3, size


# ---------------------------------------------------------------------------------------------------------------------
# Files and server


def test_the_folder_is_complete_and_contains_no_local_paths(page_folder: Path, folder: Path):
    files = {str(file.relative_to(page_folder)) for file in page_folder.rglob("*") if file.is_file()}
    assert {"index.html", "style.css", "page.css", "model.onnx", "network.json", "_headers", "ort/ort.wasm.js"} <= files
    html = (page_folder / "index.html").read_text() + (page_folder / "main.js").read_text()
    assert "http://" not in html  # self-contained
    assert "https://" not in html
    network = json.loads((page_folder / "network.json").read_text())
    assert network["class_names"] == list("0123456789")
    assert network["drawing"]["side_px"] == 8
    for name in ("network.json", "model.onnx"):
        assert str(folder).encode() not in (page_folder / name).read_bytes()


def test_int8_requires_images(weights: Weights, tmp_path: Path):
    with pytest.raises(ValueError, match=r"int8 .*--images$"):
        write_page(weights, tmp_path / "page", precision="int8")
    assert not (tmp_path / "page").exists()


def test_only_own_pages_are_replaced(weights: Weights, page_folder: Path, ort: Path, tmp_path: Path):
    write_page(weights, page_folder, source="model.safetensors", runtime_folder=ort)
    for name in ("index.html", "style.css"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("precious")
        with pytest.raises(ValueError, match=rf"{name}.*--overwrite"):
            write_page(weights, folder)
        assert [file.read_text() for file in folder.iterdir()] == ["precious"]


def test_opened_from_disk_the_page_shows_the_serve_command(browser: Browser, tmp_path: Path):
    folder = tmp_path / "a page"
    shutil.copytree(STATIC, folder)
    page = browser.new_page()
    page.goto((folder / "index.html").as_uri())
    assert f'python -m http.server -b 127.0.0.1 -d "{folder}"' in page.locator("#server").inner_text()
    page.close()
    with running(Server(folder)) as url:
        page = browser.new_page()
        page.goto(url)
        assert page.locator("#server").is_hidden()
        page.close()


def test_default_drawing(weights: Weights):
    assert default_drawing(weights) == "optdigits"
    assert default_drawing(replace(weights, preprocessing=Preprocessing(64, 64))) == "mnist"
    assert default_drawing(replace(weights, class_names=tuple("abcdefghij"))) == "optdigits"
    assert default_drawing(replace(weights, class_names=("cat", *"123456789"))) is None
    assert default_drawing(replace(weights, class_names=())) is None


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
            process.send_signal(signal.SIGTERM)  # like Ctrl-C, which background processes ignore
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert json.loads(served) == json.loads((page_folder / "network.json").read_text())


def test_the_command_writes_a_page(
    folder: Path, page_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    options: dict[str, Any] = {}

    def write(weights: Weights, out: Path, **given: Any) -> None:
        options.update(given)
        shutil.copytree(page_folder, out)

    monkeypatch.setattr("mobilevit.demo.write_page", write)
    arguments = [str(folder / "model.safetensors"), "--out", str(tmp_path / "page"), "--drawing", "mnist"]
    arguments += ["--images", str(folder / "data" / "test" / "3")]
    assert parse(["demo", *arguments]).run() == 0
    assert str(tmp_path) in capsys.readouterr().out
    assert options["source"] == "model.safetensors"  # without local folders
    assert options["drawing"] == "mnist"
    assert len(options["images"]) == len(list((folder / "data" / "test" / "3").iterdir()))
    assert options["runtime_folder"] is None


def test_the_wheel_is_pure_and_complete(tmp_path: Path):
    builder = pytest.importorskip("hatchling.builders.wheel", reason="hatchling builds the wheel").WheelBuilder(
        str(ROOT)
    )
    (path,) = builder.build(directory=str(tmp_path), versions=["standard"])
    assert path.endswith("-py3-none-any.whl")
    package = ROOT / "src" / "mobilevit"
    with zipfile.ZipFile(path) as archive:
        packed = {name.removeprefix("mobilevit/") for name in archive.namelist() if name.startswith("mobilevit/")}
    files = (file for file in package.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    assert packed == {file.relative_to(package).as_posix() for file in files}
