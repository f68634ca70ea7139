"""benchmarks/gpu.py in its reduced form, on the CPU."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mobilevit.models.mobilevit import Attention

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NEEDS_CUDA = "skipped, needs CUDA"


def run(out: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--device", "cpu", "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(out.with_name(out.name + ".json").read_text())["sections"]


@pytest.mark.slow
def test_all_sections(tmp_path: Path):
    sections = run(tmp_path / "result", "--quick", "--one-process")
    report = (tmp_path / "result.md").read_text()
    for name, section in sections.items():
        assert (section["status"], section["errors"]) == ("finished", []), name
        assert section["rows"], name
        assert f"## {name}: finished" in report
    assert {row["task"] for row in sections["parity"]["rows"]} == {"classify", "detect", "segment"}
    assert {row["model"] for row in sections["training"]["rows"]} >= {"mobilevit", "timm, NCHW", "timm, NHWC"}
    assert {row["mode"] for row in sections["training"]["rows"]} == {"eager", "compiled"}
    assert {row["mode"] for row in sections["inference"]["rows"]} == {"eager", "exported", "compiled"}
    assert all(row["passed"] for row in sections["runs"]["rows"])
    assert any("killed" in row["check"] for row in sections["runs"]["rows"])
    assert any("images/s need" in note for note in sections["loader"]["notes"])
    for name in ("peaks", "parity", "training", "runs"):
        assert any(note.startswith(NEEDS_CUDA) for note in sections[name]["notes"]), name


@pytest.mark.slow
def test_sections_in_processes(tmp_path: Path):
    """A section has a process of its own, which is stopped at the end of its time. The next one is then skipped."""
    sections = run(tmp_path / "quick", "--quick", "--sections", "peaks", "loader")
    assert [section["status"] for section in sections.values()] == ["finished", "finished"]
    assert {row["peak"] for row in sections["peaks"]["rows"]} == {"bfloat16", "float32", "copy"}
    sections = run(tmp_path / "full", "--sections", "peaks", "loader", "--minutes", "0.35")
    assert sections["peaks"]["status"] == "stopped at the end of its time"
    assert sections["peaks"]["notes"] == []  # the first product of the full size takes longer
    assert sections["loader"]["status"] == "skipped, no time left"


@pytest.fixture
def gpu_speed(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_speed")


def test_a_failed_item(gpu_speed: Any, tmp_path: Path):
    context = gpu_speed.Context(torch.device("cpu"), True, time.monotonic() + 0.5, tmp_path / "rows.jsonl")
    with context.item("first"):
        raise RuntimeError("broken kernel")
    with context.item("second"):
        context.row(value=1.23456)
    assert not context.has_time("third", seconds=1)
    assert context.needs_cuda("fourth")
    error, row, *notes = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert error["error"].startswith("first\n")
    assert "broken kernel" in error["error"]
    assert row == {"row": {"value": 1.235}}
    assert [note["note"].rpartition(": ")[2] for note in notes] == ["third", "fourth"]


@pytest.mark.parametrize("dim", [64, 80, 120, 144, 240])
def test_padded_heads_are_exact(gpu_speed: Any, dim: int):
    torch.manual_seed(0)
    ours = Attention(dim, 4).double()
    padded = gpu_speed.PaddedAttention(ours).double()
    assert padded.padded % 8 == 0
    assert 0 <= padded.padded - dim // 4 < 8
    x = torch.randn(3, 7, dim, dtype=torch.float64)
    for model in (ours, padded):
        model(x).square().sum().backward()
    torch.testing.assert_close(padded(x), ours(x))
    added = padded.qkv.weight.detach().abs().sum(1) == 0
    assert int(added.sum()) == 3 * 4 * (padded.padded - dim // 4)
    gradient, expected = gradients(padded)["qkv.weight"], gradients(ours)["qkv.weight"]
    assert not gradient[added].any()
    torch.testing.assert_close(gradient[~added], expected)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_traffic(gpu_speed: Any):
    """A linear layer reads its input and weights and writes its output; a view moves nothing."""
    layer, x = nn.Linear(64, 32, bias=False), torch.ones(8, 64)
    with torch.no_grad(), gpu_speed.Traffic() as traffic:
        layer(x).view(-1)
    assert traffic.num_bytes == 4 * (64 * 32 + 8 * 64 + 8 * 32)
