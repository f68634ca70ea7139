"""Rerun the speed benchmarks of this machine, and write dated results beside this file.

    python benchmarks/all.py --hardware epyc-2-cores
    python benchmarks/all.py --hardware epyc-2-cores --only runtimes_onnx scaling

Every result names the processor, the versions and, where it is defined, the fraction of the processor's peak. Each
benchmark is a process of its own; one that fails is named at the end, with exit code 1, and the others still run. All
of them take hours; nothing else should run meanwhile. Benchmarks of accuracy need a dataset and are not included:
distillation.py, imbalance.py, inspect_faults.py, sampler.py.
"""

from __future__ import annotations

import datetime
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch
import tyro
from runtimes import installed_runtimes

FOLDER = Path(__file__).parent


def commands() -> dict[str, list[str]]:
    """Name of the result -> script and arguments, for what this machine can run."""
    chosen = {f"runtimes_{runtime}": ["runtimes.py", "--runtimes", runtime] for runtime in installed_runtimes()}
    for task, size, rivals in (
        ("detect", "320", ["ssdlite320_mobilenet_v3_large"]),
        ("segment", "512", ["deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"]),
    ):
        models = [f"{model}:{task}" for model in ("s", "xs", "xxs")]
        against = ["self", *(f"torchvision:{name}" for name in rivals)]
        chosen[f"runtimes_{task}"] = ["runtimes.py", "--models", *models, "--size", size, "--against", *against]
    for name in ("scaling", "eager", "training", "loading"):
        chosen[name] = [f"{name}.py"]
    if find_spec("playwright") and shutil.which("chromium"):
        chosen["browser"] = ["browser.py", "--profile"]
    if torch.cuda.is_available():
        chosen["gpu"] = ["gpu.py"]
    return chosen


def main(hardware: str, only: tuple[str, ...] = (), out: Path = FOLDER) -> int:
    """Rerun the speed benchmarks of this machine.

    Args:
        hardware: name of the machine in the file names, for example epyc-2-cores.
        only: names of results, such as runtimes_onnx or scaling; all by default.
        out: folder of the results.
    """
    available = commands()
    unknown = [name for name in only if name not in available]
    if unknown:
        print(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(available)}", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    month = f"{datetime.date.today():%Y%m}"
    failed = []
    for name in only or available:
        script, *arguments = available[name]
        print(f"{name} ...", flush=True)
        started = time.monotonic()
        stem = out / f"{name}_{hardware}_{month}"
        code = subprocess.run([sys.executable, FOLDER / script, *arguments, "--out", stem], check=False).returncode
        print(f"{name}: {'done' if code == 0 else 'failed'}, {time.monotonic() - started:.0f} s", flush=True)
        failed += [name] if code else []
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
