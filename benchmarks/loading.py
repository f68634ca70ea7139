"""Reading training batches from JPEG files against torchvision, on one core: one interleaved run.

    python benchmarks/loading.py --out benchmarks/loading_<hardware>_<yyyymm>

torchvision is `ImageFolder` with `RandomResizedCrop`, `RandomHorizontalFlip` and `ToTensor` in a `DataLoader`, as its
examples have it. Ours does the same to the images and hands over uint8 in channels-last layout, which the device
scales; "scaled" has that done on the processor as well, so that it ends with the same floats. "without simplejpeg" is
what happens where that package is not installed.

The photographs are parts of scikit-learn's two, and their files are in memory, not on a disk. What is timed is not the
clock on the wall but the time of the processor, worker processes, their start and their end included, so that other
work on the machine takes nothing from either side. It still changes the speed from second to second: every round times
every side once, in an order that rotates, and what counts is the ratio of two times of the same round.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
import tyro
from PIL import Image
from results import write_results
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from mobilevit import images
from mobilevit.benchmark.timing import processor
from mobilevit.data.loader import ImageDataset, load
from mobilevit.data.sampler import BatchShapes, EpochBatches
from mobilevit.data.sources import find_splits
from mobilevit.data.transforms import Augmentation
from mobilevit.images import Preprocessing

THEIRS = "torchvision"
SIMPLEJPEG = images.simplejpeg
COLUMNS = ("photographs", "px", "workers", "loader", "speed / torchvision's", "p10", "p90", "images/s a core")
NOTE = (
    "'speed / torchvision's' is the speed of a loader divided by that of torchvision's: above 1, our loader is "
    "faster. It is the median over the rounds, in which the loaders are timed interleaved; p10 and p90 are its "
    "percentiles. The last column is the median of images per second of processor time of one core."
)


def write_photographs(folder: Path, width: int, num: int) -> int:
    """Parts of two photographs as JPEG of quality 90, `width` by 3/4 of it, in two classes; gives the bytes of one."""
    random = np.random.default_rng(0)
    photographs = [Image.fromarray(photograph) for photograph in load_sample_images().images]
    for i in range(num):
        share = random.uniform(0.9, 1)
        w, h = share * 569, share * 427
        left, top = random.uniform(0, 640 - w), random.uniform(0, 427 - h)
        part = photographs[i % 2].resize(
            (width, width * 3 // 4), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h)
        )
        for split in ("train", "val"):
            file = folder / split / "ab"[i % 2] / f"{i}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            part.save(file, quality=90)
    return sum(file.stat().st_size for file in (folder / "train").rglob("*.jpg")) // num


def build_sides(folder: Path, size_px: int, num_workers: int) -> dict[str, Callable[[], int]]:
    """What is timed, by name; each reads every image once, in batches of 32, and gives their number."""
    transform = torchvision.transforms.Compose(
        [
            torchvision.transforms.RandomResizedCrop(size_px),
            torchvision.transforms.RandomHorizontalFlip(),
            torchvision.transforms.ToTensor(),
        ]
    )
    theirs = ImageFolder(folder / "train", transform)
    source, _ = find_splits("classify", folder, 0.5)
    batches = EpochBatches(len(source), BatchShapes((size_px,), 32, size_px))
    numbers = [[pick.image_index for pick in batch] for batch in batches]
    ours = ImageDataset(source, Augmentation(min_scale=0.08, flip=True, seed=0))
    advanced = ImageDataset(source, Augmentation(min_scale=0.08, flip=True, seed=0, policy="advanced"))

    def count(batches: Iterable[Any]) -> int:
        return sum(len(batch[1]) for batch in batches)

    def run(dataset: ImageDataset, preprocessing: Preprocessing | None = None, decoder: Any = None) -> int:
        images.simplejpeg = decoder
        return count(load(dataset, batches, num_workers=num_workers, device="cpu", preprocessing=preprocessing))

    sides: dict[str, Callable[[], int]] = {
        THEIRS: lambda: count(DataLoader(theirs, batch_sampler=numbers, num_workers=num_workers)),
        "mobilevit without simplejpeg": lambda: run(ours),
    }
    if SIMPLEJPEG is not None:
        sides["mobilevit"] = lambda: run(ours, decoder=SIMPLEJPEG)
        sides["mobilevit, scaled"] = lambda: run(ours, Preprocessing(), decoder=SIMPLEJPEG)
        sides["mobilevit, advanced"] = lambda: run(advanced, decoder=SIMPLEJPEG)
    return sides


def used_seconds() -> float:
    """Time of the processor that this process and its finished children have used."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def measure(sides: dict[str, Callable[[], int]], num_rounds: int) -> dict[str, np.ndarray]:
    """Images a second of one core of every side in every round."""
    order = list(sides)
    speeds: dict[str, list[float]] = {side: [] for side in order}
    for side in order:
        sides[side]()
    for _ in range(num_rounds):
        for side in order:
            start = used_seconds()
            num = sides[side]()
            speeds[side].append(num / (used_seconds() - start))
        order.append(order.pop(0))
    return {side: np.array(values) for side, values in speeds.items()}


def cells(row: dict) -> tuple[str, ...]:
    """One line of the printed table."""
    ratios = (f"{row[key]:.2f}" for key in ("ratio_median", "ratio_p10", "ratio_p90"))
    photographs = f"{row['width']}x{row['width'] * 3 // 4}, {row['bytes'] / 1e3:.0f} kB"
    speed = f"{row['images_per_second']:,.0f}"
    return photographs, str(row["size_px"]), str(row["num_workers"]), row["side"], *ratios, speed


def main(
    sizes: tuple[int, ...] = (160, 192, 256, 320),
    widths: tuple[int, ...] = (500, 2000),
    workers: tuple[int, ...] = (0, 2),
    images_each: tuple[int, ...] = (192, 32),
    rounds: int = 15,
    out: Path | None = None,
) -> None:
    """Time our loading of training batches and torchvision's side by side.

    Args:
        sizes: sides of the crops in pixels; all with the first width and the first number of workers, else 256 alone.
        widths: of the photographs in pixels.
        workers: processes that read; 0 reads in the main process.
        images_each: photographs of each width.
        rounds: of each setting.
        out: write OUT.md and OUT.json.
    """
    average = os.getloadavg()[0]
    torch.set_num_threads(1)
    rows = []
    for width, num in zip(widths, images_each, strict=True):
        with tempfile.TemporaryDirectory() as temporary:
            num_bytes = write_photographs(Path(temporary), width, num)
            for num_workers in workers:
                for size_px in sizes if (width, num_workers) == (widths[0], workers[0]) else (256,):
                    speeds = measure(build_sides(Path(temporary), size_px, num_workers), rounds)
                    for side, values in speeds.items():
                        p10, median, p90 = np.percentile(values / speeds[THEIRS], (10, 50, 90))
                        rows.append(
                            {
                                "width": width,
                                "bytes": num_bytes,
                                "size_px": size_px,
                                "num_workers": num_workers,
                                "side": side,
                                "ratio_median": round(median, 3),
                                "ratio_p10": round(p10, 3),
                                "ratio_p90": round(p90, 3),
                                "images_per_second": round(float(np.median(values)), 1),
                            }
                        )
    libraries = ("torch", "torchvision", "pillow", *(["simplejpeg"] if SIMPLEJPEG else []))
    versions = {library: importlib.metadata.version(library) for library in libraries}
    setting = {
        "date": datetime.date.today().isoformat(),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "load_average_at_start": round(average, 2),
        "rounds": rounds,
    }
    result = json.dumps({"benchmark": "loading", **setting, "versions": versions, "rows": rows})

    title = "Loading of training batches from JPEG files, one thread a process"
    table = Table(*COLUMNS, title=title, caption=NOTE, caption_justify="left")
    for row in rows:
        table.add_row(*cells(row))
    Console().print(table)
    if out:
        facts = f"{setting['date']}, {setting['cpu']}, {setting['cores']} cores, "
        facts += ", ".join(f"{k} {v}" for k, v in versions.items())
        facts += f"; load average at the start {average:.2f}, of other work"
        write_results(out, title, facts, NOTE, COLUMNS, map(cells, rows), result)
    print(result)


if __name__ == "__main__":
    tyro.cli(main)
