"""Puts the browser's runtime into the wheel, so that `mobilevit demo` works offline."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Hook(BuildHookInterface):
    """Called by hatchling for every wheel; of editable ones it keeps out: there the command fetches what it needs."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Have the files fetched into the user's cache, and included from there."""
        if version == "editable":
            return
        runtime = runpy.run_path(str(Path(self.root) / "src" / "mobilevit" / "demo" / "runtime.py"))
        try:
            folder = runtime["fetch"](self.app.display_info)
        except runtime["ChecksumError"]:
            raise
        except ValueError as error:
            # Whoever installs from source to train needs no npm. Without the files the command fetches them itself.
            self.app.display_warning(f"a wheel without the browser's runtime: {error}")
            return
        for name in runtime["FILES"]:
            build_data["force_include"][str(folder / name)] = f"mobilevit/demo/static/ort/{name}"
