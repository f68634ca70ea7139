"""Eager inference on the CPU against timm and transformers: same weights, one interleaved run.

    python benchmarks/eager.py --out benchmarks/eager_<hardware>_<yyyymm>

Processors change their speed from second to second, so times of two separate runs cannot be compared. Here every round
times every side once, in an order that rotates, and what counts is the ratio of two times of the same round. timm runs
in both memory layouts, NCHW as it comes and NHWC (channels last), transformers as it comes. MobileNetv2 has weights of
its own and stands there for orientation.

"mobilevit" is the network as it is; "mobilevit, folded" has its batch norms folded into the convolutions, which could
be done to the others as well.

glibc gives large freed blocks back to the system, and the next forward pass pays for fresh pages. How much that costs
depends on what ran before in the same process, and it favours the side with the fewest temporaries, which is ours: by
default freed memory is therefore kept, for all sides. --no-keep-memory leaves the allocator as every process has it.
"""

from __future__ import annotations

import ctypes
import datetime
import importlib.metadata
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision
import transformers
import tyro
from results import write_results
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mobilevit.benchmark.rivals import randomise
from mobilevit.benchmark.timing import processor
from mobilevit.models.fuse import fold_batch_norm
from mobilevit.models.mobilevit import MobileViT
from mobilevit.weights import Weights, write

OURS = "mobilevit"
COLUMNS = ("model", "batch", "side", "time / ours", "p10", "p90", "p10, ms")
NOTE = (
    "Time / ours is the median over the rounds of the ratio of two times of the same round: above 1 our network is the "
    "faster one. Then the 10th and 90th percentile of that ratio, and the 10th percentile of the time itself."
)
Side = Callable[[Tensor], Tensor]


def build_sides(name: str, seed: int) -> dict[str, Side]:
    """What is timed, by name; each takes the same RGB images (B, 3, H, W), contiguous, and gives logits."""
    ours = MobileViT(name)
    randomise(ours, seed)
    with tempfile.TemporaryDirectory() as folder:
        weights = Weights(ours.architecture, ours.state_dict())
        timm_file, transformers_folder = Path(folder) / "timm.safetensors", Path(folder) / "transformers"
        write(weights, timm_file, "timm")
        write(weights, transformers_folder, "transformers")
        timm_contiguous, timm_last = (
            timm.create_model(f"mobilevit_{name}", checkpoint_path=str(timm_file)).eval() for _ in range(2)
        )
        huggingface = transformers.MobileViTForImageClassification.from_pretrained(transformers_folder).eval()
    timm_last.to(memory_format=torch.channels_last)
    mobilenet = randomise(torchvision.models.mobilenet_v2(), seed).to(memory_format=torch.channels_last)
    return {
        OURS: ours,
        "mobilevit, folded": fold_batch_norm(ours),
        "timm, NCHW": timm_contiguous,
        "timm, NHWC": timm_last,
        "transformers": lambda x: huggingface(x).logits,
        "MobileNetv2, NHWC": mobilenet,
    }


def prepare(sides: dict[str, Side], images: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Each side with its input, in the layout and channel order it wants: preparing it is not timed."""
    inputs = dict.fromkeys(sides, images)
    for side in sides:
        if side.endswith("NHWC"):
            inputs[side] = images.contiguous(memory_format=torch.channels_last)
    inputs["transformers"] = images[:, [2, 1, 0]]  # BGR
    return {side: partial(run, inputs[side]) for side, run in sides.items()}


def check_agreement(runs: dict[str, Callable[[], Tensor]]) -> float:
    """The largest difference from our logits over all implementations, in standard deviations of the logits."""
    logits = {side: run() for side, run in runs.items() if not side.startswith("MobileNet")}
    difference = max((logits[OURS] - other).abs().max() for other in logits.values()) / logits[OURS].std()
    assert difference < 1e-4, f"the sides disagree: {difference:.1e} of the logits' standard deviation"
    return float(difference)


def measure(runs: dict[str, Callable[[], Tensor]], num_rounds: int) -> dict[str, np.ndarray]:
    """Milliseconds of every side in every round."""
    order = list(runs)
    times_ms: dict[str, list[float]] = {side: [] for side in order}
    for _ in range(num_rounds):
        for side in order:
            runs[side]()  # not timed: the caches are full of the last side's weights
            start = time.perf_counter()
            runs[side]()
            times_ms[side].append(1e3 * (time.perf_counter() - start))
        order.append(order.pop(0))
    return {side: np.array(values) for side, values in times_ms.items()}


def keep_freed_memory() -> bool:
    """Tell the C library never to give freed memory back to the system; False where it cannot be told so."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.system() == "Linux" else None
    mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
    return mallopt is not None and mallopt(mmap_max, 0) == 1 and mallopt(trim_threshold, 2**31 - 1) == 1


def cells(row: dict) -> tuple[str, ...]:
    """One line of the printed table."""
    ratios = (f"{row[key]:.2f}" for key in ("ratio_median", "ratio_p10", "ratio_p90"))
    return row["model"], str(row["batch"]), row["side"], *ratios, f"{row['time_p10_ms']:.1f}"


def main(
    models: tuple[str, ...] = ("xxs", "xs", "s"),
    batches: tuple[int, ...] = (1, 16),
    rounds: tuple[int, ...] = (40, 15),
    size: int = 256,
    threads: int = 2,
    seed: int = 0,
    keep_memory: bool = True,
    out: Path | None = None,
) -> None:
    """Time our network, timm's and transformers' side by side on the CPU, float32.

    Args:
        models: the published sizes to time.
        batches: images in a batch.
        rounds: rounds of each batch size, or one number for all.
        size: side of the images in pixels.
        threads: of the CPU.
        seed: of weights and images.
        keep_memory: let the allocator keep freed memory (glibc only); see the top of the file.
        out: write OUT.md and OUT.json.
    """
    if len(rounds) not in (1, len(batches)):
        raise SystemExit(f"--rounds has {len(rounds)} numbers; give one, or one for each of {len(batches)} batch sizes")
    load = os.getloadavg()[0]
    kept = keep_memory and keep_freed_memory()
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows = []
    for name in models:
        sides = build_sides(name, seed)
        for batch, num_rounds in zip(batches, rounds * (len(batches) // len(rounds)), strict=True):
            images = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))
            with torch.inference_mode():
                runs = prepare(sides, images)
                difference = check_agreement(runs)
                times_ms = measure(runs, num_rounds)
            for side, side_ms in times_ms.items():
                ratio_p10, ratio_median, ratio_p90 = np.percentile(side_ms / times_ms[OURS], (10, 50, 90))
                rows.append(
                    {
                        "model": name,
                        "batch": batch,
                        "side": side,
                        "num_rounds": num_rounds,
                        "ratio_median": round(ratio_median, 4),
                        "ratio_p10": round(ratio_p10, 4),
                        "ratio_p90": round(ratio_p90, 4),
                        "time_p10_ms": round(np.percentile(side_ms, 10), 3),
                        "logit_difference": difference,
                    }
                )
    versions = {library: importlib.metadata.version(library) for library in ("torch", "timm", "transformers")}
    setting = {
        "date": datetime.date.today().isoformat(),
        "cpu": processor(),
        "threads": threads,
        "load_average_at_start": round(load, 2),
        "freed_memory_kept": kept,
        "size_px": size,
        "seed": seed,
    }
    result = json.dumps({"benchmark": "eager", **setting, "versions": versions, "rows": rows})

    title = f"Eager inference, float32, {size} px, {threads} threads"
    table = Table(*COLUMNS, title=title, caption=NOTE, caption_justify="left")
    for row in rows:
        table.add_row(*cells(row))
    Console().print(table)
    if out:
        facts = f"{setting['date']}, {setting['cpu']}, " + ", ".join(f"{k} {v}" for k, v in versions.items())
        facts += f"; load average at the start {load:.2f}; freed memory {'kept' if kept else 'handled by the system'}"
        write_results(out, title, facts, NOTE, COLUMNS, map(cells, rows), result)
    print(result)


if __name__ == "__main__":
    tyro.cli(main)
