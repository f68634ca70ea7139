"""Training on imbalanced classes: the options of `Recipe.imbalance` on Fashion-MNIST with 300 to 3 images per class.

    python benchmarks/imbalance.py /usr/share/datasets/fashion-mnist --out runs/imbalance

The number of training images falls geometrically from class to class; validation has 50 images of each class. XXS at 32
px, recipe `tiny`, one seed. Stopped and called again, the script resumes.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mobilevit.data.idx import read_idx_file
from mobilevit.recipes import RECIPES, Imbalance
from mobilevit.training.loop import train
from mobilevit.training.run import FinishedError

OPTIONS = {
    "none": Imbalance(),
    "logit adjustment 1": Imbalance(logit_adjustment=1.0),
    "class weights 1": Imbalance(class_weights=1.0),
    "balanced sampler": Imbalance(balanced_sampler=True),
    "class weights 0.5": Imbalance(class_weights=0.5),
}
COUNTS = {"train": [round(300 * 100 ** (-i / 9)) for i in range(10)], "val": [50] * 10}


def write_images(source: Path, folder: Path) -> None:
    """The first images of each class, as PNG files in one folder per class."""
    for split, prefix in (("train", "train"), ("val", "t10k")):
        images, labels = (
            read_idx_file(file if file.exists() else file.with_name(f"{file.name}.gz"))
            for file in (source / f"{prefix}-{what}-ubyte" for what in ("images-idx3", "labels-idx1"))
        )
        for label, num in enumerate(COUNTS[split]):
            (folder / split / str(label)).mkdir(parents=True, exist_ok=True)
            for i in np.flatnonzero(labels == label)[:num]:
                Image.fromarray(images[i]).save(folder / split / str(label) / f"{i}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with Fashion-MNIST's idx files")
    parser.add_argument("--out", type=Path, default=Path("runs/imbalance"))
    parser.add_argument("--epochs", type=int, default=12)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not (args.out / "data").exists():
        write_images(args.data, args.out / "data")
    recipe = replace(RECIPES["tiny"], epochs=args.epochs, metric="balanced_accuracy")
    recipe = replace(recipe, data=replace(recipe.data, flip=True))
    rows = ["| option | top-1, % | balanced accuracy, % | macro F1, % |", "|---|---|---|---|"]
    for name, imbalance in OPTIONS.items():
        out = args.out / name.replace(" ", "_")
        try:
            epochs = train(replace(recipe, imbalance=imbalance), args.out / "data", out).epochs
        except FinishedError as finished:
            epochs = finished.epochs
        metrics = (f"{epochs[-1][f'val_{metric}']:.1f}" for metric in ("top1", "balanced_accuracy", "macro_f1"))
        rows.append(f"| {name} | {' | '.join(metrics)} |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
