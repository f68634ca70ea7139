"""Sums, gathered values and errors of one process and of two."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mobilevit.images import ImageError
from mobilevit.training.distributed import Processes, join_processes

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be forked")
pytestmark = pytest.mark.filterwarnings("ignore:This process .*is multi-threaded:DeprecationWarning")


def fail(error: Exception) -> None:
    raise error


def do_all(processes: Processes) -> dict[str, Any]:
    """Results of every method, as plain values."""
    rank = processes.rank
    called: list[int] = []

    def raised_by(error: Exception) -> list[str]:
        with pytest.raises(type(error)) as caught:
            processes.from_rank_0(lambda: fail(error) if rank == 0 else called.append(rank))
        return [str(caught.value), str(getattr(caught.value, "filename", None))]

    tensors = [torch.arange(6.0).reshape(2, 3) + rank, torch.tensor(10.0**rank), torch.zeros(0)]
    processes.sum(tensors)
    return {
        "rank": rank,
        "world_size": processes.world_size,
        "sum": [tensor.tolist() for tensor in tensors],
        "gather": processes.gather({"rank": rank, "path": str(Path("a") / str(rank))}),
        "first": str(processes.from_rank_0(lambda: Path("of") / str(rank))),
        "none": processes.from_rank_0(lambda: None),
        "errors": [
            raised_by(ValueError("the loss is nan")),
            raised_by(ImageError("a.png: damaged")),
            raised_by(OSError(28, "No space left on device", "run/x")),
        ],
        "called": called,
        "after": processes.gather(rank),
    }


ERRORS = [
    ["the loss is nan", "None"],
    ["a.png: damaged", "None"],
    ["[Errno 28] No space left on device: 'run/x'", "run/x"],
]


def test_one_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join_processes("cpu") as processes:
        assert not dist.is_initialized()
        assert processes == Processes(0, 1, torch.device("cpu"))
        assert do_all(processes) == {
            "rank": 0,
            "world_size": 1,
            "sum": [[[0, 1, 2], [3, 4, 5]], 1, []],
            "gather": [{"rank": 0, "path": "a/0"}],
            "first": "of/0",
            "none": None,
            "errors": ERRORS,
            "called": [],
            "after": [0],
        }


def in_processes(world_size: int, do: Callable[[Processes], Any], folder: Path) -> list[Any]:
    """The results of `do` in `world_size` forked processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sys.stdout.flush()
    children = []
    for rank in range(world_size):
        child = os.fork()
        if not child:
            code = 1
            try:
                signal.alarm(60)  # if one fails, the others wait for it
                torch.set_num_threads(1)
                where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": world_size}
                os.environ.update({name: str(value) for name, value in where.items()})
                with join_processes("cpu") as processes:
                    found = do(processes)
                assert not dist.is_initialized()
                (folder / str(rank)).write_text(json.dumps(found))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * world_size
    return [json.loads((folder / str(rank)).read_text()) for rank in range(world_size)]


@needs_fork
def test_two_processes(tmp_path: Path):
    found = in_processes(2, do_all, tmp_path)
    for rank in range(2):
        assert found[rank] == {
            "rank": rank,
            "world_size": 2,
            "sum": [[[1, 3, 5], [7, 9, 11]], 11, []],
            "gather": [{"rank": 0, "path": "a/0"}, {"rank": 1, "path": "a/1"}],
            "first": "of/0",
            "none": None,
            "errors": ERRORS,  # in both processes
            "called": [],
            "after": [0, 1],
        }
