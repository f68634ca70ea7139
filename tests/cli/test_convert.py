"""`mobilevit convert`."""

from pathlib import Path

import pytest

from command_line import check_refused, files_in, run
from mobilevit.weights import read


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
