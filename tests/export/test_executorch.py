"""ExecuTorch answers as torch does, in one delegate with nothing beside it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from conftest import SMALL, randomise
from mobilevit.export import Artifact, export, load_artifact
from mobilevit.export.executorch import read_metadata
from mobilevit.export.verify import synthetic_images
from mobilevit.images import Preprocessing
from mobilevit.models.mobilevit import XXS, MobileViT
from mobilevit.weights import Weights


@pytest.fixture(scope="module", params=[SMALL, pytest.param(XXS, marks=pytest.mark.slow)], ids=lambda a: a.name)
def weights(request: pytest.FixtureRequest) -> Weights:
    model = randomise(MobileViT(request.param, num_classes=7))
    return Weights(model.architecture, model.state_dict(), Preprocessing(70, 64), tuple("abcdefg"))


@pytest.fixture(scope="module")
def fp32(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export(weights, ["executorch"], tmp_path_factory.mktemp("fp32"), source="weights.safetensors")[0]


def test_fp32(weights: Weights, fp32: Artifact):
    assert fp32.agreement is not None
    assert fp32.agreement.error < 1e-4
    assert (fp32.operators.num_operators, fp32.operators.outside) == (1, ())
    assert fp32.path.name == f"mobilevit_{weights.architecture.name}_64x64_fp32.pte"


def test_odd_size_and_batch(weights: Weights, tmp_path: Path):
    [artifact] = export(weights, ["executorch"], tmp_path, size=(75, 98), batch_size=2)
    assert artifact.agreement is not None
    assert artifact.agreement.error < 1e-4
    assert (artifact.operators.num_operators, artifact.operators.outside) == (1, ())


@pytest.mark.slow
def test_fp16_from_bytes(weights: Weights, fp32: Artifact, tmp_path: Path):
    [artifact] = export(weights, ["executorch"], tmp_path, precision="fp16", uint8=True)
    assert artifact.agreement is not None
    assert 1e-5 < artifact.agreement.error < 0.05
    most = 0.85 if weights.architecture == SMALL else 0.75  # convolutions keep their weights in float32
    assert artifact.num_bytes < most * fp32.num_bytes


def test_int8(weights: Weights, fp32: Artifact, tmp_path: Path):
    images = synthetic_images(12, (80, 90))
    [artifact] = export(weights, ["executorch"], tmp_path, precision="int8", images=images)
    assert artifact.agreement is not None
    assert 1e-3 < artifact.agreement.error < 2
    assert (artifact.operators.num_operators, artifact.operators.outside) == (1, ())
    assert artifact.num_bytes < 0.33 * fp32.num_bytes


def test_what_the_artifact_says_of_itself(fp32: Artifact):
    metadata = read_metadata(fp32.path)
    assert json.loads(metadata["class_names"]) == list("abcdefg")
    assert json.loads(metadata["preprocessing"])["crop_px"] == 64
    assert metadata["source"] == "weights.safetensors"


def test_one_answer_outlives_the_next(fp32: Artifact):
    run = load_artifact(fp32.path)
    (first,) = run(np.zeros((1, 3, 64, 64), np.float32))
    kept = first.copy()
    run(np.ones((1, 3, 64, 64), np.float32))
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("what", ["batch", "size"])
def test_only_fixed_shapes(weights: Weights, what: str, tmp_path: Path):
    batch, size = what == "batch", what == "size"
    with pytest.raises(ValueError, match=f"executorch is exported for one {what}; leave out --dynamic-{what}"):
        export(weights, ["executorch"], tmp_path, size=(96, 96), dynamic_batch=batch, dynamic_size=size)


def test_a_image_of_another_size_is_refused(fp32: Artifact):
    with pytest.raises(ValueError, match="ExecuTorch cannot take"):
        load_artifact(fp32.path)(np.zeros((1, 3, 80, 64), np.float32))


def test_what_is_no_program_is_refused(tmp_path: Path):
    path = tmp_path / "noise.pte"
    path.write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match=r"noise.pte: ExecuTorch cannot load it"):
        load_artifact(path)
