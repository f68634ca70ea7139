"""idx files and tar shards: contents and errors."""

import gzip
import io
import json
import os
import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mobilevit.data.checks import check_images
from mobilevit.data.loader import ImageDataset, load
from mobilevit.data.sampler import eval_batches
from mobilevit.data.samples import Source, fingerprint, read_class_names
from mobilevit.data.sources import default_split, find_evaluation_split, find_splits
from mobilevit.data.tar import TarImages
from mobilevit.data.transforms import Evaluation
from mobilevit.images import ImageError, Preprocessing, read_image

# --- idx --------------------------------------------------------------------------------------------------------------


def find_evaluation(
    data: str | Path, class_names: tuple[str, ...], split: str | None = None, val_fraction: float | None = None
) -> Source:
    split = split or default_split("classify", data)
    return find_evaluation_split("classify", data, class_names, split, val_fraction)


def idx(array: np.ndarray) -> bytes:
    lengths = b"".join(length.to_bytes(4, "big") for length in array.shape)
    return bytes([0, 0, 8, array.ndim]) + lengths + array.astype(np.uint8).tobytes()


def write_idx(
    folder: Path, prefix: str, labels: Sequence[int], shape: tuple[int, ...] = (5, 3), ending: str = ""
) -> np.ndarray:
    random = np.random.default_rng(len(labels))
    pixels = random.integers(0, 256, (len(labels), *shape), dtype=np.uint8)
    pack = gzip.compress if ending == ".gz" else bytes
    folder.mkdir(exist_ok=True)
    (folder / f"{prefix}-images-idx3-ubyte{ending}").write_bytes(pack(idx(pixels)))
    (folder / f"{prefix}-labels-idx1-ubyte{ending}").write_bytes(pack(idx(np.array(labels))))
    return pixels


def pixels_of(source: Source) -> list[np.ndarray]:
    return [np.asarray(source[i].image) for i in range(len(source))]


@pytest.mark.parametrize("test", ["t10k", "test"])
@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("shape", [(28, 28), (5, 3), (5, 3, 1), (5, 3, 3)])
def test_idx_splits(tmp_path: Path, shape: tuple[int, ...], ending: str, test: str):
    train_pixels = write_idx(tmp_path, "train", [0, 1, 2, 1, 0, 2, 2], shape, ending)
    test_pixels = write_idx(tmp_path, test, [1, 0], shape, ending)
    train, val = find_splits("classify", tmp_path, 0.5)
    assert train.class_names == val.class_names == ("0", "1", "2")
    assert (list(train.labels), list(val.labels)) == ([0, 1, 2, 1, 0, 2, 2], [1, 0])
    squeezed = shape[:2] if shape[2:] == (1,) else shape
    assert np.array_equal(pixels_of(train), train_pixels.reshape(-1, *squeezed))
    assert np.array_equal(pixels_of(val), test_pixels.reshape(-1, *squeezed))
    assert read_image(train[6].image).size == shape[1::-1]
    assert train[6].name == f"{tmp_path}/train-images-idx3-ubyte{ending}[6]"
    evaluation = find_evaluation(tmp_path, ("a", "b", "c"))
    assert (list(evaluation.labels), evaluation.class_names) == ([1, 0], ("a", "b", "c"))
    assert default_split("classify", tmp_path) == "test"
    assert check_images(train, val).unreadable == []


def test_idx_dotted_names_and_gzip_without_extension(tmp_path: Path):
    pixels = write_idx(tmp_path, "train", [0, 1, 0, 1])
    for file in sorted(tmp_path.iterdir()):
        file.with_name(file.name.replace("-idx", ".idx")).write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    assert np.array_equal(pixels_of(find_evaluation(tmp_path, ("0", "1"))), pixels)


def test_idx_without_test_files_is_divided_by_class(tmp_path: Path):
    pixels = write_idx(tmp_path, "train", [0] * 40 + [1] * 40 + [2] * 2)
    train, val = find_splits("classify", tmp_path, 0.25)
    assert len(train) + len(val) == 82
    assert set(train.labels) == set(val.labels) == {0, 1, 2}
    assert 3 <= list(val.labels).count(0) <= 20
    found = {p.tobytes() for p in pixels_of(train)} | {p.tobytes() for p in pixels_of(val)}
    assert found == {p.tobytes() for p in pixels}
    assert len(find_evaluation(tmp_path, ("0", "1", "2"))) == 82
    assert default_split("classify", tmp_path) == "all"
    write_idx(tmp_path / "few", "train", [0, 0, 1])
    with pytest.raises(ValueError, match="few: class 1: one image is too few"):
        find_splits("classify", tmp_path / "few", 0.25)
    with pytest.raises(ValueError, match=r"^val_fraction is 1"):
        find_splits("classify", tmp_path, 1)


def test_idx_test_files_alone(tmp_path: Path):
    write_idx(tmp_path, "t10k", [0, 1, 1])
    assert len(find_evaluation(tmp_path, ("a", "b"))) == 3
    with pytest.raises(ValueError, match=f"^{tmp_path}: has only the splits test; expected one to train on"):
        find_splits("classify", tmp_path, 0.2)


def test_idx_with_class_names(tmp_path: Path):
    write_idx(tmp_path, "train", [0, 1, 1])
    write_idx(tmp_path, "t10k", [1, 0])
    (tmp_path / "classes.txt").write_text("\ufeffshirt\n ankle boot \n\n")
    assert find_splits("classify", tmp_path, 0.5)[0].class_names == ("shirt", "ankle boot")
    assert list(find_evaluation(tmp_path, ("ankle boot", "bag", "shirt")).labels) == [0, 2]
    with pytest.raises(ValueError, match="class 'shirt' not among the 2 known classes"):
        find_evaluation(tmp_path, ("bag", "ankle boot"))


@pytest.mark.parametrize(
    ("train", "test", "names", "message"),
    [
        ([0, 1, 2], [0], "a\nb", r"train-images-idx3-ubyte\[2\]: label 2 is out of range; it must be from 0 to 1"),
        ([0, 1], [0, 2], "", r"t10k-images-idx3-ubyte\[1\]: label 2 is out of range"),
        ([0, 1], [0, 2], "a\nb", r"t10k-images-idx3-ubyte\[1\]: label 2 is out of range"),
        ([0, 1], [0], "a\nb\nc", "train-images-idx3-ubyte: no images of class 'c'"),
        ([0, 2], [0], "", "train-images-idx3-ubyte: no images of class '1'"),
        ([0, 0], [0], "", "train-images-idx3-ubyte: found only class '0'"),
        ([], [0], "", "train-images-idx3-ubyte: contains no images"),
        ([0, 1], [], "", "t10k-images-idx3-ubyte: contains no images"),
        ([0, 1], [0], "a\n\nb", "classes.txt: line 2 is empty"),
        ([0, 1], [0], "a\nb\na", "classes.txt: 'a' is in lines 1 and 3"),
        ([0, 1], [0], "\n", "classes.txt: is empty"),
    ],
)
def test_idx_labels_out_of_range(tmp_path: Path, train: list[int], test: list[int], names: str, message: str):
    write_idx(tmp_path, "train", train)
    write_idx(tmp_path, "t10k", test)
    if names:
        (tmp_path / "classes.txt").write_text(names)
    with pytest.raises(ValueError, match=f"^{tmp_path}/{message}") as caught:
        find_splits("classify", tmp_path, 0.5)
    assert "\n" not in str(caught.value)


def test_classes_txt_that_is_not_text(tmp_path: Path):
    assert read_class_names(tmp_path) is None
    (tmp_path / "classes.txt").write_bytes(b"a\n\xff\xfe")
    with pytest.raises(ValueError, match=f"^{tmp_path}/classes.txt: not UTF-8"):
        read_class_names(tmp_path / "missing", tmp_path)


ZIPPED = gzip.compress(idx(np.random.default_rng(0).integers(0, 256, (3, 40, 40), dtype=np.uint8)), mtime=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "starts with nothing"),
        (b"\0\0\x08", "starts with 00 00 08; an idx file"),
        (b"\0\0\x09\x03" + bytes(12), "starts with 00 00 09 03"),  # signed bytes
        (b"\0\0\x0d\x03" + bytes(12), "starts with 00 00 0d 03"),  # floating-point
        (b"\x89PNG\r\n", "starts with 89 50 4e 47"),
        (b"\0\0\x08\0", "starts with 00 00 08 00"),
        (b"\0\0\x08\x03\0\0", r"6 bytes do not match the shape \(0, 0, 0\)"),
        (idx(np.zeros((3, 4, 4)))[:-1], r"63 bytes do not match the shape \(3, 4, 4\); .*truncated"),
        (idx(np.zeros((3, 4, 4))) + b"\0", r"65 bytes do not match the shape \(3, 4, 4\)"),
        (b"\0\0\x08\x03" + b"\xff" * 12 + bytes(9), "25 bytes do not match the shape .4294967295,"),
        (idx(np.zeros((2, 4, 4))), r"2 images, but the labels in train-labels-idx1-ubyte have shape \(3,\)"),
        (idx(np.zeros(3)), r"shape is \(3,\)"),
        (idx(np.zeros((3, 0, 4))), r"shape is \(3, 0, 4\)"),
        (idx(np.zeros((3, 4, 4, 2))), r"shape is \(3, 4, 4, 2\).* 3 or 4 channels"),
        (idx(np.zeros((3, 3, 4, 4, 3))), r"shape is \(3, 3, 4, 4, 3\)"),
        (ZIPPED[: len(ZIPPED) // 2], "damaged gzip file"),
        (ZIPPED[:-4], "damaged gzip file"),
        (ZIPPED[:5], "damaged gzip file"),
        (ZIPPED[:99] + bytes(99) + ZIPPED[198:], "damaged gzip file"),
        (ZIPPED[:-8] + bytes(8), "damaged gzip file"),
        (ZIPPED + b"more", "damaged gzip file"),
    ],
)
def test_damaged_idx_files(tmp_path: Path, content: bytes, message: str):
    write_idx(tmp_path, "train", [0, 1, 1])
    file = tmp_path / "train-images-idx3-ubyte"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{file}: {message}") as caught:
        find_splits("classify", tmp_path, 0.5)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx(np.zeros((3, 1))), r"3 images, but the labels in .* have shape \(3, 1\)"),
        (idx(np.zeros(2)), r"3 images, but the labels in .* have shape \(2,\)"),
        (idx(np.zeros(3))[:-1], "10 bytes do not match"),
    ],
)
def test_damaged_idx_labels(tmp_path: Path, content: bytes, message: str):
    write_idx(tmp_path, "train", [0, 1, 1])
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match=f"^{tmp_path}/train-(images|labels)-idx.-ubyte: {message}"):
        find_splits("classify", tmp_path, 0.5)


@pytest.mark.parametrize(("gone", "left"), [("images-idx3", "labels-idx1"), ("labels-idx1", "images-idx3")])
def test_idx_images_or_labels_missing(tmp_path: Path, gone: str, left: str):
    write_idx(tmp_path, "train", [0, 1])
    (tmp_path / f"train-{gone}-ubyte").unlink()
    with pytest.raises(ValueError, match=f"^{tmp_path}/train-{left}-ubyte: train-{gone}-ubyte or .* missing"):
        find_splits("classify", tmp_path, 0.5)


# --- tar --------------------------------------------------------------------------------------------------------------


def png(number: int, side: int = 8) -> bytes:
    """An image whose gray level is its number."""
    file = io.BytesIO()
    Image.new("L", (side, side), number).save(file, "png")
    return file.getvalue()


def write_tar(file: Path, members: dict[str, bytes | str], **how) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, how.pop("mode", "w"), **how) as tar:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file


def pairs(labels: Sequence[int | str], first: int = 0) -> dict[str, bytes | str]:
    members: dict[str, bytes | str] = {}
    for i, label in enumerate(labels, first):
        members |= {f"{i:04}.png": png(i), f"{i:04}.cls": str(label)}
    return members


def grays(source: Source) -> list[tuple[int, int]]:
    """Gray level and label of every image."""
    samples = [source[i] for i in range(len(source))]
    pixels = [read_image(sample.image, sample.name).getpixel((0, 0)) for sample in samples]
    assert [sample.label for sample in samples] == list(source.labels)
    return [(pixel[0], sample.label) for pixel, sample in zip(pixels, samples, strict=True) if isinstance(pixel, tuple)]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("train-{}.tar", "val-{}.tar"),
        ("digits-train-{}.tar", "digits-validation-{}.tar"),
        ("train/{}.tar", "val/{}.tar"),
        ("train/shard{}.tar", "test/shard{}.tar"),
        ("data/train_{}.TAR", "data/test_{}.TAR"),
    ],
)
def test_tar_splits(tmp_path: Path, train: str, val: str, format: int):
    write_tar(tmp_path / train.format("000"), pairs([0, 1, 2]), format=format)
    write_tar(tmp_path / train.format("001"), pairs([2, 1], first=3), format=format)
    write_tar(tmp_path / val.format("000"), pairs([1, 0], first=5), format=format)
    train_set, val_set = find_splits("classify", tmp_path, 0.5)
    assert grays(train_set) == [(0, 0), (1, 1), (2, 2), (3, 2), (4, 1)]
    assert grays(val_set) == [(5, 1), (6, 0)]
    assert train_set.class_names == val_set.class_names == ("0", "1", "2")
    assert train_set[4].name == f"{tmp_path / train.format('001')}/0004"
    assert grays(find_evaluation(tmp_path, ("a", "b", "c"))) == grays(val_set)
    assert default_split("classify", tmp_path) == ("test" if "test" in val else "val")


@pytest.mark.parametrize("alone", [True, False])
def test_tar_without_splits_is_divided(tmp_path: Path, alone: bool):
    write_tar(tmp_path / "x-000.tar", pairs([0] * 30 + [1] * 30))
    if not alone:
        write_tar(tmp_path / "x-001.tar", pairs([1] * 30, first=60))
    data = tmp_path / "x-000.tar" if alone else tmp_path
    train, val = find_splits("classify", data, 0.3)
    assert sorted(grays(train) + grays(val)) == [(i, int(i >= 30)) for i in range(60 if alone else 90)]
    assert set(train.labels) == set(val.labels) == {0, 1}
    write_tar(tmp_path / ("x-000.tar" if alone else "x-002.tar"), pairs([0] * 30 + [1] * 30 + [0] * 9))
    more_train, more_val = find_splits("classify", data, 0.3)  # each added image moves at most one other
    moved = set(grays(train)) & set(grays(more_val)) | set(grays(val)) & set(grays(more_train))
    assert len(moved) <= len(more_train) + len(more_val) - len(train) - len(val)


def test_tar_members(tmp_path: Path):
    jpeg = io.BytesIO()
    Image.new("L", (9, 7), 200).save(jpeg, "jpeg")
    long = "deep/" * 30 + "er/name"  # too long for a plain header
    members: dict[str, bytes | str] = {
        "README.md": "no sample",
        "dir.with.dots/1.JPG": jpeg.getvalue(),
        "dir.with.dots/1.seg.png": png(9),  # another image of the same key, under another name
        "dir.with.dots/1.cls": " 1\n",
        "._2.png": b"no image",
        ".png": b"no image",
        "2.json": json.dumps({"label": 0, "cls": "ignored", "caption": "x"}),
        "2.png": png(2),
        "2.txt": "a caption",
        "3.webp": jpeg.getvalue(),
        "3.json": json.dumps({"cls": 1}),
        f"{long}.png": png(3, side=90),
        f"{long}.cls": "0",
        "meta.json": "{}",
    }
    file = write_tar(tmp_path / "x.tar", members)
    with tarfile.open(file, "a") as tar:
        tar.add(tmp_path, "empty.png", recursive=False)  # a folder
    source = find_evaluation(file, ("a", "b"))
    assert grays(source) == [(200, 1), (2, 0), (200, 1), (3, 0)]
    assert [source[i].name.removeprefix(f"{file}/") for i in range(4)] == ["dir.with.dots/1", "2", "3", long]


def test_tar_class_names_as_labels(tmp_path: Path):
    write_tar(tmp_path / "train.tar", pairs(["dog", "cat", "cat", "émeu"]))
    write_tar(tmp_path / "val.tar", {"1.png": png(7), "1.json": json.dumps({"label": "dog"})})
    train, val = find_splits("classify", tmp_path, 0.5)
    assert train.class_names == ("cat", "dog", "émeu")
    assert (grays(train), grays(val)) == ([(0, 1), (1, 0), (2, 0), (3, 2)], [(7, 1)])
    assert grays(find_evaluation(tmp_path, ("emu", "dog"))) == [(7, 1)]
    (tmp_path / "val.tar").unlink()
    with pytest.raises(ValueError, match=r"^.*: class 'émeu' not among the 2 known classes \(cat, dog\)"):
        find_evaluation(tmp_path, ("cat", "dog"))


@pytest.mark.parametrize("place", ["", "train"])
def test_tar_with_class_names(tmp_path: Path, place: str):
    write_tar(tmp_path / "train" / "0.tar", pairs([0, 1]))
    write_tar(tmp_path / "val" / "0.tar", pairs([1]))
    (tmp_path / place / "classes.txt").write_text("shirt\nboot\n")
    train, val = find_splits("classify", tmp_path, 0.5)
    assert train.class_names == val.class_names == ("shirt", "boot")


def test_tar_class_missing_in_the_training_split(tmp_path: Path):
    write_tar(tmp_path / "train.tar", pairs(["a", "b"]))
    write_tar(tmp_path / "val.tar", pairs(["a", "c"]))
    with pytest.raises(ValueError, match=rf"^{tmp_path} \(val\): class 'c' not among the 2 known classes \(a, b\)"):
        find_splits("classify", tmp_path, 0.5)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"1.png": b"", "1.cls": "0", "2.png": b""}, "/2: 1 of 2 images have no label"),
        ({"1.png": b"", "1.cls": "", "2.png": b"", "2.cls": "1"}, "/1: .* have no label"),
        ({"1.png": b"", "1.json": '{"caption": "x"}'}, "/1: .* have no label"),
        ({"1.png": b"", "1.json": "[]"}, "/1: .* have no label"),
        ({"1.png": b"", "1.json": '{"label": 1.5}'}, "/1.json: label is 1.5"),
        ({"1.png": b"", "1.json": '{"label": true}'}, "/1.json: label is True"),
        ({"1.png": b"", "1.json": "{"}, "/1.json: not JSON"),
        ({"1.png": b"", "1.cls": b"\xff"}, "/1.cls: not UTF-8"),
        ({"1.png": b"", "1.cls": "-1"}, "/1: label -1 is out of range"),
        ({"1.png": b"", "1.cls": "0", "2.cls": "1"}, r"/2: has a label but no image \(found .cls\)"),
        ({"1.png": b"", "1.jpg": b"", "1.cls": "1"}, ": 1.jpg is a duplicate for its key"),
        ({"a.txt": b"", "b.txt": b""}, ": no images in the tar; expected pairs"),
        ({}, ": no images in the tar"),
        (
            {"1.png": b"", "1.cls": "0", "2.png": b"", "2.cls": "b"},
            ": labels are .* .0. and names .'b'.",
        ),
        ({"1.png": b"", "1.cls": "0", "2.png": b"", "2.cls": "0"}, ": found only class '0'"),
        ({"1.png": b"", "1.cls": "0", "2.png": b"", "2.cls": "1"}, r": 2 classes \(0, 1\): one image is too few"),
    ],
)
def test_tars_that_cannot_be_trained_on(tmp_path: Path, members: dict[str, bytes | str], message: str):
    file = write_tar(tmp_path / "x.tar", members)
    with pytest.raises(ValueError, match=f"^{file}{message}") as caught:
        find_splits("classify", file, 0.5)
    assert "\n" not in str(caught.value)


def test_truncated_tar(tmp_path: Path):
    file = write_tar(tmp_path / "x.tar", pairs([0, 1, 0, 1]))
    whole = file.read_bytes()
    with tarfile.open(file) as tar:
        end = tar.getmembers()[-1].offset_data + 512
    for length in [*range(0, end + 1, 256), 1, 511, 700, end - 1, end + 511]:
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"^{file}: (damaged|truncated) tar file") as caught:
            find_splits("classify", file, 0.5)
        assert "\n" not in str(caught.value)
    file.write_bytes(whole[: end + 512])  # less than the usual padding is enough
    assert len(find_evaluation(file, ("a", "b"))) == 4


def test_damaged_tar(tmp_path: Path):
    file = tmp_path / "x.tar"
    whole = write_tar(file, pairs([0, 1, 0, 1])).read_bytes()
    for content in (b"text" * 999, whole[:3072] + b"garbage!" * 64 + whole[3584:]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"^{file}: (damaged|truncated) tar file"):
            find_splits("classify", file, 0.5)


@pytest.mark.parametrize(("how", "tool"), [("gz", "gunzip"), ("bz2", "bunzip2"), ("xz", "unxz")])
def test_compressed_tars_are_refused(tmp_path: Path, how: str, tool: str):
    for name in (f"x.tar.{how}", "x.tar"):  # the second is recognized by its first bytes
        file = write_tar(tmp_path / name, pairs([0, 1]), mode=f"w:{how}")
        for data in (file, tmp_path):
            with pytest.raises(ValueError, match=f"^{file}: a compressed tar.* uncompress it with {tool}$"):
                find_splits("classify", data, 0.5)
        file.unlink()


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # where there is one core
@pytest.mark.filterwarnings("ignore:This process .*is multi-threaded:DeprecationWarning")
def test_tars_in_worker_processes(tmp_path: Path):
    write_tar(tmp_path / "0.tar", pairs([0, 1] * 5))
    write_tar(tmp_path / "1.tar", pairs([0, 1] * 5, first=10))
    source = find_evaluation(tmp_path, ("0", "1"))
    assert grays(pickle.loads(pickle.dumps(source))) == grays(source) == [(i, i % 2) for i in range(20)]
    dataset = ImageDataset(source, Evaluation(Preprocessing(resize_px=8, crop_px=8)))
    batches = eval_batches(20, batch_size=3, size_px=8)
    alone, helped = (list(load(dataset, batches, num_workers=n, device="cpu")) for n in (0, 3))
    assert torch.cat([batch.pixels[:, 0, 0, 0] for batch in helped]).tolist() == list(range(20))
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(alone, helped, strict=True))
    if hasattr(os, "fork"):  # no open file that processes would share
        (tmp_path / "1.tar").unlink()
        with pytest.raises(ImageError, match=f"^{tmp_path}/1.tar/0010: cannot be read .no such file"):
            source[10]


def test_check_of_tars(tmp_path: Path):
    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)).save(noise, "tiff")
    members = {
        **pairs([0, 1]),
        "2.tiff": noise.getvalue(),
        "2.cls": "0",
        "3.png": b"no image",
        "3.cls": "1",
        "4.png": b"",
        "4.cls": "1",
    }
    source = find_evaluation(write_tar(tmp_path / "x.tar", members), ("0", "1"))
    wrong = [f"{tmp_path}/x.tar/{key}" for key in "34"]
    with pytest.raises(ImageError, match=f"^{wrong[0]}: not an image.*; {wrong[1]}: not an image.*--max-unreadable 2$"):
        check_images(source, max_unreadable=1)
    assert [error.partition(": ")[0] for error in check_images(source, max_unreadable=2).unreadable] == wrong
    assert isinstance(source, Source)
    assert isinstance(source.images, TarImages)
    assert source.images.read(0, 4) == b"\x89PNG"
    (tmp_path / "x.tar").unlink()
    with pytest.raises(ImageError, match=r"^.*x.tar/0000: cannot be read"):
        check_images(source)


def test_fingerprint_of_tars(tmp_path: Path):
    write_tar(tmp_path / "here" / "x.tar", pairs([0, 1, 0, 1]))
    write_tar(tmp_path / "there" / "x.tar", pairs([0, 1, 0, 1]))
    write_tar(tmp_path / "other" / "x.tar", pairs([0, 1, 0, 1], first=1))
    prints = [fingerprint(find_splits("classify", tmp_path / name, 0.5)[0]) for name in ("here", "there", "other")]
    assert prints[0] == prints[1] != prints[2]
