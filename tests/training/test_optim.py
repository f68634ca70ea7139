"""The optimizer and its rate against values worked out by hand."""

import pytest
import torch
from torch import nn

from mobilevit.recipes import Optimizer
from mobilevit.training.optim import build_optimizer, learning_rate

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
    assert learning_rate(recipe, step, num_steps) == pytest.approx(rate, rel=1e-9, abs=1e-15)


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
