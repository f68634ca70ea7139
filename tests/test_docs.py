"""The code in the documentation runs and prints the shown output; the figures can be drawn."""

import contextlib
import functools
import io
import json
import re
import runpy
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from mobilevit.images import Preprocessing

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
FIGURES = {"receptive_field.png": (1600, 700), "unfold.png": (1600, 540), "sampler.png": (1600, 1040)}
BLOCK = re.compile(r"^(?P<indent> *)```(?P<info>.*)\n(?P<body>(?:.*\n)*?)(?P=indent)``` *$", re.MULTILINE)


@functools.cache  # two tests use the same run
def run_page(text: str, name: str) -> dict[str, Any]:
    """Run the python blocks in one namespace and return it. A text block right after one must equal its output."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed, end = "", -1
    for block in BLOCK.finditer(text):
        language, *options = block["info"].split() or [""]
        if language == "python" and "no-run" not in options:
            lines_before = text.count("\n", 0, block.start("body"))  # so that a traceback names the line of the page
            code = compile("\n" * lines_before + dedent(block["body"]), name, "exec", dont_inherit=True)
            with contextlib.redirect_stdout(io.StringIO()) as stdout:
                exec(code, namespace)
            printed, end = stdout.getvalue(), block.end()
        elif language == "text" and end >= 0 and not text[end : block.start()].strip():
            assert dedent(block["body"]) == printed, (
                f"{name}: the text block does not show what the code before it prints"
            )
    return namespace


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
        assert "://" in target or (page.parent / target).is_file(), f"{page.name} shows {target}, which does not exist"
    monkeypatch.chdir(tmp_path)  # a page may write files
    run_page(text, str(page))


def test_a_wrong_page_fails():
    page = "```python\nx = 1\n```\nWords.\n```python\nprint(x)\n```\n\n```text\n{}\n```\n```python no-run\n1 / 0\n```\n"
    assert run_page(page.format(1), "right")["x"] == 1
    with pytest.raises(AssertionError, match="does not show"):
        run_page(page.format(2), "wrong output")
    with pytest.raises(ZeroDivisionError):
        run_page(page.format(1).replace(" no-run", ""), "wrong code")


def test_figures(tmp_path: Path):
    runpy.run_path(str(DOCS / "figures.py"))["main"](tmp_path)
    for folder in (tmp_path, DOCS / "figures"):  # drawn now, and stored in the repository
        assert {path.name for path in folder.iterdir()} == set(FIGURES)
        for name, size in FIGURES.items():
            assert (folder / name).stat().st_size < 150_000
            with Image.open(folder / name) as image:
                assert image.size == size
                grey = image.convert("L").histogram()
            assert 0.2 < grey[255] / sum(grey) < 0.8, f"{name} is blank or nearly so"


@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing(),
        Preprocessing(71, 64, "bicubic", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        Preprocessing((64, 64), 64),
    ],
    ids=["paper", "bicubic and normalised", "warped"],
)
def test_preprocessing_in_numpy(tmp_path: Path, preprocessing: Preprocessing):
    """The function on the page and the package return bit-identical results."""
    page = DOCS / "export.md"
    preprocess = run_page(page.read_text(encoding="utf-8"), str(page))["preprocess"]
    random = np.random.default_rng(0)
    for i, (mode, height, width) in enumerate(
        [("RGB", 301, 450), ("RGB", 411, 99), ("L", 77, 130), ("RGBA", 131, 97), ("P", 90, 91)]
    ):
        levels = random.integers(0, 256, (height // 8 + 1, width // 8 + 1, 4), dtype=np.uint8)
        image = Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC)
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = (1, 6, 3)[i % 3]
        image = image if mode == "RGBA" else image.convert("RGB").convert(mode)
        if mode == "P":
            image.info["transparency"] = 3
        file = tmp_path / f"{i}.png"
        image.save(file, exif=exif)
        arguments = json.loads(json.dumps(preprocessing.to_dict()))  # as in the metadata
        np.testing.assert_array_equal(preprocess(file, **arguments), preprocessing(file)[None].numpy())


def test_the_figure_and_the_page_have_the_same_receptive_fields():
    page = DOCS / "unfold_attend_fold.md"
    counted = run_page(page.read_text(encoding="utf-8"), str(page))["masks"]
    drawn = runpy.run_path(str(DOCS / "figures.py"))["receptive_fields"]()
    assert set(drawn) < set(counted)
    for name, mask in drawn.items():
        assert mask.equal(counted[name]), name
