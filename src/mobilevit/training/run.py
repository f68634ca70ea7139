"""The run folder: checkpoints, logs, and how an interrupted run resumes.

    run.json            recipe, fingerprint of the data, initial weights
    checkpoints/        the two newest checkpoints
    model.safetensors   EMA weights after the last epoch
    best.safetensors    EMA weights after the epoch with the best validation metric
    raw.safetensors     raw weights (without EMA) after the last epoch
    metrics.jsonl       a line per epoch
    steps.jsonl         a line per step
    report.html         charts, confusion matrix, most confident errors
    tracking.json       what the experiment trackers have received, if there are any

Every file is written atomically: a process killed at any time leaves either the old or the new version. The two logs
can be ahead of the newest checkpoint. On resume they are truncated to it, and the steps after it are computed again,
with identical results.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import torch

from mobilevit.defaults import TrackerName
from mobilevit.files import write_atomic
from mobilevit.messages import first_line
from mobilevit.recipes import MAX_MEGAPIXELS, Imbalance, Recipe, to_dict
from mobilevit.training.distributed import Processes
from mobilevit.training.ending import Ending, find_ending
from mobilevit.training.track import Tracking

logger = logging.getLogger(__name__)
WEIGHTS = ("model.safetensors", "best.safetensors", "raw.safetensors")
FILES = ("run.json", *WEIGHTS, "metrics.jsonl", "steps.jsonl", "report.html", "tracking.json")
NUM_CHECKPOINTS = 2  # a disk failure that ends the run can damage the newest one
# Keys in folders of earlier versions -> their current names. They can be resumed and read.
RENAMED_KEYS = {
    "pictures_at_once": "micro_batch_size",
    "pictures": "images",
    "pictures_per_second": "images_per_second",
    "val_num_pictures": "val_num_images",
    "waiting_share": "data_wait_fraction",
    "waited": "data_wait_seconds",
    "position": "progress",
    "average": "ema",
}


EpochMetrics = dict[str, float]
"""A line of metrics.jsonl: epoch, step, train_loss, val_<metric> of the EMA weights, raw_<metric> of the raw weights,
number of unreadable images, and times."""


@dataclass(frozen=True)
class StepRecord:
    """A line of steps.jsonl. Steps and epochs count from 1."""

    step: int
    epoch: int
    size_px: int
    images: int  # of all processes together
    loss: float
    lr: float
    images_per_second: float


@dataclass(frozen=True)
class Identity:
    """The values that identify a run. A folder is resumed only by a run with the same values.

    `data`, `weights` and `teacher` are fingerprints; `weights` is "random" without pretrained weights. `network` is the
    name of a network of another library.
    """

    recipe: Recipe
    data: str
    weights: str
    network: str | None = None
    teacher: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON values, without the recipe fields that do not affect the results."""
        recipe = to_dict(self.recipe)
        for name in ("num_workers", "max_unreadable"):  # the latter decides whether a run stops or skips an image
            del recipe["data"][name]
        if self.recipe.data.max_megapixels == MAX_MEGAPIXELS:  # earlier versions had no limit
            del recipe["data"]["max_megapixels"]
        if self.teacher is None:  # these options have no effect, and earlier versions did not have them
            del recipe["distill"]
        if self.recipe.imbalance == Imbalance():  # earlier versions did not have these options
            del recipe["imbalance"]
        if self.recipe.task != "multilabel":  # the options have no effect
            del recipe["multilabel"]
        if self.recipe.metric == "auto":
            del recipe["metric"]
        if self.recipe.patience == 0:
            del recipe["patience"]
        if not self.recipe.compute.quantization_aware:
            del recipe["compute"]["quantization_aware"]
        if self.recipe.optimizer.schedule == "cosine":
            del recipe["optimizer"]["schedule"], recipe["optimizer"]["cooldown_fraction"]
        if self.recipe.task != "distill":
            del recipe["data"]["crops_per_image"], recipe["data"]["cache_mb"]
        values = {"recipe": recipe, "data": self.data, "weights": self.weights}
        optional = {"network": self.network, "teacher": self.teacher}
        return {**values, **{name: value for name, value in optional.items() if value}}


class FinishedError(ValueError):
    """The run has already finished. `epochs` are the metrics of its epochs."""

    def __init__(self, message: str, epochs: list[EpochMetrics]):
        super().__init__(message)
        self.epochs = epochs


@dataclass
class Progress:
    """Position in a run, and sums over the steps of the current epoch."""

    epoch: int = 0
    step: int = 0  # in the epoch
    total_step: int = 0
    loss: float = 0.0
    seconds: float = 0.0
    data_wait_seconds: float = 0.0
    teacher_seconds: float = 0.0
    num_unreadable: int = 0
    history: list[EpochMetrics] = field(default_factory=list)  # metrics of the finished epochs
    main_metric: str = ""  # selects the best epoch; "" before the end of the first one

    def next_epoch(self, record: EpochMetrics, main_metric: str) -> Progress:
        """The start of the next epoch."""
        history = [*self.history, record]
        return Progress(self.epoch + 1, total_step=self.total_step, history=history, main_metric=main_metric)

    def ending(self, recipe: Recipe, schedule_epochs: int) -> Ending:
        """When the run ends, as far as its metrics determine it."""
        return find_ending(recipe, schedule_epochs, self.history, f"val_{self.main_metric}")


class RunFolder:
    """A run folder, locked for this process.

    `facts` identify the run: a folder with the same facts is resumed.

    Raises:
        ValueError: the folder contains another run or other files, is not writable, is in use, or has too little space
            for checkpoints of `num_bytes`.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any], *, num_bytes: int):
        self.path = path
        self.checkpoints = path / "checkpoints"
        is_new = not (path / "run.json").exists()
        if not is_new:
            _check_same_run(path, facts)
        elif self._saved() or any((path / name).exists() for name in FILES):
            raise ValueError(
                f"{path}: contains files of a run, but no run.json; choose another folder, or remove this one"
            )
        with contextlib.ExitStack() as undo:
            try:
                self.checkpoints.mkdir(parents=True, exist_ok=True)
                self._lock = _lock(path / ".lock")
                undo.callback(self.close)
                for temporary in self._temporary():  # of a process killed while writing
                    temporary.unlink()
                self._check_space(num_bytes)
                if is_new:
                    self.write_facts(facts)
            except BlockingIOError:
                raise ValueError(f"{path}: another process is training in this folder; choose another folder") from None
            except OSError as error:
                raise ValueError(f"{path}: cannot be written to ({(error.strerror or str(error)).lower()})") from None
            undo.pop_all()

    def write_facts(self, facts: Mapping[str, Any]) -> None:
        write_atomic(self.path / "run.json", json.dumps(facts, indent=2) + "\n")

    def save(self, state: Mapping[str, Any], step: int) -> None:
        """Save `state` as the checkpoint of `step`, then delete the oldest checkpoint."""
        path = self.checkpoints / f"{step:09}.pt"
        with _naming(path):
            write_atomic(path, lambda temporary: _torch_save(dict(state), temporary))
            # Checkpoints of later steps are damaged: otherwise this step would not have been computed again.
            newest = [one for one in self._saved() if one <= path][-NUM_CHECKPOINTS:]
            for old in self._saved():
                if old not in newest:
                    old.unlink()

    def latest(self) -> Path | None:
        """The newest readable checkpoint, or None; logs a warning for each unreadable one."""
        for path in reversed(self._saved()):
            try:
                read_checkpoint(path)
            except Exception as error:  # torch.load raises nearly anything
                logger.warning(f"{path}: skipped, because it cannot be read ({first_line(error)})")
            else:
                return path
        return None

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()

    def _saved(self) -> list[Path]:
        return sorted(self.checkpoints.glob("[0-9]*.pt"))

    def _temporary(self) -> list[Path]:
        of_files = (path for name in FILES for path in self.path.glob(f".{name}.*"))
        return [*of_files, *self.checkpoints.glob(".[0-9]*.pt.*")]

    def _check_space(self, num_bytes: int) -> None:
        # One checkpoint more, since the oldest is deleted after the newest is written, and the three weight files.
        needed = (NUM_CHECKPOINTS + 2) * num_bytes
        weights = (self.path / name for name in WEIGHTS)
        used = sum(file.stat().st_size for file in [*self._saved(), *weights] if file.exists())
        free = shutil.disk_usage(self.path).free
        if free < needed - used:
            raise ValueError(
                f"{self.path}: has {free / 1e6:,.0f} MB left, checkpoints need {(needed - used) / 1e6:,.0f} MB"
            )


class JsonLines:
    """A JSON Lines file, opened to append after its first `num_lines` lines; later lines are removed.

    Raises:
        ValueError: fewer lines, or a damaged line among them.
    """

    def __init__(self, path: Path, num_lines: int):
        self.path = path
        with _naming(path):
            lines: list[str] = []
            if num_lines and path.exists():
                with path.open("rb") as file:
                    parsed = map(_parse_line, (line for line, _ in zip(file, range(num_lines), strict=False)))
                    lines = [json.dumps(value) + "\n" for value in parsed if value is not None]
            if len(lines) < num_lines:
                raise ValueError(
                    f"{path}: has {len(lines)} intact lines, but the checkpoint needs {num_lines}; restore the file, "
                    "or start a new run in another folder"
                )
            write_atomic(path, "".join(lines))
            self._file = path.open("a", encoding="utf-8")

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a line; it is on the disk after `sync`."""
        with _naming(self.path):
            self._file.write(json.dumps(record) + "\n")

    def sync(self) -> None:
        """Wait until all lines are on the disk."""
        with _naming(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with _naming(self.path):
            self._file.close()


class Run:
    """A run in progress: its position in every process, its folder and logs in rank 0 only.

    `state` is that of the checkpoint to resume from, or empty. `schedule_epochs` is the number of epochs in the
    learning rate schedule: fewer than in the recipe if the run was extended.
    """

    def __init__(self, progress: Progress, state: dict[str, Any], schedule_epochs: int, folder: RunFolder | None):
        self.progress, self._state, self.schedule_epochs, self.folder = progress, state, schedule_epochs, folder
        self._steps: JsonLines | None = None
        self._epochs: JsonLines | None = None
        self._tracking: Tracking | None = None

    def take_state(self) -> dict[str, Any]:
        """Return the state and release the memory that it takes."""
        state, self._state = self._state, {}
        return state

    def open_logs(self, stack: contextlib.ExitStack, trackers: Sequence[TrackerName], facts: Mapping[str, Any]) -> None:
        if self.folder is None:
            return
        path, progress = self.folder.path, self.progress
        self._epochs = stack.enter_context(contextlib.closing(JsonLines(path / "metrics.jsonl", len(progress.history))))
        self._steps = stack.enter_context(contextlib.closing(JsonLines(path / "steps.jsonl", progress.total_step)))
        if trackers:
            self._tracking = stack.enter_context(contextlib.closing(Tracking(trackers, path, facts)))
            self._tracking.send()  # lines that an earlier process could not send, or from before tracking was enabled

    def log_step(self, record: StepRecord) -> None:
        if self._steps:
            self._steps.add(vars(record))

    def log_epoch(self, record: EpochMetrics) -> None:
        if self._epochs:
            self._epochs.add(record)

    def sync_logs(self) -> None:
        for lines in (self._epochs, self._steps):
            if lines:
                lines.sync()

    def save(self, state: Mapping[str, Any]) -> None:
        """Write a checkpoint with `state` and the progress."""
        if self.folder:
            self.sync_logs()
            self.folder.save({"progress": vars(self.progress), **state}, self.progress.total_step)
        if self._tracking:  # after the checkpoint, so that these steps are never computed again
            self._tracking.send()

    def complete(self) -> None:
        """Mark the run as finished."""
        if self._tracking:
            self._tracking.complete()


@contextlib.contextmanager
def open_run(
    out: Path,
    identity: Identity,
    processes: Processes,
    *,
    num_bytes: int,
    extend: bool,
    trackers: Sequence[TrackerName],
) -> Iterator[Run]:
    """Start the run in `out` or resume it.

    Raises:
        FinishedError: all epochs are done.
        ValueError: see `RunFolder` and `Tracking`; with `extend`, a run that cannot be extended.
    """
    recipe = identity.recipe
    with contextlib.ExitStack() as stack:
        folder: RunFolder | None = None

        def open_folder() -> tuple[Path | None, int]:
            nonlocal folder
            folder, checkpoint, schedule_epochs = _open_folder(out, identity, stack, num_bytes=num_bytes, extend=extend)
            return checkpoint, schedule_epochs

        checkpoint, schedule_epochs = processes.from_rank_0(open_folder)
        state = read_checkpoint(checkpoint) if checkpoint else {}
        progress = Progress(**state.pop("progress", {}))
        ending = progress.ending(recipe, schedule_epochs)
        if progress.epoch == ending.num_epochs:
            more = "continue it with more --epochs (in Python with extend=True), or name another folder"
            if ending.stopped_after:
                more = (
                    f"stopped early after epoch {progress.epoch} of {recipe.epochs}; name another folder for a new run"
                )
            raise FinishedError(f"{out}: this run has finished; {more}", progress.history)
        run = Run(progress, state, schedule_epochs, folder)
        processes.from_rank_0(lambda: run.open_logs(stack, trackers, identity.to_json()))
        yield run
        run.complete()


def _open_folder(
    out: Path, identity: Identity, stack: contextlib.ExitStack, *, num_bytes: int, extend: bool
) -> tuple[RunFolder, Path | None, int]:
    """The folder, its newest checkpoint, and the number of epochs in the learning rate schedule."""
    recipe, before, facts = identity.recipe, read_facts(out), identity.to_json()
    epochs_before = before.get("recipe", {}).get("epochs", recipe.epochs) if extend else recipe.epochs
    if "schedule_epochs" in before:
        facts["schedule_epochs"] = before["schedule_epochs"]
    expected = {**facts, "recipe": {**facts["recipe"], "epochs": min(epochs_before, recipe.epochs)}}
    folder = stack.enter_context(contextlib.closing(RunFolder(out, expected, num_bytes=num_bytes)))
    checkpoint = folder.latest()
    if epochs_before < recipe.epochs:
        facts.setdefault("schedule_epochs", epochs_before)
        progress = Progress(**read_checkpoint(checkpoint)["progress"]) if checkpoint else Progress()
        _check_extension(recipe, out, progress, facts["schedule_epochs"])
        folder.write_facts(facts)
    return folder, checkpoint, facts.get("schedule_epochs", recipe.epochs)


def _check_extension(recipe: Recipe, out: Path, progress: Progress, schedule_epochs: int) -> None:
    num_done = progress.epoch
    if stopped_after := progress.ending(replace(recipe, epochs=schedule_epochs), schedule_epochs).stopped_after:
        raise ValueError(
            f"{out}: epochs are {recipe.epochs}, but the metric of this run has not improved for {recipe.patience} "
            f"epochs after epoch {stopped_after}, so it cannot be extended; choose another folder"
        )
    if num_done < schedule_epochs:
        raise ValueError(
            f"{out}: epochs are {recipe.epochs}, but this run has done {num_done} of the {schedule_epochs} epochs of "
            f"its learning rate schedule; finish it with --epochs {schedule_epochs}, then continue it with "
            f"--epochs {recipe.epochs}, or choose another folder"
        )
    if not recipe.optimizer.end_lr:
        raise ValueError(
            f"{out}: optimizer.end_lr is 0, and a finished run would continue at that learning rate, without effect; "
            "choose another folder for a longer run"
        )


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state that `RunFolder.save` wrote, on the CPU."""
    with zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:  # torch.load checks no checksum
            raise ValueError(f"{path}: {damaged} is damaged")
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    state = {RENAMED_KEYS.get(name, name): value for name, value in state.items()}
    return {**state, "progress": _rename_keys(state["progress"])}


def read_facts(folder: Path) -> dict[str, Any]:
    """The contents of run.json in a run folder; an empty dictionary if there is none."""
    path = folder / "run.json"
    if not path.exists():
        return {}
    with contextlib.suppress(ValueError):
        if isinstance(facts := json.loads(path.read_text(encoding="utf-8")), dict):
            return _rename_keys(facts)
    raise ValueError(f"{path}: damaged; choose another folder, or remove this one")


def _rename_keys(values: Any) -> Any:
    if isinstance(values, dict):
        return {RENAMED_KEYS.get(key, key): _rename_keys(value) for key, value in values.items()}
    return [_rename_keys(value) for value in values] if isinstance(values, list) else values


def _parse_line(line: bytes) -> Any:
    """The value of a line; None if it is damaged or has no end."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return _rename_keys(value) if line.endswith(b"\n") else None


def _check_same_run(path: Path, facts: Mapping[str, Any]) -> None:
    before = read_facts(path)
    differences = list(_differences(before, json.loads(json.dumps(facts))))
    if not differences:
        return
    hint = ""
    if "other data" in differences:
        hint = (
            "; classes, labels or file names of the images have changed, or an earlier version split them differently; "
            "to resume, restore removed files under their names (any readable image can replace a damaged one)"
        )
    elif differences == [f"recipe.epochs was {before['recipe']['epochs']}, is now {facts['recipe']['epochs']}"]:
        hint = "; extend=True (in the command line always on) continues a finished run for more epochs"
    raise ValueError(
        f"{path}: contains another run ({', '.join(differences)}){hint}; choose another folder, or remove this one"
    )


# Fields of run.json whose values, fingerprints, would not help the user.
FINGERPRINTS = {"data": "other data", "weights": "other weights", "teacher": "another teacher"}


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name in {**before, **now}:
        path, old, new = f"{prefix}{name}", before.get(name), now.get(name)
        if path == "recipe.data.max_unreadable":  # an earlier version compared it
            continue
        if path == "recipe.distill" and None in (old, new):  # a run with a teacher and one without
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{path}.")
        elif old != new:
            yield FINGERPRINTS.get(path) or f"{path} was {old}, is now {new}"


def _torch_save(state: dict[str, Any], path: Path) -> None:
    try:
        torch.save(state, path)
    except RuntimeError:  # has no reason such as a full disk; the errors of Python's own files have one
        buffer = io.BytesIO()
        torch.save(state, buffer)
        path.write_bytes(buffer.getbuffer())


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name `path` in every OSError. `write` and `fsync` name no file, and others may name a temporary file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def _lock(path: Path) -> IO[str] | None:
    """An open file, locked until it is closed or the process ends; None on systems without fcntl."""
    try:
        import fcntl
    except ImportError:
        return None
    file = path.open("w")
    with contextlib.ExitStack() as stack:
        stack.callback(file.close)
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not inherited by worker processes
        stack.pop_all()
    return file
