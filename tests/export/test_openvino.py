"""OpenVINO answers as torch does, in every precision and whatever was left open."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from torch import nn

from conftest import SMALL, randomise
from mobilevit.export import Target, export, load_artifact
from mobilevit.export.openvino import load, read_metadata, write
from mobilevit.export.verify import synthetic_images
from mobilevit.images import Preprocessing
from mobilevit.models.mobilevit import XXS, MobileViT
from mobilevit.weights import Weights


@pytest.fixture(scope="module", params=[SMALL, pytest.param(XXS, marks=pytest.mark.slow)], ids=lambda a: a.name)
def weights(request: pytest.FixtureRequest) -> Weights:
    model = MobileViT(request.param, num_classes=7)
    preprocessing = Preprocessing(70, 64, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
    return Weights(model.architecture, randomise(model).state_dict(), preprocessing, ("é", '"', "<", *"abcd"))


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    return synthetic_images(16, (80, 90))


@pytest.fixture(scope="module")
def num_fp32_bytes(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> int:
    folder = tmp_path_factory.mktemp("fp32")
    [artifact] = export(weights, ["openvino"], folder, source="weights.safetensors")
    assert artifact.agreement is not None
    assert artifact.agreement.error < 1e-4
    assert artifact.path.name == f"mobilevit_{weights.architecture.name}_64x64_fp32.xml"
    assert artifact.operators.num_operators > 50
    assert artifact.operators.outside == ()
    metadata = read_metadata(artifact.path)
    assert json.loads(metadata["class_names"]) == ["é", '"', "<", *"abcd"]
    assert json.loads(metadata["preprocessing"])["crop_px"] == 64
    assert metadata["source"] == "weights.safetensors"
    assert metadata["computed_in"] == "f32"
    model = openvino.Core().read_model(artifact.path)
    assert model.input("images").shape == [1, 3, 64, 64]
    assert model.output("logits").shape == [1, 7]
    weights_file = artifact.path.with_suffix(".bin")
    assert artifact.num_bytes == artifact.path.stat().st_size + weights_file.stat().st_size
    return weights_file.stat().st_size


def test_fp32(weights: Weights, num_fp32_bytes: int):
    num_parameters = sum(parameter.numel() for parameter in weights.build().parameters())
    assert num_fp32_bytes > 3.5 * num_parameters  # the fixture checks everything else


def test_odd_size_and_batch_of_bytes(weights: Weights, tmp_path: Path):
    [artifact] = export(weights, ["openvino"], tmp_path, size=(75, 130), batch_size=2, uint8=True)
    assert artifact.agreement is not None
    assert artifact.agreement.error < 1e-4


def test_any_batch_and_size(weights: Weights, tmp_path: Path):
    [artifact] = export(weights, ["openvino"], tmp_path, size=(96, 80), dynamic_batch=True, dynamic_size=True)
    run, network = load_artifact(artifact.path), weights.build()
    for shape in ((1, 3, 96, 80), (5, 3, 65, 130), (2, 3, 128, 128)):
        x = torch.rand(shape)
        with torch.no_grad():
            np.testing.assert_allclose(run(x.numpy())[0], network(x).numpy(), rtol=1e-3, atol=1e-3)
    with pytest.raises(RuntimeError, match="65"):  # too small for what was exported
        run(np.zeros((1, 3, 64, 64), np.float32))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half(weights: Weights, num_fp32_bytes: int, precision, tmp_path: Path):
    [artifact] = export(weights, ["openvino"], tmp_path, precision=precision, dynamic_batch=True)
    assert artifact.agreement is not None
    assert artifact.agreement.error < (0.05 if precision == "fp16" else 0.3)
    metadata = read_metadata(artifact.path)
    assert metadata["computed_in"] == ("f32" if precision == "fp16" else "bf16")
    ratio = artifact.path.with_suffix(".bin").stat().st_size / num_fp32_bytes
    assert ratio < (0.55 if precision == "fp16" else 1.1)


def test_int8(weights: Weights, images: list[np.ndarray], num_fp32_bytes: int, tmp_path: Path):
    [artifact] = export(weights, ["openvino"], tmp_path, precision="int8", batch_size=3, images=images)
    assert artifact.agreement is not None
    assert 1e-3 < artifact.agreement.error < 2
    assert artifact.path.with_suffix(".bin").stat().st_size < 0.3 * num_fp32_bytes


def test_int8_without_images(weights: Weights, tmp_path: Path):
    with pytest.raises(ValueError, match="calibrated"):
        write(weights.build(), Target("int8", 64, 64), tmp_path / "a.xml", {}, ())


def test_what_is_no_artifact(tmp_path: Path):
    path = tmp_path / "a.xml"
    path.write_text("<net>")
    with pytest.raises(ValueError, match="OpenVINO cannot read it"):
        load(path, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the converter, about itself
        openvino.save_model(openvino.convert_model(torch.export.export(nn.ReLU(), (torch.zeros(1),))), path)
    with pytest.raises(ValueError, match="no metadata of ours"):
        load(path, 1)
