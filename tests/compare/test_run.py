"""The comparison: counts against others', claims against sums by hand, and that all that is written agrees."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.collections import PathCollection
from rich.console import Console
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mobilevit.benchmark.cost import profile
from mobilevit.compare import run, tables
from mobilevit.compare.claims import check_claims, sentence, speeds
from mobilevit.compare.counts import count
from mobilevit.compare.figures import accuracy_against_latency, accuracy_against_parameters
from mobilevit.compare.models import OWN_PAPER, SYSTEMS
from mobilevit.models.mobilevit import MobileViT

OURS = ["mobilevit-xxs", "mobilevit-xs", "mobilevit-s"]


# ---------------------------------------------------------------------------------------------------------------------
# Counts


@pytest.mark.parametrize("name", ["mobilenetv2-0.75", "shufflenetv2", "espnetv2"])
def test_counts_of_convolutions(name: str) -> None:
    system, macs = SYSTEMS[name], 0
    network = system.build().eval()

    def add(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal macs
        assert isinstance(module, nn.Conv2d | nn.Linear)
        macs += output.numel() * module.weight[0].numel()

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(add)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network(torch.rand(1, 3, system.size_px, system.size_px))
    counts = count(system.build, system.size_px)
    assert (counts.num_macs, counts.num_attention_macs) == (macs, 0)
    assert counts.num_macs == counter.get_total_flops() // 2
    assert counts.num_parameters == sum(parameter.numel() for parameter in network.parameters())


def test_counts_of_deit() -> None:
    counts = count(SYSTEMS["deit-tiny"].build, 224)
    N, D, L = 197, 192, 12
    per_layer = N * D * (3 * D + D + 4 * D + 4 * D)
    assert counts.num_macs == 196 * D * 3 * 16 * 16 + L * per_layer + D * 1000
    assert counts.num_attention_macs == L * 2 * N * N * D
    assert (
        counts.num_parameters
        == (3 * 256 + 1) * D + (N + 1) * D + L * (12 * D * D + (3 + 1 + 4 + 1) * D + 2 * 2 * D) + 2 * D + (D + 1) * 1000
    )


def test_counts_of_attention_without_a_fused_operator() -> None:
    # ConViT computes its scores by products of its own, in two forms, and replaces a buffer while it runs.
    counts = count(SYSTEMS["convit-10m"].build, 224)
    assert counts.num_attention_macs == 2 * 256 * (10 * 196**2 + 2 * 197**2)
    # BoTNet's distances are weights: of the four products of its attention, two are counted as attention's.
    assert count(SYSTEMS["botnet-50"].build, 224).num_attention_macs == 2 * 512 * (196**2 + 2 * 49**2)


@pytest.mark.parametrize(("name", "size_px"), [("xxs", 160), ("s", 256)])
def test_counts_of_ours(name: str, size_px: int) -> None:
    expected = profile(MobileViT(name), (size_px, size_px))
    counts = count(lambda: MobileViT(name), size_px)
    assert counts.num_parameters == expected.num_parameters
    assert counts.num_macs == expected.num_macs
    assert counts.num_attention_macs == expected.num_attention_macs
    assert counts.inference_bytes == expected.inference_bytes


def test_activations_by_hand() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 1, 1))

    # The image, and the map of 8 channels twice: before and after the ReLU.
    assert count(build, 16).inference_bytes == 4 * 16 * 16 * (3 + 8 + 8)


# ---------------------------------------------------------------------------------------------------------------------
# Choice


def test_choose() -> None:
    assert [system.name for system in run.choose([])] == list(SYSTEMS)
    assert [system.name for system in run.choose(["pit-tiny", "espnetv2"])] == ["espnetv2", "pit-tiny", *OURS]
    with pytest.raises(ValueError, match=r"no system 'mobilenetv2', 'x'; did you mean mobilenetv"):
        run.choose(["mobilenetv2", "x", "espnetv2"])


# ---------------------------------------------------------------------------------------------------------------------
# Claims


def rows() -> list[dict[str, Any]]:
    """Of all systems what claims and figures need, with times that rise from row to row."""
    return [
        {
            "name": name,
            "family": system.family,
            "size_px": system.size_px,
            "num_parameters": system.published_parameters,
            "published_top1": system.published_top1,
            "augmentation": system.augmentation,
            "source": system.source,
            "library_weights": [{"id": weights.id, "top1": weights.top1} for weights in system.library_weights],
            "timings": [
                {
                    "runtime": "torch",
                    "batch_size": 4,
                    "latency_ms": {"median": 20.0 + i, "p10": 18.0 + i, "p90": 25.0 + i},
                }
            ],
        }
        for i, (name, system) in enumerate(SYSTEMS.items())
    ]


def test_claims_by_hand() -> None:
    claims = {claim["other"]: claim for claim in check_claims(rows())}
    assert {name: claim["difference"] for name, claim in claims.items()} == {
        "mobilenetv2-0.75": 5.0,
        "shufflenetv2": 5.4,
        "mobilenetv3-small": 7.4,
        "efficientnet-b0": 2.1,
        "deit-tiny": 2.6,
    }
    assert all(claim["holds"] for claim in claims.values())
    assert claims["deit-tiny"]["times_larger"] == 5_700_000 / 2_300_000
    # timm's own measurements of the best weights there are: 78.31 and 79.4.
    assert claims["efficientnet-b0"]["difference_today"] == -1.09
    assert claims["mobilenetv2-0.75"]["difference_today"] is None
    assert sentence(claims["deit-tiny"]) == (
        "mobilevit-xs over deit-tiny: claimed +2.6, 74.8 - 72.2 = +2.6; claimed 2.5 times smaller, 5.70 M / 2.30 M = "
        "2.48; holds (with the libraries' best weights of today 74.64 - 72.17 = +2.47)"
    )


@pytest.mark.parametrize("changed", [{"published_top1": 72.3}, {"num_parameters": 5_000_000}])
def test_a_claim_that_does_not_hold(changed: dict[str, float]) -> None:
    altered = [row | changed if row["name"] == "deit-tiny" else row for row in rows()]
    assert [claim["other"] for claim in check_claims(altered) if not claim["holds"]] == ["deit-tiny"]
    assert check_claims([row for row in rows() if row["name"] != "mobilevit-xs"])[0]["other"] == "efficientnet-b0"


# ---------------------------------------------------------------------------------------------------------------------
# The whole


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """Really timed, in torch, on small images."""
    systems = run.choose(["mobilenetv3-small", "deit-tiny-basic", "deit-tiny"])
    return run.compare(systems, runtimes=["torch"], batch_sizes=[1, 2], size_px=64, num_rounds=3, num_threads=1)


def test_timings(report: dict[str, Any]) -> None:
    by_name = {row["name"]: row for row in report["rows"]}
    assert list(by_name) == ["mobilenetv3-small", "deit-tiny-basic", "deit-tiny", *OURS]
    for row in report["rows"]:
        assert [timing["batch_size"] for timing in row["timings"]] == [1, 2]
        for timing in row["timings"]:
            latency_ms = timing["latency_ms"]
            assert 0 < latency_ms["p10"] <= latency_ms["median"] <= latency_ms["p90"]
            expected = 1e3 * timing["batch_size"] / latency_ms["median"]
            assert timing["images_per_second"] == pytest.approx(expected)
            assert timing["layout"] in ("channels first", "channels last")
            assert set(timing["ratios"]) == set(OURS) - {row["name"]}
            assert timing["ratio"] == timing["ratios"].get(timing["against"])
    against = [row["timings"][0]["against"] for row in report["rows"]]
    assert against == ["mobilevit-xs", "mobilevit-s", "mobilevit-s", None, None, None]
    # One network, trained in two ways.
    assert by_name["deit-tiny"]["timings"] == by_name["deit-tiny-basic"]["timings"]
    # Which are at a size that nothing was published for.
    assert report["claims"] == report["speeds"] == []
    assert report["notes"] == ["top-1, and what the paper claims, are for the sizes of the papers and not for 64 px"]
    (speed,) = speeds(report["rows"])
    assert (speed["other"], speed["published_ratio"]) == ("deit-tiny", pytest.approx(28.15 / 17.86))


def test_ratios_are_of_the_same_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is twice as slow in every second round changes the times, and not the ratios."""

    def measure(runs: list[Any], num_rounds: int) -> Any:
        slow = torch.tensor([1.0, 2.0]).repeat(num_rounds)[:num_rounds]
        return (torch.arange(1, len(runs) + 1)[:, None] * slow).numpy()

    monkeypatch.setattr(run.timing, "measure", measure)
    names = ["mobilenetv3-small", "mobilenetv2-0.75", "shufflenetv2"]
    monkeypatch.setattr(run, "GROUP", 2)
    found = run.compare(
        run.choose(names), runtimes=["torch"], size_px=32, num_rounds=4, num_threads=1, baseline="mobilevit-xs"
    )
    timings = {row["name"]: row["timings"][0] for row in found["rows"]}
    ratios = {name: timing["ratio"] for name, timing in timings.items()}
    for name, ratio in {"mobilevit-xxs": 1 / 2, "mobilevit-s": 3 / 2, "shufflenetv2": 4 / 2}.items():
        assert ratios[name] == pytest.approx({"median": ratio, "p10": ratio, "p90": ratio})
    assert ratios["mobilevit-xs"] is None
    assert timings["mobilevit-xs"]["latency_ms"]["median"] == 3
    assert timings["mobilenetv2-0.75"]["latency_ms"]["p90"] == 8


def test_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "OURS", ("mobilevit-xxs",))  # an export takes seconds
    problems: list[str] = []
    write_side = run.write_side

    def write(name: str, *args: Any) -> Any:
        if name == "shufflenetv2":
            raise RuntimeError("no such operator\nand more")
        return write_side(name, *args)

    monkeypatch.setattr(run, "write_side", write)
    found = run.compare(
        run.choose(["mobilenetv3-small", "shufflenetv2"]),
        runtimes=["onnx"],
        size_px=32,
        num_rounds=2,
        num_threads=1,
        on_problem=problems.append,
    )
    assert problems == found["notes"]
    assert problems[1:] == ["onnx: left out shufflenetv2, which cannot be run (no such operator)"]
    for row in found["rows"]:
        assert [timing["error"] < 1e-3 for timing in row["timings"]] == [True] * (row["name"] != "shufflenetv2")
    assert "| shufflenetv2 | 32 | 2.28 (2.3) |" in tables.markdown(found, [])
    with pytest.raises(ValueError, match="timed on the CPU alone"):
        run.compare(run.choose(OURS), runtimes=["onnx"], device="cuda")


def test_what_is_written_agrees(report: dict[str, Any], tmp_path: Path) -> None:
    files = tables.write(report, tmp_path / "a/b")
    figures = ["accuracy_parameters_cnn.png", "accuracy_parameters_vit.png"]
    figures += [f"accuracy_latency_torch_b{size}.png" for size in (1, 2)]
    assert [file.name for file in files] == ["table.md", "table.csv", "table.json", *figures]
    assert all(file.stat().st_size > 1000 for file in files)
    assert json.loads(files[2].read_text()) == report
    with files[1].open(newline="") as file:
        lines = list(csv.DictReader(file))
    text = files[0].read_text()
    assert [f"]({name})" in text for name in figures] == [True] * 4
    table_lines = [re.split(r" *\| *", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    for row, line, cells in zip(report["rows"], lines, table_lines[2:], strict=False):
        assert line["name"] == cells[0] == row["name"]
        for key in ("num_parameters", "num_macs", "num_macs_without_attention", "activation_bytes"):
            assert int(line[key]) == row[key]
        assert cells[2].split()[0] == f"{row['num_parameters'] / 1e6:.2f}"
        assert cells[3] == f"{row['num_macs'] / 1e9:.3f} / {row['num_macs_without_attention'] / 1e9:.3f}"
        assert float(line["published_top1"]) == float(cells[5]) == row["published_top1"]
        median = row["timings"][1]["latency_ms"]["median"]
        assert float(line["torch_b2_latency_ms_median"]) == median
        assert cells[12].split()[0] == f"{median:.2f}"
    assert len(lines) == len(report["rows"])
    assert tables.findings(report) == report["notes"]


def test_a_size_that_some_do_not_take() -> None:
    found = run.compare(run.choose(["espnetv2", "crossvit-tiny"]), runtimes=[], size_px=224)
    assert [row["name"] for row in found["rows"]] == ["espnetv2", *OURS]
    left_out, about_sizes = found["notes"]
    assert left_out == "left out crossvit-tiny: size_px is 224; crossvit-tiny takes multiples of 120"
    assert about_sizes.endswith("and not for 224 px")
    assert tables.findings(found)[-2:] == found["notes"]


@pytest.mark.parametrize("width", [60, 100, 300])
def test_a_narrow_terminal_gets_several_tables(report: dict[str, Any], width: int) -> None:
    printed = io.StringIO()
    Console(width=width, file=printed, markup=False, emoji=False, highlight=False).print(tables.table(report))
    lines = printed.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    for row in report["rows"]:
        assert sum(line.split()[:1] == [row["name"]] for line in lines) == sum("system" in line for line in lines)
    text = " ".join(" ".join(lines).split())
    for _, cells in tables.columns(report):
        assert all(" ".join(cell.split()) in text for cell in cells)


def test_without_times() -> None:
    found = run.compare(run.choose(["espnetv2"]), runtimes=[])
    assert [heading for heading, _ in tables.columns(found)][-1] == "best weights"
    assert [cells[0] for _, cells in tables.columns(found)][:3] == ["espnetv2", "224", "2.31 (2.3)"]
    assert tables.findings(found) == []
    counted = {row["backbone"]: row["num_parameters"] for row in found["dense"]["detection"]}
    for row in (*found["dense"]["detection"], *found["dense"]["segmentation"]):
        if row["num_parameters"]:
            assert row["num_parameters"] == pytest.approx(row["published_parameters"], abs=51_000)
    assert counted["mobilevit-s"] == 5_738_826
    assert counted["resnet-50"] is None


# ---------------------------------------------------------------------------------------------------------------------
# Figures


@pytest.mark.parametrize("figure", ["cnn", "vit", "latency"])
def test_figures_have_all_points(figure: str) -> None:
    if figure == "latency":
        shown = rows()
        report = {"rows": shown, "num_threads": 1, "device": "cpu", "processor": "abacus", "date": "2000-01-01"}
        drawn = accuracy_against_latency(report, "torch", 4)
        places = {row["name"]: (row["timings"][0]["latency_ms"]["median"], row["published_top1"]) for row in shown}
    else:
        shown = [row for row in rows() if row["family"] in (figure, "mobilevit")]
        drawn = accuracy_against_parameters(rows(), figure)
        places = {row["name"]: (row["num_parameters"] / 1e6, row["published_top1"]) for row in shown}
    (axes,) = drawn.axes
    points = [c for c in axes.collections if isinstance(c, PathCollection)]
    assert [tuple(np.asarray(point.get_offsets())[0]) for point in points] == list(places.values())
    assert sorted(text.get_text() for text in axes.texts) == sorted(name.removesuffix("-basic") for name in places)
    faces = [np.asarray(point.get_facecolor())[0, :3] for point in points]
    hollow = [row["name"] for row, face in zip(shown, faces, strict=True) if face.min() == 1]
    assert hollow == [row["name"] for row in shown if row["source"] == OWN_PAPER]
    shapes = {
        row["augmentation"]: len(np.asarray(point.get_paths()[0].vertices))
        for row, point in zip(shown, points, strict=True)
        if row["family"] != "mobilevit"
    }
    assert len(set(shapes.values())) == len(shapes)
    # No name covers another, but for a hair.
    drawn.canvas.draw()
    boxes = [text.get_window_extent().padded(-2) for text in axes.texts]
    assert not [(i, k) for i in range(len(boxes)) for k in range(i) if boxes[i].overlaps(boxes[k])]
