"""The folder of a run: what is kept in it, and how a run that died goes on from there.

    run.json            the recipe, what the data were, what the run started from
    checkpoints/        everything that the next step needs, of the last two moments that were kept
    model.safetensors   averaged weights after the last epoch
    best.safetensors    averaged weights after the epoch with the best validation
    raw.safetensors     weights after the last epoch, not averaged
    metrics.jsonl       a line for every epoch
    steps.jsonl         a line for every step

A run killed at any instant leaves each of these whole, old or new. The two lists of lines may then be ahead of the last
checkpoint; they are cut back to it, and the steps between are computed again, to the same numbers.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from mobilevit.models.weights import write_whole
from mobilevit.pictures import first_line

NUM_KEPT = 2  # the last one may have been hit by what killed the run: a disk that failed, say


class RunFolder:
    """A folder that this process alone writes to.

    `facts` say what the run is: a folder with the same facts is taken up again.

    Raises:
        ValueError: a folder that holds another run or something else, cannot be written to, has too little space for
            checkpoints of `num_bytes`, or is in use.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any], *, num_bytes: int):
        self.path = path
        self.checkpoints = path / "checkpoints"
        description = path / "run.json"
        self.started_before = description.exists()
        if self.started_before:
            try:
                before = json.loads(description.read_text(encoding="utf-8"))
            except ValueError:
                raise ValueError(f"{description}: damaged; name another folder, or remove this one") from None
            if different := _different(before, dict(facts)):
                raise ValueError(f"{path}: holds another run ({different}); name another folder, or remove this one")
        elif any((path / name).exists() for name in ("metrics.jsonl", "model.safetensors", "checkpoints")):
            raise ValueError(f"{path}: holds a run already; choose another folder or remove this one")
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(path / ".lock")
            if not self.started_before:
                write_whole(description, lambda aside: aside.write_text(_to_json(facts), encoding="utf-8"))
        except BlockingIOError:
            raise ValueError(f"{path}: another process is training into this folder; name another") from None
        except OSError as error:
            raise ValueError(f"{path}: cannot be written to ({(error.strerror or str(error)).lower()})") from None
        for aside in [*path.glob(".*.*"), *self.checkpoints.glob(".*")]:  # of a process that was killed while it wrote
            aside.unlink()
        # One more than are kept, since the oldest goes only when the newest is there, and the three files of weights.
        needed, free = (NUM_KEPT + 2) * num_bytes, shutil.disk_usage(path).free
        if free < needed:
            raise ValueError(f"{path}: has {free / 1e6:,.0f} MB left, checkpoints need {needed / 1e6:,.0f} MB")

    def save(self, state: Mapping[str, Any], step: int) -> None:
        """Keep `state` as the checkpoint of `step`, then let go of the oldest."""
        write_whole(self.checkpoints / f"{step:09}.pt", lambda aside: torch.save(dict(state), aside))
        for old in self._kept()[:-NUM_KEPT]:
            old.unlink()

    def latest(self, complain: Callable[[str], object]) -> Path | None:
        """The last checkpoint that can be read, if there is one; what cannot be read is said and passed over."""
        for path in reversed(self._kept()):
            try:
                read_checkpoint(path)
            except Exception as error:  # torch.load raises nearly anything
                complain(f"{path}: cannot be read ({first_line(error)}); going on from the one before")
            else:
                return path
        return None

    def _kept(self) -> list[Path]:
        return sorted(self.checkpoints.glob("[0-9]*.pt"))

    def close(self) -> None:
        """Let others write to the folder."""
        if self._lock is not None:
            self._lock.close()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `RunFolder.save` wrote, on the CPU."""
    return torch.load(path, map_location="cpu", weights_only=True)


class Lines:
    """A file of JSON objects, a line for each, that begins with what it held up to `keep` lines.

    Raises:
        ValueError: fewer lines than that, or one among them that is damaged.
    """

    def __init__(self, path: Path, keep: int):
        self.path = path
        kept: list[str] = []
        if keep and path.exists():
            with path.open(encoding="utf-8") as file:
                kept = [line for line, _ in zip(file, range(keep), strict=False) if line.endswith("\n")]
        if len(kept) < keep:
            raise ValueError(f"{path}: has {len(kept)} whole lines, and the checkpoint knows of {keep}; start anew")
        write_whole(path, lambda aside: aside.write_text("".join(kept), encoding="utf-8"))
        self._file = path.open("a", encoding="utf-8")

    def add(self, line: Mapping[str, Any]) -> None:
        """Write one more; it is on the disk for certain after `sync`."""
        self._file.write(json.dumps(line) + "\n")

    def sync(self) -> None:
        """Wait until everything is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write what is left."""
        self._file.close()


def _lock(path: Path) -> IO[str] | None:
    """An open file, locked until it is closed or the process is gone; None where the system has no such locks."""
    try:
        import fcntl
    except ImportError:
        return None
    file = path.open("w")
    with contextlib.ExitStack() as stack:
        stack.callback(file.close)
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not handed on to worker processes
        stack.pop_all()
    return file


def _different(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> str:
    """What differs, as words."""
    now = json.loads(json.dumps(now))
    found = []
    for name in [*before, *(name for name in now if name not in before)]:
        there, here = before.get(name), now.get(name)
        if isinstance(there, dict) and isinstance(here, dict):
            found.append(_different(there, here, f"{prefix}{name}."))
        elif there != here:
            found.append(f"{prefix}{name} is {there} there, {here} here")
    return ", ".join(filter(None, found))


def _to_json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"
