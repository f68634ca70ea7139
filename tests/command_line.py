"""Calls of the command line in this process, and a working folder with images and weights."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mobilevit.cli import main
from mobilevit.images import Preprocessing
from mobilevit.models.deeplabv3 import DeepLabHead
from mobilevit.predict import Classifier, Detector, Segmenter, save
from small_networks import randomize

# Class names of the test weights. They look like the markup of a terminal library.
CLASS_NAMES = ("[bold]ant[/bold]", ":bee:", "cat [/]")


def run(*args: str) -> int:
    """The exit code of a command, such as run("predict a.safetensors photos") or run("predict", weights, "photos")."""
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(args[0]) if len(args) == 1 else list(args))
    assert isinstance(stop.value.code, int)
    return stop.value.code


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The error message of a command with exit code 2: one line of ours, or a box of tyro, on standard error."""
    capsys.readouterr()
    assert run(*args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    if not err.startswith("mobilevit: "):
        return " ".join(re.sub("[╭╮╰╯│─]|---+", " ", err).split())
    assert re.fullmatch(r"mobilevit: \S.*\n", err), err
    return err


def check_refused(capsys: pytest.CaptureFixture[str], command: str, facts: str) -> None:
    """The error message of `command` contains each of the words `facts`: the file or option, the value, the fix."""
    message = refused(capsys, command)
    assert not [fact for fact in facts.split() if fact not in message], message


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def weights_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small networks with random weights; the detector has detections of each class at scores from 0.3 to 0.9."""
    folder = tmp_path_factory.mktemp("weights")
    classifier = randomize(Classifier("xxs", num_classes=3))
    classifier.class_names, classifier.preprocessing = CLASS_NAMES, Preprocessing(resize_px=36, crop_px=32)
    save(classifier, folder / "classifier.safetensors")
    classifier.class_names = ("x", "y", "z")
    save(classifier, folder / "xyz.safetensors")
    detector = randomize(Detector("xxs", num_classes=3))
    detector.class_names, detector.category_ids = CLASS_NAMES, (3, 44, 90)
    segmenter = randomize(Segmenter("xxs", num_classes=4, head=DeepLabHead(channels=16)))
    segmenter.class_names = ("background", *CLASS_NAMES)
    for model, name in ((detector, "detector"), (segmenter, "segmenter")):
        model.preprocessing = Preprocessing(resize_px=(64, 64), crop_px=64)
        save(model, folder / f"{name}.safetensors")
    return folder


@pytest.fixture
def here(tmp_path: Path, weights_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: weights; photos/ with three intact images and a damaged one; classes/ with x/ and y/."""
    random = np.random.default_rng(0)
    photos = ["photos/a.png", "photos/[old]/b.png", "photos/d.jpg"]
    for name in [*photos, *(f"classes/{label}/{i}.png" for label in "xy" for i in range(3))]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (40, 33, 3), dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "photos/c.png").write_bytes((tmp_path / "photos/a.png").read_bytes()[:500])
    for file in weights_folder.iterdir():
        (tmp_path / file.name).hardlink_to(file)
    monkeypatch.chdir(tmp_path)
    return tmp_path
