"""Printing and writing of results, shared by the benchmarks."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table


def print_table(title: str, note: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table, at full width if the output is not a terminal."""
    table = Table(*columns, title=title, caption=note, caption_justify="left")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *rows)]


def write_results(
    out: Path, title: str, facts: str, note: str, columns: Sequence[str], rows: Iterable[Sequence[str]], result: str
) -> None:
    """Write OUT.md, a table below its `facts`, and OUT.json with `result`, which is JSON already."""
    lines = markdown_table(columns, rows)
    out.with_name(out.name + ".md").write_text("\n".join([f"# {title}", "", facts, "", note, "", *lines, ""]))
    out.with_name(out.name + ".json").write_text(result + "\n")
