"""Fixtures and helpers for several test files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch

from mobilevit.images import megapixel_limit_restored

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMIUM_FLAGS = [
    *("--headless", "--no-sandbox", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"),
]


@pytest.fixture(scope="module")
def playwright() -> Iterator[Playwright]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    api = pytest.importorskip("playwright.sync_api", reason="browsers are driven by mobilevit[browser-test]")
    with api.sync_playwright() as playwright:
        yield playwright


@contextmanager
def launched(playwright: Playwright, flags: Sequence[str] = ("--disable-gpu",)) -> Iterator[Browser]:
    """Chromium with `flags`."""
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*CHROMIUM_FLAGS, *flags])
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def browser(playwright: Playwright) -> Iterator[Browser]:
    with launched(playwright) as browser:
        yield browser


@contextmanager
def ready_page(
    browser: Browser,
    url: str,
    *,
    timeout_ms: float = 30_000,
    on_request: Callable[[str], Any] = lambda url: None,
    init_script: str = "",
    **context: Any,
) -> Iterator[Page]:
    """The page when it is ready. `init_script` runs before its scripts. Errors in the console fail the test."""
    errors: list[str] = []
    with browser.new_context(**context) as one:
        page = one.new_page()
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: on_request(request.url))
        page.add_init_script(init_script)
        page.goto(url)
        page.wait_for_selector("body[data-state=ready]", timeout=timeout_ms)
        yield page
    assert not errors


# test_resume.py forks, and autograd does not work in a fork of a process in which it has started threads. The others
# are the longest files: started last, they would keep one worker busy at the end.
FIRST = (
    *("test_resume.py", "test_train.py", "test_loop.py", "test_parity.py", "test_mobilevit.py"),
    *("test_dense.py", "test_executorch.py", "test_onnx.py", "test_demo.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: i for i, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.path.name, len(FIRST)))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def megapixel_limit() -> Iterator[None]:
    """The limit is process state; a command that sets it must not affect the next test."""
    with megapixel_limit_restored():
        yield
