"""Matching of labels with class names, and its errors."""

from collections.abc import Sequence

import numpy as np
import pytest

from mobilevit.data.idx import ImageArray
from mobilevit.data.samples import Split


def split(labels: Sequence[int | str | None], class_names: tuple[str, ...] | None = None) -> Split:
    return Split("data", ImageArray(np.zeros((len(labels), 2, 2), np.uint8), "file"), labels, class_names)


@pytest.mark.parametrize(
    ("labels", "class_names", "expected"),
    [
        ([2, 0, 1], None, ("0", "1", "2")),
        ([1, 0], ("b", "a"), ("b", "a")),
        (["b", "a", "c", "a"], None, ("a", "b", "c")),
        (["b", "a"], ("b", "a"), ("b", "a")),
    ],
)
def test_training_class_names(labels: list, class_names: tuple | None, expected: tuple[str, ...]):
    found = split(labels, class_names)
    assert found.training_class_names() == expected
    source = found.source(expected)
    assert source.class_names == expected
    assert [label if isinstance(label, int) else expected.index(label) for label in labels] == list(source.labels)
    assert source[1].name == "file[1]"


@pytest.mark.parametrize(
    ("labels", "class_names", "message"),
    [
        ([], None, "^data: contains no images"),
        ([0, None, 1, None], None, r"^file\[1\]: 2 of 4 images have no label, .*; label or remove them"),
        ([None], None, r"^file\[0\]: .* have no label"),
        ([0, 1, "a"], None, r"^data: labels are class indices \(0\) and names \('a'\); use one of the two"),
        ([0, 1, -1], None, r"^file\[2\]: label -1 is out of range; it must be 0 or more"),
        ([0, 2, 1], ("a", "b"), r"^file\[1\]: label 2 is out of range; it must be from 0 to 1"),
        ([0, 0], None, "^data: found only class '0'; expected two classes or more"),
        (["a", "a"], None, "^data: found only class 'a'; expected two"),
        ([0, 0], ("a", "b"), "^data: no images of class 'b'; add some or remove the class$"),
        ([1, 2], None, "^data: no images of class '0'; .* numbered from 0 without gaps"),
        ([0, 7], None, "^data: no images of classes '1', '2', '3', '4', '5', ...; add"),
        (["a", "x"], ("a", "b"), r"^data: class 'x' not among the 2 known classes \(a, b\)"),
    ],
)
def test_labels_that_cannot_be_trained_on(labels: list, class_names: tuple | None, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        split(labels, class_names).training_class_names()
    assert "\n" not in str(caught.value)


def test_different_numbers_of_images_and_labels():
    with pytest.raises(ValueError, match=r"^data: 2 images, but 3 labels"):
        Split("data", ImageArray(np.zeros((2, 2, 2), np.uint8), "file"), [0, 1, 1]).training_class_names()


MODEL_CLASSES = ("cat", "ant", "bee")


@pytest.mark.parametrize(
    ("labels", "class_names", "network", "expected"),
    [
        ([0, 1, 1], ("ant", "cat"), MODEL_CLASSES, (1, 0, 0)),  # by name
        (["ant", "cat"], None, MODEL_CLASSES, (1, 0)),
        ([1, 1], ("elk", "cat"), MODEL_CLASSES, (0, 0)),  # the model has no elk, but no image has this label
        ([0, 2, 1], None, MODEL_CLASSES, (0, 2, 1)),  # index without a name
        ([0, 1], None, MODEL_CLASSES, (0, 1)),  # without the last class
        ([0, 2, 10], None, ("0", "1", "10", "2"), (0, 3, 2)),  # a model trained on folders with these names
    ],
)
def test_labels_for_the_classes_of_a_model(
    labels: list, class_names: tuple | None, network: tuple[str, ...], expected: tuple
):
    source = split(labels, class_names).source(network)
    assert source.labels == expected
    assert source.class_names == network


@pytest.mark.parametrize(
    ("labels", "class_names", "message"),
    [
        ([0, 1], ("ant", "elk"), r"^data: class 'elk' not among the 3 known classes \(cat, ant, bee\)"),
        (["elk", "yak", "cat"], None, "^data: classes 'elk', 'yak' not among the 3 known classes"),
        ([0, 3], None, r"^file\[1\]: label 3 is out of range; it must be from 0 to 2"),
        ([0, -1], None, r"^file\[1\]: label -1 is out of range"),
        ([0, 2], ("ant", "bee"), r"^file\[1\]: label 2 is out of range; it must be from 0 to 1"),
        ([None, 0], None, r"^file\[0\]: .* have no label"),
    ],
)
def test_labels_unknown_to_the_model(labels: list, class_names: tuple | None, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        split(labels, class_names).source(MODEL_CLASSES)
    assert "\n" not in str(caught.value)
