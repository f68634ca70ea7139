"""Folders of pictures: what is found, what is held out, what is refused."""

import os
import sys
from pathlib import Path

import pytest
from PIL import Image

from mobilevit.data.sources import Folder, check_headers, find_evaluation, find_splits
from mobilevit.pictures import PictureError


def touch(root: Path, *names: str) -> Path:
    """Files by name; what is in a picture matters to nobody before it is read."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def names(folder: Folder, root: Path) -> list[str]:
    return [file.relative_to(root).as_posix() for file in folder.files]


def numbered(class_name: str, num: int) -> list[str]:
    return [f"{class_name}/{i:03}.png" for i in range(num)]


@pytest.mark.parametrize("others", [("val",), ("test",), ("val", "test")])
def test_train_and_val_folders(tmp_path: Path, others: tuple[str, ...]):
    touch(tmp_path, "train/b/1.png", "train/a/2.JPG", "train/a/sub/sub/3.webp")
    for other in others:
        touch(tmp_path, f"{other}/b/4.png")
    train, val = find_splits(tmp_path, val_fraction=0.5)
    assert names(train, tmp_path) == ["train/a/2.JPG", "train/a/sub/sub/3.webp", "train/b/1.png"]
    assert train.labels == (0, 0, 1)
    assert names(val, tmp_path) == [f"{others[0]}/b/4.png"]
    assert val.labels == (1,)
    assert train.class_names == val.class_names == ("a", "b")


def test_hidden_files_and_what_is_no_picture_are_left_out(tmp_path: Path):
    data = touch(tmp_path / ".hidden" / "data", "a/1.png", "a/2.png", "b/1.png", "b/2.png")  # above data it may be so
    found = {file for folder in find_splits(data, 0.5) for file in folder.files}
    touch(data, ".git/x.png", "a/._1.png", "a/.thumbnails/1.png", "a/notes.txt", "readme.png", "b/no.png.part")
    (data / "b" / "folder.png").mkdir()
    assert {file for folder in find_splits(data, 0.5) for file in folder.files} == found
    assert len(found) == 4


def test_links_to_class_folders_are_followed(tmp_path: Path):
    touch(tmp_path, "elsewhere/1.png", "elsewhere/2.png", "data/b/1.png", "data/b/2.png")
    (tmp_path / "data" / "a").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert sum(len(folder) for folder in find_splits(tmp_path / "data", 0.5)) == 4


def test_held_out_pictures_stay_where_they_are_when_others_are_added(tmp_path: Path):
    touch(tmp_path, *numbered("a", 60), *numbered("b", 60))
    train, val = find_splits(tmp_path, 0.2)
    for i in range(60):
        touch(tmp_path, f"a/new{i}.png", f"c/new{i}.png", f"c/other{i}.png")
        more_train, more_val = find_splits(tmp_path, 0.2)
        assert set(train.files) <= set(more_train.files)
        assert set(val.files) <= set(more_val.files)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux takes any bytes for a name")
def test_names_of_any_bytes(tmp_path: Path):
    data = touch(tmp_path, os.fsdecode(b"a/\xff1.png"), "a/2.png", "b/1.png", "b/2.png")
    assert sum(len(folder) for folder in find_splits(data, 0.5)) == 4


def test_the_split_depends_on_names_below_the_folder_alone(tmp_path: Path):
    found = numbered("a", 30) + numbered("b", 30)
    here, there = touch(tmp_path / "here", *found), touch(tmp_path / "there" / "deep", *reversed(found))
    for mine, yours in zip(find_splits(here, 0.3), find_splits(there, 0.3), strict=True):
        assert names(mine, here) == names(yours, there)


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_the_share_held_out_is_the_one_asked_for(tmp_path: Path, fraction: float):
    # In the second class every picture has the same name, in a folder of its own.
    touch(tmp_path, *numbered("a", 1000), *(f"b/{i}/photo.jpg" for i in range(1000)))
    train, val = find_splits(tmp_path, fraction)
    assert sorted((*train.files, *val.files)) == sorted(tmp_path.rglob("*.*"))
    for label in (0, 1):  # four standard deviations
        assert val.labels.count(label) == pytest.approx(
            1000 * fraction, abs=4 * (1000 * fraction * (1 - fraction)) ** 0.5
        )


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("num", [2, 3, 7])
def test_every_class_is_on_both_sides(tmp_path: Path, fraction: float, num: int):
    touch(tmp_path, *numbered("a", num), *numbered("b", num), *numbered("c", num))
    train, val = find_splits(tmp_path, fraction)
    assert set(train.labels) == set(val.labels) == {0, 1, 2}
    assert not set(train.files) & set(val.files)
    assert len(train) + len(val) == 3 * num


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([], "found no folders; expected one folder of pictures for each of two classes"),
        (["1.png"], "found no folders"),
        (numbered("a", 3), "found only the folder a; expected"),
        ([*numbered("a", 3), "b/notes.txt"], "b: no pictures in this class"),
        ([*numbered("a", 3), "b/._1.png"], "b: no pictures in this class"),
        ([*numbered("a", 3), "b/1.png"], "b: one picture is too few"),
        (["train/a/1.png", "train/b/1.png"], "has train/ but neither val/ nor test/"),
        (["train/a/1.png", "val/a/1.png"], "train: found only the folder a"),
        (["train/a/1.png", "train/b/1.png", "val/c/1.png"], "val.c: 'c' is not one of the 2 classes .a, b."),
        (["train/a/1.png", "train/b/1.png", "val/1.png"], "val: no class folders with pictures"),
        (["train/a/1.png", "train/b/1.png", "val/a/1.txt"], "val.a: no pictures in this class"),
    ],
)
def test_what_cannot_be_trained_on(tmp_path: Path, found: list[str], message: str):
    with pytest.raises(ValueError, match=message) as caught:
        find_splits(touch(tmp_path, *found), 0.2)
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_no_folder_and_a_wrong_fraction(tmp_path: Path):
    touch(tmp_path, "file", *numbered("a", 2), *numbered("b", 2))
    for path in (tmp_path / "missing", tmp_path / "file"):
        for find in (lambda p: find_splits(p, 0.2), lambda p: find_evaluation(p, ("a", "b"))):
            with pytest.raises(ValueError, match=f"^{path}: no such folder$"):
                find(path)
    for fraction in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match=f"^val_fraction is {fraction}"):
            find_splits(tmp_path, fraction)


def test_evaluation_takes_val_before_test_before_everything(tmp_path: Path):
    class_names = ("b", "unseen", "a")  # numbers are those of the network, not of the folder
    for name in ("", "test", "val"):
        touch(tmp_path / name, "a/1.png", "b/1.png", "b/2.png")
        folder = find_evaluation(tmp_path, class_names)
        assert names(folder, tmp_path / name) == ["a/1.png", "b/1.png", "b/2.png"]
        assert folder.labels == (2, 0, 0)
        assert folder.class_names == class_names
    with pytest.raises(ValueError, match=r"'b' is not one of the 1 classes \(a\)"):
        find_evaluation(tmp_path, ("a",))
    with pytest.raises(ValueError, match=r"'b' is not one of the 9 classes \(a, a1, a2, a3, a4, ...\)"):
        find_evaluation(tmp_path, ("a", *(f"a{i}" for i in range(1, 9))))


def test_samples(tmp_path: Path):
    for name, color in (("a/1.png", 10), ("a/2.png", 20), ("b/1.png", 30), ("b/2.png", 40)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (3, 2), color).save(tmp_path / name)
    colors = {}
    for folder in find_splits(tmp_path, 0.5):
        for i in range(len(folder)):
            sample = folder[i]
            assert sample.name == str(folder.files[i])
            assert (sample.picture.mode, sample.picture.size) == ("RGB", (3, 2))
            assert folder.class_names[sample.label] == Path(sample.name).parent.name
            colors[names(folder, tmp_path)[i]] = sample.picture.getpixel((0, 0))
    assert colors == {
        name: (c, c, c) for name, c in (("a/1.png", 10), ("a/2.png", 20), ("b/1.png", 30), ("b/2.png", 40))
    }

    (tmp_path / "a" / "1.png").write_bytes(b"no picture")
    folder = find_evaluation(tmp_path, ("a", "b"))
    with pytest.raises(PictureError, match=f"^{folder.files[0]}: not a picture"):
        folder[0]


def test_headers_name_what_is_no_picture(tmp_path: Path):
    for name in ("a/1", "a/2", "b/1", "b/2"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    folders = find_splits(tmp_path, 0.5)
    check_headers(*folders)
    for name in ("a/2.png", "b/1.png"):
        (tmp_path / name).write_text("no picture")
    with pytest.raises(PictureError) as caught:
        check_headers(*folders)
    assert all(str(tmp_path / name) in str(caught.value) for name in ("a/2.png", "b/1.png"))
    assert "1.png" not in str(caught.value).replace(str(tmp_path / "b/1.png"), "")
