"""Calls of the command line in this process."""

import re
import shlex
from pathlib import Path

import pytest

from mobilevit.cli import main

# Class names of the test weights. They look like the markup of a terminal library.
CLASS_NAMES = ("[bold]ant[/bold]", ":bee:", "cat [/]")


def run(*args: str) -> int:
    """The exit code of a command, such as run("predict a.safetensors photos") or run("predict", weights, "photos")."""
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(args[0]) if len(args) == 1 else list(args))
    assert isinstance(stop.value.code, int)
    return stop.value.code


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The error message of a command with exit code 2: one line on standard error, and nothing else."""
    capsys.readouterr()
    assert run(*args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"mobilevit: \S.*\n", err), err
    return err


def check_refused(capsys: pytest.CaptureFixture[str], command: str, facts: str) -> None:
    """The error message of `command` contains each of the words `facts`: the file or option, the value, the fix."""
    message = refused(capsys, command)
    assert not [fact for fact in facts.split() if fact not in message], message


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
