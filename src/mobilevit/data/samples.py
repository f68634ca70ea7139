"""Images with labels, independent of the format on disk and of the task: `Sample`, `Source` and `Split`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from mobilevit.images import ImageInput
from mobilevit.messages import first_line, join_classes, join_names

# A class index (`int`) for classification, else an `Annotation`: a `ClassSet`, `Boxes` or a `MaskFile`.
Label = TypeVar("Label", covariant=True)

SPLIT_NAMES = {"train": "train", "training": "train", "test": "test"}
SPLIT_NAMES |= dict.fromkeys(("val", "valid", "validation", "dev"), "val")
"""Names of splits in files and folders -> "train", "val" or "test"."""


@dataclass(frozen=True)
class Sample(Generic[Label]):
    """An undecoded image (a file, its bytes, or pixels), its label, and its name in messages."""

    image: ImageInput | bytes
    label: Label
    name: str


class Images(Protocol):
    """Undecoded images by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> ImageInput | bytes: ...

    def key(self, index: int) -> str:
        """Identifies an image within the dataset; does not change if the dataset is moved."""
        ...

    def name(self, index: int) -> str:
        """Names an image in messages."""
        ...


@dataclass(frozen=True)
class ImageFiles:
    """Images in files below the folder `root`."""

    files: tuple[Path, ...]
    root: Path

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Path:
        return self.files[index]

    def key(self, index: int) -> str:
        return self.files[index].relative_to(self.root).as_posix()

    def name(self, index: int) -> str:
        return str(self.files[index])


class Annotation(Protocol):
    """The label of an image for multi-label classification, detection or segmentation."""

    def digest(self) -> str:
        """16 hexadecimal digits that change with the content."""
        ...

    def used_classes(self) -> set[int]:
        """Indices of the classes that the annotation contains or can contain."""
        ...

    def with_classes(self, new_index: Mapping[int, int]) -> Annotation:
        """The same annotation with other class indices, by old index."""
        ...

    def mismatch(self, name: str, size: tuple[int, int]) -> str | None:
        """An error message if the annotation does not fit the image `name` of this (width, height), else None."""
        ...


@dataclass(frozen=True, eq=False)
class Source(Generic[Label]):
    """Labeled images by index, not decoded.

    `indices` selects some of `images`; `labels` has one entry for each of those. `category_ids` are COCO's ids of the
    classes. `notes` are lines for the log: files that were ignored, assumptions.
    """

    images: Images
    labels: Sequence[Label]
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    indices: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample[Label]:
        i = self.index_of_image(index)
        return Sample(self.images[i], self.labels[index], self.images.name(i))

    def index_of_image(self, index: int) -> int:
        return index if self.indices is None else self.indices[index]

    def keys(self) -> Iterator[str]:
        """The key of each image; see `Images.key`."""
        return (self.images.key(self.index_of_image(i)) for i in range(len(self)))

    def subset(self, indices: Sequence[int]) -> Source[Label]:
        labels = tuple(self.labels[i] for i in indices)
        return replace(self, labels=labels, indices=tuple(self.index_of_image(i) for i in indices))


@dataclass(frozen=True, eq=False)
class Split:
    """One split of a dataset as read, before its labels are matched with the class names of a model.

    `labels` are class indices or class names, with None for an image without a label; or they are `Annotation`s.
    `class_names` are the names by class index, None if `labels` are names or indices without names. `location` names
    the split in messages. `category_ids` and `notes` as in `Source`.
    """

    location: str
    images: Images
    labels: Sequence[Any]
    class_names: tuple[str, ...] | None = None
    category_ids: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    def training_class_names(self) -> tuple[str, ...]:
        """Class names of a model trained on this split.

        Its own class names, else the sorted labels, else "0" to the highest class index.

        Raises:
            ValueError: see `_check`; or class labels with a single class, or with a class without images.
        """
        self._check()
        first = self.labels[0]
        if not isinstance(first, int | str):
            assert self.class_names is not None
            return self.class_names
        names = self.class_names
        if names is None:
            unique = set(self.labels)
            names = tuple(sorted(unique) if isinstance(first, str) else (str(i) for i in range(max(unique) + 1)))
        present = {names[label] if isinstance(label, int) else label for label in self.labels}
        if len(names) < 2:
            raise ValueError(f"{self.location}: found only {join_classes(names)}; expected two classes or more")
        empty = [name for name in names if name not in present]
        if empty:
            hint = "" if self.class_names else "; classes without names are numbered from 0 without gaps"
            raise ValueError(f"{self.location}: no images of {join_classes(empty)}; add some or remove the class{hint}")
        return names

    def source(self, class_names: tuple[str, ...]) -> Source[Any]:
        """The images, with labels that are indices into `class_names`.

        Classes are matched by name: their order may differ, and classes may be missing. Class indices without names
        are used as they are, unless their decimal forms are class names.

        Raises:
            ValueError: see `_check`; or a class that is not in `class_names`.
        """
        self._check()
        index_of = {name: index for index, name in enumerate(class_names)}
        labels: Sequence[Any]
        if isinstance(self.labels[0], int | str):
            labels, category_ids = self._class_indices(index_of), ()
        elif self.class_names == class_names:
            labels, category_ids = tuple(self.labels), self.category_ids
        else:
            assert self.class_names is not None
            names = self.class_names
            used = sorted({index for label in self.labels for index in label.used_classes()})
            self._refuse_unknown([names[i] for i in used], index_of)
            new_index = {i: index_of[name] for i, name in enumerate(names) if name in index_of}
            labels, category_ids = tuple(label.with_classes(new_index) for label in self.labels), ()
        return Source(self.images, labels, class_names, category_ids, self.notes)

    def _class_indices(self, index_of: Mapping[str, int]) -> tuple[int, ...]:
        are_indices = isinstance(self.labels[0], int)
        if self.class_names is not None and are_indices:
            names = [self.class_names[label] for label in self.labels]
        else:
            names = [str(label) for label in self.labels]
        if are_indices and self.class_names is None and not index_of.keys() >= set(names):
            self._check_range(len(index_of))
            return tuple(self.labels)
        self._refuse_unknown(sorted(set(names)), index_of)
        return tuple(index_of[name] for name in names)

    def _refuse_unknown(self, names: Sequence[str], known: Mapping[str, int]) -> None:
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(
                f"{self.location}: {join_classes(unknown)} not among the {len(known)} known classes "
                f"({join_names(known)}); rename or remove them"
            )

    def _check(self) -> None:
        """Raise ValueError for missing images or labels, indices mixed with names, indices or names out of range."""
        if not self.labels:
            raise ValueError(f"{self.location}: contains no images")
        if len(self.labels) != len(self.images):
            raise ValueError(f"{self.location}: {len(self.images)} images, but {len(self.labels)} labels")
        unlabeled = [i for i, label in enumerate(self.labels) if label is None]
        if unlabeled:
            raise ValueError(
                f"{self.images.name(unlabeled[0])}: {len(unlabeled)} of {len(self.labels)} images have no label, "
                "this one first; label or remove them"
            )
        kinds = {type(label) for label in self.labels}
        if kinds == {int, str}:
            index, name = (next(label for label in self.labels if isinstance(label, kind)) for kind in (int, str))
            raise ValueError(
                f"{self.location}: labels are class indices ({index}) and names ({name!r}); use one of the two"
            )
        if kinds == {int}:
            self._check_range(None if self.class_names is None else len(self.class_names))
        elif kinds == {str} and self.class_names is not None:
            self._refuse_unknown(sorted(set(self.labels)), {name: i for i, name in enumerate(self.class_names)})

    def _check_range(self, num_classes: int | None) -> None:
        for i, label in enumerate(self.labels):
            if label < 0 or (num_classes is not None and label >= num_classes):
                valid = "0 or more" if num_classes is None else f"from 0 to {num_classes - 1}"
                raise ValueError(f"{self.images.name(i)}: label {label} is out of range; it must be {valid}")


Splits = Mapping[str, Callable[[], Split]]
"""Functions that read the splits of a dataset: "train", "val", "test", or "all" if it is not divided."""


def divide(
    source: Source[Label], val_fraction: float, location: object, strata: Sequence[int] | None = None
) -> tuple[Source[Label], Source[Label]]:
    """Divide `source` into a training and a validation split.

    The validation split is `val_fraction` of the images of each class (of all images for boxes and masks), rounded:
    those whose keys have the smallest SHA-256 hashes. It does not depend on where the data are, and an image that is
    added or removed moves at most one other image between the splits. Each class has an image in both.

    `strata`, a number for each image, replaces the classes. An image that is alone in its stratum is for training.

    Raises:
        ValueError: a fraction outside (0, 1), a class with a single image, or only such strata.
    """
    check_val_fraction(val_fraction)
    hashes = [_hash(key) for key in source.keys()]  # noqa: SIM118 - not a mapping
    groups: dict[int | None, list[int]] = {}
    for i, label in enumerate(source.labels if strata is None else strata):
        groups.setdefault(label if isinstance(label, int) else None, []).append(i)
    val: set[int] = set()
    single = [label for label, indices in groups.items() if len(indices) < 2]
    if single and (strata is None or len(single) == len(groups)):
        names = [source.class_names[label] for label in single if label is not None and strata is None]
        many = f"{len(names):,} classes ({join_names(names)})"
        where = f"{location}: {many if len(names) > 1 else f'class {names[0]}'}" if names else location
        raise ValueError(f"{where}: one image is too few for a training and a validation split; add more")
    for indices in groups.values():
        num = min(max(1, round(val_fraction * len(indices))), len(indices) - 1)
        val.update(sorted(indices, key=hashes.__getitem__)[:num])
    train = [i for i in range(len(source)) if i not in val]
    return source.subset(train), source.subset(sorted(val))


def check_val_fraction(val_fraction: float) -> None:
    """Raise ValueError unless it is between 0 and 1."""
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}; it must be between 0 and 1")


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()[:6]  # a file name may not be valid UTF-8


def fingerprint(source: Source[Any]) -> str:
    """16 hexadecimal digits that change with the classes, the labels and the names of images, but not with pixels.

    Names are relative to the data folder, which may be moved.
    """
    digest = hashlib.sha256()
    labels = (str(label) if isinstance(label, int) else label.digest() for label in source.labels)
    for values in (source.class_names, labels, source.keys()):
        for value in values:
            # The length first, so that the names "ab", "c" differ from "a", "bc".
            encoded = value.encode(errors="surrogateescape")
            digest.update(len(encoded).to_bytes(4, "big") + encoded)
        digest.update(b"\xff" * 4)
    return digest.hexdigest()[:16]


def read_class_names(*folders: Path) -> tuple[str, ...] | None:
    """The lines of classes.txt in the first folder that has one: names by class index. None if no folder has one.

    Raises:
        ValueError: a file that is not UTF-8, an empty line, a duplicate name.
    """
    file = next((folder / "classes.txt" for folder in folders if (folder / "classes.txt").is_file()), None)
    if file is None:
        return None
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text ({first_line(error)}); save it as UTF-8") from None
    for i, name in enumerate(names):
        if not name:
            raise ValueError(f"{file}: line {i + 1} is empty; write one class per line")
        if name in names[:i]:
            raise ValueError(f"{file}: {name!r} is in lines {names.index(name) + 1} and {i + 1}; remove one")
    if not names:
        raise ValueError(f"{file}: is empty; write one class per line")
    return tuple(names)
