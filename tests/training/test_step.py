"""Optimizer steps: micro-batches, precision, clipping, compilation, frozen stages, weight decay."""

import copy
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from mobilevit.data.loader import Batch, ImageDataset, Item
from mobilevit.data.sampler import BatchShapes, EpochBatches, Pick
from mobilevit.models.mobilevit import XXS, MobileViT, Transformer
from mobilevit.recipes import Compute, Precision, Recipe, Sampler
from mobilevit.tasks.classification import Classification
from mobilevit.training.loop import train
from mobilevit.training.optim import EMA
from mobilevit.training.run import read_checkpoint
from mobilevit.weights import read
from small_runs import RECIPE, lines, same_weights, without_dropout

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # on one core
    pytest.mark.filterwarnings("ignore:This process .*is multi-threaded:DeprecationWarning"),
]
# With a given micro-batch size, the loss is not computed to measure memory.
MICRO_BATCH = Compute(micro_batch_size=64)
T1 = Transformer(dim=64, num_layers=1, ffn_dim=64)
# One layer of every kind, for slow tests.
SHALLOW = replace(XXS, stages=(*XXS.stages[:2], *(replace(s, transformer=T1) for s in XXS.stages[2:])))
# At 32 px the last batch norm of three images averages three values, and rounding errors grow too large to compare.
STEADY = replace(RECIPE, epochs=1, batch_size=6, data=replace(RECIPE.data, size_px=64), compute=MICRO_BATCH)


def pixels_of(images: ImageDataset, picks: list[Pick]) -> tuple[torch.Tensor, torch.Tensor]:
    items = [cast(Item, images[pick]) for pick in picks]
    pixels = torch.from_numpy(np.stack([item.pixels for item in items])).permute(0, 3, 1, 2)
    return pixels / 255, torch.tensor([item.label for item in items])


def test_micro_batches_match_float64(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Gradients are those of the mean loss over the step; each micro-batch has its own batch norm statistics."""
    gradients, states = [], []
    step, update = torch.optim.AdamW.step, EMA.update

    def record_gradients(self: torch.optim.AdamW) -> None:
        gradients.append(
            [p.grad.double() for group in self.param_groups for p in group["params"] if p.grad is not None]
        )
        step(self)

    def record_state(self: EMA, model: nn.Module) -> None:
        states.append({name: x.double() for name, x in model.state_dict().items()})
        update(self, model)

    monkeypatch.setattr(torch.optim.AdamW, "step", record_gradients)
    monkeypatch.setattr(EMA, "update", record_state)
    data_options = replace(RECIPE.data, size_px=64)
    recipe = replace(RECIPE, epochs=1, batch_size=7, data=data_options, compute=Compute(micro_batch_size=3))
    initial = without_dropout()
    train(recipe, data, tmp_path, pretrained=initial)
    assert "2 steps in 1 epochs" in caplog.text
    assert "at 64 px, a step has 7 images: 1 process x 3 micro-batches x about 2 images" in caplog.text

    images, _ = Classification().datasets(recipe, data)
    batches = EpochBatches(12, BatchShapes((64,), 7, 64), min_last=3)
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


def test_micro_batch_sizes(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen, evaluated, loss, evaluate = [], [], Classification.loss, Classification.evaluate

    def record(self: Classification, recipe: Recipe, model: nn.Module, batch: Batch) -> torch.Tensor:
        seen.append(batch.indices)
        return loss(self, recipe, model, batch)

    def record_evaluated(self: Classification, model: nn.Module, batches: Iterable[Batch], gather: Any) -> Any:
        loaded = list(batches)
        evaluated.extend(len(batch.labels) for batch in loaded)
        return evaluate(self, model, loaded, gather)

    monkeypatch.setattr(Classification, "loss", record)
    monkeypatch.setattr(Classification, "evaluate", record_evaluated)
    train(replace(RECIPE, epochs=1, batch_size=7, compute=Compute(micro_batch_size=2)), data, tmp_path)
    assert [len(indices) for indices in seen] == [3, 2, 2, 3, 2]  # never one image, for batch norm
    assert sorted(index for indices in seen for index in indices) == list(range(12))
    assert evaluated == [2, 1] * 2


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_reduced_precision(data: Path, tmp_path: Path, precision: Precision):
    exact, reduced = (
        train(replace(STEADY, compute=replace(MICRO_BATCH, precision=p)), data, tmp_path / p, pretrained=weights)
        for p, weights in (("float32", without_dropout()), (precision, without_dropout()))
    )
    # The first loss is computed with the same weights.
    first_losses = [lines(tmp_path / p / "steps.jsonl")[0]["loss"] for p in ("float32", precision)]
    assert first_losses[1] == pytest.approx(first_losses[0], rel=0.02)
    assert first_losses[1] != first_losses[0]
    after = read(reduced.weights).tensors
    assert all(x.isfinite().all() and x.dtype != torch.float16 for x in after.values())
    assert {name: x.dtype for name, x in after.items()} == {n: x.dtype for n, x in read(exact.weights).tensors.items()}


def test_the_loss_scale_is_saved_and_resumed(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scales: list[float] = []

    class Scaler(torch.amp.GradScaler):
        """Doubles its scale after every three steps, and records it."""

        def __init__(self, device: str, enabled: bool):
            super().__init__(device, init_scale=2.0, growth_interval=3, enabled=enabled)

        def update(self, new_scale: Any = None) -> None:
            scales.append(self.get_scale())
            super().update(new_scale)

    monkeypatch.setattr(torch.amp, "GradScaler", Scaler)
    recipe = replace(STEADY, epochs=4, compute=replace(MICRO_BATCH, precision="float16"))
    uninterrupted = train(recipe, data, tmp_path / "uninterrupted")
    expected = [2.0, 2.0, 2.0, 4.0, 4.0, 4.0, 8.0, 8.0]
    assert scales == expected
    scales.clear()
    with monkeypatch.context() as patched:
        interrupt_after(patched, 5)  # two steps after the scale was doubled
        with pytest.raises(KeyboardInterrupt):
            train(recipe, data, tmp_path / "again", checkpoint_minutes=1e-9)
    state = read_checkpoint(tmp_path / "again" / "checkpoints" / "000000005.pt")["scaler"]
    assert (state["scale"], state["_growth_tracker"]) == (4.0, 2)
    again = train(recipe, data, tmp_path / "again")
    assert scales == expected
    assert same_weights(uninterrupted.weights, again.weights)


def interrupt_after(patched: pytest.MonkeyPatch, num_losses: int) -> None:
    """Interrupt after a number of losses."""
    loss, calls = Classification.loss, []

    def loss_until(self: Classification, *arguments: Any) -> torch.Tensor:
        if len(calls) == num_losses:
            raise KeyboardInterrupt
        calls.append(None)
        return loss(self, *arguments)

    patched.setattr(Classification, "loss", loss_until)


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_a_step_with_overflowing_gradients_is_skipped(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip_norm: float
):
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**60))
    recipe = replace(STEADY, optimizer=replace(RECIPE.optimizer, clip_norm=clip_norm))
    recipe = replace(recipe, compute=replace(MICRO_BATCH, precision="float16"))
    initial = without_dropout()
    after = read(train(recipe, data, tmp_path, pretrained=initial).weights).tensors
    moved = {name.rpartition(".")[2] for name, x in after.items() if not torch.equal(x, initial.tensors[name])}
    assert moved == {"running_mean", "running_var", "num_batches_tracked"}
    state = read_checkpoint(tmp_path / "checkpoints" / "000000002.pt")
    assert state["scaler"]["scale"] == 2.0**58
    assert all(values["step"] == 0 for values in state["optimizer"]["state"].values())


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_gradient_norm_seen_by_the_optimizer(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision
):
    norms: list[float] = []
    step = torch.optim.AdamW.step

    def record(self: torch.optim.AdamW) -> None:
        # If the gradients still contain the loss scale, the optimizer divides by it.
        scale = getattr(self, "grad_scale", None)
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([gradient.double().norm() for gradient in gradients]).norm()
        norms.append(float(norm / (1 if scale is None else scale)))
        step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    found = {}
    for clip_norm in (0.0, 0.25, 1e4):
        norms.clear()
        recipe = replace(STEADY, optimizer=replace(RECIPE.optimizer, clip_norm=clip_norm))
        recipe = replace(recipe, compute=Compute(precision=precision, micro_batch_size=3))
        train(recipe, data, tmp_path / str(clip_norm))
        found[clip_norm] = norms.copy()
    assert min(found[0.0]) > 0.5
    assert found[0.25] == pytest.approx([0.25] * 2, rel=1e-3)
    assert found[1e4][0] == pytest.approx(found[0.0][0], rel=1e-3)


@pytest.mark.slow
def test_one_graph_per_shape(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    graphs: list[tuple[int, ...]] = []  # shapes they were compiled for
    trained: list[tuple[tuple[int, ...], int]] = []  # shapes of batches, and the number of graphs afterwards
    before_training: list[dict[str, torch.Tensor]] = []
    compile_, loss = torch.compile, Classification.loss

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.extend({tuple(x.shape) for x in inputs if x.ndim == 4 and x.shape[2] >= 32 and not x.requires_grad})
        return graph.forward

    def record(self: Classification, recipe: Recipe, model: nn.Module, batch: Batch) -> torch.Tensor:
        is_real = bool(batch.pixels.any())  # not a blank batch for compilation
        if is_real and not trained:
            assert all(parameter.grad is None for parameter in model.parameters())
            before_training.append(copy.deepcopy(model.state_dict()))
        value = loss(self, recipe, model, batch)
        if is_real:
            trained.append((tuple(batch.pixels.shape), len(graphs)))
        return value

    recipe = replace(RECIPE, epochs=3, batch_size=7, sampler=Sampler("v0.1", (32, 64)))
    initial = without_dropout(SHALLOW)
    plain = train(replace(recipe, compute=Compute(micro_batch_size=4)), data, tmp_path / "plain", pretrained=initial)
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile_(model, backend=backend, **options))
    monkeypatch.setattr(Classification, "loss", record)
    recipe = replace(recipe, compute=Compute(micro_batch_size=4, compile=True))
    out = tmp_path / "compiled"
    done = train(recipe, data, out, pretrained=initial)

    # At 32 px micro-batches of 4 and 3 images, at 64 px of 3 and 2.
    assert sorted(graphs) == [(2, 3, 64, 64), (3, 3, 32, 32), (3, 3, 64, 64), (4, 3, 32, 32)]
    assert "compiling 4 graphs" in caplog.text
    assert {num_graphs for _, num_graphs in trained} == {4}
    shapes = {shape for shape, _ in trained}
    assert shapes & set(graphs)
    assert shapes - set(graphs), "the last batch of an epoch has another shape"
    for name, x in before_training[0].items():
        assert torch.equal(x, initial.tensors[name.removeprefix("_orig_mod.")]), name
    losses = [[line["loss"] for line in lines(folder / "steps.jsonl")] for folder in (tmp_path / "plain", out)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for name, x in read(plain.weights).tensors.items():
        torch.testing.assert_close(read(done.weights).tensors[name], x, rtol=1e-4, atol=1e-5, msg=name)


def test_frozen_stages_do_not_change(data: Path, tmp_path: Path):
    initial = without_dropout()
    recipe = replace(RECIPE, optimizer=replace(RECIPE.optimizer, freeze="stage2"))
    train(recipe, data, tmp_path, pretrained=initial)
    frozen = tuple(f"backbone.{name}." for name in ("stem", "stage1", "stage2"))
    assert {name.partition(".")[0] for name in initial.tensors if name.startswith(frozen)} == {"backbone"}
    for file in ("model", "raw"):
        after = read(tmp_path / f"{file}.safetensors").tensors
        still = {name for name, x in after.items() if torch.equal(x, initial.tensors[name])}
        assert still == {name for name in after if name.startswith(frozen)}
