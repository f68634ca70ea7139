"""Datasets on disk or on the hub: detection of the format, and splits for training and evaluation.

Boxes and masks refer to the upright image, rotated by its EXIF tag as `read_image` does it. detectron2 reads them
this way; pycocotools and torchvision ignore the tag. If the annotation has the size of the image, `check_images`
detects a quarter turn.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from mobilevit.data.class_sets import ClassSet, rarest_classes
from mobilevit.data.coco import coco_splits
from mobilevit.data.folders import class_folder_splits, has_class_folders
from mobilevit.data.hub_datasets import hub_splits, read_table_files, saved_splits
from mobilevit.data.idx import idx_splits
from mobilevit.data.masks import mask_folder_splits
from mobilevit.data.python_data import Data, PythonData, python_splits
from mobilevit.data.samples import (
    SPLIT_NAMES,
    ImageFiles,
    Source,
    Split,
    Splits,
    check_val_fraction,
    divide,
    read_class_names,
)
from mobilevit.data.tables import ACCEPTED, LABEL_FILE_SUFFIXES, is_label_file, table_splits
from mobilevit.data.tar import is_compressed_tar, read_tars, refuse_compressed
from mobilevit.data.voc import voc_box_splits, voc_mask_splits
from mobilevit.images import find_images
from mobilevit.messages import join_classes, join_names

TaskName = Literal["classify", "multilabel", "detect", "segment"]

SHARD_SUFFIXES = (".parquet", ".arrow", ".tar")
MULTILABEL_SUFFIXES = (".tar", *LABEL_FILE_SUFFIXES)
CLASS_FOLDERS = "class folders"
EXPECTED: dict[TaskName, str] = {
    "classify": (
        "one folder of images for each of two classes or more, or train/ and val/ of those; or idx files, .parquet or "
        ".arrow files, .tar shards, or a label file (.csv, .tsv, .jsonl, .parquet)"
    ),
    "multilabel": f"a label file ({', '.join(LABEL_FILE_SUFFIXES)}) with {ACCEPTED}; or .tar shards with .json files",
    "detect": (
        "COCO (annotations/instances_train*.json and train*/; train/_annotations.coco.json; or one .json and images/) "
        "or VOC (JPEGImages/, Annotations/*.xml and ImageSets/Main/)"
    ),
    "segment": (
        "VOC (JPEGImages/, SegmentationClass/*.png and ImageSets/Segmentation/), or images/ and masks/ with the same "
        "names, here or in train/ and val/, and classes.txt"
    ),
}


def find_splits(task: TaskName, data: Data, val_fraction: float) -> tuple[Source[Any], Source[Any]]:
    """Training and validation split of `data`, with class indices, `Boxes` or `MaskFile`s as labels.

    Formats for classification:

    - a folder with a folder of images per class, or with `train/` and `val/` (or `test/`) that contain those;
    - a folder with idx files like MNIST's (train-images-idx3-ubyte, t10k-... and so on, gzipped or not);
    - a folder that `datasets.Dataset.save_to_disk` wrote; .parquet or .arrow files; `hf:owner/name`, a dataset of the
      hub (these require the extra `datasets`);
    - .tar shards of WebDataset;
    - a label file: .csv, .tsv, .jsonl or .parquet with paths and labels, see `table_splits`.

    Formats for multi-label classification: a label file, or .tar shards.

    Datasets in Python, see `PythonData`, are for both kinds of classification.

    Shards are in `data`, in its `data/`, or in folders named after the splits, and may be named after the splits
    (train-000.tar, validation-00000-of-00001.parquet); or `data` is one such file. classes.txt beside files with class
    indices names the classes, one per line.

    Formats for detection. Classes are in the order of COCO's ids or of VOC's names:

    - COCO: annotations/instances_train*.json and instances_val*.json, and images in folders of the same name
      (train2017/), also below images/; or train/_annotations.coco.json and valid/_annotations.coco.json beside their
      images, as Roboflow exports them; or one .json, and images in images/ or beside it;
    - VOC: JPEGImages/, Annotations/*.xml, ImageSets/Main/train.txt and val.txt, or a folder with VOCdevkit/VOC2012 or
      the like.

    Formats for segmentation:

    - VOC: JPEGImages/, SegmentationClass/*.png, ImageSets/Segmentation/train.txt and val.txt, or a folder with
      VOCdevkit/VOC2012 or the like. Without classes.txt, the classes are VOC's 21 with the background first;
    - images/ and masks/ with the same names, masks as .png: in train/ and val/, or as images/train and so on, or not
      divided; and classes.txt. See `read_coding` for the values of pixels.

    The test split is used if there is no validation split. Data with neither are divided, see `divide`. Hidden files
    and folders are ignored.

    Raises:
        ValueError: no or several formats found, damaged or missing files, images without a label, labels out of range,
            an empty class or only one, classes of the validation split that are not in the training split, too few
            images to divide.
    """
    data_format, splits = _find_format(task, data)
    if "train" not in splits and "all" not in splits:
        raise ValueError(f"{data}: has only the splits {join_names(splits)}; expected one to train on")
    if data_format == CLASS_FOLDERS and set(splits) == {"train"}:
        raise ValueError(
            f"{data}: has train/ but neither val/ nor test/; add one, or put the class folders directly in {data}"
        )
    name = _evaluation_split(splits) if "train" in splits else "all"
    if name == "all":
        check_val_fraction(val_fraction)
    split = splits["train" if "train" in splits else "all"]()
    class_names = split.training_class_names()
    train = split.source(class_names)
    if name == "all":
        num_images = len(train)
        train, val = _divide(train, val_fraction, data)
        note = f"{data}: has no validation split: {len(val):,} of {num_images:,} images are used for validation"
        train = replace(train, notes=(*train.notes, note))
    else:
        val = splits[name]().source(class_names)
    val = replace(val, notes=tuple(note for note in val.notes if note not in train.notes))
    if task == "multilabel":
        return _check_class_sets(train, val, data)
    return (_check_boxes(train, data) if task == "detect" else train), val


def _divide(source: Source[Any], val_fraction: float, data: Data) -> tuple[Source[Any], Source[Any]]:
    is_multilabel = isinstance(source.labels[0], ClassSet)
    return divide(source, val_fraction, data, rarest_classes(source.labels) if is_multilabel else None)


def _check_class_sets(
    train: Source[ClassSet], val: Source[ClassSet], data: Data
) -> tuple[Source[ClassSet], Source[ClassSet]]:
    """Raise ValueError if no image has a label; add a note for classes that a split does not contain."""
    sources: list[Source[ClassSet]] = []
    for name, source in (("training", train), ("validation", val)):
        used = {index for label in source.labels for index in label.indices}
        if not used:
            raise ValueError(f"{data}: none of the {len(source):,} {name} images has a label; add some")
        missing = [class_name for index, class_name in enumerate(source.class_names) if index not in used]
        effect = "" if source is train else "; their average precision is undefined and their threshold is 0.5"
        note = f"no {name} images of {join_classes(missing)}{effect}"
        sources.append(replace(source, notes=(*source.notes, note)) if missing else source)
    return sources[0], sources[1]


def _check_boxes(train: Source[Any], data: Data) -> Source[Any]:
    """Raise ValueError if there are no boxes to train on; add a note for classes without boxes."""
    counts = Counter(label for boxes in train.labels for label in boxes.labels[~boxes.crowd].tolist())
    if not counts:
        raise ValueError(f"{data}: no boxes in the images to train on; add some")
    missing = [name for label, name in enumerate(train.class_names) if label not in counts]
    notes = (f"no boxes of {join_classes(missing)} to train on",) if missing else ()
    return replace(train, notes=(*train.notes, *notes))


def default_split(task: TaskName, data: Data) -> str:
    """The split that evaluation uses by default: "val", else "test", else "all" images of data that is not divided."""
    return _evaluation_split(_find_format(task, data)[1])


def _evaluation_split(splits: Iterable[str]) -> str:
    return next((name for name in ("val", "test") if name in splits), "all")


def find_evaluation_split(
    task: TaskName, data: Data, class_names: tuple[str, ...], split: str, val_fraction: float | None = None
) -> Source[Any]:
    """The images of a split ("train", "val", "test" or "all") for a model with `class_names`; see `Split.source`.

    "train" and "val" of data that is not divided are those of `find_splits` with the same `val_fraction`.

    Raises:
        ValueError: as `find_splits`; or a class that is not in `class_names`, or a split that `data` does not have.
    """
    splits = _find_format(task, data)[1]
    if _evaluation_split(splits) == "all" and "train" in splits:
        splits = {"all": splits["train"]}
    if split in splits:
        return splits[split]().source(class_names)
    if "all" not in splits:
        raise ValueError(f"{data}: has no split {split!r}; choose one of {join_names(splits)} with --split")
    if split not in ("train", "val") or val_fraction is None:
        hint = ", and the weights do not contain the fraction for a validation split" if split == "val" else ""
        raise ValueError(f"{data}: has no split {split!r}{hint}; evaluate all images with --split all")
    train, val = _divide(splits["all"]().source(class_names), val_fraction, data)
    return train if split == "train" else val


def find_any_images(data: str | Path) -> Source[int]:
    """Images whose labels do not matter: all files of a folder, or the evaluation split of a dataset. Labels are 0.

    Raises:
        ValueError: no images; as `find_splits`.
    """
    folder = Path(data)
    if folder.is_dir():
        with contextlib.suppress(ValueError):  # no image files: a dataset of another format
            files = tuple(find_images([str(folder)]))
            return Source(ImageFiles(files, folder), (0,) * len(files), ())
    splits = _find_format(task_of_any_labels(data), data)[1]
    name = _evaluation_split(splits)
    split = splits[name if name in splits else "train"]()
    source = split.source(split.training_class_names())
    return replace(source, labels=(0,) * len(source))


def task_of_any_labels(data: str | Path) -> TaskName:
    """The task for which images are read whatever their number of labels; "classify" if it does not matter."""
    path = Path(data)
    is_tar = bool(_shards(_files(path), ".tar")) if path.is_dir() else path.suffix.lower() == ".tar"
    return "multilabel" if is_tar or is_label_file(path) else "classify"


def read_splits(data: str | Path, task: TaskName | None = None) -> tuple[TaskName, dict[str, Split]]:
    """All splits of `data` as they are, without the checks of `find_splits`, and their task.

    Without `task`, it is "detect" or "segment" if `data` is a folder in one of their formats, otherwise "classify".

    Raises:
        ValueError: no or several formats found, damaged or missing files, no images.
    """
    task = task or _find_task(data)
    splits = {name: read() for name, read in _find_format(task, data)[1].items()}
    if not any(len(split.images) for split in splits.values()):
        raise ValueError(f"{data}: contains no images")
    return task, splits


def _find_task(data: str | Path) -> TaskName:
    path = Path(data)
    if not path.is_dir():
        return "classify"
    if coco_splits(path) or voc_box_splits(path):
        return "detect"
    return "segment" if voc_mask_splits(path) or mask_folder_splits(path) else "classify"


# --- Formats ----------------------------------------------------------------------------------------------------------


def _find_format(task: TaskName, data: Data) -> tuple[str, Splits]:
    """The name of the format of `data`, and how to read its splits. Raises ValueError for no or several formats."""
    if isinstance(data, PythonData):
        if task not in ("classify", "multilabel"):
            raise ValueError(f"{data}: is a dataset in Python, which the task {task!r} does not support; give a folder")
        return "a dataset in Python", python_splits(data, multilabel=task == "multilabel")
    if task == "classify" and str(data).startswith("hf:"):
        return "hub", hub_splits(str(data))
    data = Path(data)
    has_classes = task in ("classify", "multilabel")
    is_multilabel = task == "multilabel"
    if (is_multilabel and data.suffix.lower() in LABEL_FILE_SUFFIXES and data.is_file()) or (
        task == "classify" and is_label_file(data)
    ):
        return "a label file", table_splits(data, multilabel=is_multilabel)
    _refuse_other_data(data, task)
    if has_classes and data.is_file():
        refuse_compressed(data)
        suffix, suffixes = data.suffix.lower(), SHARD_SUFFIXES if task == "classify" else MULTILABEL_SUFFIXES
        if suffix not in suffixes:
            raise ValueError(f"{data}: neither a folder nor a file of type {', '.join(suffixes)}")
        return suffix, _shard_splits(data.parent, suffix, {"all": [data]}, str(data), task)
    if not data.is_dir():
        kind = "file" if data.suffix.lower() in LABEL_FILE_SUFFIXES else "folder"
        raise ValueError(f"{data}: no such {kind}")
    if task == "classify":
        formats = _classification_formats(data)
    elif is_multilabel:
        shards = _shards(_files(data), ".tar")
        formats = {".tar files": _shard_splits(data, ".tar", shards, str(data), task)}
    elif task == "detect":
        formats = {"COCO": coco_splits(data), "VOC": voc_box_splits(data)}
    else:
        formats = {"VOC masks": voc_mask_splits(data), "images/ and masks/": mask_folder_splits(data)}
    formats = {name: splits for name, splits in formats.items() if splits}
    if len(formats) > 1:
        hint = ", or give one of its files" if task == "classify" else ""
        raise ValueError(f"{data}: contains {' and '.join(formats)}; remove all but one{hint}")
    if not formats:
        tables = [file for file, _ in _files(data) if file.suffix.lower() in LABEL_FILE_SUFFIXES]
        hint = f"; to use a label file, give the file: {join_names(tables)}" if has_classes and tables else ""
        raise ValueError(f"{data}: data format not recognized; expected {EXPECTED[task]}{hint}")
    name, splits = next(iter(formats.items()))
    return name, splits() if callable(splits) else splits


def _classification_formats(data: Path) -> dict[str, Splits | Callable[[], Splits]]:
    files = list(_files(data))
    formats: dict[str, Splits | Callable[[], Splits]] = {"idx files": idx_splits(data)}
    if (data / "dataset_dict.json").is_file() or (data / "state.json").is_file():
        formats["a saved dataset"] = partial(saved_splits, data)  # whose tables are .arrow files, too
    else:
        for suffix in SHARD_SUFFIXES:
            if shards := _shards(files, suffix):
                formats[f"{suffix} files"] = _shard_splits(data, suffix, shards, str(data), "classify")
    are_class_folders = has_class_folders(data)
    if not any(formats.values()) and not are_class_folders:
        for file, _ in files:
            if is_compressed_tar(file):
                refuse_compressed(file)
    if are_class_folders or not any(formats.values()):
        formats[CLASS_FOLDERS] = class_folder_splits(data)
    return formats


def _refuse_other_data(data: Path, task: TaskName) -> None:
    """Raise ValueError with a hint for URLs, archives and other label files."""
    suffix = data.suffix.lower()
    if re.match(r"[A-Za-z][\w+.-]+:/", str(data)):
        url = re.sub(":/+", "://", str(data), count=1)  # a Path has one slash
        raise ValueError(f"{url}: a URL; download it first and give the folder (a hub dataset is hf:OWNER/NAME)")
    if data.is_file() and suffix in (".zip", ".7z", ".rar"):
        raise ValueError(f"{data}: an archive; extract it (unzip) and give the folder")
    if data.is_file() and suffix in (".csv", ".tsv", ".txt", ".json", ".jsonl", ".xlsx", ".xml"):
        raise ValueError(f"{data}: not a supported file; expected {EXPECTED[task]}")


def _shard_splits(folder: Path, suffix: str, shards: Mapping[str, list[Path]], data: str, task: TaskName) -> Splits:
    def read(split: str, files: list[Path]) -> Split:
        location = data if split == "all" else f"{data} ({split})"
        names = read_class_names(files[0].parent, folder)
        if suffix == ".tar":
            return read_tars(files, location, names, multilabel=task == "multilabel")
        return read_table_files(files, location, names)

    return {split: partial(read, split, files) for split, files in shards.items()}


def _shards(files: Iterable[tuple[Path, str | None]], suffix: str) -> dict[str, list[Path]]:
    """Files with this suffix by split: that of their folder, else that in their name, else "all"."""
    shards: dict[str, list[Path]] = {}
    for file, split in files:
        if file.suffix.lower() == suffix:
            words = re.split("[^a-z]+", file.stem.lower())
            splits = {SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES}
            shards.setdefault(split or (splits.pop() if len(splits) == 1 else "all"), []).append(file)
    if "all" in shards and len(shards) > 1:
        raise ValueError(
            f"{shards['all'][0]}: its name contains no split, unlike those of other files; add train, val or test to it"
        )
    return shards


def _files(data: Path) -> Iterator[tuple[Path, str | None]]:
    """Files where shards may be, with the split that their folder is named after."""
    named = ((data / name, split) for name, split in SPLIT_NAMES.items())
    for folder, split in ((data, None), (data / "data", None), *named):
        for file in sorted(folder.iterdir()) if folder.is_dir() else ():
            if not file.name.startswith((".", "cache-")) and file.is_file():  # cache-: written by the library datasets
                yield file, split
