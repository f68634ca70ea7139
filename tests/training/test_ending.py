"""Early stopping: the decision, the cooldown of the learning rate, resume, and finished runs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mobilevit.recipes import Optimizer, Recipe
from mobilevit.tasks.classification import ClassificationResults
from mobilevit.training.ending import Ending, find_ending
from mobilevit.training.loop import TrainingResult, train
from mobilevit.training.optim import learning_rate_at
from mobilevit.training.run import FinishedError, Run
from small_runs import RECIPE, lines, same_weights, without_times

WSD = Optimizer(lr=1e-3, end_lr=1e-5, warmup_steps=1, schedule="wsd")
# With these values (see `fake`), patience 2 stops after epoch 4: the best one is the second.
TOP1 = (10, 30, 20, 30, 40, 50, 60, 70, 80, 90)


@pytest.mark.parametrize(
    ("patience", "values", "stopped_after"),
    [
        (0, [5, 4, 3, 2, 1], 0),
        (1, [], 0),
        (1, [5], 0),
        (1, [5, 5], 2),
        (1, [1, 2, 3, 4], 0),
        (2, [5, 4, 6, 1, 7, 7], 0),
        (2, [5, 4, 6, 1, 6, 9], 5),
        (3, [9, 1, 2, 3, 10, 1], 4),
    ],
)
def test_epochs_without_improvement(patience: int, values: list[float], stopped_after: int):
    history = [{"val_top1": float(value), "val_loss": 0.0} for value in values]
    recipe = Recipe(epochs=20, patience=patience)
    expected = Ending(stopped_after, stopped_after, stopped_after) if stopped_after else Ending(20, 20)
    assert find_ending(recipe, 20, history, "val_top1") == expected
    if stopped_after:  # later epochs do not change the decision
        longer = [*history, {"val_top1": 100.0, "val_loss": 0.0}]
        assert find_ending(recipe, 20, longer, "val_top1") == expected


@pytest.mark.parametrize(
    ("epochs", "fraction", "num_falling", "expected"),
    [
        (20, 0.2, 0, Ending(20, 16)),
        (100, 0.07, 0, Ending(100, 93)),  # 0.07 * 100 is above 7 in floating point
        (1, 0.2, 0, Ending(1, 0)),
        (20, 0.2, 4, Ending(5, 4, 4)),
        (20, 0.2, 5, Ending(7, 5, 5)),
        (20, 0.5, 5, Ending(10, 5, 5)),
        (20, 0.2, 16, Ending(20, 16, 16)),
        (20, 0.2, 17, Ending(20, 16)),  # patience ends within the cooldown, which is not interrupted
    ],
)
def test_start_of_the_cooldown(epochs: int, fraction: float, num_falling: int, expected: Ending):
    recipe = Recipe(epochs=epochs, patience=3, optimizer=replace(WSD, cooldown_fraction=fraction))
    rising = [{"val_ap": float(i)} for i in range(max(0, num_falling - 3))]
    history = [*rising, *[{"val_ap": -1.0}] * 3] if num_falling > 3 else []
    if num_falling == 4:
        history = [{"val_ap": 1.0}, *[{"val_ap": 0.0}] * 3]
    assert find_ending(recipe, epochs, history, "val_ap") == expected


def test_learning_rate_of_wsd():
    steps = [learning_rate_at(WSD, step, 100, epoch=0, num_epochs=9, cooldown=range(60, 80)) for step in range(80)]
    assert steps[0] == WSD.start_lr
    assert steps[1:60] == [1e-3] * 59
    expected = [1e-5 + (1e-3 - 1e-5) * (1 - math.sqrt(i / 20)) for i in range(1, 21)]
    assert steps[60:] == pytest.approx(expected)
    assert learning_rate_at(WSD, 99, 100, epoch=9, num_epochs=9) == 1e-5  # of an extended run


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """The validation accuracies `TOP1`, by epoch."""
    next_epoch: list[int] = [0]
    restore = Run.__init__

    def restored(run: Run, progress: Any, *arguments: Any) -> None:
        next_epoch[0] = 2 * progress.epoch
        restore(run, progress, *arguments)

    def metrics(_: ClassificationResults) -> dict[str, float]:
        next_epoch[0] += 1  # EMA weights, then raw weights
        return {"top1": float(TOP1[(next_epoch[0] - 1) // 2])}

    monkeypatch.setattr(Run, "__init__", restored)
    monkeypatch.setattr(ClassificationResults, "metrics", metrics)


def stopped_and_resumed(recipe: Recipe, data: Path, out: Path, epoch: int) -> TrainingResult:
    """The result of a run that an error stops at the end of `epoch`, before its checkpoint, and that then resumes."""
    with pytest.MonkeyPatch.context() as change:
        log_epoch = Run.log_epoch

        def log(run: Run, record: dict[str, float]) -> None:
            log_epoch(run, record)
            if record["epoch"] == epoch:
                raise InterruptedError("power failure")

        change.setattr(Run, "log_epoch", log)
        with pytest.raises(InterruptedError, match="power failure"):
            train(recipe, data, out)
    return train(recipe, data, out)


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(("schedule", "num_epochs"), [("cosine", 4), ("wsd", 6)])
def test_an_early_stopped_run(
    schedule: str, num_epochs: int, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    optimizer = replace(WSD, schedule=schedule, cooldown_fraction=0.3)  # 4 epochs, then a cooldown of 2
    recipe = replace(RECIPE, epochs=10, patience=2, optimizer=optimizer)
    out = tmp_path / "run"
    run = train(recipe, data, out)
    assert [record["val_top1"] for record in run.epochs] == list(TOP1[:num_epochs])
    assert "no improvement of top1 in 2 epochs" in caplog.text
    assert ("--optimizer.schedule wsd" in caplog.text) == (schedule == "cosine")
    rates = [line["lr"] for line in lines(out / "steps.jsonl")]
    assert len(rates) == 4 * num_epochs
    if schedule == "wsd":
        assert set(rates[1:16]) == {1e-3}
        assert rates[16:] == sorted(rates[16:], reverse=True)
        assert rates[-1] == pytest.approx(1e-5)
    else:
        assert rates[-1] > 5e-4
    assert f"after {num_epochs} of 10 epochs" in (out / "report.html").read_text()

    resumed = stopped_and_resumed(recipe, data, tmp_path / "resumed", epoch=4)  # the epoch of the decision
    assert without_times(resumed.epochs) == without_times(run.epochs)
    assert [line["lr"] for line in lines(tmp_path / "resumed/steps.jsonl")] == rates
    assert same_weights(tmp_path / "resumed/model.safetensors", run.weights)

    with pytest.raises(FinishedError, match=f"stopped early after epoch {num_epochs} of 10"):
        train(recipe, data, out)
    with pytest.raises(ValueError, match=r"epochs are 20, but .* not improved for 2 epochs after epoch 4"):
        train(replace(recipe, epochs=20), data, out, extend=True)
    with pytest.raises(ValueError, match=r"recipe\.patience was 2, is now 3"):
        train(replace(recipe, patience=3), data, out)
