"""CoreML programs contain the operators and weights of the rewritten network; no runtime for them exists on Linux.

tests/export/test_rewrite.py shows that the rewritten network computes what the original does.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mobilevit.export import Artifact, ExportOptions, export
from mobilevit.export.artifact import build_export_model
from mobilevit.export.backend import Signature
from mobilevit.export.coreml import FORMULATION, ct, operators, read_metadata, signature
from mobilevit.export.rewrite import FlatAttention, RMSNorm, optimize_for_inference
from mobilevit.images import Preprocessing
from mobilevit.weights import Weights
from reference_runtimes import assert_metadata

MAX_ERROR = {"fp32": 1e-6, "fp16": 1e-3, "int8": 5e-3}  # of a weight, relative to the largest of its tensor


def operations_of(path: Path) -> list[Any]:
    from coremltools.converters.mil.frontend.milproto.load import load as load_program

    model = ct.models.MLModel(str(path), skip_model_load=True)
    assert model.weights_dir is not None
    program: Any = load_program(model.get_spec(), ct.target.iOS16.value, model.weights_dir)
    return list(program.functions["main"].operations)


def program_of(path: Path) -> tuple[Counter[str], list[np.ndarray]]:
    """Number of operators by type, and the constant tensors."""
    operations = operations_of(path)
    values = [x.outputs[0].val for x in operations if x.op_type == "const"]
    values += [x.materialized_val_inference() for x in operations if x.op_type.startswith("constexpr")]
    floats = [x.astype(np.float32) for x in values if isinstance(x, np.ndarray) and x.dtype.kind == "f"]
    return Counter(x.op_type for x in operations), floats


def assert_contains_network(artifact: Artifact, weights: Weights) -> None:
    network = optimize_for_inference(build_export_model(weights, artifact.spec), FORMULATION)
    counts, constants = program_of(artifact.path)
    types = {"conv": nn.Conv2d, "linear": nn.Linear, "silu": nn.SiLU, "layer_norm": RMSNorm}
    for operator, module_type in types.items():
        assert counts[operator] == sum(isinstance(x, module_type) for x in network.modules()), operator
    num_attentions = sum(isinstance(module, FlatAttention) for module in network.modules())
    assert counts["matmul"] == 2 * num_attentions
    for name, parameter in network.named_parameters():
        expected = parameter.flatten().numpy()
        candidates = [x.reshape(-1) for x in constants if x.size == expected.size]
        error = min(float(np.abs(x - expected).max() / np.abs(expected).max()) for x in candidates)
        assert error < MAX_ERROR[artifact.spec.precision], name


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_precisions(weights: Weights, export_once: Any, precision: str):
    artifact = export_once("coreml", precision=precision)
    assert artifact.path.name == f"mobilevit_small_64x64_{precision}.mlpackage"
    assert artifact.agreement is artifact.latency_ms is None  # converted, not run
    assert_contains_network(artifact, weights)
    ratio = {"fp32": 1.01, "fp16": 0.6, "int8": 0.4}[precision]
    assert artifact.num_bytes < ratio * export_once("coreml", precision="fp32").num_bytes
    metadata = read_metadata(artifact.path)
    assert_metadata(metadata, weights, "logits")
    assert (metadata["precision"], metadata["input"]) == (precision, "float32 (batch, 3, height, width), RGB")
    assert signature(artifact.path).shape == (1, 3, 64, 64)


def test_odd_size_and_batch(weights: Weights, export_once: Any):
    artifact = export_once("coreml", size=(75, 130), batch_size=2)
    assert_contains_network(artifact, weights)
    assert signature(artifact.path).shape == (2, 3, 75, 130)


@pytest.mark.parametrize(
    ("mean", "std"), [((0.0,) * 3, (1.0,) * 3), ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3)), ((0.5,) * 3, (0.5,) * 3)]
)
def test_images_are_normalized_inside(weights: Weights, mean: tuple, std: tuple, tmp_path: Path):
    preprocessing = Preprocessing(70, 64, mean=mean, std=std)
    options = ExportOptions(uint8=True, overwrite=True)
    [artifact] = export(replace(weights, preprocessing=preprocessing), ["coreml"], tmp_path, options)
    assert signature(artifact.path) == Signature((1, 64, 64, 3), True, 7)
    pixels = np.arange(3 * 64 * 64, dtype=np.float32).reshape(1, 3, 64, 64) % 256
    x = pixels
    for operation in operations_of(artifact.path):  # those before the first convolution
        if operation.op_type == "conv":
            break
        if operation.op_type in ("mul", "add", "sub"):
            y = operation.inputs["y"].val
            x = {"mul": x * y, "add": x + y, "sub": x - y}[operation.op_type]
    np.testing.assert_allclose(x, preprocessing.scale(torch.from_numpy(pixels.astype(np.uint8))), atol=1e-5)
    with pytest.raises(ValueError, match="batch size is 2"):
        export(weights, ["coreml"], tmp_path, replace(options, batch_size=2))


@pytest.mark.parametrize("task", ["detect", pytest.param("segment", marks=pytest.mark.slow)])
def test_dense(all_weights: dict[str, Weights], export_once: Any, task: str):
    artifact = export_once("coreml", task, size=(75, 130), postprocess=task == "segment")
    assert_contains_network(artifact, all_weights[task])
    assert_metadata(read_metadata(artifact.path), all_weights[task], " ".join(artifact.spec.outputs))
    artifact = export_once("coreml", task, precision="int8", uint8=True)
    assert_contains_network(artifact, all_weights[task])
    if task == "detect":  # anchors in 8 bits would move boxes by more than a hundredth of the image
        anchors = all_weights[task].build().anchors(64, 64)[:, :2].numpy()
        _, constants = program_of(artifact.path)
        assert min(np.abs(x.reshape(-1, 2) - anchors).max() for x in constants if x.size == anchors.size) < 1e-3


class Wrong(nn.Module):
    """A network with a wrong operator or output shape."""

    def __init__(self, fault: str):
        super().__init__()
        self.fault = fault

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.fault == "operator":
            images = images.cumsum(3)
        images = images.reshape(1, -1)
        return images[0] if self.fault == "shape" else images


@pytest.mark.parametrize(
    ("fault", "message"),
    [("rank", "6 axes"), ("operator", "cumsum"), ("shape", "expected RGB images"), ("name", "has images, other")],
)
def test_a_wrong_program_is_refused(fault: str, message: str, tmp_path: Path):
    program = torch.export.export(Wrong(fault), (torch.zeros(1, 3, 8, 8),)).run_decompositions({})
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")  # warnings of the converter
        model: Any = ct.convert(
            program,
            inputs=[ct.TensorType("images", (1, 3, 8, 8), dtype=np.float32)],
            outputs=[ct.TensorType("other" if fault == "name" else "logits", dtype=np.float32)],
            minimum_deployment_target=ct.target.iOS16,
            compute_precision=ct.precision.FLOAT32,
            skip_model_load=True,
        )
        model.save(str(tmp_path / "wrong.mlpackage"))
    if fault == "rank":  # the converter refuses to write this
        [file] = tmp_path.rglob("*.mlmodel")
        spec = model.get_spec()
        [block] = spec.mlProgram.functions["main"].block_specializations.values()
        block.operations[-1].outputs[0].type.tensorType.rank = 6
        file.write_bytes(spec.SerializeToString())
    with pytest.raises(ValueError, match=rf"wrong\.mlpackage: .*{message}"):
        operators(tmp_path / "wrong.mlpackage")


def test_a_folder_that_is_no_package(tmp_path: Path):
    with pytest.raises(ValueError, match="not a CoreML package"):
        operators(tmp_path)
