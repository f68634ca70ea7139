"""benchmarks/browser.py in a reduced form."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import CHROMIUM
from mobilevit.demo.runtime import PACKAGE, find_runtime

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "browser.py"


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
def test_all_engines(tmp_path: Path):
    for package in ("onnxruntime", "timm", "playwright"):
        pytest.importorskip(package, reason="the benchmark requires mobilevit[onnx,compare,browser-test]")
    try:
        find_runtime()
    except ValueError as error:
        pytest.skip(str(error))
    out = tmp_path / "result"
    command = [sys.executable, str(SCRIPT), "--models", "xxs", "--precisions", "fp16", "int8", "--against", "timm"]
    command += ["--rounds", "3", "--loads", "1", "--size", "64", "--threads", "2", "--profile", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.with_name("result.json").read_text())
    assert result["runtime"] == PACKAGE
    assert result["processor"]
    assert int(result["chromium"].partition(".")[0]) > 100
    engines = {row["engine"] for row in result["rows"]}
    assert {"WASM, 1 thread", "WASM, 2 threads"} <= engines
    assert any(note.startswith("WebGPU: ") for note in result["notes"])
    for engine in engines:
        rows = {(row["model"], row["precision"]): row for row in result["rows"] if row["engine"] == engine}
        no_fp16 = [note for note in result["notes"] if note.startswith(f"{engine}: no fp16")]  # some GPUs
        assert len(no_fp16) <= (not engine.startswith("WASM"))
        precisions = ("fp32", "int8") if no_fp16 else ("fp32", "fp16", "int8")
        assert set(rows) == {(model, precision) for model in ("ours", "timm") for precision in precisions}
        for (_, precision), row in rows.items():  # compared with PyTorch
            low, high = {"fp32": (0, 1e-3), "fp16": (1e-4, 0.1), "int8": (1e-3, 2)}[precision]
            assert low < row["error"] < high
        if engine.startswith("WASM"):
            assert rows["timm", "int8"]["ratio"]["median"] > 0
            assert rows["ours", "int8"]["fp32_ratio"]["median"] > 0
            assert rows["ours", "fp32"]["ratio"] is rows["ours", "fp32"]["fp32_ratio"] is None
    loads = {(load["engine"], load["precision"]): load for load in result["loads"]}
    assert set(loads) == {(row["engine"], row["precision"]) for row in result["rows"]}
    full, small = (loads["WASM, 1 thread", precision] for precision in ("fp32", "int8"))
    assert small["model_gzip_bytes"] < small["model_bytes"] < 0.4 * full["model_bytes"]
    assert full["first_result_ms"] > 0
    assert full["memory_bytes"] > full["model_bytes"]
    assert {"Conv", "Attention"} <= set(result["profiles"]["xxs ours fp32"])
    report = out.with_name("result.md").read_text()
    assert result["processor"] in report
    assert f"Chromium {result['chromium']}" in report
