"""What tests of several files share."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
import torch
from torch import nn

from mobilevit.models.mobilevit import Architecture, Stage, Transformer

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

Network = TypeVar("Network", bound=nn.Module)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMIUM_FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"),
]


# Every kind of layer, at widths of S and in two stages, so that exporters and compilers take a sixth of the time.
SMALL = Architecture(
    "small",
    stages=(
        Stage(32, num_residuals=2, stride=2),
        Stage(96, num_residuals=1, stride=2, transformer=Transformer(dim=144, num_layers=1, ffn_dim=288)),
    ),
    head_channels=320,
    expansion=4,
    transformer_dropout=0.1,
)


def randomise(model: Network, seed: int = 0) -> Network:
    """Random weights whose activations keep their scale, and norms that are not the identity; eval mode.

    With default initial values the running statistics are 0 and 1 and the biases 0, and mixing them up goes unseen.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            z = torch.randn(tensor.shape, generator=generator)
            if key.endswith("num_batches_tracked"):
                tensor.fill_(7)
            elif key.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif key.endswith(("running_mean", "bias")):
                tensor.copy_(0.1 * z)
            elif tensor.ndim == 1:
                tensor.copy_(1 + 0.1 * z)
            else:
                tensor.copy_(1.3 * z / tensor[0].numel() ** 0.5)
    return model.eval()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    api = pytest.importorskip("playwright.sync_api", reason="browsers are driven by mobilevit[browser-test]")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@contextmanager
def ready_page(
    browser: Browser,
    url: str,
    *,
    patience_ms: float = 30_000,
    on_request: Callable[[str], Any] = lambda url: None,
    **context: Any,
) -> Iterator[Page]:
    """The page once it says that it is ready; whatever the browser's console complained of fails the test."""
    complaints: list[str] = []
    with browser.new_context(**context) as one:
        page = one.new_page()
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: on_request(request.url))
        page.goto(url)
        page.wait_for_selector("body[data-state=ready]", timeout=patience_ms)
        yield page
    assert not complaints


# test_resume.py forks, and autograd refuses to work in a fork of a process in which it has had threads. The others are
# the longest files: a worker that takes one last keeps everyone waiting.
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
