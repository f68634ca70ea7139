"""Compare training at one image size and at several: time, and accuracy at several sizes, over seeds.

    python benchmarks/sampler.py /usr/share/datasets/fashion-mnist --out benchmarks/sampler_HARDWARE_YYYYMM

The claim of the paper (section 3.3 and figure 6) at a scale for two cores: MobileViT-XXS from scratch on the first
images of Fashion-MNIST, with equal numbers of epochs at 48 px and at sizes around it, one thread, runs interleaved by
seed. Writes OUT.json and OUT.md, and a figure with --figure. Interrupted runs resume.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from mobilevit.data.idx import read_idx_file
from mobilevit.recipes import Data, Optimizer, Recipe, Sampler, to_dict
from mobilevit.tasks.evaluation import evaluate
from mobilevit.training.loop import train
from mobilevit.weights import read

STANDARD = Recipe(
    architecture="xxs",
    epochs=12,
    batch_size=64,
    data=Data(size_px=48, eval_resize=1.0, min_scale=0.7, num_workers=0),
    optimizer=Optimizer(warmup_steps=300),
)
RECIPES = {"one size": STANDARD, "several sizes": replace(STANDARD, sampler=Sampler("main", (32, 40, 48, 56, 64)))}
TEST_SIZES_PX = (32, 40, 48, 56, 64, 80)


def write_subset(source: Path, folder: Path, num_images: int) -> None:
    """Write idx files of the first training images and all test images."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, num in (("train", num_images), ("t10k", None)):
        for what in ("images-idx3", "labels-idx1"):
            file = source / f"{split}-{what}-ubyte"
            values = read_idx_file(file if file.exists() else file.with_name(f"{file.name}.gz"))[:num]
            header = bytes([0, 0, 8, values.ndim]) + b"".join(side.to_bytes(4, "big") for side in values.shape)
            (folder / file.name).write_bytes(header + values.tobytes())


def measure(name: str, seed: int, data: Path, out: Path) -> dict[str, object]:
    """Train unless the results exist, and evaluate at every size."""
    file = out / "measured.json"
    if file.exists():
        return json.loads(file.read_text())
    started = time.process_time()
    run = train(replace(RECIPES[name], seed=seed), data, out)
    processor_seconds = time.process_time() - started
    weights = read(run.weights)
    sizes = {size: evaluate(weights, data, size_px=size).metrics["top1"] for size in TEST_SIZES_PX}
    measured = {
        "training": name,
        "seed": seed,
        "steps": run.epochs[-1]["step"],
        "seconds_an_epoch": statistics.median(epoch["seconds"] for epoch in run.epochs),
        "processor_seconds": processor_seconds,
        "top1_by_size_px": sizes,
    }
    file.write_text(json.dumps(measured))
    return json.loads(file.read_text())  # JSON turns the sizes into strings


def table(measured: list[dict]) -> str:
    """Mean and range over the seeds, as a Markdown table."""

    def of(name: str) -> list[dict]:
        return [one for one in measured if one["training"] == name]

    def cell(values: list[float], digits: int) -> str:
        return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"

    lines = ["| | " + " | ".join(RECIPES) + " |", "|---" * (1 + len(RECIPES)) + "|"]
    rows = {
        "steps": lambda one: one["steps"],
        "seconds per epoch, wall clock": lambda one: one["seconds_an_epoch"],
        "CPU seconds of the whole run": lambda one: one["processor_seconds"],
    }
    for title, value in rows.items():
        lines.append(f"| {title} | " + " | ".join(cell([value(one) for one in of(name)], 0) for name in RECIPES) + " |")
    for size in TEST_SIZES_PX:
        cells = (cell([one["top1_by_size_px"][str(size)] for one in of(name)], 2) for name in RECIPES)
        lines.append(f"| top-1 at {size} px, % | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(measured: list[dict], path: Path) -> None:
    """Plot accuracy by test size: a line per training, a dot per seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, color in zip(RECIPES, ("#4c5b70", "#c8553d"), strict=True):
        runs = [one["top1_by_size_px"] for one in measured if one["training"] == name]
        means = [statistics.mean(run[str(size)] for run in runs) for size in TEST_SIZES_PX]
        axes.plot(TEST_SIZES_PX, means, color=color, label=f"trained at {name}")
        for run in runs:
            axes.plot(TEST_SIZES_PX, [run[str(size)] for size in TEST_SIZES_PX], ".", color=color, alpha=0.5)
    axes.set(xlabel="size of the test images, px", ylabel="top-1, %", xticks=TEST_SIZES_PX)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with Fashion-MNIST's or MNIST's idx files")
    parser.add_argument("--out", type=Path, required=True, help="results are written to OUT.json and OUT.md")
    parser.add_argument("--runs", type=Path, default=Path("runs/sampler"), help="folder of the training runs")
    parser.add_argument("--images", type=int, default=15_000, help="number of training images")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    write_subset(options.data, options.runs / "data", options.images)
    measured = []
    for seed in range(options.seeds):
        for name in RECIPES:
            out = options.runs / f"{name.replace(' ', '-')}-{seed}"
            measured.append(measure(name, seed, options.runs / "data", out))
            print(json.dumps(measured[-1]), flush=True)
    text = table(measured)
    print(text)
    recipes = {name: to_dict(recipe) for name, recipe in RECIPES.items()}
    values = {"torch": torch.__version__, "images": options.images, "recipes": recipes, "runs": measured}
    options.out.with_name(f"{options.out.name}.json").write_text(json.dumps(values, indent=1) + "\n")
    options.out.with_name(f"{options.out.name}.md").write_text(text + "\n")
    if options.figure:
        draw(measured, options.figure)


if __name__ == "__main__":
    main()
