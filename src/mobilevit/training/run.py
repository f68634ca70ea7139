"""The folder of a run: what is kept in it, and how a run that died goes on from there.

    run.json            the recipe, what the data were, what the run started from
    checkpoints/        everything that the next step needs, of the last two moments that were kept
    model.safetensors   averaged weights after the last epoch
    best.safetensors    averaged weights after the epoch with the best validation
    raw.safetensors     weights after the last epoch, not averaged
    metrics.jsonl       a line for every epoch
    steps.jsonl         a line for every step
    report.html         curves, confusion, mistakes

A run killed at any instant leaves each of these whole, old or new. The two lists of lines may then be ahead of the last
checkpoint; they are cut back to it, and the steps between are computed again, to the same numbers.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from mobilevit.files import write_whole
from mobilevit.images import first_line

WEIGHTS = ("model.safetensors", "best.safetensors", "raw.safetensors")
FILES = ("run.json", *WEIGHTS, "metrics.jsonl", "steps.jsonl", "report.html")
OTHER_DATA = (
    "classes, labels or file names of the images have changed, or an earlier version divided them; to resume, put "
    "removed files back under their names (any readable image will do for a damaged one)"
)
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
        started_before = description.exists()
        if started_before:
            if different := _different(read_facts(path), dict(facts)):
                more = f"; {OTHER_DATA}" if "other data" in different else ""
                raise ValueError(
                    f"{path}: holds another run ({different}){more}; name another folder, or remove this one"
                )
        elif self._kept() or any((path / name).exists() for name in FILES):
            raise ValueError(f"{path}: holds a run already; choose another folder or remove this one")
        with contextlib.ExitStack() as undo:
            try:
                self.checkpoints.mkdir(parents=True, exist_ok=True)
                self._lock = _lock(path / ".lock")
                undo.callback(self.close)
                for aside in self._asides():  # of a process that was killed while it wrote
                    aside.unlink()
                self._check_space(num_bytes)
                if not started_before:
                    self.describe(facts)
            except BlockingIOError:
                raise ValueError(f"{path}: another process is training into this folder; name another") from None
            except OSError as error:
                raise ValueError(f"{path}: cannot be written to ({(error.strerror or str(error)).lower()})") from None
            undo.pop_all()

    def describe(self, facts: Mapping[str, Any]) -> None:
        """Write what the run is to run.json."""
        write_whole(self.path / "run.json", lambda aside: aside.write_text(_to_json(facts), encoding="utf-8"))

    def save(self, state: Mapping[str, Any], step: int) -> None:
        """Keep `state` as the checkpoint of `step`, then let go of the oldest."""
        path = self.checkpoints / f"{step:09}.pt"
        with _naming(path):
            write_whole(path, lambda aside: _save(dict(state), aside))
            # Those with a higher number are damaged, or this step would not have been computed again.
            last = [one for one in self._kept() if one <= path][-NUM_KEPT:]
            for old in self._kept():
                if old not in last:
                    old.unlink()

    def latest(self, complain: Callable[[str], object]) -> Path | None:
        """The last checkpoint that can be read, if there is one; what cannot be read is said and passed over."""
        for path in reversed(self._kept()):
            try:
                read_checkpoint(path)
            except Exception as error:  # torch.load raises nearly anything
                complain(f"{path}: cannot be read ({first_line(error)}); passed over")
            else:
                return path
        return None

    def _kept(self) -> list[Path]:
        return sorted(self.checkpoints.glob("[0-9]*.pt"))

    def _asides(self) -> list[Path]:
        of_files = (aside for name in FILES for aside in self.path.glob(f".{name}.*"))
        return [*of_files, *self.checkpoints.glob(".[0-9]*.pt.*")]

    def _check_space(self, num_bytes: int) -> None:
        # One more than are kept, since the oldest goes only when the newest is there, and the three files of weights.
        needed = (NUM_KEPT + 2) * num_bytes
        weights = (self.path / name for name in WEIGHTS)
        there = sum(file.stat().st_size for file in [*self._kept(), *weights] if file.exists())
        free = shutil.disk_usage(self.path).free
        if free < needed - there:
            raise ValueError(
                f"{self.path}: has {free / 1e6:,.0f} MB left, checkpoints need {(needed - there) / 1e6:,.0f} MB"
            )

    def close(self) -> None:
        """Let others write to the folder."""
        if self._lock is not None:
            self._lock.close()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `RunFolder.save` wrote, on the CPU."""
    with zipfile.ZipFile(path) as archive:
        if (part := archive.testzip()) is not None:  # torch.load looks at no checksum
            raise ValueError(f"{path}: {part} is damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


class Lines:
    """A file of JSON objects, a line for each, that begins with what it held up to `keep` lines.

    Raises:
        ValueError: fewer lines than that, or one among them that is damaged.
    """

    def __init__(self, path: Path, keep: int):
        self.path = path
        with _naming(path):
            kept: list[bytes] = []
            if keep and path.exists():
                with path.open("rb") as file:
                    kept = [line for line, _ in zip(file, range(keep), strict=False) if _is_whole(line)]
            if len(kept) < keep:
                raise ValueError(f"{path}: has {len(kept)} whole lines, and the checkpoint knows of {keep}; start anew")
            write_whole(path, lambda aside: aside.write_bytes(b"".join(kept)))
            self._file = path.open("a", encoding="utf-8")

    def add(self, line: Mapping[str, Any]) -> None:
        """Write one more; it is on the disk for certain after `sync`."""
        with _naming(self.path):
            self._file.write(json.dumps(line) + "\n")

    def sync(self) -> None:
        """Wait until everything is on the disk."""
        with _naming(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write what is left."""
        with _naming(self.path):
            self._file.close()


def _is_whole(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return line.endswith(b"\n")


def _save(state: dict[str, Any], path: Path) -> None:
    try:
        torch.save(state, path)
    except RuntimeError:  # is all it says where the disk is full; Python's own files say why they cannot be written
        buffer = io.BytesIO()
        torch.save(state, buffer)
        path.write_bytes(buffer.getbuffer())


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Have the errors of the system name `path`: writing and syncing leave it out, and an aside's name says little."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def read_facts(folder: Path) -> dict[str, Any]:
    """What the run.json of a run's folder holds; an empty dictionary where there is none."""
    path = folder / "run.json"
    if not path.exists():
        return {}
    with contextlib.suppress(ValueError):
        if isinstance(facts := json.loads(path.read_text(encoding="utf-8")), dict):
            return facts
    raise ValueError(f"{path}: damaged; name another folder, or remove this one")


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
        if f"{prefix}{name}" == "recipe.data.max_unreadable":  # an earlier version compared it
            continue
        there, here = before.get(name), now.get(name)
        if isinstance(there, dict) and isinstance(here, dict):
            found.append(_different(there, here, f"{prefix}{name}."))
        elif there != here and not prefix and name == "data":
            found.append("other data")  # fingerprints tell a person nothing
        elif there != here:
            found.append(f"{prefix}{name} is {there} there, {here} here")
    return ", ".join(filter(None, found))


def _to_json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"
