"""What the benchmarks share: writing what came out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path


def write_results(
    out: Path, title: str, facts: str, note: str, columns: Sequence[str], rows: Iterable[Sequence[str]], result: str
) -> None:
    """OUT.md with a table under its facts, OUT.json with `result`, which is JSON already."""
    lines = [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *rows)]
    out.with_name(out.name + ".md").write_text("\n".join([f"# {title}", "", facts, "", note, "", *lines, ""]))
    out.with_name(out.name + ".json").write_text(result + "\n")
