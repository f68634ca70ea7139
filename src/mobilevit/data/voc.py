"""PASCAL VOC: the boxes of an image in a .xml file, its mask in a .png file."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from mobilevit.data.boxes import AnnotatedBoxes, split_of_boxes
from mobilevit.data.masks import MaskCoding, read_coding, split_of_masks
from mobilevit.data.samples import Split, Splits
from mobilevit.messages import first_line, join_names

VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
_Object = tuple[str, tuple[float, float, float, float], bool]  # name, x1 y1 x2 y2, difficult


def voc_box_splits(data: Path) -> Splits:
    """Splits of the .xml files in `data`; empty if there are none. Raises ValueError for several years of VOC."""
    root = _voc_root(data)
    files = list((root / "Annotations").glob("*.xml"))
    if not (root / "JPEGImages").is_dir() or not files:
        return {}
    stems = _stems(root, "Main", files)
    return {split: partial(_read_boxes, data, root, split, stems[split]) for split in stems}


def voc_mask_splits(data: Path) -> Splits:
    """Splits of the masks in `data`; empty if there are none. Raises ValueError for several years of VOC."""
    root = _voc_root(data)
    files = list((root / "SegmentationClass").glob("*.png"))
    if not (root / "JPEGImages").is_dir() or not files:
        return {}
    stems = _stems(root, "Segmentation", files)
    return {split: partial(_read_masks, data, root, split, stems[split]) for split in stems}


def _voc_root(data: Path) -> Path:
    """The folder that contains JPEGImages/: `data`, or a folder in it or in its VOCdevkit/."""
    if (data / "JPEGImages").is_dir():
        return data
    for folder in (data, data / "VOCdevkit"):
        roots = sorted(path.parent for path in folder.glob("*/JPEGImages"))
        if len(roots) > 1:
            raise ValueError(f"{data}: contains {join_names(root.name for root in roots)}; give one of them")
        if roots and (folder != data or roots[0].name.startswith("VOC")):
            return roots[0]
    return data


def _stems(root: Path, image_set: str, annotations: Iterable[Path]) -> dict[str, list[str]]:
    """Names of images by split, from ImageSets/; without it, "all" has those of `annotations`."""
    stems: dict[str, list[str]] = {}
    for split, name in (("train", "train"), ("val", "val"), ("test", "test"), ("all", "trainval")):
        file = root / "ImageSets" / image_set / f"{name}.txt"
        if file.is_file() and not (split == "all" and "train" in stems):
            stems[split] = [line.split()[0] for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not stems:
        stems = {"all": sorted(path.stem for path in annotations)}
    return {split: names for split, names in stems.items() if names}


def _location(root: Path, split: str) -> str:
    return str(root) if split == "all" else f"{root} ({split})"


def _image(root: Path, stem: str) -> Path:
    images = [root / "JPEGImages" / f"{stem}{suffix}" for suffix in (".jpg", ".jpeg", ".png", ".JPG")]
    image = next((image for image in images if image.is_file()), None)
    if image is None:
        raise ValueError(
            f"{images[0]}: no such file, but ImageSets/ or an annotation names it; add it or remove the entry"
        )
    return image


def _read_boxes(data: Path, root: Path, split: str, stems: Sequence[str]) -> Split:
    annotations: list[tuple[Path, tuple[int, int] | None, list[_Object]]] = []
    for stem in stems:
        image, file = _image(root, stem), root / "Annotations" / f"{stem}.xml"
        if not file.is_file():
            raise ValueError(f"{file}: no such file; add it, or remove {stem} from {root / 'ImageSets' / 'Main'}")
        annotations.append((image, *_read_xml(file)))
    class_names = tuple(sorted({name for *_, objects in annotations for name, *_ in objects}))
    label_of = {name: label for label, name in enumerate(class_names)}
    annotated = []
    for image, size, objects in annotations:
        boxes = AnnotatedBoxes(image, size)
        for name, corners, difficult in objects:
            boxes.add(corners, label_of[name], difficult, None)
        annotated.append(boxes)
    return split_of_boxes(annotated, _location(root, split), data, class_names)


def _read_xml(file: Path) -> tuple[tuple[int, int] | None, list[_Object]]:
    """(width, height) of the image if given, and the objects."""
    root = _parse(file)
    sides = [root.findtext(f"size/{side}", "").strip() for side in ("width", "height")]
    size = (int(sides[0]), int(sides[1])) if all(re.fullmatch("0*[1-9][0-9]*", side) for side in sides) else None
    objects: list[_Object] = []
    for i, element in enumerate(root.findall("object"), 1):
        name = element.findtext("name", "").strip()
        texts = [element.findtext(f"bndbox/{side}", "").strip() for side in ("xmin", "ymin", "xmax", "ymax")]
        try:
            x1, y1, x2, y2 = (float(text) for text in texts)
        except ValueError:
            raise ValueError(f"{file}: object {i} ({name}) has the corners {texts}; expected four numbers") from None
        if not name:
            raise ValueError(f"{file}: object {i} has no name; add one")
        # VOC's pixels count from 1, and the last one is inside the box: 1 to 10 is ten pixels wide, from 0 to 10.
        objects.append((name, (x1 - 1, y1 - 1, x2, y2), element.findtext("difficult", "0").strip() == "1"))
    return size, objects


def _parse(file: Path) -> ET.Element:
    try:
        return ET.parse(file).getroot()
    except (OSError, ET.ParseError, ValueError) as error:
        raise ValueError(f"{file}: not XML ({first_line(error)}); fix it") from None


def _read_masks(data: Path, root: Path, split: str, stems: Sequence[str]) -> Split:
    pairs = [(_image(root, stem), root / "SegmentationClass" / f"{stem}.png") for stem in stems]
    location = _location(root, split)
    if named := read_coding(root, data):
        return split_of_masks(pairs, location, data, *named)
    _refuse_other_classes(root, stems)
    coding = MaskCoding(tuple(range(len(VOC_CLASSES))))
    notes = (f"{root}: no classes.txt; assuming the 21 classes of PASCAL VOC",)
    return split_of_masks(pairs, location, data, VOC_CLASSES, coding, notes)


def _refuse_other_classes(root: Path, stems: Iterable[str]) -> None:
    """Raise ValueError if the boxes of the images have other classes than PASCAL VOC; then the masks have, too."""
    for file in (root / "Annotations" / f"{stem}.xml" for stem in stems):
        for name, *_ in _read_xml(file)[1] if file.is_file() else ():
            if name not in VOC_CLASSES:
                raise ValueError(
                    f"{file}: {name!r} is not a class of PASCAL VOC, and there is no classes.txt for the masks; write "
                    f"{root / 'classes.txt'}, line 1 for the value 0"
                )
