"""benchmarks/scaling.py and benchmarks/all.py with few points."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(BENCHMARKS / script), *options], capture_output=True, text=True)


@pytest.mark.slow
def test_scaling(tmp_path: Path):
    points = ["--sizes", "64", "96", "--batches", "1", "2", "--size", "64"]
    done = run("scaling.py", "--out", str(tmp_path / "x"), "--runtimes", "onnx", *points, "--rounds", "1")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    models = ["ours", "timm", "torchvision:mobilenet_v2"]
    expected = [(px, batch, model) for px, batch in ((64, 1), (96, 1), (64, 2)) for model in models]
    assert [(row["size_px"], row["batch_size"], row["model"]) for row in rows] == expected
    assert (tmp_path / "x_onnx.png").stat().st_size > 10_000
    assert (tmp_path / "x.md").read_text().count("| onnx |") == len(expected)


def test_unknown_benchmark_is_named(tmp_path: Path):
    done = run("all.py", "--hardware", "x", "--only", "scalling", "--out", str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert "scalling" in done.stderr
    assert "scaling" in done.stderr
