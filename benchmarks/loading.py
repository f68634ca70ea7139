"""Compare loading of training batches from JPEG files with torchvision on one core, interleaved.

    python benchmarks/loading.py --out benchmarks/loading_<hardware>_<yyyymm>

"torchvision" is `ImageFolder` with `RandomResizedCrop`, `RandomHorizontalFlip` and `ToTensor` in a `DataLoader`, as in
its examples. "mobilevit" applies the same augmentation and returns uint8 in channels-last layout, which the device
scales. "scaled" scales on the CPU as well, so that it returns the same floats as torchvision. "without simplejpeg"
decodes with Pillow, as on machines without that package.

The images are crops of the two photographs of scikit-learn, in files that the page cache holds. The benchmark measures
CPU time, including the start and the end of worker processes, so that other work on the machine counts for neither
library. Every round times every loader once; results are ratios of two times of the same round.
"""

from __future__ import annotations

import json
import resource
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from results import print_table, write_results
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from mobilevit import images
from mobilevit.benchmark.timing import Spread, machine, measure
from mobilevit.data.loader import ImageDataset, load
from mobilevit.data.sampler import BatchShapes, EpochBatches
from mobilevit.data.sources import find_splits
from mobilevit.data.transforms import Augmentation
from mobilevit.images import Preprocessing

THEIRS = "torchvision"
SIMPLEJPEG = images.simplejpeg
COLUMNS = ("images", "px", "workers", "loader", "speed / torchvision", "p10", "p90", "images/s per core")
NOTE = (
    "Speed / torchvision: median over the rounds of the ratio of two times of the same round, with its 10th and 90th "
    "percentile; above 1, the loader is faster than torchvision. Images/s per core: median of images per second of CPU "
    "time."
)


def write_images(folder: Path, width: int, num: int) -> int:
    """Write JPEG files of quality 90, `width` x 3/4 `width`, in two classes. Returns the mean size in bytes."""
    random = np.random.default_rng(0)
    photographs = [Image.fromarray(photograph) for photograph in load_sample_images().images]
    for i in range(num):
        scale = random.uniform(0.9, 1)
        w, h = scale * 569, scale * 427
        left, top = random.uniform(0, 640 - w), random.uniform(0, 427 - h)
        crop = photographs[i % 2].resize(
            (width, width * 3 // 4), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h)
        )
        for split in ("train", "val"):
            file = folder / split / "ab"[i % 2] / f"{i}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            crop.save(file, quality=90)
    return sum(file.stat().st_size for file in (folder / "train").rglob("*.jpg")) // num


def build_loaders(folder: Path, size_px: int, num_workers: int) -> dict[str, Callable[[], int]]:
    """The loaders by name. Each reads every image once, in batches of 32, and returns the number of images."""
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
    indices = [[pick.image_index for pick in batch] for batch in batches]
    ours = ImageDataset(source, Augmentation(min_scale=0.08, flip=True, seed=0))
    advanced = ImageDataset(source, Augmentation(min_scale=0.08, flip=True, seed=0, policy="advanced"))

    def count(batches: Iterable[Any]) -> int:
        return sum(len(batch[1]) for batch in batches)

    def run(dataset: ImageDataset, preprocessing: Preprocessing | None = None, decoder: Any = None) -> int:
        images.simplejpeg = decoder
        return count(load(dataset, batches, num_workers=num_workers, device="cpu", preprocessing=preprocessing))

    loaders: dict[str, Callable[[], int]] = {
        THEIRS: lambda: count(DataLoader(theirs, batch_sampler=indices, num_workers=num_workers)),
        "mobilevit without simplejpeg": lambda: run(ours),
    }
    if SIMPLEJPEG is not None:
        loaders["mobilevit"] = lambda: run(ours, decoder=SIMPLEJPEG)
        loaders["mobilevit, scaled"] = lambda: run(ours, Preprocessing(), decoder=SIMPLEJPEG)
        loaders["mobilevit, advanced"] = lambda: run(advanced, decoder=SIMPLEJPEG)
    return loaders


def cpu_seconds() -> float:
    """CPU time of this process and its finished children."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def cells(row: dict) -> tuple[str, ...]:
    """One row of the printed table."""
    ratios = (f"{row[key]:.2f}" for key in ("ratio_median", "ratio_p10", "ratio_p90"))
    files = f"{row['width']}x{row['width'] * 3 // 4}, {row['bytes'] / 1e3:.0f} kB"
    speed = f"{row['images_per_second']:,.0f}"
    return files, str(row["size_px"]), str(row["num_workers"]), row["loader"], *ratios, speed


def main(
    sizes: tuple[int, ...] = (160, 192, 256, 320),
    widths: tuple[int, ...] = (500, 2000),
    workers: tuple[int, ...] = (0, 2),
    num_images: tuple[int, ...] = (192, 32),
    rounds: int = 15,
    out: Path | None = None,
) -> None:
    """Compare loading of training batches with torchvision.

    Args:
        sizes: sides of the crops in pixels; all for the first width without workers, else 256 only.
        widths: widths of the image files in pixels.
        workers: numbers of worker processes; 0 loads in the main process.
        num_images: number of image files of each width.
        rounds: interleaved rounds of each setting.
        out: write OUT.md and OUT.json.
    """
    torch.set_num_threads(1)
    decoders = {library: version(library) for library in ("pillow", *(["simplejpeg"] if SIMPLEJPEG else []))}
    description = machine(num_threads=1)
    description = replace(description, versions=description.versions | decoders)
    rows = []
    for width, num in zip(widths, num_images, strict=True):
        with tempfile.TemporaryDirectory() as temporary:
            num_bytes = write_images(Path(temporary), width, num)
            for num_workers in workers:
                for size_px in sizes if (width, num_workers) == (widths[0], workers[0]) else (256,):
                    loaders = build_loaders(Path(temporary), size_px, num_workers)
                    times_ms = measure(list(loaders.values()), rounds, clock=cpu_seconds)
                    theirs = times_ms[list(loaders).index(THEIRS)]
                    for name, times in zip(loaders, times_ms, strict=True):
                        ratio = Spread.of(theirs / times)
                        rows.append(
                            {
                                "width": width,
                                "bytes": num_bytes,
                                "size_px": size_px,
                                "num_workers": num_workers,
                                "loader": name,
                                "ratio_median": round(ratio.median, 3),
                                "ratio_p10": round(ratio.p10, 3),
                                "ratio_p90": round(ratio.p90, 3),
                                "images_per_second": round(1e3 * num / float(np.median(times)), 1),
                            }
                        )
    setting = asdict(description) | {"rounds": rounds}
    result = json.dumps({"benchmark": "loading", **setting, "rows": rows})
    title = "Loading of training batches from JPEG files, one thread per process"
    print_table(title, NOTE, COLUMNS, map(cells, rows))
    if out:
        write_results(out, title, description.describe(), NOTE, COLUMNS, map(cells, rows), result)
    print(result)


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
