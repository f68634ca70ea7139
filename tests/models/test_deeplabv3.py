"""The segmentation network. test_parity.py compares its outputs with those of Apple's network and of transformers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilevit.models.deeplabv3 import LATER_HEAD, PAPER_HEAD, DeepLabHead, DeepLabV3
from mobilevit.models.mobilevit import ARCHITECTURES
from small_networks import randomize

SMALL = DeepLabHead(channels=24, rates=(2, 3, 5), auxiliary_channels=16, align_corners=True)


@pytest.mark.parametrize(
    ("name", "count", "published"), [("xxs", 1_854_853, 1.9), ("xs", 2_944_069, 2.9), ("s", 6_357_941, 6.4)]
)
def test_parameters_as_published(name: str, count: int, published: float) -> None:
    found = sum(p.numel() for p in DeepLabV3(name).parameters())
    assert found == count
    assert round(found / 1e6, 1) == published


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("size", [(64, 64), (97, 131), (65, 200)])
def test_sizes(output_stride: int, size: tuple[int, int]) -> None:
    model = randomize(DeepLabV3("xxs", 4, output_stride))
    x = torch.rand(1, 3, *size)
    with torch.no_grad():
        assert model(x).shape == (1, 4, *size)
        assert model.coarse(x).shape == (1, 4, -(-size[0] // output_stride), -(-size[1] // output_stride))


def by_definition(model: DeepLabV3, maps: dict[str, Tensor], size: tuple[int, int]) -> list[Tensor]:
    """Logits and auxiliary logits from the backbone's maps, computed in float64 from the state dict."""
    state = {key: tensor.double() for key, tensor in model.state_dict().items()}
    head = model.head

    def conv_norm_relu(x: Tensor, name: str, dilation: int = 1) -> Tensor:
        weight = state[f"{name}.conv.weight"]
        x = F.conv2d(x, weight, padding=dilation * (weight.shape[-1] // 2), dilation=dilation)
        mean, var, scale, bias = (
            state[f"{name}.norm.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return ((x - mean) / (var + 1e-5).sqrt() * scale + bias).clamp(min=0)

    def classify(x: Tensor, name: str) -> Tensor:
        x = torch.einsum("kc,bchw->bkhw", state[f"{name}.weight"][:, :, 0, 0], x)
        x = x + state[f"{name}.bias"][:, None, None]
        return F.interpolate(x, size, mode="bilinear", align_corners=head.align_corners)

    x = maps["stage5"].double()
    seen = [conv_norm_relu(x, f"pyramid.convs.{i}", rate) for i, rate in enumerate((1, *head.rates))]
    whole = conv_norm_relu(x.mean((2, 3), keepdim=True), "pyramid.pooled")
    x = conv_norm_relu(torch.cat([*seen, whole.expand_as(seen[0])], dim=1), "pyramid.project")
    logits = [classify(x, "classifier")]
    if head.auxiliary_channels:
        logits.append(classify(conv_norm_relu(maps["stage4"].double(), "auxiliary.project"), "auxiliary.classifier"))
    return logits


def in_training_mode(model: DeepLabV3, x: Tensor) -> tuple[Tensor, ...]:
    """The outputs in training mode, with all layers in evaluation mode."""
    model.training = True  # of the network alone, not of its layers
    outputs = model(x)
    model.training = False
    return outputs if isinstance(outputs, tuple) else (outputs,)


@pytest.mark.parametrize("head", [SMALL, replace(SMALL, align_corners=False), PAPER_HEAD])
@pytest.mark.parametrize("size", [(96, 128), (97, 131)])
def test_by_definition(head: DeepLabHead, size: tuple[int, int]) -> None:
    model = randomize(DeepLabV3("xxs", 3, 8, head))
    x = torch.rand(2, 3, *size)
    with torch.no_grad():
        expected = by_definition(model, model.backbone(x), size)
        found = in_training_mode(model, x)
        assert torch.equal(found[0], model(x))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=2e-5 * theirs.std().item())


def test_later_release() -> None:
    model = DeepLabV3("s", 21, 8, LATER_HEAD)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert shapes["auxiliary.project.conv.weight"] == (128, 128, 3, 3)
    assert shapes["auxiliary.classifier.weight"] == (21, 128, 1, 1)
    assert shapes["pyramid.project.conv.weight"] == (512, 5 * 512, 1, 1)
    dilations = [m.dilation for m in model.pyramid.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert dilations == [(12, 12), (24, 24), (36, 36)]


def test_without_auxiliary_head() -> None:
    model = DeepLabV3("xxs", head=replace(SMALL, auxiliary_channels=0))
    assert not any(key.startswith("auxiliary") for key in model.state_dict())
    assert model.train()(torch.rand(2, 3, 64, 64)).shape == (2, 21, 64, 64)


def test_other_classes() -> None:
    model = DeepLabV3("xxs", 21, 16, SMALL).half()
    model.reset_classes(3)
    assert model.num_classes == 3
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float16}
    model.float().eval()
    main, auxiliary = in_training_mode(model, torch.rand(1, 3, 64, 64))
    assert main.shape == auxiliary.shape == (1, 3, 64, 64)
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=f"num_classes is {wrong}"):
            model.reset_classes(wrong)
        with pytest.raises(ValueError, match=f"num_classes is {wrong}"):
            DeepLabV3("xxs", wrong)


@pytest.mark.parametrize(
    ("wrong", "part"),
    [({"rates": (1, 2)}, "rates"), ({"rates": (0, 2, 3)}, "rates"), ({"channels": 0}, "channels is 0")],
)
def test_invalid_heads(wrong: dict[str, object], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        replace(PAPER_HEAD, **wrong)
    with pytest.raises(ValueError, match="output_stride is 4"):
        DeepLabV3("xxs", output_stride=4)


def test_initial_values() -> None:
    model = DeepLabV3("xxs", head=LATER_HEAD)
    on_top = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m not in set(model.backbone.modules())]
    assert len(on_top) == 6 + 1 + 2
    for conv in on_top:
        fan_out = conv.weight[:, 0].numel()  # Kaiming normal
        assert abs(conv.weight.std() / (2 / fan_out) ** 0.5 - 1) < 0.1
        assert conv.bias is None or not conv.bias.any()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_parameter_has_a_gradient(name: str) -> None:
    model = DeepLabV3(name, 2, 8, SMALL).train()
    main, auxiliary = model(torch.rand(2, 3, 64, 96))
    weights = torch.rand(2, 2, 64, 96)
    ((main + auxiliary) * weights).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("output_stride", [8, 16])
def test_channels_last(output_stride: int) -> None:
    model = randomize(DeepLabV3("xxs", 4, output_stride, SMALL))
    layouts = []

    def watch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        layouts.append(inputs[0].is_contiguous(memory_format=torch.channels_last))

    hooks = [m.register_forward_pre_hook(watch) for m in model.modules() if isinstance(m, nn.Conv2d)]
    x = torch.rand(2, 3, 97, 131)
    with torch.no_grad():
        expected = in_training_mode(model, x)
        layouts.clear()
        found = in_training_mode(model, x.to(memory_format=torch.channels_last))
    for hook in hooks:
        hook.remove()
    assert all(layouts)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("size", [(96, 64), (97, 131)])
def test_export(size: tuple[int, int]) -> None:
    model = randomize(DeepLabV3("xxs", 4, head=SMALL))
    x = torch.rand(1, 3, *size)
    program = torch.export.export(model, (x,)).module()
    with torch.no_grad():
        torch.testing.assert_close(program(x), model(x))
