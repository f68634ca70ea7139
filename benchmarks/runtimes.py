"""Every installed runtime: our MobileViT compared with timm's and transformers', and with MobileNetv2.

    python benchmarks/runtimes.py --out benchmarks/runtimes_<hardware>_<yyyymm>
    python benchmarks/runtimes.py --models s:detect xs:detect xxs:detect --size 320 --against self \
        torchvision:ssdlite320_mobilenet_v3_large --out benchmarks/runtimes_detect_<hardware>_<yyyymm>
    python benchmarks/runtimes.py --models s:segment xs:segment xxs:segment --size 512 --against self \
        torchvision:deeplabv3_mobilenet_v3_large torchvision:lraspp_mobilenet_v3_large --out ...

Each pair of a model and a runtime is timed by `mobilevit benchmark` in a process of its own, so that the idle threads
of one runtime do not slow down another. Within it all models are interleaved, see `mobilevit.benchmark.run`. The other
models pass through the same converter as ours, without our rewrites. In torch they are as their library defines them,
in the faster of the two memory layouts, like ours.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import tyro
from results import print_table, write_results

from mobilevit.benchmark.models import RUNTIMES, TORCH
from mobilevit.benchmark.timing import machine
from mobilevit.defaults import NUM_ROUNDS, NUM_THREADS
from mobilevit.export import installed

COLUMNS = (
    *("target", "model", "runtime", "batch", "time / ours", "p10", "p90", "p10, ms", "GFLOP/s", "of peak", "MB"),
    *("memory, MB", "load, ms", "fp32 / int8"),
)
NOTE = (
    "'time / ours' is the time of a model divided by that of our model in the same runtime and precision: above "
    "1, ours is faster. It is the median over the rounds, in which the models are timed interleaved; p10 and p90 "
    "are its percentiles. The next column is the 10th percentile of the time of a batch. 'of peak' is relative "
    "to a float32 matrix product in torch in the same rounds. 'memory' is used by a new process to load and run "
    "the model. 'load' includes compilation in torch.compile. 'fp32 / int8' is the speed-up of int8 over fp32 of the "
    "same model."
)


def installed_runtimes() -> tuple[str, ...]:
    """All but CoreML, whose artifacts run on Apple systems only."""
    return tuple(x for x in RUNTIMES if x in TORCH or (x != "coreml" and installed(x)))


def precisions_of(runtime: str) -> list[str]:
    """fp32, and int8 if the runtime supports it."""
    has_int8 = runtime not in TORCH and "int8" in import_module(f"mobilevit.export.{runtime}").PRECISIONS
    return ["fp32", "int8"] if has_int8 else ["fp32"]


def run_benchmark(
    target: str, runtime: str, precisions: list[str], batches: tuple[int, ...], size: int, options: list[str]
) -> dict[str, Any]:
    """Run `mobilevit benchmark` for one model in one runtime, in its own process; returns its report."""
    command = [sys.executable, "-m", "mobilevit", "benchmark", target, "--runtime", runtime, "--size", str(size)]
    command += ["--precision", *precisions, "--batch-size", *map(str, batches), *options]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if process.returncode:
        raise SystemExit(f"{target} in {runtime}: the benchmark failed with exit code {process.returncode}, see above")
    return json.loads(process.stdout.splitlines()[-1])


def cells(row: dict[str, Any], target: str) -> tuple[str, ...]:
    """One line of the table."""
    ratio, latency = row["ratio"], row["latency_ms"]
    return (
        target,
        row["name"] if row["baseline"] else "ours",
        f"{row['runtime']} {row['precision']}",
        str(row["batch_size"]),
        *(f"{ratio[key]:.2f}" if ratio else "1" if key == "median" else "" for key in ("median", "p10", "p90")),
        f"{latency['p10']:.2f}",
        "" if row["gflops"] is None else f"{row['gflops']:.0f}",
        "" if row["peak_fraction"] is None else f"{100 * row['peak_fraction']:.0f} %",
        f"{row['num_bytes'] / 1e6:.2f}",
        "" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 1e6:.1f}",
        f"{row['load_ms']:.0f}",
        f"{1 / row['ratio_to_fp32']['median']:.2f}" if row["ratio_to_fp32"] else "",
    )


def main(
    models: tuple[str, ...] = ("xxs", "xs", "s"),
    runtimes: tuple[str, ...] = (),
    against: tuple[str, ...] = ("self", "timm", "transformers", "torchvision:mobilenet_v2"),
    eager_batches: tuple[int, ...] = (1, 16),
    rounds: int = NUM_ROUNDS,
    size: int = 256,
    threads: int = NUM_THREADS,
    out: Path | None = None,
) -> None:
    """Time MobileViT in every runtime, compared with models of other libraries.

    Args:
        models: published sizes, as classifiers, or with :detect or :segment appended.
        runtimes: all installed runtimes by default.
        against: models to compare with, see mobilevit benchmark --help; self is the control.
        eager_batches: batch sizes in torch eager; 1 in all other runtimes.
        rounds: each round times every model once.
        size: image size in pixels.
        threads: CPU threads.
        out: write OUT.md and OUT.json.
    """
    chosen = runtimes or installed_runtimes()
    options = ["--against", *against, "--rounds", str(rounds), "--num-threads", str(threads)]
    setting = machine(threads)
    reports, lines, notes = [], [], []
    for target in models:
        for runtime in chosen:
            batches = eager_batches if runtime == "torch" else (1,)
            report = run_benchmark(target, runtime, precisions_of(runtime), batches, size, options)
            reports.append({"network": target, "runtime": runtime} | report)
            lines += [cells(row, target) for row in report["rows"]]
            notes += report["notes"]
    title = f"Runtimes, {size} px, {threads} threads"
    print_table(title, "\n".join([NOTE, *notes]), COLUMNS, lines)
    values = {"benchmark": "runtimes", **vars(setting), "num_rounds": rounds, "size_px": size, "reports": reports}
    result = json.dumps(values)
    if out:
        facts = f"{setting.describe()}; {rounds} rounds"
        write_results(out, title, facts, "\n\n".join([NOTE, *notes]), COLUMNS, lines, result)
    print(result)


if __name__ == "__main__":
    tyro.cli(main)
