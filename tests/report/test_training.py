"""The training report: valid, self-contained and accessible HTML with the numbers of the run."""

import errno
import json
import math
import os
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markupsafe import Markup
from PIL import Image

from mobilevit.recipes import RECIPES, Data, Recipe, Sampler
from mobilevit.report import render
from mobilevit.report.results import Example, Section, class_table, confusion_html, thumbnail
from mobilevit.report.training import Origin, Report, duration, write_report
from mobilevit.tasks.task import ClassMetrics

NASTY = "<script>alert('x')</script> & \"cats\""
NAN = math.nan
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """The elements of a page in their order. Fails on tags that are not closed correctly."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, dict[str, str], str]] = []  # tag, attributes, the text directly in it
        self._attributes: list[dict[str, str]] = []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"<{tag}> has an attribute twice"
        attributes = {name: value or "" for name, value in attrs}
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self.open.append(tag)
            self._attributes.append(attributes)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()
        self._attributes.pop()

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.append((self.open[-1], self._attributes[-1], data))

    def all(self, tag: str, kind: str | None = None) -> list[dict[str, str]]:
        return [a for t, a in self.elements if t == tag and (kind is None or kind in a.get("class", "").split())]

    @property
    def text(self) -> str:
        """The visible text."""
        return " ".join(data for tag, _, data in self.texts if tag != "style").replace("\xa0", " ")


def write_steps(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def some_steps(num: int, sizes: tuple[int, ...] = (160, 256)) -> list[dict[str, Any]]:
    return [
        {
            "step": i + 1,
            "epoch": 1,
            "size_px": sizes[i % len(sizes)],
            "images": 10 * (i % len(sizes) + 1),
            "loss": 4 - 3 * i / num,
            "lr": 1e-3,
            "images_per_second": 100.0 + i % len(sizes),
        }
        for i in range(num)
    ]


def some_epochs(num: int) -> list[dict[str, float]]:
    return [
        {
            "epoch": i + 1,
            "train_loss": 4 / (i + 1),
            "val_loss": 3 / (i + 1),
            "raw_loss": 3.5 / (i + 1),
            "val_top1": 40.0 + 3 * i - 2.5 * (i == num - 1 and i > 0),
            "val_top5": 60.0 + i,
            "raw_top1": 39.0 + 3 * i,
            "val_num_images": 1234,
            "images_per_second": 400.0,
            "data_wait_fraction": 0.25 if i else 0.0,
            "seconds": 30.0 if i else 90.0,
        }
        for i in range(num)
    ]


def report(folder: Path, **changes: Any) -> Page:
    arguments: dict[str, Any] = {
        "title": "MobileViT-XS on flowers",
        "recipe": Recipe(),
        "origin": Origin(),
        "epochs": some_epochs(4),
        "steps": folder / "steps.jsonl",
        "sections": [],
        "facts": {},
        "commands": [],
    }
    write_report(folder / "report.html", Report(**{**arguments, **changes}))
    assert {path.name for path in folder.iterdir()} <= {"report.html", "steps.jsonl"}
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_duration() -> None:
    assert [duration(s) for s in (0.42, 59.94, 59.96, 61.2, 3599.7, 7260, 86400 * 3 + 7300)] == [
        "0.4 s",
        "59.9 s",
        "1 min 0 s",
        "1 min 1 s",
        "1 h 0 min",
        "2 h 1 min",
        "3 d 2 h",
    ]


def test_summary(tmp_path: Path) -> None:
    write_steps(tmp_path / "steps.jsonl", some_steps(100))
    page = report(tmp_path)
    # Top-1 is 40, 43, 46, 46.5; 90 + 3 x 30 s, 25 % of the last 90 s waiting; 50 x 10 + 50 x 20 images.
    for words in ("46.50 %", "epoch 4 of 4", "on 1,234 images", "3 min 0 s", "12.5 %", "1,500", "100"):
        assert words in page.text, words
    best_is_earlier = report(tmp_path, epochs=[{"val_top1": 50.0}, {"val_top1": 70.0}, {"val_top1": 60.0}])
    assert re.search(r"best\s+70\.00 %\s+epoch 2 of 3", best_is_earlier.text)
    assert re.search(r"last\s+60\.00 %\s+epoch 3", best_is_earlier.text)
    # Without other metrics the lowest loss is the best.
    of_loss = report(tmp_path, epochs=[{"val_loss": 0.5}, {"val_loss": 0.25}, {"val_loss": 0.75}])
    assert re.search(r"best\s+0\.250\s+epoch 2", of_loss.text)


def test_every_metric_has_a_chart(tmp_path: Path) -> None:
    epochs = [{"epoch": i, "val_map_50": 10.0 * i, "raw_map_50": 9.0 * i, "val_num_boxes": 7} for i in (1, 2, 3)]
    page = report(tmp_path, epochs=epochs)
    assert len(page.all("svg")) == 1
    assert {"EMA weights", "raw weights"} <= {text for _, _, text in page.texts}
    assert "Validation map 50" in page.text
    assert "num boxes" not in page.text
    page = report(tmp_path, epochs=some_epochs(4))
    names = [svg["aria-label"].split(" by ")[0] for svg in page.all("svg")]
    assert names == ["Loss", "Validation top-1, %", "Validation top-5, %", "Training speed, images/s"]


def test_self_contained_and_accessible(tmp_path: Path) -> None:
    write_steps(tmp_path / "steps.jsonl", some_steps(300))
    example = Example("x.jpg", [(thumbnail(Image.new("RGB", (300, 200), "red")), "a, predicted b")], ["a"])
    html = Markup(render("examples.html", examples=[example], none="", note=""))
    page = report(tmp_path, sections=[Section("Errors", html)])
    assert page.all("img")
    names = {tag for tag, _ in page.elements}
    assert not names & {"script", "iframe", "object", "embed"}
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
        if tag == "img":
            assert attributes["alt"]
        if tag == "svg":
            assert attributes["role"] == "img"
            assert attributes["aria-label"]
    style = "".join(data for tag, _, data in page.texts if tag == "style")
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style
    assert style.count("{") == style.count("}")
    identifiers = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(identifiers)) == len(identifiers)
    links = {attributes["href"][1:] for attributes in page.all("a")}
    assert links <= set(identifiers)
    # Lines differ in dashes, and every colour is defined.
    text = (tmp_path / "report.html").read_text()
    assert "stroke-dasharray" in text
    used = set(re.findall(r"var\(--([\w-]+)\)", text))
    assert used <= set(re.findall(r"--([\w-]+):", text)) | {"fraction"}


def test_escapes_everything(tmp_path: Path) -> None:
    counts = np.array([[3, 1], [0, 2]])
    names = (NASTY, "dog")
    rows = [ClassMetrics(name, {"recall": 50.0}) for name in names]
    example = Example(NASTY, [("data:,", NASTY)], [NASTY])
    fragments = [
        confusion_html(counts, names),
        class_table(rows, {"recall": "recall, %"}, by=("recall",)),
        Markup(render("examples.html", examples=[example], none="", note=NASTY)),
    ]
    page = report(
        tmp_path,
        title=NASTY + "{style}",
        sections=[Section(NASTY, fragment) for fragment in fragments],
        facts={NASTY: NASTY},
        commands=[(NASTY, NASTY)],
    )
    assert "script" not in {tag for tag, _ in page.elements}
    assert NASTY in page.text
    titles = {attributes["title"] for attributes in page.all("th") if "title" in attributes}
    assert titles == {NASTY, "dog"}
    (code,) = re.findall(r"<pre><code>(.*?)</code></pre>", (tmp_path / "report.html").read_text(), re.DOTALL)
    assert unescape(re.sub(r"</?span>", "", code)) == NASTY


def test_file_name_that_is_not_utf8(tmp_path: Path) -> None:
    page = report(tmp_path, facts={"data": os.fsdecode(b"fl\xffwers")})
    assert r"fl\udcffwers" in page.text


def test_recipe_marks_differences(tmp_path: Path) -> None:
    page = report(tmp_path, recipe=Recipe(epochs=1, data=Data(min_scale=0.3), sampler=Sampler("main", (64, 96))))
    changed = {data for tag, _, data in page.texts if tag == "code"}
    assert {"seed", "optimizer.warmup_steps", "sampler.sizes_px"} <= changed
    assert len(page.all("b", "changed")) == 4
    for words in ("1 epoch", "instead of 300 epochs", "64, 96 px", "instead of 0.08", "3,000 steps"):
        assert words in page.text, words
    assert not report(tmp_path).all("b", "changed")
    page = report(tmp_path, recipe=replace(RECIPES["segment"], epochs=7))
    assert len(page.all("b", "changed")) == 1
    assert "instead of 60 epochs" in page.text
    assert "different from the recipe segment" in page.text


def test_recipe_is_compared_with_the_named_recipe(tmp_path: Path) -> None:
    command = "mobilevit train small --data 'my photos' --epochs 7"
    page = report(tmp_path, recipe=replace(RECIPES["small"], epochs=7), origin=Origin("small", command))
    assert len(page.all("b", "changed")) == 1
    assert "instead of 30 epochs" in page.text
    assert "different from the recipe small" in page.text
    text = (tmp_path / "report.html").read_text()
    (code,) = re.findall(r"<pre><code>(.*?)</code></pre>", text, re.DOTALL)
    assert unescape(re.sub(r"</?span>", "", code)) == command


def test_chart_of_unreadable_images_only_if_there_are_any(tmp_path: Path) -> None:
    epochs = [{**record, "val_unreadable": 0} for record in some_epochs(3)]
    assert "unreadable images" not in report(tmp_path, epochs=epochs).text
    epochs[1]["val_unreadable"] = 2
    page = report(tmp_path, epochs=epochs)
    assert "Validation unreadable images" in page.text
    assert len(page.all("svg")) == 5


@pytest.mark.parametrize(
    "epochs",
    [
        [],
        [{}],
        [{"epoch": 1}],
        some_epochs(1),
        [dict.fromkeys(some_epochs(1)[0], NAN)],
        [{**some_epochs(1)[0], "val_top1": NAN, "seconds": NAN}, *some_epochs(3)[1:]],
        [{**record, "data_wait_fraction": 0.0, "seconds": 0.0} for record in some_epochs(2)],
    ],
)
@pytest.mark.parametrize("num_steps", [None, 0, 1, 2, 61])
def test_incomplete_records(epochs: list[dict[str, float]], num_steps: int | None, tmp_path: Path) -> None:
    if num_steps is not None:
        write_steps(tmp_path / "steps.jsonl", some_steps(num_steps))
    page = report(tmp_path, epochs=epochs)
    labels = [svg["aria-label"] for svg in page.all("svg")]
    assert not [text for text in [page.text, *labels] if re.search(r"\b(nan|inf)\b", text)]


def test_numbers_of_numpy(tmp_path: Path) -> None:
    page = report(tmp_path, epochs=[{"epoch": np.int64(1), "val_top1": np.float32(33.25)}])
    assert "33.25 %" in page.text


def test_table_by_image_size(tmp_path: Path) -> None:
    steps = some_steps(200, sizes=(160, 256, 256, 256))
    for record in steps[180:]:
        record["loss"] = 1.5 if record["size_px"] == 160 else 2.5
    steps[10]["images_per_second"] = 1e9
    write_steps(tmp_path / "steps.jsonl", steps)
    text = re.sub(r"\s+", " ", report(tmp_path).text)
    # 50 updates of 10 images; 50 times 20 + 30 + 40 images.
    assert "160 px 50 500 1.500 100" in text
    assert "256 px 150 4,500 2.500 102" in text


def test_resumed_and_truncated_steps(tmp_path: Path) -> None:
    """Steps after a checkpoint are in the file twice, and the line of the interruption is truncated."""
    first, again = some_steps(50), some_steps(60)
    for record in first:
        record["images"] = 999
    path = write_steps(tmp_path / "steps.jsonl", first)
    torn = '{"step": 51, "lo'
    rest = "".join(json.dumps(record) + "\n" for record in again[30:])
    path.write_text(path.read_text() + torn + "\n\n[1]\nnull\n" + rest)
    text = re.sub(r"\s+", " ", report(tmp_path).text)
    assert "Steps 60 " in text
    seen = 30 * 999 + sum(record["images"] for record in again[30:])
    assert f"Training images {seen:,} " in text
    assert "could not be read: 3" in text


def test_a_long_run_stays_small(tmp_path: Path) -> None:
    n = 200_000
    rates = np.concatenate([np.linspace(1e-4, 2e-3, 3001), np.linspace(2e-3, 1e-4, n - 3001)])
    noise = np.random.default_rng(0).normal(size=n)
    line = '{"step": %d, "epoch": 1, "size_px": %d, "images": 128, "loss": %.4f, "lr": %.7f, "images_per_second": 9}\n'
    with (tmp_path / "steps.jsonl").open("w") as file:
        file.writelines(
            line % (i + 1, 160 + 32 * (i % 5), 6 * math.exp(-i / 60_000) + 0.1 * noise[i] + 1, rates[i])
            for i in range(n)
        )
    report(tmp_path, epochs=some_epochs(600))
    assert (tmp_path / "report.html").stat().st_size < 500_000


def test_a_failed_write_preserves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.html").write_text("old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "old"
