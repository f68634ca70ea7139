"""Map-style datasets of Python as training data: objects with `__len__`, `__getitem__` and class names."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from mobilevit.data.class_sets import split_of_labels
from mobilevit.data.samples import Images, Split, Splits
from mobilevit.images import ImageError, read_image
from mobilevit.messages import first_line

logger = logging.getLogger(__name__)
NUM_HASHED = 16  # images whose pixels are part of the fingerprint
Item = tuple[Any, Any]


class MapDataset(Protocol):
    """A map-style dataset of (image, label) pairs, with the names of its classes in `class_names` or `classes`.

    An image is a path, a PIL image or a uint8 array (H, W, 3), and always the same one for an index. A label is a class
    index or a class name; for several labels per image, a list of those, or an array of 0 and 1 for each class.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Item: ...


@dataclass(frozen=True, eq=False)
class PythonData:
    """A dataset to train on, and one to validate on; without the latter, the former is divided."""

    train: MapDataset
    val: MapDataset | None = None

    def __str__(self) -> str:
        return type(self.train).__name__


Data = str | Path | PythonData
"""A path or the name of a dataset on the hub, or a dataset in Python."""


def to_data(data: Any) -> Data:
    """`data` as `Data`: a path, a map-style dataset, or a pair of those for training and validation.

    Raises:
        TypeError: another type.
    """
    if isinstance(data, str | PythonData):
        return data
    if isinstance(data, os.PathLike):
        return Path(data)
    pair = data if isinstance(data, tuple) else (data,)
    if len(pair) not in (1, 2) or not all(hasattr(one, "__len__") and hasattr(one, "__getitem__") for one in pair):
        found = ", ".join(type(one).__name__ for one in pair)
        raise TypeError(
            f"data is {found}; use a path (str or pathlib.Path), a dataset with __len__, __getitem__ and class_names, "
            "or a pair (train, val) of datasets"
        )
    return PythonData(*pair)


@dataclass(frozen=True, eq=False)
class DatasetImages:
    """The images of a dataset that returns pixels. Its keys contain the hash of the pixels of some images."""

    dataset: MapDataset
    location: str
    hashes: Mapping[int, str]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Image.Image | np.ndarray:
        try:
            image = self.dataset[index][0]
        except (OSError, SyntaxError) as error:  # of Pillow, for a damaged file
            raise ImageError(f"{self.name(index)}: cannot be read ({first_line(error)})") from None
        if not isinstance(image, Image.Image | np.ndarray):
            raise ImageError(f"{self.name(index)}: image is a {type(image).__name__}, unlike that of index 0")
        return image

    def key(self, index: int) -> str:
        return f"{index} {self.hashes[index]}" if index in self.hashes else str(index)

    def name(self, index: int) -> str:
        return f"{self.location}[{index}]"


@dataclass(frozen=True)
class DatasetFiles:
    """The images of a dataset that returns paths. Keys are paths below the common folder, and sizes in bytes."""

    files: tuple[Path, ...]
    keys: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Path:
        return self.files[index]

    def key(self, index: int) -> str:
        return self.keys[index]

    def name(self, index: int) -> str:
        return str(self.files[index])


def python_splits(data: PythonData, *, multilabel: bool) -> Splits:
    """The splits "train" and "val", or "all". Errors when a split is read: see `_read`."""
    if data.val is None:
        return {"all": partial(_read, data.train, str(data), _class_names(data.train), multilabel)}
    names = _class_names(data.train)
    own = hasattr(data.val, "class_names") or hasattr(data.val, "classes")
    return {
        "train": partial(_read, data.train, f"{data} (train)", names, multilabel),
        "val": partial(_read, data.val, f"{data} (val)", _class_names(data.val) if own else names, multilabel),
    }


def _class_names(dataset: Any) -> tuple[str, ...]:
    for attribute in ("class_names", "classes"):
        if hasattr(dataset, attribute):
            names = getattr(dataset, attribute)
            if isinstance(names, str) or not all(isinstance(name, str) for name in names):
                raise ValueError(f"{type(dataset).__name__}: {attribute} is {names!r}; it must be a list of names")
            return tuple(names)
    raise ValueError(
        f"{type(dataset).__name__}: has neither class_names nor classes; set dataset.class_names to the list of names"
    )


def _read(dataset: MapDataset, location: str, class_names: tuple[str, ...], multilabel: bool) -> Split:
    """Images and labels of a dataset.

    Labels come from its attribute `targets`, as in torchvision, if it has one and its images are not paths; otherwise
    each item is requested once.

    Raises:
        ValueError: no items, an item that is not a pair, images of another type, labels that are of another type, out
            of range, or unlike those of `targets`.
    """
    num = len(dataset)
    if not num:
        raise ValueError(f"{location}: contains no images")
    first, label = _item(dataset, location, 0)
    if not isinstance(first, str | os.PathLike | Image.Image | np.ndarray):
        raise ValueError(
            f"{location}[0]: image is a {type(first).__name__}; it must be a path, a PIL image or a uint8 array (H, W, "
            "3); remove the transform to tensors, because training augments the images itself"
        )
    targets = _targets(dataset)
    has_files = isinstance(first, str | os.PathLike)
    if not has_files and targets is not None and len(targets) == num:
        labels = list(targets)
        if _label_names(labels[0], class_names, location) != _label_names(label, class_names, location):
            raise ValueError(f"{location}[0]: label is {label!r}, but targets[0] is {labels[0]!r}; make them agree")
        images: Images = DatasetImages(dataset, location, _hashes(dataset, location))
    else:
        if not has_files:
            logger.info(f"{location}: has no attribute targets: each image is requested once to read its label")
        items = [_item(dataset, location, i) for i in range(num)]
        labels = [label for _, label in items]
        images = (
            _files([path for path, _ in items], location)
            if has_files
            else DatasetImages(dataset, location, _hashes(dataset, location))
        )
    names = [_label_names(label, class_names, f"{location}[{i}]") for i, label in enumerate(labels)]
    if not multilabel:
        several = [i for i, of_image in enumerate(names) if len(of_image) != 1]
        if several:
            raise ValueError(
                f"{location}: {len(several):,} of {num:,} images do not have exactly one label (first: "
                f"{location}[{several[0]}]: {labels[several[0]]!r}); train them with the recipe multilabel"
            )
    return split_of_labels(location, images, names, class_names, multilabel=multilabel)


def _targets(dataset: Any) -> Any:
    """The labels of all images, if the dataset has them."""
    return dataset.targets if hasattr(dataset, "targets") else None


def _item(dataset: MapDataset, location: str, index: int) -> Item:
    item = dataset[index]
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise ValueError(f"{location}[{index}]: is a {type(item).__name__}; it must be a pair (image, label)")
    return item[0], item[1]


def _files(paths: Sequence[Any], location: str) -> DatasetFiles:
    wrong = [i for i, path in enumerate(paths) if not isinstance(path, str | os.PathLike)]
    if wrong:
        raise ValueError(f"{location}[{wrong[0]}]: image is a {type(paths[wrong[0]]).__name__}, unlike that of index 0")
    files = tuple(Path(path).absolute() for path in paths)
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"{location}: {len(missing):,} of {len(files):,} files do not exist (first: {missing[0]})")
    root = os.path.commonpath([file.parent for file in files])
    keys = (f"{file.relative_to(root).as_posix()} {file.stat().st_size}" for file in files)
    return DatasetFiles(files, tuple(keys))


def _hashes(dataset: MapDataset, location: str) -> dict[int, str]:
    """The hashes of the pixels of `NUM_HASHED` images, evenly spaced, by index. Unreadable images have none."""
    hashes = {}
    images = DatasetImages(dataset, location, {})
    for i in sorted({i * len(dataset) // NUM_HASHED for i in range(NUM_HASHED)}):
        try:
            pixels = np.asarray(read_image(images[i], images.name(i)))
        except ImageError:
            continue
        hashes[i] = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()[:16]
    return hashes


def _label_names(label: Any, class_names: tuple[str, ...], where: str) -> tuple[str, ...]:
    """The class names of a label."""
    if isinstance(label, str):
        values: Iterable[Any] = [label]
    elif hasattr(label, "tolist"):  # an array or a tensor
        values = label.tolist()
        if not isinstance(values, list):
            values = [values]
        elif len(values) == len(class_names) and set(values) <= {0, 1}:
            values = [i for i, is_set in enumerate(values) if is_set]
    else:
        values = label if isinstance(label, list | tuple | set | frozenset) else [label]
    names: set[str] = set()
    for value in values:
        if isinstance(value, str) and value in class_names:
            names.add(value)
        elif isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(class_names):
            names.add(class_names[value])
        else:
            raise ValueError(
                f"{where}: label is {value!r}; it must be a class index from 0 to {len(class_names) - 1} or one of the "
                f"{len(class_names)} class names"
            )
    return tuple(sorted(names))
