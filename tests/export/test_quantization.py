"""The cost of int8, part by part, against roundings made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from conftest import SMALL, randomise
from mobilevit.benchmark import rivals
from mobilevit.export import sensitivity
from mobilevit.export.artifact import Deployed
from mobilevit.export.quantization import EVERYTHING, Cost, costs_of_int8, part_of
from mobilevit.export.verify import synthetic_images
from mobilevit.images import Preprocessing
from mobilevit.models.mobilevit import MobileViT
from mobilevit.weights import TaskName, Weights


@pytest.fixture(scope="module")
def model() -> MobileViT:
    return randomise(MobileViT(SMALL, num_classes=7))


@pytest.fixture(scope="module")
def costs(model: MobileViT) -> dict[str, Cost]:
    weights = Weights(model.architecture, model.state_dict(), Preprocessing(70, 64))
    return {cost.part: cost for cost in sensitivity(weights, synthetic_images(12, (64, 64)))}


def test_every_layer_is_in_one_part(costs: dict[str, Cost], model: MobileViT):
    everything = costs[EVERYTHING]
    parts = [cost for part, cost in costs.items() if part != EVERYTHING]
    assert sum(cost.num_layers for cost in parts) == everything.num_layers
    assert sum(cost.num_weights for cost in parts) == everything.num_weights
    expected = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    assert everything.num_weights == expected
    assert {"stem", "stage1 convolutions", "stage2 attention", "stage2 ffn", "head", "classifier"} <= set(costs)
    assert all(0 < cost.error < 1 for cost in costs.values())


def test_everything_costs_more_than_its_parts(costs: dict[str, Cost]):
    assert costs[EVERYTHING].error > max(cost.error for part, cost in costs.items() if part != EVERYTHING)


def test_the_classifier_by_hand(model: MobileViT, costs: dict[str, Cost]):
    images = [torch.from_numpy(p).permute(2, 0, 1)[None] / 255 for p in synthetic_images(12, (64, 64))]
    deployed = Deployed(model, Preprocessing(70, 64), uint8=False).eval()
    [cost] = [cost for cost in costs_of_int8(deployed, images) if cost.part == "classifier"]
    seen = []
    hook = model.classifier.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        expected = torch.cat([model(image) for image in images])
    hook.remove()
    x, weight = torch.cat(seen).double(), model.classifier.weight.detach().double()  # pyright: ignore
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    step = (high - low) / 255
    x8 = torch.round(x / step) * step
    steps = weight.abs().amax(dim=1, keepdim=True) / 127
    found = x8 @ (torch.round(weight / steps) * steps).T + model.classifier.bias.detach()  # pyright: ignore
    by_hand = (found - expected).square().mean().sqrt() / expected.std()
    assert cost.error == pytest.approx(by_hand.item(), rel=0.2)  # zero falls between two steps there, here on one


def test_the_network_is_left_as_it_was(model: MobileViT):
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    costs_of_int8(model, [torch.rand(1, 3, 64, 64) for _ in range(2)])
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_an_outlier_is_found():
    model = randomise(MobileViT(SMALL, num_classes=7))
    inputs = [torch.rand(1, 3, 64, 64) for _ in range(4)]
    before = {cost.part: cost.error for cost in costs_of_int8(model, inputs)}
    # One channel of the head a thousand times the others, which the classifier does not look at.
    model.head.norm.weight.data[0] *= 1000
    model.head.norm.bias.data[0] = 1000
    model.classifier.weight.data[:, 0] = 0  # pyright: ignore[reportIndexIssue]
    after = {cost.part: cost.error for cost in costs_of_int8(model, inputs)}
    assert after["classifier"] > 10 * before["classifier"]


def test_parts_by_name():
    assert part_of("network.backbone.stage3.1.layers.0.attention.q") == "stage3 attention"
    assert part_of("network.backbone.stage3.1.layers.0.ffn_in") == "stage3 ffn"
    assert part_of("backbone.stage5.0.expand.0") == "stage5 convolutions"
    assert part_of("classifier") == "classifier"
    assert part_of("network.heads.3.locations") == "heads"
    assert part_of("network.extra_layers.0.pointwise") == "extra layers"
    assert part_of("network.pyramid.project_pooled") == "pyramid"
    with pytest.raises(AssertionError, match="is in no part"):
        part_of("somewhere.else")


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_dense_networks(task: TaskName):
    weights = replace(rivals.random_weights("xxs", task=task, num_classes=5), preprocessing=Preprocessing((64, 64), 64))
    costs = {cost.part: cost for cost in sensitivity(weights, synthetic_images(2, (64, 64)))}
    heads = {"detect": {"heads", "extra layers", "pooled"}, "segment": {"pyramid", "classifier"}}[task]
    assert heads <= set(costs)
    everything = costs.pop(EVERYTHING)
    assert sum(cost.num_layers for cost in costs.values()) == everything.num_layers
    assert 0 < max(cost.error for cost in costs.values()) < everything.error * 1.5
    assert all(0 < cost.same <= 1 for cost in costs.values())


def test_images_are_asked_for(model: MobileViT):
    with pytest.raises(ValueError, match="measured on real images"):
        sensitivity(Weights(model.architecture, model.state_dict()), [])
