"""Label files: tables with a row for each image, as .csv, .tsv, .jsonl or .parquet."""

from __future__ import annotations

import csv
import importlib.util
import json
import posixpath
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mobilevit.data.class_sets import labels_of, split_of_labels
from mobilevit.data.samples import SPLIT_NAMES, Split, Splits, read_class_names
from mobilevit.files import require
from mobilevit.messages import first_line, join_names

LABEL_FILE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
PATHS = ("path", "file", "file_name", "filename", "image")
LABELS = ("label", "class", "class_name", "labels", "tags")
SPLIT = "split"
ACCEPTED = (
    f"a column of paths ({', '.join(PATHS)}), a column of labels ({', '.join(LABELS)}) or one column of 0 and 1 for "
    f"each class, and optionally {SPLIT}"
)
BITS = {"0": False, "0.0": False, "False": False, "1": True, "1.0": True, "True": True}


@dataclass(frozen=True)
class TableImages:
    """Images in files, by paths relative to the folder of the table."""

    root: Path
    paths: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Path:
        return self.root / self.paths[index]

    def key(self, index: int) -> str:
        return self.paths[index]

    def name(self, index: int) -> str:
        return str(self[index])


class Row(NamedTuple):
    """One row: the path as normalized text, its labels, its split, and its place in messages."""

    path: str
    labels: tuple[str, ...]
    split: str
    place: str


@dataclass
class _Table:
    """The columns of a file by name, and the place of each row in messages."""

    columns: dict[str, list[Any]]
    places: list[str]


@dataclass
class _Problems:
    """Rows that cannot be used: by kind, their number and the first one."""

    file: Path
    first: dict[tuple[str, str], str] = field(default_factory=dict)
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, what: str, fix: str, where: str) -> None:
        self.first.setdefault((what, fix), where)
        self.counts[what, fix] += 1

    def check(self) -> None:
        """Raise ValueError with all kinds of problems, if there are any."""
        if self.first:
            kinds = (
                f"{self.counts[kind]:,} {kind[0]} (first: {where}): {kind[1]}" for kind, where in self.first.items()
            )
            raise ValueError(f"{self.file}: {'; '.join(kinds)}")


def is_label_file(data: Path) -> bool:
    """Whether `data` is a table with a column of paths, and not one that contains images."""
    if data.suffix.lower() not in LABEL_FILE_SUFFIXES or not data.is_file():
        return False
    if data.suffix.lower() != ".parquet":
        return True
    if importlib.util.find_spec("pyarrow") is None:
        return False
    import pyarrow
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(data)
    except (OSError, pyarrow.ArrowException):
        return False  # the library datasets reports it
    is_text = {
        one.name.strip().lower(): pyarrow.types.is_string(one.type) or pyarrow.types.is_large_string(one.type)
        for one in schema
    }
    return any(is_text.get(name, False) for name in PATHS)


def table_splits(file: Path, *, multilabel: bool) -> Splits:
    """The splits of a label file; without a column of splits, "all".

    Columns are found by name, see `ACCEPTED`. Paths are relative to the folder of the file. Several labels are
    separated by | or ;, or are a list in .jsonl and .parquet. Class indices are named by classes.txt, if it exists in
    the same folder.

    Raises:
        ValueError: a file that cannot be read, other columns, and, with their number and the first row: rows without a
            path, labels that are not text, unknown splits, a file in two splits or with different labels; for a single
            label per image, also rows with none or several. When a split is read: files that do not exist.
    """
    table = _READERS[file.suffix.lower()](file)
    if not table.places:
        raise ValueError(f"{file}: has no rows; expected a header and one row for each image")
    rows, class_names, note = _rows(file, table, multilabel)
    by_split: dict[str, list[Row]] = {}
    for row in rows:
        by_split.setdefault(row.split, []).append(row)
    class_names = class_names or read_class_names(file.parent)
    return {
        split: partial(_read_split, file, split, of_split, class_names, multilabel, (note,) if note else ())
        for split, of_split in by_split.items()
    }


def _read_split(
    file: Path,
    split: str,
    rows: Sequence[Row],
    class_names: tuple[str, ...] | None,
    multilabel: bool,
    notes: tuple[str, ...],
) -> Split:
    images = TableImages(file.parent, tuple(row.path for row in rows))
    location = str(file) if split == "all" else f"{file} ({split})"
    missing = [i for i in range(len(images)) if not images[i].is_file()]
    if missing:
        raise ValueError(
            f"{location}: {len(missing):,} of {len(images):,} files do not exist (first: {images.name(missing[0])}, "
            f"{rows[missing[0]].place}); paths are relative to the folder {file.parent}"
        )
    counts = Counter(label for row in rows for label in row.labels)
    once = sorted(label for label, num in counts.items() if num == 1)
    if once and split in ("train", "all"):
        notes += (f"{location}: {len(once):,} of {len(counts):,} labels occur once: {join_names(map(repr, once))}",)
    labels = [row.labels for row in rows]
    return split_of_labels(location, images, labels, class_names, multilabel=multilabel, notes=notes)


# ---------------------------------------------------------------------------------------------------------------------
# Columns and rows


def _rows(file: Path, table: _Table, multilabel: bool) -> tuple[list[Row], tuple[str, ...] | None, str]:
    """The rows without repetitions, the class names if there is a column for each class, and a note on repetitions."""
    columns = {name.strip().lower(): name for name in table.columns if name.strip()}
    path_column = _one_of(file, columns, PATHS)
    label_column = _one_of(file, columns, LABELS)
    if path_column is None:
        raise ValueError(f"{file}: no column of paths among {_listed(columns)}; expected {ACCEPTED}")
    class_names = None
    if label_column is None:
        others = (path_column, columns.get(SPLIT))
        class_names = tuple(name for name in table.columns if name.strip() and name not in others)
        labels = _labels_of_bits(file, table, class_names, _listed(columns))
    else:
        labels = map(labels_of, table.columns[label_column])
    splits = table.columns[columns[SPLIT]] if SPLIT in columns else ["all"] * len(table.places)
    rows: dict[str, Row] = {}
    problems, num_repeated = _Problems(file), 0
    for path, of_row, split, place in zip(table.columns[path_column], labels, splits, table.places, strict=True):
        if not isinstance(path, str) or not path.strip():
            problems.add("rows without a path", "fill in or remove them", place)
            continue
        row = Row(posixpath.normpath(path.strip()), of_row or (), _split_of(split), place)
        _check_row(problems, row, of_row, split, label_column, multilabel)
        first = rows.setdefault(row.path, row)
        if first is not row:
            where = f"{row.path}, {first.place} and {place}"
            if first.split != row.split:
                problems.add("files are in two splits", "keep one row of each", f"{where}: {first.split}, {row.split}")
            elif first.labels != row.labels:
                fix = "write one row with all labels of the file" if multilabel else "keep one row of each"
                problems.add("files have different labels", fix, where)
            num_repeated += 1
    problems.check()
    note = f"{file}: {num_repeated:,} rows repeat another row and are ignored" if num_repeated else ""
    return list(rows.values()), class_names, note


def _check_row(
    problems: _Problems, row: Row, labels: tuple[str, ...] | None, split: Any, column: str | None, multilabel: bool
) -> None:
    if not row.split:
        problems.add("rows with an unknown split", "write train, val or test", f"{row.place}: {split!r}")
    if labels is None:
        problems.add("labels are neither text, whole numbers nor lists of them", f"fix the column {column}", row.place)
    elif not labels and not multilabel:
        fix = "label or remove them; only the recipe multilabel accepts images without a label"
        problems.add("images without a label", fix, f"{row.path}, {row.place}")
    elif len(labels) > 1 and not multilabel:
        fix = (
            "train them with the recipe multilabel (compare and inspect: --task multilabel), or keep one label of each"
        )
        problems.add("images with several labels", fix, f"{row.path}, {row.place}: {'|'.join(labels)}")


def _split_of(value: Any) -> str:
    """ "train", "val", "test", "all", or "" for an unknown name."""
    name = str(value).strip().lower()
    return "all" if name == "all" else SPLIT_NAMES.get(name, "")


def _one_of(file: Path, columns: dict[str, str], accepted: Sequence[str]) -> str | None:
    found = [columns[name] for name in accepted if name in columns]
    if len(found) > 1:
        raise ValueError(
            f"{file}: the columns {' and '.join(found)} have the same meaning; remove or rename all but one"
        )
    return found[0] if found else None


def _labels_of_bits(file: Path, table: _Table, class_names: Sequence[str], listed: str) -> Iterator[tuple[str, ...]]:
    """The labels of each row from one column of 0 and 1 for each class."""
    bits = []
    for name in class_names:
        values = [BITS.get(str(value).strip()) for value in table.columns[name]]
        if None in values:
            i = values.index(None)
            raise ValueError(
                f"{file}: no column of labels among {listed}, and column {name} is not one of 0 and 1 "
                f"({table.places[i]}: {table.columns[name][i]!r}); expected {ACCEPTED}"
            )
        bits.append(values)
    if not bits:
        raise ValueError(f"{file}: no column of labels among {listed}; expected {ACCEPTED}")
    return (tuple(name for name, bit in zip(class_names, row, strict=True) if bit) for row in zip(*bits, strict=True))


def _listed(columns: dict[str, str]) -> str:
    return f"the columns {join_names(columns.values())}" if columns else "no columns"


# ---------------------------------------------------------------------------------------------------------------------
# Files


def _read_csv(file: Path) -> _Table:
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            header = lines.readline()
            lines.seek(0)
            reader = csv.reader(lines, delimiter=max(",;\t", key=header.count))
            rows = [(row, f"line {reader.line_num}") for row in reader if row]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text ({first_line(error)}); save it as UTF-8") from None
    except csv.Error as error:
        raise ValueError(f"{file}: damaged table ({first_line(error)}); fix it") from None
    if not rows:
        raise ValueError(f"{file}: is empty; expected a header with {ACCEPTED}")
    names = rows.pop(0)[0]
    if repeated := [name for name, num in Counter(names).items() if num > 1 and name.strip()]:
        raise ValueError(f"{file}: several columns are called {repeated[0]}; rename or remove one")
    problems = _Problems(file)
    for row, place in rows:
        if len(row) != len(names):
            fix = f'expected {len(names)} as in the header; put values that contain the delimiter in "quotes"'
            problems.add("rows with another number of values", fix, f"{place}: {len(row)}")
    problems.check()
    columns = {name: [row[i] for row, _ in rows] for i, name in enumerate(names)}
    return _Table(columns, [place for _, place in rows])


def _read_jsonl(file: Path) -> _Table:
    values: list[dict[str, Any]] = []
    places: list[str] = []
    problems = _Problems(file)
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for i, line in enumerate(lines, start=1):
                if line.strip():
                    try:
                        value = json.loads(line)
                    except ValueError:
                        value = None
                    if not isinstance(value, dict):
                        problems.add("lines are not JSON objects", "write one object for each image", f"line {i}")
                        continue
                    values.append(value)
                    places.append(f"line {i}")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text ({first_line(error)}); save it as UTF-8") from None
    problems.check()
    names = dict.fromkeys(name for value in values for name in value)
    return _Table({name: [value.get(name) for value in values] for name in names}, places)


def _read_parquet(file: Path) -> _Table:
    parquet = require("pyarrow.parquet", "parquet", f"{file}: reading it")
    try:
        table = parquet.read_table(file)
    except Exception as error:  # pyarrow raises several types
        raise ValueError(f"{file}: cannot be read ({first_line(error)}); check that the file is complete") from None
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    return _Table(columns, [f"row {i}" for i in range(1, table.num_rows + 1)])


_READERS: dict[str, Callable[[Path], _Table]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
