"""COCO: the boxes of a split in one .json file, also as Roboflow and CVAT export it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from mobilevit.data.boxes import AnnotatedBoxes, split_of_boxes
from mobilevit.data.samples import SPLIT_NAMES, Split, Splits
from mobilevit.messages import first_line, join_names


def coco_splits(data: Path) -> Splits:
    """Annotation files of `data` by split; empty if there are none.

    Raises:
        ValueError: two files for one split; a folder of validation images without annotations.
    """
    files: dict[str, list[tuple[Path, Path]]] = {}
    for file in sorted((data / "annotations").glob("instances_*.json")):
        name = file.stem.removeprefix("instances_")
        split = _split_at_start(name) or "all"
        places = [data / name, data / split, data / "images" / name, data / "images" / split, data / "images"]
        files.setdefault(split, []).append((file, next((place for place in places if place.is_dir()), data / name)))
    for name, split in SPLIT_NAMES.items():
        file = data / name / "_annotations.coco.json"
        if file.is_file():
            files.setdefault(split, []).append((file, file.parent))
    if "train" in files and "val" not in files:
        _refuse_unannotated(data)
    if not files:
        folder = data / "images" if (data / "images").is_dir() else data
        for file in sorted(data.glob("*.json")) if folder != data or _has_images(data) else ():
            words = re.split("[^a-z]+", file.stem.lower())
            splits = {SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES}
            files.setdefault(splits.pop() if len(splits) == 1 else "all", []).append((file, folder))
    for of_split in files.values():
        if len(of_split) > 1:
            names = join_names(file.relative_to(data) for file, _ in of_split)
            raise ValueError(f"{data}: {names} are of the same split; remove all but one")
    return {split: partial(_read_coco, data, *of_split[0]) for split, of_split in files.items()}


def _split_at_start(name: str) -> str | None:
    """The split of a name like "val2017"."""
    word = re.match("[a-z]*", name.lower())
    return SPLIT_NAMES.get(word[0]) if word else None


def _refuse_unannotated(data: Path) -> None:
    """Raise ValueError for validation images without annotations: dividing the training data would ignore them."""
    for root in (data, data / "images"):
        for folder in sorted(root.iterdir()) if root.is_dir() else ():
            if _split_at_start(folder.name) == "val" and _has_images(folder):
                raise ValueError(
                    f"{folder}: validation images without annotations; add instances_{folder.name}.json or "
                    "_annotations.coco.json, or move the folder elsewhere"
                )


def _has_images(folder: Path) -> bool:
    """Whether the folder itself contains images. Without images, a .json in it is not read as COCO."""
    suffixes = Image.registered_extensions()
    return folder.is_dir() and any(file.suffix.lower() in suffixes for file in folder.iterdir())


def _read_coco(data: Path, file: Path, folder: Path) -> Split:
    content = _read_json(file)
    names: dict[int, str] = {}
    for category, entry in _entries(file, content, "categories", ("id", "name")):
        if category in names or entry["name"] in names.values():
            raise ValueError(f"{file}: category {category} ({entry['name']!r}) is a duplicate; remove or rename one")
        names[category] = str(entry["name"])
    category_ids = tuple(sorted(names))
    label_of = {category: label for label, category in enumerate(category_ids)}

    boxes_of: dict[int, AnnotatedBoxes] = {}
    for image_id, entry in _entries(file, content, "images", ("id", "file_name")):
        image = folder / str(entry["file_name"])
        if image_id in boxes_of:
            raise ValueError(f"{file}: image {image_id} ({entry['file_name']}) is a duplicate; remove one")
        if ".." in image.parts[len(folder.parts) :] or not image.is_relative_to(folder):
            raise ValueError(f"{file}: image {image_id} ({entry['file_name']}) is not below {folder}; move it there")
        if not image.is_file():
            raise ValueError(f"{image}: no such file, but {file.name} lists it; add it or remove the entry")
        width, height = entry.get("width"), entry.get("height")
        size = (width, height) if isinstance(width, int) and isinstance(height, int) else None
        boxes_of[image_id] = AnnotatedBoxes(image, size if size and min(size) > 0 else None)

    for annotation, entry in _entries(file, content, "annotations", ("id", "image_id", "category_id", "bbox")):
        for key, known in (("image_id", boxes_of), ("category_id", label_of)):
            if entry[key] not in known:
                raise ValueError(
                    f"{file}: annotation {annotation} has the unknown {key} {entry[key]}; fix or remove it"
                )
        try:
            x, y, width, height = (float(value) for value in entry["bbox"])
            area = None if entry.get("area") is None else float(entry["area"])
        except (TypeError, ValueError):
            raise ValueError(
                f"{file}: annotation {annotation} has the bbox {entry['bbox']} and the area {entry.get('area')}; "
                "expected [x, y, width, height] and a number"
            ) from None
        corners, crowd = (x, y, x + width, y + height), bool(entry.get("iscrowd", 0))
        boxes_of[entry["image_id"]].add(corners, label_of[entry["category_id"]], crowd, area)
    class_names = tuple(names[category] for category in category_ids)
    return split_of_boxes(boxes_of.values(), str(file), data, class_names, category_ids)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: not JSON ({first_line(error)}); export or copy it again") from None
    keys = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in keys):
        raise ValueError(f"{file}: not COCO; expected the lists {', '.join(keys)}")
    return content


def _entries(file: Path, content: dict[str, Any], name: str, required: Sequence[str]) -> Iterator[tuple[int, dict]]:
    """The entries of a list of a COCO file with their ids. Raises ValueError for missing keys and other ids."""
    for i, entry in enumerate(content[name]):
        missing = [key for key in required if not isinstance(entry, dict) or key not in entry]
        if missing:
            raise ValueError(f"{file}: {name}[{i}] has no {join_names(missing)}; fix or remove it")
        ids = [entry[key] for key in required if key.endswith("id")]
        if not all(isinstance(x, int) for x in ids):
            raise ValueError(f"{file}: {name}[{i}] has the ids {join_names(map(repr, ids))}; expected whole numbers")
        yield entry["id"], entry
