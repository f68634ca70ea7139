"""OpenVINO artifacts in the OpenVINO runtime, compared with torch."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import torch
from torch import nn

from mobilevit.export import ArtifactSpec, read_signature
from mobilevit.export.backend import Signature
from mobilevit.export.openvino import load, read_metadata, write
from mobilevit.export.verify import synthetic_images
from mobilevit.weights import Weights
from reference_runtimes import assert_metadata, difference, normalized, run_artifact, torch_outputs


def num_weight_bytes(path: Path) -> int:
    return path.with_suffix(".bin").stat().st_size


def test_fp32(weights: Weights, export_once: Any):
    artifact = export_once("openvino")
    images = synthetic_images(1, (64, 64))
    outputs = run_artifact(artifact.path, normalized(weights, images).numpy())
    assert difference(outputs, torch_outputs(weights, images)) < 1e-4
    assert artifact.path.name == "mobilevit_small_64x64_fp32.xml"
    assert artifact.num_bytes == artifact.path.stat().st_size + num_weight_bytes(artifact.path)
    assert artifact.operators.num_operators > 50
    assert artifact.operators.fallback == ()
    metadata = read_metadata(artifact.path)
    assert_metadata(metadata, weights, "logits")
    assert metadata["computed_in"] == "f32"
    model = openvino.Core().read_model(artifact.path)
    assert (model.input("images").shape, model.output("logits").shape) == ([1, 3, 64, 64], [1, 7])


def test_odd_size_and_batch_of_uint8(weights: Weights, export_once: Any):
    artifact = export_once("openvino", size=(75, 130), batch_size=2, uint8=True)
    assert read_signature(artifact.path) == Signature((2, 75, 130, 3), True, 7)
    images = synthetic_images(2, (75, 130))
    assert difference(run_artifact(artifact.path, np.stack(images)), torch_outputs(weights, images)) < 1e-4


def test_dynamic_batch_and_size(weights: Weights, export_once: Any):
    artifact = export_once("openvino", size=(96, 80), dynamic_batch=True, dynamic_size=True)
    assert read_signature(artifact.path) == Signature((None, 3, None, None), False, 7)
    for num, size in ((1, (96, 80)), (5, (65, 130)), (2, (128, 128))):
        images = synthetic_images(num, size)
        outputs = run_artifact(artifact.path, normalized(weights, images).numpy())
        assert difference(outputs, torch_outputs(weights, images)) < 1e-3
    with pytest.raises(RuntimeError, match="65"):  # below the minimum size
        run_artifact(artifact.path, np.zeros((1, 3, 64, 64), np.float32))


@pytest.mark.parametrize(("precision", "max_error", "ratio"), [("fp16", 0.05, 0.55), ("bf16", 0.3, 1.1)])
def test_half_precision(weights: Weights, export_once: Any, precision: str, max_error: float, ratio: float):
    artifact = export_once("openvino", precision=precision, dynamic_batch=True)
    images = synthetic_images(2, (64, 64))
    outputs = run_artifact(artifact.path, normalized(weights, images).numpy())
    assert difference(outputs, torch_outputs(weights, images)) < max_error
    assert read_metadata(artifact.path)["computed_in"] == {"fp16": "f32", "bf16": "bf16"}[precision]
    assert num_weight_bytes(artifact.path) < ratio * num_weight_bytes(export_once("openvino").path)


def test_int8(weights: Weights, export_once: Any, tmp_path: Path):
    artifact = export_once("openvino", precision="int8", batch_size=3)
    images = synthetic_images(3, (64, 64))
    outputs = run_artifact(artifact.path, normalized(weights, images).numpy())
    assert 1e-3 < difference(outputs, torch_outputs(weights, images)) < 2
    assert num_weight_bytes(artifact.path) < 0.3 * num_weight_bytes(export_once("openvino").path)
    with pytest.raises(ValueError, match="int8 requires calibration"):
        write(weights.build(), ArtifactSpec("int8", 64, 64), tmp_path / "a.xml", {}, ())


def test_a_file_that_is_no_artifact(tmp_path: Path):
    path = tmp_path / "a.xml"
    path.write_text("<net>")
    with pytest.raises(ValueError, match=r"a\.xml: OpenVINO cannot read it"):
        load(path, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of the converter
        openvino.save_model(openvino.convert_model(torch.export.export(nn.ReLU(), (torch.zeros(1),))), path)
    with pytest.raises(ValueError, match=r"a\.xml: .*metadata is missing"):
        load(path, 1)
