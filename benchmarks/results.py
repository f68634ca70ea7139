"""What the benchmarks share: naming the processor, and writing what came out."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from pathlib import Path


def processor() -> str:
    """The name of the CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_results(
    out: Path, title: str, facts: str, note: str, columns: Sequence[str], rows: Iterable[Sequence[str]], result: str
) -> None:
    """OUT.md with a table under its facts, OUT.json with `result`, which is JSON already."""
    lines = [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *rows)]
    out.with_name(out.name + ".md").write_text("\n".join([f"# {title}", "", facts, "", note, "", *lines, ""]))
    out.with_name(out.name + ".json").write_text(result + "\n")
