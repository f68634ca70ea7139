"""The table of models: each has the published number of parameters, computes, trains a step and exports.

`make test` builds all of them without data, trains our own definitions and exports one of them. `make test-all` also
computes, trains and exports every model.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import onnxruntime
import pytest
import torch
import torch.nn.functional as F

from mobilevit.benchmark.cost import count_parameters
from mobilevit.benchmark.rivals import randomize
from mobilevit.compare.models import MODELS, PublishedModel
from mobilevit.files import MissingExtraError

OWN = [
    "mobilenetv1-0.75",
    "espnetv2",
    "t2t-vit-7",
    "mobile-former-96m",
    "ceit-tiny",
    "vil-tiny",
    "localvit",
    "botnet-50",
    "deepvit-16",
]
STEPPED = [pytest.param(name, marks=() if name in OWN else pytest.mark.slow) for name in MODELS]
EXPORTED = [pytest.param(name, marks=() if name == "deepvit-16" else pytest.mark.slow) for name in MODELS]
# The classifier reads the class token, which the last feed-forward network leaves unchanged: as published.
UNUSED = {"ceit-tiny": "layers.11.leff.convs.", "localvit": "layers.11.ffn.convs."}

# With random weights these amplify rounding errors: in torch itself, float32 differs from float64 by up to a fifth of
# the standard deviation of the logits. They are exported with their initial weights.
AMPLIFYING = ("resnet-101-se", "mobile-former-214m")


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> PublishedModel:
    return MODELS[request.param]


def test_models_of_the_paper() -> None:
    names = (
        "mobilenetv1 mobilenetv2 mobilenetv3 mobilenetv4 shufflenetv2 espnetv2 resnet-101 resnet-101-se densenet-169 "
        "efficientnet-b0 deit t2t pvt cait deepvit ceit crossvit localvit pit convit vil botnet mobile-former mobilevit"
    )
    for prefix in names.split():
        assert any(name.startswith(prefix) for name in MODELS), prefix


def test_parameters_and_output_shape(model: PublishedModel) -> None:
    """Parameters within 2 % of the published figure; of MobileViT the paper prints tenths of a million."""
    with torch.device("meta"):
        network = model.build().eval()
        found = count_parameters(network)
        if model.family == "mobilevit":
            assert round(found, -5) == model.published_parameters
        else:
            assert found == pytest.approx(model.published_parameters, rel=0.02)
        with torch.no_grad():
            assert network(torch.empty(2, 3, model.size_px, model.size_px)).shape == (2, 1000)


@pytest.mark.slow
def test_computes(model: PublishedModel) -> None:
    network = model.build(num_classes=7).eval()
    with torch.inference_mode():
        logits = network(torch.rand(2, 3, model.size_px, model.size_px))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()
    assert not logits[0].equal(logits[1])


@pytest.mark.slow
def test_computes_at_another_size(model: PublishedModel) -> None:
    size_px = {1: 75, 32: 64}.get(model.size_multiple_px, model.size_multiple_px)
    network = model.build(num_classes=3, size_px=size_px).eval()
    with torch.inference_mode():
        assert network(torch.rand(2, 3, size_px, size_px)).shape == (2, 3)


@pytest.mark.parametrize("name", STEPPED)
def test_trains_a_step(name: str) -> None:
    network = MODELS[name].build().train()
    images = torch.rand(2, 3, MODELS[name].size_px, MODELS[name].size_px)
    F.cross_entropy(network(images), torch.tensor([3, 999])).backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        if name in OWN:
            assert bool(parameter.grad.any()) != key.startswith(UNUSED.get(name, "none")), key


@pytest.mark.parametrize("name", EXPORTED)
def test_exports(name: str, tmp_path: Path) -> None:
    network = MODELS[name].build().eval()
    if name not in AMPLIFYING:
        randomize(network, seed=0)
    images = torch.rand(2, 3, MODELS[name].size_px, MODELS[name].size_px)
    file = tmp_path / "network.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter
        torch.onnx.export(network, (images,), file, dynamo=True, input_names=["images"], verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images.numpy()})
    with torch.inference_mode():
        expected = network(images)
    assert expected.std() > 0.01
    torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-4 * max(1, float(expected.std())))


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"100.*vil-tiny.*multiple of 32"):
        MODELS["vil-tiny"].build(size_px=100)
    with pytest.raises(ValueError, match=r"31.*espnetv2.*32"):
        MODELS["espnetv2"].build(size_px=31)
    with pytest.raises(ValueError, match="num_classes is 0"):
        MODELS["espnetv2"].build(0)
    for library, name in (("timm", "pit-tiny"), ("transformers", "pvt-tiny")):
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(MissingExtraError, match=rf"{library}.*mobilevit\[compare\]"):
            MODELS[name].build()
