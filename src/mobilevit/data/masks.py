"""Masks: the label of a sample for segmentation, and the format of images/ and masks/ with the same names."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from mobilevit.data.samples import SPLIT_NAMES, ImageFiles, Split, Splits, read_class_names
from mobilevit.images import ImageError, list_images
from mobilevit.messages import first_line, join_names

IGNORE = 255  # the class index of pixels that are excluded from loss and metrics


@dataclass(frozen=True)
class MaskCoding:
    """The class index of each value of a mask, or IGNORE; and for colored masks the RGB color of each value."""

    indices: tuple[int, ...]
    colors: tuple[tuple[int, int, int], ...] | None = None


@dataclass(frozen=True)
class MaskFile:
    """The class of each pixel of an image, in a file that is not read yet."""

    file: Path
    coding: MaskCoding

    def read(self, width: int, height: int) -> np.ndarray:
        """(H, W) uint8, class indices and IGNORE. `width` and `height` are those of the upright image.

        Raises:
            ImageError: a missing or damaged file, a mask of another size, a value or color without a class.
        """
        try:
            with Image.open(self.file) as image:
                if problem := self._mismatch(image, (width, height)):
                    raise ImageError(problem)
                values = np.asarray(image if self.coding.colors is None else image.convert("RGB"))
        except ImageError:
            raise
        except Exception as error:  # Pillow raises many types
            why = os.strerror(error.errno).lower() if isinstance(error, OSError) and error.errno else first_line(error)
            raise ImageError(f"{self.file}: mask cannot be read ({why})") from None
        return self._from_values(values) if self.coding.colors is None else self._from_colors(values)

    def digest(self) -> str:
        text = repr((os.fsencode(self.file.name), self.coding.indices, self.coding.colors))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def used_classes(self) -> set[int]:
        return set(self.coding.indices) - {IGNORE}

    def with_classes(self, new_index: Mapping[int, int]) -> MaskFile:
        indices = tuple(IGNORE if index == IGNORE else new_index[index] for index in self.coding.indices)
        return replace(self, coding=replace(self.coding, indices=indices))

    def mismatch(self, name: str, size: tuple[int, int]) -> str | None:
        """The error that `read` will raise, as far as the file's header shows it; None if it shows none."""
        try:
            with Image.open(self.file) as image:
                return self._mismatch(image, size)
        except Exception:
            return f"{self.file}: mask cannot be read"

    def _mismatch(self, mask: Image.Image, size: tuple[int, int]) -> str | None:
        if mask.size != size:
            return f"{self.file}: {mask.width} x {mask.height} px, but its image has {size[0]} x {size[1]} px"
        if self.coding.colors is None and not (mask.mode in ("1", "L", "P", "I") or mask.mode.startswith("I;16")):
            return (
                f"{self.file}: a mask of mode {mask.mode}, but the classes have no colors; save class indices as "
                "palette or gray values, or write #rrggbb after each name in classes.txt"
            )
        return None

    def _from_values(self, values: np.ndarray) -> np.ndarray:
        indices = np.array(self.coding.indices, np.uint8)
        values = values.astype(np.int64)
        ignored, known = values == IGNORE, (values >= 0) & (values < len(indices))
        self._check(ignored | known, lambda y, x: f"value {values[y, x]}", f"0 to {len(indices) - 1}, and {IGNORE}")
        return np.where(ignored, np.uint8(IGNORE), indices[np.where(known, values, 0)])

    def _from_colors(self, values: np.ndarray) -> np.ndarray:
        assert self.coding.colors is not None
        table = np.array(self.coding.colors) @ (1 << 16, 1 << 8, 1)
        order = np.argsort(table)
        codes = values.astype(np.int64) @ (1 << 16, 1 << 8, 1)
        at = order[np.searchsorted(table[order], codes).clip(max=len(table) - 1)]
        known = table[at] == codes
        self._check(known, lambda y, x: f"color #{codes[y, x]:06x}", f"those of the {len(table)} classes")
        return np.array(self.coding.indices, np.uint8)[at]

    def _check(self, known: np.ndarray, describe: Callable[[int, int], str], expected: str) -> None:
        if not known.all():
            y, x = (int(i) for i in np.argwhere(~known)[0])
            raise ImageError(
                f"{self.file}: {describe(y, x)} at x {x}, y {y} has no class; expected {expected}; fix the mask or "
                "classes.txt"
            )


def split_of_masks(
    pairs: Sequence[tuple[Path, Path]],
    location: str,
    root: Path,
    class_names: tuple[str, ...],
    coding: MaskCoding,
    notes: tuple[str, ...] = (),
) -> Split:
    """A split of images in `root` with their masks. Raises ValueError if a mask is missing."""
    missing = [mask for _, mask in pairs if not mask.is_file()]
    if missing:
        raise ValueError(f"{join_names(missing)}: no such mask; add it or remove its image")
    images = ImageFiles(tuple(image for image, _ in pairs), root)
    return Split(location, images, [MaskFile(mask, coding) for _, mask in pairs], class_names, notes=notes)


def read_coding(*folders: Path) -> tuple[tuple[str, ...], MaskCoding] | None:
    """Class names and mask values from classes.txt in the first folder that has one, else None.

    The line number, from 0, is the value of the class. Lines like "road #804080" define colors instead; then the
    class "ignore" is IGNORE.

    Raises:
        ValueError: duplicate names or colors, colors for some classes only, fewer than 2 or more than 254 classes.
    """
    lines = read_class_names(*folders)
    if lines is None:
        return None
    file = next(folder / "classes.txt" for folder in folders if (folder / "classes.txt").is_file())
    matches = [re.fullmatch(r"(.*\S)\s+#([0-9a-fA-F]{6})", line) for line in lines]
    if not any(matches):
        names, coding = lines, MaskCoding(tuple(range(len(lines))))
    else:
        uncolored = [line for line, match in zip(lines, matches, strict=True) if match is None]
        if uncolored:
            raise ValueError(
                f"{file}: no color for {join_names(uncolored)}; write #rrggbb after every name, or after none"
            )
        pairs = [(match[1], bytes.fromhex(match[2])) for match in matches if match]
        names = tuple(name for name, _ in pairs if name != "ignore")
        for what, values in (("name", names), ("color", [color for _, color in pairs])):
            if len(set(values)) < len(values):
                raise ValueError(f"{file}: duplicate {what}; give every class its own")
        indices = tuple(IGNORE if name == "ignore" else names.index(name) for name, _ in pairs)
        coding = MaskCoding(indices, tuple((color[0], color[1], color[2]) for _, color in pairs))
    if not 2 <= len(names) < IGNORE:
        raise ValueError(f"{file}: {len(names)} classes; expected 2 to {IGNORE - 1}")
    return names, coding


def mask_folder_splits(data: Path) -> Splits:
    """images/ and masks/ in the folder of a split, or a folder per split in images/ and masks/, or not divided."""
    folders: dict[str, tuple[Path, Path]] = {}
    for name, split in SPLIT_NAMES.items():
        for images, masks in ((f"{name}/images", f"{name}/masks"), (f"images/{name}", f"masks/{name}")):
            if (data / images).is_dir() and (data / masks).is_dir():
                folders.setdefault(split, (data / images, data / masks))
    if not folders and (data / "images").is_dir() and (data / "masks").is_dir():
        folders["all"] = (data / "images", data / "masks")
    return {split: partial(_read_folders, data, *pair) for split, pair in folders.items()}


def _read_folders(data: Path, images: Path, masks: Path) -> Split:
    named = read_coding(data, images.parent)
    if named is None:
        raise ValueError(f"{data / 'classes.txt'}: no such file; write one class per line, line 1 for the value 0")
    pairs = [(image, (masks / image.relative_to(images)).with_suffix(".png")) for image in list_images(images)]
    unused = sorted(set(masks.rglob("*.png")) - {mask for _, mask in pairs})
    notes = (f"{masks}: ignored, masks without an image: {join_names(mask.name for mask in unused)}",) if unused else ()
    return split_of_masks(pairs, str(images), data, *named, notes=notes)
