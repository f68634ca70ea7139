"""Classification: loss and metrics against scikit-learn and formulas, initial weights, evaluation."""

import logging
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import (
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    log_loss,
    precision_recall_fscore_support,
    top_k_accuracy_score,
)
from torch import Tensor, nn

from mobilevit.data.loader import Batch
from mobilevit.data.samples import fingerprint
from mobilevit.images import ImageError, Preprocessing
from mobilevit.models.mobilevit import MobileViT
from mobilevit.predict import Classifier
from mobilevit.recipes import Data, Recipe, to_dict
from mobilevit.tasks import classification
from mobilevit.tasks.classification import Classification, ClassificationResults
from mobilevit.tasks.evaluation import default_split, evaluate
from mobilevit.weights import Weights

TASK = Classification()
RECIPE = Recipe(architecture="xxs", data=Data(size_px=32, eval_resize=1.3, min_scale=1, flip=False, val_fraction=0.5))


class Prepared(nn.Module):
    """Returns the prepared logits of the image whose index is its pixel value, 0 to 255."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = logits

    def forward(self, pixels: Tensor) -> Tensor:
        assert pixels.dtype == torch.float32
        return self.logits[(255 * pixels[:, 0, 0, 0]).round().long()]


def batches(labels: Tensor, *sizes: int) -> list[Batch]:
    indices = torch.arange(len(labels))
    pixels = (indices / 255)[:, None, None, None].expand(-1, 3, 2, 2)
    parts = zip(pixels.split(sizes), labels.split(sizes), indices.split(sizes), strict=True)
    return [Batch(pixels, labels, tuple(indices.tolist())) for pixels, labels, indices in parts]


@pytest.mark.parametrize("num_classes", [2, 5, 13])
def test_metrics_against_sklearn(num_classes: int):
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(100, num_classes), torch.randint(num_classes, (100,))
    results = TASK.evaluate(Prepared(logits), batches(labels, 64, 35, 1))
    metrics = results.metrics()
    classes = np.arange(num_classes)
    hits = {k: (labels[:, None] == logits.argsort(descending=True)[:, :k]).sum().item() for k in (1, 5)}
    assert metrics == {
        "top1": hits[1],
        "top5": hits[5],
        "balanced_accuracy": pytest.approx(100 * balanced_accuracy_score(labels, logits.argmax(1))),
        "macro_f1": pytest.approx(100 * f1_score(labels, logits.argmax(1), average="macro")),
        "loss": pytest.approx(log_loss(labels, logits.double().softmax(dim=1), labels=classes), rel=1e-6),
        "ece": pytest.approx(results.reliability_of(results.probabilities).error),
        "num_images": 100,
    }
    if num_classes > 5:
        assert metrics["top5"] == pytest.approx(100 * top_k_accuracy_score(labels, logits, k=5, labels=classes))


def test_metrics_without_images_of_some_classes():
    # Class 3 is predicted but has no images; class 4 does not occur at all.
    labels, predicted = torch.tensor([0, 0, 0, 1, 2]), torch.tensor([0, 3, 1, 1, 0])
    metrics = TASK.evaluate(Prepared(5 * torch.eye(5)[predicted]), batches(labels, 5)).metrics()
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        balanced = balanced_accuracy_score(labels, predicted)
    assert metrics["balanced_accuracy"] == pytest.approx(100 * balanced)
    assert metrics["macro_f1"] == pytest.approx(100 * f1_score(labels, predicted, average="macro"))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_loss_against_the_formula_of_label_smoothing(smoothing: float):
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(7, 5), torch.randint(5, (7,))
    loss = TASK.loss(replace(RECIPE, label_smoothing=smoothing), Prepared(logits), *batches(labels, 7))
    x = logits.double().numpy()
    log_p = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    target = smoothing / 5 + (1 - smoothing) * np.eye(5)[labels]
    assert loss.item() == pytest.approx(-(target * log_p).sum(axis=1).mean(), rel=1e-6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four noisy images of each of three classes."""
    random = np.random.default_rng(0)
    for class_name in "abc":
        (tmp_path / class_name).mkdir()
        for i in range(4):
            pixels = random.integers(0, 60 + 60 * i, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / class_name / f"{i}.png")
    return tmp_path


def weights(class_names: tuple[str, ...] = ("a", "b", "c"), seed: int = 0, **values) -> Weights:
    """Weights of a network whose predictions differ between images."""
    torch.manual_seed(seed)
    model = MobileViT("xxs", num_classes=len(class_names))
    for weight in model.classifier.parameters():
        nn.init.normal_(weight)
    preprocessing = Preprocessing(resize_px=36, crop_px=32)
    return Weights(model.architecture, model.state_dict(), preprocessing, class_names, **values)


def test_datasets(folder: Path):
    train, val = TASK.datasets(RECIPE, folder)
    assert len(train) + len(val) == 12
    assert train.source.class_names == val.source.class_names == ("a", "b", "c")
    with pytest.raises(ValueError, match="no such folder"):
        TASK.datasets(RECIPE, folder / "missing")


def test_build_with_random_weights(folder: Path):
    train, _ = TASK.datasets(RECIPE, folder)
    built = TASK.build(RECIPE, train, None)
    assert (built.architecture.name, built.num_classes, built.class_names) == ("xxs", 3, ("a", "b", "c"))
    assert built.preprocessing == Preprocessing(resize_px=42, crop_px=32)
    assert built.output_stride == 32


@pytest.mark.parametrize("class_names", [("a", "b", "c"), ("a", "c", "b"), ("a", "b"), ()])
def test_build_from_pretrained(folder: Path, class_names: tuple[str, ...]):
    pretrained = weights(class_names, output_stride=16)
    train, _ = TASK.datasets(RECIPE, folder)
    built = TASK.build(replace(RECIPE, architecture="s"), train, pretrained)
    assert (built.architecture.name, built.num_classes, built.class_names) == ("xxs", 3, ("a", "b", "c"))
    assert (built.preprocessing.crop_px, built.output_stride) == (32, 16)
    same = {
        name for name in built.tensors if torch.equal(built.tensors[name], pretrained.tensors.get(name, torch.empty(0)))
    }
    assert set(built.tensors) - same == (
        set() if class_names == ("a", "b", "c") else {"classifier.weight", "classifier.bias"}
    )


@pytest.mark.parametrize("mean_std", [((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), ((0.5, 0.4, 0.3), (0.2, 0.3, 0.25))])
def test_evaluation_agrees_with_prediction(folder: Path, mean_std: tuple):
    mean, std = mean_std
    w = weights(("c", "unseen", "a", "b"))
    w = replace(w, preprocessing=replace(w.preprocessing, mean=mean, std=std))
    model = Classifier.from_weights(w)
    log_p, right = [], []
    for file in sorted(folder.rglob("*.png")):
        predictions = model.predict(file)
        right.append(predictions[0].class_name == file.parent.name)
        log_p.append(next(np.log(p.probability) for p in predictions if p.class_name == file.parent.name))
    assert 0 < sum(right) < 12
    metrics = evaluate(w, folder, batch_size=5).metrics
    assert metrics["top1"] == pytest.approx(100 * np.mean(right))
    assert metrics["loss"] == pytest.approx(-np.mean(log_p), rel=1e-4)
    assert metrics["num_images"] == 12


def test_invalid_arguments_of_evaluation(folder: Path):
    with pytest.raises(ValueError, match="class"):
        evaluate(weights(()), folder)
    with pytest.raises(ValueError, match="batch size is 0"):
        evaluate(weights(), folder, batch_size=0)
    with pytest.raises(ValueError, match="size is 31"):
        evaluate(weights(), folder, size_px=31)


@pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:This process .*is multi-threaded")
def test_workers_end_after_an_unreadable_image(folder: Path):
    file = folder / "b" / "0.png"
    file.write_bytes(file.read_bytes()[:-30])
    before = set(multiprocessing.active_children())
    with pytest.raises(ImageError, match=f"^{file}: damaged") as caught:
        evaluate(weights(), folder, batch_size=2, num_workers=2)
    assert caught.value.__traceback__ is not None
    assert set(multiprocessing.active_children()) <= before


def test_evaluation_uses_the_validation_split_of_training(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
):
    train, val = TASK.datasets(RECIPE, folder)
    training = {"recipe": to_dict(RECIPE), "val_data": fingerprint(val.source)}
    trained = weights(training=training)
    assert default_split(trained, folder) == "val"
    for split, expected in ((None, val), ("val", val), ("train", train)):
        results = cast(ClassificationResults, evaluate(trained, folder, split=split).results)
        assert results.labels.tolist() == list(expected.source.labels)
    assert evaluate(trained, folder, split="all").metrics["num_images"] == 12
    assert not caplog.messages
    # Other data and weights without a record of their training: all images are evaluated.
    assert default_split(weights(), folder) == "all"
    other = tmp_path_factory.mktemp("other")
    for class_name in "abc":
        (other / class_name).mkdir()
        Image.new("RGB", (32, 32)).save(other / class_name / "1.png")
    assert default_split(trained, other) == "all"  # and not an error: one image of a class cannot be divided
    with pytest.raises(ValueError, match=f"^{folder}: has no split 'val'.*--split all"):
        evaluate(weights(), folder, split="val")
    # Added images may have changed the split.
    (folder / "a" / "4.png").write_bytes((folder / "a" / "0.png").read_bytes())
    (folder / "c" / "4.png").write_bytes((folder / "a" / "0.png").read_bytes())
    (folder / "c" / "5.png").write_bytes((folder / "a" / "0.png").read_bytes())
    evaluate(trained, folder, split="val")
    evaluate(trained, folder, split="val")  # the same warning is logged once
    [message] = caplog.messages
    assert str(folder) in message
    assert "not the validation split of the training run" in message


def test_evaluation_skips_up_to_max_unreadable_images(folder: Path, caplog: pytest.LogCaptureFixture):
    for name in ("a/0", "b/1"):
        file = folder / f"{name}.png"
        file.write_bytes(file.read_bytes()[:-30])
    metrics = evaluate(weights(), folder, batch_size=5, max_unreadable=2).metrics
    assert metrics["num_images"] == 10
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert all(str(folder / name) in record.message for name in ("a/0.png", "b/1.png"))
    with pytest.raises(ImageError, match=r"a/0.png, .*b/1.png.*--max-unreadable 2"):
        evaluate(weights(), folder, batch_size=5, max_unreadable=1)
    with pytest.raises(ImageError, match=r"a/0.png.*--max-unreadable"):
        evaluate(weights(), folder)


@pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:This process .*is multi-threaded")
def test_evaluation_at_another_size(folder: Path):
    w = weights()  # for 32 px, center crop of 36 px
    at_64_px = Classifier.from_weights(replace(w, preprocessing=Preprocessing(resize_px=72, crop_px=64)))
    expected = [at_64_px.predict(file)[0].class_name for file in sorted(folder.rglob("*.png"))]
    options: list[dict[str, Any]] = [{"size_px": 64}, {}, {"size_px": 64, "num_workers": 2}]
    larger, default, with_workers = (
        cast(ClassificationResults, evaluate(w, folder, **some).results) for some in options
    )
    assert ["abc"[i] for i in larger.predictions[:, 0]] == expected
    assert not np.array_equal(larger.losses, default.losses)
    np.testing.assert_array_equal(larger.losses, with_workers.losses)


@pytest.mark.parametrize("num_classes", [2, 5, 13])
def test_confusion_matrix_and_per_class_against_sklearn(num_classes: int):
    torch.manual_seed(0)
    logits, labels = torch.randn(50, num_classes), torch.randint(num_classes, (50,))
    results = TASK.evaluate(Prepared(logits), batches(labels, 50))
    classes = np.arange(num_classes)
    expected = confusion_matrix(labels, logits.argmax(1), labels=classes)
    np.testing.assert_array_equal(results.confusion_matrix(), expected)
    precision, recall, _, support = precision_recall_fscore_support(
        labels,
        logits.argmax(1),
        labels=classes,
        zero_division=np.nan,  # pyright: ignore[reportArgumentType]
    )
    rows = results.per_class([str(i) for i in classes])
    assert [row.class_name for row in rows] == [str(i) for i in classes]
    for name, values in (("num_images", support), ("recall", 100 * recall), ("precision", 100 * precision)):
        ours = [np.nan if row.metrics[name] is None else row.metrics[name] for row in rows]
        np.testing.assert_allclose(ours, values)  # pyright: ignore[reportArgumentType, reportCallIssue]


def test_most_confident_errors():
    logits = torch.tensor([[5.0, 0], [0, 1], [2, 0], [3, 0]])
    results = TASK.evaluate(Prepared(logits), batches(torch.tensor([0, 0, 1, 1]), 4))
    assert results.most_confident_errors(5) == [3, 2, 1]
    assert results.most_confident_errors(1) == [3]


def columns(results: ClassificationResults) -> list[np.ndarray]:
    arrays = [results.indices, results.labels, results.predictions, results.probabilities, results.losses]
    return [*arrays, *vars(results.require_logits()).values()]


def test_results_do_not_depend_on_batches_and_processes():
    torch.manual_seed(0)
    model, labels = Prepared(torch.randn(20, 7)), torch.randint(7, (20,))
    whole = TASK.evaluate(model, batches(labels, 20))
    assert whole.indices.tolist() == list(range(20))
    assert whole.predictions.shape == (20, 5)
    empty = Batch(torch.empty(0, 3, 2, 2), torch.empty(0, dtype=torch.long), (), ("unreadable.png",))
    in_turn = batches(labels, 3, 7, 1, 9)
    halves: list[Any] = []

    def note(value: Any) -> list[Any]:
        halves.append(value)
        return [value]

    TASK.evaluate(model, in_turn[1::2], note)
    for others in (
        TASK.evaluate(model, batches(labels, *[1] * 20)),
        TASK.evaluate(model, [*in_turn[::-1], empty]),
        TASK.evaluate(model, in_turn[::2], lambda mine: [mine, *halves]),
        TASK.evaluate(model, in_turn[::2], lambda mine: [[], *halves, mine]),  # one process had no image
    ):
        for ours, theirs in zip(columns(whole), columns(others), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert others.metrics() == whole.metrics()
        assert others.num_classes == 7
    with pytest.raises(ImageError, match="none of the images"):
        TASK.evaluate(model, [empty])


def test_loss_of_mixed_images(monkeypatch: pytest.MonkeyPatch):
    """Image i is mixed with image i + 2 with weights 0.75 and 0.25, in pixels and targets."""
    torch.manual_seed(0)
    labels = torch.tensor([2, 0, 2, 1, 1])
    linear = nn.Linear(12, 3).double()
    network = nn.Sequential(nn.Flatten(), linear)
    pixels = torch.rand(5, 3, 2, 2).double()

    def mix(pixels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(0.75 * x + 0.25 * x.roll(-2, 0) for x in (pixels, targets))  # pyright: ignore[reportReturnType]

    monkeypatch.setattr(classification, "mix", mix)
    recipe = replace(RECIPE, label_smoothing=0.2, data=replace(RECIPE.data, policy="advanced"))
    loss = TASK.loss(recipe, network, Batch(pixels, labels))
    x, weight, bias = (t.detach().numpy() for t in (pixels.flatten(1), linear.weight, linear.bias))
    total = 0.0
    for i in range(5):
        j = (i + 2) % 5
        logits = weight @ (0.75 * x[i] + 0.25 * x[j]) + bias
        log_p = logits - np.log(np.exp(logits).sum())
        target = 0.75 * np.eye(3)[labels[i]] + 0.25 * np.eye(3)[labels[j]]
        total -= (0.8 * target + 0.2 / 3) @ log_p
    assert loss.item() == pytest.approx(total / 5, rel=1e-6)


def test_mixing_is_seeded():
    (batch,) = batches(torch.arange(6) % 3, 6)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    recipe = replace(RECIPE, data=replace(RECIPE.data, policy="advanced"))
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(TASK.loss(recipe, flat, batch).item())
    assert losses[0] == losses[1] != losses[2]
