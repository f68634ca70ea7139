"""The benchmark: its report, the models it builds, and errors."""

import json
import logging
import sys
import time
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mobilevit.benchmark import models, rivals, run, timing
from mobilevit.benchmark.cost import profile
from mobilevit.benchmark.models import BenchmarkModel, models_from_artifact, models_from_weights, write_model
from mobilevit.benchmark.run import Startup
from mobilevit.benchmark.timing import Spread
from mobilevit.export import ArtifactSpec, ExportOptions, export, read_signature
from mobilevit.export.backend import Signature
from mobilevit.weights import TaskName, Weights

TINY = ArtifactSpec("fp32", 32, 48)


class Sleeper(nn.Module):
    """Advances the benchmark's clock by `seconds` per image, so much that the real time is negligible."""

    skipped = 0.0

    def __init__(self, seconds: float):
        super().__init__()
        self.linear = nn.Linear(3, 5)
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        Sleeper.skipped += self.seconds * len(x)
        return self.linear(x.mean((2, 3)))


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.fixture
def tiny() -> nn.Module:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(4, 7))
    return network.eval().requires_grad_(False)


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "measure_in_subprocess", lambda model, num_threads: Startup(2.5, None))
    monkeypatch.setattr(timing, "PEAK_SIZE", 256)


# ---------------------------------------------------------------------------------------------------------------------
def test_rivals_of_an_artifact_for_browsers_are_for_browsers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    weights = rivals.random_weights("xxs")
    (written,) = models_from_weights("xxs", weights, tmp_path, runtimes=["onnx"], size=(32, 32))
    path = written.path.rename(tmp_path / "mobilevit_xxs_32x32_int8_browser.onnx")
    specs = []
    monkeypatch.setattr(models, "_write_rivals", lambda *arguments: specs.append(arguments[3]) or [])
    models_from_artifact(path, tmp_path, against=["self"])
    assert [(spec.precision, spec.browser) for spec in specs] == [("int8", True)]


# Reports


def test_report(tmp_path: Path, no_processes: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    clock = time.perf_counter
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock() + Sleeper.skipped)
    fast = write_model("fast", Sleeper(1000).eval(), "torch", TINY, tmp_path)
    slow = write_model("slow", Sleeper(4000).eval(), "torch", TINY, tmp_path)
    ten = write_model("fast", Sleeper(1000).eval(), "torch", replace(TINY, batch_size=10), tmp_path)
    slow = replace(slow, baseline=fast.label, num_macs=10**6)
    with caplog.at_level(logging.INFO, logger=run.__name__):
        report = run.benchmark([fast, ten, slow], num_rounds=3, num_threads=1)
    assert len(caplog.messages) == 3 + 2  # one per model, one per batch size
    values = json.loads(json.dumps(report.to_dict()))
    assert (values["num_rounds"], values["num_threads"], set(values["peak_gflops"])) == (3, 1, {"1", "10"})
    assert values["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert values["processor"]
    assert values["notes"] == []
    rows = {(row["name"], row["batch_size"]): row for row in values["rows"]}
    assert set(rows) == {("fast", 1), ("slow", 1), ("fast", 10)}
    row = rows["slow", 1]
    assert list(row["latency_ms"]) == ["p10", "p50", "p90", "p99"]
    assert 4e6 <= row["latency_ms"]["p10"] <= row["latency_ms"]["p50"] <= row["latency_ms"]["p99"]
    assert row["ratio"]["median"] == pytest.approx(4, rel=0.05)
    assert (rows["fast", 1]["ratio"], rows["fast", 1]["gflops"]) == (None, None)
    assert row["gflops"] == pytest.approx(2e-3 / (row["latency_ms"]["p50"] / 1e3))
    assert 0 < row["peak_fraction"] < 0.1
    assert rows["fast", 10]["images_per_second"] == pytest.approx(1e4 / rows["fast", 10]["latency_ms"]["p50"])
    assert rows["fast", 10]["latency_ms"]["p10"] >= 1e7
    assert (row["size_px"], row["load_ms"], row["memory_bytes"]) == ([32, 48], 2.5, None)
    assert row["num_bytes"] == slow.path.stat().st_size
    assert row["error"] < 1e-5

    cells = list(zip(*(column.cells for column in run.table(report).columns), strict=True))
    assert [line[0].strip() for line in cells] == [row.name for row in report.rows]
    assert cells[1][-1].startswith(f"{row['ratio']['median']:.2f} (")
    run.save_figure(report, tmp_path / "times.png")
    assert (tmp_path / "times.png").read_bytes().startswith(b"\x89PNG")


def test_int8_is_compared_with_fp32_of_the_same_model(
    tmp_path: Path, no_processes: None, monkeypatch: pytest.MonkeyPatch
):
    def model(name: str, precision: str, baseline: str | None = None) -> BenchmarkModel:
        written = write_model(name, Sleeper(0).eval(), "torch", TINY, tmp_path)
        return replace(written, network="xxs", precision=precision, baseline=baseline)

    ours, ours8 = model("a.pte", "fp32"), model("a8.pte", "int8")
    timm, timm8 = model("timm", "fp32", ours.label), model("timm", "int8", ours8.label)
    times_ms = np.outer([2, 3, 4, 1, 10], [1.0, 5.0, 1.0])  # the last is the matrix product
    monkeypatch.setattr(run, "measure", lambda runs, num_rounds: times_ms[[*range(len(runs))]])
    report = run.benchmark([ours, timm, ours8, timm8], num_rounds=3, num_threads=1)
    found = {(row.name, row.precision): row.ratio_to_fp32 for row in report.rows}
    assert found["a.pte", "fp32"] is None
    assert found["timm", "fp32"] is None
    assert found["a8.pte", "int8"] == Spread(2, 2, 2)
    ratio = found["timm", "int8"]
    assert ratio is not None
    assert astuple(ratio) == pytest.approx((1 / 3,) * 3)
    assert [row.ratio and row.ratio.median for row in report.rows] == [None, 1.5, None, 0.25]
    (note,) = report.notes
    assert "a8.pte" in note
    assert "2.00" in note


def test_wrong_outputs_are_not_timed(tmp_path: Path, tiny: nn.Module, no_processes: None):
    model = write_model("tiny", tiny, "torch", TINY, tmp_path)
    assert model.expected is not None
    (expected,) = model.expected
    wrong = replace(model, expected=(expected + 0.01 * expected.std(),))
    with pytest.raises(ValueError, match=r"tiny torch fp32.*0\.01"):
        run.benchmark([wrong], num_rounds=1, num_threads=1)
    with pytest.raises(ValueError, match="nan"):
        run.benchmark([replace(model, expected=(expected * float("nan"),))], num_rounds=1, num_threads=1)
    run.benchmark([replace(wrong, precision="int8")], num_rounds=1, num_threads=1)


def test_subprocess(tmp_path: Path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 2048, bias=False)).eval().requires_grad_(False)
    model = write_model("wide", network, "torch", ArtifactSpec("fp32", 64, 64), tmp_path)
    startup = run.measure_in_subprocess(model, num_threads=1)
    assert startup.load_ms > 0
    if sys.platform == "linux":
        assert startup.memory_bytes is not None
        assert 1 <= startup.memory_bytes / (4 * 3 * 64 * 64 * 2048) < 2.5
    model.path.write_bytes(model.path.read_bytes()[:-100_000])
    with pytest.raises((ValueError, RuntimeError), match=r"wide torch fp32|zip"):
        run.measure_in_subprocess(model, num_threads=1)


# ---------------------------------------------------------------------------------------------------------------------
# Models


def test_models_from_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    weights = rivals.random_weights("xxs")
    against = ["self", "timm", "torchvision:mobilenet_v2", "timm"]
    built = models_from_weights("xxs", weights, tmp_path, batch_sizes=(1, 2), size=(32, 64), against=against)
    assert warnings_in(caplog) == []
    assert [(model.name, model.batch_size) for model in built] == [
        (name, b) for b in (1, 2) for name in ("xxs", "self", "timm", "torchvision:mobilenet_v2")
    ]
    cost = profile(weights.build(), (32, 64))
    num_macs = cost.num_macs + cost.num_attention_macs
    assert [model.num_macs for model in built[:4]] == [num_macs, num_macs, num_macs, None]
    assert {model.baseline for model in built} == {None, "xxs torch fp32"}
    assert len({model.label for model in built[:4]}) == 4
    for model in built:
        images = model.example_input()
        assert images.shape == model.shape == (model.batch_size, 3, 32, 64)
        assert model.expected is not None
        ((found,), (expected,)) = model.load(1)(images), model.expected
        assert np.abs(found - expected).max() / expected.std() < 1e-4
    assert built[2].expected is built[0].expected  # timm's MobileViT is compared with our outputs


@pytest.mark.parametrize(
    ("task", "against", "shapes"),
    [
        ("detect", "torchvision:ssdlite320_mobilenet_v3_large", [8, 4]),
        ("segment", "torchvision:lraspp_mobilenet_v3_large", [(7, 64, 96)]),
    ],
)
def test_dense_models(task: TaskName, against: str, shapes: list, tmp_path: Path, no_processes: None):
    weights = rivals.random_weights("xxs", task=task, num_classes=7)
    built = models_from_weights(f"xxs:{task}", weights, tmp_path, size=(64, 96), against=[against, "self"])
    assert [model.name for model in built] == [f"xxs:{task}", against, "self"]
    cost = profile(weights.build(), (64, 96))
    assert built[0].num_macs == cost.num_macs + cost.num_attention_macs
    for model in built:
        assert model.expected is not None
        assert [y.shape[1:] if task == "segment" else y.shape[-1] for y in model.expected] == shapes
    report = run.benchmark(built, num_rounds=2, num_threads=1)
    assert all(row.error is not None and row.error < 1e-4 for row in report.rows)
    assert report.rows[1].ratio is not None


@pytest.mark.slow
@pytest.mark.parametrize("task", ["detect", "segment"])
def test_dense_artifact(task: TaskName, tmp_path: Path):
    weights = rivals.random_weights("xxs", task=task, num_classes=7)
    [artifact] = export(weights, ["onnx"], tmp_path, ExportOptions(size=(64, 96), postprocess=True, num_threads=1))
    (made := tmp_path / "made").mkdir()
    against = {"detect": "ssdlite320_mobilenet_v3_large", "segment": "torchvision:lraspp_mobilenet_v3_large"}[task]
    ours, theirs = models_from_artifact(artifact.path, made, against=[against])
    cost = profile(weights.build(), (64, 96))
    assert ours.num_macs == cost.num_macs + cost.num_attention_macs
    assert (ours.precision, ours.network) == ("fp32", f"mobilevit_xxs_{task}_64x96_postprocess")
    assert (theirs.name, theirs.baseline) == (against, ours.label)


def test_a_model_that_cannot_be_converted_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fail_for_timm(name: str, *arguments: Any) -> BenchmarkModel:
        if name == "timm":
            raise RuntimeError("\nno kernel for aten::frob\nand much more")
        return write_model(name, *arguments)

    monkeypatch.setattr(models, "write_model", fail_for_timm)
    weights = rivals.random_weights("xxs")
    (model,) = models_from_weights("xxs", weights, tmp_path, size=(32, 32), against=["timm"])
    assert model.name == "xxs"
    (message,) = warnings_in(caplog)
    assert "timm" in message
    assert "no kernel for aten::frob" in message


def test_artifact(tmp_path: Path, no_processes: None):
    weights = rivals.random_weights("xxs")
    (tmp_path / "made").mkdir()
    (written,) = models_from_weights("xxs", weights, tmp_path / "made", runtimes=["onnx"], size=(32, 64))
    path = written.path.rename(tmp_path / "mobilevit_xxs_32x64_fp32.onnx")
    assert read_signature(path) == Signature((1, 3, 32, 64), False, 1000)
    ours, control = models_from_artifact(path, tmp_path / "made", against=["self"])
    assert (ours.runtime, ours.precision, ours.network) == ("onnx", "fp32", "mobilevit_xxs_32x64")
    assert (ours.shape, ours.num_macs, ours.num_bytes) == ((1, 3, 32, 64), written.num_macs, path.stat().st_size)
    assert control.baseline == ours.label
    report = run.benchmark([ours, control], num_rounds=2, num_threads=1)
    assert [row.name for row in report.rows] == [str(path), "self"]

    cases: list[tuple[dict[str, Any], str]] = [
        ({"batch_sizes": [2]}, "batch size is 1, not 2; .*--batch-size 1.*--batch-size 2"),
        ({"size": (64, 64)}, "32 x 64 px, not 64 x 64; leave out --size"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            models_from_artifact(path, tmp_path, **options)
    other = path.rename(tmp_path / "mine.onnx")
    (model,) = models_from_artifact(other, tmp_path)
    assert (model.precision, model.num_macs, model.network) == ("-", None, str(other))
    with pytest.raises(ValueError, match=r"mine.onnx: .*file name"):
        models_from_artifact(other, tmp_path, against=["timm"])
    with pytest.raises(ValueError, match="no such file"):
        models_from_artifact(tmp_path / "missing.onnx", tmp_path)


def test_dynamic_axes_and_uint8(tmp_path: Path):
    found = Signature((None, None, None, 3), True, 5)
    assert models.input_shape(Path("a.onnx"), found, 4, (64, 96)) == (4, 64, 96, 3)
    assert models.input_shape(Path("a.onnx"), found, 4, None) == (4, 256, 256, 3)
    model = BenchmarkModel("a", "a", "onnx", "fp32", tmp_path / "a.onnx", (2, 64, 96, 3), uint8=True)
    assert model.size == (64, 96)
    images = model.example_input()
    assert (images.dtype, images.shape, images.max()) == (np.uint8, model.shape, 255)


def test_unsupported_options(tmp_path: Path):
    weights = rivals.random_weights("xxs")
    headless = replace(weights, tensors={k: x for k, x in weights.tensors.items() if "classifier" not in k})
    cases: list[tuple[Weights, dict[str, Any], str]] = [
        (weights, {"runtimes": ["torch", "abacus"]}, "'abacus'.*torch, compiled, onnx"),
        (weights, {"precisions": ["int8"]}, "torch .*fp32.*int8"),
        (weights, {"against": ["resnet5000"]}, "'resnet5000'"),
        (weights, {"size": (16, 16)}, "16, 16.*32 px or more"),
        (headless, {}, "no classifier"),
    ]
    for given, options, message in cases:
        with pytest.raises(ValueError, match=message):
            models_from_weights("xxs", given, tmp_path, **options)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"a.gif.*\.png, \.svg, \.pdf"):
        run.check_figure_path(Path("a.gif"))
