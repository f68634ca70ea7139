"""Inspect datasets: counts, sizes, unreadable images, copies, leaks between splits and likely label errors."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mobilevit.data.samples import Source
from mobilevit.data.sources import TaskName
from mobilevit.embed import DEFAULT_OPTIONS, EmbedOptions, features_of
from mobilevit.inspect.collect import Collection, collect
from mobilevit.inspect.duplicates import NEAR, Group, find_duplicates
from mobilevit.inspect.label_errors import LabelCheck, find_label_errors
from mobilevit.messages import join_classes
from mobilevit.weights import Weights, to_weights

logger = logging.getLogger(__name__)
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, eq=False)
class Inspection:
    """The findings in a dataset.

    Attributes:
        data: the dataset.
        collection: all images.
        groups: images that are copies of each other.
        label_check: likely label errors; None without weights.
    """

    data: str
    collection: Collection
    groups: Sequence[Group]
    label_check: LabelCheck | None = None

    @cached_property
    def leaks(self) -> list[Group]:
        """Groups with images of several splits."""
        return [group for group in self.groups if len({self.collection.split[i] for i in group.images}) > 1]

    @cached_property
    def overlaps(self) -> list[Group]:
        """Groups of images with different classes."""
        return [group for group in self.groups if len({self.collection.labels[i] for i in group.images}) > 1]

    def counts(self) -> dict[str, int]:
        """The number of findings of each kind: groups of copies, or images."""
        return {
            "unreadable": len(self.collection.problems),
            "unlabeled": len(self.collection.unlabeled()),
            "exact_duplicates": sum(group.difference is None for group in self.groups),
            "near_duplicates": sum(group.difference is not None for group in self.groups),
            "leaks": len(self.leaks),
            "class_overlaps": len(self.overlaps),
        } | ({} if self.label_check is None else {"label_errors": len(self.label_check.errors)})

    def size_quantiles(self) -> dict[str, list[float]]:
        """Minimum, quartiles and maximum of width, height and aspect ratio (width / height) of readable images."""
        sizes = self.collection.sizes[self.collection.readable()]
        if not len(sizes):
            return {}
        values = {"width_px": sizes[:, 0], "height_px": sizes[:, 1], "aspect_ratio": sizes[:, 0] / sizes[:, 1]}
        return {name: np.quantile(column, QUANTILES).round(3).tolist() for name, column in values.items()}

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        c = self.collection
        names, leaks, overlaps = sorted(c.num_images), set(self.leaks), set(self.overlaps)
        return {
            "data": self.data,
            "task": c.task,
            "num_images": {name: len(split.images) for name, split in c.splits.items()},
            "classes": [
                {"class": name, "num_images": dict(c.num_images[name])}
                | ({"num_boxes": dict(c.num_boxes[name])} if name in c.num_boxes else {})
                for name in names
            ],
            "sizes": self.size_quantiles(),
            "modes": dict(c.modes.most_common()),
            "formats": dict(c.formats.most_common()),
            "counts": self.counts(),
            "unreadable": [self._image(i) | {"error": error} for i, error in sorted(c.problems.items())],
            "unlabeled": [self._image(i) for i in c.unlabeled()],
            "duplicates": [
                {
                    "difference": group.difference,
                    "is_leak": group in leaks,
                    "has_class_overlap": group in overlaps,
                    "images": [self._image(i) for i in group.images],
                }
                for group in self.groups
            ],
        } | (
            {}
            if self.label_check is None
            else {
                "label_prediction_accuracy": self.label_check.accuracy,
                "classes_without_label_check": self.label_check.skipped,
                "label_errors": [
                    self._image(error.image)
                    | {
                        "predicted": error.predicted,
                        "probability": error.probability,
                        "label_probability": error.label_probability,
                    }
                    for error in self.label_check.errors
                ],
            }
        )

    def _image(self, image: int) -> dict[str, str]:
        c = self.collection
        return {"split": c.split_name(image), "image": c.key(image), "label": c.labels[image]}


def inspect_data(
    data: str | os.PathLike[str],
    weights: Weights | str | os.PathLike[str] | None = None,
    *,
    task: TaskName | None = None,
    near: float = NEAR,
    num_threads: int | None = None,
    options: EmbedOptions = DEFAULT_OPTIONS,
    download: bool = False,
) -> Inspection:
    """Inspect all splits of a dataset.

    Examples:
        >>> mobilevit.inspect_data("pets/").counts()["leaks"]

    Args:
        data: a dataset, as for `train`.
        weights: a path, a hub id or `Weights` of a classifier, to find likely label errors; its classes do not matter.
        task: "classify", "multilabel", "detect" or "segment". None: detect or segment if `data` is a folder in one of
            their formats, otherwise classify.
        near: largest RMS difference of the thumbnails of near duplicates, in levels of 0 to 255; 0: exact ones only.
        num_threads: that decode images; None: one per core.
        options: batch size, processes and device, for the weights.
        download: fetch a hub id that is not in the local cache.

    Raises:
        ValueError: the data or the weights cannot be read; weights with data that do not have one class per image; an
            optional package is not installed.
    """
    if near < 0:
        raise ValueError(f"near is {near}; it must be 0 or more")
    weights = None if weights is None else to_weights(weights, download=download)
    collection = collect(os.fspath(data), task, num_threads=num_threads)
    if weights is not None and collection.task != "classify":
        raise ValueError(
            f"{data}: is for the task {collection.task}, but label errors are found only if each image has one class; "
            "leave out WEIGHTS"
        )
    readable = collection.readable()
    groups = find_duplicates(readable, collection.digests, collection.thumbnails, near)
    check = None if weights is None else _check_labels(collection, groups, weights, options)
    return Inspection(os.fspath(data), collection, groups, check)


def _check_labels(
    collection: Collection, groups: Sequence[Group], weights: Weights, options: EmbedOptions
) -> LabelCheck:
    images = np.array([i for i in collection.readable().tolist() if collection.labels[i]], np.int64)
    features = []
    for number, split in enumerate(collection.splits.values()):
        positions = collection.position[images[collection.split[images] == number]].tolist()
        if positions:
            source = Source(split.images, (0,) * len(positions), (), indices=positions)
            features.append(features_of(weights, source, options)[1])
    of_group = np.arange(len(collection))
    for group in groups:
        of_group[list(group.images)] = group.images[0]
    labels = [collection.labels[i] for i in images.tolist()]
    check = find_label_errors(images, np.concatenate(features), labels, of_group[images])
    logger.info(
        f"likely label errors: the classes of {check.accuracy:.1f} % of the images are predicted from the others"
    )
    if check.skipped:
        logger.info(
            f"label errors are not searched for in {join_classes(check.skipped)}: fewer than 5 different images"
        )
    return check
