"""The classes of an image: the label of a sample for multi-label classification."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mobilevit.data.samples import Images, Split
from mobilevit.messages import join_classes, join_names

SEPARATORS = "|;"  # between the labels of an image in one text


@dataclass(frozen=True)
class ClassSet:
    """The class indices of an image, ascending. An image may have none."""

    indices: tuple[int, ...]

    def digest(self) -> str:
        return hashlib.sha256(repr(self.indices).encode()).hexdigest()[:16]

    def used_classes(self) -> set[int]:
        return set(self.indices)

    def with_classes(self, new_index: Mapping[int, int]) -> ClassSet:
        return ClassSet(tuple(sorted(new_index[index] for index in self.indices)))

    def mismatch(self, name: str, size: tuple[int, int]) -> str | None:
        return None  # no size contradicts a class


def labels_of(value: object) -> tuple[str, ...] | None:
    """The labels in one value of a table or of JSON, sorted and without repetitions; None if it is of another type.

    A value is a text with one label or with several, separated by | or ;, a number, a list of those, or None.
    """
    if value is None:
        return ()
    if isinstance(value, float) and (value.is_integer() or value != value):  # tables of numbers with empty cells
        value = int(value) if value == value else ""
    if isinstance(value, list | tuple):
        parts = [labels_of(item) for item in value]
        return None if None in parts else tuple(sorted({label for part in parts for label in part or ()}))
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    for separator in SEPARATORS:
        value = str(value).replace(separator, "\n")
    return tuple(sorted({label.strip() for label in str(value).splitlines() if label.strip()}))


def split_of_labels(
    location: str,
    images: Images,
    labels: Sequence[tuple[str, ...] | None],
    class_names: tuple[str, ...] | None,
    *,
    multilabel: bool,
    notes: tuple[str, ...] = (),
) -> Split:
    """A split of images with the labels of each: class names, or decimal indices into `class_names`.

    None is an image whose labels are unknown, which is an error later. Without `class_names`, the classes are the
    sorted labels; numbers are sorted by value. For a single label per image, each tuple must have one.

    Raises:
        ValueError: a label that is not among `class_names`.
    """
    used = {label for of_image in labels for label in of_image or ()}
    are_numbers = all(label.isdecimal() for label in used)
    if class_names is None:
        class_names = tuple(sorted(used, key=lambda name: (int(name), name)) if are_numbers else sorted(used))
    elif not used <= set(class_names):
        known = {str(i): name for i, name in enumerate(class_names)}
        if unknown := sorted(used - known.keys() if are_numbers else used - set(class_names)):
            raise ValueError(
                f"{location}: {join_classes(unknown)} not among the {len(class_names)} classes of classes.txt "
                f"({join_names(class_names)}); add or rename them"
            )
        labels = [of_image and tuple(known[label] for label in of_image) for of_image in labels]
    if not multilabel:
        return Split(location, images, [of_image and of_image[0] for of_image in labels], class_names, notes=notes)
    index_of = {name: index for index, name in enumerate(class_names)}
    sets = [
        None if of_image is None else ClassSet(tuple(sorted(map(index_of.__getitem__, of_image))))
        for of_image in labels
    ]
    return Split(location, images, sets, class_names, notes=notes)


def rarest_classes(labels: Iterable[ClassSet]) -> list[int]:
    """The rarest class of each image, -1 for an image without classes: its stratum when images are divided."""
    labels = list(labels)
    counts = Counter(index for label in labels for index in label.indices)
    return [min(label.indices, key=lambda index: (counts[index], index), default=-1) for label in labels]
