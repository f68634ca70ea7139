"""Classification data in folders: one folder of images per class."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from mobilevit.data.samples import ImageFiles, Split, Splits
from mobilevit.images import list_images, scan_folder
from mobilevit.messages import join_names


def class_folder_splits(data: Path) -> Splits:
    """The class folders in train/, val/ and test/ of `data`, or else in `data` itself."""
    names = [name for name in ("train", "val", "test") if (data / name).is_dir()]
    folders = {name: data / name for name in names} or {"all": data}
    return {name: partial(_read_class_folders, folder, data) for name, folder in folders.items()}


def has_class_folders(data: Path) -> bool:
    """Whether at least two folders of `data`, or of its train/, contain an image."""
    root = data / "train" if (data / "train").is_dir() else data
    return len(list(itertools.islice(filter(list_images, _folders(root)), 2))) == 2


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _read_class_folders(root: Path, data: Path) -> Split:
    folders = _folders(root)
    files: list[Path] = []
    labels: list[int] = []
    ignored: list[Path] = []
    for label, folder in enumerate(folders):
        images, others = scan_folder(folder)
        if not images:
            contents = f" (it contains {_count_by_suffix(others)})" if others else ""
            raise ValueError(f"{folder}: no images in this class{contents}; fill or remove it")
        files += images
        labels += [label] * len(images)
        ignored += others
    if not files:
        raise ValueError(f"{root}: no class folders with images; expected one folder of images for each class")
    notes = (f"{root}: ignored, not images: {_count_by_suffix(ignored)}",) if ignored else ()
    class_names = tuple(folder.name for folder in folders)
    return Split(str(root), ImageFiles(tuple(files), data), labels, class_names, notes=notes)


def _count_by_suffix(files: Sequence[Path]) -> str:
    """The number of files per suffix, and the names of the first five files."""
    counts = Counter(file.suffix.lower() or "without a suffix" for file in files)
    return f"{', '.join(f'{num:,} {suffix}' for suffix, num in counts.most_common())}: {join_names(files)}"
