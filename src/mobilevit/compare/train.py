"""Train models on your own images, all with the same recipe, data, epochs and seeds.

    OUT/runs/<model>/seed-<n>/     one run each, as `mobilevit train` writes it; see `mobilevit.training.run`

The report is read from the runs. A finished run is not repeated, an interrupted one is resumed.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mobilevit import recipes
from mobilevit.benchmark.cost import Cost, count
from mobilevit.compare.models import (
    MOBILEVITS,
    MODELS,
    SCALED,
    Model,
    check_names,
    network_key,
    require_library,
)
from mobilevit.compare.reports import Baseline, SeedRun, TrainedReport, TrainedRow
from mobilevit.compare.run import TimingOptions, baseline_of, time_models, timings_of
from mobilevit.compare.statistics import Comparison, holm, require_scipy, welch
from mobilevit.data.class_sets import ClassSet
from mobilevit.data.samples import Source
from mobilevit.data.sources import default_split
from mobilevit.messages import first_line
from mobilevit.recipes import METRICS, Recipe
from mobilevit.tasks import TASKS
from mobilevit.training.external import check_recipe
from mobilevit.training.loop import DivergedError, train
from mobilevit.training.run import FinishedError

logger = logging.getLogger(__name__)

TRAINABLE: dict[str, Model] = {**MODELS, **SCALED}
SEEDS = (0, 1, 2)


@dataclass
class _Training:
    """A model and its runs: the metrics of every epoch by seed, or the reason of a failure by seed."""

    model: Model
    cost: Cost | None = None
    runs: dict[int, list[dict[str, float]]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def fail(self, when: str, reason: str) -> None:
        self.failures[when] = reason
        logger.warning("%s, %s: %s", self.model.name, when, reason)


def choose(names: Sequence[str], recipe: Recipe, baseline: Baseline = "nearest") -> list[Model]:
    """The models `names`, or those of `SCALED` if there are none, and at least one MobileViT as their baseline.

    That is `baseline`, or the recipe's architecture if `names` has no MobileViT.

    Raises:
        ValueError: an unknown name, or two names of the same network.
    """
    check_names(names, TRAINABLE)
    chosen = set(names or SCALED)
    for name in chosen:
        if network_key(name) != name and network_key(name) in chosen:
            raise ValueError(f"{name} is the same network as {network_key(name)}; give one of them")
    if baseline != "nearest":
        chosen.add(baseline)
    elif chosen.isdisjoint(MOBILEVITS):
        chosen.add(f"mobilevit-{recipe.architecture}")
    return [model for name, model in TRAINABLE.items() if name in chosen]


def compare_trained(
    models: Sequence[Model],
    data: str | Path,
    out: Path,
    recipe: Recipe,
    *,
    seeds: Sequence[int] = SEEDS,
    options: TimingOptions | None = None,
) -> TrainedReport:
    """Train `models`, which must include a MobileViT, on `data`, once with each seed; then time them.

    A model that cannot be built for the recipe's image size, or whose training fails, is reported with the reason, and
    the others continue.

    Args:
        models: see `choose`.
        data: images, as for `mobilevit train`.
        out: folder of the runs. Existing runs are read or resumed.
        recipe: for all models; its architecture and seed are ignored.
        seeds: one run for each.
        options: device of the training, and how to time the trained models, one image at a time. Not timed by default.

    Raises:
        ValueError: unsuitable data, a recipe that does not suit all models, a run in `out` with another recipe or other
            data, a library or runtime that is not installed, several processes.
        Stopped: Ctrl-C or SIGTERM; the same call resumes.
    """
    options = options or TimingOptions(runtimes=())
    _check(models, recipe, seeds, options)
    setting = options.setting(torch.get_num_threads())
    recipe_of = {seed: replace(recipe, seed=seed) for seed in seeds}  # checks every seed before the first training
    task = "multilabel" if recipe.task == "multilabel" else "classify"
    train_set, val_set = TASKS[task].datasets(recipe, data)  # an error in the data is not a model's failure
    num_classes, size_px = len(train_set.source.class_names), recipe.data.size_px
    trainings = [_count(model, num_classes, size_px) for model in models]
    # The outer loop is over seeds, so that an early report has all models.
    todo = [(seed, training) for seed in seeds for training in trainings if not training.failures]
    for index, (seed, training) in enumerate(todo, start=1):
        name = training.model.name
        logger.info("%s, seed %d: run %d of %d", name, seed, index, len(todo))
        folder = out / "runs" / name / f"seed-{seed}"
        try:
            training.runs[seed] = _run(training.model, recipe_of[seed], data, folder, options.device)
        except (DivergedError, RuntimeError) as error:  # such as out of memory
            training.fail(f"seed {seed}", first_line(error))
    rows = [_row(training, size_px, len(train_set), METRICS[task]) for training in trainings]
    timings, notes = time_models([(t.model, size_px) for t in trainings if t.runs], options, num_classes)
    num_parameters = {row.name: row.cost.num_parameters for row in rows if row.cost and row.runs}
    rows = [
        replace(row, timings=timings_of(row.name, timings, num_parameters, options)) if row.runs else row
        for row in rows
    ]
    shared = {name: value for name, value in recipes.to_dict(recipe).items() if name not in ("architecture", "seed")}
    return TrainedReport(
        setting=setting,
        rows=rows,
        notes=notes,
        data=str(data),
        val_split=None if (split := default_split(task, data)) == "all" else split,
        num_train=len(train_set),
        num_val=len(val_set),
        num_classes=num_classes,
        metrics=METRICS[task],
        constant_score=_constant_score(val_set.source),
        recipe=shared,
        seeds=seeds,
        comparisons=compare_rows(rows, len(seeds), options.baseline),
    )


def _check(models: Sequence[Model], recipe: Recipe, seeds: Sequence[int], options: TimingOptions) -> None:
    """Raise ValueError for everything that would fail after hours of training."""
    check_recipe(recipe)
    options.check()
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds are {', '.join(map(str, seeds)) or 'none'}; give one or more different seeds")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("a comparison runs in one process; do not use torchrun, give each command other seeds instead")
    if len(seeds) > 1:
        require_scipy()
    for library in {model.library for model in models} - {"ours"}:
        require_library(library)


def _count(model: Model, num_classes: int, size_px: int) -> _Training:
    logger.info("%s: counting ...", model.name)
    training = _Training(model)
    try:
        with torch.device("meta"):
            network = model.build(num_classes, size_px)
        training.cost = count(network, (size_px, size_px))
    except Exception as error:  # a library may raise anything for an unsupported size
        training.fail("all seeds", f"cannot be built for {size_px} px and {num_classes} classes ({first_line(error)})")
    return training


def _run(model: Model, recipe: Recipe, data: str | Path, out: Path, device: str) -> list[dict[str, float]]:
    """Train, resume or read the run in `out`; returns the metrics of every epoch."""
    try:
        if model.family == "mobilevit":  # as `mobilevit train` does it, so that all commands accept the weights
            size: Any = model.name.removeprefix("mobilevit-")
            return train(replace(recipe, architecture=size), data, out, device=device).epochs
        return train(recipe, data, out, classifier=model, device=device).epochs
    except FinishedError as finished:
        return finished.epochs


def _constant_score(source: Source[Any]) -> float:
    """The score of equal predictions for all images, in percent.

    That is the top-1 of the most frequent class, or with several labels per image the mean frequency of the classes
    that occur, because the average precision of a class is then its frequency.
    """
    if isinstance(source.labels[0], ClassSet):
        counts = Counter(index for label in source.labels for index in label.indices)
        return 100 * sum(counts.values()) / (len(counts) * len(source))
    return 100 * max(Counter(source.labels).values()) / len(source)


def _row(training: _Training, size_px: int, num_images: int, metrics: Sequence[str]) -> TrainedRow:
    model, key = training.model, f"val_{metrics[0]}"  # of the EMA weights
    scores = [epochs[-1][key] for epochs in training.runs.values()]
    seconds = [epoch["seconds"] for epochs in training.runs.values() for epoch in epochs]
    return TrainedRow(
        name=model.name,
        family=model.family,
        paper=model.paper,
        library=model.library,
        size_px=size_px,
        cost=training.cost,
        score=float(np.mean(scores)) if scores else None,
        score_std=float(np.std(scores, ddof=1)) if len(scores) > 1 else None,
        seconds_per_epoch=float(np.median(seconds)) if seconds else None,
        images_per_second=num_images / float(np.median(seconds)) if seconds else None,
        runs=tuple(
            SeedRun(
                seed=seed,
                score=epochs[-1][key],
                metrics={  # runs of older versions do not have all of them
                    name: value for name in metrics[1:] if (value := epochs[-1].get(f"val_{name}")) is not None
                },
                score_by_epoch=tuple(epoch[key] for epoch in epochs),
                train_loss_by_epoch=tuple(epoch["train_loss"] for epoch in epochs),
                seconds_by_epoch=tuple(epoch["seconds"] for epoch in epochs),
            )
            for seed, epochs in training.runs.items()
        ),
        failures=training.failures,
    )


def compare_rows(rows: Sequence[TrainedRow], num_seeds: int, baseline: Baseline) -> list[Comparison]:
    """Compare the scores of every model with that of its baseline.

    Models with a failed run are excluded, also as baselines: the remaining seeds are not a random sample.
    """
    complete = {row.name: row for row in rows if row.cost and len(row.runs) == num_seeds}
    num_parameters = {name: row.cost.num_parameters for name, row in complete.items() if row.cost}
    comparisons = []
    for name, row in complete.items():
        other = baseline_of(name, num_parameters, baseline)
        if other is not None:
            values, others = ([run.score for run in one.runs] for one in (row, complete[other]))
            low, high, p = welch(values, others) or (None, None, None)
            difference = float(np.mean(values) - np.mean(others))
            comparisons.append(Comparison(name, other, num_seeds, difference, low, high, p))
    tested = [one for one in comparisons if one.p is not None]
    p_holm = dict(zip([one.name for one in tested], holm([one.p for one in tested if one.p is not None]), strict=True))
    return [replace(one, p_holm=p_holm.get(one.name), num_tests=len(tested)) for one in comparisons]
