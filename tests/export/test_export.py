"""What is exported agrees with torch on the same images, and what does not agree is not left behind."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from conftest import SMALL, randomise
from mobilevit.export import BACKENDS, Operators, Target, export, installed, load_artifact, verify
from mobilevit.export.artifact import Deployed
from mobilevit.export.verify import compare, synthetic_images
from mobilevit.images import ImageError, Preprocessing
from mobilevit.models.mobilevit import MobileViT
from mobilevit.weights import Weights

PREPROCESSING = Preprocessing(resize_px=70, crop_px=64, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))


@pytest.fixture(scope="module")
def weights() -> Weights:
    model = randomise(MobileViT(SMALL, num_classes=7))
    return Weights(model.architecture, model.state_dict(), PREPROCESSING, tuple("abcdefg"))


class Fake(ModuleType):
    """A backend whose artifacts answer as torch does, but for `change`."""

    PRECISIONS = ("fp32", "fp16", "int8")
    DYNAMIC = ("batch",)
    ANSWERS = ()

    def __init__(self) -> None:
        super().__init__("mobilevit.export.fake")
        self.change = lambda logits: logits
        self.seen: list[tuple[int, ...]] = []
        self.calibration: dict[str, Sequence[Tensor]] = {}

    def write(self, network, target, path, metadata, calibration) -> None:
        self.network, self.metadata = network, metadata
        self.calibration[target.precision] = calibration
        path.write_text(f"{target}")

    def load(self, path: Path, num_threads: int):
        def run(images: np.ndarray) -> tuple[np.ndarray, ...]:
            self.seen.append(images.shape)
            with torch.no_grad():
                return (self.change(self.network(torch.from_numpy(images)).numpy()),)

        return run

    def operators(self, path: Path) -> Operators:
        return Operators(1, ())

    def read_metadata(self, path: Path) -> dict[str, str]:
        return {}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    backend = Fake()
    monkeypatch.setitem(sys.modules, "mobilevit.export.fake", backend)
    monkeypatch.setitem(BACKENDS, "fake", ".fake")
    return backend


def test_files_that_exist(weights: Weights, fake: Fake, tmp_path: Path):
    options = {"prefix": "pets", "overwrite": False}
    [artifact] = export(weights, ["fake"], tmp_path, **options)
    assert artifact.path == tmp_path / "pets_64x64_fp32.fake"
    before = fake.network
    with pytest.raises(ValueError, match="already exists") as caught:
        export(weights, ["fake"], tmp_path, **options)
    assert str(artifact.path) in str(caught.value)
    assert "--overwrite" in str(caught.value)
    assert fake.network is before  # nothing was converted
    export(weights, ["fake"], tmp_path, prefix="pets")
    assert fake.network is not before


def test_the_input_is_what_the_network_was_trained_on(weights: Weights, fake: Fake, tmp_path: Path):
    image = Image.fromarray(synthetic_images(1, (90, 100))[0])
    for uint8 in (False, True):
        export(weights, ["fake"], tmp_path, uint8=uint8, images=[image])
        pixels = PREPROCESSING.resize_and_crop(image)
        x = torch.from_numpy(np.array(pixels))[None] if uint8 else PREPROCESSING(image)[None]
        expected = weights.build()(PREPROCESSING(image)[None])
        torch.testing.assert_close(fake.network(x), expected, rtol=1e-4, atol=1e-4)


def test_a_batch_is_filled_and_what_was_added_not_counted(weights: Weights, fake: Fake, tmp_path: Path):
    [artifact] = export(weights, ["fake"], tmp_path, batch_size=4, images=synthetic_images(6, (64, 64)))
    assert set(fake.seen) == {(4, 3, 64, 64)}
    assert artifact.agreement is not None
    assert (artifact.agreement.answers, artifact.agreement.kind, artifact.agreement.same) == (6, "images", 1.0)
    assert artifact.agreement.error < 1e-5


def test_what_was_left_open_is_tried_at_another_value(weights: Weights, fake: Fake, tmp_path: Path):
    export(weights, ["fake"], tmp_path, dynamic_batch=True)
    assert {shape[0] for shape in fake.seen} == {1, 3}
    fake.change = lambda logits: logits if len(logits) == 1 else logits + 1
    with pytest.raises(ValueError, match="answers otherwise than torch"):
        export(weights, ["fake"], tmp_path / "other", dynamic_batch=True)


@pytest.mark.parametrize(
    ("precision", "change", "message"),
    [
        (
            "fp32",
            lambda x: x + 0.01,
            r"\(logits\) differs by 0\.\d+ of their standard deviation, allowed are 0.001",
        ),
        ("fp32", lambda x: x * np.nan, r"differs by (nan|inf)"),
        ("int8", lambda x: -x, r"torch's answer on only [\d.]+ % of 32 images, 90 % are asked for"),
    ],
)
def test_what_does_not_agree_is_not_written(weights: Weights, fake: Fake, tmp_path: Path, precision, change, message):
    out = tmp_path / "exports"
    images = synthetic_images(32, (64, 64))
    export(weights, ["fake"], out, precision=precision, images=images)
    [good] = out.iterdir()
    before = good.stat().st_mtime_ns
    fake.change = change
    with pytest.raises(ValueError, match=f"fake in {precision} .*{message}.*; nothing was written"):
        export(weights, ["fake"], out, precision=precision, images=images)
    assert list(out.iterdir()) == [good]
    assert good.stat().st_mtime_ns == before


def test_metadata(weights: Weights, fake: Fake, tmp_path: Path):
    export(weights, ["fake"], tmp_path, source="a/b.safetensors")
    assert json.loads(fake.metadata["class_names"]) == list("abcdefg")
    assert json.loads(fake.metadata["preprocessing"]) == json.loads(
        json.dumps(PREPROCESSING.to_dict() | {"scaled_inside": False})
    )
    assert fake.metadata["source"] == "a/b.safetensors"
    assert fake.metadata["precision"] == "fp32"


def test_calibration_is_spread_over_the_images(weights: Weights, fake: Fake, tmp_path: Path):
    images = [np.full((64, 64, 3), i // 4, np.uint8) for i in range(1000)]
    export(weights, ["fake"], tmp_path, precision="int8", images=images, uint8=True)
    levels = [int(x[0, 0, 0, 0]) for x in fake.calibration["int8"]]
    assert len(levels) == 256
    assert levels == sorted(levels)
    assert (levels[0], levels[-1]) == (0, 249)
    export(weights, ["fake"], tmp_path, images=images)
    assert not fake.calibration["fp32"]


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        (["fakes"], {}, "there is no backend 'fakes'; there are onnx, executorch"),
        ([], {}, "no backend is named"),
        (["fake"], {"precision": "bf16"}, "fake does not come in bf16; it can be fp32, fp16, int8"),
        (["fake"], {"dynamic_size": True, "size": (96, 96)}, "fake is exported for one size; leave out --dynamic-size"),
        (
            ["onnx"],
            {"dynamic_size": True},
            "size is 64 x 64 px; an image has at least 65 px, where",
        ),
        (["fake"], {"size": (16, 64)}, "size is 16 x 64 px; an image has at least 32 px"),
        (["fake"], {"answers": True}, "with the task 'classify' the logits are all there is; leave out --answers"),
        (["fake"], {"batch_size": 0}, "batch size is 0; it must be 1 or more"),
        (["fake"], {"precision": "int8"}, "int8 is calibrated on real images"),
    ],
)
def test_refused(weights: Weights, fake: Fake, tmp_path: Path, to: list[str], options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        export(weights, to, tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_features_have_no_answers(weights: Weights, tmp_path: Path):
    features = replace(weights, tensors={k: v for k, v in weights.tensors.items() if not k.startswith("classifier")})
    with pytest.raises(ValueError, match="no classifier"):
        export(features, ["onnx"], tmp_path)


def test_a_image_that_cannot_be_read_is_named(weights: Weights, fake: Fake, tmp_path: Path):
    with pytest.raises(ImageError, match=r"none\.png: no such file"):
        export(weights, ["fake"], tmp_path, images=[tmp_path / "none.png"])


def test_what_is_not_installed_is_named_with_its_extra(weights: Weights, monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "mobilevit.export.onnx", raising=False)
    assert not installed("onnx")
    with pytest.raises(ValueError, match=r"onnx needs onnxruntime, .* pip install 'mobilevit\[onnx\]'"):
        export(weights, ["onnx"], tmp_path)


def test_litert_that_is_not_installed_is_told_of_its_own_environment(weights: Weights, monkeypatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    monkeypatch.delitem(sys.modules, "mobilevit.export.litert", raising=False)
    with pytest.raises(ValueError, match=r"litert needs .* an environment of its own: python3 -m venv .venv-litert &&"):
        export(weights, ["litert"], tmp_path)


def test_int8_is_timed_against_fp32(weights: Weights, fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written, seconds, now = [], {"int8": 0.004, "fp32": 0.012}, [0.0]
    monkeypatch.setattr(verify.time, "perf_counter", lambda: now[0])

    def write(network, target, path, metadata, calibration) -> None:
        written.append((target.precision, len(calibration)))
        fake.network = network
        path.write_text(target.precision)

    def load(path: Path, num_threads: int):
        precision = path.read_text()

        def run(images: np.ndarray) -> tuple[np.ndarray, ...]:
            now[0] += seconds[precision]
            with torch.no_grad():
                return (fake.network(torch.from_numpy(images)).numpy(),)

        return run

    fake.write, fake.load = write, load  # pyright: ignore[reportAttributeAccessIssue]
    images = synthetic_images(3, (64, 64))
    [artifact] = export(weights, ["fake"], tmp_path, precision="int8", images=images)
    assert written == [("int8", 3), ("fp32", 0)]
    assert artifact.path.read_text() == "int8"
    assert artifact.speed_ratio == pytest.approx(3)
    assert export(weights, ["fake"], tmp_path)[0].speed_ratio is None


def test_load_artifact_refuses(tmp_path: Path):
    with pytest.raises(ValueError, match=r"none\.onnx: no such file"):
        load_artifact(tmp_path / "none.onnx")
    (tmp_path / "x.pt").touch()
    with pytest.raises(ValueError, match=r"not an artifact; their endings are \.onnx, \.pte"):
        load_artifact(tmp_path / "x.pt")


def test_another_size_than_that_of_the_weights(weights: Weights, fake: Fake, tmp_path: Path):
    export(weights, ["fake"], tmp_path, size=(75, 130), images=synthetic_images(2, (200, 100)))
    assert set(fake.seen) == {(1, 3, 75, 130)}


def test_deployed_scales_as_the_preprocessing_does():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(1, 16, 16, 3)
    deployed = Deployed(torch.nn.Identity(), PREPROCESSING, uint8=True)
    torch.testing.assert_close(deployed(pixels), PREPROCESSING.scale(pixels.permute(0, 3, 1, 2)), rtol=0, atol=1e-6)


def test_error_is_in_deviations_of_the_logits():
    network = torch.nn.Flatten()
    inputs = [torch.tensor([[[[0.0, 2.0, 4.0]]]]), torch.tensor([[[[4.0, 2.0, 0.0]]]])]
    found = compare(network, lambda x: (x.reshape(len(x), -1) + np.array([0, 3, 0]),), inputs, Target("fp32", 1, 3))
    assert found.error == pytest.approx(3 / np.std([0, 2, 4, 4, 2, 0]))
    assert found.same == 0


def test_synthetic_images_differ_and_come_back_the_same():
    images = synthetic_images(5, (40, 60))
    again = synthetic_images(5, (40, 60))
    assert all(image.shape == (40, 60, 3) and image.dtype == np.uint8 for image in images)
    assert all(np.array_equal(a, b) for a, b in zip(images, again, strict=True))
    assert len({image.tobytes() for image in images}) == 5
    assert min(image.std() for image in images) > 5


def test_target_example():
    assert Target("fp32", 64, 96, batch_size=3).example().shape == (3, 3, 64, 96)
    example = Target("fp32", 64, 96, dynamic_batch=True, uint8=True).example()
    assert (example.shape, example.dtype) == ((2, 64, 96, 3), torch.uint8)
