"""Map-style datasets in Python: items, class names, labels, fingerprints, training and resume."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mobilevit
from mobilevit.data.class_sets import ClassSet
from mobilevit.data.python_data import PythonData, to_data
from mobilevit.data.samples import fingerprint
from mobilevit.data.sources import TaskName, find_splits
from mobilevit.images import ImageError
from mobilevit.recipes import Data, Optimizer, Recipe
from mobilevit.training.run import FinishedError
from mobilevit.weights import read

RECIPE = Recipe(
    architecture="xxs",
    epochs=2,
    batch_size=6,
    data=Data(size_px=32, eval_resize=1.0, num_workers=0, val_fraction=0.25),
    optimizer=Optimizer(clip_norm=1.0),
)


class Colors:
    """Images of one color each."""

    class_names: Sequence[str] = ("red", "green", "blue")

    def __init__(self, labels: Sequence[Any], seed: int = 0):
        self.labels, self.seed, self.requests = labels, seed, 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        self.requests += 1
        color = np.random.default_rng((self.seed, index)).integers(0, 256, 3)
        return Image.fromarray(np.broadcast_to(color.astype(np.uint8), (36, 40, 3)).copy()), self.labels[index]


class Arrays(Colors):
    """The same as arrays."""

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, label = super().__getitem__(index)
        return np.asarray(image), label


class Files(Colors):
    """The same as files."""

    def __init__(self, labels: Sequence[Any], folder: Path):
        super().__init__(labels)
        self.folder = folder
        folder.mkdir(exist_ok=True)
        for i in range(len(labels)):
            super().__getitem__(i)[0].save(folder / f"{i}.png")

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return str(self.folder / f"{index}.png"), self.labels[index]


def splits(data: object, task: TaskName = "classify") -> Any:
    given = to_data(data)
    return find_splits(task, given, 0.25)


def digest(data: object) -> list[str]:
    return [fingerprint(source) for source in splits(data)]


@pytest.mark.parametrize(
    "labels",
    [
        [0, 1, 2] * 4,
        ["red", "green", "blue"] * 4,
        [np.int64(0), torch.tensor(1), torch.tensor([2])] * 4,
        [[0], ("green",), {2}] * 4,
        [np.array([1, 0, 0]), torch.tensor([0.0, 1, 0]), np.array([False, False, True])] * 4,
    ],
)
def test_labels(labels: list[Any]):
    train, val = splits(Colors(labels))
    assert train.class_names == ("red", "green", "blue")
    found = dict(zip([*train.keys(), *val.keys()], [*train.labels, *val.labels], strict=True))
    assert {int(key.split()[0]): label for key, label in found.items()} == {i: i % 3 for i in range(12)}
    assert sorted(val.labels) == [0, 1, 2]
    assert train[0].name == f"Colors[{train.index_of_image(0)}]"


def test_several_labels():
    labels = [[0, 1], [], "blue", np.array([1, 1, 1]), {"red", "blue"}, [2], 1, []] * 2
    train, val = splits(Colors(labels), "multilabel")
    found = {
        int(key.split()[0]): label
        for source in (train, val)
        for key, label in zip(source.keys(), source.labels, strict=True)
    }
    expected = [(0, 1), (), (2,), (0, 1, 2), (0, 2), (2,), (1,), ()] * 2
    assert found == {i: ClassSet(indices) for i, indices in enumerate(expected)}
    with pytest.raises(
        ValueError, match=r"10 of 16 images do not have exactly one label \(first: .*\[0\].* multilabel"
    ):
        splits(Colors(labels))


def test_pairs_keep_the_classes_of_the_training_set():
    train_set, val_set = Colors([0, 1, 2]), Colors(["blue", "green"], seed=1)
    val_set.class_names = ("green", "blue")
    train, val = splits((train_set, val_set))
    assert (list(train.labels), list(val.labels), val.class_names) == ([0, 1, 2], [2, 1], train.class_names)


def test_targets_replace_requests():
    dataset = Colors([0, 1, 2] * 20)
    dataset.targets = torch.tensor([0, 1, 2] * 20)  # pyright: ignore[reportAttributeAccessIssue]
    dataset.classes = dataset.class_names  # pyright: ignore[reportAttributeAccessIssue]
    splits(dataset)
    assert dataset.requests == 1 + 16  # the check of the label, and the hashed images
    dataset.targets = torch.tensor([1, 1, 2] * 20)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match=r"Colors\[0\]: label is 0, but targets\[0\] is tensor\(1\); make them agree"):
        splits(dataset)


def test_the_fingerprint_of_images_depends_on_length_labels_and_pixels():
    labels = [0, 1, 2] * 8
    same, seed, other = digest(Colors(labels)), digest(Colors(labels, seed=1)), digest(Colors([*labels[:-1], 0]))
    assert digest(Colors(list(labels))) == same
    assert len({tuple(one) for one in (same, seed, other, digest(Colors(labels[:-3])))}) == 4


def test_the_fingerprint_of_files_depends_on_names_and_sizes_but_not_on_the_place(tmp_path: Path):
    labels = [0, 1, 2] * 4
    here, there = Files(labels, tmp_path / "here"), Files(labels, tmp_path / "there")
    assert digest(here) == digest(there)
    (tmp_path / "there" / "3.png").write_bytes((tmp_path / "there" / "3.png").read_bytes() + b"\0")
    assert digest(here) != digest(there)


class Wrong(Colors):
    """Returns `item` instead of its items."""

    def __init__(self, item: Any):
        super().__init__([0, 1, 2])
        self.item = item

    def __getitem__(self, index: int) -> Any:
        return self.item


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Colors([]), "Colors: contains no images"),
        (Wrong(PNG := Image.new("RGB", (4, 4))), r"Wrong\[0\]: is a Image; it must be a pair"),
        (Wrong((torch.zeros(3, 4, 4), 0)), r"Wrong\[0\]: image is a Tensor; .* remove the transform"),
        (Wrong((PNG, 3)), r"Wrong\[0\]: label is 3; it must be a class index from 0 to 2"),
        (Wrong((PNG, "pink")), r"Wrong\[0\]: label is 'pink'"),
        (Wrong((PNG, 1.5)), r"Wrong\[0\]: label is 1.5"),
        (Wrong((PNG, True)), r"Wrong\[0\]: label is True"),
        (Wrong((PNG, 0)), "no images of classes 'green', 'blue'"),
        (Wrong(("missing.png", 0)), r"Wrong: 3 of 3 files do not exist \(first: .*missing.png\)"),
    ],
)
def test_wrong_items(data: Any, message: str):
    with pytest.raises(ValueError, match=message):
        splits(data)


def test_wrong_data(tmp_path: Path):
    nameless = Colors([0, 1])
    nameless.class_names = "red"
    with pytest.raises(ValueError, match="class_names is 'red'; it must be a list of names"):
        splits(nameless)
    with pytest.raises(ValueError, match=r"list: has neither class_names nor classes; set dataset.class_names"):
        splits([(PNG, 0)])
    for data in (3, None, (Colors([0]), 3), (Colors([0]),) * 3):
        with pytest.raises(TypeError, match=r"use a path .* or a pair \(train, val\) of datasets"):
            mobilevit.train(RECIPE, data, tmp_path)  # pyright: ignore[reportArgumentType]
    detection = replace(RECIPE, task="detect", label_smoothing=0.0)
    with pytest.raises(ValueError, match="dataset in Python, which the task 'detect' does not support"):
        mobilevit.train(detection, Colors([0, 1, 2] * 4), tmp_path / "x")


def test_damaged_images_are_counted(tmp_path: Path):
    class Damaged(Colors):
        def __getitem__(self, index: int) -> tuple[Any, Any]:
            if index == 5:
                raise OSError("image file is truncated")
            return super().__getitem__(index)

        targets = [0, 1, 2] * 4

    train, val = splits(Damaged([0, 1, 2] * 4))
    source, i = next((s, list(s.indices).index(5)) for s in (train, val) if 5 in s.indices)
    with pytest.raises(ImageError, match=r"Damaged\[5\]: cannot be read \(image file is truncated\)"):
        source[i]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training(tmp_path: Path, num_workers: int):
    labels = [0, 1, 2] * 6
    recipe = replace(RECIPE, data=replace(RECIPE.data, num_workers=num_workers))
    pair = (Colors(labels), Colors([0, 1, 2], seed=1))
    once = mobilevit.train(recipe, pair, tmp_path / "once")
    arrays = Arrays(labels), Arrays([0, 1, 2], seed=1)  # PIL images and arrays of the same pixels are the same data
    parts = tmp_path / "arrays"
    mobilevit.train(recipe, arrays, parts)
    with pytest.raises(FinishedError):  # the fingerprint is the same, too
        mobilevit.train(recipe, arrays, tmp_path / "once")
    for name in ("model", "raw"):
        a, b = (read(folder / f"{name}.safetensors") for folder in (tmp_path / "once", parts))
        assert all(torch.equal(a.tensors[key], b.tensors[key]) for key in a.tensors)
    result = mobilevit.evaluate(once.weights, pair)
    assert (result.split, result.metrics["num_images"]) == ("val", 3)
    assert result.metrics["top1"] == once.epochs[-1]["val_top1"]
    assert "Colors" in (tmp_path / "once" / "report.html").read_text()
    with pytest.raises(ValueError, match="other data"):
        mobilevit.train(recipe, (Colors(labels, seed=2), pair[1]), tmp_path / "once")


def test_python_data_is_passed_through():
    data = PythonData(Colors([0]))
    assert to_data(data) is data
    assert to_data("hf:owner/name") == "hf:owner/name"
    assert str(data) == "Colors"
