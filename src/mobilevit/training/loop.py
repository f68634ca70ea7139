"""The training loop: one linear program, the same for every task."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mobilevit import recipes
from mobilevit.data.loader import load
from mobilevit.data.sampler import EpochBatches, eval_batches
from mobilevit.models.weights import Weights, write
from mobilevit.recipes import Recipe
from mobilevit.tasks import TASKS
from mobilevit.training.ema import MovingAverage
from mobilevit.training.optim import build_optimizer, learning_rate


@dataclass(frozen=True)
class Run:
    """What a finished run leaves: the weights' file and the metrics of every epoch."""

    weights: Path
    epochs: list[dict[str, float]]


def train(
    recipe: Recipe,
    data: Path,
    out: Path,
    *,
    pretrained: Weights | None = None,
    device: str = "cpu",
    console: Console | None = None,
) -> Run:
    """Train by `recipe` on the pictures in `data`; leave model.safetensors, metrics.jsonl and recipe.json in `out`.

    The same recipe, data, device and number of threads give the same weights. Progress goes to `console` (standard
    error unless given).

    Raises:
        ValueError: data that cannot be trained on, a folder `out` that holds a run already, a loss that is not finite.
    """
    console = console or Console(stderr=True)
    task = TASKS["classify"]

    # --- Data -------------------------------------------------------------------------------------------------------
    train_set, val_set = task.datasets(recipe, data)
    if len(train_set) < 2:
        raise ValueError(f"{data}: {len(train_set)} pictures are too few to train on")
    if out.resolve().is_relative_to(data.resolve()) and not (data / "train").is_dir():
        raise ValueError(f"{out}: lies among the class folders of {data} and would be taken for one; name another")
    if (out / "metrics.jsonl").exists() or (out / "model.safetensors").exists():
        raise ValueError(f"{out}: holds a run already; choose another folder or remove this one")
    out.mkdir(parents=True, exist_ok=True)
    (out / "recipe.json").write_text(json.dumps(recipes.to_dict(recipe), indent=2) + "\n", encoding="utf-8")

    # --- Model, its average, optimizer -------------------------------------------------------------------------------
    torch.manual_seed(recipe.seed)
    initial = task.build(recipe, train_set, pretrained)
    console.print(
        f"MobileViT-{initial.architecture.name.upper()} from {'the given' if pretrained else 'random'} weights; "
        f"{len(train_set):,} pictures of {len(initial.class_names)} classes for training, "
        f"{len(val_set):,} for validation",
        highlight=False,
        soft_wrap=True,
    )
    model = initial.build().to(device).train()
    val_batches = eval_batches(len(val_set), batch_size=recipe.batch_size, size_px=recipe.data.size_px)
    num_steps = sum(len(_batches(recipe, len(train_set), epoch)) for epoch in range(recipe.epochs))
    average = MovingAverage(model, recipe.ema_decay, num_steps)
    optimizer = build_optimizer(model, recipe.optimizer)

    # --- Epochs ------------------------------------------------------------------------------------------------------
    history: list[dict[str, float]] = []
    step = 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps,"))
    bar_of_run = Progress(*columns, TimeRemainingColumn(), TextColumn("left"), console=console)
    with _naming_what_is_left(out, history), bar_of_run as progress:
        bar = progress.add_task("epoch 1", total=num_steps)
        for epoch in range(recipe.epochs):
            started = time.perf_counter()
            total_loss = 0.0
            batches = _batches(recipe, len(train_set), epoch)
            for batch in load(train_set, batches, num_workers=recipe.data.num_workers, device=device):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(recipe.optimizer, step, num_steps)
                loss = task.loss(recipe, model, batch)
                if not torch.isfinite(loss):
                    raise ValueError(
                        f"the loss is {loss.item()} at epoch {epoch + 1}, step {step + 1}; try a lower --optimizer.lr"
                    )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                average.update(model)
                total_loss += loss.item()
                step += 1
                progress.update(bar, advance=1, description=f"epoch {epoch + 1}/{recipe.epochs}")
            seconds = time.perf_counter() - started

            # --- Evaluate the average, keep it -----------------------------------------------------------------------
            metrics = task.evaluate(
                average.model, load(val_set, val_batches, num_workers=recipe.data.num_workers, device=device)
            )
            averaged = average.model.state_dict().values()
            if not all(map(math.isfinite, metrics.values())) or not all(x.isfinite().all() for x in averaged):
                raise ValueError(f"the network is not finite after epoch {epoch + 1}; try a lower --optimizer.lr")
            record = {
                "epoch": epoch + 1,
                "train_loss": total_loss / len(batches),
                "pictures_per_second": len(train_set) / seconds,
                **{f"val_{name}": value for name, value in metrics.items()},
            }
            history.append(record)
            with (out / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            _save(initial, average, recipe, record, out / "model.safetensors")
            progress.console.print(
                f"epoch {epoch + 1:>3}  loss {record['train_loss']:.3f}  validation top-1 {record['val_top1']:.2f} %  "
                f"{record['pictures_per_second']:,.0f} pictures/s",
                highlight=False,
                soft_wrap=True,
            )
    return Run(out / "model.safetensors", history)


@contextlib.contextmanager
def _naming_what_is_left(out: Path, history: list[dict[str, float]]) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        kept = (
            f"{out / 'model.safetensors'} holds the weights of epoch {len(history)}" if history else "nothing is kept"
        )
        raise KeyboardInterrupt(f"interrupted in epoch {len(history) + 1}; {kept}") from None


def _batches(recipe: Recipe, num_pictures: int, epoch: int) -> EpochBatches:
    sampler = recipe.sampler
    return EpochBatches(
        num_pictures,
        sizes_px=(recipe.data.size_px,) if sampler.variant == "standard" else sampler.sizes_px,
        batch_size=recipe.batch_size,
        base_px=recipe.data.size_px,
        variant=sampler.variant,
        seed=recipe.seed,
        epoch=epoch,
    )


def _save(initial: Weights, average: MovingAverage, recipe: Recipe, record: Mapping[str, Any], path: Path) -> None:
    # Without the speed, so that the same run leaves the same file.
    metrics = {name: value for name, value in record.items() if name != "pictures_per_second"}
    training = {"recipe": recipes.to_dict(recipe), "metrics": metrics}
    write(replace(initial, tensors=average.model.state_dict(), training=training), path)
