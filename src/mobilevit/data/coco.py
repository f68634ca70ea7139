"""Boxes as COCO, Roboflow and CVAT keep them: one .json for a split."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from mobilevit.data.labels import AnnotatedPart, Boxes, Found, Parts, part_of_boxes
from mobilevit.data.samples import few
from mobilevit.data.sources import SPLITS
from mobilevit.images import first_line


def coco_parts(data: Path) -> Parts[Boxes]:
    """How to read what is found in `data`; nothing where there is nothing of the kind.

    Raises:
        ValueError: two files for one split, images for validation without one; and when a part is read, whatever is
            wrong with it.
    """
    found: dict[str, list[tuple[Path, Path]]] = {}
    for file in sorted((data / "annotations").glob("instances_*.json")):
        name = file.stem.removeprefix("instances_")
        word = re.match("[a-z]*", name.lower())
        split = SPLITS.get(word[0] if word else "", "all")
        places = [data / name, data / split, data / "images" / name, data / "images" / split, data / "images"]
        found.setdefault(split, []).append((file, next((place for place in places if place.is_dir()), data / name)))
    for name, split in SPLITS.items():
        file = data / name / "_annotations.coco.json"
        if file.is_file():
            found.setdefault(split, []).append((file, file.parent))
    if "train" in found and "val" not in found:
        _refuse_unannotated(data)
    if not found:
        folder = data / "images" if (data / "images").is_dir() else data
        for file in sorted(data.glob("*.json")) if folder != data or _has_images(data) else ():
            words = {SPLITS[word] for word in re.split("[^a-z]+", file.stem.lower()) if word in SPLITS}
            found.setdefault(words.pop() if len(words) == 1 else "all", []).append((file, folder))
    for files in found.values():
        if len(files) > 1:
            names = few([str(file.relative_to(data)) for file, _ in files])
            raise ValueError(f"{data}: {names} are of the same split; leave one of them there")
    return {split: partial(_read_coco, *files[0]) for split, files in found.items()}


def _refuse_unannotated(data: Path) -> None:
    """Of images in val2017/ or the like: to hold out others instead is not what whoever put them there meant."""
    for root in (data, data / "images"):
        for folder in sorted(root.iterdir()) if root.is_dir() else ():
            word = re.match("[a-z]*", folder.name.lower())
            if word and SPLITS.get(word[0]) == "val" and _has_images(folder):
                raise ValueError(
                    f"{folder}: images for validation, but no annotations of them (instances_{folder.name}.json, or "
                    "_annotations.coco.json among them); add these or move the folder elsewhere"
                )


def _has_images(folder: Path) -> bool:
    """Whether some lie in the folder itself, so that a .json beside something else is not taken for COCO's."""
    endings = Image.registered_extensions()
    return folder.is_dir() and any(file.suffix.lower() in endings for file in folder.iterdir())


def _read_coco(file: Path, folder: Path) -> AnnotatedPart[Boxes]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: not JSON ({first_line(error)}); export or copy it again") from None
    if not isinstance(content, dict) or not all(
        isinstance(content.get(key), list) for key in ("images", "annotations", "categories")
    ):
        raise ValueError(f"{file}: not as COCO's; expected the lists images, annotations and categories")

    names: dict[int, str] = {}
    for number, entry in _entries(file, content, "categories", ("id", "name")):
        if number in names or entry["name"] in names.values():
            raise ValueError(f"{file}: category {number} ({entry['name']!r}) is listed twice; remove or rename one")
        names[number] = str(entry["name"])
    label_of = {number: label for label, number in enumerate(sorted(names))}

    found: dict[int, Found] = {}
    for number, entry in _entries(file, content, "images", ("id", "file_name")):
        image = folder / str(entry["file_name"])
        if number in found:
            raise ValueError(f"{file}: image {number} ({entry['file_name']}) is listed twice; remove one")
        if ".." in image.parts[len(folder.parts) :] or not image.is_relative_to(folder):
            raise ValueError(f"{file}: image {number} ({entry['file_name']}) is not below {folder}; move it there")
        if not image.is_file():
            raise ValueError(f"{image}: no such file, but {file.name} lists it; add it or remove the entry")
        width, height = entry.get("width"), entry.get("height")
        size = (width, height) if isinstance(width, int) and isinstance(height, int) else None
        found[number] = Found(image, size if size and min(size) > 0 else None)

    for number, entry in _entries(file, content, "annotations", ("id", "image_id", "category_id", "bbox")):
        for key, known in (("image_id", found), ("category_id", label_of)):
            if entry[key] not in known:
                raise ValueError(f"{file}: annotation {number} has the unknown {key} {entry[key]}; mend or remove it")
        try:
            x, y, width, height = (float(value) for value in entry["bbox"])
            area = None if entry.get("area") is None else float(entry["area"])
        except (TypeError, ValueError):
            raise ValueError(
                f"{file}: annotation {number} has the bbox {entry['bbox']} and the area {entry.get('area')}; expected "
                "[x, y, width, height] and a number"
            ) from None
        one = found[entry["image_id"]]
        one.corners.append((x, y, x + width, y + height))
        one.labels.append(label_of[entry["category_id"]])
        one.crowd.append(bool(entry.get("iscrowd", 0)))
        one.areas.append(area)
    part = part_of_boxes(found.values(), str(file), tuple(names[number] for number in sorted(names)))
    return replace(part, category_ids=tuple(sorted(names)))


def _entries(file: Path, content: dict[str, Any], kind: str, needed: Sequence[str]) -> Iterator[tuple[int, dict]]:
    """The entries of a list in a COCO file with their ids, each with what is needed of it."""
    for i, entry in enumerate(content[kind]):
        missing = [key for key in needed if not isinstance(entry, dict) or key not in entry]
        if missing:
            raise ValueError(f"{file}: {kind}[{i}] has no {few(missing)}; mend or remove it")
        ids = [entry[key] for key in needed if key.endswith("id")]
        if not all(isinstance(number, int) for number in ids):
            raise ValueError(f"{file}: {kind}[{i}] has the ids {few([repr(x) for x in ids])}; expected whole numbers")
        yield entry["id"], entry
