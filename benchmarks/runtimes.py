"""Every runtime that is installed, against the same network by timm and transformers, and against MobileNetv2.

    python benchmarks/runtimes.py --out benchmarks/runtimes_<hardware>_<yyyymm>
    python benchmarks/runtimes.py --models s:detect xs:detect xxs:detect --size 320 --against self \
        torchvision:ssdlite320_mobilenet_v3_large --out benchmarks/runtimes_detect_<hardware>_<yyyymm>
    python benchmarks/runtimes.py --models s:segment xs:segment xxs:segment --size 512 --against self \
        torchvision:deeplabv3_mobilenet_v3_large torchvision:lraspp_mobilenet_v3_large --out ...

Each pair of a network and a runtime is timed by `mobilevit benchmark` in a process of its own, so that the threads of
one runtime take nothing from another; within it all sides are interleaved, see `mobilevit.benchmark.run`. The
others go through the same converter as ours, without our rewrites; in torch they are as their library makes them, in
the faster of the two memory layouts, as ours is.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import tyro
from results import write_results
from rich.console import Console
from rich.table import Table

from mobilevit.benchmark.run import RUNTIMES, TORCH
from mobilevit.benchmark.timing import processor
from mobilevit.export import installed

COLUMNS = ("network", "side", "runtime", "batch", "time / ours", "p10", "p90", "p10, ms", "GFLOP/s", "of peak", "MB")
COLUMNS = (*COLUMNS, "memory, MB", "load, ms")
NOTE = (
    "Time / ours is the median over the rounds of the ratio of two times of the same round, in the same runtime and "
    "precision: above 1 our network is the faster one. Then the 10th and 90th percentile of that ratio, and the 10th "
    "percentile of the time of a batch itself. Of peak: of a float32 matrix product in torch in the same rounds. "
    "Memory: what a fresh process takes for loading and running it; loading compiled includes compiling."
)


def time_pair(network: str, runtime: str, batches: tuple[int, ...], size: int, options: list[str]) -> dict[str, Any]:
    """What `mobilevit benchmark` reports of one network in one runtime, in its own process."""
    precisions = ["fp32"]
    if runtime not in TORCH and "int8" in import_module(f"mobilevit.export.{runtime}").PRECISIONS:
        precisions.append("int8")
    command = [sys.executable, "-m", "mobilevit", "benchmark", network, "--runtime", runtime, "--size", str(size)]
    command += ["--precision", *precisions, "--batch-size", *map(str, batches), *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{network} in {runtime}: the benchmark ended with exit code {done.returncode}, see above")
    return json.loads(done.stdout.splitlines()[-1])


def cells(row: dict[str, Any], target: str) -> tuple[str, ...]:
    """One line of the printed table."""
    ratio, latency = row["ratio"], row["latency_ms"]
    return (
        target,
        row["name"] if row["against"] else "ours",
        f"{row['runtime']} {row['precision']}",
        str(row["batch_size"]),
        *(f"{ratio[key]:.2f}" if ratio else "1" if key == "median" else "" for key in ("median", "p10", "p90")),
        f"{latency['p10']:.2f}",
        "" if row["gflops"] is None else f"{row['gflops']:.0f}",
        "" if row["peak_share"] is None else f"{100 * row['peak_share']:.0f} %",
        f"{row['num_bytes'] / 1e6:.2f}",
        "" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 1e6:.1f}",
        f"{row['load_ms']:.0f}",
    )


def main(
    models: tuple[str, ...] = ("xxs", "xs", "s"),
    runtimes: tuple[str, ...] = (),
    against: tuple[str, ...] = ("self", "timm", "transformers", "torchvision:mobilenet_v2"),
    eager_batches: tuple[int, ...] = (1, 16),
    rounds: int = 40,
    size: int = 256,
    threads: int = 2,
    out: Path | None = None,
) -> None:
    """Time our network in every runtime, beside those of other libraries.

    Args:
        models: the published sizes to time, as classifiers, or with :detect or :segment behind them.
        runtimes: all that are installed, unless given.
        against: what to compare with, see mobilevit benchmark --help; self is the control.
        eager_batches: images in a batch in torch eager; 1 everywhere else.
        rounds: every side is timed once a round.
        size: side of the images in pixels.
        threads: of the CPU.
        out: write OUT.md and OUT.json.
    """
    # CoreML's artifacts are written everywhere and run on Apple's machines alone.
    chosen = runtimes or tuple(x for x in RUNTIMES if x in TORCH or (x != "coreml" and installed(x)))
    options = ["--against", *against, "--rounds", str(rounds), "--num-threads", str(threads)]
    reports, lines, notes = [], [], []
    for network in models:
        for runtime in chosen:
            report = time_pair(network, runtime, eager_batches if runtime == "torch" else (1,), size, options)
            reports.append({"network": network, "runtime": runtime} | report)
            lines += [cells(row, network) for row in report["rows"]]
            notes += report["notes"]
    versions = {name: version for report in reports for name, version in report["versions"].items()}
    setting = {
        "date": datetime.date.today().isoformat(),
        "cpu": processor(),
        "threads": threads,
        "num_rounds": rounds,
        "size_px": size,
        "load_average_at_start": reports[0]["load_average"],
    }
    result = json.dumps({"benchmark": "runtimes", **setting, "versions": versions, "reports": reports})

    title = f"Runtimes, {size} px, {threads} threads"
    table = Table(*COLUMNS, title=title, caption=NOTE, caption_justify="left")
    for line in lines:
        table.add_row(*line)
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table)
    for note in notes:
        console.print(note)
    if out:
        facts = f"{setting['date']}, {setting['cpu']}, " + ", ".join(f"{k} {v}" for k, v in versions.items())
        facts += f"; {rounds} rounds; load average at the start {setting['load_average_at_start']:.2f}"
        write_results(out, title, facts, "\n\n".join([NOTE, *notes]), COLUMNS, lines, result)
    print(result)


if __name__ == "__main__":
    tyro.cli(main)
