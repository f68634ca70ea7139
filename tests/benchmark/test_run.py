"""Timing: who is timed when, what the numbers are, what artifacts say of themselves, and what is refused."""

import contextlib
import json
import sys
import time
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mobilevit.benchmark import rivals, run, timing
from mobilevit.benchmark.cost import profile
from mobilevit.benchmark.run import Side
from mobilevit.export import ArtifactSpec, ExportOptions, export, read_signature
from mobilevit.export.backend import Signature
from mobilevit.weights import TaskName, Weights

TINY = ArtifactSpec("fp32", 32, 48)


class Clock:
    """Time that passes only where it is told to; what lasts a second in even rounds lasts five in odd ones."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now, self.slow = 0.0, False
        self.log: list[str] = []
        monkeypatch.setattr(timing.time, "perf_counter", self.read)
        monkeypatch.setattr(timing.time, "sleep", lambda seconds: self.log.append("pause"))

    def read(self) -> float:
        self.log.append("clock")
        return self.now

    def side(self, name: str, seconds: float) -> Any:
        def call() -> None:
            self.log.append(name)
            self.now += seconds * (5 if self.slow else 1)

        return call


class Sleeper(nn.Module):
    """Advances the benchmark clock by `seconds` for every image, so much that real time does not matter."""

    skipped = 0.0

    def __init__(self, seconds: float):
        super().__init__()
        self.linear = nn.Linear(3, 5)
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        Sleeper.skipped += self.seconds * len(x)
        return self.linear(x.mean((2, 3)))


@pytest.fixture
def tiny() -> nn.Module:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(4, 7))
    return network.eval().requires_grad_(False)


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "run_alone", lambda side, num_threads: {"load_ms": 2.5, "memory_bytes": None})
    monkeypatch.setattr(timing, "PEAK_SIDE", 256)


# ---------------------------------------------------------------------------------------------------------------------
# Turns


def test_turns(monkeypatch: pytest.MonkeyPatch):
    clock = Clock(monkeypatch)
    names = ["a", "b", "c", "d"]
    timing.measure([clock.side(name, 1) for name in names], 16)
    warm_up = 4 * timing.WARM_UP_CALLS
    assert Counter(clock.log[:warm_up]) == dict.fromkeys(names, timing.WARM_UP_CALLS)
    turns = [clock.log[i : i + 5] for i in range(warm_up, len(clock.log), 5)]
    assert all(turn == ["pause", turn[1], "clock", turn[1], "clock"] for turn in turns)
    order = [turn[1] for turn in turns]
    rounds = [order[i : i + 4] for i in range(0, len(order), 4)]
    assert all(sorted(one) == names for one in rounds)
    for place in range(4):  # everybody is as often in every place
        assert Counter(one[place] for one in rounds) == dict.fromkeys(names, 4)
    neighbours = {(one[i], one[i + 1]) for one in rounds for i in range(3)}
    assert all(len({before for before, after in neighbours if after == name}) > 1 for name in names)


def test_ratios_of_a_machine_that_changes_its_speed(monkeypatch: pytest.MonkeyPatch):
    clock = Clock(monkeypatch)
    calls = 0
    first, second = clock.side("a", 1), clock.side("b", 1.25)

    def counted(call: Any) -> Any:
        def wrapped() -> None:
            nonlocal calls
            number = calls - 2 * timing.WARM_UP_CALLS
            clock.slow = number >= 0 and number // 4 % 2 == 1  # four calls a round
            calls += 1
            call()

        return wrapped

    times_ms = timing.measure([counted(first), counted(second)], 10)
    np.testing.assert_allclose(times_ms[0], [1e3, 5e3] * 5)
    assert timing.ratio(times_ms[1], times_ms[0]) == pytest.approx({"median": 1.25, "p10": 1.25, "p90": 1.25})


def test_ratio():
    ours = np.full(101, 2.0)
    assert timing.ratio(np.arange(101.0), ours) == pytest.approx({"median": 25, "p10": 5, "p90": 45})


# ---------------------------------------------------------------------------------------------------------------------
# Reports


def test_report(tmp_path: Path, no_processes: None, monkeypatch: pytest.MonkeyPatch):
    clock = time.perf_counter
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock() + Sleeper.skipped)
    fast = run.write_side("fast", Sleeper(1000).eval(), "torch", TINY, tmp_path)
    slow = run.write_side("slow", Sleeper(4000).eval(), "torch", TINY, tmp_path)
    ten = run.write_side("fast", Sleeper(1000).eval(), "torch", replace(TINY, batch_size=10), tmp_path)
    slow = replace(slow, against=fast.label, num_macs=10**6)
    said: list[str] = []
    report = run.benchmark([fast, ten, slow], num_rounds=3, num_threads=1, on_start=said.append)
    assert json.loads(json.dumps(report)) == report
    assert (report["num_rounds"], report["num_threads"], set(report["peak_gflops"])) == (3, 1, {"1", "10"})
    assert report["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert report["notes"] == []
    assert len(said) == 3 + 2
    rows = {(row["name"], row["batch_size"]): row for row in report["rows"]}
    assert set(rows) == {("fast", 1), ("slow", 1), ("fast", 10)}
    row = rows["slow", 1]
    assert list(row["latency_ms"]) == ["p10", "p50", "p90", "p99"]
    assert 4e6 <= row["latency_ms"]["p10"] <= row["latency_ms"]["p50"] <= row["latency_ms"]["p99"]
    assert row["ratio"]["median"] == pytest.approx(4, rel=0.05)
    assert (rows["fast", 1]["ratio"], rows["fast", 1]["gflops"]) == (None, None)
    assert row["gflops"] == pytest.approx(2e-3 / (row["latency_ms"]["p50"] / 1e3))
    assert 0 < row["peak_share"] < 0.1
    assert rows["fast", 10]["images_per_second"] == pytest.approx(1e4 / rows["fast", 10]["latency_ms"]["p50"])
    assert rows["fast", 10]["latency_ms"]["p10"] >= 1e7
    assert (row["size_px"], row["load_ms"], row["memory_bytes"]) == ([32, 48], 2.5, None)
    assert row["num_bytes"] == slow.path.stat().st_size
    assert row["error"] < 1e-5

    # What is shown of it
    shown = run.table(report)
    cells = list(zip(*(column.cells for column in shown.columns), strict=True))
    assert [line[0].strip() for line in cells] == [row["name"] for row in report["rows"]]
    assert cells[1][-1].startswith(f"{row['ratio']['median']:.2f} (")
    run.figure(report, tmp_path / "times.png")
    assert (tmp_path / "times.png").read_bytes().startswith(b"\x89PNG")


def test_int8_is_compared_with_fp32_of_the_same(tmp_path: Path, no_processes: None, monkeypatch: pytest.MonkeyPatch):
    def side(name: str, precision: str, against: str | None = None) -> Side:
        written = run.write_side(name, Sleeper(0).eval(), "torch", TINY, tmp_path)
        return replace(written, network="xxs", precision=precision, against=against)

    ours, ours8 = side("a.pte", "fp32"), side("a8.pte", "int8")
    timm, timm8 = side("timm", "fp32", ours.label), side("timm", "int8", ours8.label)
    times_ms = np.outer([2, 3, 4, 1, 10], [1.0, 5.0, 1.0])  # and the matrix product
    monkeypatch.setattr(run, "measure", lambda runs, num_rounds: times_ms[[*range(len(runs))]])
    report = run.benchmark([ours, timm, ours8, timm8], num_rounds=3, num_threads=1)
    found = {(row["name"], row["precision"]): row["ratio_to_fp32"] for row in report["rows"]}
    assert found["a.pte", "fp32"] is None
    assert found["timm", "fp32"] is None
    assert found["a8.pte", "int8"] == pytest.approx({"median": 2, "p10": 2, "p90": 2})
    assert found["timm", "int8"]["median"] == pytest.approx(1 / 3)
    assert [row["ratio"] and row["ratio"]["median"] for row in report["rows"]] == [None, 1.5, None, 0.25]
    assert report["notes"] == ["a8.pte, torch, batch 1: int8 is not faster than fp32 (2.00 times its time)"]


def test_wrong_answers_are_not_timed(tmp_path: Path, tiny: nn.Module, no_processes: None):
    side = run.write_side("tiny", tiny, "torch", TINY, tmp_path)
    assert side.expected is not None
    (expected,) = side.expected
    wrong = replace(side, expected=(expected + 0.01 * expected.std(),))
    with pytest.raises(ValueError, match=r"tiny torch fp32 answers otherwise than torch: an output differs by 0\.01"):
        run.benchmark([wrong], num_rounds=1, num_threads=1)
    with pytest.raises(ValueError, match="differs by nan"):
        run.benchmark([replace(side, expected=(expected * float("nan"),))], num_rounds=1, num_threads=1)
    run.benchmark([replace(wrong, precision="int8")], num_rounds=1, num_threads=1)


def test_a_process_of_its_own(tmp_path: Path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 2048, bias=False)).eval().requires_grad_(False)
    side = run.write_side("wide", network, "torch", ArtifactSpec("fp32", 64, 64), tmp_path)
    found = run.run_alone(side, num_threads=1)
    assert found["load_ms"] > 0
    if sys.platform == "linux":
        assert 1 <= found["memory_bytes"] / (4 * 3 * 64 * 64 * 2048) < 2.5
    side.path.write_bytes(side.path.read_bytes()[:-100_000])
    with pytest.raises((ValueError, RuntimeError), match=r"wide torch fp32: cannot be run|zip"):
        run.run_alone(side, num_threads=1)


# ---------------------------------------------------------------------------------------------------------------------
# Sides


def test_sides_of_weights(tmp_path: Path):
    weights = rivals.random_weights("xxs")
    problems: list[str] = []
    against = ["self", "timm", "torchvision:mobilenet_v2", "timm"]
    sides = run.sides_of_weights(
        "xxs",
        weights,
        tmp_path,
        batch_sizes=(1, 2),
        size=(32, 64),
        against=against,
        on_problem=problems.append,
    )
    assert problems == []
    assert [(side.name, side.shape[0]) for side in sides] == [
        (name, b) for b in (1, 2) for name in ("xxs", "self", "timm", "torchvision:mobilenet_v2")
    ]
    cost = profile(weights.build(), (32, 64))
    num_macs = cost.num_macs + cost.num_attention_macs
    assert [side.num_macs for side in sides[:4]] == [num_macs, num_macs, num_macs, None]
    assert {side.against for side in sides} == {None, "xxs torch fp32"}
    assert len({side.label for side in sides[:4]}) == 4
    for side in sides:
        images = run.example(side)
        assert images.shape == side.shape == (side.shape[0], 3, 32, 64)
        assert side.expected is not None
        ((found,), (expected,)) = run.load(side, 1)(images), side.expected
        assert np.abs(found - expected).max() / expected.std() < 1e-4
    assert sides[2].expected is sides[0].expected  # timm's is held to our answers


@pytest.mark.parametrize(
    ("task", "against", "shapes"),
    [
        ("detect", "torchvision:ssdlite320_mobilenet_v3_large", [8, 4]),
        ("segment", "torchvision:lraspp_mobilenet_v3_large", [(7, 64, 96)]),
    ],
)
def test_dense_sides(task: TaskName, against: str, shapes: list, tmp_path: Path, no_processes: None):
    weights = rivals.random_weights("xxs", task=task, num_classes=7)
    problems: list[str] = []
    sides = run.sides_of_weights(
        f"xxs:{task}", weights, tmp_path, size=(64, 96), against=[against, "self"], on_problem=problems.append
    )
    assert problems == []
    assert [side.name for side in sides] == [f"xxs:{task}", against, "self"]
    cost = profile(weights.build(), (64, 96))
    assert sides[0].num_macs == cost.num_macs + cost.num_attention_macs
    for side in sides:
        assert side.expected is not None
        tails = [y.shape[1:] if task == "segment" else y.shape[-1] for y in side.expected]
        assert tails == shapes
    report = run.benchmark(sides, num_rounds=2, num_threads=1)
    assert [row["error"] < 1e-4 for row in report["rows"]] == [True] * 3
    assert report["rows"][1]["ratio"]["median"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("task", ["detect", "segment"])
def test_dense_artifact(task: TaskName, tmp_path: Path):
    weights = rivals.random_weights("xxs", task=task, num_classes=7)
    [artifact] = export(weights, ["onnx"], tmp_path, ExportOptions(size=(64, 96), postprocess=True, num_threads=1))
    (made := tmp_path / "made").mkdir()
    against = {"detect": "ssdlite320_mobilenet_v3_large", "segment": "torchvision:lraspp_mobilenet_v3_large"}[task]
    ours, theirs = run.sides_of_artifact(artifact.path, made, against=[against])
    cost = profile(weights.build(), (64, 96))
    assert ours.num_macs == cost.num_macs + cost.num_attention_macs
    assert (ours.precision, ours.network) == ("fp32", f"mobilevit_xxs_{task}_64x96_postprocess")
    assert (theirs.name, theirs.against) == (against, ours.label)


def test_a_network_that_cannot_be_converted_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_side = run.write_side

    def break_at_timm(name: str, *arguments: Any) -> Side:
        if name == "timm":
            raise RuntimeError("\nno kernel for aten::frob\nand much more")
        return write_side(name, *arguments)

    monkeypatch.setattr(run, "write_side", break_at_timm)
    problems: list[str] = []
    sides = run.sides_of_weights(
        "xxs", rivals.random_weights("xxs"), tmp_path, size=(32, 32), against=["timm"], on_problem=problems.append
    )
    assert [side.name for side in sides] == ["xxs"]
    assert problems == ["torch fp32: left out timm, which cannot be converted (no kernel for aten::frob)"]


def test_artifact(tmp_path: Path, no_processes: None):
    weights = rivals.random_weights("xxs")
    (tmp_path / "made").mkdir()
    (written,) = run.sides_of_weights("xxs", weights, tmp_path / "made", runtimes=["onnx"], size=(32, 64))
    path = written.path.rename(tmp_path / "mobilevit_xxs_32x64_fp32.onnx")
    assert read_signature(path) == Signature((1, 3, 32, 64), False, 1000)
    ours, timm = run.sides_of_artifact(path, tmp_path / "made", against=["self"])
    assert (ours.runtime, ours.precision, ours.network) == ("onnx", "fp32", "mobilevit_xxs_32x64")
    assert (ours.shape, ours.num_macs, ours.num_bytes) == ((1, 3, 32, 64), written.num_macs, path.stat().st_size)
    assert timm.against == ours.label
    report = run.benchmark([ours, timm], num_rounds=2, num_threads=1)
    assert [row["name"] for row in report["rows"]] == [str(path), "self"]

    cases: list[tuple[dict[str, Any], str]] = [
        ({"batch_sizes": [2]}, "made for batches of 1, not 2; give --batch-size 1, or export it with --batch-size 2"),
        ({"size": (64, 64)}, "made for 32 x 64 px, not 64 x 64; leave out --size"),
    ]
    for options, said in cases:
        with pytest.raises(ValueError, match=said):
            run.sides_of_artifact(path, tmp_path, **options)
    other = path.rename(tmp_path / "mine.onnx")
    (side,) = run.sides_of_artifact(other, tmp_path)
    assert (side.precision, side.num_macs, side.network) == ("-", None, str(other))
    with pytest.raises(ValueError, match="its name does not tell which network it holds"):
        run.sides_of_artifact(other, tmp_path, against=["timm"])
    with pytest.raises(ValueError, match="no such file"):
        run.sides_of_artifact(tmp_path / "missing.onnx", tmp_path)


def test_open_axes_and_pixels(tmp_path: Path):
    found = Signature((None, None, None, 3), True, 5)
    assert run._shape(Path("a.onnx"), found, 4, (64, 96)) == (4, 64, 96, 3)
    assert run._shape(Path("a.onnx"), found, 4, None) == (4, 256, 256, 3)
    side = Side("a", "a", "onnx", "fp32", tmp_path / "a.onnx", (2, 64, 96, 3), uint8=True)
    assert side.size == (64, 96)
    images = run.example(side)
    assert (images.dtype, images.shape, images.max()) == (np.uint8, side.shape, 255)


@pytest.mark.parametrize("uint8", [False, True])
def test_what_onnx_says_of_itself(tmp_path: Path, uint8: bool):
    onnx = pytest.importorskip("onnx")
    kind = onnx.TensorProto.UINT8 if uint8 else onnx.TensorProto.FLOAT
    shape = ["batch", 8, 9, 3] if uint8 else ["batch", 3, 8, 9]
    given = onnx.helper.make_tensor_value_info("images", kind, shape)
    answer = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", 7])
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [given], [answer])), tmp_path / "a.onnx")
    expected = (None, 8, 9, 3) if uint8 else (None, 3, 8, 9)
    assert read_signature(tmp_path / "a.onnx") == Signature(expected, uint8, 7)


@pytest.mark.parametrize("uint8", [False, True])
def test_what_executorch_says_of_itself(tmp_path: Path, uint8: bool):
    pytest.importorskip("executorch")

    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.to(torch.float32).mean((1, 2) if uint8 else (2, 3))

    shape, kind = ((2, 8, 9, 3), torch.uint8) if uint8 else ((2, 3, 8, 9), torch.float32)
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from executorch.exir import to_edge

        program = to_edge(torch.export.export(Mean(), (torch.zeros(shape, dtype=kind),))).to_executorch()
    (tmp_path / "a.pte").write_bytes(program.buffer)
    assert read_signature(tmp_path / "a.pte") == Signature(shape, uint8, 3)


@pytest.mark.parametrize("uint8", [False, True])
def test_what_openvino_says_of_itself(tmp_path: Path, uint8: bool):
    openvino = pytest.importorskip("openvino")
    shape = [-1, 8, 9, 3] if uint8 else [-1, 3, 8, 9]
    given = openvino.opset13.parameter(shape, openvino.Type.u8 if uint8 else openvino.Type.f32)
    axes = openvino.opset13.constant([1, 2] if uint8 else [2, 3])
    mean = openvino.opset13.reduce_mean(openvino.opset13.convert(given, "f32"), axes)
    openvino.save_model(openvino.Model([mean], [given]), tmp_path / "a.xml")
    expected = (None, 8, 9, 3) if uint8 else (None, 3, 8, 9)
    assert read_signature(tmp_path / "a.xml") == Signature(expected, uint8, 3)


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


def test_what_is_not_possible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    weights = rivals.random_weights("xxs")
    headless = replace(weights, tensors={k: x for k, x in weights.tensors.items() if "classifier" not in k})
    cases: list[tuple[Weights, dict[str, Any], str]] = [
        (weights, {"runtimes": ["torch", "abacus"]}, "there is no runtime 'abacus'; there are torch, compiled, onnx"),
        (weights, {"precisions": ["int8"]}, "torch is timed in fp32 alone; leave out int8 or torch"),
        (weights, {"against": ["resnet5000"]}, "there is no network 'resnet5000'"),
        (weights, {"size": (16, 16)}, "both sides must be 32 px or more"),
        (headless, {}, "these weights have no classifier"),
    ]
    for given, options, said in cases:
        with pytest.raises(ValueError, match=said):
            run.sides_of_weights("xxs", given, tmp_path, **options)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"a.gif: a figure ends in .png, .svg or .pdf"):
        run.check_figure(Path("a.gif"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"needs matplotlib.*pip install 'mobilevit\[docs\]'"):
        run.check_figure(Path("a.png"))
