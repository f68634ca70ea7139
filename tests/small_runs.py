"""A training run of seconds, and comparisons of what such runs write."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

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
