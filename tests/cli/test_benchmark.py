"""`mobilevit benchmark`."""

import json
from pathlib import Path
from typing import Any

import pytest

from command_line import check_refused, refused, run


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    from mobilevit.benchmark import run as benchmark_run
    from mobilevit.benchmark import timing

    startup = benchmark_run.Startup(load_ms=2.5, memory_bytes=3_000_000)
    monkeypatch.setattr(benchmark_run, "measure_in_subprocess", lambda model, num_threads: startup)
    monkeypatch.setattr(timing, "PEAK_SIZE", 256)


def test_benchmark(capsys: pytest.CaptureFixture[str], here: Path, no_processes: None):
    weights = "classifier.safetensors"
    options = ["--rounds", "2", "--num-threads", "1", "--batch-size", "2", "1", "--against", "timm"]
    assert run("benchmark", "XXS", weights, "--size", "32", "64", *options, "--out", "a.json", "--figure", "a.svg") == 0
    out, err = capsys.readouterr()
    *shown, line = out.splitlines()
    report = json.loads(line)
    assert (here / "a.json").read_text() == f"{line}\n"
    assert "<svg" in (here / "a.svg").read_text()
    rows = [(row["name"], row["batch_size"]) for row in report["rows"]]
    assert rows == [(name, size) for size in (2, 1) for name in ("XXS", "timm", weights, "timm")]
    assert {tuple(row["size_px"]) for row in report["rows"]} == {(32, 64)}
    assert {row["memory_bytes"] for row in report["rows"]} == {3_000_000}
    assert [row["baseline"] for row in report["rows"][:4]] == [None, "XXS torch fp32", None, f"{weights} torch fp32"]
    assert (report["num_rounds"], report["num_threads"]) == (2, 1)
    assert all(row["error"] < 1e-4 for row in report["rows"])
    first = next(text for text in shown if text.split()[:1] == ["XXS"]).split()
    assert first[1:5] == ["torch", "fp32", "2", f"{report['rows'][0]['latency_ms']['p10']:.2f}"]
    assert "timm" in err


def test_options_of_benchmark(capsys: pytest.CaptureFixture[str], here: Path, monkeypatch: pytest.MonkeyPatch):
    from mobilevit.benchmark import models as benchmark_models

    calls: list[Any] = []

    def record(*args: Any, **options: Any) -> None:
        calls.append(options)
        raise ValueError("stop here")

    monkeypatch.setattr(benchmark_models, "models_from_weights", record)
    command = ("benchmark", "s", "s", "--runtime", "torch", "onnx", "torch", "--precision", "fp32", "int8")
    assert "stop here" in refused(capsys, *command)
    (options,) = calls
    assert (options["runtimes"], options["precisions"]) == (("torch", "onnx"), ("fp32", "int8"))
    assert (options["batch_sizes"], options["size"], options["against"]) == ((1,), None, ())


MISTAKES = {
    "": "artifacts weights xxs, xs, s",
    "xxl": "xxl: no such file",
    "missing.onnx": "missing.onnx: no such file",
    "a.onnx --runtime onnx": "--runtime artifact",
    "a.onnx --precision int8": "--precision artifact",
    "xxs --rounds 0": "--rounds 0 1 or more",
    "xxs --num-threads 0": "--num-threads 0",
    "xxs --batch-size 1 0": "--batch-size 0",
    "xxs --size 31": "--size 31; 32 px",
    "xxs --runtime onx": "--runtime 'onx' 'torch', 'compiled', 'onnx'",
    "xxs --precision int8": "int8 torch fp32",
    "xxs --against resnet5000": "'resnet5000' did you mean resnet50 timm",
    "xxs --figure a.doc": "a.doc .png, .svg .pdf",
    "xxs --out missing/a.json": "missing/a.json folder",
}


@pytest.mark.parametrize(("args", "facts"), MISTAKES.items())
def test_mistakes(capsys: pytest.CaptureFixture[str], here: Path, args: str, facts: str):
    (here / "a.onnx").write_bytes(b"")
    check_refused(capsys, f"benchmark {args}", facts)
