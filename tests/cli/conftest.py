"""A working folder with images and weights for tests of the command line."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from command_line import CLASS_NAMES
from conftest import randomise
from mobilevit.images import Preprocessing
from mobilevit.models.deeplabv3 import DeepLabHead
from mobilevit.predict import Classifier, Detector, Segmenter, save


@pytest.fixture(scope="session")
def weights_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small networks with random weights; the detector has detections of each class at scores from 0.3 to 0.9."""
    folder = tmp_path_factory.mktemp("weights")
    classifier = randomise(Classifier("xxs", num_classes=3))
    classifier.class_names, classifier.preprocessing = CLASS_NAMES, Preprocessing(resize_px=36, crop_px=32)
    save(classifier, folder / "classifier.safetensors")
    classifier.class_names = ("x", "y", "z")
    save(classifier, folder / "xyz.safetensors")
    detector = randomise(Detector("xxs", num_classes=3))
    detector.class_names, detector.category_ids = CLASS_NAMES, (3, 44, 90)
    segmenter = randomise(Segmenter("xxs", num_classes=4, head=DeepLabHead(channels=16)))
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
