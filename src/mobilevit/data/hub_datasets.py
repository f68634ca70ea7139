"""Tables of the library `datasets`: saved datasets, parquet and arrow files, datasets of the Hugging Face hub.

The library is an optional dependency, imported on use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import constants

from mobilevit import hub
from mobilevit.data.samples import SPLIT_NAMES, Split, Splits, read_class_names
from mobilevit.files import require
from mobilevit.messages import first_line, join_names

if TYPE_CHECKING:
    from datasets import Dataset

LABELS = ("label", "labels", "fine_label")


@dataclass(frozen=True)
class ImageColumn:
    """The undecoded images of a table."""

    rows: Dataset
    column: str
    location: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> str | bytes:
        value = self.rows[index][self.column]
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        return value or b""  # an empty cell is an unreadable image; reading it raises ImageError

    def key(self, index: int) -> str:
        return str(index)

    def name(self, index: int) -> str:
        return f"{self.location}[{index}]"


def saved_splits(folder: Path) -> Splits:
    """The splits that `datasets.DatasetDict.save_to_disk` or `Dataset.save_to_disk` wrote."""
    tables = _load(str(folder), lambda datasets: datasets.load_from_disk(str(folder)))
    return _named_splits(str(folder), tables if isinstance(tables, dict) else {"all": tables}, read_class_names(folder))


def hub_splits(data: str) -> Splits:
    """The splits of `hf:owner/name` or `hf:owner/name/configuration`, downloaded unless they are in the cache."""
    parts = data.removeprefix("hf:").split("/")
    if not 1 <= len(parts) <= 3 or not all(parts):
        raise ValueError(f"{data}: not the name of a dataset of the hub; write hf:owner/name")
    name, configuration = "/".join(parts[:2]), parts[2] if len(parts) == 3 else None
    reason = hub.unreachable()
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, bool(reason)  # offline, only the cache is read
    try:
        return _named_splits(data, _load(data, lambda datasets: datasets.load_dataset(name, configuration)), None)
    except ValueError as error:
        if reason and isinstance(error.__cause__, ConnectionError):
            raise ValueError(
                f"{data}: not in the local cache, and the hub cannot be reached ({reason}); check the connection, or "
                "use a dataset on disk"
            ) from None
        raise
    finally:
        constants.HF_HUB_OFFLINE = before


def _named_splits(data: str, tables: Mapping[str, Dataset], class_names: tuple[str, ...] | None) -> Splits:
    names = {SPLIT_NAMES[name.lower()]: name for name in reversed(list(tables)) if name.lower() in SPLIT_NAMES}
    if not names:
        if len(tables) != 1:
            raise ValueError(f"{data}: has the splits {join_names(tables)}; expected train, and validation or test")
        names = {"all": next(iter(tables))}
    return {
        split: partial(read_table, tables[name], data if split == "all" else f"{data} ({name})", class_names)
        for split, name in names.items()
    }


def read_table_files(files: Sequence[Path], location: str, class_names: tuple[str, ...] | None) -> Split:
    """Parquet or arrow files as one split. The library copies them to its cache in the home folder."""
    kind, names = files[0].suffix[1:].lower(), [str(file) for file in files]
    rows = _load(location, lambda datasets: datasets.load_dataset(kind, data_files={"train": names}, split="train"))
    return read_table(rows, location, class_names)


def read_table(rows: Dataset, location: str, class_names: tuple[str, ...] | None = None) -> Split:
    """Images and labels of a table; `class_names` name the class indices if the table does not.

    Images are the only column of images. Labels are the only ClassLabel column, or the one called label, labels or
    fine_label, with class indices or names.

    Raises:
        ValueError: no image or label column, or several of them.
    """
    datasets = _library(location)
    image_columns, label_columns = _image_columns(rows.features), _label_columns(rows.features)
    for what, columns, expected in (
        ("image", image_columns, "an Image column, or one of bytes"),
        ("label", label_columns, f"a ClassLabel column, or one called {', '.join(LABELS[:-1])} or {LABELS[-1]}"),
    ):
        if len(columns) != 1:
            existing = ", ".join(f"{name} ({_type_name(feature)})" for name, feature in rows.features.items())
            problem = f"several {what} columns, {', '.join(columns)}" if columns else f"no {what} column"
            raise ValueError(f"{location}: {problem}, among {existing}; expected exactly one: {expected}")
    feature = rows.features[label_columns[0]]
    labels: Any = rows.select_columns(label_columns).with_format("arrow")[:]
    if isinstance(feature, datasets.ClassLabel):
        indices = [str(i) for i in range(len(feature.names))]  # the library's names for classes without names
        class_names = class_names if list(feature.names) == indices else tuple(feature.names)
    rows = rows.select_columns(image_columns).with_format(None)
    if isinstance(rows.features[image_columns[0]], datasets.Image):
        rows = rows.cast_column(image_columns[0], datasets.Image(decode=False))
    images = ImageColumn(rows, image_columns[0], location)
    return Split(location, images, labels.column(0).to_pylist(), class_names)


def _image_columns(features: Any) -> list[str]:
    images = [name for name, feature in features.items() if _type_name(feature) == "Image"]
    # Without the library's metadata, an image is a struct or bytes.
    structs = [n for n, f in features.items() if isinstance(f, dict) and "bytes" in f and f.keys() <= {"bytes", "path"}]
    return images or structs or [n for n, f in features.items() if _type_name(f) in ("binary", "large_binary")]


def _label_columns(features: Any) -> list[str]:
    class_labels = [name for name, feature in features.items() if _type_name(feature) == "ClassLabel"]
    if len(class_labels) == 1:
        return class_labels
    types = ("ClassLabel",) if class_labels else ("int", "uint", "string", "large_string")
    named = [name for name in LABELS if name in features and _type_name(features[name]).startswith(types)]
    return named or class_labels


def _type_name(feature: Any) -> str:
    return feature.dtype if type(feature).__name__ == "Value" else type(feature).__name__


def _library(location: str) -> Any:
    return require("datasets", "datasets", f"{location}: reading it")


def _load(location: str, load: Callable[[Any], Any]) -> Any:
    datasets = _library(location)
    try:
        return load(datasets)
    except Exception as error:  # the network, the hub and damaged files raise errors of many types
        reason = first_line(error.__cause__ or error)
        fix = "check name and connection" if location.startswith("hf:") else "check that its files are complete"
        raise ValueError(f"{location}: cannot be loaded ({reason}); {fix}") from error
