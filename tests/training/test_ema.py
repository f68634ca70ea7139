"""The moving average against its formula in float64."""

import pytest
import torch
from torch import nn

from mobilevit.training.ema import MovingAverage


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2))


@pytest.mark.parametrize(
    ("decay", "num_steps", "used"),
    [
        (0.9995, 1_000_000, 0.9995),
        (0.9995, 200_000, 0.9995),
        (0.9995, 1000, 0.9),  # short runs: over a hundredth of the steps
        (0.5, 1000, 0.5),
        (0.9995, 100, 0.0),  # shorter: the network itself
        (0.9995, 1, 0.0),
        (0.0, 1_000_000, 0.0),
    ],
)
def test_average_in_float64(decay: float, num_steps: int, used: float):
    model = network().train()
    average = MovingAverage(model, decay, num_steps)
    expected = {name: x.double() for name, x in model.state_dict().items()}
    for _ in range(20):
        model(torch.randn(4, 3, 8, 8))  # moves the statistics of batch norm
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


def test_the_average_is_ready_to_evaluate_and_leaves_the_network_alone():
    model = network().train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    average = MovingAverage(model, 0.9, 10_000)
    assert not any(module.training for module in average.model.modules())
    assert not any(parameter.requires_grad for parameter in average.model.parameters())
    with torch.no_grad():
        for x in average.model.state_dict().values():
            x.zero_()
    average.update(model)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
