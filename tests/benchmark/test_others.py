"""The networks of other libraries: the same function with the same weights, and untouched by what makes ours fast."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from mobilevit.benchmark import others
from mobilevit.export.rewrite import Formulation, fast
from mobilevit.pictures import Preprocessing

FORMULATION = Formulation(attention="rank3", norm="linear", silu="sigmoid")


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "exportable"), [("timm", False), ("timm", True), ("transformers", False)])
def test_the_same_function_and_not_rewritten(name: str, exportable: bool, pictures: torch.Tensor):
    # A preprocessing that transformers cannot express must not keep its network from being timed.
    weights = replace(others.random_weights("xxs"), preprocessing=Preprocessing(36, 32, mean=(0.1, 0.2, 0.3)))
    ours, theirs = weights.build(), others.build(name, weights, exportable=exportable)
    assert not theirs.training
    with torch.inference_mode():
        expected, found = ours(pictures), theirs(pictures)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.std()))
        assert not torch.allclose(ours(pictures[:, [2, 1, 0]]), expected, atol=1e-2)  # channel order matters
        rewritten = fast(theirs, FORMULATION)
        assert rewritten(pictures).equal(found)
    assert [type(x) for x in rewritten.modules()] == [type(x) for x in theirs.modules()]
    assert [type(x) for x in fast(ours, FORMULATION).modules()] != [type(x) for x in ours.modules()]
    assert not any(isinstance(x, nn.SiLU) for x in theirs.modules())


@pytest.mark.parametrize("name", ["torchvision:mobilenet_v2", "mobilenetv2_035", "timm:efficientnet_lite0"])
def test_another_network_keeps_its_scale(name: str, pictures: torch.Tensor):
    network = others.build(name, others.random_weights("xxs"))
    with torch.inference_mode():
        logits = network(pictures)
    assert logits.shape == (2, 1000)
    others.check_scale(name, logits)
    assert all(parameter.abs().max() < 100 for parameter in network.parameters())


def test_keep_silu_keeps_what_it_does():
    x = torch.linspace(-3, 3, 7)
    expected = nn.functional.silu(x)
    network = others.keep_silu(nn.Sequential(nn.SiLU(), nn.SiLU(inplace=True), nn.ReLU()))
    assert [type(child) for child in network] == [others.SiLU, others.SiLU, nn.ReLU]
    before = x.clone()
    assert network[0](x).equal(expected)
    assert x.equal(before)
    assert network[1](x).equal(expected)
    assert x.equal(expected)


@pytest.mark.parametrize("logits", [[1.0, 1.0], [1.0, float("nan")], [1.0, float("inf")], [1e-30, 1e-38]])
def test_check_scale(logits: list[float]):
    with pytest.raises(ValueError, match="fades: with random weights"):
        others.check_scale("fades", torch.tensor(logits))


def test_random_weights_are_always_the_same():
    first, second, other = (others.random_weights("xxs", seed) for seed in (0, 0, 1))
    for key, tensor in first.tensors.items():
        if not key.endswith("num_batches_tracked"):
            assert tensor.equal(second.tensors[key])
            assert not tensor.equal(other.tensors[key])
            assert float(np.abs(tensor.numpy()).max()) > 0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet5000", "there is no network 'resnet5000' to compare with"),
        ("timm:resnet5000", r"timm has no network 'resnet5000'; timm.list_models\(\) lists"),
        ("torchvision:resnet5000", "torchvision has no network 'resnet5000'"),
        ("transformers:vit", "say transformers instead"),
        ("keras:vit", "there is no network 'keras:vit'"),
    ],
)
def test_names_that_are_none(name: str, said: str):
    with pytest.raises(ValueError, match=said):
        others.build(name, others.random_weights("xxs"))


def test_library_that_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ValueError, match=r"timm is not installed.*pip install 'mobilevit\[compare\]'"):
        others.build("timm", others.random_weights("xxs"))
