"""Folders of images, validation splits, subsets, fingerprints and header checks of sources."""

import gzip
import hashlib
import io
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mobilevit.data import checks
from mobilevit.data.checks import check_images
from mobilevit.data.idx import ImageArray
from mobilevit.data.samples import Source, divide, fingerprint
from mobilevit.data.sources import default_split, find_evaluation_split, find_splits
from mobilevit.images import ImageError, read_image


def find_evaluation(
    data: str | Path, class_names: tuple[str, ...], split: str | None = None, val_fraction: float | None = None
) -> Source:
    split = split or default_split("classify", data)
    return find_evaluation_split("classify", data, class_names, split, val_fraction)


def touch(root: Path, *names: str) -> Path:
    """Create empty files."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def files(source: Source) -> list[Path]:
    images = [source[i].image for i in range(len(source))]
    return [image for image in images if isinstance(image, Path)]


def names(source: Source, root: Path) -> list[str]:
    return [file.relative_to(root).as_posix() for file in files(source)]


def numbered(class_name: str, num: int) -> list[str]:
    return [f"{class_name}/{i:03}.png" for i in range(num)]


@pytest.mark.parametrize("others", [("val",), ("test",), ("val", "test")])
def test_train_and_val_folders(tmp_path: Path, others: tuple[str, ...]):
    touch(tmp_path, "train/b/1.png", "train/a/2.JPG", "train/a/sub/sub/3.webp")
    for other in others:
        touch(tmp_path, f"{other}/b/4.png")
    train, val = find_splits("classify", tmp_path, val_fraction=0.5)
    assert names(train, tmp_path) == ["train/a/2.JPG", "train/a/sub/sub/3.webp", "train/b/1.png"]
    assert list(train.labels) == [0, 0, 1]
    assert names(val, tmp_path) == [f"{others[0]}/b/4.png"]
    assert list(val.labels) == [1]
    assert train.class_names == val.class_names == ("a", "b")


def test_hidden_files_and_other_files_are_ignored(tmp_path: Path):
    data = touch(
        tmp_path / ".hidden" / "data", "a/1.png", "a/2.png", "b/1.png", "b/2.png"
    )  # a hidden parent folder is allowed
    found = {file for source in find_splits("classify", data, 0.5) for file in files(source)}
    touch(data, ".git/x.png", "a/._1.png", "a/.thumbnails/1.png", "a/notes.txt", "readme.png", "b/no.png.part")
    (data / "b" / "folder.png").mkdir()
    assert {file for source in find_splits("classify", data, 0.5) for file in files(source)} == found
    assert len(found) == 4


def test_links_to_class_folders_are_followed(tmp_path: Path):
    touch(tmp_path, "elsewhere/1.png", "elsewhere/2.png", "data/b/1.png", "data/b/2.png")
    (tmp_path / "data" / "a").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert sum(len(folder) for folder in find_splits("classify", tmp_path / "data", 0.5)) == 4


def test_each_added_image_moves_at_most_one_other_between_the_splits(tmp_path: Path):
    touch(tmp_path, *numbered("a", 60), *numbered("b", 60))
    train, val = find_splits("classify", tmp_path, 0.2)
    num_moved = 0
    for i in range(60):
        touch(tmp_path, f"a/new{i}.png")
        more_train, more_val = find_splits("classify", tmp_path, 0.2)
        moved = set(files(train)) & set(files(more_val)) | set(files(val)) & set(files(more_train))
        assert len(moved) <= 1
        num_moved += len(moved)
        train, val = more_train, more_val
    assert num_moved < 20


def test_ignored_files_are_counted_and_named(tmp_path: Path):
    touch(tmp_path, *numbered("a", 4), *numbered("b", 4), "readme.txt", "a/.hidden.svg")
    assert len(find_splits("classify", tmp_path, 0.5)[0].notes) == 1  # the note that the data are divided
    touch(tmp_path, *(f"a/{i}.SVG" for i in range(6)), "b/sub/notes.txt", "b/LICENSE")
    for source in (find_splits("classify", tmp_path, 0.5)[0], find_evaluation(tmp_path, ("a", "b"))):
        note = source.notes[0]
        assert note.startswith(f"{tmp_path}: ")
        assert all(text in note for text in ("6 .svg", "1 .txt", "1 without a suffix", str(tmp_path / "a/4.SVG")))
        assert "a/5.SVG" not in note
    touch(tmp_path, "c/1.mp4", "c/2.mp4")
    with pytest.raises(ValueError, match=r"/c: no images in this class \(it contains 2 .mp4: .*/c/1.mp4, .*/c/2.mp4\)"):
        find_splits("classify", tmp_path, 0.5)


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("x.zip", "extract it"),
        ("labels.json", "not a supported file; expected"),
        ("labels.xml", "not a supported file; expected"),
        ("https://host/flowers", "download it first"),
    ],
)
def test_unsupported_data_with_a_fix(tmp_path: Path, name: str, fix: str):
    data = name if "://" in name else str(touch(tmp_path, name) / name)
    for find in [partial(find_splits, task, val_fraction=0.5) for task in ("classify", "detect", "segment")]:
        with pytest.raises(ValueError, match=fix) as caught:
            find(data)
        assert str(caught.value).startswith(str(Path(data)) if "://" not in name else "https:/")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux takes any bytes for a name")
def test_names_of_any_bytes(tmp_path: Path):
    data = touch(tmp_path, os.fsdecode(b"a/\xff1.png"), "a/2.png", "b/1.png", "b/2.png")
    assert sum(len(folder) for folder in find_splits("classify", data, 0.5)) == 4


def test_split_depends_on_relative_names_only(tmp_path: Path):
    found = numbered("a", 30) + numbered("b", 30)
    here, there = touch(tmp_path / "here", *found), touch(tmp_path / "there" / "deep", *reversed(found))
    for mine, yours in zip(find_splits("classify", here, 0.3), find_splits("classify", there, 0.3), strict=True):
        assert names(mine, here) == names(yours, there)


@pytest.mark.parametrize(("fraction", "expected"), [(0.1, [5, 4]), (0.2, [10, 8]), (0.5, [26, 20])])
def test_the_validation_split_has_exactly_the_fraction_of_each_class(
    tmp_path: Path, fraction: float, expected: list[int]
):
    # In the second class every image has the same name, in a separate folder.
    touch(tmp_path, *numbered("a", 51), *(f"b/{i}/photo.jpg" for i in range(40)))
    train, val = find_splits("classify", tmp_path, fraction)
    assert sorted((*files(train), *files(val))) == sorted(tmp_path.rglob("*.*"))
    assert [list(val.labels).count(label) for label in (0, 1)] == expected


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("num", [2, 3, 7])
def test_every_class_is_in_both_splits(tmp_path: Path, fraction: float, num: int):
    touch(tmp_path, *numbered("a", num), *numbered("b", num), *numbered("c", num))
    train, val = find_splits("classify", tmp_path, fraction)
    assert set(train.labels) == set(val.labels) == {0, 1, 2}
    assert not set(files(train)) & set(files(val))
    assert len(train) + len(val) == 3 * num


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([], "no class folders with images; expected one folder"),
        (["1.png"], "no class folders with images"),
        (numbered("a", 3), "found only class 'a'; expected"),
        ([*numbered("a", 3), "b/notes.txt"], "b: no images in this class"),
        ([*numbered("a", 3), "b/._1.png"], "b: no images in this class"),
        ([*numbered("a", 3), "b/1.png"], "b: one image is too few"),
        (["train/a/1.png", "train/b/1.png"], "has train/ but neither val/ nor test/"),
        (["train/a/1.png", "val/a/1.png"], "train: found only class 'a'"),
        (["train/a/1.png", "train/b/1.png", "val/c/1.png"], "val: class 'c' not among the 2 known classes .a, b."),
        (["train/a/1.png", "train/b/1.png", "val/1.png"], "val: no class folders with images"),
        (["train/a/1.png", "train/b/1.png", "val/a/1.txt"], "val.a: no images in this class"),
    ],
)
def test_folders_that_cannot_be_trained_on(tmp_path: Path, found: list[str], message: str):
    with pytest.raises(ValueError, match=message) as caught:
        find_splits("classify", touch(tmp_path, *found), 0.2)
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_missing_folder_and_invalid_fraction(tmp_path: Path):
    touch(tmp_path, "file", *numbered("a", 2), *numbered("b", 2))
    for name, message in (
        ("missing", "no such folder$"),
        ("file", "neither a folder nor a file of type .parquet, .arrow, .tar$"),
    ):
        for find in (
            lambda p: find_splits("classify", p, 0.2),
            lambda p: find_evaluation(p, ("a", "b")),
            partial(default_split, "classify"),
        ):
            with pytest.raises(ValueError, match=f"^{tmp_path / name}: {message}"):
                find(tmp_path / name)
    for fraction in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match=f"^val_fraction is {fraction}"):
            find_splits("classify", tmp_path, fraction)


def test_evaluation_prefers_val_to_test_to_all(tmp_path: Path):
    class_names = ("b", "unseen", "a")  # indices are those of the network, not of the folder
    for name in ("", "test", "val"):
        touch(tmp_path / name, "a/1.png", "b/1.png", "b/2.png")
        folder = find_evaluation(tmp_path, class_names)
        assert names(folder, tmp_path / name) == ["a/1.png", "b/1.png", "b/2.png"]
        assert list(folder.labels) == [2, 0, 0]
        assert default_split("classify", tmp_path) == (name or "all")
        assert folder.class_names == class_names
    with pytest.raises(ValueError, match=r"'b' not among the 1 known classes \(a\)"):
        find_evaluation(tmp_path, ("a",))
    with pytest.raises(ValueError, match=r"'b' not among the 9 known classes \(a, a1, a2, a3, a4, ...\)"):
        find_evaluation(tmp_path, ("a", *(f"a{i}" for i in range(1, 9))))


def test_samples(tmp_path: Path):
    for name, color in (("a/1.png", 10), ("a/2.png", 20), ("b/1.png", 30), ("b/2.png", 40)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (3, 2), color).save(tmp_path / name)
    colors = {}
    for source in find_splits("classify", tmp_path, 0.5):
        for i in range(len(source)):
            sample = source[i]
            assert sample.name == str(sample.image)
            image = read_image(sample.image, sample.name)
            assert (image.mode, image.size) == ("RGB", (3, 2))
            assert sample.label == source.labels[i]
            assert source.class_names[sample.label] == Path(sample.name).parent.name
            colors[Path(sample.name).relative_to(tmp_path).as_posix()] = image.getpixel((0, 0))
    assert colors == {
        name: (c, c, c) for name, c in (("a/1.png", 10), ("a/2.png", 20), ("b/1.png", 30), ("b/2.png", 40))
    }

    (tmp_path / "a" / "1.png").write_bytes(b"no image")
    sample = find_evaluation(tmp_path, ("a", "b"))[0]  # nothing is read yet
    with pytest.raises(ImageError, match=f"^{tmp_path / 'a' / '1.png'}: not an image"):
        read_image(sample.image, sample.name)


def test_named_splits_of_divided_data(tmp_path: Path):
    for split in ("train", "val", "test"):
        touch(tmp_path, f"{split}/a/{split}.png", f"{split}/b/{split}.png")
    for split in ("train", "val", "test"):
        source = find_evaluation(tmp_path, ("b", "a"), split)
        assert names(source, tmp_path) == [f"{split}/a/{split}.png", f"{split}/b/{split}.png"]
        assert list(source.labels) == [1, 0]
    with pytest.raises(
        ValueError, match=f"^{tmp_path}: has no split 'all'; choose one of train, val, test with --split"
    ):
        find_evaluation(tmp_path, ("a", "b"), "all")


def test_named_splits_of_undivided_data_are_those_of_training(tmp_path: Path):
    touch(tmp_path, *numbered("a", 10), *numbered("b", 15))
    for split, source in zip(("train", "val"), find_splits("classify", tmp_path, 0.3), strict=True):
        # The order of the network's classes has no effect.
        assert files(find_evaluation(tmp_path, ("b", "a"), split, 0.3)) == files(source)
    assert len(find_evaluation(tmp_path, ("a", "b"), "all")) == 25
    for split, fraction in (("test", 0.3), ("val", None)):
        with pytest.raises(ValueError, match=f"^{tmp_path}: has no split '{split}'.*--split all"):
            find_evaluation(tmp_path, ("a", "b"), split, fraction)


@pytest.mark.parametrize("as_given", [str, Path])
def test_data_may_be_a_string(tmp_path: Path, as_given: type):
    data = as_given(touch(tmp_path, *numbered("a", 2), *numbered("b", 2)))
    assert [len(source) for source in find_splits("classify", data, 0.5)] == [2, 2]
    assert len(find_evaluation(data, ("a", "b"))) == 4


def test_validation_split_has_the_smallest_hashes(tmp_path: Path):
    touch(tmp_path, *numbered("a", 40), *numbered("b", 40))
    _, val = find_splits("classify", tmp_path, 0.25)
    by_digest = [sorted(numbered(c, 40), key=lambda n: hashlib.sha256(n.encode()).digest()) for c in "ab"]
    assert names(val, tmp_path) == sorted(by_digest[0][:10] + by_digest[1][:10])


# --- Subsets ----------------------------------------------------------------------------------------------------------


def arrays(labels: list[int], class_names: tuple[str, ...] = ("a", "b")) -> Source:
    """Images whose pixels have the value of their index."""
    pixels = np.broadcast_to(np.arange(len(labels), dtype=np.uint8)[:, None, None], (len(labels), 2, 2))
    return Source(ImageArray(pixels, "numbers"), tuple(labels), class_names)


def test_subset_of_a_subset():
    some = arrays([0, 1, 0, 1, 1]).subset((4, 0, 2)).subset((2, 0))
    assert (len(some), some.labels, some.class_names) == (2, (0, 1), ("a", "b"))
    assert [(s.name, s.label) for s in (some[0], some[1])] == [("numbers[2]", 0), ("numbers[4]", 1)]


def test_divide():
    train, val = divide(arrays([0, 1] * 100), 0.25, "data")
    assert sorted((*train.indices, *val.indices)) == list(range(200))  # pyright: ignore[reportOptionalIterable]
    assert [val.labels.count(label) for label in (0, 1)] == [25, 25]
    with pytest.raises(ValueError, match=r"^data: class b: one image is too few"):
        divide(arrays([0, 0, 1]), 0.25, "data")
    train, val = divide(arrays([0, 0]), 0.25, "data")  # a class may be missing in evaluation
    assert (len(train), len(val)) == (1, 1)


# --- Fingerprints -----------------------------------------------------------------------------------------------------


def test_fingerprint_of_folders(tmp_path: Path):
    found = numbered("a", 5) + numbered("b", 5)
    here, there = touch(tmp_path / "here", *found), touch(tmp_path / "there" / "deep", *found)

    def fingerprints(data: Path) -> list[str]:
        return [
            fingerprint(source) for source in (*find_splits("classify", data, 0.5), find_evaluation(data, ("a", "b")))
        ]

    before = fingerprints(here)
    assert before == fingerprints(there) == fingerprints(here)
    assert len(set(before)) == 3
    assert all(len(p) == 16 and int(p, 16) >= 0 for p in before)
    (there / "a" / "000.png").rename(there / "a" / "new.png")
    assert fingerprints(there)[2] != before[2]
    (here / "b").rename(here / "c")
    assert fingerprint(find_splits("classify", here, 0.5)[0]) != before[0]


def test_fingerprint_depends_on_classes_labels_and_images():
    one = arrays([0, 1, 1])
    others = [arrays([0, 1, 0]), arrays([0, 1]), arrays([0, 1, 1], ("a", "c")), arrays([0, 1, 1], ("ab", ""))]
    subsets = [one.subset((0, 1)), one.subset((0, 2)), one.subset((2, 0))]
    assert len({fingerprint(source) for source in (one, *others, *subsets)}) == 7  # of 8 sources, two are equal:
    assert fingerprint(subsets[0]) == fingerprint(arrays([0, 1]))
    assert fingerprint(one.subset((0, 1, 2))) == fingerprint(one)


# --- Headers ----------------------------------------------------------------------------------------------------------


def test_check_names_unreadable_images(tmp_path: Path):
    for name in ("a/1", "a/2", "b/1", "b/2"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    folders = find_splits("classify", tmp_path, 0.5)
    assert check_images(*folders).unreadable == []
    wrong = [str(tmp_path / name) for name in ("a/2.png", "b/1.png")]
    for name in wrong:
        Path(name).write_text("no image")
    for max_unreadable in (0, 1):
        with pytest.raises(ImageError) as caught:
            check_images(*folders, max_unreadable=max_unreadable)
        assert all(name in str(caught.value) for name in wrong)
        assert "1.png" not in str(caught.value).replace(wrong[1], "")
        assert "--max-unreadable 2" in str(caught.value)
    errors = check_images(*folders, max_unreadable=2).unreadable
    assert sorted(error.partition(": ")[0] for error in errors) == wrong


class ImageBytes(tuple):
    """Images in memory, in a format of this test."""

    def key(self, index: int) -> str:
        return str(index)

    def name(self, index: int) -> str:
        return f"number {index}"


def test_check_of_bytes_and_pixels():
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "png")
    source = Source(ImageBytes([file.getvalue(), b"", b"no image"] * 200), (0,) * 600, ("a", "b"))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ImageError, match=r"^number 1: not .*; number 7: not .*; and 395 more; replace"):
        check_images(source, arrays([0, 1]))
    [error] = check_images(source.subset((0, 1, 3)), arrays([0, 1]), max_unreadable=1).unreadable
    assert error.startswith("number 1: not an image")


def test_check_counts_transparent_and_large_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    Image.new("RGBA", (4, 4)).save(tmp_path / "a/1.png")
    Image.new("P", (4, 4)).save(tmp_path / "a/2.png", transparency=0)
    Image.new("RGB", (40, 30)).save(tmp_path / "b/1.png")
    Image.new("RGB", (50, 30)).save(tmp_path / "b/2.jpg")
    four_channels = Source(ImageArray(np.zeros((2, 3, 3, 4), np.uint8), "pixels"), (0, 1), ("a", "b"))
    found = check_images(*find_splits("classify", tmp_path, 0.5), four_channels)
    assert (found.unreadable, found.num_transparent, found.large) == ([], 4, [])
    assert [note for note in found.notes() if "4; composited on white" in note] == found.notes()
    monkeypatch.setattr(checks, "LARGE_MEGAPIXELS", 1e-3)
    monkeypatch.setattr(checks, "OTHER_MEGAPIXELS_PER_SECOND", 1e-3)  # 1.2 s, and almost 0 for the JPEG file
    _, note = check_images(*find_splits("classify", tmp_path, 0.5)).notes()
    assert "2; decoding them takes about 2 s" in note
    assert note.index(str(tmp_path / "b/2.jpg")) < note.index(str(tmp_path / "b/1.png"))
    assert "a/1.png" not in note
    assert "mogrify -resize" in note


# --- Several kinds, or none -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (["x.tar", "x.parquet"], ": contains .parquet files and .tar files; remove all but one"),
        (
            ["x.tar", *numbered("a", 1), *numbered("b", 1)],
            ": contains .tar files and class folders; remove all but one",
        ),
        (["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "x.arrow"], ": contains idx files and .arrow files; "),
        (
            ["state.json", "train-images-idx3-ubyte", "train-labels-idx1-ubyte"],
            ": contains idx files and a saved",
        ),
        (["train/x.tar", "train/a/1.png", "train/b/1.png", "val/a/1.png"], ": contains .tar files and class folders"),
        (["train.tar", "x.tar"], "/x.tar: its name contains no split, .* add train, val or test"),
        (["1.png"], ": no class folders with images; expected one folder of images"),
        (["x.tar.gz"], "/x.tar.gz: a compressed .*; uncompress it with gunzip$"),
        (["train/x.tar.zst", "val/x.tar.zst"], "/train/x.tar.zst: a compressed .*; uncompress it with unzstd$"),
        (["val-0.tar", "test-0.tar"], ": has only the splits test, val; expected one to train on$"),
    ],
)
def test_several_formats_or_none(tmp_path: Path, found: list[str], message: str):
    with pytest.raises(ValueError, match=f"^{tmp_path}{message}") as caught:
        find_splits("classify", touch(tmp_path, *found), 0.2)
    assert "\n" not in str(caught.value)


def test_other_files_beside_class_folders_are_ignored(tmp_path: Path):
    data = touch(tmp_path, *numbered("a", 2), *numbered("b", 2), "photos.tar.gz", ".x.tar", "cache-1.arrow", "a/x.tar")
    assert [len(source) for source in find_splits("classify", data, 0.5)] == [2, 2]


FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist puts it


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_fashion_mnist():
    train, val = find_splits("classify", FASHION_MNIST, 0.1)
    assert train.class_names == tuple("0123456789")
    assert np.bincount(train.labels).tolist() == [6000] * 10
    assert np.bincount(val.labels).tolist() == [1000] * 10
    raw = gzip.decompress((FASHION_MNIST / "t10k-images-idx3-ubyte.gz").read_bytes())
    image = val[9999].image
    assert isinstance(image, np.ndarray)
    assert image.tobytes() == raw[-28 * 28 :]
    assert find_evaluation(FASHION_MNIST, tuple("abcdefghij")).labels == val.labels
