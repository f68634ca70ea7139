"""Binary cross-entropy and asymmetric loss on images with several labels: collages of Tux Paint's stamps.

    python benchmarks/multilabel.py --out runs/multilabel

Each collage has one to four stamps on a plain background, and the top folders of the stamps as its labels (17 classes,
from 3 to 247 stamps). Training and validation use different stamps. XXS, from random weights or with `--weights FILE`
from pretrained ones, several seeds. Stopped and called again, the script resumes. `--data-only` writes the label file
and stops. Requires the Debian package tuxpaint-stamps-default.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mobilevit.compare.statistics import welch
from mobilevit.recipes import RECIPES, Multilabel, Recipe
from mobilevit.training.loop import train
from mobilevit.training.run import EpochMetrics, FinishedError

STAMPS = Path("/usr/share/tuxpaint/stamps")
COLLAGE_PX, STAMP_PX = 80, (24, 48)
MAX_STAMPS = 4
LOSSES = {
    "bce": Multilabel(),
    "asymmetric": Multilabel(loss="asymmetric"),
}
METRICS = ("map", "micro_f1", "macro_f1")


def split_stamps() -> dict[str, list[tuple[str, Image.Image]]]:
    """Class and image of the stamps of both splits; every fourth stamp of a class is in "val"."""
    splits: dict[str, list[tuple[str, Image.Image]]] = {"train": [], "val": []}
    for folder in sorted(path for path in STAMPS.iterdir() if path.is_dir()):
        for i, file in enumerate(sorted(folder.rglob("*.png"))):
            with Image.open(file) as stamp:
                stamp.thumbnail((STAMP_PX[1], STAMP_PX[1]))
                splits["val" if i % 4 == 2 else "train"].append((folder.name, stamp.convert("RGBA")))
    return splits


def write_collages(folder: Path, num_train: int, num_val: int) -> None:
    """Images, and labels.csv with the columns path, labels and split."""
    rng = np.random.default_rng(0)
    rows = []
    for split, stamps in split_stamps().items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        for i in range(num_train if split == "train" else num_val):
            collage = Image.new("RGB", (COLLAGE_PX, COLLAGE_PX), tuple(rng.integers(160, 256, 3).tolist()))
            chosen = rng.choice(len(stamps), rng.integers(1, MAX_STAMPS + 1), replace=False)
            for index in chosen:
                stamp = stamps[index][1]
                scale = rng.integers(*STAMP_PX) / max(stamp.size)
                stamp = stamp.resize((max(1, round(stamp.width * scale)), max(1, round(stamp.height * scale))))
                x, y = (int(rng.integers(0, COLLAGE_PX - side + 1)) for side in stamp.size)
                collage.paste(stamp, (x, y), stamp)
            collage.save(folder / split / f"{i:05}.png")
            labels = sorted({stamps[index][0] for index in chosen})
            rows.append((f"{split}/{i:05}.png", "|".join(labels), split))
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "labels", "split"), *rows])


def recipe_of(loss: Multilabel, seed: int, args: argparse.Namespace) -> Recipe:
    """The recipe `small` for several labels per image. Pretrained weights need a lower learning rate."""
    small = RECIPES["small"]
    return replace(
        small,
        task="multilabel",
        epochs=args.epochs,
        batch_size=32,
        seed=seed,
        label_smoothing=0.0,
        data=replace(small.data, size_px=args.size),
        optimizer=replace(small.optimizer, lr=1e-3) if args.weights else small.optimizer,
        multilabel=loss,
    )


def fit(recipe: Recipe, data: Path, out: Path, weights: str | None) -> list[EpochMetrics]:
    """Train, unless `out` has a finished run; the metrics of the epochs."""
    try:
        return train(recipe, data, out, pretrained=weights).epochs
    except FinishedError as finished:
        return finished.epochs


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/multilabel"))
    parser.add_argument("--weights", help="pretrained weights")
    parser.add_argument("--size", type=int, default=64, help="input size in pixels")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--num-train", type=int, default=2000)
    parser.add_argument("--num-val", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data-only", action="store_true", help="write the collages and the label file only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = args.out / "data" / "labels.csv"
    if not data.exists():
        write_collages(data.parent, args.num_train, args.num_val)
    if args.data_only:
        print(data)
        return
    values: dict[str, list[list[float]]] = {name: [] for name in LOSSES}
    for seed in args.seeds:
        for name, loss in LOSSES.items():
            out = args.out / f"{name.replace(', ', '_').replace(' ', '_')}_{seed}"
            last = fit(recipe_of(loss, seed, args), data, out, args.weights)[-1]
            values[name].append([last[f"val_{metric}"] for metric in METRICS])
            print(f"{name}, seed {seed}: {', '.join(f'{value:.2f}' for value in values[name][-1])}", flush=True)
    print("| loss | mAP | micro F1 | macro F1 |", "|---|---|---|---|", sep="\n")
    for name, rows in values.items():
        cells = [
            f"{np.mean(column):.2f} +- {np.std(column, ddof=min(1, len(column) - 1)):.2f}"
            for column in zip(*rows, strict=True)
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    maps = {name: [row[0] for row in rows] for name, rows in values.items()}
    if test := welch(maps["asymmetric"], maps["bce"]):
        low, high, p = test
        print(f"mAP of asymmetric minus bce: 95 % interval {low:+.2f} to {high:+.2f}, p = {p:.2g} (Welch's t-test)")


if __name__ == "__main__":
    main()
