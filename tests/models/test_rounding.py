"""int8 rounding, compared with integer arithmetic, and networks with rounded layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mobilevit.models.fuse import fold_batch_norm
from mobilevit.models.mobilevit import ConvNorm, MobileViT
from mobilevit.models.rounding import (
    RoundedConv2d,
    RoundedLinear,
    RoundedPreActivation,
    layers_of,
    range_of,
    round_input,
    round_layers,
    round_weight,
    simulate_int8,
    twin,
)
from mobilevit.models.ssdlite import SSDLite
from small_networks import SMALL, randomize


def in_int8(weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, float, int]:
    """Integer weights (out, ...) and inputs, the scales of the weights (out,), scale and zero point of the input."""
    rows = weight.detach().double().flatten(1)
    scales = rows.abs().max(dim=1).values / 127
    integers = torch.round(rows / scales[:, None]).reshape(weight.shape)
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    scale = (high - low) / 255
    zero = round(-low / scale)
    return integers, torch.clamp(torch.round(x.double() / scale) + zero, 0, 255), scales, scale, zero


@pytest.mark.parametrize(("in_features", "out_features"), [(16, 8), (37, 5)])
def test_a_linear_layer_computes_the_product_of_integers(in_features: int, out_features: int):
    torch.manual_seed(0)
    layer, x = nn.Linear(in_features, out_features), torch.randn(9, in_features) + 0.5
    weight, integers, scales, scale, zero = in_int8(layer.weight, x)
    assert weight.abs().max() == 127
    assert {integers.min().item(), integers.max().item()} == {0, 255}
    expected = (integers - zero) @ weight.T * scale * scales + layer.bias.double()
    parent = round_layers(nn.Sequential(layer))
    assert isinstance(parent[0], RoundedLinear)
    torch.testing.assert_close(parent(x).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("groups", "size", "padding"), [(1, 8, 1), (6, 7, 2)])
def test_a_convolution_computes_the_product_of_integers(groups: int, size: int, padding: int):
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 12, 3, stride=2, padding=padding, dilation=padding, groups=groups, bias=False)
    x = torch.rand(2, 6, size, size) + 0.1  # above 0, which the padding still needs
    weight, integers, scales, scale, zero = in_int8(layer.weight, x)
    assert zero == 0
    y = nn.functional.conv2d(integers, weight, None, 2, padding, padding, groups)
    parent = round_layers(nn.Sequential(layer))
    assert isinstance(parent[0], RoundedConv2d)
    expected = y * scale * scales[:, None, None]
    torch.testing.assert_close(parent(x).double(), expected, rtol=1e-5, atol=1e-6)


def test_zeros():
    assert torch.equal(round_weight(torch.zeros(2, 3)), torch.zeros(2, 3))
    x = torch.zeros(2, 3)
    assert torch.equal(round_input(x, range_of(x)), x)


def test_gradients_ignore_the_rounding_and_stop_outside_of_the_range():
    x = torch.tensor([-2.0, -0.51, 0.0, 0.3, 0.99, 3.0], requires_grad=True)
    y = round_input(x, (torch.tensor(-1.0), torch.tensor(1.0)))
    assert y[2] == 0
    assert y[[0, 5]].tolist() == pytest.approx([-1, 1], abs=2 / 255)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 0]
    weight = torch.randn(4, 5, requires_grad=True)
    round_weight(weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == torch.ones(4, 5).tolist()


def test_rounded_weights_are_multiples_of_the_scale_and_gradients_have_their_layout():
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 16, 1).to(memory_format=torch.channels_last)
    rounded = round_weight(layer.weight)
    rows = rounded.detach().flatten(1)
    scales = layer.weight.detach().flatten(1).abs().amax(dim=1, keepdim=True) / 127
    assert torch.equal(torch.round(rows / scales) * scales, rows)
    x = torch.rand(2, 8, 4, 4).to(memory_format=torch.channels_last)
    nn.functional.conv2d(x, rounded).square().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.stride() == layer.weight.stride() == (8, 1, 8, 8)


def test_folding_batch_norm_does_not_change_the_integers():
    block = ConvNorm(5, 7, 3, activation=False)
    layer = randomize(nn.Sequential(block))
    block.norm.weight.data[2] = -30
    x = torch.randn(2, 5, 9, 9)
    with torch.no_grad():
        rounded_before_folding = round_layers(twin(layer))(x)
        rounded_after_folding = round_layers(fold_batch_norm(layer))(x)
        torch.testing.assert_close(rounded_after_folding, rounded_before_folding, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(rounded_before_folding, layer(x), rtol=1e-3, atol=1e-3)


def test_a_twin_shares_parameters_and_buffers_only():
    model = randomize(MobileViT(SMALL, num_classes=7))
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
    rounded = round_layers(twin(model)).train()
    assert not model.training
    assert all(a is b for a, b in zip(model.parameters(), rounded.parameters(), strict=True))
    assert all(a is b for a, b in zip(model.buffers(), rounded.buffers(), strict=True))
    assert all(type(layer) in (RoundedConv2d, RoundedLinear) for layer in layers_of(rounded).values())
    assert [layer.training for layer in layers_of(rounded).values()] == [True] * len(layers_of(model))
    with torch.no_grad():
        assert torch.equal(model(x), expected)  # nothing is rounded in it
        rounded.eval()
        error = (rounded(x) - expected).square().mean().sqrt() / expected.std()
    assert 0.001 < error < 0.2


def test_inputs_of_silu_are_rounded():
    model = randomize(nn.Sequential(ConvNorm(3, 4, 1), ConvNorm(4, 4, 1, activation=False)))
    inputs: list[Tensor] = []
    rounded = round_layers(twin(model)).eval()
    seen = [module for module in rounded.modules() if isinstance(module, RoundedPreActivation)]
    assert len(seen) == 1
    seen[0].register_forward_hook(lambda _, args, output: inputs.extend([args[0].clone(), output.clone()]))
    with torch.no_grad():
        rounded(torch.randn(2, 3, 50, 50))
    before, after = inputs
    assert len(before.unique()) > 1000
    assert 128 < len(after.unique()) <= 256
    step = (before.max() - before.min()) / 255
    assert (before - after).abs().max() <= 0.51 * step


def test_simulation_has_the_range_of_all_calibration_batches():
    torch.manual_seed(0)
    linear = nn.Linear(37, 5)
    layer = nn.Sequential(linear).eval()
    x = torch.randn(16, 37)
    narrow, wide = 0.1 * x, x[3:]
    simulated = simulate_int8(layer, [narrow, wide[:4], wide[4:], narrow])
    weight, _, scales, scale, zero = in_int8(linear.weight, wide)
    integers = torch.clamp(torch.round(2 * x.double() / scale) + zero, 0, 255)  # most values of 2 * x are inside
    expected = (integers - zero) @ weight.T * scale * scales + linear.bias.double()
    with torch.no_grad():
        torch.testing.assert_close(simulated(2 * x).double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(simulated(2 * x[:1]).double(), expected[:1], rtol=1e-5, atol=1e-5)
        assert torch.equal(layer(x), nn.functional.linear(x, linear.weight, linear.bias))  # not modified


def test_simulation_of_a_detector():
    model = randomize(SSDLite("xxs", 3))
    x = torch.rand(2, 3, 96, 96)
    with torch.no_grad():
        expected, actual = model(x), simulate_int8(model, [x])(x)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.shape == theirs.shape
        assert 0 < (ours - theirs).square().mean().sqrt() / theirs.std() < 0.3
