"""The largest micro-batch, compared with bytes calculated by hand and saved by autograd."""

import os
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from mobilevit.data.loader import Batch
from mobilevit.models.mobilevit import MobileViT
from mobilevit.recipes import Compute, Data, Recipe
from mobilevit.tasks import TASKS
from mobilevit.training.memory import ACTIVATION_FRACTION, max_micro_batch_pixels

CPU = torch.device("cpu")
RECIPE = Recipe(architecture="xxs", data=Data(size_px=64))
MEMORY_BYTES = 10_000_000_000


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {"SC_PHYS_PAGES": MEMORY_BYTES // 1000, "SC_PAGE_SIZE": 1000}
    monkeypatch.setattr(os, "sysconf", lambda name: pages[name])


def measure(num: int = 2, size_px: int = 64) -> int:
    """The number of pixels for a MobileViT-XXS."""
    torch.manual_seed(0)
    batch = Batch(torch.zeros(num, 3, size_px, size_px), torch.zeros(num, dtype=torch.long))
    loss = partial(TASKS["classify"].loss, RECIPE)
    return max_micro_batch_pixels(RECIPE, loss, MobileViT("xxs", num_classes=3).train(), batch, CPU)


def test_bytes_calculated_by_hand():
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        x = batch.pixels.clone().requires_grad_()
        return (((x.square() + x.pow(3)) * next(model.parameters())).square()).sum()

    # Autograd saves 3 float32 values per channel: x, the sum (for the weight's gradient), its product with the weight.
    batch = Batch(torch.zeros(2, 3, 64, 64), None)
    found = max_micro_batch_pixels(RECIPE, loss, nn.Linear(1, 1, bias=False), batch, CPU)
    assert found == pytest.approx(ACTIVATION_FRACTION * MEMORY_BYTES / (3 * 3 * 4), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_nearly_doubles_the_pixels(dtype: torch.dtype):
    with torch.autocast("cpu", dtype):
        half = measure(size_px=256)
    assert 1.8 < half / measure(size_px=256) <= 2.0


@pytest.mark.parametrize(("one", "other"), [((2, 64), (4, 64)), ((2, 64), (2, 128)), ((3, 96), (2, 160))])
def test_the_result_is_independent_of_the_shape_of_the_batch(one: tuple[int, int], other: tuple[int, int]):
    assert measure(*one) == pytest.approx(measure(*other), rel=0.03)


def test_processes_share_the_memory(monkeypatch: pytest.MonkeyPatch):
    pixels = measure()
    assert measure() == pixels
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert measure() == pytest.approx(pixels / 2, abs=1)


def test_a_given_micro_batch_size_is_not_measured():
    recipe = replace(RECIPE, compute=Compute(micro_batch_size=7))

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        raise AssertionError

    assert (
        max_micro_batch_pixels(recipe, loss, nn.Linear(1, 1), Batch(torch.zeros(2, 3, 64, 64), None), CPU) == 7 * 64**2
    )
