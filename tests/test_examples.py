"""The example with the digits, on a few of them."""

import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

import mobilevit

DIGITS = Path(__file__).resolve().parents[1] / "examples" / "digits.py"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names in the example, cut to 60 digits and two epochs."""
    names = runpy.run_path(str(DIGITS))["main"].__globals__
    pixels, labels = load_digits(return_X_y=True)
    names["load_digits"] = lambda return_X_y: (pixels[:60], labels[:60])
    names["RECIPES"] = {"tiny": replace(names["RECIPES"]["tiny"], epochs=2)}
    return names


def test_pictures_are_the_digits_and_every_third_is_for_testing(example, tmp_path: Path):
    example["write_pictures"](tmp_path)
    files = {file.name: file for file in tmp_path.rglob("*.png")}
    assert sorted(files) == [f"{i:04}.png" for i in range(60)]
    images, labels = load_digits(return_X_y=True)
    for i in range(60):
        file = files[f"{i:04}.png"]
        assert file.relative_to(tmp_path).parts[:2] == ("train" if i % 3 < 2 else "test", str(labels[i]))
        with Image.open(file) as picture:
            assert picture.mode == "L"
            assert np.abs(np.asarray(picture) - images[i].reshape(8, 8) * 255 / 16).max() <= 0.5


def test_the_sheet_is_green_where_right_and_red_where_wrong(example, tmp_path: Path):
    example["write_pictures"](tmp_path)
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
        seen = {"green": (green > red + 50).any(), "red": (red > green + 50).any()}
        assert seen == {"green": i < 10, "red": i == 10}, i
    with Image.open(files[3]) as digit:  # each of its pixels is 8 on the sheet
        assert np.array_equal(pixels[8:68:8, 3 * 96 + 20 : 3 * 96 + 80 : 8, 0], np.asarray(digit))


def test_from_digits_to_weights_and_again(example, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "digits"
    out.mkdir()  # an empty folder may be there
    for _ in range(2):
        example["main"](out)
        assert "of 20 digits never trained on" in capsys.readouterr().out
        (out / "old").touch()
    assert {file.name for file in out.iterdir()} == {
        *(".lock", "best.safetensors", "checkpoints", "data", "metrics.jsonl", "model.safetensors", "old"),
        *("predictions.png", "raw.safetensors", "report.html", "run.json", "steps.jsonl"),
    }
    assert mobilevit.load(out / "model.safetensors").class_names == tuple("0123456789")


def test_a_folder_with_anything_else_is_not_replaced(example, tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(SystemExit, match="holds something else"):
        example["main"](tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "precious"
