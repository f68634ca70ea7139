"""Predictions against a softmax worked out by hand; saving, loading and finding pictures as a user does it."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import randomise
from mobilevit.models.mobilevit import XXS, MobileViT
from mobilevit.models.weights import FORMATS, PAPER_PREPROCESSING, Format, WeightsError
from mobilevit.pictures import PictureError, Preprocessing
from mobilevit.predict import Classifier, Prediction, find_pictures, load, load_backbone, predict_pictures, save

NAMES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")
PREPROCESSING = Preprocessing(resize_px=40, crop_px=37, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))


@pytest.fixture(scope="module")
def model() -> Classifier:
    model = Classifier("xxs", num_classes=len(NAMES))
    randomise(model)
    model.preprocessing, model.class_names = PREPROCESSING, NAMES
    return model


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Seven pictures of noise, already of the resized size, the fourth cut short."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    files = [folder / f"{i}.png" for i in range(7)]
    for i, file in enumerate(files):
        Image.fromarray(random.integers(0, 40 + 30 * i, (40, 40, 3), dtype=np.uint8)).save(file)
    files[3].write_bytes(files[3].read_bytes()[:1000])
    return files


def by_hand(model: MobileViT, file: Path) -> np.ndarray:
    """The probabilities of a picture of 40 x 40 px under `PREPROCESSING`."""
    rgb = np.asarray(Image.open(file), np.float64)[1:38, 1:38] / 255
    rgb = (rgb - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
    with torch.no_grad():
        logits = model(torch.tensor(rgb.transpose(2, 0, 1)[None], dtype=torch.float32))[0].double().numpy()
    return np.exp(logits) / np.exp(logits).sum()


def close(predictions: list[Prediction], probabilities: np.ndarray) -> bool:
    order = np.argsort(-probabilities)[: len(predictions)]
    assert [p.class_index for p in predictions] == order.tolist()
    return np.allclose([p.probability for p in predictions], probabilities[order], rtol=1e-4)


@pytest.mark.parametrize("top_k", [1, 5, 7])
def test_softmax_by_hand(model: Classifier, pictures: list[Path], top_k: int):
    for file in (pictures[0], pictures[6]):
        predictions = model.predict(file, top_k)
        assert len(predictions) == top_k
        assert close(predictions, by_hand(model, file))
        assert [p.class_name for p in predictions] == [NAMES[p.class_index] for p in predictions]


def test_more_than_there_are(model: Classifier, pictures: list[Path]):
    predictions = model.predict(pictures[0], top_k=1000)
    assert sorted(p.class_index for p in predictions) == list(range(7))
    assert sum(p.probability for p in predictions) == pytest.approx(1)


def test_one_picture_however_it_comes(model: Classifier, pictures: list[Path]):
    image = Image.open(pictures[0])
    expected = model.preprocess(pictures[0])
    assert expected.shape == (1, 3, 37, 37)
    for picture in (str(pictures[0]), image, np.asarray(image)):
        assert model.preprocess(picture).equal(expected)
        assert model.preprocess([pictures[1], picture])[1:].equal(expected)


def test_nothing_to_preprocess(model: Classifier):
    with pytest.raises(ValueError, match="no pictures"):
        model.preprocess([])


def test_pixels_have_the_type_of_the_network(model: Classifier, pictures: list[Path]):
    half = Classifier("xxs", num_classes=7).bfloat16()
    assert half.preprocess(pictures[0]).dtype == torch.bfloat16
    assert sum(p.probability for p in half.eval().predict(pictures[0], top_k=7)) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_many_are_each_alone(model: Classifier, pictures: list[Path], batch_size: int):
    shuffled = [pictures[i] for i in (5, 0, 3, 6, 2, 1, 4, 5)]
    results = list(predict_pictures(model, shuffled, top_k=3, batch_size=batch_size))
    assert [path for path, _ in results] == shuffled
    for path, result in results:
        if path == pictures[3]:
            assert isinstance(result, PictureError)
            assert str(result).startswith(f"{path}: damaged picture")
        else:
            assert isinstance(result, list)
            assert len(result) == 3
            assert close(result, by_hand(model, path))


def test_none_can_be_read(model: Classifier, pictures: list[Path], tmp_path: Path):
    missing = tmp_path / "missing.png"
    results = list(predict_pictures(model, [pictures[3], missing, tmp_path], batch_size=2))
    assert [path for path, _ in results] == [pictures[3], missing, tmp_path]
    assert all(isinstance(result, PictureError) for _, result in results)
    assert list(predict_pictures(model, [])) == []


def test_refused(model: Classifier, pictures: list[Path]):
    with pytest.raises(ValueError, match="top_k is 0"):
        model.predict(pictures[0], top_k=0)
    with pytest.raises(ValueError, match="batch size is 0"):
        list(predict_pictures(model, pictures, batch_size=0))
    with pytest.raises(PictureError, match=r"3\.png"):
        model.predict(pictures[3])
    with pytest.raises(ValueError, match="no classifier"):
        Classifier("xxs", num_classes=0).eval().predict(pictures[0])
    with pytest.raises(RuntimeError, match=r"model\.eval\(\)"):
        Classifier("xxs", num_classes=7).train().predict(pictures[0])


# ---------------------------------------------------------------------------------------------------------------------
# Save and load


FILES: dict[Format, str] = {"mobilevit": "a.safetensors", "apple": "a.pt", "timm": "a.safetensors", "transformers": "a"}


@pytest.mark.parametrize("format", FORMATS)
def test_there_and_back(model: Classifier, pictures: list[Path], tmp_path: Path, format: Format):
    other = Classifier("xxs", num_classes=7).eval()
    other.load_state_dict(model.state_dict())
    other.class_names, other.preprocessing = NAMES, PREPROCESSING
    if format == "transformers":  # which does not normalise
        other.preprocessing = replace(PREPROCESSING, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    save(other, tmp_path / FILES[format], format)
    loaded = load(tmp_path / FILES[format])
    assert not loaded.training
    pixels = torch.rand(2, 3, 64, 57)
    assert loaded(pixels).equal(other(pixels))
    if format == "apple":  # which has no place for names and preprocessing
        assert loaded.preprocessing == PAPER_PREPROCESSING
        assert loaded.predict(pictures[0], top_k=1)[0].class_name.startswith("class ")
    else:
        assert loaded.preprocessing == other.preprocessing
        assert loaded.predict(pictures[0]) == other.predict(pictures[0])


def test_refused_whole(tmp_path: Path):
    stride_8 = Classifier("xxs", num_classes=3, output_stride=8)
    wrong: dict[Format, str] = {"mobilevit": "a.pt", "apple": "a.pt", "timm": "a.safetensors", "transformers": "a.bin"}
    for format, name in wrong.items():
        with pytest.raises(WeightsError, match=r"ends in|output stride is 8|is a folder"):
            save(stride_8, tmp_path / name, format)
    assert list(tmp_path.iterdir()) == []


def test_plain_network(tmp_path: Path, pictures: list[Path]):
    save(MobileViT(XXS, num_classes=3).eval(), tmp_path / "plain.safetensors")
    loaded = load(tmp_path / "plain.safetensors")
    assert {p.class_name for p in loaded.predict(pictures[0])} == {"class 0", "class 1", "class 2"}
    with pytest.raises(WeightsError, match=r"3 classes, expected 5.*reset_classifier\(5\)"):
        load(tmp_path / "plain.safetensors", num_classes=5)


def test_network_without_classifier(tmp_path: Path):
    save(Classifier("xxs", num_classes=0), tmp_path / "features.safetensors")
    loaded = load(tmp_path / "features.safetensors")
    assert loaded.num_classes == 0
    assert loaded(torch.rand(1, 3, 33, 32)).shape == (1, 320)


def test_a_new_classifier_has_no_old_names(model: Classifier, pictures: list[Path], tmp_path: Path):
    save(model, tmp_path / "seven.safetensors")
    other = load(tmp_path / "seven.safetensors")
    other.reset_classifier(2)
    assert {p.class_name for p in other.predict(pictures[0])} == {"class 0", "class 1"}
    save(other, tmp_path / "two.safetensors")
    assert load(tmp_path / "two.safetensors").class_names == ()


# ---------------------------------------------------------------------------------------------------------------------
# Find


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (
        "b.JPG",
        "a.png",
        "deep/er/c.webp",
        "notes.txt",
        "paper.pdf",
        "._a.png",
        ".trash/d.png",
        "[1].png",
        "~e.png",
        "other/z.png",
        "empty/readme",
    ):
        file = tmp_path / "photos" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    monkeypatch.chdir(tmp_path / "photos")
    return tmp_path / "photos"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["."], ["[1].png", "a.png", "b.JPG", "deep/er/c.webp", "other/z.png", "~e.png"]),
        (["other", "a.png", "deep"], ["other/z.png", "a.png", "deep/er/c.webp"]),
        (["b.JPG", "a.png", "./b.JPG", "*.png"], ["b.JPG", "a.png", "[1].png", "~e.png"]),
        (["**/*.webp", "other/[a-z].png"], ["deep/er/c.webp", "other/z.png"]),
        (["[1].png", "~e.png"], ["[1].png", "~e.png"]),
        (["notes.txt", ".trash"], ["notes.txt", ".trash/d.png"]),  # named, so meant
    ],
    ids=str,
)
def test_find(folder: Path, names: list[str], expected: list[str]):
    assert find_pictures(names) == [Path(name) for name in expected]
    # Absolute names find the same files.
    absolute = find_pictures([os.path.join(folder, name) for name in names])  # noqa: PTH118 - as typed, "." and all
    assert absolute == [folder / name for name in expected]


@pytest.mark.parametrize("name", ["missing.png", "missing/", "*.gif", "empty", "~nobody/a.png"])
def test_find_nothing(folder: Path, name: str):
    with pytest.raises(ValueError, match=r"no pictures in this folder|no such picture") as caught:
        find_pictures(["a.png", name])
    assert str(caught.value).startswith(f"{name}: ")


def test_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(folder))
    assert find_pictures(["~/a.png", "~/oth*/*"]) == [folder / "a.png", folder / "other/z.png"]


def test_one_picture_or_several(model: Classifier, pictures: list[Path]):
    whole = [picture for picture in pictures if picture.name != "3.png"]
    one_by_one = [model.predict(picture, top_k=2) for picture in whole]
    for several in (whole, tuple(whole)):
        together = model.predict(several, top_k=2)
        assert [[p.class_name for p in row] for row in together] == [[p.class_name for p in row] for row in one_by_one]
    for wrong in (torch.rand(3, 64, 64), b"bytes", 7):
        with pytest.raises(TypeError, match=f"found {type(wrong).__name__}; a picture is a path"):
            model.predict(wrong)  # pyright: ignore[reportCallIssue, reportArgumentType]


def test_pretrained_backbone(model: Classifier, tmp_path: Path):
    save(model, tmp_path / "whole.safetensors")
    backbone = load_backbone(tmp_path / "whole.safetensors", out_stages="stage3")
    assert not hasattr(backbone, "stage4")
    seen = []
    model.backbone.stage3.register_forward_hook(lambda module, inputs, output: seen.append(output))  # pyright: ignore
    x = torch.rand(1, 3, 70, 64)
    with torch.no_grad():
        model(x)
        assert torch.equal(backbone(x)["stage3"], seen[0])
    at_8 = load_backbone(tmp_path / "whole.safetensors", output_stride=8)
    assert (
        at_8.strides["stage5"] == load(tmp_path / "whole.safetensors", output_stride=8).backbone.strides["stage5"] == 8
    )
