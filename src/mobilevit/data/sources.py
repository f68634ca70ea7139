"""Where pictures come from. A source has a length, class names, and gives one `Sample` per index."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from mobilevit.pictures import PictureError, picture_files, read_picture


@dataclass(frozen=True)
class Sample:
    """A picture (upright RGB), the number of its class, and a name to find it by."""

    picture: Image.Image
    label: int
    name: str


class Source(Protocol):
    """Labelled pictures by index."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by class number."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Raises PictureError where the picture cannot be read."""
        ...


@dataclass(frozen=True)
class Folder:
    """Pictures in folders named after their class."""

    files: tuple[Path, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        file = self.files[index]
        return Sample(read_picture(file), self.labels[index], str(file))


def find_splits(data: Path, val_fraction: float) -> tuple[Folder, Folder]:
    """Training and validation pictures of a folder.

    Either `data` holds `train/` and `val/` (or `test/`), each with a folder a class, or it holds a folder a class, and
    about `val_fraction` of every class is held out: each picture by chance, drawn from its name below `data` alone, so
    that adding pictures moves none of the others. Where chance would leave one side of a class empty, as it may
    where a class has few pictures, one is put there.

    Hidden files and folders are passed over.

    Raises:
        ValueError: no such folder, no class folders, an empty class, a class in val that train lacks.
    """
    if not data.is_dir():
        raise ValueError(f"{data}: no such folder")
    if (data / "train").is_dir():
        val = held_out_folder(data)
        if val is None:
            raise ValueError(
                f"{data}: has train/ but neither val/ nor test/; add one, or put the class folders in {data}"
            )
        class_names = _class_names(data / "train")
        return _read_folder(data / "train", class_names), _read_folder(val, class_names)

    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}; it must be between 0 and 1")
    everything = _read_folder(data, _class_names(data))
    val_indices: set[int] = set()
    indices_of: list[list[int]] = [[] for _ in everything.class_names]
    for i, label in enumerate(everything.labels):
        indices_of[label].append(i)
    chances = [_chance(file.relative_to(data).as_posix()) for file in everything.files]
    for class_name, indices in zip(everything.class_names, indices_of, strict=True):
        if len(indices) < 2:
            raise ValueError(f"{data / class_name}: one picture is too few to train on some and validate on others")
        indices.sort(key=lambda i: chances[i])
        num_val = sum(chances[i] < val_fraction for i in indices)
        val_indices.update(indices[: min(max(1, num_val), len(indices) - 1)])
    train_indices = [i for i in range(len(everything)) if i not in val_indices]
    return _select(everything, train_indices), _select(everything, sorted(val_indices))


def check_headers(*folders: Folder) -> None:
    """Look at the beginning of every file, which is quick, so that what is no picture is known before training starts.

    Raises:
        PictureError: the files that are not pictures, five by name. (A picture cut short is found when it is read.)
    """

    def is_picture(file: Path) -> bool:
        try:
            with file.open("rb") as opened, Image.open(opened):
                return True
        except Exception:  # Pillow raises nearly anything
            return False

    files = [file for folder in folders for file in folder.files]
    with ThreadPoolExecutor() as pool:
        wrong = [str(file) for file, right in zip(files, pool.map(is_picture, files), strict=True) if not right]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise PictureError(f"{', '.join(wrong[:5])}{more}: not pictures; mend or remove them")


def find_evaluation(data: Path, class_names: Sequence[str]) -> Folder:
    """The pictures that a network with `class_names` is evaluated on: `val/` or `test/` of `data`, or all of `data`.

    Raises:
        ValueError: no such folder, no class folders, or one whose name is not among `class_names`.
    """
    if not data.is_dir():
        raise ValueError(f"{data}: no such folder")
    return _read_folder(held_out_folder(data) or data, tuple(class_names))


def held_out_folder(data: Path) -> Path | None:
    """`val/` of `data`, or else `test/`, or None where it has neither."""
    return next((data / name for name in ("val", "test") if (data / name).is_dir()), None)


def _class_names(root: Path) -> tuple[str, ...]:
    names = tuple(sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")))
    if len(names) < 2:
        found = f"only the folder {names[0]}" if names else "no folders"
        raise ValueError(f"{root}: found {found}; expected one folder of pictures for each of two classes or more")
    return names


def _read_folder(root: Path, class_names: tuple[str, ...]) -> Folder:
    label_of = {name: label for label, name in enumerate(class_names)}
    files: list[Path] = []
    labels: list[int] = []
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")):
        if folder.name not in label_of:
            known = ", ".join(class_names[:5]) + (", ..." if len(class_names) > 5 else "")
            raise ValueError(f"{folder}: {folder.name!r} is not one of the {len(class_names)} classes ({known})")
        found = picture_files(folder)
        if not found:
            raise ValueError(f"{folder}: no pictures in this class; fill or remove it")
        files.extend(found)
        labels.extend([label_of[folder.name]] * len(found))
    if not files:
        raise ValueError(f"{root}: no class folders with pictures")
    return Folder(tuple(files), tuple(labels), class_names)


def _chance(name: str) -> float:
    """A number from 0 to below 1, evenly spread over all names."""
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).digest()  # a name may be no valid UTF-8
    return int.from_bytes(digest[:6], "big") / 2**48


def _select(folder: Folder, indices: Sequence[int]) -> Folder:
    return Folder(tuple(folder.files[i] for i in indices), tuple(folder.labels[i] for i in indices), folder.class_names)
