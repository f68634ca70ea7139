"""The command line as a process."""

import json
import re
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(sys.executable).with_name("mobilevit")


def test_program(here: Path):
    done = subprocess.run(
        [PROGRAM, "predict", "classifier.safetensors", "photos", "--json", "--top-k", "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert len([json.loads(line) for line in done.stdout.splitlines()]) == 4
    assert re.fullmatch(r"mobilevit: photos/c\.png: .+\n", done.stderr)


def test_a_closed_pipe(here: Path):
    for i in range(300):  # more than a pipe holds
        (here / f"{i}{'x' * 200}.png").write_bytes((here / "photos/c.png").read_bytes())
    with subprocess.Popen(
        [PROGRAM, "predict", "classifier.safetensors", *sorted(p.name for p in here.glob("*.png")), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as program:
        assert program.stdout
        assert program.stderr
        assert json.loads(program.stdout.readline())["error"]
        program.stdout.close()
        assert [line for line in program.stderr if not line.startswith("mobilevit: ")] == []
    assert program.returncode == 0
