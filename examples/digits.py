"""Train MobileViT-XXS on the handwritten digits that ship with scikit-learn, and show what it learnt.

Writes the 1,797 images as files (two thirds for training, a held-out third for testing), trains by the recipe "tiny"
through the same code as `mobilevit train`, tests the saved weights, and draws test digits with their predictions.

    python examples/digits.py [FOLDER]      # runs/digits unless given; replaced if it is there
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from sklearn.datasets import load_digits

import mobilevit
from mobilevit.images import find_images
from mobilevit.predict import predict_images
from mobilevit.recipes import RECIPES
from mobilevit.training.loop import train


def write_images(folder: Path) -> None:
    """The digits as folder/{train,test}/{0..9}/NNNN.png, grey, 8 x 8 px; every third one is for testing."""
    pixels, labels = load_digits(return_X_y=True)
    for i, (values, label) in enumerate(zip(pixels.reshape(-1, 8, 8), labels, strict=True)):
        path = folder / ("test" if i % 3 == 2 else "train") / str(label) / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((values * 255 / 16).round().astype(np.uint8)).save(path)


def draw(predictions: list[tuple[Path, str, float]], path: Path) -> None:
    """A sheet of digits, each with what the network read in it: green where right, red where wrong."""
    columns, cell_px, digit_px = 10, 96, 64
    rows = -(-len(predictions) // columns)
    sheet = Image.new("RGB", (columns * cell_px, rows * cell_px), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(15)
    for i, (file, predicted, probability) in enumerate(predictions):
        x, y = i % columns * cell_px, i // columns * cell_px
        digit = Image.open(file).resize((digit_px, digit_px), Image.Resampling.NEAREST)
        sheet.paste(digit, (x + (cell_px - digit_px) // 2, y + 4))
        right = predicted == file.parent.name
        text = f"{predicted}  {100 * probability:.0f} %" if right else f"{predicted}, is {file.parent.name}"
        color = "#1a7f37" if right else "#c62828"
        pen.text((x + cell_px / 2, y + digit_px + 18), text, fill=color, font=font, anchor="mm")
    sheet.save(path)


def main(out: Path) -> None:
    """Write, train, test, draw."""
    console = Console()
    started = time.perf_counter()
    if out.exists():
        if any(out.iterdir()) and not (out / "data" / "train" / "0").is_dir():
            sys.exit(f"{out}: holds something else than a run of this example; give a folder of its own")
        shutil.rmtree(out)
    write_images(out / "data")
    run = train(RECIPES["tiny"], out / "data", out)

    model = mobilevit.load(run.weights)
    read = [
        (file, result[0].class_name, result[0].probability)
        for file, result in predict_images(model, find_images([str(out / "data" / "test")]), batch_size=64)
        if isinstance(result, list)
    ]
    wrong = [one for one in read if one[1] != one[0].parent.name]
    right = [one for one in read if one[1] == one[0].parent.name]
    draw([*right[:: max(1, len(right) // 40)][: 50 - len(wrong[:20])], *wrong[:20]], out / "predictions.png")

    console.print(
        f"\nTest accuracy: {100 * len(right) / len(read):.2f} % of {len(read)} digits never trained on, "
        f"after {time.perf_counter() - started:.0f} s.\n"
        f"Weights: {run.weights}\nReport: {out / 'report.html'}\nImage: {out / 'predictions.png'}\n\n"
        f"Try next:\n  .venv/bin/mobilevit predict {run.weights} {read[0][0]}\n"
        "  .venv/bin/mobilevit train --data FOLDER      # your own images, a folder for each class\n",
        soft_wrap=True,
        highlight=False,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/digits"))
