"""`mobilevit explain`."""

import re
from pathlib import Path

import pytest

from command_line import check_refused, files_in, run
from mobilevit.predict import load


def test_explain(capsys: pytest.CaptureFixture[str], here: Path):
    before = files_in(here)
    assert run("explain classifier.safetensors photos/a.png --at 10 20 --class :BEE: --out why/a.png") == 0
    out = capsys.readouterr().out
    assert files_in(here) - before == {"why/a.png"}
    first, *_ = load("classifier.safetensors").predict(here / "photos/a.png")
    rows = [line.split() for line in out.splitlines() if line.rstrip().endswith("%")]
    assert rows[0][0] == ":bee:"  # the chosen class, then the most probable
    assert [*first.class_name.split(), f"{100 * first.probability:.1f}", "%"] in rows
    assert re.search(r"^Stage 3: .* 100\.0 % of the pixels$", out, re.MULTILINE)
    assert re.search(r"^why/a\.png: \d+\.\d MB$", out, re.MULTILINE)
    assert run("explain segmenter.safetensors photos/d.jpg --size 96") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("Stage 2: ")  # no classes
    assert files_in(here) - before == {"why/a.png", "explanation.html"}
    assert "96 \u00d7 96" in (here / "explanation.html").read_text(encoding="utf-8")


MISTAKES = {
    "classifier.safetensors missing.png": "missing.png: no such file",
    "classifier.safetensors photos": "photos: is a directory",
    "classifier.safetensors photos/c.png": "photos/c.png damaged image",
    "classifier.safetensors classifier.safetensors": "classifier.safetensors not an image",
    "missing.safetensors photos/a.png": "missing.safetensors: no such file",
    "classifier.safetensors photos/a.png --out a.jpg": "a.jpg .html .png",
    "classifier.safetensors photos/a.png --out photos": "photos suffix",
    "classifier.safetensors photos/a.png --out photos/a.png": "photos/a.png input image",
    "classifier.safetensors photos/a.png --class bee": "'bee' 3 [bold]ant",
    "detector.safetensors photos/a.png --class :bee:": "--class ':bee:' detect",
    "classifier.safetensors photos/a.png --at 33 0": "33 0 from 2 to 30",
    "classifier.safetensors photos/a.png --size 31": "--size 31; 32",
    "classifier.safetensors photos/a.png --device toaster": "'toaster'",
}


@pytest.mark.parametrize(("args", "facts"), MISTAKES.items())
def test_mistakes(capsys: pytest.CaptureFixture[str], here: Path, args: str, facts: str):
    before = files_in(here)
    check_refused(capsys, f"explain {args}", facts)
    assert files_in(here) == before
