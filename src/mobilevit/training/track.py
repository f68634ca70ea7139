"""Experiment tracking: sends the logs of a run to TensorBoard, Weights & Biases, MLflow or Trackio.

The trackers receive what steps.jsonl and metrics.jsonl contain, after each checkpoint. A resumed run never computes
these lines again, and tracking.json counts the lines that were sent. So a tracked run continues without duplicates, and
a tracker that is added later receives the earlier lines, too.

The environment variables and settings of each library apply, such as WANDB_MODE=offline and MLFLOW_TRACKING_URI.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from mobilevit.defaults import TrackerName
from mobilevit.files import require, write_atomic
from mobilevit.messages import first_line

logger = logging.getLogger(__name__)
PROJECT = "mobilevit"  # the name of the project or experiment in the tracker
# The module that is imported, and the extra that installs it.
PACKAGES: dict[TrackerName, tuple[str, str]] = {
    "tensorboard": ("torch.utils.tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "mlflow": ("mlflow", "mlflow"),
    "trackio": ("trackio", "trackio"),
}
STEP_VALUES = ("loss", "lr", "images_per_second")


class Row(NamedTuple):
    """Values of a step by name. Steps count from 1."""

    step: int
    values: dict[str, float]


@dataclass
class Sent:
    """What a tracker has received: the number of lines of steps.jsonl and metrics.jsonl. `run_id` names its run."""

    run_id: str = ""
    steps: int = 0
    epochs: int = 0


class Tracker(Protocol):
    """One run in a tracker."""

    def start(self, folder: Path, config: Mapping[str, Any], sent: Sent) -> str:
        """Start or, with `sent.run_id`, continue a run; returns its ID."""
        ...

    def log(self, rows: Sequence[Row]) -> None:
        """Send rows by ascending step. They are stored when the call returns, or later by a thread of the library."""
        ...

    def finish(self, *, is_complete: bool) -> None:
        """End the run. A run that is not complete was interrupted, and may continue later."""
        ...


class TensorBoard:
    """The `Tracker` of TensorBoard: event files in the folder tensorboard/ of the run."""

    def start(self, folder: Path, config: Mapping[str, Any], sent: Sent) -> str:
        writer = import_package("tensorboard").SummaryWriter
        # Events that the process wrote before it was killed, but did not count, are hidden.
        self._writer = writer(str(folder / "tensorboard"), purge_step=sent.steps + 1)
        return "tensorboard"

    def log(self, rows: Sequence[Row]) -> None:
        for row in rows:
            for name, value in row.values.items():
                self._writer.add_scalar(name, value, row.step)
        self._writer.flush()

    def finish(self, *, is_complete: bool) -> None:
        self._writer.close()


class WeightsAndBiases:
    """The `Tracker` of Weights & Biases. Its files are in the folder wandb/ of the run."""

    def start(self, folder: Path, config: Mapping[str, Any], sent: Sent) -> str:
        run_id = sent.run_id or uuid.uuid4().hex[:12]
        self._run = import_package("wandb").init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=run_id,
            name=folder.resolve().name,
            dir=str(folder),
            config=dict(config),
            resume="allow",
            settings={"console": "off", "silent": True},
        )
        return run_id

    def log(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._run.log(row.values, step=row.step)

    def finish(self, *, is_complete: bool) -> None:
        self._run.finish(exit_code=0 if is_complete else 1)


class MLflow:
    """The `Tracker` of MLflow. Without MLFLOW_TRACKING_URI, MLflow writes mlflow.db in the working folder."""

    def start(self, folder: Path, config: Mapping[str, Any], sent: Sent) -> str:
        mlflow = import_package("mlflow")
        self._entities, self._client = mlflow.entities, mlflow.MlflowClient()
        if sent.run_id:
            self._client.update_run(sent.run_id, status="RUNNING")
            self._run_id = sent.run_id
            return sent.run_id
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self._run_id = self._client.create_run(experiment_id, run_name=folder.resolve().name).info.run_id
        params = [self._entities.Param(key, str(value)) for key, value in config.items()]
        self._client.log_batch(self._run_id, params=params)
        return self._run_id

    def log(self, rows: Sequence[Row]) -> None:
        now_ms = int(1000 * time.time())
        metrics = [
            self._entities.Metric(name, value, now_ms, row.step) for row in rows for name, value in row.values.items()
        ]
        for start in range(0, len(metrics), 1000):  # the largest batch that MLflow accepts
            self._client.log_batch(self._run_id, metrics=metrics[start : start + 1000])

    def finish(self, *, is_complete: bool) -> None:
        self._client.set_terminated(self._run_id, status="FINISHED" if is_complete else "KILLED")


class Trackio:
    """The `Tracker` of Trackio. Without TRACKIO_SPACE_ID, it stores runs on this machine, in TRACKIO_DIR."""

    def start(self, folder: Path, config: Mapping[str, Any], sent: Sent) -> str:
        # The name identifies a run, and several run folders may have the same name.
        name = sent.run_id or f"{folder.resolve().name}-{uuid.uuid4().hex[:8]}"
        with contextlib.redirect_stdout(sys.stderr):  # it prints
            self._run = import_package("trackio").init(
                os.environ.get("TRACKIO_PROJECT", PROJECT), name, config=dict(config), resume="allow", embed=False
            )
        return name

    def log(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._run.log(row.values, step=row.step)

    def finish(self, *, is_complete: bool) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._run.finish()


TRACKERS: dict[TrackerName, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
    "trackio": Trackio,
}


def import_package(name: TrackerName) -> Any:
    """The module of a tracker. Raises ValueError, with the command to install it, if it is missing."""
    module, extra = PACKAGES[name]
    return require(module, extra, f"tracking with {name}")


class Tracking:
    """Sends the logs in a run folder to trackers.

    Args:
        names: of the trackers.
        folder: of the run.
        config: the facts of run.json.

    Raises:
        ValueError: a tracker cannot start, or tracking.json is damaged.
    """

    def __init__(self, names: Sequence[TrackerName], folder: Path, config: Mapping[str, Any]):
        self._folder, self._file = folder, folder / "tracking.json"
        self._steps, self._epochs = _Log(folder / "steps.jsonl"), _Log(folder / "metrics.jsonl")
        self._sent = _read_sent(self._file)
        self._trackers: dict[TrackerName, Tracker] = {}
        self._is_complete = False
        flat = dict(_flatten(config))
        for name in dict.fromkeys(names):
            tracker, sent = TRACKERS[name](), self._sent.setdefault(name, Sent())
            try:
                sent.run_id = tracker.start(folder, flat, sent)
            except Exception as error:  # of any library
                self.close()
                raise ValueError(
                    f"--track {name}: cannot start ({first_line(error)}); fix it, or leave out this tracker"
                ) from error
            self._trackers[name] = tracker
        if self._trackers:
            self._write_sent()

    def send(self) -> None:
        """Send the lines that the logs have and the trackers have not. Errors are logged, and the lines sent again."""
        steps, epochs = self._steps, self._epochs
        steps.read()
        epochs.read()
        for name, tracker in self._trackers.items():
            sent = self._sent[name]
            try:
                tracker.log(_rows(steps.since(sent.steps), epochs.since(sent.epochs)))
            except Exception as error:  # such as a server that does not answer; training goes on
                logger.warning(f"tracking with {name} failed; the next checkpoint repeats it: {first_line(error)}")
            else:
                # A run that resumed from the older checkpoint repeats lines that were sent.
                sent.steps, sent.epochs = max(sent.steps, steps.num_lines), max(sent.epochs, epochs.num_lines)
        if self._trackers:
            self._write_sent()
            steps.forget(min(self._sent[name].steps for name in self._trackers))
            epochs.forget(min(self._sent[name].epochs for name in self._trackers))

    def complete(self) -> None:
        """Mark the run as finished, before `close`."""
        self._is_complete = True

    def close(self) -> None:
        """End the run in all trackers."""
        for name, tracker in self._trackers.items():
            try:
                tracker.finish(is_complete=self._is_complete)
            except Exception as error:
                logger.warning(f"tracking with {name} could not be ended: {first_line(error)}")

    def _write_sent(self) -> None:
        write_atomic(self._file, json.dumps({name: asdict(sent) for name, sent in self._sent.items()}, indent=2) + "\n")


class _Log:
    """The records of a JSON Lines file that grows, without those that all trackers have received."""

    def __init__(self, path: Path):
        self._path, self._offset = path, 0
        self._records: list[dict[str, float]] = []
        self.num_lines = 0

    def read(self) -> None:
        """Read the lines that were added since the last call."""
        with self._path.open("rb") as file:
            file.seek(self._offset)
            lines = file.readlines()
            self._offset = file.tell()
        self._records += map(json.loads, lines)
        self.num_lines += len(lines)

    def since(self, num_lines: int) -> list[dict[str, float]]:
        """The records after the first `num_lines`."""
        return self._records[max(0, num_lines - self._first) :]

    def forget(self, num_lines: int) -> None:
        """Remove the first `num_lines` records."""
        self._records = self.since(num_lines)

    @property
    def _first(self) -> int:
        return self.num_lines - len(self._records)


def _rows(steps: Sequence[Mapping[str, float]], epochs: Sequence[Mapping[str, float]]) -> list[Row]:
    rows: dict[int, dict[str, float]] = {}
    for record in steps:
        rows[int(record["step"])] = {f"train/{name}": record[name] for name in STEP_VALUES}
    for record in epochs:  # the last step of an epoch
        rows.setdefault(int(record["step"]), {}).update({f"epoch/{name}": value for name, value in record.items()})
    return [Row(step, rows[step]) for step in sorted(rows)]


def _read_sent(file: Path) -> dict[str, Sent]:
    if not file.exists():
        return {}
    try:
        return {name: Sent(**values) for name, values in json.loads(file.read_text(encoding="utf-8")).items()}
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f"{file}: damaged; remove it to track the run as a new one") from None


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, value in values.items():
        flat += _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return flat
