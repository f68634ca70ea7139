"""A training run of seconds, and comparisons of what such runs write."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mobilevit.models.mobilevit import XXS, Architecture, MobileViT
from mobilevit.recipes import Data, Optimizer, Recipe
from mobilevit.training.loop import TIMES
from mobilevit.weights import Weights, read

CLASS_NAMES = ("circle", "line", "square")
# 12 training images and 3 validation images (see the fixture `data`): 4 steps per epoch.
RECIPE = Recipe(
    architecture="xxs",
    epochs=2,
    batch_size=3,
    data=Data(size_px=32, eval_resize=1.0, num_workers=0),
    optimizer=Optimizer(lr=1e-3, warmup_steps=1),
)


def without_dropout(architecture: Architecture = XXS) -> Weights:
    """Initial weights of a deterministic network."""
    architecture = replace(architecture, transformer_dropout=0.0, classifier_dropout=0.0)
    torch.manual_seed(0)
    model = MobileViT(architecture, num_classes=3)
    return Weights(architecture, copy.deepcopy(model.state_dict()), class_names=CLASS_NAMES)


def same_weights(a: Path, b: Path) -> bool:
    """Whether two weight files are bit-identical."""
    ours, theirs = read(a).tensors, read(b).tensors
    return ours.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in ours.items())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(records: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records]


def scenes(folder: Path, task: str) -> Path:
    """16 training images and 6 validation images with a red or green rectangle each, and its box or mask."""
    draw = np.random.default_rng(0)
    for split, num in (("train", 16), ("val", 6)):
        images, boxes = [], []
        for i in range(num):
            width, height = 60 + 3 * i, 70 - i
            pixels, mask = draw.integers(0, 90, (height, width, 3), np.uint8), np.zeros((height, width), np.uint8)
            (left, top), (w, h) = draw.integers(0, 20, 2).tolist(), draw.integers(25, 35, 2).tolist()
            pixels[top : top + h, left : left + w, i % 2], mask[top : top + h, left : left + w] = 240, 1 + i % 2
            images.append({"id": i, "file_name": f"{i}.png", "width": width, "height": height})
            where = {"bbox": [left, top, w, h], "area": w * h, "iscrowd": 0}
            boxes.append({"id": i + 1, "image_id": i, "category_id": 1 + i % 2, **where})
            for file, array in ((f"{split}/images/{i}.png", pixels), (f"{split}/masks/{i}.png", mask)):
                if task == "segment" or array is pixels:
                    file = folder / (file if task == "segment" else file.replace("images/", ""))
                    file.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(array).save(file)
        if task == "detect":
            classes = [{"id": 1, "name": "red"}, {"id": 2, "name": "green"}]
            content = {"images": images, "annotations": boxes, "categories": classes}
            (folder / split / "_annotations.coco.json").write_text(json.dumps(content))
    if task == "segment":
        (folder / "classes.txt").write_text("nothing\nred\ngreen\n")
    return folder
