"""ONNX Runtime answers as torch does, in every precision and whatever was left open."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from conftest import SMALL, randomise
from mobilevit.export import export, load_artifact
from mobilevit.export.onnx import read_metadata
from mobilevit.export.verify import synthetic_images
from mobilevit.images import Preprocessing
from mobilevit.models.mobilevit import XXS, MobileViT
from mobilevit.weights import Weights


@pytest.fixture(scope="module", params=[SMALL, pytest.param(XXS, marks=pytest.mark.slow)], ids=lambda a: a.name)
def weights(request: pytest.FixtureRequest) -> Weights:
    model = randomise(MobileViT(request.param, num_classes=7))
    return Weights(model.architecture, model.state_dict(), Preprocessing(70, 64), tuple("abcdefg"))


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    return synthetic_images(24, (80, 90))


@pytest.mark.parametrize("size", [(64, 64), (75, 130)])
def test_fp32(weights: Weights, size: tuple[int, int], tmp_path: Path):
    [artifact] = export(weights, ["onnx"], tmp_path, size=size)
    assert artifact.agreement is not None
    assert artifact.agreement.error < 1e-4
    assert artifact.path.name == f"mobilevit_{weights.architecture.name}_{size[0]}x{size[1]}_fp32.onnx"
    assert artifact.num_bytes == artifact.path.stat().st_size


def test_any_batch_and_size(weights: Weights, tmp_path: Path):
    [artifact] = export(weights, ["onnx"], tmp_path, size=(96, 80), dynamic_batch=True, dynamic_size=True)
    run, network = load_artifact(artifact.path), weights.build()
    for shape in ((1, 3, 96, 80), (5, 3, 65, 130), (2, 3, 128, 128)):
        x = torch.rand(shape)
        with torch.no_grad():
            np.testing.assert_allclose(run(x.numpy())[0], network(x).numpy(), rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def num_fp32_bytes(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> int:
    return export(weights, ["onnx"], tmp_path_factory.mktemp("fp32"))[0].num_bytes


def test_fp16(weights: Weights, num_fp32_bytes: int, tmp_path: Path):
    [artifact] = export(weights, ["onnx"], tmp_path, precision="fp16", uint8=True, batch_size=2)
    assert artifact.agreement is not None
    assert 1e-6 < artifact.agreement.error < 0.05
    assert artifact.num_bytes < 0.56 * num_fp32_bytes
    [value] = onnx.load(artifact.path).graph.output
    assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_fp16_survives_a_large_residual_stream(weights: Weights, tmp_path: Path):
    tensors = {key: tensor.clone() for key, tensor in weights.tensors.items()}
    last = [key for key in tensors if key.endswith("to_tokens.weight")][-1]
    tensors[last] *= 300  # squares beyond 65,504
    large = Weights(weights.architecture, tensors, weights.preprocessing, weights.class_names)
    [artifact] = export(large, ["onnx"], tmp_path, precision="fp16")
    assert artifact.agreement is not None
    assert artifact.agreement.error < 0.05


@pytest.mark.parametrize(
    "options",
    [pytest.param({}, marks=pytest.mark.slow), {"dynamic_batch": True, "batch_size": 3, "uint8": True}],
    ids=str,
)
def test_int8(weights: Weights, images: list[np.ndarray], num_fp32_bytes: int, options: dict, tmp_path: Path):
    [artifact] = export(weights, ["onnx"], tmp_path, precision="int8", images=images, **options)
    assert artifact.agreement is not None
    assert artifact.agreement.num_images == 24
    assert 1e-3 < artifact.agreement.error < 2
    assert artifact.num_bytes < 0.3 * num_fp32_bytes
    graph = onnx.load(artifact.path).graph
    kinds = {tensor.data_type for tensor in graph.initializer if np.prod(tensor.dims) > 500}
    assert kinds == {onnx.TensorProto.INT8}


def test_what_the_artifact_says_of_itself(weights: Weights, tmp_path: Path):
    [artifact] = export(weights, ["onnx"], tmp_path, source="weights.safetensors")
    metadata = read_metadata(artifact.path)
    assert json.loads(metadata["class_names"]) == list("abcdefg")
    assert json.loads(metadata["preprocessing"])["crop_px"] == 64
    assert metadata["source"] == "weights.safetensors"
    assert metadata["input"] == "float32 (batch, 3, height, width), RGB"
    proto = onnx.load(artifact.path)
    assert [(one.domain, one.version) for one in proto.opset_import] == [("", 23)]
    assert not artifact.operators.outside


def test_no_onnx_model(tmp_path: Path):
    path = tmp_path / "cat.onnx"
    path.write_bytes(b"\xff\xd8\xff\xe0 a JPEG file")
    with pytest.raises(ValueError, match=r"cat\.onnx: not an ONNX model"):
        read_metadata(path)
