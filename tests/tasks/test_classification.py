"""Classification: its loss and metrics against scikit-learn and formulas, and what its weights start from."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import log_loss, top_k_accuracy_score
from torch import Tensor, nn

from mobilevit.data.loader import Batch
from mobilevit.models.mobilevit import MobileViT
from mobilevit.models.weights import Weights
from mobilevit.pictures import Preprocessing
from mobilevit.predict import classifier
from mobilevit.recipes import Data, Recipe
from mobilevit.tasks.classification import Classification, evaluate_weights

TASK = Classification()
RECIPE = Recipe(architecture="xxs", data=Data(size_px=32, eval_resize=1.3, min_scale=1, flip=False, val_fraction=0.5))


class Answers(nn.Module):
    """Gives the prepared logits of the picture whose number is its value, 0 to 255."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = logits

    def forward(self, pixels: Tensor) -> Tensor:
        assert pixels.dtype == torch.float32
        return self.logits[(255 * pixels[:, 0, 0, 0]).round().long()]


def batches(labels: Tensor, *sizes: int) -> list[Batch]:
    numbers = torch.arange(len(labels), dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    return [Batch(*pair) for pair in zip(numbers.split(sizes), labels.split(sizes), strict=True)]


@pytest.mark.parametrize("num_classes", [2, 5, 13])
def test_metrics_against_scikit_learns(num_classes: int):
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(100, num_classes), torch.randint(num_classes, (100,))
    metrics = TASK.evaluate(Answers(logits), batches(labels, 64, 35, 1))
    classes = np.arange(num_classes)
    hits = {k: (labels[:, None] == logits.argsort(descending=True)[:, :k]).sum().item() for k in (1, 5)}
    assert metrics == {
        "top1": hits[1],
        "top5": hits[5],
        "loss": pytest.approx(log_loss(labels, logits.double().softmax(dim=1), labels=classes), rel=1e-6),
        "num_pictures": 100,
    }
    if num_classes > 5:
        assert metrics["top5"] == pytest.approx(100 * top_k_accuracy_score(labels, logits, k=5, labels=classes))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_loss_against_the_formula_of_label_smoothing(smoothing: float):
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(7, 5), torch.randint(5, (7,))
    loss = TASK.loss(replace(RECIPE, label_smoothing=smoothing), Answers(logits), *batches(labels, 7))
    x = logits.double().numpy()
    log_p = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    target = smoothing / 5 + (1 - smoothing) * np.eye(5)[labels]
    assert loss.item() == pytest.approx(-(target * log_p).sum(axis=1).mean(), rel=1e-6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four noisy pictures of each of three classes."""
    random = np.random.default_rng(0)
    for class_name in "abc":
        (tmp_path / class_name).mkdir()
        for i in range(4):
            pixels = random.integers(0, 60 + 60 * i, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / class_name / f"{i}.png")
    return tmp_path


def weights(class_names: tuple[str, ...] = ("a", "b", "c"), seed: int = 0, **values) -> Weights:
    """Of a network whose answers differ from picture to picture."""
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


def test_build_from_nothing(folder: Path):
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
    model = classifier(w)
    log_p, right = [], []
    for file in sorted(folder.rglob("*.png")):
        predictions = model.predict(file)
        right.append(predictions[0].class_name == file.parent.name)
        log_p.append(next(np.log(p.probability) for p in predictions if p.class_name == file.parent.name))
    assert 0 < sum(right) < 12
    metrics = evaluate_weights(w, folder, batch_size=5)
    assert metrics["top1"] == pytest.approx(100 * np.mean(right))
    assert metrics["loss"] == pytest.approx(-np.mean(log_p), rel=1e-4)
    assert metrics["num_pictures"] == 12


def test_evaluation_without_class_names_or_with_empty_batches(folder: Path):
    with pytest.raises(ValueError, match="name no classes"):
        evaluate_weights(weights(()), folder)
    with pytest.raises(ValueError, match="batch size is 0"):
        evaluate_weights(weights(), folder, batch_size=0)
