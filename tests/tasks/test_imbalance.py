"""Corrections of the loss for imbalanced classes against formulas, and advice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilevit.data.loader import Batch
from mobilevit.recipes import Data, Distill, Imbalance, Recipe
from mobilevit.tasks import classification
from mobilevit.tasks.classification import Classification
from mobilevit.tasks.imbalance import LossCorrection, advice, check, count_classes

COUNTS = np.array([700, 250, 49, 1])
CPU = torch.device("cpu")


class Identity(nn.Module):
    """Returns its input, the logits."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits


def losses_of(options: Imbalance, logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    correction = LossCorrection.from_counts(options, COUNTS, CPU)
    task = Classification(correction)
    recipe = Recipe(label_smoothing=smoothing)
    return torch.stack([task.loss(recipe, Identity(), Batch(logits[[i]], labels[[i]])) for i in range(len(labels))])


def test_counts():
    assert count_classes((2, 0, 2, 2), 4).tolist() == [1, 0, 3, 0]


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_class_weights(power: float):
    torch.manual_seed(0)
    labels = torch.tensor(np.repeat(np.arange(4), COUNTS))  # a whole epoch
    logits = torch.randn(len(labels), 4)
    losses = losses_of(Imbalance(class_weights=power), logits, labels, smoothing=0.1)
    plain = F.cross_entropy(logits, labels, label_smoothing=0.1, reduction="none")
    ratios = (losses / plain).double().numpy()
    # The formula, in float64: proportional to n^-power, and 1 on average over the images.
    expected = (COUNTS[labels].astype(float) ** -power) / (COUNTS[labels].astype(float) ** -power).mean()
    np.testing.assert_allclose(ratios, expected, rtol=1e-5)
    if power == 1:  # inverse frequency: every class has the same total weight
        np.testing.assert_allclose(np.bincount(labels, weights=ratios), len(labels) / 4, rtol=1e-5)


def test_inverse_frequencies_agree_with_sklearn():
    from sklearn.utils.class_weight import compute_class_weight

    labels = np.repeat(np.arange(4), COUNTS)
    weights = LossCorrection.from_counts(Imbalance(class_weights=1.0), COUNTS, CPU).class_weights
    expected = compute_class_weight("balanced", classes=np.arange(4), y=labels)
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_logit_adjustment(factor: float):
    """Equation 10 of arXiv 2007.07314: log(1 + sum over y' != y of (prior(y') / prior(y))^factor exp(f_y' - f_y))."""
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(9, 4), torch.randint(4, (9,))
    losses = losses_of(Imbalance(logit_adjustment=factor), logits, labels)
    x, priors = logits.double().numpy(), COUNTS / COUNTS.sum()
    for loss, row, label in zip(losses.tolist(), x, labels.tolist(), strict=True):
        others = [j for j in range(4) if j != label]
        terms = [(priors[j] / priors[label]) ** factor * np.exp(row[j] - row[label]) for j in others]
        assert loss == pytest.approx(np.log1p(sum(terms)), rel=1e-5)


def test_adjusted_logits_learn_equal_class_frequencies():
    """With one and the same image for all classes, the optimum of the plain loss is the class frequencies."""
    labels = torch.tensor(np.repeat(np.arange(4), COUNTS))
    recipe = Recipe(label_smoothing=0.0)
    for options, expected in (
        (Imbalance(), COUNTS / 1000),
        (Imbalance(logit_adjustment=1.0), [0.25] * 4),
        (Imbalance(class_weights=1.0), [0.25] * 4),
    ):
        task = Classification(LossCorrection.from_counts(options, COUNTS, CPU))
        logits = torch.zeros(4, requires_grad=True)
        optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe", tolerance_change=1e-12)

        def closure(task: Classification = task, logits: Tensor = logits) -> Tensor:
            loss = task.loss(recipe, Identity(), Batch(logits.expand(1000, 4), labels))
            logits.grad = None
            loss.backward()
            return loss

        optimizer.step(closure)  # pyright: ignore[reportArgumentType]
        np.testing.assert_allclose(logits.detach().softmax(0).numpy(), expected, atol=2e-3)


def test_mixed_images(monkeypatch: pytest.MonkeyPatch):
    """The loss of a mixed image is the mixture of the losses for its two labels, each with its class weight."""
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 4), torch.tensor([0, 1, 2, 3])
    mixed = 0.7 * torch.eye(4) + 0.3 * torch.eye(4).roll(1, 0)
    monkeypatch.setattr(classification, "mix", lambda pixels, weights: (pixels, mixed))
    correction = LossCorrection.from_counts(Imbalance(class_weights=1.0), COUNTS, CPU)
    recipe = Recipe(label_smoothing=0.1, data=Data(policy="advanced"))
    loss = Classification(correction).loss(recipe, Identity(), Batch(logits, labels)).item()
    weights = 1000 / 4 / COUNTS
    expected = [
        share * weights[label] * F.cross_entropy(logits[i], labels[label], label_smoothing=0.1).item()
        for i in range(4)
        for label, share in ((i, 0.7), ((i - 1) % 4, 0.3))
    ]
    assert loss == pytest.approx(sum(expected) / 4, rel=1e-5)


def test_options_that_are_off_change_nothing():
    torch.manual_seed(0)
    logits, labels = torch.randn(9, 4), torch.randint(4, (9,))
    loss = Classification().loss(Recipe(), Identity(), Batch(logits, labels))
    assert torch.equal(loss, F.cross_entropy(logits, labels, label_smoothing=0.1))


def test_advice():
    assert advice(np.array([10, 100, 30]), ("a", "b", "c")) is None
    text = advice(np.array([9, 1100, 30]), ("rare", "frequent", "c"))
    assert text is not None
    for fact in ("122:1", "frequent has 1,100", "rare has 9", "--imbalance.balanced-sampler", "balanced_accuracy"):
        assert fact in text


@pytest.mark.parametrize(
    ("recipe", "has_teacher", "facts"),
    [
        (Recipe(task="segment", imbalance=Imbalance(balanced_sampler=True)), False, "balanced_sampler True segment"),
        (Recipe(task="distill", imbalance=Imbalance(class_weights=1.0)), True, "class_weights 1.0 distill"),
        (Recipe(imbalance=Imbalance(logit_adjustment=1.0)), True, "logit_adjustment 1.0 soft_weight 0.5 sampler"),
        (Recipe(imbalance=Imbalance(class_weights=0.5)), True, "class_weights 0.5 soft_weight 0.5 sampler"),
    ],
)
def test_options_without_meaning(recipe: Recipe, has_teacher: bool, facts: str):
    with pytest.raises(ValueError, match=r"^imbalance\.") as caught:
        check(recipe, has_teacher=has_teacher)
    assert not [fact for fact in facts.split() if fact not in str(caught.value)]


@pytest.mark.parametrize(
    "changes", [{"imbalance": Imbalance(balanced_sampler=True)}, {"distill": Distill(soft_weight=0.0)}, {}]
)
def test_options_with_a_teacher(changes: dict[str, Any]):
    recipe = replace(Recipe(), imbalance=Imbalance(class_weights=1.0) if "distill" in changes else Imbalance())
    check(replace(recipe, **changes), has_teacher=True)
