"""Boxes and masks as PASCAL VOC keeps them: a .xml or a .png for an image."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from mobilevit.data.labels import (
    AnnotatedPart,
    Boxes,
    Coding,
    Found,
    MaskFile,
    Parts,
    part_of_boxes,
    part_of_masks,
    read_coding,
)
from mobilevit.data.samples import few
from mobilevit.images import first_line

VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


def _voc_root(data: Path) -> Path:
    """The folder with JPEGImages: `data`, or the one below it or its VOCdevkit/ that has some."""
    if (data / "JPEGImages").is_dir():
        return data
    for folder in (data, data / "VOCdevkit"):
        roots = sorted(path.parent for path in folder.glob("*/JPEGImages"))
        if len(roots) > 1:
            raise ValueError(f"{data}: holds {few([root.name for root in roots])}; name one of them")
        if roots and (folder != data or roots[0].name.startswith("VOC")):
            return roots[0]
    return data


def _voc_stems(root: Path, sets: str, default: Iterable[Path]) -> dict[str, list[str]]:
    """Names of images by split, as ImageSets tells them; all of those in `default` where it does not."""
    stems: dict[str, list[str]] = {}
    for split, name in (("train", "train"), ("val", "val"), ("test", "test"), ("all", "trainval")):
        file = root / "ImageSets" / sets / f"{name}.txt"
        if file.is_file() and not (split == "all" and "train" in stems):
            stems[split] = [line.split()[0] for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not stems:
        stems = {"all": sorted(path.stem for path in default)}
    return {split: found for split, found in stems.items() if found}


def _voc_image(root: Path, stem: str) -> Path:
    images = [root / "JPEGImages" / f"{stem}{ending}" for ending in (".jpg", ".jpeg", ".png", ".JPG")]
    found = next((image for image in images if image.is_file()), None)
    if found is None:
        raise ValueError(f"{images[0]}: no such file, but the annotations name it; add it or take it off the list")
    return found


def voc_box_parts(data: Path) -> Parts[Boxes]:
    """How to read the boxes of what is found in `data`; nothing where there is nothing of the kind.

    Raises:
        ValueError: several years of VOC; and when a part is read, whatever is wrong with it.
    """
    root = _voc_root(data)
    files = list((root / "Annotations").glob("*.xml"))
    if not (root / "JPEGImages").is_dir() or not files:
        return {}
    return {split: partial(_read_voc, root, split, stems) for split, stems in _voc_stems(root, "Main", files).items()}


def _read_voc(root: Path, split: str, stems: Sequence[str]) -> AnnotatedPart[Boxes]:
    objects = []
    for stem in stems:
        image = _voc_image(root, stem)
        file = root / "Annotations" / f"{stem}.xml"
        if not file.is_file():
            raise ValueError(
                f"{file}: no such file; add it, or take {stem} out of the lists in {root / 'ImageSets' / 'Main'}"
            )
        objects.append((image, *_read_xml(file)))
    class_names = tuple(sorted({name for _, _, things in objects for name, _, _ in things}))
    label_of = {name: label for label, name in enumerate(class_names)}
    found = []
    for image, size, things in objects:
        one = Found(image, size)
        for name, corners, difficult in things:
            one.corners.append(corners)
            one.labels.append(label_of[name])
            one.crowd.append(difficult)
            one.areas.append(None)
        found.append(one)
    return part_of_boxes(found, str(root) if split == "all" else f"{root} ({split})", class_names)


_Thing = tuple[str, tuple[float, float, float, float], bool]


def _read_xml(file: Path) -> tuple[tuple[int, int] | None, list[_Thing]]:
    """Width and height of the image, and name, corners and difficulty of the things in it."""
    root = _parse(file)
    sides = [root.findtext(f"size/{side}", "").strip() for side in ("width", "height")]
    size = (int(sides[0]), int(sides[1])) if all(re.fullmatch("0*[1-9][0-9]*", side) for side in sides) else None
    things: list[_Thing] = []
    for i, thing in enumerate(root.findall("object"), 1):
        name = thing.findtext("name", "").strip()
        texts = [thing.findtext(f"bndbox/{side}", "").strip() for side in ("xmin", "ymin", "xmax", "ymax")]
        try:
            x1, y1, x2, y2 = (float(text) for text in texts)
        except ValueError:
            raise ValueError(f"{file}: object {i} ({name}) has the corners {texts}; expected four numbers") from None
        if not name:
            raise ValueError(f"{file}: object {i} has no name; give it one")
        # VOC's pixels count from 1, and the last one belongs to the box: 1 to 10 is ten pixels wide, from 0 to 10.
        things.append((name, (x1 - 1, y1 - 1, x2, y2), thing.findtext("difficult", "0").strip() == "1"))
    return size, things


def _parse(file: Path) -> ET.Element:
    try:
        return ET.parse(file).getroot()
    except (OSError, ET.ParseError, ValueError) as error:
        raise ValueError(f"{file}: not XML ({first_line(error)}); mend it") from None


def voc_mask_parts(data: Path) -> Parts[MaskFile]:
    """How to read the masks of what is found in `data`, as `voc_box_parts`."""
    root = _voc_root(data)
    files = list((root / "SegmentationClass").glob("*.png"))
    if not (root / "JPEGImages").is_dir() or not files:
        return {}

    def read(split: str, stems: Sequence[str]) -> AnnotatedPart[MaskFile]:
        pairs = [(_voc_image(root, stem), root / "SegmentationClass" / f"{stem}.png") for stem in stems]
        where = str(root) if split == "all" else f"{root} ({split})"
        if named := read_coding(root, data):
            return part_of_masks(pairs, where, *named)
        _refuse_other_classes(root, stems)
        part = part_of_masks(pairs, where, VOC_CLASSES, Coding(tuple(range(len(VOC_CLASSES)))))
        return replace(part, notes=(f"{root}: no classes.txt: the 21 names of PASCAL VOC are assumed",))

    return {split: partial(read, split, stems) for split, stems in _voc_stems(root, "Segmentation", files).items()}


def _refuse_other_classes(root: Path, stems: Iterable[str]) -> None:
    """Where boxes lie beside the masks, their names tell that the masks' classes are not PASCAL's."""
    for file in (root / "Annotations" / f"{stem}.xml" for stem in stems):
        for thing in _parse(file).findall("object") if file.is_file() else ():
            name = thing.findtext("name", "").strip()
            if name not in VOC_CLASSES:
                raise ValueError(
                    f"{file}: {name!r} is no class of PASCAL VOC, and the masks name none; write the classes to "
                    f"{root / 'classes.txt'}, line 1 for the value 0"
                )
