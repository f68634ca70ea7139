"""The comparison of a device with the CPU. A copy of the network on the CPU, with a fault, plays a wrong device."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from command_line import here, refused, run, weights_folder  # noqa: F401 - fixtures
from mobilevit import self_check
from mobilevit.models.deeplabv3 import DeepLabV3
from mobilevit.models.mobilevit import MobileViT
from mobilevit.models.ssdlite import SSDLite
from mobilevit.predict import load
from mobilevit.recipes import RECIPES, Optimizer
from mobilevit.self_check import DeviceError, Precision, check_device
from mobilevit.training import setup
from mobilevit.training.distributed import Processes
from mobilevit.training.optim import build_optimizer
from small_networks import SMALL, randomize

Fault = Callable[[nn.Module], None]
BUILD_OPTIMIZER = partial(build_optimizer, recipe=Optimizer())


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> Callable[[Fault], None]:
    """Makes the copy for the device undergo a fault, and the CPU count as another device."""

    def set_fault(fault: Fault) -> None:
        def copy_to(_: torch.device, model: nn.Module) -> nn.Module:
            model = copy.deepcopy(model)
            fault(model)
            return model

        monkeypatch.setattr(self_check, "_is_reference", lambda device: False)
        monkeypatch.setattr(self_check, "_copy_to", copy_to)

    return set_fault


def convolutions(model: nn.Module) -> list[nn.Conv2d]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d) and module.groups == 1]


def no_fault(model: nn.Module) -> None:
    pass


def ignores_strides(model: nn.Module) -> None:
    """One 3x3 convolution reads its channels-last weights in the order of the memory."""
    weight = next(conv.weight for conv in convolutions(model)[1:] if conv.kernel_size == (3, 3))
    weight.data = weight.data.permute(0, 2, 3, 1).contiguous().view(weight.shape)


def not_a_number(model: nn.Module) -> None:
    convolutions(model)[-1].weight.data.fill_(torch.nan)


def no_gradient(model: nn.Module) -> None:
    """The gradients of all 3x3 convolutions are zero."""
    for conv in convolutions(model):
        if conv.kernel_size == (3, 3):
            conv.weight.register_hook(torch.zeros_like)


def wrong_update(model: nn.Module) -> None:
    """The optimizer does not write to channels-last weights."""
    model.register_buffer("skips_channels_last", torch.tensor(True))


def optimizer_of_device(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = BUILD_OPTIMIZER(model)
    if hasattr(model, "skips_channels_last"):
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p.is_contiguous()]
    return optimizer


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", [MobileViT, SSDLite, DeepLabV3])
def test_rounding_is_no_fault(wrong: Callable[[Fault], None], kind: Callable[..., nn.Module], precision: Precision):
    wrong(no_fault)
    model = randomize(kind("xxs", num_classes=3))
    if (kind, precision) != (SSDLite, "bfloat16"):  # oneDNN's gradient can be wrong, see `models/ssdlite.py`
        check_device(model, 64, precision, BUILD_OPTIMIZER)
    check_device(model, 49, precision)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("fault", "quantity"),
    [
        (ignores_strides, "outputs"),
        (not_a_number, "outputs"),
        (no_gradient, "gradients"),
        (wrong_update, "weight update"),
    ],
)
def test_faults(wrong: Callable[[Fault], None], fault: Fault, quantity: str, precision: Precision):
    wrong(fault)
    with pytest.raises(DeviceError, match=rf"device 'cpu' .*{precision}, 4 images of 64 px.*--no-self-check") as error:
        check_device(randomize(MobileViT(SMALL, num_classes=3)), 64, precision, optimizer_of_device)
    figures = {
        name: (float(value), float(limit))
        for name, value, limit in re.findall(r"([a-z ]+) ([\d.e-]+|nan) \(limit ([\d.e-]+)\)", str(error.value))
    }
    exceeded = {name.removeprefix(" of ").strip() for name, (value, limit) in figures.items() if not value <= limit}
    assert quantity in {name.split("of ")[-1] for name in exceeded}
    assert ("outputs" in str(exceeded)) == (quantity == "outputs")


def test_a_check_changes_nothing(wrong: Callable[[Fault], None]):
    wrong(no_fault)
    model = MobileViT(SMALL, num_classes=3).train()
    before = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    check_device(model, 32, "float32", BUILD_OPTIMIZER)
    assert model.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_weights_that_are_not_finite(wrong: Callable[[Fault], None]):
    wrong(ignores_strides)
    model = randomize(MobileViT(SMALL, num_classes=3))
    convolutions(model)[0].weight.data.fill_(torch.nan)
    check_device(model, 32)  # the commands report such weights


def test_the_cpu_is_not_checked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(self_check, "_copy_to", None)
    check_device(MobileViT(SMALL), 32)


COMMANDS = {
    "predict": "predict classifier.safetensors photos/a.png",
    "evaluate": "evaluate xyz.safetensors --data classes --num-workers 0",
    "train": "train tiny --data classes --epochs 1 --batch-size 4 --out run",
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_commands(
    capsys: pytest.CaptureFixture[str],
    here: Path,  # noqa: F811
    wrong: Callable[[Fault], None],
    command: str,
):
    wrong(ignores_strides)
    message = refused(capsys, command)
    assert all(fact in message for fact in ("device 'cpu'", "outputs", "limit", "--device", "--no-self-check")), message
    assert not (here / "run").exists()
    assert run(f"{command} --no-self-check") == 0


def test_load(here: Path, wrong: Callable[[Fault], None]):  # noqa: F811
    wrong(ignores_strides)
    with pytest.raises(DeviceError):
        load("classifier.safetensors")
    load("classifier.safetensors", self_check=False)


def test_all_processes_stop(monkeypatch: pytest.MonkeyPatch):
    """A process whose device is correct also raises the error of another process."""

    class Two(Processes):
        def gather(self, value: Any) -> list[Any]:
            return [value, "device 'cuda:1' computes other results"]

    recipe = replace(RECIPES["tiny"], architecture="xxs")
    with pytest.raises(DeviceError, match="cuda:1"):
        setup._check_device(MobileViT(SMALL), recipe, Two(0, 2, torch.device("cpu")))
