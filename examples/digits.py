"""Train MobileViT-XXS on the handwritten digits that ship with scikit-learn, and show its predictions.

Writes the 1,797 images as files (two thirds for training, one third for testing), trains with the recipe "tiny" and
the code of `mobilevit train`, evaluates the saved weights on the test split, and draws test digits with their
predictions.

    python examples/digits.py [FOLDER]      # default: runs/digits; an existing run of this example is replaced
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
    """The digits as folder/{train,test}/{0..9}/NNNN.png, grayscale, 8 x 8 px; every third image is a test image."""
    pixels, labels = load_digits(return_X_y=True)
    for i, (values, label) in enumerate(zip(pixels.reshape(-1, 8, 8), labels, strict=True)):
        path = folder / ("test" if i % 3 == 2 else "train") / str(label) / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((values * 255 / 16).round().astype(np.uint8)).save(path)


def draw(predictions: list[tuple[Path, str, float]], path: Path) -> None:
    """A sheet of digits with their predictions: green if correct, red if wrong."""
    columns, cell_px, digit_px = 10, 96, 64
    rows = -(-len(predictions) // columns)
    sheet = Image.new("RGB", (columns * cell_px, rows * cell_px), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(15)
    for i, (file, predicted, probability) in enumerate(predictions):
        x, y = i % columns * cell_px, i // columns * cell_px
        digit = Image.open(file).resize((digit_px, digit_px), Image.Resampling.NEAREST)
        sheet.paste(digit, (x + (cell_px - digit_px) // 2, y + 4))
        is_correct = predicted == file.parent.name
        text = f"{predicted}  {100 * probability:.0f} %" if is_correct else f"{predicted}, is {file.parent.name}"
        color = "#1a7f37" if is_correct else "#c62828"
        pen.text((x + cell_px / 2, y + digit_px + 18), text, fill=color, font=font, anchor="mm")
    sheet.save(path)


def main(out: Path) -> None:
    """Write the images, train, evaluate, draw."""
    console = Console()
    started = time.perf_counter()
    if out.exists():
        if any(out.iterdir()) and not (out / "data" / "train" / "0").is_dir():
            sys.exit(f"{out}: is not a run of this example; choose another folder")
        shutil.rmtree(out)
    write_images(out / "data")
    run = train(RECIPES["tiny"], out / "data", out)

    model = mobilevit.load(run.weights)
    predictions = [
        (one.path, one.value()[0].class_name, one.value()[0].probability)
        for one in predict_images(model, find_images([str(out / "data" / "test")]), model.predict_pixels, batch_size=64)
    ]
    wrong = [one for one in predictions if one[1] != one[0].parent.name]
    correct = [one for one in predictions if one[1] == one[0].parent.name]
    draw([*correct[:: max(1, len(correct) // 40)][: 50 - len(wrong[:20])], *wrong[:20]], out / "predictions.png")

    console.print(
        f"\nTest accuracy: {100 * len(correct) / len(predictions):.2f} % of {len(predictions)} test digits, "
        f"after {time.perf_counter() - started:.0f} s.\n"
        f"Weights: {run.weights}\nReport: {out / 'report.html'}\nImage: {out / 'predictions.png'}\n\n"
        f"Try next:\n  .venv/bin/mobilevit predict {run.weights} {predictions[0][0]}\n"
        "  .venv/bin/mobilevit train --data FOLDER      # your images, one folder per class\n",
        soft_wrap=True,
        highlight=False,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/digits"))
