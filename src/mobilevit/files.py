"""Atomic writes, and imports of optional dependencies."""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomic(path: Path, content: str | bytes | Callable[[Path], Any], *, sync: bool = True) -> None:
    """Write a file atomically: to a temporary file in the same folder, which then replaces `path`.

    Readers see the old file or the new one. Missing folders are created.

    Args:
        path: the file.
        content: text (written as UTF-8), bytes, or a function that writes to the path that it is given.
        sync: wait until the data are on the disk. Without it the call is faster, but a power failure can damage the
            file.

    Raises:
        OSError: of the system, with `path` as its file name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        # mkstemp creates private files; use the permissions of any other new file.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        if sync:
            _sync(temporary)
        temporary.replace(path)
        if sync and os.name == "posix":  # only there can a folder be opened and its entries be synced
            _sync(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


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
