"""Atomic writes, and imports of optional dependencies."""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: Path, write_to: Callable[[Path], Any], *, synced: bool = True) -> None:
    """Write aside, sync, rename: whoever looks at `path` sees the old file or the new one, never half of it.

    `write_to` is given the path to write to; folders above `path` are made. Not to wait until the disk has it
    (`synced`) saves some milliseconds, and only a machine that loses its power can then leave something else.

    Raises:
        OSError: as the system says it, of `path` and not of the file aside.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    aside = Path(name)
    try:
        write_to(aside)
        # mkstemp makes files private; this one has the permissions of any other new file.
        mask = os.umask(0)
        os.umask(mask)
        aside.chmod(0o666 & ~mask)
        if synced:
            _sync(aside)
        aside.replace(path)
        if synced and os.name == "posix":  # a folder can be opened, and its new entry made to last
            _sync(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        aside.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class MissingExtraError(ValueError):
    """An optional dependency that is not installed."""


def require(module: str, extra: str, purpose: str) -> Any:
    """Import and return `module`, which the optional dependencies `mobilevit[extra]` install.

    Raises:
        MissingExtraError: it is not installed. The message names `purpose`, the package and the command to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A module that is missing inside an installed package is another problem: name that one.
        missing = error.name or module
        raise MissingExtraError(
            f"{purpose} requires {missing}, which is not installed; run: pip install 'mobilevit[{extra}]'"
        ) from None
