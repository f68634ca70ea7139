"""The run folder: identity, rejected folders, full disks, killed processes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import stat
import tempfile
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mobilevit.files import write_atomic
from mobilevit.training.run import FILES, JsonLines, RunFolder, read_checkpoint

FACTS = {"recipe": {"epochs": 3, "optimizer": {"lr": 1e-3, "freeze": "nothing"}}, "data": "1a2b", "weights": "random"}
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be forked and killed")
pytestmark = pytest.mark.filterwarnings("ignore:This process .*is multi-threaded:DeprecationWarning")


OPENED: list[RunFolder] = []


def open_folder(path: Path, facts: dict[str, Any] = FACTS, num_bytes: int = 1000) -> RunFolder:
    folder = RunFolder(path, facts, num_bytes=num_bytes)
    OPENED.append(folder)
    return folder


@pytest.fixture(autouse=True)
def close() -> Iterator[None]:
    yield
    while OPENED:
        OPENED.pop().close()


def state(step: int) -> dict[str, Any]:
    return {"progress": {"step": step}, "weights": torch.full((1000,), float(step))}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def in_child(do: Callable[[], object]) -> int:
    """The PID of a forked process that calls `do` and writes its error to standard error."""
    child = os.fork()
    if not child:
        code = 1
        try:
            do()
            code = 0
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
        finally:
            os._exit(code)
    return child


def end(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# ---------------------------------------------------------------------------------------------------------------------
# Identity


def test_a_run_with_the_same_facts_resumes(tmp_path: Path):
    folder = open_folder(tmp_path / "new" / "run")
    assert json.loads((tmp_path / "new/run/run.json").read_text()) == FACTS
    assert folder.latest() is None
    folder.save(state(7), 7)
    folder.close()
    again = open_folder(tmp_path / "new" / "run", json.loads(json.dumps(FACTS)))
    latest = again.latest()
    assert latest is not None
    assert read_checkpoint(latest)["progress"]["step"] == 7
    assert torch.equal(read_checkpoint(latest)["weights"], torch.full((1000,), 7.0))


def test_another_run_is_rejected_with_both_values(tmp_path: Path):
    open_folder(tmp_path).close()
    other = {"recipe": {"epochs": 4, "optimizer": {"lr": 1e-3, "freeze": "stem"}}, "data": "1a2b", "seed": [1, 2]}
    with pytest.raises(ValueError, match=f"^{tmp_path}: contains another run") as caught:
        open_folder(tmp_path, other)
    for difference in (
        "recipe.epochs was 3, is now 4",
        "recipe.optimizer.freeze was nothing, is now stem",
        "other weights",
        "seed was None, is now [1, 2]",
    ):
        assert difference in str(caught.value)
    assert json.loads((tmp_path / "run.json").read_text()) == FACTS


def test_a_run_without_the_teacher(tmp_path: Path):
    taught = {**FACTS, "recipe": {**FACTS["recipe"], "distill": {"temperature": 2.0}}, "teacher": "1a2b"}
    open_folder(tmp_path, taught).close()
    with pytest.raises(ValueError, match=r"contains another run \(another teacher\)"):
        open_folder(tmp_path)


def test_tuples_equal_lists_in_a_file(tmp_path: Path):
    open_folder(tmp_path, {"sizes": (32, 64)}).close()
    open_folder(tmp_path, {"sizes": (32, 64)}).close()


@pytest.mark.parametrize("text", ["", '{"recipe": ', "[]", "3", "\0" * 50, "\udcff"])
def test_a_damaged_run_json(tmp_path: Path, text: str):
    (tmp_path / "run.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"^{tmp_path}/run.json: damaged; choose another folder, or remove this one$"):
        open_folder(tmp_path)
    assert names(tmp_path) == {"run.json"}


@pytest.mark.parametrize("name", [*FILES[1:], "checkpoints/000000003.pt"])
def test_files_without_a_run_json_are_not_touched(tmp_path: Path, name: str):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("precious")
    with pytest.raises(ValueError, match=f"^{tmp_path}: contains files of a run, but no run.json"):
        open_folder(tmp_path)
    assert names(tmp_path) == {name.partition("/")[0]}
    assert (tmp_path / name).read_text() == "precious"


def test_other_files_are_not_touched(tmp_path: Path):
    others = ["notes.txt", ".tmux.conf.old", ".model.notes", "checkpoints.txt"]
    for name in others:
        (tmp_path / name).write_text("precious")
    open_folder(tmp_path).close()
    assert [(tmp_path / name).read_text() for name in others] == ["precious"] * 4


def test_killed_before_run_json_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def die(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as change:
        change.setattr(Path, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            open_folder(tmp_path)
    open_folder(tmp_path)
    assert names(tmp_path) == {"run.json", "checkpoints", ".lock"}


def test_temporary_files_of_a_killed_process_are_removed(tmp_path: Path):
    open_folder(tmp_path).close()
    for name in (".model.safetensors.ab1_", ".run.json.x", ".steps.jsonl.y", "checkpoints/.000000007.pt.z"):
        (tmp_path / name).write_text("half")
    open_folder(tmp_path)
    assert names(tmp_path) == {"run.json", "checkpoints", ".lock"}
    assert names(tmp_path / "checkpoints") == set()


# ---------------------------------------------------------------------------------------------------------------------
# Errors before the first step


def test_a_folder_that_cannot_be_created(tmp_path: Path):
    (tmp_path / "file").write_text("precious")
    for name in ("file", "file/run"):
        with pytest.raises(ValueError, match=rf"^{tmp_path}/{name}: cannot be written to \(not a directory\)$"):
            open_folder(tmp_path / name)
    assert names(tmp_path) == {"file"}
    assert (tmp_path / "file").read_text() == "precious"


@needs_fork
def test_a_read_only_folder():
    with tempfile.TemporaryDirectory() as name:  # readable by other users, unlike pytest's
        folder = Path(name)
        folder.chmod(0o555)

        def try_it() -> None:
            if os.geteuid() == 0:
                os.setuid(65534)  # root may write anywhere
            with pytest.raises(ValueError, match=rf"^{folder}: cannot be written to \(permission denied\)$"):
                open_folder(folder)

        assert end(in_child(try_it)) == 0
        assert names(folder) == set()


Usage = namedtuple("Usage", "total used free")


def with_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, free))


def test_too_little_disk_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with_free(monkeypatch, 399_000_000)  # three checkpoints, and three weight files of a third each
    with pytest.raises(ValueError, match=f"^{tmp_path}: has 399 MB left, checkpoints need 400 MB$"):
        open_folder(tmp_path, num_bytes=100_000_000)
    assert not (tmp_path / "run.json").exists()
    with_free(monkeypatch, 400_000_000)
    open_folder(tmp_path, num_bytes=100_000_000)  # a second attempt succeeds


def test_existing_files_count_as_available_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = open_folder(tmp_path)
    for step in (1, 2):
        folder.save(state(step), step)
    (tmp_path / "model.safetensors").write_bytes(bytes(500))
    folder.close()
    there = 500 + sum(file.stat().st_size for file in (tmp_path / "checkpoints").iterdir())
    with_free(monkeypatch, 400_000_000 - there)
    open_folder(tmp_path, num_bytes=100_000_000).close()
    with_free(monkeypatch, 400_000_000 - there - 1)
    with pytest.raises(ValueError, match="MB left"):
        open_folder(tmp_path, num_bytes=100_000_000)


@needs_fork
def test_the_lock_ends_with_its_process_even_if_workers_live(tmp_path: Path):
    ready, say_ready = os.pipe()

    def hold() -> None:
        folder = open_folder(tmp_path)
        worker = in_child(lambda: time.sleep(60))
        os.write(say_ready, worker.to_bytes(8, "big"))
        time.sleep(60)
        folder.close()

    holder = in_child(hold)
    worker = int.from_bytes(os.read(ready, 8), "big")
    try:
        with pytest.raises(ValueError, match=f"^{tmp_path}: another process is training in this folder"):
            open_folder(tmp_path)
        os.kill(holder, signal.SIGKILL)
        assert end(holder) == -signal.SIGKILL
        os.kill(worker, 0)  # is alive
        open_folder(tmp_path).close()
    finally:
        os.kill(worker, signal.SIGKILL)


@needs_fork
def test_the_lock_is_released_on_close_and_on_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    open_folder(tmp_path).close()
    with monkeypatch.context() as change:
        with_free(change, 0)
        with pytest.raises(ValueError, match="MB left") as refused:
            open_folder(tmp_path)
    assert end(in_child(lambda: open_folder(tmp_path))) == 0
    del refused  # referenced the folder and its lock


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def test_two_checkpoints_are_stored(tmp_path: Path):
    folder = open_folder(tmp_path)
    for step in (3, 10, 11, 250):
        folder.save(state(step), step)
    assert names(folder.checkpoints) == {"000000011.pt", "000000250.pt"}
    folder.save(state(250), 250)  # the same step once more
    assert names(folder.checkpoints) == {"000000011.pt", "000000250.pt"}
    assert folder.latest() == folder.checkpoints / "000000250.pt"


def cut_short(content: bytes) -> bytes:
    return content[:-100]


def flip_a_bit(content: bytes) -> bytes:
    return content[:2000] + bytes([content[2000] ^ 1]) + content[2001:]


@pytest.mark.parametrize("damage", [cut_short, flip_a_bit, lambda content: b"", lambda content: bytes(len(content))])
def test_a_damaged_checkpoint_is_skipped(
    tmp_path: Path, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
):
    folder = open_folder(tmp_path)
    for step in (10, 20):
        folder.save(state(step), step)
    newest = folder.checkpoints / "000000020.pt"
    newest.write_bytes(damage(newest.read_bytes()))
    assert folder.latest() == folder.checkpoints / "000000010.pt"
    (message,) = caplog.messages
    assert str(newest) in message
    assert "\n" not in message


def test_damaged_checkpoints_are_deleted_first(tmp_path: Path):
    folder = open_folder(tmp_path)
    for step in (10, 20):
        folder.save(state(step), step)
    for file in folder.checkpoints.iterdir():
        file.write_bytes(b"")
    assert folder.latest() is None
    for step in (3, 6):  # the run starts again
        folder.save(state(step), step)
    assert names(folder.checkpoints) == {"000000003.pt", "000000006.pt"}
    assert folder.latest() == folder.checkpoints / "000000006.pt"


def test_a_full_disk_preserves_the_previous_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = open_folder(tmp_path)
    for step in (1, 2):
        folder.save(state(step), step)

    def fail(state: object, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space left on device") as caught:
        folder.save(state(3), 3)
    assert caught.value.filename == str(folder.checkpoints / "000000003.pt")
    assert caught.value.errno == errno.ENOSPC
    assert names(folder.checkpoints) == {"000000001.pt", "000000002.pt"}
    latest = folder.latest()
    assert latest is not None
    assert read_checkpoint(latest)["progress"]["step"] == 2


@needs_fork
@pytest.mark.parametrize("limit", [0, 100, 2000])
def test_the_reason_of_a_failed_write_is_reported(tmp_path: Path, limit: int, capfd: pytest.CaptureFixture[str]):
    """The error of torch.save does not contain the reason."""
    import resource

    folder = open_folder(tmp_path)
    folder.save(state(1), 1)

    def save_beyond() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(OSError, match="File too large") as caught:
            folder.save(state(2), 2)
        assert caught.value.errno == errno.EFBIG
        assert caught.value.filename == str(folder.checkpoints / "000000002.pt")

    assert end(in_child(save_beyond)) == 0, capfd.readouterr().err
    assert names(folder.checkpoints) == {"000000001.pt"}
    assert folder.latest() == folder.checkpoints / "000000001.pt"


def test_other_errors_of_torch_are_not_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(state: object, file: object) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match="device-side"):
        open_folder(tmp_path).save(state(1), 1)
    assert names(tmp_path / "checkpoints") == set()


def test_files_and_folders_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced: list[tuple[bool, bool]] = []
    sync = os.fsync

    def record(handle: int) -> None:
        synced.append((stat.S_ISDIR(os.fstat(handle).st_mode), (tmp_path / "x").exists()))
        sync(handle)

    monkeypatch.setattr(os, "fsync", record)
    write_atomic(tmp_path / "x", "content")
    # The content before the rename, the folder after it.
    assert synced == [(False, False), (True, True)]
    synced.clear()
    folder = open_folder(tmp_path)
    synced.clear()
    folder.save(state(1), 1)
    assert [is_folder for is_folder, _ in synced] == [False, True]


# ---------------------------------------------------------------------------------------------------------------------
# Logs


def content(lines: JsonLines) -> list[dict[str, int]]:
    lines.close()
    return [json.loads(line) for line in lines.path.read_text().splitlines()]


def three_lines(path: Path) -> Path:
    lines = JsonLines(path, 0)
    for i in range(3):
        lines.add({"step": i})
    assert content(lines) == [{"step": 0}, {"step": 1}, {"step": 2}]
    return path


@pytest.mark.parametrize("num_lines", [0, 1, 2, 3])
def test_a_log_is_truncated_and_appended_to(tmp_path: Path, num_lines: int):
    lines = JsonLines(three_lines(tmp_path / "x.jsonl"), num_lines)
    lines.add({"step": 9})
    assert content(lines) == [*({"step": i} for i in range(num_lines)), {"step": 9}]


def test_an_incomplete_last_line_is_removed(tmp_path: Path):
    path = three_lines(tmp_path / "x.jsonl")
    with path.open("a") as file:
        file.write('{"step": 3')
    lines = JsonLines(path, 3)
    lines.add({"step": 9})
    assert content(lines)[2:] == [{"step": 2}, {"step": 9}]


@pytest.mark.parametrize("torn", ['{"step": 3', '{"step": 3}', '{"st\n', "\0\0\0\n", "\udcff\n"])
def test_missing_lines(tmp_path: Path, torn: str):
    path = three_lines(tmp_path / "x.jsonl")
    before = path.read_bytes() + torn.encode(errors="surrogateescape")
    path.write_bytes(before)
    with pytest.raises(ValueError, match=rf"^{path}: has 3 intact lines, but the checkpoint needs 4; "):
        JsonLines(path, 4)
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="has 0 intact lines, but the checkpoint needs 1"):
        JsonLines(tmp_path / "missing.jsonl", 1)
    assert not (tmp_path / "missing.jsonl").exists()


def test_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lines = JsonLines(tmp_path / "x.jsonl", 0)
    lines.add({"step": 1})
    at_sync: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda handle: at_sync.append(lines.path.read_text()))
    lines.sync()
    assert at_sync == ['{"step": 1}\n']
    lines.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_reported_with_the_file_name(tmp_path: Path):
    lines = JsonLines(tmp_path / "x.jsonl", 0)
    lines._file.close()
    lines._file = Path("/dev/full").open("a")  # noqa: SIM115
    lines.add({"step": 1})
    for write in (lines.sync, lines.close):  # `close` again
        with pytest.raises(OSError, match="No space left on device") as caught:
            write()
        assert caught.value.filename == str(lines.path)
