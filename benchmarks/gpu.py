"""Everything that a GPU can tell about this package, in nine minutes on one card.

    python benchmarks/gpu.py --out benchmarks/gpu_h100_202611
    python benchmarks/gpu.py --sections training attention    # some sections
    python benchmarks/gpu.py --device cpu --quick             # all sections, reduced, to test the script

Requirements: PyTorch 2.11 or newer with CUDA, a C++ compiler (for AOTInductor), and `pip install -e .[compare,demo]`:
timm to compare with, scikit-learn for the photographs that the loader reads. On a machine without a network, nothing
has to be installed if its Python has torch, torchvision, timm, scikit-learn, safetensors, huggingface_hub, rich,
jinja2, matplotlib, psutil and py-cpuinfo: `PYTHONPATH=src python benchmarks/gpu.py`. The script does not need tyro.

Each section (gpu_speed.py, gpu_runs.py) runs in its own process with a time budget, so that neither a crash nor a hang
nor a damaged CUDA context affects the next one. Inside a section, each item is protected as well. Tracebacks, and items
that are skipped because they need time or CUDA, are part of the results. OUT.json and OUT.md are written after each
section. --one-process runs the sections in this process.

Models are timed by `mobilevit.benchmark.timing.measure`: interleaved, each call waits for the device, and a ratio is
one of two times of the same round.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_runs import collectives_child, loader, runs, train_child
from gpu_speed import Context, attention, inference, multiscale, parity, peaks, training
from results import markdown_table

from mobilevit.benchmark.timing import machine
from mobilevit.device import choose_device

# Sections in order, and their budgets in seconds. A section may also use what the sections before it have left.
SECTIONS: dict[str, tuple[Callable[[Context], None], int]] = {
    "peaks": (peaks, 25),
    "parity": (parity, 50),
    "attention": (attention, 40),
    "runs": (runs, 75),
    "training": (training, 190),
    "loader": (loader, 35),  # uses the results of training
    "multiscale": (multiscale, 35),
    "inference": (inference, 90),
}
QUICK_SECONDS = 3600
GRACE_SECONDS = 8  # for the item that a section computes at its deadline; then the process is killed


def run_section(name: str, options: argparse.Namespace, file: Path, deadline: float) -> str:
    """Run a section in its own process until `deadline`. Returns "" or the reason why it did not finish."""
    command = [sys.executable, __file__, "--device", options.device, "--child", name, str(file), str(deadline)]
    command += ["--quick"] if options.quick else []
    # cuBLAS is deterministic only with this setting.
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if name == "runs" else None
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(command, stderr=errors, env=environment, start_new_session=True)
        try:
            code = child.wait(deadline + GRACE_SECONDS - time.monotonic())
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, 9)  # with its workers
            child.wait()
            return "stopped at the end of its time"
        errors.seek(0)
        return "" if code == 0 else f"exit code {code}\n{errors.read()[-4000:]}"


def in_this_process(name: str, context: Context) -> str:
    """Run a section. Returns "" or the traceback of an exception outside its items."""
    finished = False
    with context.item(name):
        SECTIONS[name][0](context)
        finished = True
    return "" if finished else "failed"


def read_records(file: Path) -> dict[str, list[Any]]:
    """The rows, notes and errors that a section has written; a last line may be incomplete."""
    records: dict[str, list[Any]] = {"row": [], "note": [], "error": []}
    for line in file.read_text().splitlines() if file.exists() else []:
        with contextlib.suppress(ValueError):
            ((kind, value),) = json.loads(line).items()
            records[kind].append(value)
    return {"rows": records["row"], "notes": records["note"], "errors": records["error"]}


def write_report(out: Path, facts: dict[str, Any], sections: dict[str, dict[str, Any]]) -> None:
    """Write OUT.json and OUT.md with the sections so far."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_name(out.name + ".json").write_text(json.dumps({"benchmark": "gpu", **facts, "sections": sections}) + "\n")
    lines = [f"# GPU: {facts['card']}", "", f"{facts['description']}", ""]
    for name, section in sections.items():
        lines += [f"## {name}: {section['status'].partition(chr(10))[0]}, {section['seconds']:.0f} s", ""]
        doc = SECTIONS[name][0].__doc__ or ""
        lines += [doc.partition("\n")[0], ""]
        columns = list(dict.fromkeys(key for row in section["rows"] for key in row))
        if columns:
            cells = [[format_cell(row.get(column)) for column in columns] for row in section["rows"]]
            lines += [*markdown_table([column.replace("_", " ") for column in columns], cells), ""]
        lines += [f"- {note}" for note in section["notes"]]
        for error in [*section["errors"], *([section["status"]] if "\n" in section["status"] else [])]:
            lines += ["", "```", error.strip(), "```"]
        lines.append("")
    out.with_name(out.name + ".md").write_text("\n".join(lines))


def format_cell(value: Any) -> str:
    if value is None:
        return ""
    return (
        f"{value:.4g}"
        if isinstance(value, float) and abs(value) < 1e4
        else f"{value:,}"
        if isinstance(value, float)
        else str(value)
    )


def main(options: argparse.Namespace) -> None:
    """Run the sections and write the results after each of them."""
    device = torch.device(choose_device(options.device))
    card = torch.cuda.get_device_name() if device.type == "cuda" else "none, the sections ran on a CPU"
    setting = machine(torch.get_num_threads())
    facts = {**vars(setting), "card": card, "quick": options.quick, "description": setting.describe()}
    out = options.out or Path(f"gpu_{card.split(',')[0].replace(' ', '_').lower()}_{datetime.date.today():%Y%m%d}")
    started = time.monotonic()
    deadline, end = started, math.inf if options.quick else started + 60 * options.minutes - GRACE_SECONDS
    sections: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.sections:
            file, started = Path(folder) / f"{name}.jsonl", time.monotonic()
            deadline = min(deadline + (QUICK_SECONDS if options.quick else SECTIONS[name][1]), end)
            previous = {key: section["rows"] for key, section in sections.items()}
            print(f"--- {name}, at most {deadline - started:.0f} s", flush=True)
            if options.one_process:
                problem = in_this_process(name, Context(device, options.quick, deadline, file, previous))
            elif deadline - started < 10:
                problem = "skipped, no time left"
            else:
                (Path(folder) / "previous.json").write_text(json.dumps(previous))
                problem = run_section(name, options, file, deadline)
            records = read_records(file)
            status = problem or ("finished" if not records["errors"] else f"{len(records['errors'])} items failed")
            sections[name] = {"status": status, "seconds": round(time.monotonic() - started, 1), **records}
            write_report(out, facts, sections)
    print(f"{out}.json, {out}.md: " + "; ".join(f"{n} {s['status'].splitlines()[0]}" for n, s in sections.items()))


def child(device: str, is_quick: bool, name: str, file: str, deadline: str) -> None:
    """The process of one section."""
    signal.alarm(max(1, math.ceil(float(deadline) + GRACE_SECONDS - time.monotonic())) + 1)  # if the parent was killed
    previous = json.loads((Path(file).parent / "previous.json").read_text())
    context = Context(torch.device(choose_device(device)), is_quick, float(deadline), Path(file), previous)
    in_this_process(name, context)


def task(name: str, *arguments: str) -> None:
    """The process of a run, or of a process group; see gpu_runs.py."""
    if name == "collectives":
        collectives_child(*arguments)
    else:
        torch.use_deterministic_algorithms(name == "deterministic", warn_only=True)
        data, out, device, precision, *quick = arguments
        train_child(data, out, device, precision, bool(quick))  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with --quick")
    parser.add_argument("--quick", action="store_true", help="reduced form, without a time limit")
    parser.add_argument("--one-process", action="store_true", help="run all sections in this process")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all sections together")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--task", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.device, given.quick, *given.child)
    elif given.task:
        task(*given.task)
    else:
        main(given)
