"""The systems trained side by side on one's own images: the same recipe, data and epochs, several seeds.

    OUT/runs/<system>/seed-<n>/     a run each, as `mobilevit train` leaves it; see `mobilevit.training.run`

Everything that is reported is read from the runs: one that is finished is not repeated, one that was stopped goes on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mobilevit import recipes
from mobilevit.compare.counts import count
from mobilevit.compare.models import SCALED, SYSTEMS, Network, import_library
from mobilevit.compare.run import (
    OURS,
    Baseline,
    Runtime,
    add_times,
    against,
    check_names,
    check_runtimes,
    circumstances,
    network_of,
)
from mobilevit.compare.statistics import check_scipy, holm, welch
from mobilevit.images import first_line
from mobilevit.recipes import Recipe
from mobilevit.tasks import TASKS
from mobilevit.training.external import check_recipe
from mobilevit.training.loop import DivergedError, train
from mobilevit.training.run import FinishedError

NETWORKS: dict[str, Network] = {**SYSTEMS, **SCALED}
METRIC = "val_top1"  # of the averaged weights


@dataclass
class Trained:
    """A system, what it costs, and what became of its runs: metrics of every epoch by seed, or why there are none."""

    network: Network
    costs: dict[str, int | None]
    runs: dict[int, list[dict[str, float]]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def choose(names: Sequence[str], recipe: Recipe, baseline: Baseline = "nearest") -> list[Network]:
    """The networks called `names`, those of `SCALED` if there are none; always with a MobileViT to compare them with.

    That is the `baseline`, or the recipe's where any is as good and `names` has none. Published systems stand first.

    Raises:
        ValueError: names that are in neither table, of two systems that are one network.
    """
    check_names(names, NETWORKS)
    wanted = set(names or SCALED)
    for name in wanted:
        if network_of(name) != name and network_of(name) in wanted:
            raise ValueError(f"{name} is the same network as {network_of(name)}; name one of them")
    if baseline != "nearest":
        wanted.add(baseline)
    elif wanted.isdisjoint(OURS):
        wanted.add(f"mobilevit-{recipe.architecture}")
    return [network for name, network in NETWORKS.items() if name in wanted]


def compare_trained(
    networks: Sequence[Network],
    data: str | Path,
    out: Path,
    recipe: Recipe,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    baseline: Baseline = "nearest",
    device: str = "cpu",
    runtimes: Sequence[Runtime] = (),
    num_rounds: int = 40,
    num_threads: int = 2,
    on_start: Callable[[str], None] = lambda what: None,
    on_problem: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Train `networks`, a MobileViT among them, by `recipe` on `data`, with each of `seeds`; the report as JSON values.

    The recipe's own architecture and seed count for nothing. Runs lie in `out`; those that are there already are read
    or gone on with. A network that cannot be built at the recipe's size, or whose training fails, is in the report by
    name and reason, and told to `on_problem`; the others go on.

    When all are trained, what is trained is timed, one image at a time: in `runtimes`, `num_rounds` times, with
    `num_threads` threads, which say nothing of training.

    Raises:
        ValueError: data that cannot be trained on, a recipe that is not for all, a run of another recipe or other data
            in the folder, a library or runtime that is not there, several processes.
        Stopped: Ctrl-C or SIGTERM; the same call goes on from there.
    """
    check_recipe(recipe)
    check_runtimes(runtimes, device)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds are {', '.join(map(str, seeds)) or 'none'}; give one or more, each of them once")
    recipe_of = {seed: replace(recipe, seed=seed) for seed in seeds}  # a seed that cannot be is told before any trains
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("systems are compared in one process; leave out torchrun, and give each command other seeds")
    if len(seeds) > 1:
        check_scipy()
    for library in {network.library for network in networks} - {"ours"}:
        import_library(library)
    begun = circumstances(device)
    train_set, val_set = TASKS["classify"].datasets(recipe, data)  # its mistakes are the user's, not a system's
    num_classes, size_px = len(train_set.source.class_names), recipe.data.size_px
    every = [_counted(network, num_classes, size_px, on_start) for network in networks]
    for trained in every:
        for reason in trained.failures.values():
            on_problem(f"{trained.network.name}: {reason}")
    # By seed first: an early table then has all systems.
    todo = [(seed, trained) for seed in seeds for trained in every if not trained.failures]
    for number, (seed, trained) in enumerate(todo, start=1):
        name = trained.network.name
        on_start(f"{name}, seed {seed}: run {number} of {len(todo)}")
        folder = out / "runs" / name / f"seed-{seed}"
        try:
            trained.runs[seed] = _run(trained.network, recipe_of[seed], data, folder, device)
        except (DivergedError, RuntimeError) as error:  # torch's own, for want of memory say, are RuntimeErrors
            trained.failures[f"seed {seed}"] = first_line(error)
            on_problem(f"{name}, seed {seed}: {first_line(error)}")
    rows = [_row(trained, len(train_set)) for trained in every]
    notes = add_times(
        [(trained.network, size_px, row) for trained, row in zip(every, rows, strict=True) if trained.runs],
        runtimes=runtimes,
        batch_sizes=(1,),
        device=device,
        baseline=baseline,
        num_rounds=num_rounds,
        num_threads=num_threads,
        num_classes=num_classes,
        on_start=on_start,
        on_problem=on_problem,
    )
    shared = {name: value for name, value in recipes.to_dict(recipe).items() if name not in ("architecture", "seed")}
    return {
        **begun,
        "timing": {"num_rounds": num_rounds, "num_threads": num_threads} if runtimes else None,
        "data": str(data),
        "held_out": TASKS["classify"].held_out_name(data),
        "num_train": len(train_set),
        "num_val": len(val_set),
        "num_classes": num_classes,
        "commonest": 100 * float(np.bincount(val_set.source.labels).max()) / len(val_set),
        "recipe": shared,
        "seeds": list(seeds),
        "baseline": baseline,
        "rows": rows,
        "comparisons": compare_rows(rows, len(seeds), baseline),
        "notes": notes,
    }


def _counted(network: Network, num_classes: int, size_px: int, on_start: Callable[[str], None]) -> Trained:
    on_start(f"{network.name}: counting ...")
    keys = ("num_parameters", "num_macs", "num_attention_macs", "inference_bytes")
    try:
        return Trained(network, asdict(count(lambda: network.build(num_classes, size_px), size_px)))
    except Exception as error:  # whatever a library says of a size that its network cannot have
        reason = f"cannot be built for {size_px} px and {num_classes} classes ({first_line(error)})"
        return Trained(network, dict.fromkeys(keys), failures={"all seeds": reason})


def _run(network: Network, recipe: Recipe, data: str | Path, out: Path, device: str) -> list[dict[str, float]]:
    """The metrics of every epoch of the run in `out`, which is trained as far as it is not."""
    try:
        if network.family == "mobilevit":  # by the loop's own way, so that all commands can use the weights
            size: Any = network.name.removeprefix("mobilevit-")
            return train(replace(recipe, architecture=size), data, out, device=device).epochs
        return train(recipe, data, out, classifier=network, device=device).epochs
    except FinishedError as finished:
        return finished.epochs


def _row(trained: Trained, num_images: int) -> dict[str, Any]:
    top1 = [epochs[-1][METRIC] for epochs in trained.runs.values()]
    seconds = [epoch["seconds"] for epochs in trained.runs.values() for epoch in epochs]
    macs, attention_macs = trained.costs["num_macs"], trained.costs["num_attention_macs"]
    return {
        "name": trained.network.name,
        "family": trained.network.family,
        "paper": trained.network.paper,
        "library": trained.network.library,
        "num_parameters": trained.costs["num_parameters"],
        "num_macs": None if macs is None or attention_macs is None else macs + attention_macs,
        "num_macs_without_attention": macs,
        "activation_bytes": trained.costs["inference_bytes"],
        "top1": float(np.mean(top1)) if top1 else None,
        "top1_std": float(np.std(top1, ddof=1)) if len(top1) > 1 else None,
        "seconds_per_epoch": float(np.median(seconds)) if seconds else None,
        "images_per_second": num_images / float(np.median(seconds)) if seconds else None,
        "runs": [
            {
                "seed": seed,
                "top1": epochs[-1][METRIC],
                "top1_by_epoch": [epoch[METRIC] for epoch in epochs],
                "train_loss_by_epoch": [epoch["train_loss"] for epoch in epochs],
                "seconds_by_epoch": [epoch["seconds"] for epoch in epochs],
            }
            for seed, epochs in trained.runs.items()
        ],
        "failures": trained.failures,
        "timings": [],
    }


def compare_rows(rows: Sequence[dict[str, Any]], num_seeds: int, baseline: Baseline) -> list[dict[str, Any]]:
    """Every row beside the MobileViT that it is compared with: the difference in top-1, and what it is worth.

    A system some of whose runs failed is left out, on either side: the seeds that are left were not drawn by chance.
    """
    whole = [row for row in rows if len(row["runs"]) == num_seeds]
    by_name = {row["name"]: row for row in whole}
    found = []
    for row in whole:
        other = against(row, whole, baseline)
        if other is not None:
            values, others = ([run["top1"] for run in one["runs"]] for one in (row, by_name[other]))
            difference = welch(values, others)
            found.append(
                {
                    "name": row["name"],
                    "against": other,
                    "num_seeds": num_seeds,
                    "difference": difference.mean,
                    "low": difference.low,
                    "high": difference.high,
                    "p": difference.p,
                    "p_holm": None,
                }
            )
    tested = [one for one in found if one["p"] is not None]
    for one, p in zip(tested, holm([one["p"] for one in tested]), strict=True):
        one["p_holm"] = p
    return found
