"""Functions for datasets and preprocessing that all tasks use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mobilevit.data.checks import check_images
from mobilevit.data.loader import ImageDataset
from mobilevit.data.python_data import Data
from mobilevit.data.sources import find_evaluation_split, find_splits
from mobilevit.images import Preprocessing, limit_megapixels
from mobilevit.recipes import Recipe
from mobilevit.tasks.task import Described
from mobilevit.weights import Weights

Prepare = Callable[..., Any]
"""The `prepare` of `mobilevit.data.loader.ImageDataset`."""
Stack = Callable[[list[Any]], Any]
"""The `stack` of `mobilevit.data.loader.ImageDataset`."""


def training_sets(
    recipe: Recipe, data: Data, train: tuple[Prepare, Stack], val: tuple[Prepare, Stack]
) -> tuple[ImageDataset, ImageDataset]:
    """Training and validation sets of the recipe's task, with `prepare` and `stack` of each. All images are checked."""
    assert recipe.task != "distill"  # its images have no labels
    limit_megapixels(recipe.data.max_megapixels)
    train_source, val_source = find_splits(recipe.task, data, recipe.data.val_fraction)
    scan = check_images(train_source, val_source, max_unreadable=recipe.data.max_unreadable)
    notes = (*train_source.notes, *scan.notes())
    return (
        ImageDataset(train_source, *train, notes=notes, num_transparent=scan.num_transparent),
        ImageDataset(val_source, *val, notes=val_source.notes),
    )


def evaluation_set(weights: Described, data: Data, split: str, prepare: Prepare, stack: Stack) -> ImageDataset:
    """The images of a split of `data`, with the classes in the order of `weights`."""
    if not weights.class_names:
        raise ValueError("these weights have no class names, which are required to match the classes of the data")
    source = find_evaluation_split(weights.task, data, weights.class_names, split, weights.val_fraction)
    return ImageDataset(source, prepare, stack, notes=source.notes)


def whole_image(preprocessing: Preprocessing) -> Preprocessing:
    """`preprocessing` without a crop, for dense tasks: boxes may be at the edge, and every pixel counts."""
    return replace(preprocessing, resize_px=(preprocessing.crop_px, preprocessing.crop_px))


def normalized_as(pretrained: Weights | None, preprocessing: Preprocessing) -> Preprocessing:
    """`preprocessing` with the mean and the standard deviation that the pretrained first convolution expects."""
    if pretrained is None:
        return preprocessing
    return replace(preprocessing, mean=pretrained.preprocessing.mean, std=pretrained.preprocessing.std)
