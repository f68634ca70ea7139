"""Teachers from files of this package, timm, torchvision and ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor, nn

from dense_networks import dense_weights
from mobilevit.export import ExportOptions, export
from mobilevit.images import Preprocessing
from mobilevit.models.mobilevit import MobileViT
from mobilevit.teacher import OnnxNetwork, Teacher, TeacherNetwork, read_teacher
from mobilevit.weights import Weights, write
from small_networks import SMALL, randomize

NAMES = ("a", "b", "c")
PREPROCESSING = Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))


@pytest.fixture(scope="module")
def weights() -> Weights:
    model = randomize(MobileViT(SMALL, num_classes=3))
    return Weights(SMALL, model.state_dict(), PREPROCESSING, NAMES)


def normalize(images: Tensor, mean: Any, std: Any) -> Tensor:
    return (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def test_weights_of_this_package(weights: Weights, tmp_path: Path):
    write(weights, tmp_path / "teacher.safetensors")
    teacher = Teacher(read_teacher(tmp_path / "teacher.safetensors"), inputs=PREPROCESSING)
    images = torch.rand(2, 3, 64, 75)
    network = weights.build()
    logits, features = teacher(images)
    torch.testing.assert_close(logits, network(images))  # the student's normalization is the teacher's
    torch.testing.assert_close(features, network.features(images))
    assert (teacher.num_classes, teacher.num_features, teacher.class_names) == (3, SMALL.head_channels, NAMES)
    assert not teacher.train().network.training
    other = Teacher(read_teacher(tmp_path / "teacher.safetensors"))
    torch.testing.assert_close(other(images)[0], network(normalize(images, PREPROCESSING.mean, PREPROCESSING.std)))
    assert teacher.fingerprint() != other.fingerprint()  # another normalization of the inputs


def test_a_teacher_with_its_own_input_size(weights: Weights):
    teacher = Teacher(weights.build(), size_px=96)
    images = torch.rand(2, 3, 48, 48)
    large = torch.nn.functional.interpolate(images, (96, 96), mode="bilinear", antialias=True)
    torch.testing.assert_close(teacher(images)[0], weights.build()(large))


@pytest.mark.parametrize(
    ("spec", "mean", "std"),
    [
        ("timm:tf_efficientnet_lite0", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("timm:mobilenetv3_small_050", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("torchvision:shufflenet_v2_x0_5", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ],
)
def test_models_of_other_libraries(spec: str, mean: Any, std: Any, tmp_path: Path):
    library, _, name = spec.partition(":")
    make = timm.create_model if library == "timm" else torchvision.models.get_model
    network = randomize(make(name, num_classes=1000))
    torch.save({"state_dict": network.state_dict()}, tmp_path / "named.pth")
    # Another implementation of the same model: other names, the same order.
    renamed = {f"layer{i}": tensor for i, tensor in enumerate(network.state_dict().values())}
    torch.save(renamed, tmp_path / "renamed.pth")
    images = torch.rand(2, 3, 64, 64)
    expected = network(normalize(images, mean, std))
    safetensors.torch.save_file(network.state_dict(), tmp_path / "sorted.safetensors")  # in alphabetical order
    for file in ("named.pth", "renamed.pth", "sorted.safetensors"):
        teacher = Teacher(read_teacher(f"{spec}@{tmp_path / file}"))
        torch.testing.assert_close(teacher(images)[0], expected)
        assert teacher.num_features > 0
        assert len(teacher.class_names) == 1000
    with pytest.raises(ValueError, match=rf"{spec}.*--download.*{spec}@FILE"):
        read_teacher(spec)


def test_an_exported_artifact(weights: Weights, tmp_path: Path):
    [artifact] = export(weights, ["onnx"], tmp_path, ExportOptions(size=(64,), dynamic_batch=True))
    source = read_teacher(artifact.path)
    assert isinstance(source.network, OnnxNetwork)
    teacher = Teacher(source)
    assert (teacher.size_px, teacher.class_names, teacher.num_features) == (64, NAMES, 0)
    images = torch.rand(3, 3, 64, 64)
    expected = weights.build()(normalize(images, PREPROCESSING.mean, PREPROCESSING.std))
    torch.testing.assert_close(teacher(images)[0], expected, atol=1e-4, rtol=1e-4)
    [fixed] = export(weights, ["onnx"], tmp_path / "fixed", ExportOptions(size=(64,)))
    with pytest.raises(ValueError, match=r"fixed.*batch size is fixed to 1.*--dynamic-batch"):
        read_teacher(fixed.path)


def test_mistakes(tmp_path: Path):
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.onnx").write_text("no network")
    safetensors.torch.save_file({"a": torch.zeros(3), "b": torch.zeros(7)}, tmp_path / "other.safetensors")
    torch.save({"a": [1]}, tmp_path / "list.pth")
    torch.save(timm.create_model("mobilenetv3_small_050").state_dict(), tmp_path / "narrow.pth")
    for source, facts in (
        ("timm:tf_efficientnet_lite9", "tf_efficientnet_lite9 timm tf_efficientnet_lite4"),
        ("torchvision:resnet19", "resnet19 torchvision resnet18"),
        (f"timm:resnet18@{tmp_path}/none.pth", "none.pth"),
        (f"timm:resnet18@{tmp_path}/text.pth", "text.pth state_dict"),
        (f"timm:resnet18@{tmp_path}/list.pth", "list.pth"),
        (f"timm:resnet18@{tmp_path}/other.safetensors", "other.safetensors 2 conv1.weight"),
        (f"timm:mobilenetv3_small_100@{tmp_path}/narrow.pth", "narrow.pth shapes mobilenetv3_small_100"),
        (f"{tmp_path}/none.onnx", "none.onnx"),
        (f"{tmp_path}/text.onnx", "text.onnx"),
        (f"{tmp_path}/none.safetensors", "none.safetensors"),
        ("tf_efficientnet_lite0@x.pth", "timm:tf_efficientnet_lite0@x.pth"),
        ("efficientnet_v2_s", "torchvision:efficientnet_v2_s"),
    ):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the facts are asserted
            read_teacher(f"{source}@{tmp_path}/other.safetensors" if source.endswith(("lite9", "resnet19")) else source)
        assert not [fact for fact in facts.split() if fact not in str(caught.value)], str(caught.value)


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_a_teacher_is_a_classifier(task: Any, tmp_path: Path):
    write(dense_weights(task), tmp_path / "dense.safetensors")
    with pytest.raises(ValueError, match=rf"dense\.safetensors.*{task}.*classifier"):
        read_teacher(tmp_path / "dense.safetensors")


def test_a_fixed_input_size():
    source = TeacherNetwork(nn.Flatten(), "vit", size_px=224)
    with pytest.raises(ValueError, match=r"128 px.*vit.*224"):
        Teacher(source, size_px=128)
    with pytest.raises(ValueError, match=r"linear.*32 px.*distill\.size_px"):
        Teacher(TeacherNetwork(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 3)), "linear"), sizes_px=(64, 32))
