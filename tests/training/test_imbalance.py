"""Runs on imbalanced classes: the warning, the options, and the metric for the best epoch."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mobilevit.recipes import Imbalance, Recipe
from mobilevit.tasks.classification import ClassificationResults
from mobilevit.training.loop import TrainingResult, train
from mobilevit.weights import read
from small_runs import RECIPE, lines, same_weights

SHORT = replace(RECIPE, epochs=1, batch_size=8)


@pytest.fixture(scope="module")
def imbalanced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes with 22 and 2 training images."""
    folder = tmp_path_factory.mktemp("imbalanced")
    rng = np.random.default_rng(0)
    for name, num in (("train/many", 22), ("train/few", 2), ("val/many", 2), ("val/few", 1)):
        (folder / name).mkdir(parents=True)
        for i in range(num):
            Image.fromarray(rng.integers(0, 255, (33, 32, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno == logging.WARNING]


def test_a_warning_before_training(imbalanced: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    train(SHORT, imbalanced, tmp_path / "plain")
    (warning,) = warnings_of(caplog)
    assert not [fact for fact in ("11:1", "many has 22", "few has 2", "balanced-sampler") if fact not in warning]
    caplog.clear()
    out = tmp_path / "sampled"
    train(replace(SHORT, imbalance=Imbalance(balanced_sampler=True)), imbalanced, out)
    assert warnings_of(caplog) == []
    assert not same_weights(tmp_path / "plain/model.safetensors", out / "model.safetensors")
    assert read(out / "model.safetensors").training["recipe"]["imbalance"]["balanced_sampler"] is True


def test_no_warning_for_balanced_classes(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    train(SHORT, data, tmp_path)
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("options", [Imbalance(class_weights=1.0), Imbalance(logit_adjustment=1.0)])
def test_equal_classes_need_no_correction(options: Imbalance, first: TrainingResult, data: Path, tmp_path: Path):
    """With equally frequent classes all weights are 1, and the additions to the logits are equal."""
    train(replace(RECIPE, epochs=1, imbalance=options), data, tmp_path)
    ours, plain = (lines(folder / "steps.jsonl")[0]["loss"] for folder in (tmp_path, first.weights.parent))
    assert ours == pytest.approx(plain, rel=1e-5)  # before the first update; later, Adam amplifies rounding errors


@pytest.mark.parametrize(
    ("metric", "best_epoch"), [("auto", 1), ("top1", 1), ("balanced_accuracy", 3), ("macro_f1", 2)]
)
def test_metric_of_the_best_epoch(
    metric: Any, best_epoch: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    values = iter([(3, 1, 1), (0, 0, 0), (2, 2, 3), (0, 0, 0), (1, 3, 2), (0, 0, 0)])  # EMA and raw weights by epoch

    def metrics(_: ClassificationResults) -> dict[str, float]:
        return dict(zip(("top1", "balanced_accuracy", "macro_f1"), map(float, next(values)), strict=True))

    monkeypatch.setattr(ClassificationResults, "metrics", metrics)
    run = train(replace(SHORT, epochs=3, metric=metric), data, tmp_path)
    assert run.main_metric == ("top1" if metric == "auto" else metric)
    assert read(tmp_path / "best.safetensors").training["metrics"]["epoch"] == best_epoch
    assert len(lines(tmp_path / "metrics.jsonl")) == 3


@pytest.mark.parametrize(
    ("recipe", "facts"),
    [
        (replace(SHORT, task="detect", metric="macro_f1"), "metric macro_f1 detect auto ap, ap50"),
        (replace(SHORT, metric="map"), "metric map task classify top1, balanced_accuracy, macro_f1"),
        (replace(SHORT, task="segment", imbalance=Imbalance(class_weights=0.5)), "imbalance.class_weights 0.5 segment"),
    ],
)
def test_options_of_other_tasks(recipe: Recipe, facts: str, data: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="task") as caught:
        train(recipe, data, tmp_path / "run")
    assert not [fact for fact in facts.split() if fact not in str(caught.value)]
    assert not (tmp_path / "run").exists()
