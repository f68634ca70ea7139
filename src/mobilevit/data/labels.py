"""What is known of an image beyond one class: boxes, a mask; and a split of such images as it was found."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic

import numpy as np
from PIL import Image

from mobilevit.data.archives import read_class_names
from mobilevit.data.samples import Label, few
from mobilevit.images import ImageError, first_line, read_header

IGNORE = 255  # the value in a mask of what is neither learnt from nor counted


@dataclass(frozen=True, eq=False)
class Boxes:
    """What is in an image: N boxes, none of them empty, none beyond the image's edge.

    `crowd` is COCO's iscrowd or VOC's difficult: nothing to learn from, and no fault to miss. `areas` are the objects'
    own where the annotation tells them, else those of the boxes. `size` is the image's width and height in pixels as
    the annotation has it, None where it does not tell.
    """

    corners: np.ndarray  # (N, 4) float32, x1 y1 x2 y2 in pixels of the upright image
    labels: np.ndarray  # (N,) int64, class numbers from 0; there is none for the background
    crowd: np.ndarray  # (N,) bool
    areas: np.ndarray  # (N,) float32, px^2
    size: tuple[int, int] | None = None

    def digest(self) -> str:
        """16 hexadecimal digits that change with any of the numbers."""
        arrays = (self.corners, self.labels, self.crowd, self.areas)
        return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]


@dataclass(frozen=True)
class Coding:
    """What the values of masks mean: `numbers` are class numbers by value, IGNORE for none.

    Where masks are coloured, `colors` has the RGB of every value.
    """

    numbers: tuple[int, ...]
    colors: tuple[tuple[int, int, int], ...] | None = None


@dataclass(frozen=True)
class MaskFile:
    """The class of every pixel of an image, in a file still to be read."""

    file: Path
    classes: Coding

    def read(self, width: int, height: int) -> np.ndarray:
        """(H, W) uint8, class numbers and IGNORE. `width` and `height` are those of the upright image.

        Raises:
            ImageError: no such file, no image, another size, a value or colour that is no class.
        """
        try:
            with Image.open(self.file) as image:
                size, mode = image.size, image.mode
                if fault := self._fault(size, mode, (width, height)):
                    raise ImageError(fault)
                values = np.asarray(image if self.classes.colors is None else image.convert("RGB"))
        except ImageError:
            raise
        except Exception as error:  # Pillow raises nearly anything
            why = os.strerror(error.errno).lower() if isinstance(error, OSError) and error.errno else first_line(error)
            raise ImageError(f"{self.file}: mask cannot be read ({why})") from None
        return self._of_colors(values) if self.classes.colors is not None else self._of_values(values)

    def fault(self, width: int, height: int) -> str | None:
        """What `read` will refuse, as far as the file's header tells."""
        try:
            with Image.open(self.file) as image:
                return self._fault(image.size, image.mode, (width, height))
        except Exception:
            return f"{self.file}: mask cannot be read"

    def digest(self) -> str:
        """16 hexadecimal digits that change with the name of the file and the meaning of its values."""
        text = repr((os.fsencode(self.file.name), self.classes.numbers, self.classes.colors))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _fault(self, size: tuple[int, int], mode: str, expected: tuple[int, int]) -> str | None:
        if size != expected:
            return f"{self.file}: {by(size)} px, but its image is {by(expected)}; they must be of one size"
        if self.classes.colors is None and not (mode in ("1", "L", "P", "I") or mode.startswith("I;16")):
            return (
                f"{self.file}: a mask of kind {mode}, while the classes have no colours; save class numbers as palette "
                "or grey, or write #rrggbb after each name in classes.txt"
            )
        return None

    def _of_values(self, values: np.ndarray) -> np.ndarray:
        numbers = np.array(self.classes.numbers, np.uint8)
        values = values.astype(np.int64)
        ignored, known = values == IGNORE, (values >= 0) & (values < len(numbers))
        self._check(ignored | known, lambda y, x: f"value {values[y, x]}", f"0 to {len(numbers) - 1}, and {IGNORE}")
        return np.where(ignored, np.uint8(IGNORE), numbers[np.where(known, values, 0)])

    def _of_colors(self, values: np.ndarray) -> np.ndarray:
        assert self.classes.colors is not None
        table = np.array(self.classes.colors) @ (1 << 16, 1 << 8, 1)
        order = np.argsort(table)
        codes = values.astype(np.int64) @ (1 << 16, 1 << 8, 1)
        at = order[np.searchsorted(table[order], codes).clip(max=len(table) - 1)]
        known = table[at] == codes
        self._check(known, lambda y, x: f"colour #{codes[y, x]:06x}", f"those of the {len(table)} classes")
        return np.array(self.classes.numbers, np.uint8)[at]

    def _check(self, known: np.ndarray, what: Callable[[int, int], str], expected: str) -> None:
        if not known.all():
            y, x = (int(i) for i in np.argwhere(~known)[0])
            raise ImageError(
                f"{self.file}: {what(y, x)} at x {x}, y {y} is no class; expected {expected}; mend it or classes.txt"
            )


@dataclass(frozen=True)
class AnnotatedPart(Generic[Label]):
    """A split as it was found, with class numbers of its own."""

    where: str
    files: Sequence[Path]
    labels: Sequence[Label]
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()
    category_ids: tuple[int, ...] = ()  # of the classes, where the annotations number them


Parts = Mapping[str, Callable[[], AnnotatedPart[Label]]]


def upright_size(image: Path) -> tuple[int, int] | None:
    """Width and height by the header, as `read_image` turns it; None for what is no image."""
    with contextlib.suppress(ImageError):
        return read_header(image, of_any_size=True).size  # a limit must not change the boxes
    return None


def by(size: tuple[int, int]) -> str:
    """Width and height for the middle of a sentence."""
    return f"{size[0]} x {size[1]}"


# --- Boxes ------------------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """The boxes of an image, one by one."""

    file: Path
    size: tuple[int, int] | None
    corners: list[tuple[float, float, float, float]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    crowd: list[bool] = field(default_factory=list)
    areas: list[float | None] = field(default_factory=list)


def part_of_boxes(found: Iterable[Found], where: str, class_names: tuple[str, ...]) -> AnnotatedPart[Boxes]:
    """With what sticks out of images cut off, and boxes that are then empty left out."""
    files, labels, empty = [], [], []
    for one in found:
        files.append(one.file)
        # Without a size there is nothing to compare with later on; what is no image is found then.
        width, height = one.size or upright_size(one.file) or (np.inf, np.inf)
        corners = np.array(one.corners, np.float64).reshape(-1, 4).clip(0, np.array([width, height] * 2))
        corners = corners.astype(np.float32)
        sides = corners[:, 2:] - corners[:, :2]
        kept = (sides > 0).all(1)  # not where a number is NaN, nor infinite on both sides
        empty += [one.file] * int((~kept).sum())
        areas = [a if a is not None and a > 0 else x for a, x in zip(one.areas, sides.prod(1), strict=True)]
        labels.append(
            Boxes(
                corners[kept],
                np.array(one.labels, np.int64)[kept],
                np.array(one.crowd, bool)[kept],
                np.array(areas, np.float32)[kept],
                one.size,
            )
        )
    notes = ()
    if empty:
        num = f"{len(empty)} boxes" if len(empty) > 1 else "1 box"
        notes = (f"{where}: {num} without area in the image left out, first in {empty[0].name}",)
    return AnnotatedPart(where, files, labels, class_names, notes)


# --- Masks ------------------------------------------------------------------------------------------------------------


def part_of_masks(
    pairs: Sequence[tuple[Path, Path]], where: str, class_names: tuple[str, ...], coding: Coding
) -> AnnotatedPart[MaskFile]:
    """Images with their masks, all of which are there.

    Raises:
        ValueError: masks that are not.
    """
    missing = [str(mask) for _, mask in pairs if not mask.is_file()]
    if missing:
        raise ValueError(f"{few(missing)}: no such mask; add it or remove its image")
    masks = [MaskFile(mask, coding) for _, mask in pairs]
    return AnnotatedPart(where, [image for image, _ in pairs], masks, class_names)


def read_coding(*folders: Path) -> tuple[tuple[str, ...], Coding] | None:
    """Names of classes and the meaning of values by classes.txt in the first folder that has one, else None.

    Raises:
        ValueError: names or colours that come twice, colours for some classes only, too few or too many classes.
    """
    lines = read_class_names(*folders)
    if lines is None:
        return None
    file = next(folder / "classes.txt" for folder in folders if (folder / "classes.txt").is_file())
    matches = [re.fullmatch(r"(.*\S)\s+#([0-9a-fA-F]{6})", line) for line in lines]
    if not any(matches):
        names, coding = lines, Coding(tuple(range(len(lines))))
    else:
        uncolored = [line for line, match in zip(lines, matches, strict=True) if match is None]
        if uncolored:
            raise ValueError(
                f"{file}: {few(uncolored)}: no colour, while others have one; write #rrggbb after the name"
            )
        pairs = [(match[1], bytes.fromhex(match[2])) for match in matches if match]
        names = tuple(name for name, _ in pairs if name != "ignore")
        for what, values in (("name", names), ("colour", [color for _, color in pairs])):
            if len(set(values)) < len(values):
                raise ValueError(f"{file}: a {what} comes twice; every class has one of its own")
        numbers = tuple(IGNORE if name == "ignore" else names.index(name) for name, _ in pairs)
        coding = Coding(numbers, tuple((color[0], color[1], color[2]) for _, color in pairs))
    if not 2 <= len(names) < IGNORE:
        raise ValueError(f"{file}: {len(names)} classes; expected 2 to {IGNORE - 1}")
    return names, coding
