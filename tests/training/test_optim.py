"""Optimizer, schedule, EMA and batch norm statistics, compared with values calculated by hand and with float64."""

import math
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from mobilevit.models.mobilevit import MobileViT
from mobilevit.recipes import RECIPES, Cosine, Freeze, Optimizer
from mobilevit.training.distributed import Processes
from mobilevit.training.optim import (
    EMA,
    BatchNormStatistics,
    build_optimizer,
    freeze,
    learning_rate_at,
    set_learning_rate,
)

SHORT = Optimizer(start_lr=2e-4, lr=2e-3, end_lr=2e-4, warmup_steps=3000)  # 3,000 is more than a tenth: 10 of 101
LONG = Optimizer(start_lr=0.0, lr=1.0, end_lr=0.5, warmup_steps=100)


@pytest.mark.parametrize(
    ("recipe", "num_steps", "step", "learning_rate"),
    [
        (SHORT, 101, 0, 2e-4),
        (SHORT, 101, 5, 1.1e-3),
        (SHORT, 101, 9, 1.82e-3),
        (SHORT, 101, 10, 2e-3),
        (SHORT, 101, 40, 1.55e-3),  # a third of the cosine: 3/4 of the range remains
        (SHORT, 101, 55, 1.1e-3),  # half
        (SHORT, 101, 100, 2e-4),
        (LONG, 10_001, 0, 0.0),
        (LONG, 10_001, 25, 0.25),
        (LONG, 10_001, 100, 1.0),
        (LONG, 10_001, 100 + 9900 // 3, 0.875),
        (LONG, 10_001, 100 + 9900 // 2, 0.75),
        (LONG, 10_001, 10_000, 0.5),
        # No warm-up: 10% of the steps is less than one.
        (SHORT, 1, 0, 2e-3),
        (SHORT, 2, 0, 2e-3),
        (SHORT, 2, 1, 2e-4),
        (SHORT, 9, 0, 2e-3),
        (SHORT, 9, 4, 1.1e-3),
        (SHORT, 9, 8, 2e-4),
        # One step of warm-up.
        (SHORT, 10, 0, 2e-4),
        (SHORT, 10, 1, 2e-3),
        (SHORT, 10, 9, 2e-4),
    ],
)
def test_learning_rate_per_step(recipe: Optimizer, num_steps: int, step: int, learning_rate: float):
    # The epoch has no effect.
    for epoch in (0, 7):
        found = learning_rate_at(recipe, step, num_steps, epoch=epoch, num_epochs=8)
        assert found == pytest.approx(learning_rate, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize(
    ("step", "epoch", "learning_rate"),
    [
        (0, 0, 2e-4),
        (1500, 1, 1.1e-3),  # warm-up per step
        (3000, 3, 2e-4 + 1.8e-3 * (1 + math.cos(math.pi * 0.01)) / 2),  # the cosine includes the warm-up
        (3999, 3, 2e-4 + 1.8e-3 * (1 + math.cos(math.pi * 0.01)) / 2),  # constant within an epoch
        (100_000, 100, 1.55e-3),
        (150_000, 150, 1.1e-3),
        (299_999, 299, 2e-4 + 1.8e-3 * (1 - math.cos(math.pi / 300)) / 2),  # does not reach end_lr
    ],
)
def test_learning_rate_per_epoch_of_the_released_code(step: int, epoch: int, learning_rate: float):
    recipe = RECIPES["v0.1-s"].optimizer
    assert learning_rate_at(recipe, step, 300_000, epoch=epoch, num_epochs=300) == pytest.approx(
        learning_rate, rel=1e-12
    )


@pytest.mark.parametrize("cosine", ["step", "epoch"])
def test_learning_rate_after_the_schedule(cosine: Cosine):
    recipe = Optimizer(start_lr=1e-4, lr=1e-3, end_lr=3e-5, warmup_steps=50, cosine=cosine)
    for step, epoch in ((100, 10), (101, 10), (500, 49)):
        assert learning_rate_at(recipe, step, 100, epoch=epoch, num_epochs=10) == 3e-5
    assert learning_rate_at(recipe, 99, 100, epoch=9, num_epochs=10) == pytest.approx(
        3e-5 if cosine == "step" else 5.4e-5, rel=0.01
    )


def test_adamw_steps_calculated_by_hand():
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
    """Weight decay and learning rate scale by parameter name."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = build_optimizer(model, recipe).param_groups
    found = [(names[p], (group["weight_decay"], group["lr_scale"])) for group in groups for p in group["params"]]
    assert len(dict(found)) == len(found)
    return dict(found)


def test_all_parameters_decay_by_default():
    model = MobileViT("xxs", num_classes=2)
    assert named_groups(model, Optimizer()) == dict.fromkeys(dict(model.named_parameters()), (0.01, 1.0))


def test_no_decay_of_norms_and_biases_and_a_slower_backbone():
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


def test_learning_rate_scale_of_the_groups():
    optimizer = build_optimizer(MobileViT("xxs", num_classes=2), Optimizer(decay_all=False, backbone_lr_scale=0.1))
    set_learning_rate(optimizer, 0.5)
    set_learning_rate(optimizer, 2.0)  # not scaled by the previous one
    rates = {(group["lr_scale"], group["lr"]) for group in optimizer.param_groups}
    assert rates == {(1.0, 2.0), (0.1, 0.2)}
    assert len(optimizer.param_groups) == 4


STAGES = ["stem", "stage1", "stage2", "stage3", "stage4", "stage5"]


@pytest.mark.parametrize("up_to", get_args(Freeze))
def test_frozen_stages_do_not_change(up_to: Freeze):
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


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2))


@pytest.mark.parametrize(
    ("decay", "num_steps", "used"),
    [
        (0.9995, 1_000_000, 0.9995),
        (0.9995, 200_000, 0.9995),
        (0.9995, 1000, 0.9),  # limited to 1/100 of the steps
        (0.5, 1000, 0.5),
        (0.9995, 100, 0.0),  # no averaging
        (0.9995, 1, 0.0),
        (0.0, 1_000_000, 0.0),
    ],
)
def test_ema_matches_float64(decay: float, num_steps: int, used: float):
    model = small_network().train()
    average = EMA(model, decay, num_steps)
    expected = {name: x.double() for name, x in model.state_dict().items()}
    for _ in range(20):
        model(torch.randn(4, 3, 8, 8))  # changes the running statistics
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update(model)
        for name, x in model.state_dict().items():
            expected[name] = used * expected[name] + (1 - used) * x.double()
    expected["1.num_batches_tracked"] = torch.tensor(20)
    actual = average.model.state_dict()
    assert {name: x.dtype for name, x in actual.items()} == {name: x.dtype for name, x in model.state_dict().items()}
    for name, x in actual.items():
        torch.testing.assert_close(x.double(), expected[name].double(), rtol=1e-5, atol=1e-5, msg=name)
    if not used:
        assert all(torch.equal(x, model.state_dict()[name]) for name, x in actual.items())


def test_ema_is_in_eval_mode_and_does_not_change_the_model():
    model = small_network().train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    average = EMA(model, 0.9, 10_000)
    assert not any(module.training for module in average.model.modules())
    assert not any(parameter.requires_grad for parameter in average.model.parameters())
    with torch.no_grad():
        for x in average.model.state_dict().values():
            x.zero_()
    average.update(model)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


ONE_PROCESS = Processes(0, 1, torch.device("cpu"))


def norms_only() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.SiLU(), nn.BatchNorm2d(4), nn.BatchNorm2d(4)).train()


def inputs_of_norms(model: nn.Module, pixels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Mean and unbiased variance of the input of each batch norm, in float64."""
    moments: list[tuple[Tensor, Tensor]] = []

    def record(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().double().movedim(1, 0).flatten(1)
        moments.append((x.mean(1), x.var(1)))

    handles = [m.register_forward_pre_hook(record) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    model(pixels)
    for handle in handles:
        handle.remove()
    return moments


@pytest.mark.parametrize("lengths", [[6], [4, 3], [2, 3, 2, 5]])
def test_running_statistics_move_by_a_tenth_of_the_mean_over_the_micro_batches(lengths: list[int]):
    model = norms_only()
    norms = [module for module in model if isinstance(module, nn.BatchNorm2d)]
    running = [(torch.zeros(4).double(), torch.ones(4).double()) for _ in norms]
    statistics = BatchNormStatistics(model)
    for _ in range(3):
        parts = []
        for length in lengths:
            parts.append(inputs_of_norms(model, 2 * torch.randn(length, 3, 5, 3) + 1))
            statistics.add_micro_batch()
        statistics.update(len(lengths), ONE_PROCESS)
        for i, norm in enumerate(norms):
            mean, var = (sum(part[i][which] for part in parts) / len(parts) for which in (0, 1))
            running[i] = (0.9 * running[i][0] + 0.1 * mean, 0.9 * running[i][1] + 0.1 * var)
            assert norm.running_mean is not None
            assert norm.running_var is not None
            torch.testing.assert_close(norm.running_mean.double(), running[i][0], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(norm.running_var.double(), running[i][1], rtol=1e-5, atol=1e-6)


def test_one_micro_batch_per_step_matches_pytorch():
    ours, theirs = norms_only(), norms_only()
    statistics = BatchNormStatistics(ours)
    for _ in range(4):
        pixels = torch.randn(5, 3, 4, 4)
        torch.testing.assert_close(ours(pixels), theirs(pixels), rtol=0, atol=0)
        statistics.add_micro_batch()
        statistics.update(1, ONE_PROCESS)
    for name, x in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], x, rtol=1e-5, atol=1e-6, msg=name)


def test_running_statistics_of_frozen_layers_do_not_change():
    model = norms_only()
    frozen = model[1].eval()
    assert isinstance(frozen, nn.BatchNorm2d)
    statistics = BatchNormStatistics(model)
    model(torch.randn(4, 3, 4, 4))
    statistics.add_micro_batch()
    statistics.update(1, ONE_PROCESS)
    assert frozen.running_mean is not None
    assert torch.equal(frozen.running_mean, torch.zeros(4))
    assert frozen.momentum == 0.1
    nothing = BatchNormStatistics(nn.Linear(2, 2))
    nothing.add_micro_batch()
    nothing.update(1, ONE_PROCESS)


def test_running_statistics_start_from_the_loaded_state():
    model = norms_only()
    with torch.no_grad():
        for name, x in model.state_dict().items():
            if "running" in name:
                x.fill_(3.0)
    statistics = BatchNormStatistics(model)
    mean = inputs_of_norms(model, torch.randn(4, 3, 4, 4))[0][0]
    statistics.add_micro_batch()
    statistics.update(1, ONE_PROCESS)
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    torch.testing.assert_close(norm.running_mean.double(), 0.9 * 3 + 0.1 * mean, rtol=1e-5, atol=1e-6)
