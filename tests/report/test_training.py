"""The report: well-formed, whole in one file, its points where their numbers belong, whatever the run left behind."""

import base64
import errno
import io
import json
import math
import os
import re
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mobilevit.recipes import RECIPES, Data, Recipe, Sampler
from mobilevit.report.results import confusion_html, mistakes_html, per_class_html, thumbnail
from mobilevit.report.training import Band, Line, Origin, chart, duration, log_ticks, tick_names, ticks, write_report

NASTY = "<script>alert('x')</script> & \"cats\""
NAN = math.nan
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """The elements of a page in their order; complains about a tag that is not closed where it should be."""

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
        """All that is to be read, without the style sheet."""
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
    write_report(folder / "report.html", **{**arguments, **changes})
    assert {path.name for path in folder.iterdir()} <= {"report.html", "steps.jsonl"}, "something is left aside"
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def axis(page: Page, kind: str) -> list[tuple[float, float]]:
    """(number on the label, its place in the figure) along the x or y axis, as a reader sees it."""
    return [
        (float(data.replace(",", "")), float(attributes[kind]))
        for tag, attributes, data in page.texts
        if tag == "text" and attributes.get("class") == kind
    ]


def read_off(place: float, labels: list[tuple[float, float]], logarithmic: bool = False) -> float:
    """The number at `place`, by the ruler through the outermost two labels."""
    (v0, p0), (v1, p1) = labels[0], labels[-1]
    if logarithmic:
        return 10 ** (math.log10(v0) + (place - p0) / (p1 - p0) * (math.log10(v1) - math.log10(v0)))
    return v0 + (place - p0) / (p1 - p0) * (v1 - v0)


def path_points(d: str) -> list[list[tuple[float, float]]]:
    return [
        [(float(x), float(y)) for x, y in re.findall(r"([-\d.]+) ([-\d.]+)", run)]
        for run in d.split("M")
        if run.strip()
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Charts


@pytest.mark.parametrize(
    "y",
    [
        [4.0, 2.5, 1.25, 0.8, 0.75, 0.9],
        [-3.0, 0.0, 12.0, 11.0, 10.0, 7.0],
        [61234.0, 59000.0, 60100.0, 60300.0, 60200.0, 60000.5],
        [500.0, 60.0, 7.0, 0.8, 0.09, 0.02],  # logarithmic
    ],
)
def test_points_are_where_the_axes_say(y: list[float]) -> None:
    x = [1.0, 2.0, 4.0, 7.0, 11.0, 30.0]
    page = Page(chart("Loss", [Line("loss", x, y)], x_name="epoch"))
    logarithmic = min(y) > 0 and max(y) / min(y) > 100
    xs, ys = axis(page, "x"), axis(page, "y")
    (points,) = path_points(page.all("path", "line")[0]["d"])
    assert len(points) == 6
    for (px, py), wanted_x, wanted_y in zip(points, x, y, strict=True):
        # Places are written to a tenth of a pixel; the labels and the point can each be off by half of that.
        assert read_off(px, xs) == pytest.approx(wanted_x, abs=0.02 * 29 / 3)
        value = read_off(py, ys, logarithmic)
        if logarithmic:
            assert math.log10(value) == pytest.approx(math.log10(wanted_y), abs=0.02)
        else:
            assert value == pytest.approx(wanted_y, abs=0.002 * (ys[-1][0] - ys[0][0]))
    # All labels stand on one ruler, and enclose the values.
    for labels, is_log in ((xs, False), (ys, logarithmic)):
        for value, place in labels:
            assert read_off(place, labels, is_log) == pytest.approx(value, rel=0.02, abs=0.002 * labels[-1][0])
    assert ys[0][0] <= min(y) <= max(y) <= ys[-1][0]
    (dot,) = page.all("circle")
    assert (float(dot["cx"]), float(dot["cy"])) == points[-1]


def test_nan_leaves_a_gap_and_a_lonely_point_is_a_dot() -> None:
    page = Page(chart("Loss", [Line("a", [1, 2, 3, 4, 5, 6], [3, 2, NAN, 5, math.inf, 1])], x_name="epoch"))
    runs = path_points(page.all("path", "line")[0]["d"])
    assert [len(run) for run in runs] == [2]
    values = [read_off(float(dot["cy"]), axis(page, "y")) for dot in page.all("circle")]
    assert values == pytest.approx([5, 1], abs=0.01)
    assert "nan" not in page.text.lower()
    assert "inf" not in page.text.lower()


def test_nothing_to_draw() -> None:
    assert chart("Loss", [Line("a", [1, 2], [NAN, NAN])], x_name="epoch") == ""
    assert chart("Loss", [], x_name="epoch") == ""
    # One of two lines without a point does not appear in the legend either.
    page = Page(chart("Loss", [Line("one", [1, 2], [1, 2]), Line("other", [1, 2], [NAN] * 2)], x_name="epoch"))
    assert "other" not in page.text


def test_band_encloses_the_line_and_an_outlier_flattens_nothing() -> None:
    x = [float(i) for i in range(100)]
    mean = [2 + math.sin(i / 9) for i in x]
    low, high = [y - 0.5 for y in mean], [y + 0.5 for y in mean]
    high[50] = 1e6
    page = Page(chart("Loss", [Line("mean", x, mean)], [Band("range", x, low, high)], x_name="update"))
    ys = axis(page, "y")
    assert ys[-1][0] <= 6
    (band,) = path_points(page.all("path", "band")[0]["d"])
    assert len(band) == 200
    upper, lower = band[:100], band[:99:-1]
    for i in (0, 20, 99):
        assert read_off(upper[i][1], ys) == pytest.approx(high[i], abs=0.03)
        assert read_off(lower[i][1], ys) == pytest.approx(low[i], abs=0.03)
    assert upper[50][1] == ys[-1][1], "the outlier goes up to the edge of the figure and no further"
    assert "1,000,000" in page.text


@pytest.mark.parametrize("value", [0.0, 92.5, 100.0])
def test_shares_stay_between_0_and_100(value: float) -> None:
    labels = axis(Page(chart("Top-1", [Line("a", [1], [value])], x_name="epoch", unit="%")), "y")
    assert len(labels) >= 2
    assert 0 <= labels[0][0] <= value <= labels[-1][0] <= 100


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (0.1, 0.3), (1e-9, 3e-9), (1e-14, 5e-14), (0, 123456), (5, 5), (0, 0), (0.1, 0.1 + 2e-17), (-7, 1e12)],
)
def test_ticks_are_round_even_and_enclose(low: float, high: float) -> None:
    values = ticks(low, high)
    steps = np.diff(values)
    assert 2 <= len(values) <= 9
    assert values[0] <= low + 1e-6 * steps[0]
    assert high <= values[-1] + 1e-6 * steps[0]
    assert steps == pytest.approx(steps[0])
    assert f"{steps[0]:.6e}"[0] in "125"
    assert len(set(tick_names(values))) == len(values)


def test_ticks_of_epochs_are_whole() -> None:
    for last in range(1, 400):
        values = ticks(1, last, 6, whole=True)
        assert all(value == int(value) for value in values)
        assert 1 <= len(values) <= 14
    assert log_ticks(0.3, 40) == [0.2, 1, 10, 50]
    assert log_ticks(0.3, 4) == [0.2, 0.5, 1, 2, 5]
    assert tick_names([0, 0.25, 0.5]) == ["0", "0.25", "0.50"]


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


# ---------------------------------------------------------------------------------------------------------------------
# The page


def test_summary(tmp_path: Path) -> None:
    write_steps(tmp_path / "steps.jsonl", some_steps(100))
    page = report(tmp_path)
    # By hand: top-1 is 40, 43, 46, 46.5; 90 + 3 x 30 s, a quarter of the later 90 s waited; 50 x 10 + 50 x 20 images.
    for words in ("46.50 %", "epoch 4 of 4", "on 1,234 images", "3 min 0 s", "12.5 %", "1,500", "100"):
        assert words in page.text, words
    best_is_earlier = report(tmp_path, epochs=[{"val_top1": 50.0}, {"val_top1": 70.0}, {"val_top1": 60.0}])
    assert re.search(r"best\s+70\.00 %\s+epoch 2 of 3", best_is_earlier.text)
    assert re.search(r"last\s+60\.00 %\s+epoch 3", best_is_earlier.text)
    # Where the loss is all there is, the smallest is the best.
    of_loss = report(tmp_path, epochs=[{"val_loss": 0.5}, {"val_loss": 0.25}, {"val_loss": 0.75}])
    assert re.search(r"best\s+0\.250\s+epoch 2", of_loss.text)


def test_every_metric_has_its_figure_and_its_twin(tmp_path: Path) -> None:
    epochs = [{"epoch": i, "val_map_50": 10.0 * i, "raw_map_50": 9.0 * i, "val_num_boxes": 7} for i in (1, 2, 3)]
    page = report(tmp_path, epochs=epochs)
    assert len(page.all("svg")) == 1
    assert len(page.all("path", "line")) == 2
    assert "Validation map 50" in page.text
    assert "num boxes" not in page.text
    page = report(tmp_path, epochs=some_epochs(4))
    names = [svg["aria-label"].split(" by ")[0] for svg in page.all("svg")]
    assert names == ["Loss", "Validation top-1, %", "Validation top-5, %", "Training speed, images a second"]


def test_whole_in_one_file_and_accessible(tmp_path: Path) -> None:
    write_steps(tmp_path / "steps.jsonl", some_steps(300))
    image = Image.new("RGB", (300, 200), "red")
    page = report(tmp_path, sections=[("Mistakes", mistakes_html([(image, "a", "b", 0.9, "x.jpg")]))])
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
    # Lines differ by more than colour.
    assert "stroke-dasharray" in style
    # Every colour that a rule uses is set.
    assert set(re.findall(r"var\(--([\w-]+)\)", style)) - {"cell", "share"} <= set(re.findall(r"--([\w-]+):", style))


def test_escapes_everything(tmp_path: Path) -> None:
    counts = np.array([[3, 1], [0, 2]])
    image = Image.new("RGB", (20, 20))
    names = (NASTY, "dog")
    fragments = [
        confusion_html(counts, names),
        per_class_html(counts, names),
        mistakes_html([(image, NASTY, "dog", 0.5, NASTY)]),
    ]
    page = report(
        tmp_path,
        title=NASTY + "{style}",
        sections=[(NASTY, fragment) for fragment in fragments],
        facts={NASTY: NASTY},
        commands=[(NASTY, NASTY)],
    )
    assert "script" not in {tag for tag, _ in page.elements}
    assert NASTY in page.text
    titles = {attributes["title"] for attributes in page.all("th") if "title" in attributes}
    assert titles == {NASTY, "dog"}
    # A command is copied as it was given.
    text = (tmp_path / "report.html").read_text()
    (code,) = re.findall(r"<pre><code>(.*?)</code></pre>", text, re.DOTALL)
    assert re.sub(r"</?span>", "", code) == escape(NASTY)


def test_a_name_that_is_no_utf8(tmp_path: Path) -> None:
    page = report(tmp_path, facts={"data": os.fsdecode(b"fl\xffwers")})
    assert r"fl\udcffwers" in page.text


def test_recipe_shows_what_differs(tmp_path: Path) -> None:
    page = report(tmp_path, recipe=Recipe(epochs=1, data=Data(min_scale=0.3), sampler=Sampler("main", (64, 96))))
    changed = {data for tag, _, data in page.texts if tag == "code"}
    assert {"seed", "optimizer.warmup_steps", "sampler.sizes_px"} <= changed
    assert len(page.all("b", "changed")) == 4
    for words in ("1 epoch", "instead of 300 epochs", "64, 96 px", "instead of 0.08", "3,000 updates"):
        assert words in page.text, words
    assert not report(tmp_path).all("b", "changed")
    page = report(tmp_path, recipe=replace(RECIPES["segment"], epochs=7))
    assert len(page.all("b", "changed")) == 1
    assert "instead of 60 epochs" in page.text
    assert "other than in the recipe segment" in page.text


def test_recipe_is_compared_with_the_one_it_was_derived_from(tmp_path: Path) -> None:
    command = "mobilevit train small --data 'my photos' --epochs 7"
    page = report(tmp_path, recipe=replace(RECIPES["small"], epochs=7), origin=Origin("small", command))
    assert len(page.all("b", "changed")) == 1
    assert "instead of 30 epochs" in page.text
    assert re.search(r"Recipe\s+small\s*\.", page.text)
    text = (tmp_path / "report.html").read_text()
    (code,) = re.findall(r"<pre><code>(.*?)</code></pre>", text, re.DOTALL)
    assert re.sub(r"</?span>", "", code) == escape(command)


def test_unreadable_images_are_drawn_if_there_are_any(tmp_path: Path) -> None:
    epochs = [{**record, "val_unreadable": 0} for record in some_epochs(3)]
    assert "cannot be read" not in report(tmp_path, epochs=epochs).text
    epochs[1]["val_unreadable"] = 2
    page = report(tmp_path, epochs=epochs)
    assert "Validation images that cannot be read" in page.text
    assert len(page.all("svg")) == 5


def test_bars_of_a_column_begin_at_the_same_place() -> None:
    """The numbers behind them are of the same width."""
    page = Page(per_class_html(np.array([[9, 1, 0], [0, 10, 0], [3, 0, 0]]), ["cat", "dog", "emu"]))
    numbers = [(attributes["style"], text) for tag, attributes, text in page.texts if "style" in attributes]
    assert {"90.0", "100.0", "0.0"} <= {text for _, text in numbers}
    assert {style for style, _ in numbers} == {"min-width:5ch"}


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
def test_little_is_enough(epochs: list[dict[str, float]], num_steps: int | None, tmp_path: Path) -> None:
    if num_steps is not None:
        write_steps(tmp_path / "steps.jsonl", some_steps(num_steps))
    page = report(tmp_path, epochs=epochs)
    drawn = [svg["aria-label"] for svg in page.all("svg")]
    assert not [text for text in [page.text, *drawn] if re.search(r"\b(nan|inf)\b", text)]
    if epochs == some_epochs(1):
        assert [bool(page.all("path", "line")), len(page.all("circle", "dot")) >= 6] == [(num_steps or 0) > 1, True]


def test_numbers_of_numpy(tmp_path: Path) -> None:
    page = report(tmp_path, epochs=[{"epoch": np.int64(1), "val_top1": np.float32(33.25)}])
    assert "33.25 %" in page.text


# ---------------------------------------------------------------------------------------------------------------------
# The record of the updates


def test_resolutions(tmp_path: Path) -> None:
    steps = some_steps(200, sizes=(160, 256, 256, 256))
    for record in steps[180:]:
        record["loss"] = 1.5 if record["size_px"] == 160 else 2.5
    steps[10]["images_per_second"] = 1e9  # the median does not mind
    write_steps(tmp_path / "steps.jsonl", steps)
    text = re.sub(r"\s+", " ", report(tmp_path).text)
    # 50 updates of 10 images; 50 times 20 + 30 + 40 images.
    assert "160 px 50 500 1.500 100" in text
    assert "256 px 150 4,500 2.500 102" in text


def test_a_resumed_and_cut_record(tmp_path: Path) -> None:
    """The updates after a checkpoint stand twice in the file, and the line of the interruption is torn."""
    first, again = some_steps(50), some_steps(60)
    for record in first:
        record["images"] = 999
    path = write_steps(tmp_path / "steps.jsonl", first)
    torn = '{"step": 51, "lo'
    rest = "".join(json.dumps(record) + "\n" for record in again[30:])
    path.write_text(path.read_text() + torn + "\n\n[1]\nnull\n" + rest)
    text = re.sub(r"\s+", " ", report(tmp_path).text)
    assert "Updates 60 " in text
    seen = 30 * 999 + sum(record["images"] for record in again[30:])
    assert f"Images seen {seen:,} " in text
    assert "could not be read: 3" in text


def test_unfinite_losses(tmp_path: Path) -> None:
    steps = some_steps(400)
    for record in steps[100:140]:
        record["loss"] = NAN
    del steps[7]["loss"], steps[8]["lr"]
    steps[9]["loss"] = None
    steps[11]["loss"] = math.inf
    page = report(tmp_path, epochs=[], steps=write_steps(tmp_path / "steps.jsonl", steps))
    assert len(path_points(page.all("path", "line")[0]["d"])) == 2


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
    page = report(tmp_path, epochs=some_epochs(600))
    assert (tmp_path / "report.html").stat().st_size < 500_000
    loss, rate = (path_points(a["d"])[0] for a in page.all("path", "line")[-2:])
    assert 200 <= len(loss) <= 500
    assert 200 <= len(rate) <= 500
    svg = (tmp_path / "report.html").read_text().split("<svg")
    labels = [Page("<svg" + part.split("</svg>")[0] + "</svg>") for part in svg[-2:]]
    xs, ys = axis(labels[0], "x"), axis(labels[0], "y")
    for x, y in loss[::40]:
        assert read_off(y, ys) == pytest.approx(1 + 6 * math.exp(-read_off(x, xs) / 60_000), abs=0.06)
    xs, ys = axis(labels[1], "x"), axis(labels[1], "y")
    highest = min(rate, key=lambda point: point[1])
    assert read_off(highest[0], xs) == pytest.approx(3001, abs=100)
    assert read_off(highest[1], ys) == pytest.approx(2e-3, rel=0.01)


def test_the_old_report_outlives_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.html").write_text("old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "old"


# ---------------------------------------------------------------------------------------------------------------------
# What the task supplies


def rows_of(html: str) -> list[list[str]]:
    """The cells of all rows of the tables' bodies, as text."""
    bodies = "".join(re.findall(r"<tbody>(.*?)</tbody>", html, re.DOTALL))
    Page(html)
    return [
        [re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)]
        for row in re.findall(r"<tr>(.*?)</tr>", bodies, re.DOTALL)
    ]


def test_heat_map() -> None:
    html = confusion_html(np.array([[8, 2, 0], [0, 1234, 0], [0, 0, 0]]), ["cat", "dog", "emu"])
    assert rows_of(html) == [["cat", "8", "2", "·"], ["dog", "·", "1,234", "·"], ["emu", "·", "·", "·"]]
    page = Page(html)
    shares = [float(cell["style"].split(":")[1]) for cell in page.all("td") if "style" in cell]
    assert shares == pytest.approx([0.8 ** (1 / 3), 0.2 ** (1 / 3), 1.0], abs=1e-3)
    assert len(page.all("td", "right")) == 2
    assert "cat: 2 of 10 images (20.0 %) taken for dog" in html


@pytest.mark.parametrize("C", [20, 21])
def test_confusions(C: int) -> None:
    random = np.random.default_rng(0)
    counts = random.integers(0, 50, (C, C))
    names = [f"class {i}" for i in range(C)]
    rows = rows_of(confusion_html(counts, names))
    if C == 20:
        assert len(rows) == 20
        return
    wanted = sorted((-int(counts[i, j]), i, j) for i in range(C) for j in range(C) if i != j)[:20]
    assert rows == [[names[i], names[j], str(-n), f"{100 * -n / counts[i].sum():.1f}"] for n, i, j in wanted]
    assert "No image" in confusion_html(np.diag(np.arange(C)), names)


def test_per_class() -> None:
    #                  predicted: cat dog emu ibis
    counts = np.array([[9, 1, 0, 0], [5, 5, 0, 0], [0, 0, 0, 0], [2, 0, 0, 0]])
    assert rows_of(per_class_html(counts, ["cat", "dog", "emu", "ibis"])) == [
        ["ibis", "2", "0.0", "&ndash;"],
        ["dog", "10", "50.0", "83.3"],
        ["cat", "10", "90.0", "56.2"],
        ["emu", "0", "&ndash;", "&ndash;"],
    ]


@pytest.mark.parametrize(("C", "shown"), [(20, 20), (21, 21), (1500, 1000)])
def test_many_classes_are_folded(C: int, shown: int) -> None:
    html = per_class_html(np.eye(C, dtype=np.int64), [f"class {i}" for i in range(C)])
    assert len(rows_of(html)) == shown
    open_, *folded = html.split("<details>")
    assert len(rows_of(open_)) == min(C, 20)
    assert len(folded) == (C > 20)
    assert len(html) < 400_000


def read_url(url: str) -> Image.Image:
    head, data = url.split(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "1", "I;16"])
@pytest.mark.parametrize(("width", "height"), [(1000, 701), (7, 5), (3000, 2), (160, 160), (1, 1)])
def test_thumbnails_are_bounded(mode: str, width: int, height: int) -> None:
    source = Image.new(mode, (width, height))
    before = source.copy()
    image = read_url(thumbnail(source))
    assert source == before
    assert source.size == (width, height)
    assert image.mode == "RGB"
    assert 80 < max(image.size) <= 160
    assert max(image.size) / min(image.size) == pytest.approx(min(width / height, 160), rel=0.02) or width > 999


def test_small_images_are_enlarged_pixel_by_pixel() -> None:
    pixels = np.array([[255, 0], [0, 255]], dtype=np.uint8)
    image = np.asarray(read_url(thumbnail(Image.fromarray(pixels))))[..., 0]
    assert image.shape == (160, 160)
    assert np.abs(image[40::80, 40::80].astype(int) - pixels).max() < 8


def test_mistakes() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    html = mistakes_html([(image, "cat", "dog", 0.934, f"{i}.jpg") for i in range(100)])
    page = Page(html)
    assert len(page.all("img")) == 32
    assert len(html) < 32 * 40_000, "noise is the most that a JPEG can hold"
    assert "93 %" in page.text
    assert {img["alt"] for img in page.all("img")} == {"cat, taken for dog"}
    assert "No mistakes" in mistakes_html([])
    assert "nan" not in mistakes_html([(image, "a", "b", NAN, "c")]).split("figcaption")[1]
