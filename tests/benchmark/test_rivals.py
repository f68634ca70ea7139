"""Models of other libraries: same function with the same weights, and not changed by our rewrites."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection.image_list import ImageList

from mobilevit.benchmark import rivals
from mobilevit.export.rewrite import Formulation, optimize_for_inference
from mobilevit.files import MissingExtraError
from mobilevit.images import Preprocessing
from mobilevit.weights import TaskName

FORMULATION = Formulation(attention="rank3", norm="linear", silu="sigmoid")


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "exportable"), [("timm", False), ("timm", True), ("transformers", False)])
def test_same_function_and_not_rewritten(name: str, exportable: bool, images: torch.Tensor):
    # transformers cannot represent this preprocessing; its model must be timed nevertheless.
    weights = replace(rivals.random_weights("xxs"), preprocessing=Preprocessing(36, 32, mean=(0.1, 0.2, 0.3)))
    ours, theirs = weights.build(), rivals.build(name, weights, exportable=exportable)
    assert not theirs.training
    with torch.inference_mode():
        expected, found = ours(images), theirs(images)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.std()))
        assert not torch.allclose(ours(images[:, [2, 1, 0]]), expected, atol=1e-2)  # channel order matters
        rewritten = optimize_for_inference(theirs, FORMULATION)
        assert rewritten(images).equal(found)
    assert [type(x) for x in rewritten.modules()] == [type(x) for x in theirs.modules()]
    assert [type(x) for x in optimize_for_inference(ours, FORMULATION).modules()] != [type(x) for x in ours.modules()]
    assert not any(isinstance(x, nn.SiLU) for x in theirs.modules())


@pytest.mark.parametrize("name", ["torchvision:mobilenet_v2", "mobilenetv2_035", "timm:efficientnet_lite0"])
def test_random_weights_preserve_the_scale(name: str, images: torch.Tensor):
    network = rivals.build(name, rivals.random_weights("xxs"))
    with torch.inference_mode():
        logits = network(images)
    assert logits.shape == (2, 1000)
    rivals.check_scale(name, logits)
    assert all(parameter.abs().max() < 100 for parameter in network.parameters())


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("detect", "torchvision:ssdlite320_mobilenet_v3_large"),
        ("segment", "torchvision:deeplabv3_mobilenet_v3_large"),
        ("segment", "lraspp_mobilenet_v3_large"),
    ],
)
def test_dense_models_of_torchvision(task: TaskName, name: str, images: torch.Tensor):
    weights = rivals.random_weights("xxs", task=task, num_classes=5)
    network = rivals.build(name, weights)
    with torch.inference_mode():
        found, expected = network(images), weights.build()(images)
    if task == "segment":
        assert found.shape == expected.shape == (2, 5, 64, 96)
        rivals.check_scale(name, found)
        return
    assert [x.shape[-1] for x in found] == [x.shape[-1] for x in expected] == [6, 4]
    for output in found:
        rivals.check_scale(name, output)
    # The outputs of torchvision's own forward pass, captured at its head.
    theirs = torchvision.models.get_model(name.partition(":")[2], weights_backbone=None, num_classes=6).eval()
    theirs.load_state_dict(network.state_dict(), strict=True)
    captured = {}
    theirs.get_submodule("head").register_forward_hook(lambda module, inputs, outputs: captured.update(outputs))
    theirs.transform = NoTransform()
    theirs(list(images))
    assert torch.equal(captured["cls_logits"], found[0])
    assert torch.equal(captured["bbox_regression"], found[1])


class NoTransform(nn.Module):
    """Replaces torchvision's preprocessing and postprocessing: no resizing, no scaling."""

    def forward(self, images: list, targets: None) -> tuple:
        return ImageList(torch.stack(images), [(64, 96)] * len(images)), targets

    def postprocess(self, found: list, *sizes: list) -> list:
        return found


def test_segmentation_of_transformers(images: torch.Tensor):
    weights = rivals.random_weights("xxs", task="segment")
    ours, theirs = weights.build(), rivals.build("transformers", weights)
    with torch.inference_mode():
        expected = ours(images)
        torch.testing.assert_close(theirs(images), expected, rtol=0, atol=1e-3 * float(expected.std()))


def test_protect_silu():
    x = torch.linspace(-3, 3, 7)
    expected = nn.functional.silu(x)
    network = rivals.protect_silu(nn.Sequential(nn.SiLU(), nn.SiLU(inplace=True), nn.ReLU()))
    assert [type(child) for child in network] == [rivals.SiLU, rivals.SiLU, nn.ReLU]
    before = x.clone()
    assert network[0](x).equal(expected)
    assert x.equal(before)
    assert network[1](x).equal(expected)
    assert x.equal(expected)


@pytest.mark.parametrize("logits", [[1.0, 1.0], [1.0, float("nan")], [1.0, float("inf")], [1e-30, 1e-38]])
def test_check_scale(logits: list[float]):
    with pytest.raises(ValueError, match=r"fades: .*random weights"):
        rivals.check_scale("fades", torch.tensor(logits))


def test_random_weights_depend_on_the_seed_alone():
    first, second, other = (rivals.random_weights("xxs", seed) for seed in (0, 0, 1))
    for key, tensor in first.tensors.items():
        if not key.endswith("num_batches_tracked"):
            assert tensor.equal(second.tensors[key])
            assert not tensor.equal(other.tensors[key])
            assert float(np.abs(tensor.numpy()).max()) > 0


@pytest.mark.parametrize(
    ("task", "name", "message"),
    [
        ("classify", "resnet5000", "'resnet5000'.*torchvision:NAME"),
        ("classify", "timm:resnet5000", r"'resnet5000'; did you mean .*resnet50.*timm.list_models"),
        ("classify", "torchvision:resnet5000", "torchvision .*'resnet5000'"),
        ("classify", "transformers:vit", "'transformers'.*transformers:vit"),
        ("classify", "keras:vit", "'keras:vit'"),
        ("detect", "timm", "timm .*'detect'.*torchvision:NAME"),
        ("detect", "transformers", "transformers .*'detect'"),
        ("detect", "torchvision:mobilenet_v2", r"'mobilenet_v2'; .*torchvision.models.detection"),
        ("detect", "torchvision:fcos_resnet50_fpn", "fcos_resnet50_fpn .*SSD"),
        ("detect", "mobilenet_v2", "'mobilenet_v2'"),
    ],
)
def test_unknown_names(task: TaskName, name: str, message: str):
    with pytest.raises(ValueError, match=message):
        rivals.build(name, rivals.random_weights("xxs", task=task, num_classes=5))


def test_missing_library(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtraError, match=r"timm.*mobilevit\[compare\]"):
        rivals.build("timm", rivals.random_weights("xxs"))
