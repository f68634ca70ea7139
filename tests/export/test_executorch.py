"""ExecuTorch artifacts in the ExecuTorch runtime, compared with torch: one delegate holds the whole network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mobilevit.export import load_artifact, read_signature
from mobilevit.export.backend import Signature
from mobilevit.export.executorch import read_metadata
from mobilevit.export.verify import synthetic_images
from mobilevit.weights import Weights
from reference_runtimes import assert_metadata, difference, normalized, run_artifact, torch_outputs


@pytest.mark.parametrize(("size", "batch_size"), [((64, 64), 1), ((75, 98), 2)])
def test_fp32(weights: Weights, export_once: Any, size: tuple[int, int], batch_size: int):
    artifact = export_once("executorch", size=size, batch_size=batch_size)
    images = synthetic_images(batch_size, size)
    outputs = run_artifact(artifact.path, normalized(weights, images).numpy())
    assert difference(outputs, torch_outputs(weights, images)) < 1e-4
    assert (artifact.operators.num_operators, artifact.operators.fallback) == (1, ())
    assert artifact.path.name == f"mobilevit_small_{size[0]}x{size[1]}_fp32.pte"
    assert_metadata(read_metadata(artifact.path), weights, "logits")
    assert read_signature(artifact.path) == Signature((batch_size, 3, *size), False, 7)


@pytest.mark.slow
def test_fp16_with_uint8_input(weights: Weights, export_once: Any):
    artifact = export_once("executorch", precision="fp16", uint8=True)
    images = synthetic_images(1, (64, 64))
    outputs = run_artifact(artifact.path, np.stack(images))
    assert read_signature(artifact.path) == Signature((1, 64, 64, 3), True, 7)
    assert 1e-5 < difference(outputs, torch_outputs(weights, images)) < 0.05
    # Convolutions have float32 weights.
    assert artifact.num_bytes < 0.85 * export_once("executorch", size=(64, 64), batch_size=1).num_bytes


def test_int8(weights: Weights, export_once: Any):
    artifact = export_once("executorch", precision="int8")
    images = synthetic_images(1, (64, 64))
    outputs = run_artifact(artifact.path, normalized(weights, images).numpy())
    assert 1e-3 < difference(outputs, torch_outputs(weights, images)) < 2
    assert (artifact.operators.num_operators, artifact.operators.fallback) == (1, ())
    assert artifact.num_bytes < 0.33 * export_once("executorch", size=(64, 64), batch_size=1).num_bytes


def test_load(export_once: Any, tmp_path: Path):
    infer = load_artifact(export_once("executorch", size=(64, 64), batch_size=1).path)
    (first,) = infer(np.zeros((1, 3, 64, 64), np.float32))
    copy = first.copy()
    infer(np.ones((1, 3, 64, 64), np.float32))
    np.testing.assert_array_equal(first, copy)  # the second call did not overwrite the first output
    with pytest.raises(ValueError, match=r"fp32\.pte: .*\(1, 3, 80, 64\)"):
        infer(np.zeros((1, 3, 80, 64), np.float32))
    path = tmp_path / "noise.pte"
    path.write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match=r"noise\.pte: ExecuTorch cannot load it"):
        load_artifact(path)
