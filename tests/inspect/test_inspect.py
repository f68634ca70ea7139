"""`mobilevit.inspect_data` with planted faults, for the formats of datasets."""

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import mobilevit
from mobilevit.images import Preprocessing
from mobilevit.inspect import Inspection, inspect_data
from mobilevit.inspect.page import render_page
from mobilevit.predict import Classifier, Detector, save
from small_networks import randomize


def image(seed: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    """A smooth random image; images of different seeds are not alike."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def save_image(one: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    one.save(path)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """train/ and val/ with the classes a and b: one fault of each kind."""
    for i in range(6):
        save_image(image(i), tmp_path / f"train/{'ab'[i % 2]}/{i}.png")
        save_image(image(10 + i), tmp_path / f"val/{'ab'[i % 2]}/{i}.png")
    save_image(image(0), tmp_path / "train/a/equal.bmp")
    save_image(image(3, (80, 64)).convert("RGB"), tmp_path / "val/b/near.jpg")  # of train/b/3.png
    save_image(image(12), tmp_path / "val/b/wrong.webp")  # lossy copy of val/a/2.png
    damaged = tmp_path / "train/b/damaged.png"
    image(20).save(damaged)
    damaged.write_bytes(damaged.read_bytes()[:200])
    return tmp_path


def test_class_folders(folders: Path):
    found = inspect_data(folders)
    assert found.counts() == {
        "unreadable": 1,
        "unlabeled": 0,
        "exact_duplicates": 1,
        "near_duplicates": 2,
        "leaks": 1,
        "class_overlaps": 1,
    }
    values = json.loads(json.dumps(found.to_dict()))
    assert values["num_images"] == {"train": 8, "val": 8}
    assert values["classes"] == [
        {"class": "a", "num_images": {"train": 4, "val": 3}},
        {"class": "b", "num_images": {"train": 3, "val": 5}},
    ]
    assert values["sizes"]["width_px"] == [40, 40, 40, 40, 80]
    assert values["sizes"]["aspect_ratio"] == [1.25] * 5
    assert values["formats"] == {"PNG": 12, "BMP": 1, "JPEG": 1, "WEBP": 1}
    assert values["modes"] == {"RGB": 15}
    (damaged,) = values["unreadable"]
    assert (damaged["split"], damaged["image"]) == ("train", "train/b/damaged.png")
    assert "damaged image" in damaged["error"]
    groups = {
        tuple(sorted(f"{one['image']}:{one['label']}" for one in group["images"])): group
        for group in values["duplicates"]
    }
    equal = groups["train/a/0.png:a", "train/a/equal.bmp:a"]
    leak = groups["train/b/3.png:b", "val/b/near.jpg:b"]
    overlap = groups["val/a/2.png:a", "val/b/wrong.webp:b"]
    assert (equal["difference"], equal["is_leak"], equal["has_class_overlap"]) == (None, False, False)
    assert 0 < leak["difference"] <= 4
    assert (leak["is_leak"], leak["has_class_overlap"]) == (True, False)
    assert (overlap["is_leak"], overlap["has_class_overlap"]) == (False, True)
    exact = inspect_data(folders, near=0, num_threads=1)
    assert exact.counts() == found.counts() | {"near_duplicates": 0, "leaks": 0, "class_overlaps": 0}


def test_page(folders: Path):
    page = render_page(inspect_data(folders))
    for text in ("Leaks across splits", "train/b/3.png", "val/b/near.jpg", "Copies with different classes", "damaged"):
        assert text in page
    assert page.count('<img src="data:image/jpeg;base64,') == 6
    assert "http" not in page.replace("http-equiv", "")
    assert inspect_data.__module__ == "mobilevit.inspect"
    assert mobilevit.inspect_data is inspect_data


def of_table(folder: Path) -> Path:
    for i in range(4):
        save_image(image(i % 3), folder / f"{i}.png")
    file = folder / "labels.csv"
    file.write_text("path,label,split\n0.png,cat,train\n1.png,dog,train\n2.png,dog,val\n3.png,cat,val\n")
    return file


def of_idx(folder: Path) -> Path:
    pixels = np.stack([np.asarray(image(i % 3, (28, 28)).convert("L")) for i in range(4)])
    for prefix, order in (("train", [0, 1]), ("t10k", [2, 3])):
        for name, array in (("images-idx3", pixels[order]), ("labels-idx1", np.array([0, 1], np.uint8)[[0, 1]])):
            head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
            (folder / f"{prefix}-{name}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))
    (folder / "classes.txt").write_text("cat\ndog\n")
    return folder


def of_tar(folder: Path) -> Path:
    for split, order in (("train", [0, 1]), ("val", [2, 0])):
        with tarfile.open(folder / f"{split}-0.tar", "w") as tar:
            for k, i in enumerate(order):
                content = io.BytesIO()
                image(i).save(content, "PNG")
                for name, data in ((f"{k}.png", content.getvalue()), (f"{k}.cls", b"cat" if i == 0 else b"dog")):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


def of_coco(folder: Path) -> Path:
    for split, order in (("train", [0, 1]), ("val", [2, 0])):
        images = [{"id": k, "file_name": f"{i}.png", "width": 40, "height": 32} for k, i in enumerate(order)]
        boxes = [{"id": k, "image_id": k // 2, "category_id": 1 + k // 2, "bbox": [1, 1, 9, 9]} for k in range(4)]
        categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
        for i in order:
            save_image(image(i), folder / split / f"{i}.png")
        content = {"images": images, "annotations": boxes, "categories": categories}
        (folder / split / "_annotations.coco.json").write_text(json.dumps(content))
    return folder


def of_masks(folder: Path) -> Path:
    for split, order in (("train", [0, 1]), ("val", [2, 0])):
        for i in order:
            save_image(image(i), folder / split / "images" / f"{i}.png")
            mask = Image.new("L", (40, 32), 0)
            mask.paste(1, (0, 0, 9, 9))
            save_image(mask, folder / split / "masks" / f"{i}.png")
    (folder / "classes.txt").write_text("cat\ndog\n")
    return folder


@pytest.mark.parametrize(
    ("make", "task"),
    [(of_table, "classify"), (of_idx, "classify"), (of_tar, "classify"), (of_coco, "detect"), (of_masks, "segment")],
)
def test_formats(make: Callable[[Path], Path], task: str, tmp_path: Path):
    """Two splits of two images each; the first image of train is also in the other split."""
    found = inspect_data(make(tmp_path))
    assert found.collection.task == task
    values: dict[str, Any] = found.to_dict()
    assert list(values["num_images"].values()) == [2, 2]
    assert [one["class"] for one in values["classes"]] == ["cat", "dog"]
    assert found.counts()["leaks"] == 1
    assert found.counts()["exact_duplicates"] == 1
    if task == "detect":
        assert values["classes"][0]["num_boxes"] == {"train": 2, "val": 2}
    if task == "segment":
        assert values["classes"][1]["num_images"] == {"train": 2, "val": 2}
    assert "Leaks across splits" in render_page(found)


def test_damaged_annotations(tmp_path: Path):
    Image.new("L", (40, 31), 0).save(of_masks(tmp_path) / "train/masks/1.png")
    (error,) = inspect_data(tmp_path).to_dict()["unreadable"]
    assert error["image"] == "train/images/1.png"
    assert "40 x 31 px, but its image has 40 x 32" in error["error"]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Inspection]:
    """Two classes of different brightness, 30 images each; three labels are wrong; a third class has two images."""
    folder = tmp_path_factory.mktemp("planted")
    random = np.random.default_rng(0)
    for i in range(60):
        is_bright = i % 2
        pixels = random.normal(70 + 110 * is_bright, 12, (33, 40, 3)) + random.normal(0, 25, 3)
        label = is_bright if i >= 3 else 1 - is_bright
        one = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        save_image(one, folder / f"data/{('dark', 'bright')[label]}/{i}.png")
    for i in range(2):
        save_image(image(i), folder / f"data/rare/{i}.png")
    model = randomize(Classifier("xxs", num_classes=0))
    model.preprocessing = Preprocessing(resize_px=36, crop_px=32)
    save(model, folder / "w.safetensors")
    return folder, inspect_data(folder / "data", folder / "w.safetensors")


def test_label_errors(planted: tuple[Path, Inspection]):
    _, found = planted
    check = found.label_check
    assert check is not None
    assert check.skipped == ("rare",)
    assert check.accuracy > 85
    c = found.collection
    wrong = {c.key(error.image): error.predicted for error in check.errors}
    assert {"bright/0.png", "dark/1.png", "bright/2.png"} <= set(wrong)
    assert (wrong["bright/0.png"], wrong["dark/1.png"]) == ("dark", "bright")
    assert len(wrong) <= 8
    first = found.to_dict()["label_errors"][0]
    assert first["label_probability"] < 0.5 < first["probability"] <= 1
    assert "Likely label errors" in render_page(found)


def test_label_errors_do_not_depend_on_the_batch_size(planted: tuple[Path, Inspection]):
    folder, found = planted
    options = mobilevit.embed.EmbedOptions(batch_size=7)
    again = inspect_data(folder / "data", folder / "w.safetensors", options=options)
    assert found.label_check is not None
    assert again.label_check is not None
    assert [error.image for error in again.label_check.errors] == [error.image for error in found.label_check.errors]


def test_errors(tmp_path: Path, planted: tuple[Path, Inspection]):
    folder, _ = planted
    with pytest.raises(ValueError, match=r"nowhere: no such folder"):
        inspect_data(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"near is -1; it must be 0 or more"):
        inspect_data(folder / "data", near=-1)
    with pytest.raises(ValueError, match=r"task detect, but label errors .*leave out WEIGHTS"):
        inspect_data(of_coco(tmp_path), folder / "w.safetensors")
    save(randomize(Detector("xxs", num_classes=2)), tmp_path / "detector.safetensors")
    with pytest.raises(ValueError, match=r"task 'detect' .*classifier"):
        inspect_data(folder / "data", tmp_path / "detector.safetensors")
    few = tmp_path / "few"
    for i in range(6):
        save_image(image(i), few / "ab"[i % 2] / f"{i}.png")
    with pytest.raises(ValueError, match=r"0 classes have 5 different images or more.*leave out WEIGHTS"):
        inspect_data(few, folder / "w.safetensors")
