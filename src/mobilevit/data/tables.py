"""Tables of the library `datasets`: saved folders, parquet and arrow files, datasets of the hub.

The library is an extra, and imported when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import constants

from mobilevit import hub
from mobilevit.data.samples import Part
from mobilevit.images import first_line

if TYPE_CHECKING:
    from datasets import Dataset

LABELS = ("label", "labels", "fine_label")


@dataclass(frozen=True)
class Column:
    """The images of a table, undecoded."""

    rows: Dataset
    column: str
    where: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> str | bytes:
        value = self.rows[index][self.column]
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        return value or b""  # an empty cell is an image that cannot be read, and named where it is

    def key(self, index: int) -> str:
        """Its number."""
        return str(index)

    def name(self, index: int) -> str:
        """Table and number."""
        return f"{self.where}[{index}]"


def saved_splits(folder: Path) -> dict[str, Dataset]:
    """What `save_to_disk` wrote, by the name of the split; a table without splits is called "all"."""
    found = _load(str(folder), lambda datasets: datasets.load_from_disk(str(folder)))
    return dict(found) if isinstance(found, dict) else {"all": found}


def hub_splits(data: str) -> dict[str, Dataset]:
    """The splits of `hf:owner/name` or `hf:owner/name/configuration`, downloaded unless they are in the cache."""
    parts = data.removeprefix("hf:").split("/")
    if not 1 <= len(parts) <= 3 or not all(parts):
        raise ValueError(f"{data}: names no dataset of the hub; write hf:owner/name")
    name, configuration = "/".join(parts[:2]), parts[2] if len(parts) == 3 else None
    reason = hub.unreachable()
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, bool(reason)  # then only the cache is read
    try:
        return dict(_load(data, lambda datasets: datasets.load_dataset(name, configuration)))
    except ValueError as error:
        if reason and isinstance(error.__cause__, ConnectionError):
            raise ValueError(
                f"{data}: not in the local cache, and the hub cannot be reached ({reason}); check the connection, or "
                "use a data set on disk"
            ) from None
        raise
    finally:
        constants.HF_HUB_OFFLINE = before


def file_split(files: Sequence[Path], where: str) -> Dataset:
    """Parquet or arrow files as one table. The library keeps a copy in its cache, which is in the home folder."""
    kind = files[0].suffix[1:].lower()
    names = [str(file) for file in files]
    return _load(where, lambda datasets: datasets.load_dataset(kind, data_files={"train": names}, split="train"))


def read_table(rows: Dataset, where: str, class_names: tuple[str, ...] | None = None) -> Part:
    """Images and labels of a table; `class_names` are for numbers that the table has no names for.

    Images are in the one column that holds some. Labels are in the one column of class labels, or of numbers or
    strings called label, labels or fine_label, which also decides where several columns hold class labels.

    Raises:
        ValueError: none or several of either column.
    """
    datasets = _library(where)
    images, labels = _image_columns(rows.features), _label_columns(rows.features)
    for what, found, expected in (
        ("image", images, "an Image column, or one of bytes"),
        ("label", labels, f"a ClassLabel column, or one called {', '.join(LABELS[:-1])} or {LABELS[-1]}"),
    ):
        if len(found) != 1:
            columns = ", ".join(f"{name} ({_kind(feature)})" for name, feature in rows.features.items())
            problem = f"several {what} columns, {', '.join(found)}" if found else f"no {what} column"
            raise ValueError(f"{where}: {problem}, among {columns}; expected {expected}, and one only")
    feature = rows.features[labels[0]]
    table: Any = rows.select_columns(labels).with_format("arrow")[:]
    if isinstance(feature, datasets.ClassLabel) and not _is_numbered(feature.names):
        class_names = tuple(feature.names)
    rows = rows.select_columns(images).with_format(None)
    if isinstance(rows.features[images[0]], datasets.Image):
        rows = rows.cast_column(images[0], datasets.Image(decode=False))
    return Part(where, Column(rows, images[0], where), table.column(0).to_pylist(), class_names)


def _image_columns(features: Any) -> list[str]:
    images = [name for name, feature in features.items() if _kind(feature) == "Image"]
    # Written by other means than the library, an image is a struct or just bytes.
    structs = [n for n, f in features.items() if isinstance(f, dict) and "bytes" in f and f.keys() <= {"bytes", "path"}]
    return images or structs or [n for n, f in features.items() if _kind(f) in ("binary", "large_binary")]


def _label_columns(features: Any) -> list[str]:
    found = [name for name, feature in features.items() if _kind(feature) == "ClassLabel"]
    kinds = ("int", "uint", "string", "large_string")
    named = [
        name for name in found or features if name in LABELS and (found or _kind(features[name]).startswith(kinds))
    ]
    return named if len(found) != 1 and named else found


def _kind(feature: Any) -> str:
    """What a column holds, as the library names it."""
    return feature.dtype if type(feature).__name__ == "Value" else type(feature).__name__


def _is_numbered(names: Sequence[str]) -> bool:
    return list(names) == [str(i) for i in range(len(names))]  # what the library writes where there are no names


def _library(where: str) -> Any:
    try:
        import datasets
    except ModuleNotFoundError:
        raise ValueError(
            f'{where}: reading it takes the library datasets; install it with pip install "mobilevit[datasets]"'
        ) from None
    return datasets


def _load(where: str, load: Callable[[Any], Any]) -> Any:
    datasets = _library(where)
    try:
        return load(datasets)
    except Exception as error:  # of the network, the hub, the files, and what the library makes of these
        reason = first_line(error.__cause__ or error)
        remedy = "check name and connection" if where.startswith("hf:") else "are its files whole?"
        raise ValueError(f"{where}: cannot be loaded ({reason}); {remedy}") from error
