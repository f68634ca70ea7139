"""Read every image of a dataset once: counts of classes, headers, and a digest and a thumbnail of the pixels."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mobilevit.data.boxes import Boxes
from mobilevit.data.masks import IGNORE, MaskFile
from mobilevit.data.samples import Annotation, Split
from mobilevit.data.sources import TaskName, read_splits
from mobilevit.images import ImageError, read_header, read_image
from mobilevit.logs import Progress

THUMBNAIL_PX = 8  # larger ones are less robust against resizing: docs/inspect.md
CHUNK = 64  # images per task of the thread pool


class Record(NamedTuple):
    """One image: upright (width, height), mode and format of the file, digest and thumbnail of the RGB pixels.

    `classes` counts the boxes of each class in detection; otherwise the count of a class that the image has is 1.
    """

    size: tuple[int, int]
    mode: str
    format: str
    digest: int
    thumbnail: np.ndarray  # (THUMBNAIL_PX * THUMBNAIL_PX * 3,) uint8
    classes: Counter[str]


@dataclass(eq=False)
class Collection:
    """The N images of all splits, one split after the other. Images with a problem have no size and no pixels.

    Attributes:
        split, position: (N,) index of the split in `splits`, and of the image in its split.
        labels: the class of each image, several joined by commas, or "".
        sizes: (N, 2) width and height of the upright image.
        digests: (N,) of the RGB pixels.
        thumbnails: (N, 192) uint8.
        problems: error messages of unreadable images and annotations, by index.
        num_images, num_boxes: by class, then by split; boxes in detection only.
    """

    task: TaskName
    splits: Mapping[str, Split]
    split: np.ndarray
    position: np.ndarray
    labels: list[str]
    sizes: np.ndarray
    digests: np.ndarray
    thumbnails: np.ndarray
    problems: dict[int, str] = field(default_factory=dict)
    modes: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    num_images: dict[str, Counter[str]] = field(default_factory=dict)
    num_boxes: dict[str, Counter[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.split)

    def split_name(self, image: int) -> str:
        return tuple(self.splits)[self.split[image]]

    def key(self, image: int) -> str:
        return self.splits[self.split_name(image)].images.key(int(self.position[image]))

    def read(self, image: int) -> Image.Image:
        """The decoded image. Raises ImageError."""
        images, index = self.splits[self.split_name(image)].images, int(self.position[image])
        return read_image(images[index], images.name(index))

    def readable(self) -> np.ndarray:
        """Indices of the images without a problem."""
        return np.setdiff1d(np.arange(len(self)), list(self.problems))

    def unlabeled(self) -> list[int]:
        """Indices of readable images without a class; in detection, such an image is a background image."""
        return [i for i in self.readable().tolist() if not self.labels[i]]


def collect(data: str | Path, task: TaskName | None = None, *, num_threads: int | None = None) -> Collection:
    """Decode all images of all splits, in threads. Each thread holds one decoded image.

    Raises:
        ValueError: see `mobilevit.data.sources.read_splits`.
    """
    task, splits = read_splits(data, task)
    lengths = [len(split.images) for split in splits.values()]
    num = sum(lengths)
    collection = Collection(
        task,
        splits,
        split=np.repeat(np.arange(len(splits)), lengths),
        position=np.concatenate([np.arange(length) for length in lengths]),
        labels=[""] * num,
        sizes=np.zeros((num, 2), np.int64),
        digests=np.zeros(num, np.uint64),
        thumbnails=np.zeros((num, 3 * THUMBNAIL_PX**2), np.uint8),
    )
    progress = Progress("read", num)
    image = 0
    for name, split in splits.items():
        for record in _records(split, num_threads):
            if isinstance(record, str):
                collection.problems[image] = record
            else:
                _add(collection, image, name, record)
            image += 1
            progress.add(1)
    return collection


def _records(split: Split, num_threads: int | None) -> Iterator[Record | str]:
    starts = range(0, len(split.images), CHUNK)
    with ThreadPoolExecutor(num_threads or os.cpu_count()) as pool:
        try:
            for records in pool.map(lambda start: _examine_chunk(split, start), starts):
                yield from records
        finally:  # also if the program is interrupted
            pool.shutdown(wait=False, cancel_futures=True)


def _examine_chunk(split: Split, start: int) -> list[Record | str]:
    return [_examine(split, i) for i in range(start, min(start + CHUNK, len(split.images)))]


def _examine(split: Split, index: int) -> Record | str:
    """The record of an image, or an error message."""
    name, label = split.images.name(index), split.labels[index]
    try:
        source = split.images[index]
        header = read_header(source, name)
        image = read_image(source, name)
        classes = _count_classes(split, label, image.size)
    except ImageError as error:
        return str(error)
    if not isinstance(label, int | str | None) and (mismatch := label.mismatch(name, header.size)):
        return mismatch
    pixels = np.ascontiguousarray(image)
    digest = hashlib.blake2b(repr(image.size).encode(), digest_size=8)
    digest.update(pixels.data)
    # Bilinear: Pillow's box filter aliases if the sizes are not multiples, and copies of other sizes would differ.
    size = (THUMBNAIL_PX, THUMBNAIL_PX)
    thumbnail = np.asarray(image.resize(size, Image.Resampling.BILINEAR, reducing_gap=3)).ravel()
    number = int.from_bytes(digest.digest(), "little")
    return Record(header.size, header.mode, header.format or "pixels", number, thumbnail, classes)


def _count_classes(split: Split, label: int | str | Annotation | None, size: tuple[int, int]) -> Counter[str]:
    names: Any = split.class_names
    if isinstance(label, int):
        return Counter([names[label] if names and 0 <= label < len(names) else str(label)])
    if isinstance(label, str | None):
        return Counter([label] if label else [])
    if isinstance(label, Boxes):
        return Counter(names[i] for i in label.labels.tolist())
    if isinstance(label, MaskFile):
        return Counter(names[i] for i in np.unique(label.read(*size)).tolist() if i != IGNORE)
    return Counter(names[i] for i in label.used_classes())


def _add(collection: Collection, image: int, split: str, record: Record) -> None:
    collection.labels[image] = ", ".join(sorted(record.classes))
    collection.sizes[image] = record.size
    collection.digests[image] = record.digest
    collection.thumbnails[image] = record.thumbnail
    collection.modes[record.mode] += 1
    collection.formats[record.format] += 1
    for name, num in record.classes.items():
        collection.num_images.setdefault(name, Counter())[split] += 1
        if collection.task == "detect":
            collection.num_boxes.setdefault(name, Counter())[split] += num
