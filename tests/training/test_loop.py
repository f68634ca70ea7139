"""Small runs: the same each time, saved whole, stopped when there is nothing to save."""

import copy
import io
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors import safe_open
from torch import nn

import mobilevit
from mobilevit.data.sampler import EpochBatches
from mobilevit.models.mobilevit import XXS, MobileViT
from mobilevit.models.weights import Weights, read
from mobilevit.pictures import PictureError
from mobilevit.recipes import Data, Optimizer, Recipe, Sampler, from_dict
from mobilevit.tasks.classification import Classification, evaluate_weights
from mobilevit.training.ema import MovingAverage
from mobilevit.training.loop import Run, train
from mobilevit.training.optim import learning_rate

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # where there is one core
    pytest.mark.filterwarnings("ignore:This process .*is multi-threaded:DeprecationWarning"),
]
# 12 pictures for training and 3 for validation: 4 steps an epoch.
RECIPE = Recipe(
    architecture="xxs",
    epochs=2,
    batch_size=3,
    data=Data(size_px=32, eval_resize=1.0, num_workers=0),
    optimizer=Optimizer(lr=1e-3, warmup_steps=1),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for split, num in (("train", 4), ("val", 1)):
        for label, class_name in enumerate(("circle", "line", "square")):
            for i in range(num):
                file = folder / split / class_name / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                pixels = random.integers(0, 100 + 70 * label, (32 + i, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(file)
    return folder


def run(recipe: Recipe, data: Path, out: Path, **options: Any) -> Run:
    return train(recipe, data, out, console=Console(file=io.StringIO()), **options)


@pytest.fixture(scope="module")
def first(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(RECIPE, data, tmp_path_factory.mktemp("first"))


def same(a: Path, b: Path) -> bool:
    ours, theirs = read(a).tensors, read(b).tensors
    return ours.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in ours.items())


def without_speed(epochs: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in epoch.items() if name != "pictures_per_second"} for epoch in epochs]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_again_and_with_workers_to_the_bit(first: Run, data: Path, tmp_path: Path, num_workers: int):
    torch.rand(3)  # what was drawn before plays no role
    again = run(replace(RECIPE, data=replace(RECIPE.data, num_workers=num_workers)), data, tmp_path / "new" / "folder")
    assert same(first.weights, again.weights)
    assert without_speed(first.epochs) == without_speed(again.epochs)


def test_against_a_loop_without_frills(data: Path, tmp_path: Path):
    without_dropout = replace(XXS, transformer_dropout=0.0, classifier_dropout=0.0)
    model = MobileViT(without_dropout, num_classes=3)
    initial = Weights(without_dropout, copy.deepcopy(model.state_dict()), class_names=("circle", "line", "square"))
    done = run(RECIPE, data, tmp_path, pretrained=initial)

    pictures, _ = Classification().datasets(RECIPE, data)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=RECIPE.optimizer.weight_decay)
    model.train()
    losses = []
    for step in range(8):
        optimizer.param_groups[0]["lr"] = learning_rate(RECIPE.optimizer, step, 8)
        batch = EpochBatches(12, sizes_px=(32,), batch_size=3, base_px=32, epoch=step // 4)[step % 4]
        pixels, labels = zip(*(cast(tuple[torch.Tensor, int], pictures[pick]) for pick in batch), strict=True)
        optimizer.zero_grad()
        logits = model(torch.stack(pixels) / 255)
        loss = nn.functional.cross_entropy(logits, torch.tensor(labels), label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert [epoch["train_loss"] for epoch in done.epochs] == pytest.approx([sum(losses[:4]) / 4, sum(losses[4:]) / 4])
    for name, x in read(done.weights).tensors.items():  # so short a run saves its last weights
        torch.testing.assert_close(x, model.state_dict()[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("change", [{"seed": 1}, {"label_smoothing": 0.2}, {"batch_size": 4}])
def test_another_recipe_gives_other_weights(first: Run, data: Path, tmp_path: Path, change: dict[str, Any]):
    assert not same(first.weights, run(replace(RECIPE, epochs=1, **change), data, tmp_path).weights)


def test_what_a_run_leaves(first: Run, data: Path):
    out = first.weights.parent
    assert {file.name for file in out.iterdir()} == {"model.safetensors", "metrics.jsonl", "recipe.json"}
    assert from_dict(json.loads((out / "recipe.json").read_text())) == RECIPE
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines == first.epochs
    assert [line["epoch"] for line in lines] == [1, 2]

    with safe_open(first.weights, framework="pt") as file:
        metadata = json.loads(file.metadata()["mobilevit"])
    assert metadata["class_names"] == ["circle", "line", "square"]
    assert metadata["preprocessing"]["crop_px"] == metadata["preprocessing"]["resize_px"] == 32
    assert from_dict(metadata["training"]["recipe"]) == RECIPE
    assert metadata["training"]["metrics"] == {k: v for k, v in lines[-1].items() if k != "pictures_per_second"}


def test_the_saved_model_does_what_the_last_line_says(first: Run, data: Path):
    metrics = evaluate_weights(read(first.weights), data, batch_size=RECIPE.batch_size)
    assert {f"val_{name}": value for name, value in metrics.items()} == {
        name: value for name, value in first.epochs[-1].items() if name.startswith("val_")
    }
    model = mobilevit.load(first.weights)
    files = sorted((data / "val").rglob("*.png"))
    right = [model.predict(file)[0].class_name == file.parent.name for file in files]
    assert metrics["top1"] == pytest.approx(100 * np.mean(right))


def test_the_optimizer_sees_every_batch_once_at_its_rate(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rates, sizes = [], []
    step, loss = torch.optim.AdamW.step, Classification.loss
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self)))
    monkeypatch.setattr(
        Classification, "loss", lambda self, r, m, batch: (sizes.append(len(batch.labels)), loss(self, r, m, batch))[1]
    )
    recipe = replace(RECIPE, batch_size=5, optimizer=Optimizer(start_lr=0.0, lr=4e-4, end_lr=0.0, warmup_steps=0))
    run(recipe, data, tmp_path)  # 3 steps in each of 2 epochs
    assert sizes == [5, 5, 2] * 2
    cosine = [1.0, (1 + 0.8090169944) / 2, (1 + 0.3090169944) / 2]
    assert rates == pytest.approx([4e-4 * x for x in (*cosine, *(1 - x for x in reversed(cosine)))], abs=1e-12)


def test_several_sizes_in_one_run(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen, loss = [], Classification.loss
    monkeypatch.setattr(
        Classification, "loss", lambda self, r, m, batch: (seen.append(batch.pixels.shape), loss(self, r, m, batch))[1]
    )
    recipe = replace(RECIPE, epochs=6, sampler=Sampler("main", (32, 64)))
    done = run(recipe, data, tmp_path)
    assert {shape[2:] for shape in seen} == {(32, 32), (64, 64)}
    assert sum(shape[0] for shape in seen) == 6 * 12
    assert all(epoch["val_num_pictures"] == 3 for epoch in done.epochs)
    assert read(done.weights).preprocessing.crop_px == 32


@pytest.mark.parametrize("file", ["metrics.jsonl", "model.safetensors"])
def test_a_folder_in_use_is_left_alone(data: Path, tmp_path: Path, file: str):
    (tmp_path / file).write_text("precious")
    with pytest.raises(ValueError, match=f"^{tmp_path}: holds a run already"):
        run(RECIPE, data, tmp_path)
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [(file, "precious")]


def test_wrong_data_leave_nothing_behind(tmp_path: Path):
    (tmp_path / "data").mkdir()
    with pytest.raises(ValueError, match="found no folders"):
        run(RECIPE, tmp_path / "data", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_picture_stops_the_run_by_name_and_a_mended_one_goes_on(tmp_path: Path, num_workers: int):
    for name in ("train/a/1", "train/a/2", "train/b/1", "val/a/1", "val/b/1"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((32, 32), 50).save(tmp_path / f"{name}.png")
    recipe = replace(RECIPE, epochs=1, data=replace(RECIPE.data, num_workers=num_workers))
    for split in ("train", "val"):
        file = tmp_path / split / "a" / "1.png"
        whole = file.read_bytes()
        file.write_bytes(whole[:-30])
        with pytest.raises(PictureError, match=f"^{file}: damaged"):
            run(recipe, tmp_path, tmp_path / "out")
        file.write_bytes(whole)
    assert len(run(recipe, tmp_path, tmp_path / "out").epochs) == 1


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_epoch_before(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    loss, calls = Classification.loss, []

    def loss_until(self: Classification, *arguments: Any) -> torch.Tensor:
        calls.append(None)
        return loss(self, *arguments) * (float("nan") if len(calls) == 6 else 1)

    monkeypatch.setattr(Classification, "loss", loss_until)
    with pytest.raises(ValueError, match=r"^the loss is nan at epoch 2, step 6; try a lower --optimizer.lr$"):
        run(RECIPE, data, tmp_path)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    kept = read(tmp_path / "model.safetensors")
    assert kept.training["metrics"]["epoch"] == 1
    metrics = evaluate_weights(kept, data, batch_size=RECIPE.batch_size)
    assert metrics["loss"] == kept.training["metrics"]["val_loss"]


@pytest.mark.parametrize("batch_size", [3, 12])  # 12: the first step breaks the network, and none in the epoch sees it
def test_an_absurd_rate_saves_nothing(data: Path, tmp_path: Path, batch_size: int):
    recipe = replace(RECIPE, epochs=1, batch_size=batch_size, optimizer=Optimizer(start_lr=1e30, lr=1e30, end_lr=1e30))
    with pytest.raises(ValueError, match=r"^the (loss|network) is .*; try a lower --optimizer.lr$"):
        run(recipe, data, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["recipe.json"]


# With an infinite variance the answers are still finite, but whoever reads the weights refuses them.
@pytest.mark.parametrize("name", ["backbone.stem.conv.weight", "head.norm.running_var"])
def test_a_broken_last_step_keeps_the_epoch_before(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    update, calls = MovingAverage.update, []

    def update_until(self: MovingAverage, model: nn.Module) -> None:
        update(self, model)
        calls.append(None)
        if len(calls) == 8:  # the last step of the run
            self.model.state_dict()[name].fill_(float("inf"))

    monkeypatch.setattr(MovingAverage, "update", update_until)
    with pytest.raises(ValueError, match=r"^the network is not finite after epoch 2; "):
        run(RECIPE, data, tmp_path)
    assert read(tmp_path / "model.safetensors").training["metrics"]["epoch"] == 1


def test_starting_from_weights_of_the_same_classes(first: Run, data: Path, tmp_path: Path):
    still = replace(RECIPE, epochs=1, seed=5, optimizer=Optimizer(0.0, 1e-30, 0.0, weight_decay=0.0))
    run(still, data, tmp_path, pretrained=read(first.weights))
    before, after = read(first.weights), read(tmp_path / "model.safetensors")
    moved = {n.rpartition(".")[2] for n, x in after.tensors.items() if not torch.equal(x, before.tensors[n])}
    assert moved == {"running_mean", "running_var", "num_batches_tracked"}
    assert asdict(after.preprocessing) == asdict(before.preprocessing)


def test_starting_from_weights_of_other_classes(first: Run, data: Path, tmp_path: Path):
    pretrained = replace(read(first.weights), class_names=("circle", "square", "triangle"))
    still = replace(RECIPE, epochs=1, seed=5, optimizer=Optimizer(0.0, 1e-30, 0.0, weight_decay=0.0))
    run(still, data, tmp_path, pretrained=pretrained)
    after = read(tmp_path / "model.safetensors")
    moved = {n for n, x in after.tensors.items() if not torch.equal(x, pretrained.tensors[n])}
    moved = {n for n in moved if n.rpartition(".")[2] not in ("running_mean", "running_var", "num_batches_tracked")}
    assert moved == {"classifier.weight", "classifier.bias"}
    assert after.class_names == ("circle", "line", "square")


def test_interrupted(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    evaluate, epochs = Classification.evaluate, []

    def stop_in_the_second(self: Classification, *args: Any) -> dict[str, float]:
        epochs.append(1)
        if len(epochs) == 2:
            raise KeyboardInterrupt
        return evaluate(self, *args)

    monkeypatch.setattr(Classification, "evaluate", stop_in_the_second)
    said = "interrupted in epoch 2; .*model.safetensors holds the weights of epoch 1"
    with pytest.raises(KeyboardInterrupt, match=said):
        run(RECIPE, data, tmp_path)
    assert read(tmp_path / "model.safetensors").training["metrics"]["epoch"] == 1


def test_out_among_the_classes_is_refused(tmp_path: Path):
    for name in ("a/1", "a/2", "b/1", "b/2"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32)).save(tmp_path / f"{name}.png")
    with pytest.raises(ValueError, match="among the class folders"):
        run(RECIPE, tmp_path, tmp_path / "runs")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
