"""Multi-label classification: metrics against scikit-learn, losses against formulas, training, artifacts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from sklearn.metrics import average_precision_score, f1_score, precision_recall_curve
from torch import Tensor, nn

import mobilevit
from mobilevit.data.class_sets import ClassSet
from mobilevit.data.loader import Batch
from mobilevit.data.transforms import mix
from mobilevit.explain.grad_cam import compute_class_evidence
from mobilevit.export import ExportOptions, export
from mobilevit.export.predictor import load_predictor
from mobilevit.export.verify import OutputComparison
from mobilevit.predict import MultilabelClassifier
from mobilevit.recipes import Data, Distill, Multilabel, Optimizer, Recipe
from mobilevit.tasks import TASKS
from mobilevit.tasks.multilabel import (
    Curve,
    MultilabelClassification,
    MultilabelResults,
    asymmetric_losses,
    multi_hot,
    stack_class_sets,
)
from mobilevit.training.distillation import DistillationLoss
from mobilevit.weights import Weights, WeightsError, read, write

TASK = MultilabelClassification()
RECIPE = Recipe(
    task="multilabel",
    architecture="xxs",
    epochs=1,
    batch_size=8,
    label_smoothing=0.0,
    data=Data(size_px=32, eval_resize=1.0, num_workers=0, val_fraction=0.5),
    optimizer=Optimizer(clip_norm=1.0),
)
PHOTO = Image.new("RGB", (40, 50), (200, 90, 30))


def random_results(num_images: int, num_classes: int, *, ties: bool = False) -> MultilabelResults:
    random = np.random.default_rng(num_images)
    labels = random.random((num_images, num_classes)) < 0.3
    labels[0, 1:] = True  # all classes but the first occur
    labels[:, 0] = False
    scores = np.clip(0.4 * labels + random.random((num_images, num_classes)) * 0.6, 0, 1).astype(np.float32)
    if ties:
        scores = np.round(scores, 1)
    return MultilabelResults(np.arange(num_images), labels, scores, random.random(num_images))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("shape", [(64, 5), (101, 8)])
def test_metrics_against_sklearn(shape: tuple[int, int], ties: bool):
    results = random_results(*shape, ties=ties)
    labels, scores, predictions = results.labels, results.scores, results.predictions
    aps = [average_precision_score(labels[:, i], scores[:, i]) for i in range(1, shape[1])]
    options: dict[str, Any] = {"average": None, "zero_division": 0}  # the annotations allow text only
    f1s: Any = f1_score(labels, predictions, **options)
    metrics = results.metrics()
    assert metrics == {
        "map": pytest.approx(100 * np.mean(aps)),
        "micro_f1": pytest.approx(100 * f1_score(labels, predictions, average="micro")),
        "macro_f1": pytest.approx(100 * np.mean(f1s[1:])),
        "loss": pytest.approx(results.losses.mean()),
        "num_images": shape[0],
    }
    rows = results.per_class([f"c{i}" for i in range(shape[1])])
    assert rows[0].metrics == {"num_images": 0, "ap": None, "f1": None, "threshold": 0.5}
    for i, row in enumerate(rows[1:], start=1):
        assert row.metrics["ap"] == pytest.approx(100 * aps[i - 1])
        assert row.metrics["f1"] == pytest.approx(100 * f1s[i])
        assert row.metrics["num_images"] == labels[:, i].sum()


@pytest.mark.parametrize("ties", [False, True])
def test_thresholds_have_the_highest_f1(ties: bool):
    results = random_results(77, 4, ties=ties)
    for i, threshold in enumerate(results.thresholds[1:], start=1):
        precision, recall, _ = precision_recall_curve(results.labels[:, i], results.scores[:, i])
        best = (2 * precision * recall / np.maximum(precision + recall, 1e-12)).max()
        assert f1_score(results.labels[:, i], results.scores[:, i] >= threshold) == pytest.approx(best)
        assert threshold not in results.scores  # halfway between two scores
    stored = replace(results, stored_thresholds=(0.9, 0.1, 0.2, 0.3))
    assert stored.thresholds == (0.9, 0.1, 0.2, 0.3)
    assert stored.metrics()["micro_f1"] == pytest.approx(
        100 * f1_score(results.labels, results.scores >= np.array([0.9, 0.1, 0.2, 0.3]), average="micro")
    )


def test_curve_of_one_class():
    curve = Curve.of(np.array([0.9, 0.8, 0.8, 0.1]), np.array([True, False, True, False]))
    assert curve.average_precision() == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert curve.best_threshold() == pytest.approx(0.45)  # F1 0.8 with three images; 2/3 with one
    assert curve.precisions()[[0, 50, 51, 100]] == pytest.approx([1, 1, 2 / 3, 2 / 3])
    assert Curve.of(np.array([0.5, 0.4]), np.array([True, True])).best_threshold() == pytest.approx(0.2)


def test_most_confident_errors():
    results = MultilabelResults(
        np.arange(3),
        np.array([[True, False], [False, False], [True, True]]),
        np.array([[0.1, 0.95], [0.6, 0.1], [0.9, 0.4]]),
        np.zeros(3),
        stored_thresholds=(0.5, 0.5),
    )
    assert results.most_confident_errors(3) == [(0, 1), (0, 0), (1, 0)]
    assert results.most_confident_errors(9)[3:] == [(2, 1)]


# --- Loss -------------------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """The mean color of an image -> logits."""

    def __init__(self, num_classes: int = 3):
        super().__init__()
        self.layer = nn.Linear(3, num_classes)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layer(pixels.mean(dim=(2, 3)))


def batch_of(*labels: tuple[int, ...]) -> Batch:
    pixels = torch.rand(len(labels), 3, 8, 8)
    return Batch(pixels, stack_class_sets([ClassSet(one) for one in labels]), tuple(range(len(labels))))


def test_targets():
    batch = batch_of((0, 2), (), (1,))
    assert batch.labels.tolist() == [[0, 2], [-1, -1], [1, -1]]
    assert multi_hot(batch.labels, 3).tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert multi_hot(stack_class_sets([]), 3).shape == (0, 3)
    assert multi_hot(TASK.blank_labels(2, 32), 3).tolist() == [[0, 0, 0]] * 2


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_binary_cross_entropy(smoothing: float):
    model, batch = Linear(), batch_of((0, 2), (), (1,))
    p = model(batch.pixels).double().sigmoid()
    targets = multi_hot(batch.labels, 3) * (1 - smoothing) + smoothing / 2
    expected = -(targets * p.log() + (1 - targets) * (1 - p).log()).sum(1).mean()
    loss = TASK.loss(replace(RECIPE, label_smoothing=smoothing), model, batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("options", [(4.0, 0.0, 0.05), (2.0, 1.0, 0.0), (0.5, 0.0, 0.2), (0.0, 0.0, 0.0)])
def test_asymmetric_loss_of_the_paper(options: tuple[float, float, float]):
    gamma_negative, gamma_positive, margin = options
    logits = torch.tensor([[-30.0, -5, -1], [0, 2, 40]], dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([[0.0, 1, 0], [1, 0, 1]], dtype=torch.float64)
    losses = asymmetric_losses(logits, targets, Multilabel("asymmetric", *options))
    for x, y, loss in zip(
        logits.flatten().tolist(), targets.flatten().tolist(), losses.flatten().tolist(), strict=True
    ):
        p = 1 / (1 + np.exp(-x))
        shifted = max(p - margin, 0)
        one = (1 - p) ** gamma_positive * np.log(p) if y else shifted**gamma_negative * np.log(1 - shifted)
        assert loss == pytest.approx(-one, rel=1e-6, abs=1e-9)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert gradient.isfinite().all()
    if options == (0.0, 0.0, 0.0):
        bce = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        assert torch.allclose(losses, bce)


@pytest.mark.parametrize("loss", ["bce", "asymmetric"])
def test_mixed_images_have_mixed_targets(loss: Any):
    recipe = replace(RECIPE, data=replace(RECIPE.data, policy="advanced"), multilabel=Multilabel(loss))
    model, batch = Linear(), batch_of((0, 2), (), (1,), (0, 1, 2))
    torch.manual_seed(5)
    mixed, weights = mix(batch.pixels, torch.eye(4))
    assert 0.1 < weights.max(dim=1).values.min() < 0.9
    targets = weights @ multi_hot(batch.labels, 3)
    if loss == "bce":
        losses = nn.functional.binary_cross_entropy_with_logits(model(mixed), targets, reduction="none")
    else:
        losses = asymmetric_losses(model(mixed), targets, recipe.multilabel)
    torch.manual_seed(5)
    assert TASK.loss(recipe, model, batch).item() == pytest.approx(losses.sum(1).mean().item())


def test_evaluation_does_not_depend_on_batches():
    model = Linear().eval()
    whole = batch_of((0,), (1, 2), (), (2,), (0, 1))
    parts = [
        Batch(whole.pixels[s], stack_class_sets([ClassSet(()), *()])[:0], ()) if s.start == s.stop else
        Batch(whole.pixels[s], whole.labels[s], tuple(range(s.start, s.stop)))
        for s in (slice(3, 5), slice(0, 0), slice(0, 3))
    ]  # fmt: skip
    once, divided = TASK.evaluate(model, [whole]), TASK.evaluate(model, parts)
    assert once.metrics() == divided.metrics()
    assert np.array_equal(once.labels, multi_hot(whole.labels, 3).bool().numpy())
    assert np.array_equal(once.scores, divided.scores)


def test_options_of_other_losses_and_tasks(tmp_path: Path):
    with pytest.raises(ValueError, match=r"multilabel.margin is 0.1, but multilabel.loss is bce"):
        Multilabel(margin=0.1)
    with pytest.raises(ValueError, match=r"multilabel\.loss is asymmetric, which .* use the recipe multilabel"):
        mobilevit.train(replace(RECIPE, task="classify", multilabel=Multilabel("asymmetric")), tmp_path, tmp_path / "x")


# --- Weights, training and artifacts ----------------------------------------------------------------------------------


def test_weights_round_trip(tmp_path: Path):
    model = MultilabelClassifier(mobilevit.XXS, num_classes=3).eval()
    model.class_names, model.thresholds = ("a", "b", "c"), (0.25, 0.5, 0.75)
    for path, format in ((tmp_path / "x.safetensors", "mobilevit"), (tmp_path / "folder", "transformers")):
        mobilevit.save(model, path, cast(Any, format))
        loaded = mobilevit.load_multilabel(path)
        assert (loaded.thresholds, loaded.class_names) == (model.thresholds, model.class_names)
        pixels = torch.rand(1, 3, 64, 64)
        assert torch.equal(loaded(pixels), model(pixels))
        with pytest.raises(WeightsError, match=r"task 'multilabel'.*load_multilabel"):
            mobilevit.load(path)
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    weights = read(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="thresholds are 2 for 3 classes"):
        replace(weights, thresholds=(0.5, 0.5))
    with pytest.raises(WeightsError, match="no MobileViT for the task 'multilabel'"):
        write(weights, tmp_path / "x.pt", "apple")


def test_prediction_applies_the_thresholds():
    model = MultilabelClassifier(mobilevit.XXS, num_classes=3).eval()
    with torch.no_grad():
        nn.init.zeros_(model.get_parameter("classifier.weight"))
        model.get_parameter("classifier.bias").copy_(torch.tensor([0.2, 0.9, 0.6]).logit())
    model.class_names = ("a", "b", "c")

    def names(**options: float) -> list[str]:
        return [label.class_name for label in model.predict(PHOTO, **options)]

    assert names() == ["b", "c"]  # 0.5 without thresholds
    model.thresholds = (0.1, 0.95, 0.6)
    assert names() == ["c", "a"]
    assert names(score_threshold=0.95) == []
    assert model.predict([PHOTO])[0][0].probability == pytest.approx(0.6)
    with pytest.raises(ValueError, match=r"score_threshold is 1.5; it must be from 0 to 1"):
        names(score_threshold=1.5)
    model.reset_classifier(2)
    assert (model.thresholds, model.class_names) == ((), ())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with a red, a green or a blue square, several of them, or none."""
    folder = tmp_path_factory.mktemp("squares")
    random = np.random.default_rng(0)
    rows = ["path,labels,split"]
    for i in range(24):
        has = random.random(3) < 0.5 if i > 3 else np.arange(3) == i  # the fourth image has none
        pixels = np.full((32, 32, 3), 128, np.uint8)
        for c in np.flatnonzero(has):
            pixels[4:28, 10 * c : 10 * c + 10] = 255 * (np.arange(3) == c)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
        names = "|".join(("red", "green", "blue")[c] for c in np.flatnonzero(has))
        rows.append(f"{i:02}.png,{names},{'train' if i % 4 or i < 4 else 'val'}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return folder / "labels.csv"


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "squares"
    recipe = replace(RECIPE, data=replace(RECIPE.data, policy="advanced"), multilabel=Multilabel("asymmetric"))
    result = mobilevit.train(recipe, data, out)
    assert result.main_metric == "map"
    return out


def test_training_stores_the_thresholds_of_the_validation_split(run: Path, data: Path):
    for name, prefix in (("model", "val"), ("raw", "raw")):
        path = run / f"{name}.safetensors"
        weights = read(path)
        assert (weights.task, weights.class_names) == ("multilabel", ("blue", "green", "red"))
        result = mobilevit.evaluate(path, data)
        assert isinstance(result.results, MultilabelResults)
        chosen = replace(result.results, stored_thresholds=())
        assert chosen.thresholds == weights.thresholds
        assert len(set(weights.thresholds)) > 1
        for metric in ("map", "micro_f1", "macro_f1", "loss"):
            assert result.metrics[metric] == pytest.approx(weights.training["metrics"][f"{prefix}_{metric}"])
        with safe_open(path, "pt") as file:
            assert json.loads(file.metadata()["mobilevit"])["thresholds"] == list(weights.thresholds)
    other = replace(read(run / "model.safetensors"), thresholds=(0.0, 0.0, 0.0))
    all_predicted = mobilevit.evaluate(other, data)
    assert all_predicted.metrics["micro_f1"] != result.metrics["micro_f1"]
    assert all_predicted.per_class[0].metrics["threshold"] == 0


def test_report(run: Path):
    page = (run / "report.html").read_text()
    for text in ("mAP", "micro F1", "threshold", "Most confident errors", "Precision and recall", "annotated:"):
        assert text in page


def test_initial_weights(run: Path, data: Path):
    train_set, _ = TASK.datasets(RECIPE, data)
    weights = read(run / "model.safetensors")
    classifier = "classifier.weight"
    kept = TASK.build(RECIPE, train_set, weights)
    assert torch.equal(kept.tensors[classifier], weights.tensors[classifier])
    single = replace(weights, task="classify", thresholds=())
    new = TASK.build(RECIPE, train_set, single)
    assert not torch.equal(new.tensors[classifier], weights.tensors[classifier])
    assert torch.equal(new.tensors["backbone.stem.conv.weight"], weights.tensors["backbone.stem.conv.weight"])
    back = TASKS["classify"].build(replace(RECIPE, task="classify"), train_set, weights)
    assert (back.task, back.thresholds) == ("classify", ())
    assert not torch.equal(back.tensors[classifier], weights.tensors[classifier])


def test_artifact(run: Path, data: Path, tmp_path: Path):
    pytest.importorskip("onnxruntime")
    weights = read(run / "model.safetensors")
    images = sorted(data.parent.glob("*.png"))
    (artifact,) = export(weights, ["onnx"], tmp_path, ExportOptions(), images=images)
    assert artifact.agreement is not None
    assert (artifact.agreement.prediction_unit, artifact.agreement.num_predictions) == ("labels", 24 * 3)
    model, ours = load_predictor(artifact.path), mobilevit.load_multilabel(run)
    assert isinstance(model, MultilabelClassifier)
    assert model.thresholds == weights.thresholds
    for a, b in zip(model.predict(images, 0.0), ours.predict(images, 0.0), strict=True):
        probabilities = {one.class_name: one.probability for one in b}
        assert all(one.probability == pytest.approx(probabilities[one.class_name], abs=1e-4) for one in a)


def test_comparison_counts_labels():
    comparison = OutputComparison(("logits",), (0.5, 0.9))
    expected, actual = np.array([[1.0, 2.0], [-1, 3]], np.float32), np.array([[-1.0, 2.0], [-1, 2]], np.float32)
    comparison.update([expected], [actual], 2)
    assert (comparison.num_predictions, comparison.prediction_agreement, comparison.unit) == (4, 0.5, "labels")


def test_evidence_for_every_label():
    model = mobilevit.MobileViT(mobilevit.XXS, num_classes=8).eval()
    pixels = torch.rand(1, 3, 64, 64)
    evidence = compute_class_evidence(model, pixels, (), thresholds=(0.0,) * 7 + (1.0,))
    assert {one.class_index for one in evidence if one.is_predicted} == set(range(7))
    probabilities = model(pixels).sigmoid()[0]
    assert all(one.probability == pytest.approx(probabilities[one.class_index].item()) for one in evidence)


def test_explanation_of_labels(run: Path, data: Path, tmp_path: Path):
    weights = replace(read(run / "model.safetensors"), thresholds=(0.0, 0.0, 1.0))
    image = data.parent / "05.png"
    explanation = mobilevit.explain_image(weights, image, size_px=64, out=tmp_path / "x.html")
    assert "blue, " in explanation.prediction
    assert "red" not in explanation.prediction
    assert f"Prediction: {explanation.prediction}" in (tmp_path / "x.html").read_text()
    nothing = replace(weights, thresholds=(1.0, 1.0, 1.0))
    assert mobilevit.explain_image(nothing, image, size_px=64).prediction == "no label"


def test_distillation_of_labels(run: Path):
    class Teacher:
        name, num_features, num_classes, class_names = "t", 4, 3, ("blue", "green", "red")

    recipe = replace(RECIPE, distill=Distill(soft_weight=0.5))
    with pytest.raises(ValueError, match=r"distill.soft_weight is 0.5.*'multilabel'.* must be 0"):
        DistillationLoss(recipe, TASK, cast(Any, Teacher()), Teacher.class_names)


def test_data_without_labels(run: Path, data: Path):
    weights: Weights = read(run / "model.safetensors")
    file = data.with_name("none.csv")
    file.write_text("path,labels\n00.png,\n01.png,\n")
    with pytest.raises(ValueError, match=r"none.csv: none of the 2 images has a label"):
        mobilevit.evaluate(weights, file)
