"""`mobilevit convert`."""

from pathlib import Path

import pytest

from command_line import check_refused, files_in, run
from mobilevit.predict import load, save
from mobilevit.weights import Calibration, read


@pytest.mark.parametrize(
    ("to", "target", "files"),
    [
        ("mobilevit", "new/a.safetensors", {"new/a.safetensors"}),
        ("timm", "a.safetensors", {"a.safetensors"}),
        ("apple", "a.pt", {"a.pt"}),
        ("transformers", "a", {"a/config.json", "a/preprocessor_config.json", "a/model.safetensors"}),
    ],
)
def test_convert(capsys: pytest.CaptureFixture[str], here: Path, to: str, target: str, files: set[str]):
    before = files_in(here)
    convert = f"convert classifier.safetensors {target} --to {to}"
    assert run(convert) == 0
    assert capsys.readouterr().out.startswith(f"{target}: MobileViT-XXS, 3 classes, {to}")
    assert files_in(here) - before == files
    original, converted = read("classifier.safetensors"), read(target)
    assert all(converted.tensors[key].equal(tensor) for key, tensor in original.tensors.items())

    stamps = {file: (here / file).stat().st_mtime_ns for file in files}
    check_refused(capsys, convert, f"{target} exists --overwrite")
    assert stamps == {file: (here / file).stat().st_mtime_ns for file in files}
    assert run(f"{convert} --overwrite") == 0
    assert files_in(here) - before == files


def test_calibration(capsys: pytest.CaptureFixture[str], here: Path):
    """It is converted, too, except to Apple's format, which has no place for it."""
    model = load("classifier.safetensors")
    model.calibration = Calibration(1.5)
    save(model, here / "calibrated.safetensors")
    assert run("convert calibrated.safetensors folder --to transformers") == 0
    assert run("convert folder back.safetensors") == 0
    assert read("back.safetensors").calibration == Calibration(1.5)
    assert run("info back.safetensors") == 0
    out, err = capsys.readouterr()
    assert "temperature 1.5" in out
    assert err == ""
    assert run("convert calibrated.safetensors a.pt --to apple") == 0
    assert "a.pt: without the calibration of calibrated.safetensors" in capsys.readouterr().err


MISTAKES = {
    "a.pt": "a.pt .safetensors",
    "a.safetensors --to apple": "a.safetensors .pt",
    "a.safetensors --to transformers": "a.safetensors folder",
    "photos/a.png/a.safetensors": "photos/a.png",
    "folder.safetensors --overwrite": "folder.safetensors directory",
    "mine.safetensors": "mine.safetensors exists --overwrite",
    "~/mine.safetensors": "mine.safetensors exists --overwrite",
}


@pytest.mark.parametrize(("args", "facts"), MISTAKES.items())
def test_mistakes(
    capsys: pytest.CaptureFixture[str], here: Path, monkeypatch: pytest.MonkeyPatch, args: str, facts: str
):
    (here / "folder.safetensors").mkdir()
    (here / "mine.safetensors").write_text("precious")
    monkeypatch.setenv("HOME", str(here))
    before = files_in(here)
    check_refused(capsys, f"convert classifier.safetensors {args}", facts)
    check_refused(capsys, "convert missing.pt a.safetensors", "missing.pt: no such file")
    assert files_in(here) == before
    assert (here / "mine.safetensors").read_text() == "precious"
