"""`mobilevit inspect`."""

import json
from pathlib import Path

import pytest
from PIL import Image

from command_line import check_refused, run


def test_inspect(capsys: pytest.CaptureFixture[str], here: Path):
    Image.open("classes/x/0.png").save("classes/y/copy.bmp")
    (here / "classes/y/bad.png").write_bytes(b"no image")
    assert run("inspect classes --num-threads 1") == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert ["x", "3"] in rows
    assert ["y", "4"] in rows
    assert ["all", "8"] in rows
    assert ["exact", "duplicates", "1", "2", "all/x/0.png,", "all/y/copy.bmp"] in rows
    assert ["unreadable", "1", "all/y/bad.png"] in rows
    assert ["modes:", "RGB", "7"] in rows
    page = (here / "inspection.html").read_text()
    assert "Copies with different classes" in page
    assert "inspection.html: " in out


def test_json_and_exit_code(capsys: pytest.CaptureFixture[str], here: Path):
    assert run("inspect classes --json --fail-on duplicates leaks unreadable") == 0
    assert json.loads(capsys.readouterr().out)["counts"]["exact_duplicates"] == 0
    assert not (here / "inspection.html").exists()
    Image.open("classes/x/0.png").save("classes/x/copy.bmp")
    assert run("inspect classes --json --out found.html --fail-on duplicates leaks") == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["counts"]["exact_duplicates"] == 1
    assert "classes: found duplicates" in err
    assert (here / "found.html").exists()
    assert run("inspect classes --json --fail-on leaks") == 0


def test_refused(capsys: pytest.CaptureFixture[str], here: Path):
    check_refused(capsys, "inspect nowhere", "nowhere folder")
    check_refused(capsys, "inspect classes --near -1", "--near -1 0")
    check_refused(capsys, "inspect classes --out page.txt", "page.txt .html")
    check_refused(capsys, "inspect classes --fail-on label-errors", "--fail-on label-errors WEIGHTS")
    check_refused(capsys, "inspect classes --fail-on everything", "--fail-on everything leaks")
    check_refused(capsys, "inspect classes --task detect", "classes COCO VOC")
    check_refused(capsys, "inspect classes missing.safetensors", "missing.safetensors")
    check_refused(capsys, "inspect classes xyz.safetensors --num-workers 0", "WEIGHTS 5")
    check_refused(capsys, "inspect classes detector.safetensors", "detect classifier")
    assert not (here / "inspection.html").exists()
