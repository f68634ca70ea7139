"""The boxes of an image: the label of a sample for detection."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from mobilevit.data.samples import ImageFiles, Split
from mobilevit.images import ImageError, read_header


@dataclass(frozen=True, eq=False)
class Boxes:
    """The N boxes of an image, which have an area and lie within the image.

    `crowd` is COCO's iscrowd or VOC's difficult: such boxes are excluded from training, and missing them is no error.
    `areas` are those of the objects if annotated, else those of the boxes. `size` is the (width, height) of the image
    in the annotation, None if it has none.
    """

    corners: np.ndarray  # (N, 4) float32, x1 y1 x2 y2 in pixels of the upright image
    labels: np.ndarray  # (N,) int64, class indices from 0; the background has none
    crowd: np.ndarray  # (N,) bool
    areas: np.ndarray  # (N,) float32, px^2
    size: tuple[int, int] | None = None

    def digest(self) -> str:
        arrays = (self.corners, self.labels, self.crowd, self.areas)
        return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]

    def used_classes(self) -> set[int]:
        return set(self.labels.tolist())

    def with_classes(self, new_index: Mapping[int, int]) -> Boxes:
        return replace(self, labels=np.array([new_index[label] for label in self.labels.tolist()], np.int64))

    def mismatch(self, name: str, size: tuple[int, int]) -> str | None:
        if self.size in (None, size):
            return None
        fix = "remove its EXIF orientation, or rotate its boxes" if self.size == size[::-1] else "fix the annotation"
        sizes = f"{size[0]} x {size[1]} px, but annotated as {self.size[0]} x {self.size[1]}"
        return f"{name}: {sizes}; {fix}"


@dataclass
class AnnotatedBoxes:
    """Boxes of an image as annotated, collected one by one; see `Boxes`."""

    file: Path
    size: tuple[int, int] | None
    corners: list[tuple[float, float, float, float]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    crowd: list[bool] = field(default_factory=list)
    areas: list[float | None] = field(default_factory=list)

    def add(self, corners: tuple[float, float, float, float], label: int, crowd: bool, area: float | None) -> None:
        self.corners.append(corners)
        self.labels.append(label)
        self.crowd.append(crowd)
        self.areas.append(area)

    def clipped(self) -> Boxes:
        """The boxes, clipped to the image, without those that have no area."""
        # If the annotation has no size, that of the image is used. A file that is not an image is reported later.
        width, height = self.size or _upright_size(self.file) or (np.inf, np.inf)
        corners = np.array(self.corners, np.float64).reshape(-1, 4).clip(0, np.array([width, height] * 2))
        corners = corners.astype(np.float32)
        sides = corners[:, 2:] - corners[:, :2]
        valid = (sides > 0).all(1)  # False for NaN, and for infinity minus infinity
        areas = [a if a is not None and a > 0 else x for a, x in zip(self.areas, sides.prod(1), strict=True)]
        return Boxes(
            corners[valid],
            np.array(self.labels, np.int64)[valid],
            np.array(self.crowd, bool)[valid],
            np.array(areas, np.float32)[valid],
            self.size,
        )


def split_of_boxes(
    annotated: Iterable[AnnotatedBoxes],
    location: str,
    root: Path,
    class_names: tuple[str, ...],
    category_ids: tuple[int, ...] = (),
) -> Split:
    """A split of images in `root`, with a note if boxes have no area within the image."""
    annotated = list(annotated)
    labels = [one.clipped() for one in annotated]
    dropped = [len(one.labels) - len(boxes.labels) for one, boxes in zip(annotated, labels, strict=True)]
    notes = ()
    if num := sum(dropped):
        first = next(one.file.name for one, count in zip(annotated, dropped, strict=True) if count)
        notes = (f"{location}: ignored {num} box{'es' * (num > 1)} without area in the image, first in {first}",)
    images = ImageFiles(tuple(one.file for one in annotated), root)
    return Split(location, images, labels, class_names, category_ids, notes)


def _upright_size(image: Path) -> tuple[int, int] | None:
    with contextlib.suppress(ImageError):
        return read_header(image, of_any_size=True).size  # a limit on megapixels must not change the boxes
    return None
