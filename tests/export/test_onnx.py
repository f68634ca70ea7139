"""ONNX artifacts in ONNX Runtime, compared with torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from mobilevit.export import ExportOptions, export, read_signature
from mobilevit.export.backend import Signature
from mobilevit.export.onnx import read_metadata
from mobilevit.export.verify import synthetic_images
from mobilevit.weights import Weights
from reference_runtimes import assert_metadata, difference, normalized, run_artifact, torch_outputs


@pytest.mark.parametrize("size", [(64, 64), (75, 130)])
def test_fp32(weights: Weights, export_once: Any, size: tuple[int, int]):
    artifact = export_once("onnx", size=size)
    images = synthetic_images(1, size)
    outputs = run_artifact(artifact.path, normalized(weights, images).numpy())
    assert difference(outputs, torch_outputs(weights, images)) < 1e-4
    assert artifact.agreement.max_error < 1e-4
    assert artifact.path.name == f"mobilevit_small_{size[0]}x{size[1]}_fp32.onnx"
    assert artifact.num_bytes == artifact.path.stat().st_size
    assert artifact.operators.fallback == ()
    assert_metadata(read_metadata(artifact.path), weights, "logits")
    assert read_signature(artifact.path) == Signature((1, 3, *size), False, 7)
    assert [(one.domain, one.version) for one in onnx.load(artifact.path).opset_import] == [("", 23)]


def test_dynamic_batch_and_size(weights: Weights, export_once: Any):
    artifact = export_once("onnx", size=(96, 80), dynamic_batch=True, dynamic_size=True)
    assert read_signature(artifact.path) == Signature((None, 3, None, None), False, 7)
    for num, size in ((1, (96, 80)), (5, (65, 130)), (2, (128, 128))):
        images = synthetic_images(num, size)
        outputs = run_artifact(artifact.path, normalized(weights, images).numpy())
        assert difference(outputs, torch_outputs(weights, images)) < 1e-3


def test_fp16(weights: Weights, export_once: Any):
    artifact = export_once("onnx", precision="fp16", uint8=True, batch_size=2)
    images = synthetic_images(2, (64, 64))
    (logits,) = run_artifact(artifact.path, np.stack(images))
    assert logits.dtype == np.float32
    assert read_signature(artifact.path) == Signature((2, 64, 64, 3), True, 7)
    assert 1e-6 < difference([logits], torch_outputs(weights, images)) < 0.05
    assert artifact.num_bytes < 0.56 * export_once("onnx", size=(64, 64)).num_bytes


def test_fp16_with_a_large_residual_stream(weights: Weights, tmp_path: Path):
    tensors = {key: tensor.clone() for key, tensor in weights.tensors.items()}
    tensors[[key for key in tensors if key.endswith("to_tokens.weight")][-1]] *= 300  # squares overflow fp16
    large = replace(weights, tensors=tensors)
    [artifact] = export(large, ["onnx"], tmp_path, ExportOptions("fp16"))
    images = synthetic_images(1, (64, 64))
    outputs = run_artifact(artifact.path, normalized(large, images).numpy())
    assert difference(outputs, torch_outputs(large, images)) < 0.05


@pytest.mark.parametrize(
    "options",
    [pytest.param({}, marks=pytest.mark.slow), {"dynamic_batch": True, "batch_size": 3, "uint8": True}],
    ids=str,
)
def test_int8(weights: Weights, export_once: Any, options: dict[str, Any]):
    artifact = export_once("onnx", precision="int8", **options)
    images = synthetic_images(3, (64, 64))
    if "uint8" in options:
        outputs = run_artifact(artifact.path, np.stack(images))
    else:
        each = [run_artifact(artifact.path, normalized(weights, [image]).numpy())[0] for image in images]
        outputs = [np.concatenate(each)]
    assert 1e-3 < difference(outputs, torch_outputs(weights, images)) < 2
    assert artifact.agreement.num_images == 12
    assert artifact.num_bytes < 0.3 * export_once("onnx", size=(64, 64)).num_bytes
    initializers = onnx.load(artifact.path).graph.initializer
    assert {x.data_type for x in initializers if np.prod(x.dims) > 500} == {onnx.TensorProto.INT8}


def test_int8_for_the_browser(weights: Weights, export_once: Any):
    """Depthwise convolutions and the SiLU after them are in float, the rest is as without the option."""
    for browser in (False, True):
        artifact = export_once("onnx", precision="int8", browser=browser)
        graph = onnx.load(artifact.path).graph
        source = {node.output[0]: node for node in graph.node}
        convolutions = [node for node in graph.node if node.op_type == "Conv"]
        depthwise = [x.output[0] for x in convolutions if any(a.name == "group" and a.i > 1 for a in x.attribute)]
        assert len(depthwise) == 3
        in_float = [x.output[0] for x in convolutions if x.input[1] not in source]
        assert in_float == (depthwise if browser else [])
        activations = [x for x in graph.node if x.op_type in ("Sigmoid", "Mul") and set(x.input) & set(depthwise)]
        assert len(activations) == (6 if browser else 0)
    assert artifact.path.name == "mobilevit_small_64x64_int8_browser.onnx"


def test_a_file_that_is_no_model(tmp_path: Path):
    path = tmp_path / "cat.onnx"
    path.write_bytes(b"\xff\xd8\xff\xe0 a JPEG file")
    with pytest.raises(ValueError, match=r"cat\.onnx: not an ONNX model"):
        read_metadata(path)
