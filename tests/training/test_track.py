"""Experiment tracking: what the libraries read back of a run that was interrupted and resumed."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest

from mobilevit.defaults import TrackerName
from mobilevit.training import track
from mobilevit.training.loop import TrainingResult, train
from mobilevit.training.run import Run
from mobilevit.training.track import PACKAGES, TRACKERS, Row, Sent, Tracking
from small_runs import RECIPE, lines

# Warnings of the libraries about themselves.
pytestmark = [
    pytest.mark.filterwarnings("default::DeprecationWarning"),
    pytest.mark.filterwarnings("default::UserWarning"),
    pytest.mark.filterwarnings("default::ResourceWarning"),
    pytest.mark.filterwarnings("default::pytest.PytestUnraisableExceptionWarning"),
]
Values = dict[str, list[tuple[int, float]]]  # (step, value) by name


def read_tensorboard(out: Path) -> Values:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard")).Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def read_wandb(out: Path) -> Values:
    """The records of the offline files. The format is that of LevelDB's log, with one protobuf message per record."""
    from wandb.proto import wandb_internal_pb2  # pyright: ignore[reportMissingImports]

    values: Values = {}
    run_ids = set()
    for file in sorted((out / "wandb").glob("offline-run-*/run-*.wandb")):
        run_ids.add(file.stem.removeprefix("run-"))
        content, record = file.read_bytes(), b""
        position = 7  # after the header of the file
        while position + 7 <= len(content):
            if 32768 - position % 32768 < 7:  # padding at the end of a block
                position += 32768 - position % 32768
                continue
            length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
            record += content[position + 7 : position + 7 + length]
            position += 7 + length
            if kind in (1, 4):  # a whole record, or its last fragment
                message = wandb_internal_pb2.Record.FromString(record)  # pyright: ignore[reportAttributeAccessIssue]
                record = b""
                row = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in message.history.item
                }
                for name, value in row.items():
                    if not name.startswith("_"):
                        values.setdefault(name, []).append((row["_step"], value))
    assert len(run_ids) == 1  # both processes wrote to one run
    return values


def read_mlflow(out: Path) -> Values:
    import mlflow

    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("mobilevit")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == (out.name, "FINISHED")
    assert run.data.params["recipe.optimizer.lr"] == str(RECIPE.optimizer.lr)
    return {
        name: [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }


def read_trackio(out: Path) -> Values:
    import trackio  # pyright: ignore[reportMissingImports]
    from trackio.sqlite_storage import SQLiteStorage  # pyright: ignore[reportMissingImports]

    (run,) = trackio.Api().runs("mobilevit")
    assert run.name.startswith(f"{out.name}-")
    values: Values = {}
    for row in SQLiteStorage.get_logs("mobilevit", run.name):
        for name, value in row.items():
            if "/" in name:
                values.setdefault(name, []).append((row["step"], value))
    return values


READERS: dict[TrackerName, Callable[[Path], Values]] = {
    "tensorboard": read_tensorboard,
    "wandb": read_wandb,
    "mlflow": read_mlflow,
    "trackio": read_trackio,
}


def interrupted(data: Path, out: Path, trackers: Sequence[TrackerName], epoch: int = 2) -> TrainingResult:
    """A run that an error stops at the end of `epoch`, before its checkpoint, and that then resumes."""
    with pytest.MonkeyPatch.context() as change:
        log_epoch = Run.log_epoch

        def log(run: Run, record: dict[str, float]) -> None:
            log_epoch(run, record)
            if record["epoch"] == epoch:
                raise InterruptedError("power failure")

        change.setattr(Run, "log_epoch", log)
        with pytest.raises(InterruptedError, match="power failure"):
            train(RECIPE, data, out, trackers=trackers)
    return train(RECIPE, data, out, trackers=trackers)


@pytest.mark.parametrize("name", get_args(TrackerName))
def test_a_resumed_run_read_back(name: TrackerName, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when the package is imported
    pytest.importorskip(PACKAGES[name][1])
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    run = interrupted(data, out, [name])
    found = READERS[name](out)
    for _ in range(50):  # the background process of wandb writes its last records after the run has ended
        if len(found["train/loss"]) >= 8:
            break
        time.sleep(0.2)
        found = READERS[name](out)
    for value in ("loss", "lr", "images_per_second"):
        expected = [(line["step"], pytest.approx(line[value], rel=1e-6)) for line in lines(out / "steps.jsonl")]
        assert sorted(found[f"train/{value}"]) == expected
    assert len(expected) == 8
    for value in ("val_top1", "val_loss", "raw_loss", "train_loss"):
        expected = [(epoch["step"], pytest.approx(epoch[value], rel=1e-6)) for epoch in run.epochs]
        assert sorted(found[f"epoch/{value}"]) == expected
    assert json.loads((out / "tracking.json").read_text())[name] | {"run_id": ""} == vars(Sent("", 8, 2))


# ---------------------------------------------------------------------------------------------------------------------
# With a tracker that records its calls


class Recorder:
    """A tracker in memory; fails as often as `failures` says."""

    calls: list[Any] = []
    failures = 0

    def start(self, folder: Path, config: Mapping[str, Any], sent: Sent) -> str:
        assert config["recipe.batch_size"] == 3
        self.calls.append(("start", sent.run_id))
        return "id"

    def log(self, rows: Sequence[Row]) -> None:
        if Recorder.failures:
            Recorder.failures -= 1
            raise ConnectionError("no server")
        self.calls.extend((row.step, "epoch/val_top1" in row.values) for row in rows)

    def finish(self, *, is_complete: bool) -> None:
        self.calls.append(("finish", is_complete))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setitem(TRACKERS, "wandb", Recorder)
    monkeypatch.setattr(track, "PACKAGES", {**PACKAGES, "wandb": ("json", "wandb")})
    monkeypatch.setattr(Recorder, "calls", [])
    monkeypatch.setattr(Recorder, "failures", 0)
    return Recorder.calls


def write_logs(folder: Path, num_steps: int, num_epochs: int) -> None:
    values = {"loss": 1.0, "lr": 0.1, "images_per_second": 9.0}
    steps = [json.dumps({"step": step, **values}) for step in range(1, num_steps + 1)]
    epochs = [json.dumps({"step": 4 * epoch, "val_top1": 5.0}) for epoch in range(1, num_epochs + 1)]
    (folder / "steps.jsonl").write_text("".join(f"{line}\n" for line in steps))
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in epochs))


def open_tracking(folder: Path) -> Tracking:
    return Tracking(["wandb"], folder, {"recipe": {"batch_size": 3}})


def test_rows_are_sent_once(calls: list[Any], tmp_path: Path):
    write_logs(tmp_path, 3, 0)
    tracking = open_tracking(tmp_path)
    tracking.send()
    assert calls == [("start", ""), (1, False), (2, False), (3, False)]
    write_logs(tmp_path, 4, 0)  # a checkpoint after the last step of the epoch, before its evaluation
    tracking.send()
    write_logs(tmp_path, 4, 1)
    tracking.send()
    tracking.close()
    assert calls[4:] == [(4, False), (4, True), ("finish", False)]
    calls.clear()
    write_logs(tmp_path, 2, 0)  # resumed from the older checkpoint, because the newest one is damaged
    tracking = open_tracking(tmp_path)
    tracking.send()
    write_logs(tmp_path, 5, 1)
    tracking.send()
    tracking.complete()
    tracking.close()
    assert calls == [("start", "id"), (5, False), ("finish", True)]


def test_errors_are_logged_and_the_rows_repeated(calls: list[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture):
    write_logs(tmp_path, 2, 0)
    tracking = open_tracking(tmp_path)
    Recorder.failures = 1
    tracking.send()
    assert "tracking with wandb failed" in caplog.text
    assert "no server" in caplog.text
    write_logs(tmp_path, 4, 1)
    tracking.send()
    assert calls == [("start", ""), (1, False), (2, False), (3, False), (4, True)]


def test_tracking_can_start_later(calls: list[Any], tmp_path: Path):
    write_logs(tmp_path, 6, 1)  # of an untracked process
    tracking = open_tracking(tmp_path)
    tracking.send()
    assert calls == [("start", ""), (1, False), (2, False), (3, False), (4, True), (5, False), (6, False)]
    tracking.close()


def test_a_tracker_that_cannot_start(calls: list[Any], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def start(*_: Any) -> str:
        raise ConnectionError("no server at localhost")

    monkeypatch.setattr(Recorder, "start", start)
    with pytest.raises(ValueError, match=r"--track wandb: cannot start \(no server at localhost\); .*leave out"):
        train(RECIPE, data, tmp_path, trackers=["wandb"])


@pytest.mark.parametrize("name", get_args(TrackerName))
def test_a_missing_package_is_an_error_before_training(
    name: TrackerName, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=re.escape(f"pip install 'mobilevit[{name}]'")):
        train(RECIPE, data, tmp_path / "run", trackers=[name])
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker_and_a_damaged_file(data: Path, tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"trackers has 'neptune'; the trackers are tensorboard, wandb, mlflow, trackio"
    ):
        train(RECIPE, data, tmp_path, trackers=["neptune"])  # pyright: ignore[reportArgumentType]
    (tmp_path / "tracking.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"tracking\.json: damaged; remove it"):
        open_tracking(tmp_path)
