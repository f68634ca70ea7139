"""int8 sensitivity of groups of layers, compared with explicit rounding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from mobilevit.export import sensitivity
from mobilevit.export.artifact import ExportModel
from mobilevit.export.quantization import ALL_LAYERS, Sensitivity, group_of, int8_sensitivity
from mobilevit.export.verify import synthetic_images
from mobilevit.images import Preprocessing
from mobilevit.models.mobilevit import MobileViT
from mobilevit.weights import Weights
from small_networks import SMALL, randomize

PREPROCESSING = Preprocessing(70, 64)


@pytest.fixture(scope="module")
def model() -> MobileViT:
    return randomize(MobileViT(SMALL, num_classes=7))


@pytest.fixture(scope="module")
def groups(model: MobileViT) -> dict[str, Sensitivity]:
    weights = Weights(model.architecture, model.state_dict(), PREPROCESSING)
    return {one.group: one for one in sensitivity(weights, synthetic_images(12, (64, 64)))}


def test_groups_partition_the_layers(groups: dict[str, Sensitivity], model: MobileViT):
    all_layers = groups[ALL_LAYERS]
    others = [one for name, one in groups.items() if name != ALL_LAYERS]
    assert sum(one.num_layers for one in others) == all_layers.num_layers
    assert sum(one.num_weights for one in others) == all_layers.num_weights
    expected = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    assert all_layers.num_weights == expected
    assert {"stem", "stage1 convolutions", "stage2 attention", "stage2 ffn", "head", "classifier"} <= set(groups)
    assert all(0 < one.rms_error < 1 for one in groups.values())
    assert all_layers.rms_error > max(one.rms_error for one in others)


def test_classifier_by_hand(model: MobileViT):
    images = [torch.from_numpy(x).permute(2, 0, 1)[None] / 255 for x in synthetic_images(12, (64, 64))]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    measured = int8_sensitivity(ExportModel(model, PREPROCESSING, uint8=False).eval(), images)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    [error] = [one.rms_error for one in measured if one.group == "classifier"]

    classifier = model.classifier
    assert isinstance(classifier, nn.Linear)
    inputs = []
    hook = classifier.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        expected = torch.cat([model(image) for image in images])
    hook.remove()
    x, weight = torch.cat(inputs).double(), classifier.weight.detach().double()
    step = (max(x.max().item(), 0.0) - min(x.min().item(), 0.0)) / 255
    steps = weight.abs().amax(dim=1, keepdim=True) / 127
    actual = torch.round(x / step) * step @ (torch.round(weight / steps) * steps).T + classifier.bias.detach()
    by_hand = (actual - expected).square().mean().sqrt() / expected.std()
    assert error == pytest.approx(by_hand.item(), rel=0.2)  # the zero points differ by half a step


def test_an_outlier_channel():
    model = randomize(MobileViT(SMALL, num_classes=7))
    inputs = [torch.rand(1, 3, 64, 64) for _ in range(4)]
    before = {one.group: one.rms_error for one in int8_sensitivity(model, inputs)}
    # One channel of the head is 1000 times larger than the others, and the classifier ignores it.
    model.head.norm.weight.data[0] *= 1000
    model.head.norm.bias.data[0] = 1000
    model.classifier.weight.data[:, 0] = 0  # pyright: ignore[reportIndexIssue]
    after = {one.group: one.rms_error for one in int8_sensitivity(model, inputs)}
    assert after["classifier"] > 10 * before["classifier"]


def test_an_unknown_layer():
    with pytest.raises(AssertionError, match=r"somewhere\.else belongs to no group"):
        group_of("somewhere.else")


@pytest.mark.parametrize(
    ("task", "heads"),
    [("detect", {"heads", "extra layers", "pooled"}), ("segment", {"pyramid", "classifier"})],
)
def test_dense_networks(all_weights: dict[str, Weights], task: str, heads: set[str]):
    weights = replace(all_weights[task], preprocessing=Preprocessing((64, 64), 64))
    groups = {one.group: one for one in sensitivity(weights, synthetic_images(2, (64, 64)))}
    assert heads <= set(groups)
    all_layers = groups.pop(ALL_LAYERS)
    assert sum(one.num_layers for one in groups.values()) == all_layers.num_layers
    assert 0 < max(one.rms_error for one in groups.values()) < all_layers.rms_error * 1.5
    assert all(0 < one.prediction_agreement <= 1 for one in groups.values())


def test_images_are_required(model: MobileViT):
    with pytest.raises(ValueError, match="--images"):
        sensitivity(Weights(model.architecture, model.state_dict()), [])
