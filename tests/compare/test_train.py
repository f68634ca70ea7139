"""Models trained with the same recipe: the training loop, resume, statistics, and the written files."""

from __future__ import annotations

import csv
import json
import logging
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
from scipy.stats import t as student_t
from sklearn.datasets import load_digits
from torch import Tensor, nn

from mobilevit.benchmark.cost import Cost, count
from mobilevit.compare import run, tables
from mobilevit.compare.figures import accuracy_against_latency, accuracy_against_parameters, learning_curves
from mobilevit.compare.models import MODELS, SCALED, Model
from mobilevit.compare.reports import Runtime, SeedRun, TrainedReport, TrainedRow
from mobilevit.compare.run import TimingOptions
from mobilevit.compare.statistics import Comparison, holm, welch
from mobilevit.compare.train import choose, compare_rows, compare_trained
from mobilevit.files import MissingExtraError
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


def tiny(name: str, width: int) -> Model:
    """A model with all kinds of state that a resume could lose: batch norm, dropout, an integer buffer."""

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

    return Model(name=name, family="cnn", size_px=32, builder=build, library="ours", paper="0000.00000")


NARROW, WIDE = tiny("narrow", 4), tiny("wide", 8)
XXS = MODELS["mobilevit-xxs"]


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
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainedReport, Path]:
    """The report of an uninterrupted comparison, and its folder."""
    out = tmp_path_factory.mktemp("whole")
    return compare_trained([NARROW, WIDE, XXS], data, out, RECIPE, seeds=(0, 1)), out


@pytest.fixture(scope="module")
def timed(whole: tuple[TrainedReport, Path], data: Path) -> TrainedReport:
    """The same runs, timed: all in torch, and two of them in ONNX Runtime, because an export takes seconds."""
    _, out = whole

    def compare(models: list[Model], runtime: Runtime) -> TrainedReport:
        options = TimingOptions((runtime,), num_rounds=3, num_threads=1)
        return compare_trained(models, data, out, RECIPE, seeds=(0, 1), options=options)

    report, exported = compare([NARROW, WIDE, XXS], "torch"), compare([NARROW, XXS], "onnx")
    more = {row.name: row.timings for row in exported.rows}
    return replace(report, rows=[replace(row, timings=row.timings + more.get(row.name, ())) for row in report.rows])


def without_times(report: TrainedReport) -> dict[str, Any]:
    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: clean(one)
                for key, one in value.items()
                if key not in ("seconds_per_epoch", "images_per_second", "seconds_by_epoch", "load_average")
            }
        return [clean(one) for one in value] if isinstance(value, list | tuple) else value

    return clean(report.to_dict())


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def test_other_models_train_exactly_like_mobilevit(data: Path, tmp_path: Path) -> None:
    """MobileViT trained as itself and as another model: bit-identical losses and weights."""
    train(RECIPE, data, tmp_path / "ours")
    train(RECIPE, data, tmp_path / "theirs", classifier=XXS)
    ours, theirs = (
        [
            {key: value for key, value in line.items() if key not in TIMES}
            for name in ("steps.jsonl", "metrics.jsonl")
            for line in lines(tmp_path / run / name)
        ]
        for run in ("ours", "theirs")
    )
    assert ours == theirs
    tensors = read(tmp_path / "ours" / "model.safetensors").tensors
    with safetensors.safe_open(tmp_path / "theirs" / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(tensors)
        assert all(torch.equal(file.get_tensor(key), tensor) for key, tensor in tensors.items())
        metadata = json.loads(file.metadata()["mobilevit.other"])
    assert (metadata["network"], metadata["class_names"]) == ("mobilevit-xxs", ["0", "1"])
    assert metadata["training"]["metrics"]["val_top1"] == ours[-1]["val_top1"]
    with pytest.raises(WeightsError, match="mobilevit-xxs"):
        read(tmp_path / "theirs" / "model.safetensors")
    assert "mobilevit predict" not in (tmp_path / "theirs" / "report.html").read_text()
    with pytest.raises(ValueError, match="mobilevit-xxs"):
        train(RECIPE, data, tmp_path / "ours", classifier=XXS)
    with pytest.raises(FinishedError, match="finished") as finished:
        train(RECIPE, data, tmp_path / "theirs", classifier=XXS)
    assert finished.value.epochs == lines(tmp_path / "theirs" / "metrics.jsonl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "detect"}, "task is detect"),
        ({"sampler": Sampler("listing")}, "sampler.variant is listing"),
        ({"optimizer": Optimizer(freeze="stage2")}, "optimizer.freeze is stage2"),
        ({"optimizer": Optimizer(backbone_lr_scale=0.1)}, "optimizer.backbone_lr_scale is 0.1"),
        ({"compute": Compute(sync_batch_norm=True)}, "compute.sync_batch_norm is True"),
        ({"compute": Compute(quantization_aware=True)}, "compute.quantization_aware is True"),
    ],
)
def test_recipes_for_mobilevit_only(data: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare_trained([NARROW, XXS], data, tmp_path, replace(RECIPE, **change))
    with pytest.raises(ValueError, match=message):
        train(replace(RECIPE, **change), data, tmp_path, classifier=NARROW)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# The comparison


def test_the_report_agrees_with_the_runs(whole: tuple[TrainedReport, Path], data: Path) -> None:
    report, out = whole
    assert [row.name for row in report.rows] == ["narrow", "wide", "mobilevit-xxs"]
    assert (report.num_train, report.num_val, report.num_classes, report.val_split) == (24, 12, 2, "test")
    assert "12 images of its test/" in tables.header(report)
    assert "12 images of a validation split" in tables.header(replace(report, val_split=None))
    for row in report.rows:
        metrics = [lines(out / "runs" / row.name / f"seed-{seed}" / "metrics.jsonl") for seed in (0, 1)]
        last = [epochs[-1]["val_top1"] for epochs in metrics]
        assert [run.score for run in row.runs] == last
        others = ("balanced_accuracy", "macro_f1")
        assert [run.metrics for run in row.runs] == [{key: of[-1][f"val_{key}"] for key in others} for of in metrics]
        assert row.mean_of("macro_f1") == pytest.approx(sum(of[-1]["val_macro_f1"] for of in metrics) / 2)
        assert row.score == sum(last) / 2
        assert row.score_std == pytest.approx(abs(last[0] - last[1]) / 2**0.5)
        seconds = sorted(epoch["seconds"] for epochs in metrics for epoch in epochs)
        assert row.seconds_per_epoch == pytest.approx((seconds[1] + seconds[2]) / 2)
        assert row.images_per_second == pytest.approx(24 / (row.seconds_per_epoch or 0))
        # Two seeds have different initial weights, order and augmentation.
        assert metrics[0][0]["train_loss"] != metrics[1][0]["train_loss"]
    num_parameters = {row.name: row.cost and row.cost.num_parameters for row in report.rows}
    assert num_parameters["narrow"] == 3 * 9 * 4 + 4 + 2 * 4 + 4 * 4 * 2 + 2
    assert num_parameters["mobilevit-xxs"] == sum(x.numel() for x in MobileViT("xxs", num_classes=2).parameters())
    # The weights of MobileViT are those of an ordinary run.
    weights = read(out / "runs" / "mobilevit-xxs" / "seed-1" / "model.safetensors")
    assert (weights.architecture.name, weights.class_names, weights.preprocessing.crop_px) == ("xxs", ("0", "1"), 32)


def test_several_labels_are_compared_by_map(data: Path, tmp_path: Path) -> None:
    rows = ["path,labels,split"]
    for i, path in enumerate(sorted(data.rglob("*.png"))):
        rows.append(f"{path},{path.parent.name}{'|odd' if i % 3 == 1 else ''},{path.parts[-3]}")
    file = tmp_path / "labels.csv"
    file.write_text("\n".join(rows) + "\n")
    recipe = replace(RECIPE, task="multilabel", label_smoothing=0.0)
    report = compare_trained([NARROW, XXS], file, tmp_path / "out", recipe, seeds=(0, 1))
    assert report.metrics == ("map", "micro_f1", "macro_f1")
    assert report.constant_score == pytest.approx(100 * (6 + 6 + sum("|odd,test" in row for row in rows)) / 3 / 12)
    for row in report.rows:
        last = [lines(tmp_path / "out" / "runs" / row.name / f"seed-{seed}" / "metrics.jsonl")[-1] for seed in (0, 1)]
        assert [run.score for run in row.runs] == [of["val_map"] for of in last]
        assert row.mean_of("micro_f1") == pytest.approx(sum(of["val_micro_f1"] for of in last) / 2)
    (comparison,) = report.comparisons
    assert comparison.difference == pytest.approx((report.rows[0].score or 0) - (report.rows[1].score or 0))
    weights = read(tmp_path / "out" / "runs" / "mobilevit-xxs" / "seed-0" / "model.safetensors")
    assert (weights.task, len(weights.thresholds)) == ("multilabel", 3)
    text = tables.write(report, tmp_path)[0].read_text()
    assert "| mAP |" in text
    assert "| micro F1 |" in text
    assert "top-1" not in text
    (axes,) = learning_curves(report).axes
    assert axes.get_ylabel().startswith("mAP")


def test_a_run_of_an_older_version_lacks_metrics() -> None:
    report_row = row("a", [93.0, 94.0])
    assert report_row.mean_of("macro_f1") is None
    first = replace(report_row.runs[0], metrics={"macro_f1": 90.0})
    assert replace(report_row, runs=(first, report_row.runs[1])).mean_of("macro_f1") is None
    assert replace(report_row, runs=(first,)).mean_of("macro_f1") == 90


def test_a_finished_run_is_read(whole: tuple[TrainedReport, Path], data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report, out = whole
    monkeypatch.setattr(loop, "load", lambda *args, **options: pytest.fail("an image is read"))
    again = compare_trained([NARROW, WIDE, XXS], data, out, RECIPE, seeds=(0, 1))
    assert again.rows == report.rows
    fewer = compare_trained([WIDE, XXS], data, out, RECIPE, seeds=(1,))
    assert [row.runs for row in fewer.rows] == [row.runs[1:] for row in report.rows[1:]]


class KilledError(BaseException):
    """Stands for SIGKILL: no code handles it."""


@pytest.mark.parametrize("name", ["narrow", "mobilevit-xxs"])
def test_a_killed_comparison_resumes_exactly(
    whole: tuple[TrainedReport, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Killed in the second epoch of seed 1."""
    report, _ = whole
    networks = [NARROW, WIDE, XXS]
    real, steps = loop.learning_rate_at, []

    def rate(*args: Any, **options: Any) -> float:
        started = list((tmp_path / "runs" / name / "seed-1").glob("run.json"))
        steps.extend(started)
        if started and len(steps) == 5:
            raise KilledError
        return real(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "learning_rate_at", rate)
        with pytest.raises(KilledError):
            compare_trained(networks, data, tmp_path, RECIPE, seeds=(0, 1))
    assert len(lines(tmp_path / "runs" / name / "seed-1" / "metrics.jsonl")) == 1
    resumed = compare_trained(networks, data, tmp_path, RECIPE, seeds=(0, 1))
    assert without_times(resumed) == without_times(report)


def test_another_recipe_or_other_data(whole: tuple[TrainedReport, Path], data: Path) -> None:
    _, out = whole
    with pytest.raises(ValueError, match=r"seed-0: .*epochs.*2.*3"):
        compare_trained([NARROW, XXS], data, out, replace(RECIPE, epochs=3), seeds=(0,))
    with pytest.raises(ValueError, match=r"seed-0: .*data"):
        compare_trained([NARROW, XXS], data / "train", out, RECIPE, seeds=(0,))


def test_a_failure_does_not_stop_the_others(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    patchy = replace(NARROW, name="patchy", size_multiple_px=24)
    clumsy = replace(NARROW, name="clumsy", builder=lambda num_classes, size_px: nn.Linear(1, 1))
    models = [BURSTING, patchy, clumsy, NARROW, XXS]
    report = compare_trained(models, data, tmp_path, replace(RECIPE, epochs=1), seeds=(3, 4))
    failures = {row.name: row.failures for row in report.rows}
    assert "patchy requires a multiple of 24" in failures["patchy"]["all seeds"]
    assert "cannot be built for 32 px and 2 classes" in failures["clumsy"]["all seeds"]
    assert set(failures["bursting"]) == {"seed 3", "seed 4"}
    assert "nan" in failures["bursting"]["seed 3"]
    assert not failures["narrow"] | failures["mobilevit-xxs"]
    assert sum(message.startswith(("bursting, seed", "patchy,", "clumsy,")) for message in warnings_in(caplog)) == 4
    assert [comparison.name for comparison in report.comparisons] == ["narrow"]
    found = tables.findings(report)
    assert [line.split(",")[0] for line in found[1:5]] == ["bursting", "bursting", "patchy", "clumsy"]
    # Each class has half of the images.
    idle = {row.name for row in report.rows if any(run.score <= 50 for run in row.runs)}
    assert {line.partition(":")[0] for line in found[5:]} == idle
    assert "mobilevit-xxs" in idle
    cells = dict(tables.columns(report))
    assert cells["top-1"][:3] == ["-"] * 3
    assert cells["M parameters"][1:3] == ["-"] * 2
    assert cells["top-1 by seed"][:3] == ["failed"] * 3
    tables.write(report, tmp_path)
    with pytest.raises(DivergedError):  # as in `mobilevit train`
        train(replace(RECIPE, epochs=1), data, tmp_path / "one", classifier=BURSTING)


def test_errors_before_training(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="seeds are 1, 1"):
        compare_trained([NARROW, XXS], data, tmp_path, RECIPE, seeds=(1, 1))
    with monkeypatch.context() as patched:
        patched.setenv("WORLD_SIZE", "2")
        with pytest.raises(ValueError, match="torchrun"):
            compare_trained([NARROW, XXS], data, tmp_path, RECIPE)
    for module, model in (("timm", SCALED["deit-84-patch8"]), ("scipy.stats", NARROW)):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, module, None)
            with pytest.raises(MissingExtraError, match=rf"{module}.*mobilevit\[compare\]"):
                compare_trained([model, XXS], data, tmp_path, RECIPE)
    assert not list(tmp_path.iterdir())


def test_choose() -> None:
    def names(*args: Any) -> list[str]:
        return [model.name for model in choose(*args)]

    small = RECIPES["small"]
    assert names([], small) == ["mobilevit-xxs", *SCALED]
    assert names(["pit-tiny"], small) == ["pit-tiny", "mobilevit-xxs"]
    assert names(["pit-tiny"], RECIPES["plain"]) == ["pit-tiny", "mobilevit-xs"]
    assert names(["mobilevit-s"], small) == ["mobilevit-s"]
    assert names(["pit-tiny"], small, "mobilevit-s") == ["pit-tiny", "mobilevit-s"]
    with pytest.raises(ValueError, match=r"'deit-84'; did you mean deit-84-patch8"):
        choose(["deit-84"], small)
    with pytest.raises(ValueError, match="deit-tiny-basic is the same network as deit-tiny"):
        choose(["deit-tiny-basic", "deit-tiny"], small)


def test_scaled_models() -> None:
    """Counted by hand, with the widths that the papers' rules give for factors of 0.65, 0.75 and 0.9."""
    costs = {name: count(model.build(10), (64, 64)) for name, model in SCALED.items()}
    deit = (3 * 8 * 8 + 1) * 84 + (64 + 2) * 84 + 12 * (12 * 84**2 + 13 * 84) + 2 * 84 + 85 * 10
    assert costs["deit-84-patch8"].num_parameters == deit
    assert costs["deit-84-patch8"].num_attention_macs == 12 * 2 * 65**2 * 84
    assert costs["mobilenetv2-0.65"].num_parameters == 1_078_762
    assert costs["shufflenetv2-0.9"].num_parameters == 1_066_154
    for cost in costs.values():
        assert 1.0e6 < cost.num_parameters < 1.1e6
    assert not set(SCALED) & set(MODELS)


@pytest.mark.parametrize("name", list(SCALED))
def test_scaled_models_train(name: str) -> None:
    """In channels-last layout, that of loaded images, every weight has a gradient."""
    model = SCALED[name].build(5, 64).train()
    images = torch.rand(4, 3, 64, 64).to(memory_format=torch.channels_last)
    nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 4, 2])).backward()
    assert all(x.grad is not None and x.grad.isfinite().all() and x.grad.any() for x in model.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


@pytest.mark.parametrize(("n", "m"), [(3, 3), (2, 5)])
def test_welch(n: int, m: int) -> None:
    random = np.random.default_rng(n)
    a, b = 90 + random.normal(0, 0.2, n), 90.5 + random.normal(0, 0.6, m)
    # The textbook formulas: standard error, and Welch-Satterthwaite degrees of freedom.
    va, vb = a.var(ddof=1) / n, b.var(ddof=1) / m
    df = (va + vb) ** 2 / (va**2 / (n - 1) + vb**2 / (m - 1))
    difference, half_width = a.mean() - b.mean(), student_t.ppf(0.975, df) * (va + vb) ** 0.5
    p = 2 * student_t.sf(abs(difference) / (va + vb) ** 0.5, df)
    assert welch(a.tolist(), b.tolist()) == pytest.approx((difference - half_width, difference + half_width, p))


def test_welch_without_variance() -> None:
    assert welch([90.0], [91.0, 92.0]) is None
    assert welch([0.1, 0.1, 0.1], [0.3, 0.3, 0.3]) is None
    assert welch([0.1, 0.1, 0.1], [0.3, 0.4, 0.5]) is not None  # one constant sample


def test_holm_by_hand() -> None:
    # Sorted: 0.01 * 4, 0.02 * 3, 0.03 * 2, 0.04 * 1; the last may not be less than the one before.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def row(name: str, scores: list[float]) -> TrainedRow:
    family: Any = "mobilevit" if name.startswith("mobilevit") else "cnn"
    return TrainedRow(
        name=name,
        family=family,
        paper="",
        library="ours",
        size_px=32,
        cost=Cost(1, 0, 0, 0),
        score=None,
        score_std=None,
        seconds_per_epoch=None,
        images_per_second=None,
        runs=tuple(SeedRun(i, value, {}, (), (), ()) for i, value in enumerate(scores)),
    )


def test_comparisons_by_hand() -> None:
    ours, low = [93.0, 93.2, 93.4], [92.0, 92.2, 92.4]
    rows = [row("a", low), row("b", ours), row("mobilevit-xxs", ours), row("c", [99.0])]
    a, b = compare_rows(rows, 3, "nearest")
    # Both variances are 0.04, the standard error is sqrt(0.08 / 3), and Welch's degrees of freedom are 4.
    assert (a.baseline, a.difference) == ("mobilevit-xxs", pytest.approx(-1.0))
    assert (a.low, a.high) == pytest.approx((-1 - 2.776445 * 0.1632993, -1 + 2.776445 * 0.1632993))
    assert a.p is not None
    assert a.p_holm == pytest.approx(2 * a.p)
    assert (b.p, b.p_holm) == (pytest.approx(1), pytest.approx(1))
    assert "1.00 points below mobilevit-xxs" in a.describe()
    assert "-1.45 to -0.55" in a.describe()
    assert "is significant (p = 0.0072; Welch's t-test, Holm-corrected for 2 comparisons)" in a.describe()
    assert "not significant" in b.describe()
    (once,) = compare_rows([row("a", low[:1]), row("mobilevit-xs", ours[:1])], 1, "mobilevit-xs")
    assert "single seed" in once.describe()
    equal = Comparison("a", "mobilevit-xs", 2, 0.0, None, None, None)
    assert "equal to mobilevit-xs with each of 2 seeds" in equal.describe()
    # No baseline: it lacks a seed, or it is not among the models.
    assert compare_rows([row("a", low), row("mobilevit-xxs", ours[:2])], 3, "nearest") == []
    assert compare_rows([row("a", low), row("mobilevit-xxs", ours)], 3, "mobilevit-s") == []


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_written_files_agree(whole: tuple[TrainedReport, Path], tmp_path: Path) -> None:
    report, _ = whole
    files = tables.write(report, tmp_path)
    figures = ["accuracy_parameters.png", "learning_curves.png"]
    assert [file.name for file in files] == ["table.md", "table.csv", "table.json", *figures]
    assert json.loads(files[2].read_text()) == json.loads(json.dumps(report.to_dict()))
    with files[1].open(newline="") as file:
        flat = list(csv.DictReader(file))
    text = files[0].read_text()
    headings, _, *cells = [re.split(r" *\| *", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    for row, line, values in zip(report.rows, flat, cells, strict=True):
        shown = dict(zip(headings, values, strict=True))
        assert line["name"] == shown["model"] == row.name
        assert float(line["score"]) == row.score
        assert [float(line[f"score_seed_{seed}"]) for seed in (0, 1)] == [run.score for run in row.runs]
        assert shown["top-1"] == f"{row.score:.2f} +- {row.score_std:.2f}"
    assert [line["baseline"] for line in flat] == ["mobilevit-xxs", "mobilevit-xxs", ""]
    for comparison in report.comparisons:
        assert f"- {comparison.describe()}\n" in text
    with Image.open(files[3]) as image:
        assert image.size == (1600, 1024)


def test_times_of_trained_models(timed: TrainedReport, tmp_path: Path) -> None:
    report = timed
    assert (report.setting.num_rounds, report.setting.num_timing_threads) == (3, 1)
    for row in report.rows:
        for timing in row.timings:
            assert timing.baseline == (None if row.name == "mobilevit-xxs" else "mobilevit-xxs")
            assert timing.ratio == timing.ratios.get("mobilevit-xxs")
            assert (timing.batch_size, timing.latency_ms.median > 0) == (1, True)
        assert [timing.runtime for timing in row.timings] == ["torch", "onnx"][: 1 + (row.name != "wide")]
    files = tables.write(report, tmp_path)
    assert [file.name for file in files[5:]] == ["accuracy_latency_torch.png", "accuracy_latency_onnx.png"]
    cells = dict(tables.columns(report))
    narrow, wide, _ = cells["ONNX Runtime, batch 1: ms"]
    assert wide == "-"
    with files[1].open(newline="") as file:
        line = next(csv.DictReader(file))
    assert f"{float(line['onnx_b1_latency_ms_median']):.2f}" == narrow.split()[0]
    assert tables.TIMING_NOTE in files[0].read_text()
    assert "1 thread, 3 rounds" in tables.header(report)
    (axes,) = accuracy_against_latency(report, "onnx", 1).axes
    points = [np.asarray(points.get_offsets())[0] for points in axes.collections]
    expected = [(row.timings[1].latency_ms.median, row.score) for row in report.rows[::2]]
    np.testing.assert_allclose(points, np.array(expected, float))


def test_a_model_that_cannot_be_timed(
    whole: tuple[TrainedReport, Path], data: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After hours of training, a runtime that rejects a model, even MobileViT, must not lose the report."""
    _, out = whole

    def fail(*args: Any) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(run, "write_model", fail)
    report = compare_trained([NARROW, XXS], data, out, RECIPE, seeds=(0,), options=TimingOptions(("onnx",)))
    assert [
        note.startswith(f"onnx: left out {name}")
        for note, name in zip(report.notes, ("mobilevit-xxs", "narrow"), strict=True)
    ]
    assert all(note.endswith("(no such operator)") for note in report.notes)
    assert report.notes == tables.findings(report)[-2:] == [m for m in warnings_in(caplog) if "left out" in m]
    assert [row.timings for row in report.rows] == [(), ()]


def test_figures(whole: tuple[TrainedReport, Path]) -> None:
    report, _ = whole
    (axes,) = accuracy_against_parameters(report).axes
    bars = [np.asarray(line.get_xydata()) for line in axes.lines[:3]]
    for row, bar in zip(report.rows, bars, strict=True):
        assert row.cost is not None
        assert row.score is not None
        assert row.score_std is not None
        x = row.cost.num_parameters / 1e6
        np.testing.assert_allclose(bar, [(x, row.score - row.score_std), (x, row.score + row.score_std)])
    assert sorted(text.get_text() for text in axes.texts) == ["mobilevit-xxs", "narrow", "wide"]
    (axes,) = learning_curves(report).axes
    means = {str(line.get_label()): np.asarray(line.get_ydata()).tolist() for line in axes.lines}
    for row in report.rows:
        first, second = (run.score_by_epoch for run in row.runs)
        assert means[row.name] == pytest.approx([(a + b) / 2 for a, b in zip(first, second, strict=True)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learning_curves(replace(report, seeds=[0], rows=[replace(row, runs=row.runs[:1]) for row in report.rows]))
