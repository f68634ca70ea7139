"""The optimizer and its rate against values worked out by hand; what is frozen, decayed, and slower."""

import math
from typing import get_args

import pytest
import torch
from torch import nn

from mobilevit.models.mobilevit import MobileViT
from mobilevit.recipes import RECIPES, Cosine, Freeze, Optimizer
from mobilevit.training.optim import build_optimizer, freeze, learning_rate, set_learning_rate

SHORT = Optimizer(start_lr=2e-4, lr=2e-3, end_lr=2e-4, warmup_steps=3000)  # 3,000 is more than a tenth: 10 of 101
LONG = Optimizer(start_lr=0.0, lr=1.0, end_lr=0.5, warmup_steps=100)


@pytest.mark.parametrize(
    ("recipe", "num_steps", "step", "rate"),
    [
        (SHORT, 101, 0, 2e-4),
        (SHORT, 101, 5, 1.1e-3),
        (SHORT, 101, 9, 1.82e-3),
        (SHORT, 101, 10, 2e-3),
        (SHORT, 101, 40, 1.55e-3),  # a third of the cosine: 3/4 of the way is left
        (SHORT, 101, 55, 1.1e-3),  # half
        (SHORT, 101, 100, 2e-4),
        (LONG, 10_001, 0, 0.0),
        (LONG, 10_001, 25, 0.25),
        (LONG, 10_001, 100, 1.0),
        (LONG, 10_001, 100 + 9900 // 3, 0.875),
        (LONG, 10_001, 100 + 9900 // 2, 0.75),
        (LONG, 10_001, 10_000, 0.5),
        # Too short for a warm-up.
        (SHORT, 1, 0, 2e-3),
        (SHORT, 2, 0, 2e-3),
        (SHORT, 2, 1, 2e-4),
        (SHORT, 9, 0, 2e-3),
        (SHORT, 9, 4, 1.1e-3),
        (SHORT, 9, 8, 2e-4),
        # One step of it.
        (SHORT, 10, 0, 2e-4),
        (SHORT, 10, 1, 2e-3),
        (SHORT, 10, 9, 2e-4),
    ],
)
def test_rates_by_hand(recipe: Optimizer, num_steps: int, step: int, rate: float):
    # Which epoch it is, does not matter.
    for epoch in (0, 7):
        found = learning_rate(recipe, step, num_steps, epoch=epoch, num_epochs=8)
        assert found == pytest.approx(rate, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize(
    ("step", "epoch", "rate"),
    [
        (0, 0, 2e-4),
        (1500, 1, 1.1e-3),  # warming up, whatever the epoch
        (3000, 3, 2e-4 + 1.8e-3 * (1 + math.cos(math.pi * 0.01)) / 2),  # as if the cosine had begun at step 0
        (3999, 3, 2e-4 + 1.8e-3 * (1 + math.cos(math.pi * 0.01)) / 2),  # the same all through the epoch
        (100_000, 100, 1.55e-3),
        (150_000, 150, 1.1e-3),
        (299_999, 299, 2e-4 + 1.8e-3 * (1 - math.cos(math.pi / 300)) / 2),  # does not reach end_lr
    ],
)
def test_rates_of_the_released_code(step: int, epoch: int, rate: float):
    recipe = RECIPES["v0.1-s"].optimizer
    assert learning_rate(recipe, step, 300_000, epoch=epoch, num_epochs=300) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize("cosine", ["step", "epoch"])
def test_epochs_beyond_the_schedule_stay_at_its_last_rate(cosine: Cosine):
    recipe = Optimizer(start_lr=1e-4, lr=1e-3, end_lr=3e-5, warmup_steps=50, cosine=cosine)
    for step, epoch in ((100, 10), (101, 10), (500, 49)):
        assert learning_rate(recipe, step, 100, epoch=epoch, num_epochs=10) == 3e-5
    assert learning_rate(recipe, 99, 100, epoch=9, num_epochs=10) == pytest.approx(
        3e-5 if cosine == "step" else 5.4e-5, rel=0.01
    )


def test_a_step_of_adamw_by_hand_on_every_parameter():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    before = [p.detach().double().clone() for p in model.parameters()]
    optimizer = build_optimizer(model, Optimizer(lr=0.01, weight_decay=0.5))
    m, v = ([torch.zeros_like(p) for p in before] for _ in range(2))
    for step in (1, 2):
        for i, parameter in enumerate(model.parameters()):
            parameter.grad = torch.randn_like(parameter)
            g = parameter.grad.double()
            m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.999 * v[i] + 0.001 * g**2
            unbiased_m, unbiased_v = m[i] / (1 - 0.9**step), v[i] / (1 - 0.999**step)
            before[i] = before[i] * (1 - 0.01 * 0.5) - 0.01 * unbiased_m / (unbiased_v**0.5 + 1e-8)
        optimizer.step()
    for parameter, expected in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-6)


def named_groups(model: nn.Module, recipe: Optimizer) -> dict[str, tuple[float, float]]:
    """Decay and scale of the rate by name of the parameter."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = build_optimizer(model, recipe).param_groups
    found = [(names[p], (group["weight_decay"], group["lr_scale"])) for group in groups for p in group["params"]]
    assert len(dict(found)) == len(found)
    return dict(found)


def test_everything_decays_as_published():
    model = MobileViT("xxs", num_classes=2)
    assert named_groups(model, Optimizer()) == dict.fromkeys(dict(model.named_parameters()), (0.01, 1.0))


def test_norms_and_biases_spared_and_the_backbone_slower():
    model = MobileViT("xxs", num_classes=2)
    model.classifier.requires_grad_(False)
    groups = named_groups(model, Optimizer(weight_decay=0.3, decay_all=False, backbone_lr_scale=0.1))
    assert groups.keys() == {name for name, _ in model.named_parameters() if not name.startswith("classifier.")}
    assert groups["backbone.stem.conv.weight"] == (0.3, 0.1)
    assert groups["backbone.stem.norm.weight"] == groups["backbone.stem.norm.bias"] == (0.0, 0.1)
    assert groups["backbone.stage5.1.layers.0.attention.qkv.weight"] == (0.3, 0.1)
    assert groups["backbone.stage5.1.layers.0.attention.qkv.bias"] == (0.0, 0.1)
    assert groups["backbone.stage5.1.norm.weight"] == (0.0, 0.1)
    assert groups["head.conv.weight"] == (0.3, 1.0)
    assert groups["head.norm.weight"] == (0.0, 1.0)


def test_every_group_gets_its_share_of_the_rate():
    optimizer = build_optimizer(MobileViT("xxs", num_classes=2), Optimizer(decay_all=False, backbone_lr_scale=0.1))
    set_learning_rate(optimizer, 0.5)
    set_learning_rate(optimizer, 2.0)  # not a share of the one before
    rates = {(group["lr_scale"], group["lr"]) for group in optimizer.param_groups}
    assert rates == {(1.0, 2.0), (0.1, 0.2)}
    assert len(optimizer.param_groups) == 4


STAGES = ["stem", "stage1", "stage2", "stage3", "stage4", "stage5"]


def test_stages_that_can_be_frozen():
    assert list(get_args(Freeze)) == ["nothing", *STAGES]


@pytest.mark.parametrize("up_to", get_args(Freeze))
def test_frozen_stages_stay_as_they_are(up_to: Freeze):
    model = MobileViT("xxs", num_classes=2).train()
    freeze(model, up_to)
    frozen = STAGES[: STAGES.index(up_to) + 1] if up_to != "nothing" else []
    optimizer = build_optimizer(model, Optimizer())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.rand(2, 3, 32, 32)).square().sum().backward()
        set_learning_rate(optimizer, 1e-2)
        optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if not name.startswith(tuple(f"backbone.{stage}." for stage in frozen))}
