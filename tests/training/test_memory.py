"""The largest micro-batch, compared with bytes calculated by hand and saved by autograd."""

import os
from dataclasses import replace
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from mobilevit.data.loader import Batch
from mobilevit.models.mobilevit import MobileViT
from mobilevit.recipes import Compute, Data, Recipe
from mobilevit.tasks import TASKS, Task
from mobilevit.training.memory import ACTIVATION_FRACTION, max_micro_batch_pixels

CPU = torch.device("cpu")
RECIPE = Recipe(architecture="xxs", data=Data(size_px=64))


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> int:
    """Of the machine: 10 GB, in pages of 1,000 bytes."""
    pages = {"SC_PHYS_PAGES": 10_000_000, "SC_PAGE_SIZE": 1000}
    monkeypatch.setattr(os, "sysconf", lambda name: pages[name])
    return 10_000_000_000


def blank(num: int = 2, size_px: int = 64) -> Batch:
    return Batch(torch.zeros(num, 3, size_px, size_px), torch.zeros(num, dtype=torch.long))


class Powers:
    """A loss for which autograd saves the images, two results, and a weight."""

    def loss(self, recipe: Recipe, model: nn.Module, batch: Batch) -> Tensor:
        x = batch.pixels.clone().requires_grad_()
        weight = next(model.parameters())
        return (((x.square() + x.pow(3)) * weight).square()).sum()


def test_bytes_calculated_by_hand(memory: int):
    # Of a pixel, 3 float32 each: x, the sum (for the weight's gradient), its product with the weight.
    model = nn.Linear(1, 1, bias=False)
    found = max_micro_batch_pixels(RECIPE, cast(Task, Powers()), model, blank(), CPU)
    assert found == pytest.approx(ACTIVATION_FRACTION * memory / (3 * 3 * 4), rel=1e-3)


def test_half_precision_doubles_the_pixels():
    model = MobileViT("xxs", num_classes=3).train()
    at = {}
    for precision in (torch.float32, torch.bfloat16, torch.float16):
        with torch.autocast("cpu", precision, precision != torch.float32):
            at[precision] = max_micro_batch_pixels(RECIPE, TASKS["classify"], model, blank(size_px=256), CPU)
    for precision in (torch.bfloat16, torch.float16):
        assert 1.8 < at[precision] / at[torch.float32] <= 2.0


@pytest.mark.parametrize(("one", "other"), [((2, 64), (4, 64)), ((2, 64), (2, 128)), ((3, 96), (2, 160))])
def test_the_result_is_independent_of_the_shape_of_the_batch(one: tuple[int, int], other: tuple[int, int]):
    model = MobileViT("xxs", num_classes=3).train()
    found = [max_micro_batch_pixels(RECIPE, TASKS["classify"], model, blank(*shape), CPU) for shape in (one, other)]
    assert found[0] == pytest.approx(found[1], rel=0.03)


def test_the_result_depends_on_the_machine_only(monkeypatch: pytest.MonkeyPatch):
    found = {
        max_micro_batch_pixels(RECIPE, TASKS["classify"], MobileViT("xxs", num_classes=3).train(), blank(), CPU)
        for _ in range(3)
    }
    assert len(found) == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    model = MobileViT("xxs", num_classes=3).train()
    assert max_micro_batch_pixels(RECIPE, TASKS["classify"], model, blank(), CPU) == pytest.approx(
        found.pop() / 2, abs=1
    )


def test_what_is_asked_for_is_not_measured():
    recipe = replace(RECIPE, compute=Compute(micro_batch_size=7))
    nothing = cast(Task, object())  # has no loss that could be asked for
    assert max_micro_batch_pixels(recipe, nothing, nn.Linear(1, 1), blank(), CPU) == 7 * 64**2
