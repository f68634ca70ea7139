"""Label files (.csv, .tsv, .jsonl, .parquet) and labels in tar shards: columns, splits, several labels, errors."""

import csv
import importlib.util
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from mobilevit.cli.options import SampleImages
from mobilevit.data.class_sets import ClassSet, labels_of, rarest_classes
from mobilevit.data.samples import Source, fingerprint
from mobilevit.data.sources import TaskName, default_split, find_any_images, find_evaluation_split, find_splits

ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")
Columns = dict[str, list[Any]]


def write_table(file: Path, columns: Columns) -> Path:
    """Write a table; in text formats, lists are joined by a separator."""
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table(columns), file)
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with file.open("w", newline="") as lines:
            writer = csv.writer(lines, delimiter="\t" if file.suffix == ".tsv" else ",")
            writer.writerow(columns)
            writer.writerows(
                ["|".join(value) if isinstance(value, list) else value for value in row.values()] for row in rows
            )
    return file


def touch(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def numbered(num: int) -> list[str]:
    return [f"photos/{i:02}.png" for i in range(num)]


def labels_by_key(*sources: Source) -> dict[str, Any]:
    """The names of the labels of each image by its key."""

    def named(source: Source, label: Any) -> Any:
        names = source.class_names
        return [names[i] for i in label.indices] if isinstance(label, ClassSet) else names[label]

    return {
        key: named(source, label) for source in sources for key, label in zip(source.keys(), source.labels, strict=True)
    }


@pytest.mark.parametrize("ending", ENDINGS)
def test_single_labels_in_splits(tmp_path: Path, ending: str):
    names = numbered(6)
    touch(tmp_path, names)
    labels, splits = ["dog", "cat", "cat", "dog", "cat", "dog"], ["train"] * 3 + ["Valid", "test", "test"]
    file = write_table(
        tmp_path / f"labels{ending}", {"id": list(range(6)), "file_name": names, "label": labels, "split": splits}
    )
    train, val = find_splits("classify", file, 0.5)
    assert (train.class_names, val.class_names) == (("cat", "dog"), ("cat", "dog"))
    assert (list(train.labels), list(val.labels)) == ([1, 0, 0], [1])
    assert [train[i].image for i in range(3)] == [tmp_path / name for name in names[:3]]
    assert list(train.keys()) == names[:3]
    assert default_split("classify", file) == "val"
    test = find_evaluation_split("classify", file, ("dog", "cat"), "test")
    assert list(test.labels) == [1, 0]
    assert train.notes == (f"{file} (train): 1 of 2 labels occur once: 'dog'",)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    "labels",
    [
        [["b", "a"], ["a"], [], ["b"], ["c", "a"], ["a", "b", "c"]],
        ["b|a", "a", "", "b", "c ; a", " c|a|b|a"],
    ],
)
def test_several_labels(tmp_path: Path, ending: str, labels: list[Any]):
    names = numbered(6)
    touch(tmp_path, names)
    file = write_table(tmp_path / f"labels{ending}", {"image": names, "tags": labels})
    train, val = find_splits("multilabel", file, 0.4)
    expected = [["a", "b"], ["a"], [], ["b"], ["a", "c"], ["a", "b", "c"]]
    assert labels_by_key(train, val) == dict(zip(names, expected, strict=True))
    assert train.class_names == ("a", "b", "c")


@pytest.mark.parametrize(("zero", "one"), [("0", "1"), (0, 1), (0.0, 1.0), (False, True)])
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_column_for_each_class(tmp_path: Path, ending: str, zero: Any, one: Any):
    names = numbered(4)
    touch(tmp_path, names)
    bits = {"zebra": [zero, one, one, zero], "Ant": [one, one, zero, zero], "ant": [one, zero, zero, zero]}
    file = write_table(tmp_path / f"labels{ending}", {"path": names, **bits, "split": ["train"] * 2 + ["val"] * 2})
    train, val = find_splits("multilabel", file, 0.5)
    assert train.class_names == ("zebra", "Ant", "ant")
    assert [label.indices for label in (*train.labels, *val.labels)] == [(1, 2), (0, 1), (0,), ()]
    assert train.notes == (f"{file} (train): 2 of 3 labels occur once: 'ant', 'zebra'",)
    assert "no validation images of classes 'Ant', 'ant'" in val.notes[-1]


def test_one_hot_columns_are_single_labels(tmp_path: Path):
    names = numbered(4)
    touch(tmp_path, names)
    file = write_table(tmp_path / "labels.csv", {"path": names, "x": [1, 1, 0, 0], "y": [0, 0, 1, 1]})
    train, val = find_splits("classify", file, 0.5)
    assert labels_by_key(train, val) == dict(zip(names, "xxyy", strict=True))


@pytest.mark.parametrize("task", ["classify", "multilabel"])
def test_numbers_are_sorted_by_value_and_named_by_classes_txt(tmp_path: Path, task: TaskName):
    names = numbered(24)
    touch(tmp_path, names)
    numbers = [9, 10, 2] * 8
    file = write_table(tmp_path / "labels.jsonl", {"path": names, "label": numbers})
    train, val = find_splits(task, file, 0.3)
    assert train.class_names == ("2", "9", "10")
    assert set(map(str, labels_by_key(train, val).values())) == (
        {"2", "9", "10"} if task == "classify" else {"['2']", "['9']", "['10']"}
    )
    (tmp_path / "classes.txt").write_text("cat\ndog\nowl\n")
    file = write_table(tmp_path / "named.jsonl", {"path": names, "label": [0, 1, 2] * 8})
    train, val = find_splits(task, file, 0.3)
    assert train.class_names == ("cat", "dog", "owl")
    assert labels_by_key(train, val)[names[4]] == ("dog" if task == "classify" else ["dog"])
    file = write_table(tmp_path / "wrong.jsonl", {"path": names, "label": [0, 1, 3] * 8})
    with pytest.raises(ValueError, match=r"wrong.jsonl: class '3' not among the 3 classes of classes.txt \(cat, dog"):
        find_splits(task, file, 0.3)


def test_spreadsheet_export(tmp_path: Path):
    touch(tmp_path, numbered(4))
    rows = ["\ufeff;Path;Label", *(f"{i};{name};{'ab'[i % 2]}" for i, name in enumerate(numbered(4)))]
    (tmp_path / "labels.csv").write_text("\r\n".join(rows) + "\r\n\r\n", encoding="utf-8")
    train, val = find_splits("classify", tmp_path / "labels.csv", 0.5)
    assert labels_by_key(train, val) == dict(zip(numbered(4), "abab", strict=True))


def test_paths_are_relative_to_the_file(tmp_path: Path):
    touch(tmp_path / "here", ["a/1.png", "a/2.png", "3.png", "4.png"])
    (tmp_path / "here" / "labels").mkdir()
    paths = ["../a/1.png", "../a/../a/2.png", "../3.png", str(tmp_path / "here" / "4.png")]
    file = write_table(tmp_path / "here" / "labels" / "x.csv", {"path": paths, "label": list("abab")})
    train, val = find_splits("classify", file, 0.5)
    assert sorted(labels_by_key(train, val)) == sorted(["../a/1.png", "../a/2.png", "../3.png", paths[3]])
    assert all(Path(source[i].name).is_file() for source in (train, val) for i in range(len(source)))


def test_the_fingerprint_depends_on_labels_but_not_on_the_place(tmp_path: Path):
    prints = []
    for folder, labels in (("a", "x|y"), ("b", "x|y"), ("c", "x")):
        touch(tmp_path / folder, numbered(6))
        table = {
            "path": numbered(6),
            "label": ["x", "y", "x|y", "y", "x", labels],
            "split": [*["val"] * 2, *["train"] * 4],
        }
        file = write_table(tmp_path / folder / "labels.csv", table)
        prints.append(fingerprint(find_evaluation_split("multilabel", file, ("x", "y"), "train")))
    assert prints[0] == prints[1] != prints[2]


def test_rare_labels_are_in_both_splits(tmp_path: Path):
    names, random = numbered(200), np.random.default_rng(0)
    touch(tmp_path, names)
    labels = [[f"common{j}" for j in range(3) if random.random() < 0.5] for _ in names]
    for i in range(4):
        for j in range(2):
            labels[20 * i + j].append(f"rare{i}")
    file = write_table(tmp_path / "labels.jsonl", {"path": names, "labels": labels})
    train, val = find_splits("multilabel", file, 0.2)
    assert 35 <= len(val) <= 45
    assert all({i for label in source.labels for i in label.indices} == set(range(7)) for source in (train, val))
    assert rarest_classes([ClassSet((0, 1)), ClassSet((0,)), ClassSet(())]) == [1, 0, -1]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, ()),
        ("", ()),
        ("a", ("a",)),
        (" b |a;; a", ("a", "b")),
        (3, ("3",)),
        (3.0, ("3",)),
        (float("nan"), ()),
        ([2, "a"], ("2", "a")),
        (True, None),
        (1.5, None),
        ({"a": 1}, None),
        ([["x"], None], ("x",)),
    ],
)
def test_labels_of_a_value(value: Any, expected: tuple[str, ...] | None):
    assert labels_of(value) == expected


# --- Errors -----------------------------------------------------------------------------------------------------------

FOUR = {"path": numbered(4), "label": list("abab")}


@pytest.mark.parametrize(
    ("columns", "messages"),
    [
        ({"url": ["x"], "label": ["a"]}, ["no column of paths among the columns url, label", "file_name", "tags"]),
        ({"path": ["x"], "kind": ["a"]}, ["no column of labels among the columns path, kind", "line 2: 'a'"]),
        ({"path": ["x"]}, ["no column of labels among the columns path", "class_name"]),
        ({"path": ["x"], "a": ["1"], "b": [""]}, ["column b is not one of 0 and 1 (line 2: '')"]),
        ({**FOUR, "file": numbered(4)}, ["columns path and file have the same meaning"]),
        ({**FOUR, "tags": list("abab")}, ["columns label and tags have the same meaning"]),
        ({**FOUR, "path": ["", *numbered(3)]}, ["1 rows without a path (first: line 2)"]),
        ({**FOUR, "label": ["a", "", "b", ""]}, ["2 images without a label (first: photos/01.png, line 3)", "recipe"]),
        ({**FOUR, "label": ["a", "b", "c|a", "b"]}, ["1 images with several labels", "line 4: a|c", "multilabel"]),
        ({**FOUR, "split": ["train", "hold", "", "val"]}, ["2 rows with an unknown split (first: line 3: 'hold')"]),
        (
            {"path": ["1.png", "./1.png", "1.png"], "label": ["a", "a", "b"], "split": ["train", "val", "train"]},
            [
                "1 files are in two splits (first: 1.png, line 2 and line 3: train, val)",
                "1 files have different labels (first: 1.png, line 2 and line 4)",
            ],
        ),
        (
            {**FOUR, "path": [*numbered(2), "x.png", "y.png"]},
            ["2 of 4 files do not exist (first: ", "x.png, line 4)", "relative to the folder"],
        ),
        ({"path": numbered(4), "label": list("aaab")}, ["class b: one image is too few"]),
        ({"path": [], "label": []}, ["has no rows"]),
    ],
)  # fmt: skip
def test_errors_name_number_place_and_fix(tmp_path: Path, columns: Columns, messages: list[str]):
    touch(tmp_path, [*numbered(4), "1.png"])
    file = write_table(tmp_path / "labels.csv", columns)
    with pytest.raises(ValueError, match=r"labels.csv: ") as caught:
        find_splits("classify", file, 0.5)
    assert str(caught.value).startswith(str(file))
    assert [message for message in messages if message not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "x.csv",
            b"path,label\n1.png,a\n1.png\n1.png,b,c\n",
            "2 rows with another number of values (first: line 3: 1)",
        ),
        ("x.csv", b"path,label,path\n", "several columns are called path"),
        ("x.csv", b"", "is empty"),
        ("x.csv", b"path,label\n\xff.png,a\n", "not UTF-8"),
        ("x.jsonl", b'{"path": "1.png"}\n\n[1]\n{"path"\n', "2 lines are not JSON objects (first: line 3)"),
        ("x.jsonl", b'{"path": "1.png", "label": {"a": 1}}\n', "1 labels are neither text"),
        ("x.jsonl", b"\xff\n", "not UTF-8"),
        ("x.csv", b"path,label\n1.png,\n2.png,\n", "none of the 1 training images has a label"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, message: str):
    touch(tmp_path, ["1.png", "2.png"])
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.") as caught:
        find_splits("multilabel", tmp_path / name, 0.5)
    assert message in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


def test_repeated_rows_are_counted_once(tmp_path: Path):
    touch(tmp_path, numbered(4))
    file = write_table(tmp_path / "x.csv", {"path": [*numbered(4), *numbered(2)], "label": list("ababab")})
    train, val = find_splits("classify", file, 0.5)
    assert len(train) + len(val) == 4
    assert train.notes[0] == f"{file}: 2 rows repeat another row and are ignored"


def test_a_label_of_the_validation_split_only(tmp_path: Path):
    touch(tmp_path, numbered(4))
    table = {**FOUR, "label": ["a", "b", "a", "catt"], "split": ["train", "train", "val", "val"]}
    tasks: tuple[TaskName, ...] = ("classify", "multilabel")
    for task in tasks:
        with pytest.raises(ValueError, match=r"x.csv \(val\): class 'catt' not among the 2 known classes"):
            find_splits(task, write_table(tmp_path / "x.csv", table), 0.5)


def test_a_missing_label_file_and_a_folder_with_one(tmp_path: Path):
    with pytest.raises(ValueError, match=r"labels.csv: no such file"):
        find_splits("classify", tmp_path / "labels.csv", 0.5)
    touch(tmp_path, numbered(4))
    file = write_table(tmp_path / "labels.csv", FOUR)
    with pytest.raises(ValueError, match=f"give the file: {file}"):
        find_splits("multilabel", tmp_path, 0.5)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = write_table(tmp_path / "x.parquet", FOUR)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"x.parquet: reading it requires pyarrow.*mobilevit\[parquet\]"):
        find_splits("multilabel", file, 0.5)


# --- Tar shards -------------------------------------------------------------------------------------------------------


def write_tar(file: Path, members: dict[str, Any]) -> Path:
    with tarfile.open(file, "w") as tar:
        for name, value in members.items():
            content = value if isinstance(value, bytes) else json.dumps(value).encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


@pytest.mark.parametrize("in_folder", [False, True])
def test_tar_shards_with_labels_in_json(tmp_path: Path, in_folder: bool):
    labels = [{"tags": ["b", "a"]}, {"labels": []}, {"label": "a|c"}, {"class": "c"}, {"cls": "b"}, {"class_name": "a"}]
    members = {f"{i}{end}": value for i, one in enumerate(labels) for end, value in ((".png", b""), (".json", one))}
    file = write_tar(tmp_path / "x.tar", members)
    train, val = find_splits("multilabel", tmp_path if in_folder else file, 0.4)
    found = [labels_by_key(train, val)[f"x.tar/{i}"] for i in range(6)]
    assert found == [["a", "b"], [], ["a", "c"], ["c"], ["b"], ["a"]]
    with pytest.raises(ValueError, match=r"2 of 6 images have several labels \(first: .*/0: a\|b\).* multilabel"):
        find_splits("classify", file, 0.4)


@pytest.mark.parametrize("name", ["shards/x.tar", "shards", "files/labels.csv"])
def test_images_of_data_with_several_labels(tmp_path: Path, name: str):
    """As samples for an export, or as images of another source."""
    members: dict[str, Any] = {}
    for folder in ("shards", "files"):
        (tmp_path / folder).mkdir()
    for i in range(4):
        Image.new("RGB", (40, 30 + i)).save(file := tmp_path / "files" / f"{i}.png")
        members |= {f"{i}.png": file.read_bytes(), f"{i}.json": {"tags": ["a", "b"]}}
    write_tar(tmp_path / "shards/x.tar", members)
    (tmp_path / "files/labels.csv").write_text("path,label\n" + "".join(f"{i}.png,a|b\n" for i in range(4)))
    assert len(find_any_images(tmp_path / name)) == 4
    sizes = {image.size for image in SampleImages((str(tmp_path / name),)).read()}
    assert sizes < {(40, 30 + i) for i in range(4)}  # one image is in the validation split
    assert len(sizes) == 3


def test_tar_shards_without_labels(tmp_path: Path):
    file = write_tar(tmp_path / "x.tar", {"1.png": b"", "1.json": {"tags": ["a"]}, "2.png": b"", "3.png": b""})
    with pytest.raises(ValueError, match=r"x.tar/2: 2 of 3 images have no label"):
        find_splits("multilabel", file, 0.4)
