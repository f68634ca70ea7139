"""Small runs: the same each time, saved whole, stopped when there is nothing to save."""

import copy
import io
import json
import multiprocessing
import re
import shlex
import shutil
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
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
from mobilevit.cli import parse
from mobilevit.data.loader import Batch, ImageDataset, Item
from mobilevit.data.sampler import EpochBatches, Pick
from mobilevit.data.sources import find_splits, fingerprint
from mobilevit.images import ImageError
from mobilevit.models.mobilevit import XXS, Architecture, MobileViT, Transformer
from mobilevit.recipes import RECIPES, Compute, Data, Optimizer, Precision, Recipe, Sampler, from_dict
from mobilevit.tasks.classification import Classification, ClassificationResults
from mobilevit.tasks.evaluation import evaluate_weights
from mobilevit.training import loop
from mobilevit.training.ema import MovingAverage
from mobilevit.training.loop import TIMES, FinishedError, Run, train
from mobilevit.training.optim import learning_rate
from mobilevit.training.run import read_checkpoint
from mobilevit.weights import Weights, read

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # where there is one core
    pytest.mark.filterwarnings("ignore:This process .*is multi-threaded:DeprecationWarning"),
]
# 12 images for training and 3 for validation: 4 steps an epoch.
RECIPE = Recipe(
    architecture="xxs",
    epochs=2,
    batch_size=3,
    data=Data(size_px=32, eval_resize=1.0, num_workers=0),
    optimizer=Optimizer(lr=1e-3, warmup_steps=1),
)

# Says how much memory there is, so that the task's loss is not asked for to find that out.
AT_ONCE = Compute(micro_batch_size=64)


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


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def seed_of(*numbers: int) -> int:
    """What the chance of a part of a step follows from: seed of the run, epoch, step, number of the part."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def without_speed(epochs: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in epoch.items() if name not in TIMES} for epoch in epochs]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_again_and_with_workers_to_the_bit(first: Run, data: Path, tmp_path: Path, num_workers: int):
    torch.rand(3)  # what was drawn before plays no role
    again = run(replace(RECIPE, data=replace(RECIPE.data, num_workers=num_workers)), data, tmp_path / "new" / "folder")
    assert same(first.weights, again.weights)
    assert without_speed(first.epochs) == without_speed(again.epochs)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_against_a_loop_without_frills(data: Path, tmp_path: Path, dropout: float):
    architecture = replace(XXS, transformer_dropout=dropout, classifier_dropout=dropout)
    model = MobileViT(architecture, num_classes=3)
    initial = Weights(architecture, copy.deepcopy(model.state_dict()), class_names=("circle", "line", "square"))
    done = run(RECIPE, data, tmp_path, pretrained=initial)

    images, _ = Classification().datasets(RECIPE, data)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=RECIPE.optimizer.weight_decay, fused=True)
    model.train()
    losses = []
    for step in range(8):
        rate = learning_rate(RECIPE.optimizer, step, 8, epoch=step // 4, num_epochs=2)
        optimizer.param_groups[0]["lr"] = rate
        batch = EpochBatches(12, sizes_px=(32,), batch_size=3, base_px=32, epoch=step // 4)[step % 4]
        items = [cast(Item, images[pick]) for pick in batch]
        pixels = torch.from_numpy(np.stack([item.pixels for item in items])).permute(0, 3, 1, 2)
        torch.manual_seed(seed_of(RECIPE.seed, step // 4, step % 4, 0))
        logits = model(pixels / 255)
        labels = torch.tensor([item.label for item in items])
        loss = nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert [line["loss"] for line in lines(tmp_path / "steps.jsonl")] == pytest.approx(losses)
    assert [epoch["train_loss"] for epoch in done.epochs] == pytest.approx([sum(losses[:4]) / 4, sum(losses[4:]) / 4])
    for name, x in read(done.weights).tensors.items():  # so short a run saves its last weights
        torch.testing.assert_close(x, model.state_dict()[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("change", [{"seed": 1}, {"label_smoothing": 0.2}, {"batch_size": 4}])
def test_another_recipe_gives_other_weights(first: Run, data: Path, tmp_path: Path, change: dict[str, Any]):
    assert not same(first.weights, run(replace(RECIPE, epochs=1, **change), data, tmp_path).weights)


def test_what_a_run_leaves(first: Run, data: Path):
    out = first.weights.parent
    weights = {f"{name}.safetensors" for name in ("model", "raw", "best")}
    others = {"run.json", "checkpoints", "metrics.jsonl", "steps.jsonl", "report.html", ".lock"}
    assert {file.name for file in out.iterdir()} == weights | others
    assert sorted(file.name for file in (out / "checkpoints").iterdir()) == ["000000004.pt", "000000008.pt"]
    described = json.loads((out / "run.json").read_text())["recipe"]
    assert described["data"].pop("num_workers", None) is None  # may change from start to start
    assert from_dict(described) == replace(RECIPE, data=replace(RECIPE.data, num_workers=Data().num_workers))
    epochs, steps = lines(out / "metrics.jsonl"), lines(out / "steps.jsonl")
    assert epochs == first.epochs
    assert [line["epoch"] for line in epochs] == [1, 2]
    assert [line["step"] for line in epochs] == [4, 8]
    assert [(line["step"], line["epoch"]) for line in steps] == [(i + 1, i // 4 + 1) for i in range(8)]
    assert all(line["size_px"] == 32 and line["images"] == 3 for line in steps)
    for epoch, of_epoch in zip(epochs, (steps[:4], steps[4:]), strict=True):
        assert epoch["train_loss"] == pytest.approx(np.mean([line["loss"] for line in of_epoch]), rel=1e-12)
        assert epoch["images_per_second"] == pytest.approx(12 / epoch["seconds"])
        assert 0 < epoch["waiting_share"] < 1

    for name in weights:
        with safe_open(out / name, framework="pt") as file:
            metadata = json.loads(file.metadata()["mobilevit"])
        assert metadata["class_names"] == ["circle", "line", "square"]
        assert metadata["preprocessing"]["crop_px"] == metadata["preprocessing"]["resize_px"] == 32
        assert from_dict(metadata["training"]["recipe"]) == RECIPE
        if name != "best.safetensors":
            assert [metadata["training"]["metrics"]] == without_speed(epochs[-1:])


@pytest.mark.parametrize(("name", "prefix"), [("model", "val_"), ("raw", "raw_")])
def test_the_saved_model_does_what_the_last_line_says(first: Run, data: Path, name: str, prefix: str):
    file = first.weights.with_name(f"{name}.safetensors")
    metrics = evaluate_weights(read(file), data, batch_size=RECIPE.batch_size).metrics()
    last = first.epochs[-1]
    assert {name: last.get(f"{prefix}{name}", 3) for name in metrics} == metrics
    model = mobilevit.load(file)
    images = sorted((data / "val").rglob("*.png"))
    right = [model.predict(image)[0].class_name == image.parent.name for image in images]
    assert metrics["top1"] == pytest.approx(100 * np.mean(right))


def test_the_optimizer_sees_every_batch_once_at_its_rate(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rates, sizes = [], []
    step, loss = torch.optim.AdamW.step, Classification.loss
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self)))
    monkeypatch.setattr(
        Classification, "loss", lambda self, r, m, batch: (sizes.append(len(batch.labels)), loss(self, r, m, batch))[1]
    )
    optimizer = Optimizer(start_lr=0.0, lr=4e-4, end_lr=0.0, warmup_steps=0)
    run(replace(RECIPE, batch_size=5, optimizer=optimizer, compute=AT_ONCE), data, tmp_path)
    assert sizes == [5, 5, 2] * 2
    assert [line["lr"] for line in lines(tmp_path / "steps.jsonl")] == rates
    cosine = [1.0, (1 + 0.8090169944) / 2, (1 + 0.3090169944) / 2]
    assert rates == pytest.approx([4e-4 * x for x in (*cosine, *(1 - x for x in reversed(cosine)))], abs=1e-12)


@pytest.mark.parametrize(("batch_size", "sizes"), [(8, [8, 4]), (9, [12]), (5, [5, 5, 2]), (11, [12]), (12, [12])])
def test_less_than_half_a_batch_joins_the_one_before(data: Path, tmp_path: Path, batch_size: int, sizes: list[int]):
    run(replace(RECIPE, epochs=1, batch_size=batch_size), data, tmp_path)
    assert [line["images"] for line in lines(tmp_path / "steps.jsonl")] == sizes


def test_several_sizes_in_one_run(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen, loss = [], Classification.loss
    monkeypatch.setattr(
        Classification, "loss", lambda self, r, m, batch: (seen.append(batch.pixels.shape), loss(self, r, m, batch))[1]
    )
    recipe = replace(RECIPE, epochs=6, sampler=Sampler("main", (32, 64)), compute=AT_ONCE)
    done = run(recipe, data, tmp_path)
    assert {shape[2:] for shape in seen} == {(32, 32), (64, 64)}
    assert sum(shape[0] for shape in seen) == 6 * 12
    assert all(epoch["val_num_images"] == 3 for epoch in done.epochs)
    assert read(done.weights).preprocessing.crop_px == 32


@pytest.mark.parametrize("file", ["metrics.jsonl", "model.safetensors", "raw.safetensors"])
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
def test_a_damaged_image_stops_the_run_by_name_and_a_mended_one_goes_on(tmp_path: Path, num_workers: int):
    for name in ("train/a/1", "train/a/2", "train/b/1", "val/a/1", "val/b/1"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((32, 32), 50).save(tmp_path / f"{name}.png")
    recipe = replace(RECIPE, epochs=1, data=replace(RECIPE.data, num_workers=num_workers))
    for split in ("train", "val"):
        file = tmp_path / split / "a" / "1.png"
        whole = file.read_bytes()
        file.write_bytes(whole[:-30])
        with pytest.raises(ImageError, match=f"^{file}: damaged.*same name; or skip .*--max-unreadable"):
            run(recipe, tmp_path, tmp_path / "out")
        file.write_bytes(whole)
    assert len(run(recipe, tmp_path, tmp_path / "out").epochs) == 1


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_before(
    first: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    loss, calls = Classification.loss, []
    images, _ = Classification().datasets(RECIPE, data)
    bad = EpochBatches(12, sizes_px=(32,), batch_size=3, base_px=32, epoch=1)[1]  # not a batch of the first epoch

    def loss_until(self: Classification, recipe: Recipe, model: nn.Module, batch: Batch) -> torch.Tensor:
        calls.append(batch.numbers)
        is_bad = batch.numbers == tuple(pick.number for pick in bad)
        return loss(self, recipe, model, batch) * (float("nan") if is_bad else 1)

    names = ", ".join(images.source[pick.number].name for pick in bad)
    assert names.count(".png") == 3
    said = rf"^the loss is nan at epoch 2, step 6, 32 px, images {re.escape(names)}; try a lower --lr$"
    recipe = replace(RECIPE, compute=AT_ONCE)
    with monkeypatch.context() as patched:
        patched.setattr(Classification, "loss", loss_until)
        for num_calls in (6, 2):  # the same command goes on after the fourth step, and fails where it did
            calls.clear()
            with pytest.raises(ValueError, match=said):
                run(recipe, data, tmp_path)
            assert len(calls) == num_calls
            assert len(lines(tmp_path / "metrics.jsonl")) == 1
            kept = read(tmp_path / "model.safetensors")
            assert kept.training["metrics"]["epoch"] == 1
            metrics = evaluate_weights(kept, data, batch_size=RECIPE.batch_size).metrics()
            assert metrics["loss"] == kept.training["metrics"]["val_loss"]
            assert [file.name for file in (tmp_path / "checkpoints").iterdir()] == ["000000004.pt"]
    assert same(first.weights, run(recipe, data, tmp_path).weights)


@pytest.mark.parametrize("batch_size", [3, 12])  # 12: the first step breaks the network, and none in the epoch sees it
def test_an_absurd_rate_saves_nothing(data: Path, tmp_path: Path, batch_size: int):
    recipe = replace(RECIPE, epochs=1, batch_size=batch_size, optimizer=Optimizer(start_lr=1e30, lr=1e30, end_lr=1e30))
    with pytest.raises(ValueError, match=r"^the (loss|network) is .*; try a lower --lr$"):
        run(recipe, data, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    assert not list((tmp_path / "checkpoints").iterdir())


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


@pytest.mark.parametrize(
    ("class_names", "changes", "said"),
    [
        (("circle", "line", "square"), {}, ["32 px, training uses 32 px\n", "is 1 x that", "from the weights, which"]),
        (
            ("a", "b", "c"),
            {"optimizer": Optimizer(freeze="stage3", backbone_lr_scale=0.1), "data": Data(size_px=64, num_workers=0)},
            [
                "the weights were made for 32 px, training uses 64 px (--size 32 trains at their size)",
                "backbone: frozen up to stage3; its learning rate is 0.1 x that of the head",
                "classifier: new, with random weights, for 3 classes",
            ],
        ),
    ],
)
def test_how_it_starts_from_weights_is_logged(
    first: Run, data: Path, tmp_path: Path, class_names: tuple[str, ...], changes: dict[str, Any], said: list[str]
):
    pretrained, console = replace(read(first.weights), class_names=class_names), io.StringIO()
    recipe = replace(RECIPE, epochs=1, batch_size=12, **changes)
    train(recipe, data, tmp_path, pretrained=pretrained, console=Console(file=console, width=200))
    for words in said:
        assert words in console.getvalue()


def test_names_and_paths_for_what_is_given(first: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A recipe's name, strings for folders, a path for the weights: as the objects that they stand for."""
    recipe = replace(RECIPE, epochs=1)
    monkeypatch.setitem(RECIPES, "few", recipe)
    by_name = run(cast(Any, "few"), cast(Any, str(data)), cast(Any, str(tmp_path / "a")), pretrained=str(first.weights))
    expected = run(recipe, data, tmp_path / "b", pretrained=read(first.weights), device="cpu")
    assert by_name.weights.read_bytes() == expected.weights.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "said"),
    [
        (("smal", "data", "out"), {}, ValueError, r"no recipe 'smal'; did you mean small"),
        (
            ({"epochs": 3}, "data", "out"),
            {},
            TypeError,
            r"recipe is a dict; give the name of a recipe \(plain, .*Recipe",
        ),
        (("tiny", ["data"], "out"), {}, TypeError, "data is a list; give a path as str or pathlib.Path"),
        (("tiny", "data", None), {}, TypeError, "out is a NoneType; give a path"),
        (("tiny", "data", "out"), {"pretrained": nn.Linear(2, 2)}, TypeError, "Linear; give a path.*mobilevit.save"),
        (("tiny", "data", "out"), {"pretrained": "missing.pt"}, ValueError, "missing.pt: no such file"),
        (("tiny", "data", "out"), {"device": "tpu9"}, ValueError, "device 'tpu9' cannot be used here"),
    ],
)
def test_mistakes_in_python(arguments: Any, options: dict[str, Any], error: type[Exception], said: str):
    with pytest.raises(error, match=said):
        train(*arguments, **options)


def test_interrupted_between_steps_by_force(first: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    evaluate, calls = Classification.evaluate, []

    def stop_in_the_second(self: Classification, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Classification, "evaluate", stop_in_the_second)
        with pytest.raises(KeyboardInterrupt):
            run(RECIPE, data, tmp_path)
    assert read(tmp_path / "model.safetensors").training["metrics"]["epoch"] == 1
    again = run(RECIPE, data, tmp_path)
    assert same(first.weights, again.weights)
    assert without_speed(first.epochs) == without_speed(again.epochs)


def test_a_finished_run_and_another_recipes_are_refused(first: Run, data: Path):
    out = first.weights.parent
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match=f"^{out}: this run is finished"):
        run(replace(RECIPE, data=replace(RECIPE.data, num_workers=2)), data, out)
    with pytest.raises(ValueError, match=f"^{out}: holds another run .recipe.seed is 0 there, 1 here"):
        run(replace(RECIPE, seed=1), data, out)
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before


def test_a_finished_run_is_extended_twice(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    decays, said = [], io.StringIO()
    monkeypatch.setattr(
        loop, "MovingAverage", lambda *arguments: (decays.append(arguments[1:]), MovingAverage(*arguments))[1]
    )
    recipe = replace(RECIPE, batch_size=6)  # 2 steps an epoch
    run(recipe, data, tmp_path)
    done = train(replace(recipe, epochs=3), data, tmp_path, extend=True, console=Console(file=said, width=200))
    assert "after epoch 2, where its schedule ends, the run continues at the constant learning rate 0.0002" in (
        said.getvalue()
    )
    assert len(done.epochs) == 3
    run(replace(recipe, epochs=4), data, tmp_path, extend=True)
    assert decays == [(recipe.ema_decay, 4)] * 3  # as short a run as at first
    rates = [line["lr"] for line in lines(tmp_path / "steps.jsonl")]
    assert len(rates) == 8
    assert rates[3:] == pytest.approx([recipe.optimizer.end_lr] * 5)
    facts = json.loads((tmp_path / "run.json").read_text())
    assert (facts["recipe"]["epochs"], facts["schedule_epochs"]) == (4, 2)
    training = read(tmp_path / "model.safetensors").training
    assert (training["recipe"]["epochs"], training["schedule_epochs"]) == (4, 2)
    assert "schedule of 2 epochs, then constant" in (tmp_path / "report.html").read_text()
    with pytest.raises(ValueError, match=f"^{tmp_path}: holds another run .recipe.epochs is 4 there, 2 here"):
        run(recipe, data, tmp_path, extend=True)


def test_what_cannot_be_extended(first: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    longer = replace(RECIPE, epochs=5)
    with pytest.raises(ValueError, match=r"holds another run .recipe.epochs is 2 there, 5 here"):  # nobody asked for it
        run(longer, data, first.weights.parent)
    with pytest.raises(ValueError, match=r"holds another run .recipe.seed is 0 there, 1 here.; "):
        run(replace(longer, seed=1), data, first.weights.parent, extend=True)

    def stop(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(loop, "write_report", stop)  # after the second epoch, whose checkpoint is then missing
        with pytest.raises(KeyboardInterrupt):
            run(RECIPE, data, tmp_path / "half")
    before = {file: file.read_bytes() for file in (tmp_path / "half").rglob("*") if file.is_file()}
    said = rf"^{tmp_path}/half: epochs are 5, .* 1 of 2 epochs, .*--epochs 2, then continue it with --epochs 5"
    with pytest.raises(ValueError, match=said):
        run(longer, data, tmp_path / "half", extend=True)
    assert {file: file.read_bytes() for file in (tmp_path / "half").rglob("*") if file.is_file()} == before

    still = replace(RECIPE, epochs=1, batch_size=12, optimizer=Optimizer(end_lr=0.0))
    run(still, data, tmp_path / "still")
    with pytest.raises(ValueError, match=r"still: optimizer.end_lr is 0, .*name another folder"):
        run(replace(still, epochs=2), data, tmp_path / "still", extend=True)


def test_out_among_the_classes_is_refused(tmp_path: Path):
    for name in ("a/1", "a/2", "b/1", "b/2"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32)).save(tmp_path / f"{name}.png")
    with pytest.raises(ValueError, match="among the class folders"):
        run(RECIPE, tmp_path, tmp_path / "runs")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


# ---------------------------------------------------------------------------------------------------------------------
# Steps in several parts


T1 = Transformer(dim=64, num_layers=1, ffn_dim=64)
# Of every kind of layer one, for what takes long.
SHALLOW = replace(XXS, stages=(*XXS.stages[:2], *(replace(s, transformer=T1) for s in XXS.stages[2:])))


def without_dropout(architecture: Architecture = XXS) -> Weights:
    """Initial weights of a network without chance."""
    architecture = replace(architecture, transformer_dropout=0.0, classifier_dropout=0.0)
    torch.manual_seed(0)
    model = MobileViT(architecture, num_classes=3)
    return Weights(architecture, copy.deepcopy(model.state_dict()), class_names=("circle", "line", "square"))


def pixels_of(images: ImageDataset, picks: list[Pick]) -> tuple[torch.Tensor, torch.Tensor]:
    items = [cast(Item, images[pick]) for pick in picks]
    pixels = torch.from_numpy(np.stack([item.pixels for item in items])).permute(0, 3, 1, 2)
    return pixels / 255, torch.tensor([item.label for item in items])


def test_a_step_in_parts_against_float64(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The gradient is that of the mean over all images, each part normed by itself; statistics move once a step."""
    gradients, states = [], []
    step, update = torch.optim.AdamW.step, MovingAverage.update

    def note_gradients(self: torch.optim.AdamW) -> None:
        gradients.append(
            [p.grad.double() for group in self.param_groups for p in group["params"] if p.grad is not None]
        )
        step(self)

    def note_state(self: MovingAverage, model: nn.Module) -> None:
        states.append({name: x.double() for name, x in model.state_dict().items()})
        update(self, model)

    monkeypatch.setattr(torch.optim.AdamW, "step", note_gradients)
    monkeypatch.setattr(MovingAverage, "update", note_state)
    data_options = replace(RECIPE.data, size_px=64)
    recipe = replace(RECIPE, epochs=1, batch_size=7, data=data_options, compute=Compute(micro_batch_size=3))
    initial, said = without_dropout(), io.StringIO()
    train(recipe, data, tmp_path, pretrained=initial, console=Console(file=said, width=200))
    assert "2 steps in 1 epochs" in said.getvalue()
    assert "at 64 px 7 images a step: 1 process x 3 parts x about 2 images" in said.getvalue()

    images, _ = Classification().datasets(recipe, data)
    batches = EpochBatches(12, sizes_px=(64,), batch_size=7, base_px=64, min_last=3)
    before = {name: x.double() for name, x in initial.tensors.items()}
    lengths = []
    for number, picks in enumerate([batches[0], batches[1]]):
        model = MobileViT(initial.architecture, num_classes=3).double().train()
        model.load_state_dict(before)
        cut = [picks[i :: (3, 2)[number]] for i in range((3, 2)[number])]
        lengths.append([len(part) for part in cut])
        statistics: dict[str, torch.Tensor] = {}
        total = torch.tensor(0.0).double()
        for part in cut:
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = 1.0
            pixels, labels = pixels_of(images, part)
            total += nn.functional.cross_entropy(model(pixels.double()), labels, label_smoothing=0.1, reduction="sum")
            for name, x in model.named_buffers():
                statistics[name] = statistics.get(name, torch.zeros_like(x)) + x.detach().clone()
        loss = total / len(picks)
        loss.backward()
        assert lines(tmp_path / "steps.jsonl")[number]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found = torch.cat([gradient.flatten() for gradient in gradients[number]])
        assert (found - expected).norm() < 1e-3 * expected.norm()
        for name, x in statistics.items():
            if "running" in name:
                mean = x / len(cut)
                moved = 0.9 * before[name] + 0.1 * mean
                torch.testing.assert_close(states[number][name], moved, rtol=1e-4, atol=1e-5, msg=name)
        before = states[number]
    assert lengths == [[3, 2, 2], [3, 2]]


def test_no_image_is_computed_twice_and_none_with_more_than_are_allowed(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen, evaluated, loss, evaluate = [], [], Classification.loss, Classification.evaluate

    def note(self: Classification, recipe: Recipe, model: nn.Module, batch: Batch) -> torch.Tensor:
        seen.append(batch.numbers)
        return loss(self, recipe, model, batch)

    def note_evaluated(self: Classification, model: nn.Module, batches: Iterable[Batch], gather: Any) -> Any:
        kept = list(batches)
        evaluated.extend(len(batch.labels) for batch in kept)
        return evaluate(self, model, kept, gather)

    monkeypatch.setattr(Classification, "loss", note)
    monkeypatch.setattr(Classification, "evaluate", note_evaluated)
    run(replace(RECIPE, epochs=1, batch_size=7, compute=Compute(micro_batch_size=2)), data, tmp_path)
    assert [len(numbers) for numbers in seen] == [3, 2, 2, 3, 2]  # two where possible, and never one alone
    assert sorted(number for numbers in seen for number in numbers) == list(range(12))
    assert evaluated == [2, 1] * 2


# ---------------------------------------------------------------------------------------------------------------------
# How a step is computed


# At 32 px the last norm of three images sees three numbers, and whatever is rounded grows too much to be compared.
STEADY = replace(RECIPE, epochs=1, batch_size=6, data=replace(RECIPE.data, size_px=64), compute=AT_ONCE)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_reduced_precision(data: Path, tmp_path: Path, precision: Precision):
    exact, reduced = (
        run(replace(STEADY, compute=replace(AT_ONCE, precision=p)), data, tmp_path / p, pretrained=weights)
        for p, weights in (("float32", without_dropout()), (precision, without_dropout()))
    )
    # The first loss is computed with the same weights.
    first_losses = [lines(tmp_path / p / "steps.jsonl")[0]["loss"] for p in ("float32", precision)]
    assert first_losses[1] == pytest.approx(first_losses[0], rel=0.02)
    assert first_losses[1] != first_losses[0]
    after = read(reduced.weights).tensors
    assert all(x.isfinite().all() and x.dtype != torch.float16 for x in after.values())
    assert {name: x.dtype for name, x in after.items()} == {n: x.dtype for n, x in read(exact.weights).tensors.items()}


def test_the_scale_of_the_loss_is_kept(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scales: list[float] = []

    class Scaler(torch.amp.GradScaler):
        """Doubles its scale after every three steps, and notes it."""

        def __init__(self, device: str, enabled: bool):
            super().__init__(device, init_scale=2.0, growth_interval=3, enabled=enabled)

        def update(self, new_scale: Any = None) -> None:
            scales.append(self.get_scale())
            super().update(new_scale)

    monkeypatch.setattr(torch.amp, "GradScaler", Scaler)
    recipe = replace(STEADY, epochs=4, compute=replace(AT_ONCE, precision="float16"))
    whole = run(recipe, data, tmp_path / "whole")
    expected = [2.0, 2.0, 2.0, 4.0, 4.0, 4.0, 8.0, 8.0]
    assert scales == expected
    scales.clear()
    with monkeypatch.context() as patched:
        stop_before(patched, 5)  # two steps after the scale was doubled
        with pytest.raises(KeyboardInterrupt):
            run(recipe, data, tmp_path / "again", checkpoint_minutes=1e-9)
    state = read_checkpoint(tmp_path / "again" / "checkpoints" / "000000005.pt")["scaler"]
    assert (state["scale"], state["_growth_tracker"]) == (4.0, 2)
    again = run(recipe, data, tmp_path / "again")
    assert scales == expected
    assert same(whole.weights, again.weights)


def stop_before(patched: pytest.MonkeyPatch, num_losses: int) -> None:
    """Interrupt by force once so many losses have been computed."""
    loss, calls = Classification.loss, []

    def loss_until(self: Classification, *arguments: Any) -> torch.Tensor:
        if len(calls) == num_losses:
            raise KeyboardInterrupt
        calls.append(None)
        return loss(self, *arguments)

    patched.setattr(Classification, "loss", loss_until)


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_a_step_whose_gradient_overflows_is_left_out(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip_norm: float
):
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**60))
    recipe = replace(STEADY, optimizer=replace(RECIPE.optimizer, clip_norm=clip_norm))
    recipe = replace(recipe, compute=replace(AT_ONCE, precision="float16"))
    initial = without_dropout()
    after = read(run(recipe, data, tmp_path, pretrained=initial).weights).tensors
    moved = {name.rpartition(".")[2] for name, x in after.items() if not torch.equal(x, initial.tensors[name])}
    assert moved == {"running_mean", "running_var", "num_batches_tracked"}
    state = read_checkpoint(tmp_path / "checkpoints" / "000000002.pt")
    assert state["scaler"]["scale"] == 2.0**58
    assert all(values["step"] == 0 for values in state["optimizer"]["state"].values())


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_the_gradient_is_clipped_as_the_optimizer_sees_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision
):
    norms: list[float] = []
    step = torch.optim.AdamW.step

    def note(self: torch.optim.AdamW) -> None:
        # The optimizer divides by a scale of the loss that is still in the gradients itself.
        scale = getattr(self, "grad_scale", None)
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([gradient.double().norm() for gradient in gradients]).norm()
        norms.append(float(norm / (1 if scale is None else scale)))
        step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", note)
    found = {}
    for clip_norm in (0.0, 0.25, 1e4):
        norms.clear()
        recipe = replace(STEADY, optimizer=replace(RECIPE.optimizer, clip_norm=clip_norm))
        recipe = replace(recipe, compute=Compute(precision=precision, micro_batch_size=3))
        run(recipe, data, tmp_path / str(clip_norm))
        found[clip_norm] = norms.copy()
    assert min(found[0.0]) > 0.5
    assert found[0.25] == pytest.approx([0.25] * 2, rel=1e-3)
    assert found[1e4][0] == pytest.approx(found[0.0][0], rel=1e-3)


@pytest.mark.slow
def test_compiled_once_for_every_shape(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    graphs: list[tuple[int, ...]] = []  # shapes of what they were compiled for
    trained: list[tuple[tuple[int, ...], int]] = []  # shapes of batches, and how many graphs there were afterwards
    before_training: list[dict[str, torch.Tensor]] = []
    compile_, loss = torch.compile, Classification.loss

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.extend({tuple(x.shape) for x in inputs if x.ndim == 4 and x.shape[2] >= 32 and not x.requires_grad})
        return graph.forward

    def note(self: Classification, recipe: Recipe, model: nn.Module, batch: Batch) -> torch.Tensor:
        is_real = bool(batch.pixels.any())  # not one of the black ones that it is compiled with
        if is_real and not trained:
            assert all(parameter.grad is None for parameter in model.parameters())
            before_training.append(copy.deepcopy(model.state_dict()))
        value = loss(self, recipe, model, batch)
        if is_real:
            trained.append((tuple(batch.pixels.shape), len(graphs)))
        return value

    recipe = replace(RECIPE, epochs=3, batch_size=7, sampler=Sampler("v0.1", (32, 64)))
    initial = without_dropout(SHALLOW)
    plain = run(replace(recipe, compute=Compute(micro_batch_size=4)), data, tmp_path / "plain", pretrained=initial)
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile_(model, backend=backend, **options))
    monkeypatch.setattr(Classification, "loss", note)
    recipe = replace(recipe, compute=Compute(micro_batch_size=4, compile=True))
    out, said = tmp_path / "compiled", io.StringIO()
    done = train(recipe, data, out, pretrained=initial, console=Console(file=said, width=200))

    # At 32 px parts of four and of three, at 64 px of three and of two.
    assert sorted(graphs) == [(2, 3, 64, 64), (3, 3, 32, 32), (3, 3, 64, 64), (4, 3, 32, 32)]
    assert "compiling 4 graphs" in said.getvalue()
    assert {num_graphs for _, num_graphs in trained} == {4}
    shapes = {shape for shape, _ in trained}
    assert shapes & set(graphs)
    assert shapes - set(graphs), "no odd end of an epoch among them"
    for name, x in before_training[0].items():
        assert torch.equal(x, initial.tensors[name.removeprefix("_orig_mod.")]), name
    losses = [[line["loss"] for line in lines(folder / "steps.jsonl")] for folder in (tmp_path / "plain", out)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for name, x in read(plain.weights).tensors.items():
        torch.testing.assert_close(read(done.weights).tensors[name], x, rtol=1e-4, atol=1e-5, msg=name)


# ---------------------------------------------------------------------------------------------------------------------
# What is trained, and how fast


def test_what_is_frozen_stays_to_the_bit(data: Path, tmp_path: Path):
    initial = without_dropout()
    recipe = replace(RECIPE, optimizer=replace(RECIPE.optimizer, freeze="stage2"))
    run(recipe, data, tmp_path, pretrained=initial)
    frozen = tuple(f"backbone.{name}." for name in ("stem", "stage1", "stage2"))
    assert {name.partition(".")[0] for name in initial.tensors if name.startswith(frozen)} == {"backbone"}
    for file in ("model", "raw"):
        after = read(tmp_path / f"{file}.safetensors").tensors
        still = {name for name, x in after.items() if torch.equal(x, initial.tensors[name])}
        assert still == {name for name in after if name.startswith(frozen)}


def test_the_backbone_moves_at_its_share_of_the_rate(data: Path, tmp_path: Path):
    initial = without_dropout()
    optimizer = Optimizer(lr=1e-3, weight_decay=0.0, backbone_lr_scale=0.1)
    run(replace(RECIPE, epochs=1, batch_size=12, optimizer=optimizer), data, tmp_path, pretrained=initial)  # one step
    moves: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for name, x in read(tmp_path / "raw.safetensors").tensors.items():
        if "running" not in name and "num_batches" not in name:
            moves[name.startswith("backbone.")].append((x - initial.tensors[name]).abs().flatten())
    # A first step of Adam is of the length of the rate, whatever the gradient, as long as there is any.
    assert torch.cat(moves[False]).median().item() == pytest.approx(1e-3, rel=0.01)
    assert torch.cat(moves[True]).median().item() == pytest.approx(1e-4, rel=0.01)


@pytest.mark.parametrize(("name", "value"), [("freeze", "stem"), ("backbone_lr_scale", 0.1)])
def test_a_random_backbone_is_not_spared(data: Path, tmp_path: Path, name: str, value: object):
    recipe = replace(RECIPE, optimizer=replace(RECIPE.optimizer, **{name: value}))
    with pytest.raises(
        ValueError, match=rf"optimizer.{name} is {value}, .* begins at random; give weights .*--weights"
    ):
        run(recipe, data, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("decay_all", [True, False])
def test_decay_alone(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decay_all: bool):
    loss = Classification.loss
    monkeypatch.setattr(Classification, "loss", lambda *arguments: 0 * loss(*arguments))
    torch.manual_seed(0)
    initial = without_dropout()
    for name, x in initial.tensors.items():
        if name.endswith("bias"):
            x.normal_()
    optimizer = Optimizer(lr=1e-2, weight_decay=10.0, decay_all=decay_all)
    run(replace(RECIPE, epochs=1, batch_size=12, optimizer=optimizer), data, tmp_path, pretrained=initial)
    for name, x in read(tmp_path / "raw.safetensors").tensors.items():
        if "running" not in name and "num_batches" not in name:
            kept = 0.9 if decay_all or x.ndim > 1 else 1.0
            torch.testing.assert_close(x, kept * initial.tensors[name], rtol=1e-6, atol=0, msg=name)


def test_advanced_augmentation_is_its_own_and_the_same_each_time(first: Run, data: Path, tmp_path: Path):
    recipe = replace(RECIPE, data=replace(RECIPE.data, policy="advanced"))
    runs = [run(recipe, data, tmp_path / str(i)) for i in range(2)]
    assert same(runs[0].weights, runs[1].weights)
    assert not same(runs[0].weights, first.weights)
    assert without_speed(runs[0].epochs) == without_speed(runs[1].epochs)


def test_from_a_thread_that_hears_no_signals(first: Run, data: Path, tmp_path: Path):
    with ThreadPoolExecutor(1) as threads:
        assert same(first.weights, threads.submit(run, RECIPE, data, tmp_path).result().weights)


def test_weights_keep_the_scale_of_their_images(data: Path, tmp_path: Path):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
    initial = without_dropout()
    initial = replace(initial, preprocessing=replace(initial.preprocessing, mean=mean, std=std))
    done = run(replace(RECIPE, data=replace(RECIPE.data, size_px=48)), data, tmp_path, pretrained=initial)
    kept = read(done.weights).preprocessing
    assert (kept.mean, kept.std, kept.crop_px, kept.resize_px) == (mean, std, 48, 48)
    model = mobilevit.load(done.weights)
    losses, right = [], []
    for file in sorted((data / "val").rglob("*.png")):
        predictions = model.predict(file)
        right.append(predictions[0].class_name == file.parent.name)
        losses.append(-next(np.log(p.probability) for p in predictions if p.class_name == file.parent.name))
    assert done.epochs[-1]["val_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert done.epochs[-1]["val_top1"] == pytest.approx(100 * np.mean(right))
    # They do matter: without them the loss is another one.
    assert run(
        replace(RECIPE, data=replace(RECIPE.data, size_px=48)), data, tmp_path / "0", pretrained=without_dropout()
    )
    assert lines(tmp_path / "0" / "steps.jsonl")[0]["loss"] != lines(tmp_path / "steps.jsonl")[0]["loss"]


# ---------------------------------------------------------------------------------------------------------------------
# Images that cannot be read


def damage(data: Path, folder: Path, *names: str) -> Path:
    """A copy of `data` in which some images are cut short."""
    shutil.copytree(data, folder)
    for name in names:
        (folder / name).write_bytes((folder / name).read_bytes()[:-30])
    return folder


def batches_of(recipe: Recipe, data: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Run, list[Batch]]:
    """A run and the batches that it has seen."""
    seen, loss = [], Classification.loss

    def note(self: Classification, recipe: Recipe, model: nn.Module, batch: Batch) -> torch.Tensor:
        seen.append(batch)
        return loss(self, recipe, model, batch)

    with monkeypatch.context() as patched:
        patched.setattr(Classification, "loss", note)
        return run(recipe, data, out), seen


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unreadable_image_is_replaced_by_the_next_of_its_batch(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int
):
    damaged = damage(data, tmp_path / "data", "train/line/1.png")
    options = replace(RECIPE.data, num_workers=num_workers, max_unreadable=1)
    recipe = replace(RECIPE, data=options, compute=AT_ONCE)
    whole, expected = batches_of(recipe, data, tmp_path / "whole", monkeypatch)
    done, seen = batches_of(recipe, damaged, tmp_path / "damaged", monkeypatch)
    assert [epoch["unreadable"] for epoch in whole.epochs] == [0, 0]
    assert [epoch["unreadable"] for epoch in done.epochs] == [1, 1]
    assert len(seen) == len(expected) == 8
    num_replaced = 0
    for ours, theirs in zip(seen, expected, strict=True):
        bad = theirs.numbers.index(5) if 5 in theirs.numbers else None  # line/1.png: the sixth in order
        order = [(i + 1) % 3 if i == bad else i for i in range(3)]
        assert torch.equal(ours.pixels, theirs.pixels[order])
        assert torch.equal(ours.labels, theirs.labels[order])
        assert ours.unreadable == (() if bad is None else (str(damaged / "train/line/1.png"),))
        num_replaced += bad is not None
    assert num_replaced == 2


def test_more_unreadable_images_than_are_allowed(data: Path, tmp_path: Path):
    damaged = damage(data, tmp_path / "data", "train/line/1.png", "train/circle/0.png")
    for limit, said in (
        (0, r"^.*/train/(line/1|circle/0)\.png: damaged"),
        (1, r"^2 images of epoch 1 cannot be read; .* 1; replace .* names, or .*--max-unreadable 2 or more$"),
    ):
        recipe = replace(RECIPE, data=replace(RECIPE.data, max_unreadable=limit))
        with pytest.raises(ImageError, match=said):
            run(recipe, damaged, tmp_path / str(limit))
        assert not list((tmp_path / str(limit) / "checkpoints").iterdir())
    recipe = replace(RECIPE, data=replace(RECIPE.data, max_unreadable=2))
    done = run(recipe, damaged, tmp_path / "2")
    assert [epoch["unreadable"] for epoch in done.epochs] == [2, 2]
    resumed = run(recipe, damaged, tmp_path / "1")  # with a larger limit, the run that was stopped resumes
    assert same(done.weights, resumed.weights)


def test_the_limit_on_unreadable_images_may_change_and_a_removed_file_may_not(data: Path, tmp_path: Path):
    copied = damage(data, tmp_path / "data")
    file = copied / "train/line/1.png"
    whole = file.read_bytes()
    recipe = replace(RECIPE, epochs=1)
    file.write_bytes(whole[:-30])
    with pytest.raises(ImageError):
        run(recipe, copied, tmp_path / "run")
    file.unlink()
    with pytest.raises(ValueError, match=r"another run \(other data\); .*file names.*put removed files back"):
        run(recipe, copied, tmp_path / "run")
    file.write_bytes(whole)
    limits = replace(recipe, data=replace(recipe.data, max_unreadable=5))
    resumed = run(limits, copied, tmp_path / "run")
    assert same(resumed.weights, run(recipe, data, tmp_path / "never stopped").weights)
    # It decides which images are used, where some may be unreadable.
    smaller = replace(recipe, data=replace(recipe.data, max_megapixels=1.0))
    with pytest.raises(ValueError, match=r"another run \(recipe.data.max_megapixels"):
        run(smaller, copied, tmp_path / "run")


def test_a_run_of_a_version_that_compared_the_limits_resumes(data: Path, tmp_path: Path):
    recipe = replace(RECIPE, epochs=1)
    run(recipe, data, tmp_path)
    facts = json.loads((tmp_path / "run.json").read_text())
    facts["recipe"]["data"]["max_unreadable"] = 3
    (tmp_path / "run.json").write_text(json.dumps(facts))
    with pytest.raises(FinishedError):  # and not: another run
        run(recipe, data, tmp_path)


def test_a_batch_larger_than_the_data_is_planned_with_the_images_that_exist(data: Path, tmp_path: Path):
    said = io.StringIO()
    recipe = replace(RECIPE, epochs=1, batch_size=100_000, compute=Compute(micro_batch_size=6))
    done = train(recipe, data, tmp_path / "large", console=Console(file=said, width=200))
    text = said.getvalue()
    assert "batch size 100,000 exceeds the 12 images for training" in text
    assert "--batch-size" in text
    assert "at 32 px 12 images a step: 1 process x 2 parts x 6 images" in text
    fitting = run(replace(recipe, batch_size=12), data, tmp_path / "fitting")
    assert same(done.weights, fitting.weights)


def test_weights_know_their_validation_split_and_how_many_training_images_are_transparent(data: Path, tmp_path: Path):
    copied = damage(data, tmp_path / "data")
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(copied / "train/line/0.png")
    said = io.StringIO()
    done = train(replace(RECIPE, epochs=1), copied, tmp_path / "run", console=Console(file=said, width=200))
    assert "images with transparency: 1; composited on white" in said.getvalue()
    training = read(done.weights).training
    _, val = find_splits(copied, 0.5)
    assert (training["num_transparent"], training["val_data"]) == (1, fingerprint(val))


def test_an_error_leaves_no_workers_behind(data: Path, tmp_path: Path):
    """They ignore SIGTERM, so Python waited for them for ever at its end while someone held on to the error."""
    before = set(multiprocessing.active_children())
    for i, name in enumerate(("train/line/1.png", "val/line/0.png")):
        damaged = damage(data, tmp_path / f"data{i}", name)
        with pytest.raises(ImageError) as caught:
            run(replace(RECIPE, data=replace(RECIPE.data, num_workers=2)), damaged, tmp_path / f"run{i}")
        assert caught.value.__traceback__ is not None
        assert set(multiprocessing.active_children()) <= before


# ---------------------------------------------------------------------------------------------------------------------
# What is kept, and what is told


def test_the_best_epoch_and_the_weights_that_are_not_averaged(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    evaluate, states = Classification.evaluate, []
    hits = iter([1, 0, 3, 0, 3, 0, 2, 0])  # of three images: the average, then the raw weights, after each epoch

    def answer(self: Classification, model: nn.Module, *arguments: Any) -> ClassificationResults:
        states.append(copy.deepcopy(model.state_dict()))
        results = evaluate(self, model, *arguments)
        wrong = np.arange(3) >= next(hits)
        labels = np.where(wrong, (results.predictions[:, 0] + 1) % 3, results.predictions[:, 0])
        return replace(results, labels=labels)

    monkeypatch.setattr(Classification, "evaluate", answer)
    monkeypatch.setattr(loop, "MovingAverage", lambda model, decay, num_steps: MovingAverage(model, 0.9, 10**6))
    done = run(replace(RECIPE, epochs=4), data, tmp_path)
    assert [epoch["val_top1"] for epoch in done.epochs] == pytest.approx([100 / 3, 100, 100, 200 / 3])
    assert [epoch["raw_top1"] for epoch in done.epochs] == [0] * 4
    best, model, raw = (read(tmp_path / f"{name}.safetensors") for name in ("best", "model", "raw"))
    assert [weights.training["metrics"]["epoch"] for weights in (best, model, raw)] == [2, 4, 4]
    for weights, state in ((best, states[2]), (model, states[6]), (raw, states[7])):
        assert all(torch.equal(x, state[name]) for name, x in weights.tensors.items())
    assert not same(tmp_path / "model.safetensors", tmp_path / "raw.safetensors")
    assert not same(tmp_path / "model.safetensors", tmp_path / "best.safetensors")


def test_tensorboard(data: Path, tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = run(RECIPE, data, tmp_path, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in ("loss", "lr"):
        found = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        expected = [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines(tmp_path / "steps.jsonl")]
        assert found == expected
    found = [(event.step, event.value) for event in events.Scalars("epoch/val_loss")]
    assert found == [(epoch["step"], pytest.approx(epoch["val_loss"], rel=1e-6)) for epoch in done.epochs]


def test_without_tensorboard(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ValueError, match=re.escape('pip install "mobilevit[tensorboard]"')):
        run(RECIPE, data, tmp_path, tensorboard=True)
    assert len(run(replace(RECIPE), data, tmp_path).epochs) == 2  # the folder can be used all the same


@pytest.mark.parametrize(("name", "has_transformers"), [("tiny", True), ("detect", False), ("segment", True)])
def test_what_to_do_next_can_be_done(name: str, has_transformers: bool):
    """Every command is one that the command line takes, and none names a format that the task has no network in."""
    commands = [command for _, command in loop._commands(RECIPES[name], "my photos", Path("runs/x"))]
    parsed = [parse(shlex.split(command)[1:]) for command in commands]
    assert [type(one).__name__ for one in parsed] == ["Evaluate", "Predict", "Export", *["Convert"] * has_transformers]
    assert parsed[2].images == ("my photos",)
