"""The comparison with published figures: claims by hand, timings, and the written files."""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.collections import PathCollection
from rich.console import Console

from mobilevit.benchmark import models
from mobilevit.benchmark.cost import Cost
from mobilevit.benchmark.timing import Machine, Spread
from mobilevit.compare import run, tables
from mobilevit.compare.claims import check_claims, speed_ratios
from mobilevit.compare.figures import accuracy_against_latency, accuracy_against_parameters
from mobilevit.compare.models import MOBILEVITS, MODELS, OWN_PAPER
from mobilevit.compare.reports import PublishedReport, PublishedRow, Setting, Timing
from mobilevit.compare.run import TimingOptions

NOT_TIMED = TimingOptions(runtimes=())
MACHINE = Machine("2000-01-01", "abacus", 1, 1, 0.0, {})


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    records = [record for record in caplog.records if record.name == run.__name__]
    return [record.getMessage() for record in records if record.levelno == logging.WARNING]


def test_choose() -> None:
    assert [model.name for model in run.choose([])] == list(MODELS)
    assert [model.name for model in run.choose(["pit-tiny", "espnetv2"])] == ["espnetv2", "pit-tiny", *MOBILEVITS]
    with pytest.raises(ValueError, match=r"'mobilenetv2'; did you mean mobilenetv"):
        run.choose(["mobilenetv2", "x", "espnetv2"])


def synthetic_rows() -> list[PublishedRow]:
    """All models, with their published number of parameters, and times that rise from row to row."""
    return [
        replace(
            PublishedRow.of(model, model.size_px, Cost(model.published_parameters, 0, 0, 0)),
            timings=(Timing("torch", 4, None, None, Spread(20.0 + i, 18.0 + i, 25.0 + i), 1.0, {}),),
        )
        for i, model in enumerate(MODELS.values())
    ]


def synthetic_report() -> PublishedReport:
    return PublishedReport(
        setting=Setting(MACHINE, device="cpu", num_rounds=1, num_timing_threads=1, baseline="nearest"),
        rows=synthetic_rows(),
        notes=[],
        claims=[],
        speeds=[],
        dense={"detection": [], "segmentation": []},
    )


# ---------------------------------------------------------------------------------------------------------------------
# Claims


def test_claims_by_hand() -> None:
    claims = {checked.claim.other: checked for checked in check_claims(synthetic_rows())}
    assert {name: claim.difference for name, claim in claims.items()} == {
        "mobilenetv2-0.75": 5.0,
        "shufflenetv2": 5.4,
        "mobilenetv3-small": 7.4,
        "efficientnet-b0": 2.1,
        "deit-tiny": 2.6,
    }
    assert all(claim.holds for claim in claims.values())
    deit = claims["deit-tiny"]
    assert deit.times_larger == 5_700_000 / 2_300_000
    assert deit.best_top1 == (74.64, 72.17)
    assert claims["mobilenetv2-0.75"].best_top1 is None
    text = deit.describe()
    assert all(part in text for part in ("74.8 - 72.2 = +2.6", "5.70 M / 2.30 M = 2.48", "holds", "+2.47"))


@pytest.mark.parametrize("change", [{"published_top1": 72.3}, {"cost": Cost(5_000_000, 0, 0, 0)}])
def test_a_claim_that_does_not_hold(change: dict[str, Any]) -> None:
    rows = [replace(row, **change) if row.name == "deit-tiny" else row for row in synthetic_rows()]
    assert [checked.claim.other for checked in check_claims(rows) if not checked.holds] == ["deit-tiny"]
    without_xs = [row for row in rows if row.name != "mobilevit-xs"]
    assert [checked.claim.other for checked in check_claims(without_xs)] == ["efficientnet-b0"]


# ---------------------------------------------------------------------------------------------------------------------
# Reports


@pytest.fixture(scope="module")
def report() -> PublishedReport:
    """Timed in torch, on small images."""
    options = TimingOptions(("torch",), batch_sizes=(1, 2), num_rounds=3, num_threads=1)
    return run.compare(run.choose(["mobilenetv3-small", "deit-tiny-basic", "deit-tiny"]), size_px=64, options=options)


def test_timings(report: PublishedReport) -> None:
    rows = {row.name: row for row in report.rows}
    assert list(rows) == ["mobilenetv3-small", "deit-tiny-basic", "deit-tiny", *MOBILEVITS]
    for row in report.rows:
        assert [timing.batch_size for timing in row.timings] == [1, 2]
        for timing in row.timings:
            latency_ms = timing.latency_ms
            assert 0 < latency_ms.p10 <= latency_ms.median <= latency_ms.p90
            assert timing.images_per_second == pytest.approx(1e3 * timing.batch_size / latency_ms.median)
            assert timing.layout in ("channels first", "channels last")
            assert set(timing.ratios) == set(MOBILEVITS) - {row.name}
            assert timing.ratio == (timing.ratios[timing.baseline] if timing.baseline else None)
    baselines = [row.timings[0].baseline for row in report.rows]
    assert baselines == ["mobilevit-xs", "mobilevit-s", "mobilevit-s", None, None, None]
    assert rows["deit-tiny"].timings == rows["deit-tiny-basic"].timings  # one network, trained in two ways
    # Nothing was published for this image size.
    assert report.claims == report.speeds == []
    (note,) = report.notes
    assert "64 px" in note
    (speed,) = speed_ratios(report.rows)
    assert (speed.other, speed.published_ratio) == ("deit-tiny", pytest.approx(28.15 / 17.86))


def test_ratios_are_of_the_same_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is half as fast in every second round changes the times, but not the ratios."""

    def measure(runs: list[Any], num_rounds: int) -> Any:
        slow = torch.tensor([1.0, 2.0]).repeat(num_rounds)[:num_rounds]
        return (torch.arange(1, len(runs) + 1)[:, None] * slow).numpy()

    monkeypatch.setattr(run.timing, "measure", measure)
    monkeypatch.setattr(models, "measure", measure)
    monkeypatch.setattr(run, "GROUP_SIZE", 2)
    options = TimingOptions(("torch",), num_rounds=4, num_threads=1, baseline="mobilevit-xs")
    names = ["mobilenetv3-small", "mobilenetv2-0.75", "shufflenetv2"]
    found = run.compare(run.choose(names), size_px=32, options=options)
    timings = {row.name: row.timings[0] for row in found.rows}
    for name, ratio in {"mobilevit-xxs": 1 / 2, "mobilevit-s": 3 / 2, "shufflenetv2": 4 / 2}.items():
        found_ratio = timings[name].ratio
        assert found_ratio is not None
        assert astuple(found_ratio) == pytest.approx((ratio,) * 3)
    assert timings["mobilevit-xs"].ratio is None
    assert timings["mobilevit-xs"].latency_ms.median == 3
    assert timings["mobilenetv2-0.75"].latency_ms.p90 == 8


def test_onnx(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    write_model = run.write_model

    def write(name: str, *args: Any) -> Any:
        if name == "shufflenetv2":
            raise RuntimeError("no such operator\nand more")
        return write_model(name, *args)

    monkeypatch.setattr(run, "write_model", write)
    options = TimingOptions(("onnx",), num_rounds=2, num_threads=1)
    chosen = [MODELS[name] for name in ("mobilenetv3-small", "shufflenetv2", "mobilevit-xxs")]  # exports take seconds
    found = run.compare(chosen, size_px=32, options=options)
    assert warnings(caplog) == found.notes
    (problem,) = found.notes[1:]
    assert problem.startswith("onnx: left out shufflenetv2")
    assert problem.endswith("(no such operator)")
    for row in found.rows:
        errors = [timing.error for timing in row.timings]
        assert len(errors) == (row.name != "shufflenetv2")
        assert all(error is not None and error < 1e-3 for error in errors)
    assert "| shufflenetv2 | 32 | 2.28 |" in tables.markdown(found, [])
    with pytest.raises(ValueError, match=r"cuda.*--runtime torch"):
        run.compare(chosen, options=replace(options, device="cuda"))


def test_written_files_agree(report: PublishedReport, tmp_path: Path) -> None:
    files = tables.write(report, tmp_path / "a/b")
    figures = ["accuracy_parameters_cnn.png", "accuracy_parameters_vit.png"]
    figures += [f"accuracy_latency_torch_b{size}.png" for size in (1, 2)]
    markdown, table, values, *_ = files
    assert [file.name for file in files] == ["table.md", "table.csv", "table.json", *figures]
    assert all(file.stat().st_size > 1000 for file in files)
    assert json.loads(values.read_text()) == json.loads(json.dumps(report.to_dict()))
    with table.open(newline="") as file:
        lines = list(csv.DictReader(file))
    text = markdown.read_text()
    assert all(f"]({name})" in text for name in figures)
    table_lines = [re.split(r" *\| *", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    headings = table_lines[0]
    assert len(lines) == len(report.rows)
    for row, line, cells in zip(report.rows, lines, table_lines[2:], strict=False):
        shown = dict(zip(headings, cells, strict=True))
        assert line["name"] == shown["model"] == row.name
        for key in ("num_parameters", "num_macs", "num_attention_macs", "inference_bytes"):
            assert int(line[key]) == getattr(row.cost, key)
        assert shown["M parameters"] == f"{row.cost.num_parameters / 1e6:.2f}"
        with_attention = row.cost.num_macs + row.cost.num_attention_macs
        assert shown["GMACs"] == f"{with_attention / 1e9:.3f} / {row.cost.num_macs / 1e9:.3f}"
        assert float(line["published_top1"]) == float(shown["top-1"]) == row.published_top1
        median = row.timings[1].latency_ms.median
        assert float(line["torch_b2_latency_ms_median"]) == median
        assert shown["torch, batch 2: ms"].split()[0] == f"{median:.2f}"
    assert tables.findings(report) == report.notes


def test_models_that_do_not_support_the_size(caplog: pytest.LogCaptureFixture) -> None:
    found = run.compare(run.choose(["espnetv2", "crossvit-tiny"]), size_px=224, options=NOT_TIMED)
    assert [row.name for row in found.rows] == ["espnetv2", *MOBILEVITS]
    left_out, about_sizes = found.notes
    assert "crossvit-tiny" in left_out
    assert "120" in left_out
    assert "224 px" in about_sizes
    assert warnings(caplog) == found.notes == tables.findings(found)[-2:]


@pytest.mark.parametrize("width", [60, 300])
def test_a_narrow_terminal_gets_several_tables(report: PublishedReport, width: int) -> None:
    printed = io.StringIO()
    console = Console(width=width, file=printed, markup=False, emoji=False, highlight=False)
    console.print(tables.TerminalTable(report))
    lines = printed.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    num_tables = sum(line.split()[:1] == ["model"] for line in lines)
    assert num_tables == 1 if width == 300 else num_tables > 1
    for row in report.rows:
        assert sum(line.split()[:1] == [row.name] for line in lines) == num_tables
    text = " ".join(" ".join(lines).split())
    for _, cells in tables.columns(report):
        assert all(" ".join(cell.split()) in text for cell in cells)


def test_without_times() -> None:
    found = run.compare(run.choose(["espnetv2"]), options=NOT_TIMED)
    assert [heading for heading, _ in tables.columns(found)][-1] == "best weights"
    assert [cells[0] for _, cells in tables.columns(found)][:3] == ["espnetv2", "224", "2.31"]
    assert tables.findings(found) == []
    rows = {row.backbone: row for row in found.dense["detection"]}
    for row in (*found.dense["detection"], *found.dense["segmentation"]):
        if row.num_parameters:
            assert row.num_parameters == pytest.approx(row.published_parameters, abs=51_000)
    assert rows["mobilevit-s"].num_parameters == 5_738_826
    assert rows["resnet-50"].num_parameters is None


# ---------------------------------------------------------------------------------------------------------------------
# Figures


@pytest.mark.parametrize("kind", ["cnn", "vit", "latency"])
def test_figures(kind: Any) -> None:
    report = synthetic_report()
    if kind == "latency":
        rows = list(report.rows)
        figure = accuracy_against_latency(report, "torch", 4)
        expected = [(row.timings[0].latency_ms.median, row.published_top1) for row in rows]
    else:
        rows = [row for row in report.rows if row.family in (kind, "mobilevit")]
        figure = accuracy_against_parameters(report, kind)
        expected = [(row.cost.num_parameters / 1e6, row.published_top1) for row in rows]
    (axes,) = figure.axes
    points = [c for c in axes.collections if isinstance(c, PathCollection)]
    assert [tuple(np.asarray(point.get_offsets())[0]) for point in points] == expected
    assert sorted(text.get_text() for text in axes.texts) == sorted(row.name.removesuffix("-basic") for row in rows)
    faces = [np.asarray(point.get_facecolor())[0, :3] for point in points]
    hollow = [row.name for row, face in zip(rows, faces, strict=True) if face.min() == 1]
    assert hollow == [row.name for row in rows if row.source == OWN_PAPER]
    markers = {
        row.augmentation: len(np.asarray(point.get_paths()[0].vertices))
        for row, point in zip(rows, points, strict=True)
        if row.family != "mobilevit"
    }
    assert len(set(markers.values())) == len(markers)
    # Labels do not overlap (by more than 2 px).
    figure.canvas.draw()
    boxes = [text.get_window_extent().padded(-2) for text in axes.texts]
    assert not [(i, k) for i in range(len(boxes)) for k in range(i) if boxes[i].overlaps(boxes[k])]
