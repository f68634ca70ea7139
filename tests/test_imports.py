"""Imports between the modules of mobilevit: no cycles, and none inside functions except where it is intended."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import mobilevit

PACKAGE = Path(mobilevit.__file__).parent


def test_no_import_cycle() -> None:
    """Also between a package and its modules, which import-linter's `acyclic_siblings` contract does not check."""
    grimp = pytest.importorskip("grimp")
    graph = grimp.build_graph("mobilevit", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    imports["mobilevit"] = set()  # its public names are imported on use
    TopologicalSorter(imports).prepare()  # raises CycleError with the cycle


def test_imports_at_the_top() -> None:
    """Only `cli` and the public names import mobilevit on use; other packages may be imported inside functions."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE).as_posix()
        if module == "__init__.py" or module.startswith("cli/"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        for node in (node for function in functions for node in ast.walk(function)):
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "."]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            if any(name.split(".")[0] in ("mobilevit", "") for name in names):
                found.append(f"{module}:{node.lineno}")
    assert found == []
