"""Tables of the library `datasets`: columns, splits and errors."""

import io
import pickle
import socket
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import constants
from PIL import Image as PillowImage

from mobilevit import hub
from mobilevit.data.checks import check_images
from mobilevit.data.hub_datasets import read_table
from mobilevit.data.loader import ImageDataset, load
from mobilevit.data.sampler import eval_batches
from mobilevit.data.samples import Source, fingerprint
from mobilevit.data.sources import default_split, find_evaluation_split, find_splits
from mobilevit.data.transforms import Evaluation
from mobilevit.images import ImageError, Preprocessing, read_image

datasets = pytest.importorskip("datasets")


def find_evaluation(
    data: str | Path, class_names: tuple[str, ...], split: str | None = None, val_fraction: float | None = None
) -> Source:
    split = split or default_split("classify", data)
    return find_evaluation_split("classify", data, class_names, split, val_fraction)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The library's cache in a folder of the test. Network access fails."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a test accesses the network")

    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return folder


def png(number: int) -> bytes:
    """An image whose gray level is its number."""
    file = io.BytesIO()
    PillowImage.new("L", (8, 8), number).save(file, "png")
    return file.getvalue()


CLASSES = datasets.ClassLabel(names=["dog", "cat"])
INT, STRING, BINARY = (datasets.Value(kind) for kind in ("int64", "string", "binary"))


def table(labels: list, feature: Any = CLASSES, first: int = 0, label: str = "label", image: Any = None) -> Any:
    image = image or datasets.Image()
    columns = {
        "image": [{"bytes": png(i), "path": None} for i in range(first, first + len(labels))],
        label: labels,
    }
    if image == BINARY:
        columns["image"] = [source["bytes"] for source in columns["image"]]
    return datasets.Dataset.from_dict(columns, features=datasets.Features({"image": image, label: feature}))


def grays(source: Source) -> list[tuple[int, int]]:
    """Gray level and label of every image."""
    samples = [source[i] for i in range(len(source))]
    assert all(isinstance(sample.image, str | bytes) for sample in samples)  # not decoded yet
    pixels = [read_image(sample.image, sample.name).getpixel((0, 0)) for sample in samples]
    assert [sample.label for sample in samples] == list(source.labels)
    return [(pixel[0], sample.label) for pixel, sample in zip(pixels, samples, strict=True) if isinstance(pixel, tuple)]


def files_in(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


# --- Locations of tables ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("val_name", ["validation", "test", "val"])
def test_saved_splits(tmp_path: Path, val_name: str):
    splits = {val_name: table([1, 0], first=5), "train": table([0, 1, 1])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    before = files_in(tmp_path)
    train, val = find_splits("classify", tmp_path / "saved", 0.5)
    assert train.class_names == val.class_names == ("dog", "cat")
    assert grays(train) == [(0, 0), (1, 1), (2, 1)]
    assert grays(val) == [(5, 1), (6, 0)]
    assert val[1].name == f"{tmp_path}/saved ({val_name})[1]"
    assert grays(find_evaluation(tmp_path / "saved", ("cat", "dog"))) == [(5, 0), (6, 1)]
    assert default_split("classify", tmp_path / "saved") == ("test" if val_name == "test" else "val")
    assert files_in(tmp_path) == before


def test_saved_without_splits_is_divided(tmp_path: Path):
    table([0, 1] * 20).shuffle(seed=0).save_to_disk(tmp_path / "saved")  # rows are accessed through an index
    train, val = find_splits("classify", tmp_path / "saved", 0.3)
    assert sorted(grays(train) + grays(val)) == [(i, i % 2) for i in range(40)]
    assert set(train.labels) == set(val.labels) == {0, 1}
    assert default_split("classify", tmp_path / "saved") == "all"
    datasets.DatasetDict(train=table([0, 1] * 20)).save_to_disk(tmp_path / "only_train")
    train, val = find_splits("classify", tmp_path / "only_train", 0.3)
    assert len(train) + len(val) == 40


def write(rows: Any, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        rows.to_parquet(file)
    else:
        with pa.OSFile(str(file), "wb") as out, pa.ipc.new_stream(out, rows.data.table.schema) as writer:
            writer.write_table(rows.data.table)


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("data/train-0000{}-of-00002", "data/validation-00000-of-00001"),
        ("digits-train-0000{}", "digits-test"),
        ("train/{}", "val/0"),
    ],
)
def test_shards(tmp_path: Path, cache: Path, train: str, val: str, ending: str):
    write(table([0, 1]), tmp_path / f"{train.format(0)}.{ending}")
    write(table([1, 1], first=2), tmp_path / f"{train.format(1)}.{ending}")
    write(table([1, 0], first=5), tmp_path / f"{val}.{ending}")
    before = files_in(tmp_path)
    train_set, val_set = find_splits("classify", str(tmp_path), 0.5)
    assert train_set.class_names == val_set.class_names == ("dog", "cat")
    assert grays(train_set) == [(0, 0), (1, 1), (2, 1), (3, 1)]
    assert grays(val_set) == [(5, 1), (6, 0)]
    assert files_in(tmp_path) == before  # the library's copy is elsewhere
    assert files_in(cache)


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_single_file_is_divided_and_read_again_when_it_changes(tmp_path: Path, ending: str):
    file = tmp_path / f"images.{ending}"
    for labels in ([0, 1] * 10, [1, 1, 0, 0] * 5):
        write(table(labels), file)
        for data in (file, tmp_path):
            train, val = find_splits("classify", data, 0.3)
            assert sorted(grays(train) + grays(val)) == list(enumerate(labels))


def test_hub(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def load_dataset(*args: Any) -> Any:
        asked.append(args)
        return datasets.DatasetDict(train=table([0, 1]), test=table([1], first=5), unsupervised=table([-1]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "unreachable", lambda: "")
    for data in ("hf:owner/name", Path("hf:owner/name"), "hf:name"):
        train, val = find_splits("classify", data, 0.5)
        assert (grays(train), grays(val)) == ([(0, 0), (1, 1)], [(5, 1)])
    assert val[0].name == "hf:name (test)[0]"
    assert default_split("classify", "hf:owner/name/plain_text") == "test"
    assert asked == [("owner/name", None), ("owner/name", None), ("name", None), ("owner/name", "plain_text")]
    for data in ("hf:", "hf:a//b", "hf:a/b/c/d"):
        with pytest.raises(ValueError, match=f"^{data}: not the name of a dataset of the hub; write hf:owner/name"):
            find_splits("classify", data, 0.5)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionError("Couldn't reach the hub\nand more of it"), "Couldn't reach the hub"),
        (FileNotFoundError("Dataset doesn't exist on the Hub"), "Dataset doesn't exist on the Hub"),
        (ValueError("Config name is missing.\nPick one"), "Config name is missing."),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_errors_of_the_hub(monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str):
    def load_dataset(*_: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "unreachable", lambda: "")
    for find in (
        lambda d: find_splits("classify", d, 0.5),
        lambda d: find_evaluation(d, ("a", "b")),
        partial(default_split, "classify"),
    ):
        with pytest.raises(ValueError, match=rf"^hf:owner/name: cannot be loaded \({reason}\); check name") as caught:
            find("hf:owner/name")
        assert "\n" not in str(caught.value)


def test_unreachable_hub(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    with pytest.raises(
        ValueError, match=r"^hf:owner/name: not in the local cache, .* \(http://127.0.0.1:9: .*check the connection"
    ):
        find_splits("classify", "hf:owner/name", 0.5)
    assert not waits  # no retries
    assert capfd.readouterr() == ("", "")
    assert not constants.HF_HUB_OFFLINE


def test_cache_is_used_without_a_connection(monkeypatch: pytest.MonkeyPatch):
    seen = []

    def load_dataset(*_: Any) -> Any:
        seen.append(constants.HF_HUB_OFFLINE)
        return datasets.DatasetDict(train=table([0, 1]), test=table([1], first=5))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "unreachable", lambda: "no connection")
    train, val = find_splits("classify", "hf:owner/name", 0.5)
    assert (grays(train), grays(val)) == ([(0, 0), (1, 1)], [(5, 1)])
    assert seen == [True]


def test_library_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(table([0, 1]), tmp_path / "x.parquet")
    monkeypatch.setitem(sys.modules, "datasets", None)
    for data in (tmp_path, tmp_path / "x.parquet", "hf:owner/name"):
        with pytest.raises(ValueError, match=rf"^{data}: .*pip install 'mobilevit\[datasets\]'$"):
            find_splits("classify", data, 0.5)


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
def test_damaged_files(tmp_path: Path, name: str):
    write(table([0, 1] * 20), tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for content in (b"", b"no table", whole[: len(whole) // 2]):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            ValueError, match=rf"^{tmp_path}(/{name})?: cannot be loaded \(.+\); check that its files"
        ) as caught:
            find_splits("classify", tmp_path, 0.5)
        assert "\n" not in str(caught.value)
        assert "An error occurred" not in str(caught.value)  # not informative


def test_damaged_saved_folder(tmp_path: Path):
    (tmp_path / "dataset_dict.json").write_text("{")
    with pytest.raises(ValueError, match=rf"^{tmp_path}: cannot be loaded"):
        find_splits("classify", tmp_path, 0.5)


def test_splits_of_other_names(tmp_path: Path):
    datasets.DatasetDict(one=table([0, 1] * 5)).save_to_disk(tmp_path / "one")
    assert len(find_evaluation(tmp_path / "one", ("cat", "dog"))) == 10
    datasets.DatasetDict(one=table([0, 1]), two=table([0, 1])).save_to_disk(tmp_path / "two")
    with pytest.raises(ValueError, match=r"two: has the splits one, two; expected train, and validation or test"):
        find_splits("classify", tmp_path / "two", 0.5)
    datasets.DatasetDict(test=table([0, 1])).save_to_disk(tmp_path / "test")
    with pytest.raises(ValueError, match=r"test: has only the splits test; expected one to train on"):
        find_splits("classify", tmp_path / "test", 0.5)


# --- Columns ----------------------------------------------------------------------------------------------------------


def struct() -> dict[str, Any]:
    return {"bytes": BINARY, "path": STRING}


@pytest.mark.parametrize("image", [datasets.Image(), datasets.Image(decode=False), struct(), {"bytes": BINARY}, BINARY])
@pytest.mark.parametrize(
    ("labels", "feature", "label", "class_names", "numbers"),
    [
        ([0, 1, 1], CLASSES, "whatever", ("dog", "cat"), (0, 1, 1)),
        ([2, 0, 1], datasets.ClassLabel(num_classes=3), "label", ("0", "1", "2"), (2, 0, 1)),
        ([1, 0, 1], datasets.Value("uint8"), "fine_label", ("0", "1"), (1, 0, 1)),
        (["cat", "dog", "ant"], STRING, "labels", ("ant", "cat", "dog"), (1, 2, 0)),
    ],
)
def test_columns(labels: list, feature: Any, label: str, class_names: tuple, numbers: tuple, image: Any):
    if image == {"bytes": BINARY}:
        rows = datasets.Dataset.from_dict({"image": [{"bytes": png(i)} for i in range(3)], label: labels})
        rows = rows.cast(datasets.Features({"image": image, label: feature}))
    else:
        rows = table(labels, feature, label=label, image=image)
    for other in (rows, rows.with_format("torch")):
        split = read_table(other.add_column("id", [7, 8, 9]), "here")
        assert split.training_class_names() == class_names
        source = split.source(class_names)
        assert source.labels == numbers
        assert grays(source) == list(enumerate(numbers))


def test_fine_labels_are_preferred():
    rows = table([0, 1], label="coarse_label").add_column("fine_label", [1, 0]).cast_column("fine_label", CLASSES)
    assert read_table(rows, "here").labels == [1, 0]


def test_classes_txt_names_class_indices(tmp_path: Path):
    write(table([0, 1], INT), tmp_path / "train.parquet")
    write(table([1], INT), tmp_path / "test.parquet")
    assert find_splits("classify", tmp_path, 0.5)[0].class_names == ("0", "1")
    assert list(find_evaluation(tmp_path, ("a", "b")).labels) == [1]
    (tmp_path / "classes.txt").write_text("shirt\nboot\n")
    assert find_splits("classify", tmp_path, 0.5)[0].class_names == ("shirt", "boot")
    assert list(find_evaluation(tmp_path, ("boot", "bag")).labels) == [0]


def test_images_by_path(tmp_path: Path):
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    columns = {"image": [str(tmp_path / f"{i}.png") for i in range(4)], "label": [0, 1, 1, 0]}
    features = datasets.Features({"image": datasets.Image(), "label": CLASSES})
    rows = datasets.Dataset.from_dict(columns, features=features)
    source = read_table(rows, "here").source(("dog", "cat"))
    assert source[0].image == str(tmp_path / "0.png")
    assert grays(source) == [(0, 0), (1, 1), (2, 1), (3, 0)]


def test_class_labels_without_names():
    split = read_table(table([2, 0, 1], datasets.ClassLabel(num_classes=3)), "here")
    assert split.source(("a", "b", "c")).labels == (2, 0, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.remove_columns("image"),
            r"no image column, among label \(ClassLabel\); .*one: an Image",
        ),
        (lambda t: t.rename_column("label", "label2").cast_column("label2", INT), r"no label column, among image \(Im"),
        (lambda t: t.cast_column("label", datasets.Value("float32")), r"no label column, .* label \(float32\); expe"),
        (
            lambda t: datasets.concatenate_datasets([t, t.rename_columns({"image": "thumb", "label": "id"})], axis=1),
            r"several image columns, image, thumb, among image \(Image\), label \(ClassLabel\), thumb",
        ),
        (lambda t: t.cast_column("label", INT).add_column("labels", [0, 1]), "several label columns, label, labels,"),
        (
            lambda t: t.rename_column("label", "kind").add_column("breed", [0, 1]).cast_column("breed", CLASSES),
            r"several label columns, kind, breed, among image \(Image\), kind \(ClassLabel\), breed \(ClassLabel\)",
        ),
    ],
)
def test_no_or_several_columns(change: Any, message: str):
    with pytest.raises(ValueError, match=f"^here: {message}") as caught:
        read_table(change(table([0, 1])), "here")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "feature", "message"),
    [
        ([0, 1, None], CLASSES, r"\[2\]: .* have no label"),
        ([0, 1, -1], CLASSES, r"\[2\]: label -1 is out of range"),
        ([0, 1, 7], datasets.Value("int32"), ": no images of classes '2', '3', '4', '5', '6'; add"),
        ([0, 0], CLASSES, ": no images of class 'cat'"),
        (["a", "a"], STRING, ": found only class 'a'"),
        ([], CLASSES, ": contains no images"),
    ],
)
def test_labels_that_cannot_be_trained_on(labels: list, feature: Any, message: str):
    with pytest.raises(ValueError, match=f"^here{message}"):
        read_table(table(labels, feature), "here").training_class_names()


def test_class_missing_in_the_training_split(tmp_path: Path):
    datasets.DatasetDict(train=table(["a", "b"], STRING), test=table(["c"], STRING)).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match=r"\(test\): class 'c' not among the 2 known classes \(a, b\)"):
        find_splits("classify", tmp_path, 0.5)


# --- Reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # where there is one core
@pytest.mark.filterwarnings("ignore:This process .*is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("on_disk", [True, False])
def test_tables_in_worker_processes(tmp_path: Path, on_disk: bool):
    rows = table([0, 1] * 10)
    if on_disk:
        rows.save_to_disk(tmp_path)
        source = find_evaluation(tmp_path, ("dog", "cat"))
    else:
        source = read_table(rows, "here").source(("dog", "cat"))
    assert grays(pickle.loads(pickle.dumps(source))) == grays(source)
    dataset = ImageDataset(source, Evaluation(Preprocessing(resize_px=8, crop_px=8)))
    batches = list(load(dataset, eval_batches(20, batch_size=3, size_px=8), num_workers=2, device="cpu"))
    assert torch.cat([batch.pixels[:, 0, 0, 0] for batch in batches]).tolist() == list(range(20))


def test_missing_or_invalid_images():
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": png(0), "path": "x.png"}, None, {"bytes": b"none", "path": None}], "label": [0, 1, 1]},
        features=datasets.Features({"image": datasets.Image(), "label": CLASSES}),
    )
    source = read_table(rows, "here").source(("dog", "cat"))
    for i in (1, 2):
        with pytest.raises(ImageError, match=rf"^here\[{i}\]: not an image"):
            read_image(source[i].image, source[i].name)
    errors = check_images(source, max_unreadable=2).unreadable
    assert [error.partition(": ")[0] for error in errors] == ["here[1]", "here[2]"]


def test_fingerprint_of_tables(tmp_path: Path):
    for name, labels in (("here", [0, 1, 0, 1]), ("there", [0, 1, 0, 1]), ("other", [0, 1, 1, 0])):
        table(labels).save_to_disk(tmp_path / name)
    prints = [fingerprint(find_evaluation(tmp_path / name, ("dog", "cat"))) for name in ("here", "there", "other")]
    assert prints[0] == prints[1] != prints[2]


def test_parquet_without_metadata(tmp_path: Path):
    """Without the library's metadata in the file: images are bytes, labels are plain values."""
    images = pa.array([png(i) for i in range(6)])
    pq.write_table(pa.table({"image": images, "label": np.array([0, 1] * 3)}), tmp_path / "x.parquet")
    source = find_evaluation(tmp_path, ("a", "b"))
    assert isinstance(source, Source)
    assert grays(source) == [(i, i % 2) for i in range(6)]
