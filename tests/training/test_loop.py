"""Short training runs: reproducible, complete on disk, stopped by bad images and non-finite values."""

import copy
import json
import multiprocessing
import re
import shlex
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn

import mobilevit
from mobilevit.cli import parse
from mobilevit.data.loader import Batch, Item
from mobilevit.data.sampler import BatchShapes, EpochBatches
from mobilevit.data.samples import fingerprint
from mobilevit.data.sources import find_splits
from mobilevit.images import ImageError
from mobilevit.models.mobilevit import XXS, MobileViT
from mobilevit.recipes import RECIPES, Compute, Data, Optimizer, Recipe, Sampler, from_dict
from mobilevit.tasks.classification import Classification, ClassificationResults
from mobilevit.tasks.evaluation import evaluate
from mobilevit.training import loop, step
from mobilevit.training.loop import TrainingResult, train
from mobilevit.training.optim import EMA, learning_rate_at
from mobilevit.training.summary import next_commands
from mobilevit.weights import Weights, read
from small_runs import CLASS_NAMES, RECIPE, lines, same_weights, without_dropout, without_times

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # on one core
    pytest.mark.filterwarnings("ignore:This process .*is multi-threaded:DeprecationWarning"),
]
# With a given micro-batch size, the loss is not computed to measure memory.
MICRO_BATCH = Compute(micro_batch_size=64)


def micro_batch_seed(*entropy: int) -> int:
    """Random seed of a micro-batch: from the seed of the run, the epoch, the step, and the index of the micro-batch."""
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_repeated_runs_are_bit_identical_for_any_number_of_workers(
    first: TrainingResult, data: Path, tmp_path: Path, num_workers: int
):
    torch.rand(3)  # the random state before a run has no effect
    again = train(
        replace(RECIPE, data=replace(RECIPE.data, num_workers=num_workers)), data, tmp_path / "new" / "folder"
    )
    assert same_weights(first.weights, again.weights)
    assert without_times(first.epochs) == without_times(again.epochs)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_matches_a_plain_pytorch_loop(data: Path, tmp_path: Path, dropout: float):
    architecture = replace(XXS, transformer_dropout=dropout, classifier_dropout=dropout)
    model = MobileViT(architecture, num_classes=3)
    initial = Weights(architecture, copy.deepcopy(model.state_dict()), class_names=CLASS_NAMES)
    done = train(RECIPE, data, tmp_path, pretrained=initial)

    images, _ = Classification().datasets(RECIPE, data)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=RECIPE.optimizer.weight_decay, fused=True)
    model.train()
    losses = []
    for i in range(8):
        optimizer.param_groups[0]["lr"] = learning_rate_at(RECIPE.optimizer, i, 8, epoch=i // 4, num_epochs=2)
        batch = EpochBatches(12, BatchShapes((32,), 3, 32), epoch=i // 4)[i % 4]
        items = [cast(Item, images[pick]) for pick in batch]
        pixels = torch.from_numpy(np.stack([item.pixels for item in items])).permute(0, 3, 1, 2)
        torch.manual_seed(micro_batch_seed(RECIPE.seed, i // 4, i % 4, 0))
        logits = model(pixels / 255)
        labels = torch.tensor([item.label for item in items])
        loss = nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert [line["loss"] for line in lines(tmp_path / "steps.jsonl")] == pytest.approx(losses)
    assert [epoch["train_loss"] for epoch in done.epochs] == pytest.approx([sum(losses[:4]) / 4, sum(losses[4:]) / 4])
    for name, x in read(done.weights).tensors.items():  # in so short a run the EMA decay is 0
        torch.testing.assert_close(x, model.state_dict()[name], rtol=1e-4, atol=1e-5, msg=name)


def test_contents_of_the_run_folder(first: TrainingResult, data: Path):
    out = first.weights.parent
    weights = {f"{name}.safetensors" for name in ("model", "raw", "best")}
    others = {"run.json", "checkpoints", "metrics.jsonl", "steps.jsonl", "report.html", ".lock"}
    assert {file.name for file in out.iterdir()} == weights | others
    assert sorted(file.name for file in (out / "checkpoints").iterdir()) == ["000000004.pt", "000000008.pt"]
    described = json.loads((out / "run.json").read_text())["recipe"]
    assert described["data"].pop("num_workers", None) is None  # can change on resume
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
        assert 0 < epoch["data_wait_fraction"] < 1

    for name in weights:
        with safe_open(out / name, framework="pt") as file:
            metadata = json.loads(file.metadata()["mobilevit"])
        assert metadata["class_names"] == ["circle", "line", "square"]
        assert metadata["preprocessing"]["crop_px"] == metadata["preprocessing"]["resize_px"] == 32
        assert from_dict(metadata["training"]["recipe"]) == RECIPE
        if name != "best.safetensors":
            assert [metadata["training"]["metrics"]] == without_times(epochs[-1:])


@pytest.mark.parametrize(("name", "prefix"), [("model", "val_"), ("raw", "raw_")])
def test_saved_weights_reproduce_the_logged_metrics(first: TrainingResult, data: Path, name: str, prefix: str):
    file = first.weights.with_name(f"{name}.safetensors")
    metrics = evaluate(read(file), data, batch_size=RECIPE.batch_size).metrics
    last = first.epochs[-1]
    assert {name: last.get(f"{prefix}{name}", 3) for name in metrics} == metrics
    model = mobilevit.load(file)
    images = sorted((data / "val").rglob("*.png"))
    right = [model.predict(image)[0].class_name == image.parent.name for image in images]
    assert metrics["top1"] == pytest.approx(100 * np.mean(right))


@pytest.mark.parametrize(("batch_size", "sizes"), [(8, [8, 4]), (9, [12]), (5, [5, 5, 2]), (11, [12]), (12, [12])])
def test_a_small_last_batch_joins_the_previous_one(data: Path, tmp_path: Path, batch_size: int, sizes: list[int]):
    train(replace(RECIPE, epochs=1, batch_size=batch_size), data, tmp_path)
    assert [line["images"] for line in lines(tmp_path / "steps.jsonl")] == sizes


def test_multi_scale_training(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen, loss = [], Classification.loss
    monkeypatch.setattr(
        Classification, "loss", lambda self, r, m, batch: (seen.append(batch.pixels.shape), loss(self, r, m, batch))[1]
    )
    recipe = replace(RECIPE, epochs=6, sampler=Sampler("main", (32, 64)), compute=MICRO_BATCH)
    done = train(recipe, data, tmp_path)
    assert {shape[2:] for shape in seen} == {(32, 32), (64, 64)}
    assert sum(shape[0] for shape in seen) == 6 * 12
    assert all(epoch["val_num_images"] == 3 for epoch in done.epochs)
    assert read(done.weights).preprocessing.crop_px == 32


def test_unusable_data_create_no_folder(tmp_path: Path):
    (tmp_path / "data").mkdir()
    with pytest.raises(ValueError, match="no class folders"):
        train(RECIPE, tmp_path / "data", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_image_stops_the_run_until_it_is_replaced(tmp_path: Path, num_workers: int):
    for name in ("train/a/1", "train/a/2", "train/b/1", "val/a/1", "val/b/1"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((32, 32), 50).save(tmp_path / f"{name}.png")
    recipe = replace(RECIPE, epochs=1, data=replace(RECIPE.data, num_workers=num_workers))
    for split in ("train", "val"):
        file = tmp_path / split / "a" / "1.png"
        intact = file.read_bytes()
        file.write_bytes(intact[:-30])
        with pytest.raises(ImageError, match=f"^{file}: damaged.*same name; or skip .*--max-unreadable"):
            train(recipe, tmp_path, tmp_path / "out")
        file.write_bytes(intact)
    assert len(train(recipe, tmp_path, tmp_path / "out").epochs) == 1


def test_a_non_finite_loss_stops_the_run_and_can_be_resumed(
    first: TrainingResult, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    loss, calls = Classification.loss, []
    images, _ = Classification().datasets(RECIPE, data)
    bad = EpochBatches(12, BatchShapes((32,), 3, 32), epoch=1)[1]  # not a batch of the first epoch

    def loss_until(self: Classification, recipe: Recipe, model: nn.Module, batch: Batch) -> torch.Tensor:
        calls.append(batch.indices)
        is_bad = batch.indices == tuple(pick.image_index for pick in bad)
        return loss(self, recipe, model, batch) * (float("nan") if is_bad else 1)

    names = ", ".join(images.source[pick.image_index].name for pick in bad)
    assert names.count(".png") == 3
    message = rf"^the loss is nan at epoch 2, step 6, 32 px, images {re.escape(names)}; try a lower --lr$"
    recipe = replace(RECIPE, compute=MICRO_BATCH)
    with monkeypatch.context() as patched:
        patched.setattr(Classification, "loss", loss_until)
        for num_calls in (6, 2):  # the second time it resumes after the fourth step
            calls.clear()
            with pytest.raises(ValueError, match=message):
                train(recipe, data, tmp_path)
            assert len(calls) == num_calls
            assert len(lines(tmp_path / "metrics.jsonl")) == 1
            saved = read(tmp_path / "model.safetensors")
            assert saved.training["metrics"]["epoch"] == 1
            metrics = evaluate(saved, data, batch_size=RECIPE.batch_size).metrics
            assert metrics["loss"] == saved.training["metrics"]["val_loss"]
            assert [file.name for file in (tmp_path / "checkpoints").iterdir()] == ["000000004.pt"]
    assert same_weights(first.weights, train(recipe, data, tmp_path).weights)


@pytest.mark.parametrize("batch_size", [3, 12])  # 12: the epoch has no step after the one that diverges
def test_diverged_weights_are_not_saved(data: Path, tmp_path: Path, batch_size: int):
    recipe = replace(RECIPE, epochs=1, batch_size=batch_size, optimizer=Optimizer(start_lr=1e30, lr=1e30, end_lr=1e30))
    with pytest.raises(ValueError, match=r"^the (loss is|weights are) .*; try a lower --lr$"):
        train(recipe, data, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    assert not list((tmp_path / "checkpoints").iterdir())


# With an infinite variance the logits are finite, but `read` rejects the weights.
@pytest.mark.parametrize("name", ["backbone.stem.conv.weight", "head.norm.running_var"])
def test_diverged_ema_weights_are_not_saved(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    update, calls = EMA.update, []

    def update_until(self: EMA, model: nn.Module) -> None:
        update(self, model)
        calls.append(None)
        if len(calls) == 8:  # the last step of the run
            self.model.state_dict()[name].fill_(float("inf"))

    monkeypatch.setattr(EMA, "update", update_until)
    with pytest.raises(ValueError, match=r"^the weights are not finite after epoch 2; "):
        train(RECIPE, data, tmp_path)
    assert read(tmp_path / "model.safetensors").training["metrics"]["epoch"] == 1


def test_pretrained_weights_of_the_same_classes(first: TrainingResult, data: Path, tmp_path: Path):
    still = replace(RECIPE, epochs=1, seed=5, optimizer=Optimizer(0.0, 1e-30, 0.0, weight_decay=0.0))
    train(still, data, tmp_path, pretrained=read(first.weights))
    before, after = read(first.weights), read(tmp_path / "model.safetensors")
    moved = {n.rpartition(".")[2] for n, x in after.tensors.items() if not torch.equal(x, before.tensors[n])}
    assert moved == {"running_mean", "running_var", "num_batches_tracked"}
    assert asdict(after.preprocessing) == asdict(before.preprocessing)


def test_pretrained_weights_of_other_classes(first: TrainingResult, data: Path, tmp_path: Path):
    pretrained = replace(read(first.weights), class_names=("circle", "square", "triangle"))
    still = replace(RECIPE, epochs=1, seed=5, optimizer=Optimizer(0.0, 1e-30, 0.0, weight_decay=0.0))
    train(still, data, tmp_path, pretrained=pretrained)
    after = read(tmp_path / "model.safetensors")
    moved = {n for n, x in after.tensors.items() if not torch.equal(x, pretrained.tensors[n])}
    moved = {n for n in moved if n.rpartition(".")[2] not in ("running_mean", "running_var", "num_batches_tracked")}
    assert moved == {"classifier.weight", "classifier.bias"}
    assert after.class_names == CLASS_NAMES


@pytest.mark.parametrize(
    ("class_names", "changes", "messages"),
    [
        (CLASS_NAMES, {}, ["32 px, this run uses 32 px\n", "is 1 x that", "from the weights, which"]),
        (
            ("a", "b", "c"),
            {"optimizer": Optimizer(freeze="stage3", backbone_lr_scale=0.1), "data": Data(size_px=64, num_workers=0)},
            [
                "the weights were trained at 32 px, this run uses 64 px (--size 32 trains at their size)",
                "backbone: frozen up to stage3; its learning rate is 0.1 x that of the head",
                "classifier: new, with random weights, for 3 classes",
            ],
        ),
    ],
)
def test_use_of_pretrained_weights_is_logged(
    first: TrainingResult,
    data: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    class_names: tuple[str, ...],
    changes: dict[str, Any],
    messages: list[str],
):
    pretrained = replace(read(first.weights), class_names=class_names)
    recipe = replace(RECIPE, epochs=1, batch_size=12, **changes)
    train(recipe, data, tmp_path, pretrained=pretrained)
    for message in messages:
        assert message in caplog.text


def test_recipe_names_and_string_paths_are_accepted(
    first: TrainingResult, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = replace(RECIPE, epochs=1)
    monkeypatch.setitem(RECIPES, "few", recipe)
    by_name = train(
        cast(Any, "few"), cast(Any, str(data)), cast(Any, str(tmp_path / "a")), pretrained=str(first.weights)
    )
    expected = train(recipe, data, tmp_path / "b", pretrained=read(first.weights), device="cpu")
    assert by_name.weights.read_bytes() == expected.weights.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("smal", "data", "out"), {}, ValueError, r"no recipe 'smal'; did you mean small"),
        (
            ({"epochs": 3}, "data", "out"),
            {},
            TypeError,
            r"recipe is a dict; use the name of a recipe \(plain, .*Recipe",
        ),
        (("tiny", 1, "out"), {}, TypeError, "data is int; use a path"),
        (("tiny", ["data"], "out"), {}, ValueError, "list: has neither class_names nor classes"),
        (("tiny", "data", None), {}, TypeError, "out is a NoneType; use a path"),
        (("tiny", "data", "out"), {"pretrained": nn.Linear(2, 2)}, TypeError, "Linear; .*path.*mobilevit.save"),
        (("tiny", "data", "out"), {"pretrained": "missing.pt"}, ValueError, "missing.pt: no such file"),
        (("tiny", "data", "out"), {"device": "tpu9"}, ValueError, "device 'tpu9' cannot be used here"),
    ],
)
def test_invalid_arguments(arguments: Any, options: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        train(*arguments, **options)


def test_a_finished_run_and_another_recipe_are_rejected(first: TrainingResult, data: Path):
    out = first.weights.parent
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match=f"^{out}: this run has finished"):
        train(replace(RECIPE, data=replace(RECIPE.data, num_workers=2)), data, out)
    with pytest.raises(ValueError, match=f"^{out}: contains another run .recipe.seed was 0, is now 1"):
        train(replace(RECIPE, seed=1), data, out)
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before


def test_a_finished_run_is_extended_twice(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    decays = []
    monkeypatch.setattr(step, "EMA", lambda *arguments: (decays.append(arguments[1:]), EMA(*arguments))[1])
    recipe = replace(RECIPE, batch_size=6)  # 2 steps an epoch
    train(recipe, data, tmp_path)
    done = train(replace(recipe, epochs=3), data, tmp_path, extend=True)
    assert "schedule ends after epoch 2; later epochs use the constant learning rate 0.0002" in caplog.text
    assert len(done.epochs) == 3
    train(replace(recipe, epochs=4), data, tmp_path, extend=True)
    assert decays == [(recipe.ema_decay, 4)] * 3  # that of the original run
    rates = [line["lr"] for line in lines(tmp_path / "steps.jsonl")]
    assert len(rates) == 8
    assert rates[3:] == pytest.approx([recipe.optimizer.end_lr] * 5)
    facts = json.loads((tmp_path / "run.json").read_text())
    assert (facts["recipe"]["epochs"], facts["schedule_epochs"]) == (4, 2)
    training = read(tmp_path / "model.safetensors").training
    assert (training["recipe"]["epochs"], training["schedule_epochs"]) == (4, 2)
    assert "schedule of 2 epochs, then constant" in (tmp_path / "report.html").read_text()
    with pytest.raises(ValueError, match=f"^{tmp_path}: contains another run .recipe.epochs was 4, is now 2"):
        train(recipe, data, tmp_path, extend=True)


def test_runs_that_cannot_be_extended(
    first: TrainingResult, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    longer = replace(RECIPE, epochs=5)
    with pytest.raises(ValueError, match=r"contains another run .recipe.epochs was 2, is now 5.; extend=True"):
        train(longer, data, first.weights.parent)
    with pytest.raises(ValueError, match=r"contains another run .recipe.seed was 0, is now 1.; "):
        train(replace(longer, seed=1), data, first.weights.parent, extend=True)

    def stop(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(loop, "write_report", stop)  # before the checkpoint of the second epoch
        with pytest.raises(KeyboardInterrupt):
            train(RECIPE, data, tmp_path / "half")
    before = {file: file.read_bytes() for file in (tmp_path / "half").rglob("*") if file.is_file()}
    message = rf"^{tmp_path}/half: epochs are 5, .* 1 of the 2 epochs .*--epochs 2, then continue it with --epochs 5"
    with pytest.raises(ValueError, match=message):
        train(longer, data, tmp_path / "half", extend=True)
    assert {file: file.read_bytes() for file in (tmp_path / "half").rglob("*") if file.is_file()} == before

    still = replace(RECIPE, epochs=1, batch_size=12, optimizer=Optimizer(end_lr=0.0))
    train(still, data, tmp_path / "still")
    with pytest.raises(ValueError, match=r"still: optimizer.end_lr is 0, .*choose another folder"):
        train(replace(still, epochs=2), data, tmp_path / "still", extend=True)


def test_out_inside_the_data_folder_is_rejected(tmp_path: Path):
    for name in ("a/1", "a/2", "b/1", "b/2"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32)).save(tmp_path / f"{name}.png")
    with pytest.raises(ValueError, match="read as a class folder"):
        train(RECIPE, tmp_path, tmp_path / "runs")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize(("name", "value"), [("freeze", "stem"), ("backbone_lr_scale", 0.1)])
def test_freezing_a_random_backbone_is_rejected(data: Path, tmp_path: Path, name: str, value: object):
    recipe = replace(RECIPE, optimizer=replace(RECIPE.optimizer, **{name: value}))
    with pytest.raises(ValueError, match=rf"optimizer.{name} is {value}, .* starts from random weights; .*--weights"):
        train(recipe, data, tmp_path)
    assert not list(tmp_path.iterdir())


def test_advanced_augmentation_is_reproducible(first: TrainingResult, data: Path, tmp_path: Path):
    recipe = replace(RECIPE, data=replace(RECIPE.data, policy="advanced"))
    runs = [train(recipe, data, tmp_path / str(i)) for i in range(2)]
    assert same_weights(runs[0].weights, runs[1].weights)
    assert not same_weights(runs[0].weights, first.weights)
    assert without_times(runs[0].epochs) == without_times(runs[1].epochs)


def test_preprocessing_of_pretrained_weights_is_used(data: Path, tmp_path: Path):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
    initial = without_dropout()
    initial = replace(initial, preprocessing=replace(initial.preprocessing, mean=mean, std=std))
    done = train(replace(RECIPE, data=replace(RECIPE.data, size_px=48)), data, tmp_path, pretrained=initial)
    saved = read(done.weights).preprocessing
    assert (saved.mean, saved.std, saved.crop_px, saved.resize_px) == (mean, std, 48, 48)
    model = mobilevit.load(done.weights)
    losses, right = [], []
    for file in sorted((data / "val").rglob("*.png")):
        predictions = model.predict(file)
        right.append(predictions[0].class_name == file.parent.name)
        losses.append(-next(np.log(p.probability) for p in predictions if p.class_name == file.parent.name))
    assert done.epochs[-1]["val_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert done.epochs[-1]["val_top1"] == pytest.approx(100 * np.mean(right))


def copy_damaged(data: Path, folder: Path, *names: str) -> Path:
    """A copy of `data` in which some images are truncated."""
    shutil.copytree(data, folder)
    for name in names:
        (folder / name).write_bytes((folder / name).read_bytes()[:-30])
    return folder


def train_and_record_batches(
    recipe: Recipe, data: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[TrainingResult, list[Batch]]:
    """The result of a run and its batches."""
    seen, loss = [], Classification.loss

    def record(self: Classification, recipe: Recipe, model: nn.Module, batch: Batch) -> torch.Tensor:
        seen.append(batch)
        return loss(self, recipe, model, batch)

    with monkeypatch.context() as patched:
        patched.setattr(Classification, "loss", record)
        return train(recipe, data, out), seen


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unreadable_image_is_replaced_by_the_next_of_its_batch(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int
):
    damaged = copy_damaged(data, tmp_path / "data", "train/line/1.png")
    options = replace(RECIPE.data, num_workers=num_workers, max_unreadable=1)
    recipe = replace(RECIPE, data=options, compute=MICRO_BATCH)
    intact, expected = train_and_record_batches(recipe, data, tmp_path / "intact", monkeypatch)
    done, seen = train_and_record_batches(recipe, damaged, tmp_path / "damaged", monkeypatch)
    assert [epoch["unreadable"] for epoch in intact.epochs] == [0, 0]
    assert [epoch["unreadable"] for epoch in done.epochs] == [1, 1]
    assert len(seen) == len(expected) == 8
    num_replaced = 0
    for ours, theirs in zip(seen, expected, strict=True):
        bad = theirs.indices.index(5) if 5 in theirs.indices else None  # line/1.png: the sixth in order
        order = [(i + 1) % 3 if i == bad else i for i in range(3)]
        assert torch.equal(ours.pixels, theirs.pixels[order])
        assert torch.equal(ours.labels, theirs.labels[order])
        assert ours.unreadable == (() if bad is None else (str(damaged / "train/line/1.png"),))
        num_replaced += bad is not None
    assert num_replaced == 2


def test_more_unreadable_images_than_allowed(data: Path, tmp_path: Path):
    damaged = copy_damaged(data, tmp_path / "data", "train/line/1.png", "train/circle/0.png")
    for limit, message in (
        (0, r"^.*/train/(line/1|circle/0)\.png: damaged"),
        (1, r"^2 images of epoch 1 cannot be read, and max_unreadable is 1; .*--max-unreadable 2 or more$"),
    ):
        recipe = replace(RECIPE, data=replace(RECIPE.data, max_unreadable=limit))
        with pytest.raises(ImageError, match=message):
            train(recipe, damaged, tmp_path / str(limit))
        assert not list((tmp_path / str(limit) / "checkpoints").iterdir())
    recipe = replace(RECIPE, data=replace(RECIPE.data, max_unreadable=2))
    done = train(recipe, damaged, tmp_path / "2")
    assert [epoch["unreadable"] for epoch in done.epochs] == [2, 2]
    resumed = train(recipe, damaged, tmp_path / "1")  # with a larger limit, the run that was stopped resumes
    assert same_weights(done.weights, resumed.weights)


def test_max_unreadable_can_change_on_resume_but_the_files_cannot(data: Path, tmp_path: Path):
    copied = copy_damaged(data, tmp_path / "data")
    file = copied / "train/line/1.png"
    intact = file.read_bytes()
    recipe = replace(RECIPE, epochs=1)
    file.write_bytes(intact[:-30])
    with pytest.raises(ImageError):
        train(recipe, copied, tmp_path / "run")
    file.unlink()
    with pytest.raises(ValueError, match=r"another run \(other data\); .*file names.*restore removed files"):
        train(recipe, copied, tmp_path / "run")
    file.write_bytes(intact)
    limits = replace(recipe, data=replace(recipe.data, max_unreadable=5))
    resumed = train(limits, copied, tmp_path / "run")
    assert same_weights(resumed.weights, train(recipe, data, tmp_path / "uninterrupted").weights)
    # max_megapixels decides which images are used.
    smaller = replace(recipe, data=replace(recipe.data, max_megapixels=1.0))
    with pytest.raises(ValueError, match=r"another run \(recipe.data.max_megapixels"):
        train(smaller, copied, tmp_path / "run")


def test_a_batch_size_larger_than_the_data(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    recipe = replace(RECIPE, epochs=1, batch_size=100_000, compute=Compute(micro_batch_size=6))
    done = train(recipe, data, tmp_path / "large")
    for message in (
        "batch size 100,000 exceeds the 12 training images",
        "--batch-size",
        "a step has 12 images: 1 process x 2 micro-batches x 6 images",
    ):
        assert message in caplog.text
    fitting = train(replace(recipe, batch_size=12), data, tmp_path / "fitting")
    assert same_weights(done.weights, fitting.weights)


def test_weights_record_the_validation_split_and_transparent_images(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    copied = copy_damaged(data, tmp_path / "data")
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(copied / "train/line/0.png")
    done = train(replace(RECIPE, epochs=1), copied, tmp_path / "run")
    assert "images with transparency: 1; composited on white" in caplog.text
    training = read(done.weights).training
    _, val = find_splits("classify", copied, 0.5)
    assert (training["num_transparent"], training["val_data"]) == (1, fingerprint(val))


def test_an_error_stops_the_workers(data: Path, tmp_path: Path):
    """Workers ignore SIGTERM, and Python would wait for them at exit while a reference to the error exists."""
    before = set(multiprocessing.active_children())
    for i, name in enumerate(("train/line/1.png", "val/line/0.png")):
        damaged = copy_damaged(data, tmp_path / f"data{i}", name)
        with pytest.raises(ImageError) as caught:
            train(replace(RECIPE, data=replace(RECIPE.data, num_workers=2)), damaged, tmp_path / f"run{i}")
        assert caught.value.__traceback__ is not None
        assert set(multiprocessing.active_children()) <= before


def test_best_ema_and_raw_weights(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    evaluate, states = Classification.evaluate, []
    # Correct predictions of three, after each epoch: of the EMA weights, then of the raw weights.
    num_correct = iter([1, 0, 3, 0, 3, 0, 2, 0])

    def evaluate_with_errors(self: Classification, model: nn.Module, *arguments: Any) -> ClassificationResults:
        states.append(copy.deepcopy(model.state_dict()))
        results = evaluate(self, model, *arguments)
        wrong = np.arange(3) >= next(num_correct)
        labels = np.where(wrong, (results.predictions[:, 0] + 1) % 3, results.predictions[:, 0])
        return replace(results, labels=labels)

    monkeypatch.setattr(Classification, "evaluate", evaluate_with_errors)
    monkeypatch.setattr(step, "EMA", lambda model, decay, num_steps: EMA(model, 0.9, 10**6))
    done = train(replace(RECIPE, epochs=4), data, tmp_path)
    assert [epoch["val_top1"] for epoch in done.epochs] == pytest.approx([100 / 3, 100, 100, 200 / 3])
    assert [epoch["raw_top1"] for epoch in done.epochs] == [0] * 4
    best, model, raw = (read(tmp_path / f"{name}.safetensors") for name in ("best", "model", "raw"))
    assert [weights.training["metrics"]["epoch"] for weights in (best, model, raw)] == [2, 4, 4]
    for weights, state in ((best, states[2]), (model, states[6]), (raw, states[7])):
        assert all(torch.equal(x, state[name]) for name, x in weights.tensors.items())
    assert not same_weights(tmp_path / "model.safetensors", tmp_path / "raw.safetensors")
    assert not same_weights(tmp_path / "model.safetensors", tmp_path / "best.safetensors")


def test_tensorboard(data: Path, tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = train(RECIPE, data, tmp_path, trackers=("tensorboard",))
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
    with pytest.raises(ValueError, match=re.escape("pip install 'mobilevit[tensorboard]'")):
        train(RECIPE, data, tmp_path, trackers=("tensorboard",))
    assert len(train(RECIPE, data, tmp_path).epochs) == 2  # the folder remains usable


@pytest.mark.parametrize(
    ("name", "has_transformers"),
    [("tiny", True), ("multilabel", True), ("detect", False), ("segment", True), ("distill", True)],
)
def test_commands_in_the_report_are_valid(name: str, has_transformers: bool):
    commands = [command for _, command in next_commands(RECIPES[name], "my photos", Path("runs/x"))]
    parsed = [parse(shlex.split(command)[1:]) for command in commands]
    calibrate = ["Calibrate"] * (name == "tiny")
    names = [
        "Train" if name == "distill" else "Evaluate",
        *calibrate,
        "Predict",
        "Export",
        *["Convert"] * has_transformers,
    ]
    assert [type(one).__name__ for one in parsed] == names
    assert parsed[names.index("Export")].sample_images.images == ("my photos",)
    if name == "distill":
        assert parsed[0].recipe.data.size_px == RECIPES[name].data.size_px
