"""The examples, on a few images."""

import io
import json
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

import mobilevit
from mobilevit.data.checks import check_images
from mobilevit.data.sources import find_splits

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
DIGITS, STAMPS = EXAMPLES / "digits.py", EXAMPLES / "stamps.py"
TUXPAINT = Path("/usr/share/tuxpaint/stamps")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names in the example, with 60 digits and two epochs."""
    names = runpy.run_path(str(DIGITS))["main"].__globals__
    pixels, labels = load_digits(return_X_y=True)
    names["load_digits"] = lambda return_X_y: (pixels[:60], labels[:60])
    names["RECIPES"] = {"tiny": replace(names["RECIPES"]["tiny"], epochs=2)}
    return names


def test_digit_files(example, tmp_path: Path):
    example["write_images"](tmp_path)
    files = {file.name: file for file in tmp_path.rglob("*.png")}
    assert sorted(files) == [f"{i:04}.png" for i in range(60)]
    images, labels = load_digits(return_X_y=True)
    for i in range(60):
        file = files[f"{i:04}.png"]
        assert file.relative_to(tmp_path).parts[:2] == ("train" if i % 3 < 2 else "test", str(labels[i]))
        with Image.open(file) as image:
            assert image.mode == "L"
            assert np.abs(np.asarray(image) - images[i].reshape(8, 8) * 255 / 16).max() <= 0.5


def test_sheet_marks_correct_and_wrong_predictions(example, tmp_path: Path):
    example["write_images"](tmp_path)
    files = sorted(tmp_path.rglob("*.png"))[:11]
    predictions = [(file, file.parent.name, 0.9) for file in files]
    predictions[10] = (files[10], "9" if files[10].parent.name != "9" else "8", 0.5)
    example["draw"](predictions, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (960, 192)
        pixels = np.asarray(sheet).astype(int)
    for i in range(12):
        x, y = i % 10 * 96, i // 10 * 96
        red, green, _ = np.moveaxis(pixels[y : y + 96, x : x + 96], 2, 0)
        colors = {"green": (green > red + 50).any(), "red": (red > green + 50).any()}
        assert colors == {"green": i < 10, "red": i == 10}, i
    with Image.open(files[3]) as digit:  # each pixel is 8 x 8 px on the sheet
        assert np.array_equal(pixels[8:68:8, 3 * 96 + 20 : 3 * 96 + 80 : 8, 0], np.asarray(digit))


def test_digits_example_runs_twice(example, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "digits"
    out.mkdir()  # an empty folder is accepted
    for _ in range(2):
        example["main"](out)
        assert "of 20 test digits" in capsys.readouterr().out
        (out / "old").touch()
    assert {file.name for file in out.iterdir()} == {
        *(".lock", "best.safetensors", "checkpoints", "data", "metrics.jsonl", "model.safetensors", "old"),
        *("predictions.png", "raw.safetensors", "report.html", "run.json", "steps.jsonl"),
    }
    assert mobilevit.load(out / "model.safetensors").class_names == tuple("0123456789")


@pytest.mark.parametrize(("script", "arguments"), [(DIGITS, ()), (STAMPS, (1, 1, 0, 320))], ids=["digits", "stamps"])
def test_other_folders_are_not_deleted(tmp_path: Path, script: Path, arguments: tuple[int, ...]):
    names = runpy.run_path(str(script))["main"].__globals__
    names["STAMPS"] = tmp_path
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(SystemExit, match="choose another folder"):
        names["main"](tmp_path, *arguments)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


# ---------------------------------------------------------------------------------------------------------------------
# Stamps

with_stamps = pytest.mark.skipif(not TUXPAINT.is_dir(), reason="tuxpaint-stamps-default is not installed")


def write_stamps(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    arguments = ("--num-train", "30", "--num-val", "5", *arguments)
    command = [sys.executable, str(STAMPS), str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def stamps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stamps") / "out"
    done = write_stamps(out)
    assert done.returncode == 0, done.stderr
    return out


def file_bytes(source: Any, index: int) -> bytes:
    return source[index].image.read_bytes()


@with_stamps
def test_coco_and_voc_layouts_agree(stamps: Path):
    ours, theirs = find_splits("detect", stamps, 0.5), find_splits("detect", stamps / "voc", 0.5)
    assert [len(source) for source in (*ours, *theirs)] == [30, 5, 30, 5]
    assert check_images(*ours, *theirs).unreadable == []
    for coco, voc in zip(ours, theirs, strict=True):
        for i in range(len(coco)):
            assert file_bytes(coco, i) == file_bytes(voc, i)
            a, b = coco.labels[i], voc.labels[i]
            assert np.array_equal(a.corners, b.corners)
            names = [[source.class_names[n] for n in x.labels] for source, x in ((coco, a), (voc, b))]
            assert names[0] == names[1]
            assert (a.areas <= b.areas).all()
            assert (a.areas > 0).all()


@with_stamps
def test_masks_of_stamps_are_inside_their_boxes(stamps: Path):
    boxes, masks = find_splits("detect", stamps / "voc", 0.5), find_splits("segment", stamps / "voc", 0.5)
    assert check_images(*masks).unreadable == []
    for of_boxes, of_masks in zip(boxes, masks, strict=True):
        for i in range(len(of_boxes)):
            with Image.open(io.BytesIO(file_bytes(of_masks, i))) as image:
                mask = of_masks.labels[i].read(*image.size)
            outside = mask.copy()
            box_classes = {of_boxes.class_names[n] for n in of_boxes.labels[i].labels}
            for x1, y1, x2, y2 in of_boxes.labels[i].corners.astype(int):
                outside[y1:y2, x1:x2] = 0
            assert set(np.unique(outside)) <= {0, 255}
            # Small objects may have only border pixels, but every class in the mask has a box.
            assert {of_masks.class_names[n] for n in np.unique(mask) if n not in (0, 255)} <= box_classes


@with_stamps
def test_train_and_val_have_different_photographs():
    found = runpy.run_path(str(STAMPS))["stamps"]()
    train, val = ({file for files in found[split].values() for file in files} for split in ("train", "val"))
    assert not train & val
    assert len({file.read_bytes() for file in train | val}) == len(train | val)
    for name in found["train"]:
        assert len(found["train"][name]) >= 9
        assert len(found["val"][name]) >= 3
    assert not any(part in ("cartoon", "toys") or "mirror" in part for file in train | val for part in file.parts)
    for file in train | val:
        with Image.open(file) as stamp:
            assert np.asarray(stamp.convert("RGBA"))[..., 3].min() < 128, file


@with_stamps
@pytest.mark.slow
def test_the_same_seed_writes_the_same_bytes(stamps: Path, tmp_path: Path):
    def contents(root: Path) -> dict[str, bytes]:
        return {file.relative_to(root).as_posix(): file.read_bytes() for file in root.rglob("*") if file.is_file()}

    for _ in range(2):  # the second run replaces the first
        assert write_stamps(tmp_path / "again").returncode == 0
    assert contents(tmp_path / "again") == contents(stamps)
    assert write_stamps(tmp_path / "other", "--seed", "1", "--size-px", "160").returncode == 0
    other = json.loads((tmp_path / "other" / "annotations" / "instances_train.json").read_text())
    assert all(160 <= max(image["width"], image["height"]) <= 240 for image in other["images"])
    # The crops depend on the seed.
    same, other_names = ({x for x in contents(at) if "crops/" not in x} for at in (stamps, tmp_path / "other"))
    assert same == other_names


def test_missing_stamps(tmp_path: Path):
    names = runpy.run_path(str(STAMPS))["main"].__globals__
    names["STAMPS"] = tmp_path / "missing"
    with pytest.raises(SystemExit, match=r"missing: no such folder; .* tuxpaint-stamps-default$"):
        names["main"](tmp_path / "out", 1, 1, 0, 320)
    assert not (tmp_path / "out").exists()
