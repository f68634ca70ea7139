"""Images with boxes or masks: COCO, VOC, folders of masks; what is found, held out, and known to be wrong beforehand.

Boxes and masks are those of the upright image, as its EXIF tag turns it and `read_image` shows it. That is
detectron2's reading; pycocotools and torchvision pass over the tag. The two differ in few images, and where the
annotation tells the image's size, a quarter turn is noticed: `check_annotations` refuses it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mobilevit.data.coco import coco_parts
from mobilevit.data.labels import (
    IGNORE,
    AnnotatedPart,
    Boxes,
    MaskFile,
    Parts,
    by,
    part_of_masks,
    read_coding,
)
from mobilevit.data.samples import Label, Source, few, listed
from mobilevit.data.sources import (
    SPLITS,
    Folder,
    Scan,
    chance,
    check_divided,
    check_fraction,
    check_split,
    keys,
    refuse_other_data,
    refuse_unreadable,
    smallest,
)
from mobilevit.data.voc import voc_box_parts, voc_mask_parts
from mobilevit.images import ImageError, image_files, read_header

BOXES_EXPECTED = (
    "COCO (annotations/instances_train*.json and train*/; train/_annotations.coco.json; or one .json and images/) or "
    "VOC (JPEGImages/, Annotations/*.xml and ImageSets/Main/)"
)
MASKS_EXPECTED = (
    "VOC (JPEGImages/, SegmentationClass/*.png and ImageSets/Segmentation/), or images/ and masks/ with the same "
    "names, here or in train/ and val/, and classes.txt"
)


@dataclass(frozen=True, eq=False)
class Annotated(Folder[Label]):
    """Images in files, with `Boxes` or a `MaskFile` each.

    `category_ids` are the numbers that the annotations have for the classes, where they have any.
    """

    category_ids: tuple[int, ...] = ()


def find_boxes(data: str | Path, val_fraction: float) -> tuple[Annotated[Boxes], Annotated[Boxes]]:
    """Training and validation images of `data` with boxes.

    `data` is one of

    - COCO: annotations/instances_train*.json and instances_val*.json, and images in folders of the same name
      (train2017/), or below images/; or train/_annotations.coco.json and valid/_annotations.coco.json among their
      images, as Roboflow exports it; or one .json, and images in images/ or beside it;
    - VOC: JPEGImages/, Annotations/*.xml, ImageSets/Main/train.txt and val.txt, or a folder with VOCdevkit/VOC2012 or
      the like.

    Classes are numbered in the order of COCO's ids, whatever holes these have; VOC's by name. Images without boxes
    stay. Data without a validation split are divided: validated on is the `val_fraction` of the images whose names
    have the smallest hashes. test is taken where there is no val.

    Raises:
        ValueError: nothing or several things found, a file that is damaged or missing, an unknown image or class, no
            boxes to learn from.
    """
    train, val = _splits(_box_parts(Path(data)), Path(data), val_fraction)
    counts = Counter(int(label) for boxes in train.labels for label in boxes.labels[~boxes.crowd])
    if not counts:
        raise ValueError(f"{data}: no boxes in the images to train on; add some")
    missing = [name for number, name in enumerate(train.class_names) if not counts[number]]
    if missing:
        train = replace(train, notes=(*train.notes, f"no boxes of {listed(missing)} to train on"))
    return train, val


def find_boxes_to_evaluate(
    data: str | Path, class_names: Sequence[str], split: str | None = None, val_fraction: float | None = None
) -> Annotated[Boxes]:
    """The images that a network with `class_names` is evaluated on: val or else test of `data`, or all of it.

    `split` and `val_fraction` as for `find_evaluation`. Classes are matched by name: their order may be another, some
    may be missing.

    Raises:
        ValueError: as `find_boxes`, for boxes of a class that is not among `class_names`, and for a split that `data`
            lacks.
    """
    return _to_evaluate(_box_parts(Path(data)), Path(data), class_names, split, val_fraction)


def find_masks(data: str | Path, val_fraction: float) -> tuple[Annotated[MaskFile], Annotated[MaskFile]]:
    """Training and validation images of `data` with masks.

    `data` is one of

    - VOC: JPEGImages/, SegmentationClass/*.png, ImageSets/Segmentation/train.txt and val.txt, or a folder with
      VOCdevkit/VOC2012 or the like. Classes are VOC's 21, background first, unless there is a classes.txt;
    - images/ and masks/ with the same names, the masks as .png: in train/ and val/, or as images/train and so on, or
      undivided; and classes.txt.

    A pixel's value (grey, or palette index) is the line, from 0, of its class in classes.txt; 255 is ignored. Where
    masks are coloured, every line ends with the colour, as in "road #804080", and what is called "ignore" is.

    Raises:
        ValueError: nothing or several things found, an image without mask, no or odd names of classes.
    """
    return _splits(_mask_parts(Path(data)), Path(data), val_fraction)


def find_masks_to_evaluate(
    data: str | Path, class_names: Sequence[str], split: str | None = None, val_fraction: float | None = None
) -> Annotated[MaskFile]:
    """As `find_boxes_to_evaluate`, with masks.

    Raises:
        ValueError: as `find_masks`, and for a class that is not among `class_names`.
    """
    return _to_evaluate(_mask_parts(Path(data)), Path(data), class_names, split, val_fraction)


def boxes_held_out_name(data: str | Path) -> str | None:
    """Which split `find_boxes_to_evaluate` takes, "val" or "test"; None where it takes all there is."""
    return _held_out(_box_parts(Path(data)))


def masks_held_out_name(data: str | Path) -> str | None:
    """Which split `find_masks_to_evaluate` takes, "val" or "test"; None where it takes all there is."""
    return _held_out(_mask_parts(Path(data)))


def check_annotations(*sources: Source[Boxes] | Source[MaskFile], max_unreadable: int = 0) -> Scan:
    """Compare the header of every image with its annotation, so that what is wrong is known before training starts.

    Images must be of the size that their boxes or masks are for. Values in masks are looked at when they are read.
    At most `max_unreadable` are no images or too large.

    Raises:
        ImageError: more of them, or whatever else is wrong; five by name.
    """
    found = Scan()
    wrong: list[str] = []
    with ThreadPoolExecutor() as pool:
        for source in sources:
            ranges = (range(start, min(start + 256, len(source))) for start in range(0, len(source), 256))
            for one, faults in pool.map(partial(_faults, source), ranges):
                found.merge(one)
                wrong += faults
    refuse_unreadable(found.unreadable, max_unreadable)
    if wrong:
        raise ImageError("; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""))
    return found


def _faults(source: Source[Boxes] | Source[MaskFile], indices: Iterable[int]) -> tuple[Scan, list[str]]:
    found, wrong = Scan(), []
    for i in indices:
        sample = source[i]
        try:
            header = read_header(sample.image, sample.name)
        except ImageError as error:
            found.unreadable.append(str(error))
            continue
        found.add(sample.name, header)
        size = header.size
        if isinstance(sample.label, MaskFile):
            fault = sample.label.fault(*size)
            if fault:
                wrong.append(fault)
        elif sample.label.size not in (None, size):
            turned = sample.label.size == size[::-1]
            remedy = "remove its EXIF orientation, or turn its boxes" if turned else "mend the annotation"
            wrong.append(f"{sample.name}: {by(size)} px, but annotated as {by(sample.label.size)}; {remedy}")
    return found, wrong


# --- Splits -----------------------------------------------------------------------------------------------------------


def _held_out(parts: Parts[Any]) -> str | None:
    return next((name for name in ("val", "test") if name in parts), None)


def _splits(parts: Parts[Label], data: Path, val_fraction: float) -> tuple[Annotated[Label], Annotated[Label]]:
    if "train" not in parts and "all" not in parts:
        raise ValueError(f"{data}: has only the split {few(list(parts))}; expected one to train on")
    held_out = _held_out(parts) if "train" in parts else None
    if held_out is None:
        check_fraction(val_fraction)
    part = parts["train" if "train" in parts else "all"]()
    train = _annotated(part, data, part.class_names)
    if held_out is not None:
        val = _annotated(parts[held_out](), data, part.class_names)
        return train, replace(val, notes=tuple(note for note in val.notes if note not in train.notes))
    return _divided(train, data, val_fraction)


def _divided(source: Annotated[Label], data: Path, val_fraction: float) -> tuple[Annotated[Label], Annotated[Label]]:
    """As `hold_out`, but of all classes together."""
    if len(source) < 2:
        raise ValueError(f"{data}: one image is too few to train on some and validate on others; add more")
    chances = [chance(key) for key in keys(source)]
    val = set(smallest(val_fraction, range(len(source)), chances))
    train = [i for i in range(len(source)) if i not in val]
    note = f"{data}: has no validation split: {len(val):,} of {len(source):,} images are used for validation"
    return _some(source, train, (*source.notes, note)), _some(source, sorted(val), ())


def _some(source: Annotated[Label], indices: Sequence[int], notes: tuple[str, ...]) -> Annotated[Label]:
    files, labels = tuple(source.files[i] for i in indices), tuple(source.labels[i] for i in indices)
    return replace(source, files=files, labels=labels, notes=notes)


def _to_evaluate(
    parts: Parts[Label], data: Path, class_names: Sequence[str], split: str | None, val_fraction: float | None
) -> Annotated[Label]:
    if _held_out(parts) is None and "train" in parts:
        parts = {"all": parts["train"]}
    if split is None:
        split = _held_out(parts) or ("all" if "all" in parts else "train")
    if "all" not in parts or split in parts:
        return _annotated(parts[check_split(split, parts, data)](), data, tuple(class_names))
    fraction = check_divided(split, val_fraction, data)
    train, val = _divided(_annotated(parts["all"](), data, tuple(class_names)), data, fraction)
    return train if split == "train" else val


def _annotated(part: AnnotatedPart[Any], data: Path, class_names: tuple[str, ...]) -> Annotated[Any]:
    """With the numbers that `class_names` give the classes."""
    if not part.files:
        raise ValueError(f"{part.where}: holds no images")
    labels, ids = part.labels, part.category_ids
    if part.class_names != class_names:
        ids = ()  # numbers of other classes, or in another order
        number_of = {name: number for number, name in enumerate(class_names)}
        numbers = np.array([number_of.get(name, -1) for name in part.class_names], np.int64)
        # Classes that COCO lists and no box is of do no harm; of masks nobody knows before they are read.
        of_boxes = [label.labels for label in labels if isinstance(label, Boxes)]
        used = np.unique(np.concatenate(of_boxes)) if of_boxes else range(len(numbers))
        unknown = [part.class_names[i] for i in used if numbers[i] < 0]
        if unknown:
            raise ValueError(
                f"{part.where}: {listed(unknown)} {'is' if len(unknown) == 1 else 'are'} not among the "
                f"{len(class_names)} classes known ({few(class_names)}); rename or remove"
            )
        labels = [_renumbered(label, numbers) for label in labels]
    return Annotated(tuple(part.files), tuple(labels), class_names, data, part.notes, ids)


def _renumbered(label: Boxes | MaskFile, numbers: np.ndarray) -> Boxes | MaskFile:
    if isinstance(label, Boxes):
        return replace(label, labels=numbers[label.labels])
    coded = tuple(IGNORE if number == IGNORE else int(numbers[number]) for number in label.classes.numbers)
    return replace(label, classes=replace(label.classes, numbers=coded))


def _one_of(found: Mapping[str, Parts[Label]], data: Path, what: str, expected: str) -> Parts[Label]:
    refuse_other_data(data)
    kinds = {kind: parts for kind, parts in found.items() if parts}
    if len(kinds) > 1:
        raise ValueError(f"{data}: holds {' and '.join(kinds)}; leave one of them there")
    if not kinds:
        reason = f"found no {what}; expected {expected}" if data.is_dir() else "no such folder"
        raise ValueError(f"{data}: {reason}")
    return next(iter(kinds.values()))


def _box_parts(data: Path) -> Parts[Boxes]:
    return _one_of({"COCO": coco_parts(data), "VOC": voc_box_parts(data)}, data, "boxes", BOXES_EXPECTED)


def _mask_parts(data: Path) -> Parts[MaskFile]:
    found = {"VOC's masks": voc_mask_parts(data), "images/ and masks/": _folder_parts(data)}
    return _one_of(found, data, "masks", MASKS_EXPECTED)


# --- Folders of masks -------------------------------------------------------------------------------------------------


def _folder_parts(data: Path) -> Parts[MaskFile]:
    found: dict[str, tuple[Path, Path]] = {}
    for name, split in SPLITS.items():
        for images, masks in ((f"{name}/images", f"{name}/masks"), (f"images/{name}", f"masks/{name}")):
            if (data / images).is_dir() and (data / masks).is_dir():
                found.setdefault(split, (data / images, data / masks))
    if not found and (data / "images").is_dir() and (data / "masks").is_dir():
        found["all"] = (data / "images", data / "masks")

    def read(images: Path, masks: Path) -> AnnotatedPart[MaskFile]:
        named = read_coding(data, images.parent)
        if named is None:
            raise ValueError(f"{data / 'classes.txt'}: no such file; name the classes in it, line 1 for the value 0")
        pairs = [(image, (masks / image.relative_to(images)).with_suffix(".png")) for image in image_files(images)]
        part = part_of_masks(pairs, str(images), *named)
        unused = sorted(set(masks.rglob("*.png")) - {mask for _, mask in pairs})
        note = f"{masks}: masks without an image left out: {few([file.name for file in unused])}"
        return replace(part, notes=(note,)) if unused else part

    return {split: partial(read, *folders) for split, folders in found.items()}
