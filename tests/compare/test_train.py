"""Systems trained side by side: through the one loop, taken up where they were, told from chance by the formulas."""

from __future__ import annotations

import csv
import json
import re
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from PIL import Image
from scipy.stats import ttest_ind
from sklearn.datasets import load_digits
from torch import Tensor, nn

from mobilevit.compare import run, tables
from mobilevit.compare.counts import count
from mobilevit.compare.figures import learning_curves, measured_against_latency, measured_against_parameters
from mobilevit.compare.models import SCALED, SYSTEMS, Network
from mobilevit.compare.statistics import holm, sentence, welch
from mobilevit.compare.train import choose, compare_rows, compare_trained
from mobilevit.models.mobilevit import MobileViT
from mobilevit.recipes import RECIPES, Compute, Data, Optimizer, Recipe, Sampler
from mobilevit.training import loop
from mobilevit.training.loop import TIMES, DivergedError, train
from mobilevit.training.run import FinishedError
from mobilevit.weights import WeightsError, read

RECIPE = Recipe(
    architecture="xxs",
    epochs=2,
    batch_size=8,
    data=Data(size_px=32, eval_resize=1.0, min_scale=0.6, flip=False, num_workers=0),
    optimizer=Optimizer(lr=2e-2, warmup_steps=1),
    compute=Compute(micro_batch_size=8),
)


def tiny(name: str, width: int) -> Network:
    """A network with all that a resume could lose: batch norm, dropout, a buffer that is no float."""

    def build(num_classes: int, size_px: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, width, 3, stride=4),
            nn.BatchNorm2d(width),
            nn.Hardswish(inplace=True),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(4 * width, num_classes),
        )

    return Network(name=name, family="cnn", size_px=32, builder=build, library="ours", paper="0000.00000")


NARROW, WIDE = tiny("narrow", 4), tiny("wide", 8)
XXS = SYSTEMS["mobilevit-xxs"]


class Exploding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((1, 2, 3))[:, None] * self.scale * (torch.inf if self.training else 1.0)


BURSTING = replace(NARROW, name="bursting", builder=lambda num_classes, size_px: Exploding())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Zeros and ones of scikit-learn: 24 to train on, 12 to test."""
    folder = tmp_path_factory.mktemp("data")
    pixels, labels = load_digits(return_X_y=True)
    for digit in (0, 1):
        for i, values in enumerate(pixels[labels == digit][:18]):
            file = folder / ("test" if i % 3 == 2 else "train") / str(digit) / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((values.reshape(8, 8) * 255 / 16).round().astype(np.uint8)).save(file)
    return folder


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The report of a comparison that nothing happened to, and its folder."""
    out = tmp_path_factory.mktemp("whole")
    return compare_trained([NARROW, WIDE, XXS], data, out, RECIPE, seeds=(0, 1)), out


@pytest.fixture(scope="module")
def timed(whole: tuple[dict[str, Any], Path], data: Path) -> dict[str, Any]:
    """The same runs, read and timed: in torch, and for ONNX Runtime two of them, since an export takes seconds."""
    _, out = whole
    options: dict[str, Any] = {"seeds": (0, 1), "num_rounds": 3, "num_threads": 1}
    report = compare_trained([NARROW, WIDE, XXS], data, out, RECIPE, runtimes=["torch"], **options)
    exported = compare_trained([NARROW, XXS], data, out, RECIPE, runtimes=["onnx"], **options)
    for row in exported["rows"]:
        next(one for one in report["rows"] if one["name"] == row["name"])["timings"].extend(row["timings"])
    return report


def without_times(report: dict[str, Any]) -> dict[str, Any]:
    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: clean(one)
                for key, one in value.items()
                if key not in ("seconds_per_epoch", "images_per_second", "seconds_by_epoch", "load_average")
            }
        return [clean(one) for one in value] if isinstance(value, list) else value

    return clean(report)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def test_the_way_of_others_is_that_of_mobilevit(data: Path, tmp_path: Path) -> None:
    """The same network as one of others and as our own: the same losses and weights to the bit."""
    train(RECIPE, data, tmp_path / "ours")
    train(RECIPE, data, tmp_path / "theirs", classifier=XXS)
    ours, theirs = (
        [
            {key: value for key, value in line.items() if key not in TIMES}
            for name in ("steps.jsonl", "metrics.jsonl")
            for line in lines(tmp_path / side / name)
        ]
        for side in ("ours", "theirs")
    )
    assert ours == theirs
    tensors = read(tmp_path / "ours" / "model.safetensors").tensors
    with safetensors.safe_open(tmp_path / "theirs" / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(tensors)
        assert all(torch.equal(file.get_tensor(key), tensor) for key, tensor in tensors.items())
        said = json.loads(file.metadata()["mobilevit.other"])
    assert (said["network"], said["class_names"]) == ("mobilevit-xxs", ["0", "1"])
    assert said["training"]["metrics"]["val_top1"] == ours[-1]["val_top1"]
    with pytest.raises(WeightsError, match="weights of mobilevit-xxs, trained to compare with; give weights of Mob"):
        read(tmp_path / "theirs" / "model.safetensors")
    assert "mobilevit predict" not in (tmp_path / "theirs" / "report.html").read_text()
    with pytest.raises(ValueError, match="network was None, is now mobilevit-xxs"):
        train(RECIPE, data, tmp_path / "ours", classifier=XXS)
    with pytest.raises(FinishedError, match="this run has finished") as finished:
        train(RECIPE, data, tmp_path / "theirs", classifier=XXS)
    assert finished.value.epochs == lines(tmp_path / "theirs" / "metrics.jsonl")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"task": "detect"}, "task is detect"),
        ({"sampler": Sampler("listing")}, "sampler.variant is listing"),
        ({"optimizer": Optimizer(freeze="stage2")}, "optimizer.freeze is stage2"),
        ({"optimizer": Optimizer(backbone_lr_scale=0.1)}, "optimizer.backbone_lr_scale is 0.1"),
        ({"compute": Compute(sync_batch_norm=True)}, "compute.sync_batch_norm is True"),
    ],
)
def test_a_recipe_that_is_not_for_all(data: Path, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"{said}; to train other networks than MobileViT it must be"):
        compare_trained([NARROW, XXS], data, tmp_path, replace(RECIPE, **change))
    with pytest.raises(ValueError, match=f"{said}; to train other networks than MobileViT it must be"):
        train(replace(RECIPE, **change), data, tmp_path, classifier=NARROW)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# The comparison


def test_what_is_reported_is_what_the_runs_left(whole: tuple[dict[str, Any], Path], data: Path) -> None:
    report, out = whole
    assert [row["name"] for row in report["rows"]] == ["narrow", "wide", "mobilevit-xxs"]
    assert (report["num_train"], report["num_val"], report["num_classes"]) == (24, 12, 2)
    assert report["held_out"] == "test"
    assert "evaluated on the 12 of its test/" in tables.circumstances_of_training(report)
    assert "evaluated on 12 that were cut off by chance" in tables.circumstances_of_training(
        report | {"held_out": None}
    )
    for row in report["rows"]:
        left = [lines(out / "runs" / row["name"] / f"seed-{seed}" / "metrics.jsonl") for seed in (0, 1)]
        last = [epochs[-1]["val_top1"] for epochs in left]
        assert [run["top1"] for run in row["runs"]] == last
        assert row["top1"] == sum(last) / 2
        assert row["top1_std"] == pytest.approx(abs(last[0] - last[1]) / 2**0.5)
        seconds = sorted(epoch["seconds"] for epochs in left for epoch in epochs)
        assert row["seconds_per_epoch"] == pytest.approx((seconds[1] + seconds[2]) / 2)
        assert row["images_per_second"] == pytest.approx(24 / row["seconds_per_epoch"])
        # Two seeds begin with other weights, and see other crops in another order.
        assert left[0][0]["train_loss"] != left[1][0]["train_loss"]
    costs = {row["name"]: row["num_parameters"] for row in report["rows"]}
    assert costs["narrow"] == 3 * 9 * 4 + 4 + 2 * 4 + 4 * 4 * 2 + 2
    assert costs["mobilevit-xxs"] == sum(x.numel() for x in MobileViT("xxs", num_classes=2).parameters())
    # MobileViT's weights are as any other run leaves them.
    weights = read(out / "runs" / "mobilevit-xxs" / "seed-1" / "model.safetensors")
    assert (weights.architecture.name, weights.class_names, weights.preprocessing.crop_px) == ("xxs", ("0", "1"), 32)


def test_a_finished_run_is_read(
    whole: tuple[dict[str, Any], Path], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, out = whole
    monkeypatch.setattr(loop, "load", lambda *args, **options: pytest.fail("an image is read"))
    again = compare_trained([NARROW, WIDE, XXS], data, out, RECIPE, seeds=(0, 1))
    assert again["rows"] == report["rows"]
    fewer = compare_trained([WIDE, XXS], data, out, RECIPE, seeds=(1,))
    assert [row["runs"] for row in fewer["rows"]] == [row["runs"][1:] for row in report["rows"][1:]]


class KilledError(BaseException):
    """Stands for what no code gets to see."""


@pytest.mark.parametrize("name", ["narrow", "mobilevit-xxs"])
def test_what_was_killed_goes_on_to_the_same_numbers(
    whole: tuple[dict[str, Any], Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Killed in the second epoch of seed 1, after a checkpoint of it or before."""
    report, _ = whole
    networks = [NARROW, WIDE, XXS]
    real, steps = loop.learning_rate_at, []

    def rate(*args: Any, **options: Any) -> float:
        told = list((tmp_path / "runs" / name / "seed-1").glob("run.json"))
        steps.extend(told)
        if told and len(steps) == 5:
            raise KilledError
        return real(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "learning_rate_at", rate)
        with pytest.raises(KilledError):
            compare_trained(networks, data, tmp_path, RECIPE, seeds=(0, 1))
    assert len(lines(tmp_path / "runs" / name / "seed-1" / "metrics.jsonl")) == 1
    resumed = compare_trained(networks, data, tmp_path, RECIPE, seeds=(0, 1))
    assert without_times(resumed) == without_times(report)


def test_another_recipe_or_other_data_are_refused(whole: tuple[dict[str, Any], Path], data: Path) -> None:
    _, out = whole
    with pytest.raises(ValueError, match=r"seed-0: contains another run \(recipe.epochs was 2, is now 3\)"):
        compare_trained([NARROW, XXS], data, out, replace(RECIPE, epochs=3), seeds=(0,))
    with pytest.raises(ValueError, match=r"seed-0: contains another run \(other data\);"):
        compare_trained([NARROW, XXS], data / "train", out, RECIPE, seeds=(0,))


def test_a_system_that_fails_is_named_and_the_others_go_on(data: Path, tmp_path: Path) -> None:
    patchy = replace(NARROW, name="patchy", size_multiple_px=24)
    clumsy = replace(NARROW, name="clumsy", builder=lambda num_classes, size_px: nn.Linear(1, 1))
    told: list[str] = []
    networks = [BURSTING, patchy, clumsy, NARROW, XXS]
    report = compare_trained(networks, data, tmp_path, replace(RECIPE, epochs=1), seeds=(3, 4), on_problem=told.append)
    failures = {row["name"]: row["failures"] for row in report["rows"]}
    assert failures["patchy"] == {
        "all seeds": "cannot be built for 32 px and 2 classes (size_px is 32; patchy takes multiples of 24)"
    }
    assert failures["clumsy"]["all seeds"].startswith("cannot be built for 32 px and 2 classes (")
    assert set(failures["bursting"]) == {"seed 3", "seed 4"}
    assert failures["bursting"]["seed 3"].startswith("the loss is nan at epoch 1, step 1, 32 px, images ")
    assert not failures["narrow"] | failures["mobilevit-xxs"]
    assert len(told) == 4
    assert [comparison["name"] for comparison in report["comparisons"]] == ["narrow"]
    found = tables.findings_of_training(report)
    assert [line.split(",")[0] for line in found[1:5]] == ["bursting", "bursting", "patchy", "clumsy"]
    # Half of the images are of either class.
    idle = {row["name"] for row in report["rows"] if any(run["top1"] <= 50 for run in row["runs"])}
    assert {line.split(": no better than ")[0] for line in found[5:]} == idle
    assert "mobilevit-xxs" in idle
    cells = dict(tables.columns_of_training(report))
    assert cells["top-1"][:3] == ["-"] * 3
    assert cells["M parameters"][1:3] == ["-"] * 2
    assert cells["of each seed"][:3] == ["failed"] * 3
    tables.write_training(report, tmp_path)
    with pytest.raises(DivergedError):  # as `mobilevit train` has it
        train(replace(RECIPE, epochs=1), data, tmp_path / "one", classifier=BURSTING)


def test_what_cannot_begin(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="seeds are 1, 1; give one or more, each of them once"):
        compare_trained([NARROW, XXS], data, tmp_path, RECIPE, seeds=(1, 1))
    with monkeypatch.context() as patched:
        patched.setenv("WORLD_SIZE", "2")
        with pytest.raises(ValueError, match="leave out torchrun"):
            compare_trained([NARROW, XXS], data, tmp_path, RECIPE)
    for library, network in (("timm", SCALED["deit-84-patch8"]), ("scipy", NARROW)):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, library, None)
            with pytest.raises(ValueError, match=rf"{library} is not installed.*'mobilevit\[compare\]'"):
                compare_trained([network, XXS], data, tmp_path, RECIPE)
    assert not list(tmp_path.iterdir())


def test_choose() -> None:
    small = RECIPES["small"]
    assert [network.name for network in choose([], small)] == ["mobilevit-xxs", *SCALED]
    assert [network.name for network in choose(["pit-tiny"], small)] == ["pit-tiny", "mobilevit-xxs"]
    assert [network.name for network in choose(["pit-tiny"], RECIPES["plain"])] == ["pit-tiny", "mobilevit-xs"]
    assert [network.name for network in choose(["mobilevit-s"], small)] == ["mobilevit-s"]
    assert [network.name for network in choose(["pit-tiny"], small, "mobilevit-s")] == ["pit-tiny", "mobilevit-s"]
    with pytest.raises(ValueError, match=r"no system 'deit-84'; did you mean deit-84-patch8"):
        choose(["deit-84"], small)
    with pytest.raises(ValueError, match="deit-tiny-basic is the same network as deit-tiny; name one of them"):
        choose(["deit-tiny-basic", "deit-tiny"], small)


def test_scaled_systems() -> None:
    """Counted by hand from the widths that the papers' rules make of 0.65, 0.75 and 0.9, and the depth that stays."""
    counts = {name: count(lambda: network.build(10), 64) for name, network in SCALED.items()}  # noqa: B023
    deit = (3 * 8 * 8 + 1) * 84 + (64 + 2) * 84 + 12 * (12 * 84**2 + 13 * 84) + 2 * 84 + 85 * 10
    assert counts["deit-84-patch8"].num_parameters == deit
    assert counts["deit-84-patch8"].num_attention_macs == 12 * 2 * 65**2 * 84
    assert counts["mobilenetv2-0.65"].num_parameters == 1_078_762
    assert counts["shufflenetv2-0.9"].num_parameters == 1_066_154
    for cost in counts.values():
        assert 1.0e6 < cost.num_parameters < 1.1e6
    assert not set(SCALED) & set(SYSTEMS)


@pytest.mark.parametrize("name", list(SCALED))
def test_scaled_systems_learn(name: str) -> None:
    """In the memory layout that images are loaded in, every weight has a share in the loss."""
    network = SCALED[name].build(5, 64).train()
    images = torch.rand(4, 3, 64, 64).to(memory_format=torch.channels_last)
    nn.functional.cross_entropy(network(images), torch.tensor([0, 1, 4, 2])).backward()
    assert all(x.grad is not None and x.grad.isfinite().all() and x.grad.any() for x in network.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


@pytest.mark.parametrize(("n", "m"), [(3, 3), (2, 5)])
def test_welch(n: int, m: int) -> None:
    random = np.random.default_rng(n)
    a, b = 90 + random.normal(0, 0.2, n), 90.5 + random.normal(0, 0.6, m)
    expected: Any = ttest_ind(a, b, equal_var=False)
    found = welch(a.tolist(), b.tolist())
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert found.mean == pytest.approx(a.mean() - b.mean())


def test_welch_where_nothing_can_be_said() -> None:
    assert welch([90.0], [91.0, 92.0]).p is None
    alike = welch([0.1, 0.1, 0.1], [0.3, 0.3, 0.3])
    assert (alike.p, alike.low) == (None, None)
    assert alike.mean == pytest.approx(-0.2)


def test_holm_by_hand() -> None:
    # Sorted: 0.01 * 4, 0.02 * 3, then 0.03 * 2 and 0.04 * 1, of which the last may not be less than the one before.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def row(name: str, num_parameters: int, top1: list[float]) -> dict[str, Any]:
    return {"name": name, "num_parameters": num_parameters, "runs": [{"top1": value} for value in top1]}


def test_comparisons_by_hand() -> None:
    ours, low = [93.0, 93.2, 93.4], [92.0, 92.2, 92.4]
    rows = [row("a", 1, low), row("b", 1, ours), row("mobilevit-xxs", 1, ours), row("c", 1, [99.0])]
    a, b = compare_rows(rows, 3, "nearest")
    # Of both sides the variance is 0.04, the error sqrt(0.08 / 3), and Welch's degrees of freedom are 4.
    assert (a["against"], a["difference"]) == ("mobilevit-xxs", pytest.approx(-1.0))
    assert (a["low"], a["high"]) == pytest.approx((-1 - 2.776445 * 0.1632993, -1 + 2.776445 * 0.1632993))
    assert a["p_holm"] == pytest.approx(2 * a["p"])
    assert (b["p"], b["p_holm"]) == (pytest.approx(1), pytest.approx(1))
    assert sentence(a) == (
        "a is 1.00 points below mobilevit-xxs (95 % interval -1.45 to -0.55, p 0.0072 over 3 seeds): unlikely chance"
    )
    assert sentence(b).startswith("b: no difference from mobilevit-xxs can be seen with 3 seeds (+0.00 points")
    (once,) = compare_rows([row("a", 1, low[:1]), row("mobilevit-xs", 1, ours[:1])], 1, "mobilevit-xs")
    assert sentence(once) == "a is 1.00 points below mobilevit-xs; one seed says nothing about chance"
    assert "the same with each of 2 seeds" in sentence(once | {"num_seeds": 2})
    assert sentence(once | {"difference": 0.0}).startswith("a is level with mobilevit-xs; ")
    # Nothing to compare with: ours lacks a seed, or is not there.
    assert compare_rows([row("a", 1, low), row("mobilevit-xxs", 1, ours[:2])], 3, "nearest") == []
    assert compare_rows([row("a", 1, low), row("mobilevit-xxs", 1, ours)], 3, "mobilevit-s") == []


# ---------------------------------------------------------------------------------------------------------------------
# What is written


def test_what_is_written_agrees(whole: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    report, _ = whole
    files = tables.write_training(report, tmp_path)
    figures = ["accuracy_parameters.png", "learning_curves.png"]
    assert [file.name for file in files] == ["table.md", "table.csv", "table.json", *figures]
    assert json.loads(files[2].read_text()) == json.loads(json.dumps(report))
    with files[1].open(newline="") as file:
        flat = list(csv.DictReader(file))
    text = files[0].read_text()
    cells = [re.split(r" *\| *", line)[1:-1] for line in text.splitlines() if line.startswith("|")][2:]
    for row, line, shown in zip(report["rows"], flat, cells, strict=True):
        assert line["name"] == shown[0] == row["name"]
        assert float(line["top1"]) == row["top1"]
        assert [float(line[f"top1_seed_{seed}"]) for seed in (0, 1)] == [run["top1"] for run in row["runs"]]
        assert shown[4] == f"{row['top1']:.2f} +- {row['top1_std']:.2f}"
    assert [line["against"] for line in flat] == ["mobilevit-xxs", "mobilevit-xxs", ""]
    for comparison in report["comparisons"]:
        assert f"- {sentence(comparison)}\n" in text
    with Image.open(files[3]) as image:
        assert image.size == (1600, 1024)


def test_times_of_what_was_trained(timed: dict[str, Any], tmp_path: Path) -> None:
    report = timed
    assert report["timing"] == {"num_rounds": 3, "num_threads": 1}
    for row in report["rows"]:
        for timing in row["timings"]:
            assert timing["against"] == (None if row["name"] == "mobilevit-xxs" else "mobilevit-xxs")
            assert timing["ratio"] == timing["ratios"].get("mobilevit-xxs")
            assert (timing["batch_size"], timing["latency_ms"]["median"] > 0) == (1, True)
        assert [timing["runtime"] for timing in row["timings"]] == ["torch", "onnx"][: 1 + (row["name"] != "wide")]
    files = tables.write_training(report, tmp_path)
    assert [file.name for file in files[5:]] == ["accuracy_latency_torch.png", "accuracy_latency_onnx.png"]
    cells = dict(tables.columns_of_training(report))
    narrow, wide, _ = cells["ONNX Runtime, batch 1: ms"]
    assert wide == "-"
    with files[1].open(newline="") as file:
        line = next(csv.DictReader(file))
    assert f"{float(line['onnx_b1_latency_ms_median']):.2f}" == narrow.split()[0]
    assert tables.TIMES in files[0].read_text()
    assert "; times of an image with 1 thread, 3 rounds" in tables.circumstances_of_training(report)
    (axes,) = measured_against_latency(report, "onnx", 1).axes
    points = [np.asarray(points.get_offsets())[0] for points in axes.collections]
    expected = [(row["timings"][1]["latency_ms"]["median"], row["top1"]) for row in report["rows"][::2]]
    np.testing.assert_allclose(points, expected)


def test_what_cannot_be_timed_is_told(
    whole: tuple[dict[str, Any], Path], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After hours of training a runtime that refuses a network, ours too, must not cost the report."""
    _, out = whole

    def refuse(*args: Any) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(run, "write_side", refuse)
    told: list[str] = []
    report = compare_trained([NARROW, XXS], data, out, RECIPE, seeds=(0,), runtimes=["onnx"], on_problem=told.append)
    assert told == [
        f"onnx: left out {name}, which cannot be run (no such operator)" for name in ("mobilevit-xxs", "narrow")
    ]
    assert report["notes"] == tables.findings_of_training(report)[-2:] == told
    assert [row["timings"] for row in report["rows"]] == [[], []]


def test_figures_of_training(whole: tuple[dict[str, Any], Path]) -> None:
    report, _ = whole
    (axes,) = measured_against_parameters(report).axes
    bars = [np.asarray(line.get_xydata()) for line in axes.lines[:3]]
    for row, bar in zip(report["rows"], bars, strict=True):
        x, std = row["num_parameters"] / 1e6, row["top1_std"]
        np.testing.assert_allclose(bar, [(x, row["top1"] - std), (x, row["top1"] + std)])
    assert sorted(text.get_text() for text in axes.texts) == ["mobilevit-xxs", "narrow", "wide"]
    (axes,) = learning_curves(report).axes
    means = {str(line.get_label()): np.asarray(line.get_ydata()).tolist() for line in axes.lines}
    for row in report["rows"]:
        first, second = (run["top1_by_epoch"] for run in row["runs"])
        assert means[row["name"]] == pytest.approx([(a + b) / 2 for a, b in zip(first, second, strict=True)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learning_curves(report | {"seeds": [0], "rows": [row | {"runs": row["runs"][:1]} for row in report["rows"]]})
