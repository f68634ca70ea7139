"""Quantization-aware training: what is rounded, what is written, and how it combines with other options."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mobilevit
from mobilevit.models.mobilevit import MobileViT
from mobilevit.models.rounding import RoundedConv2d, RoundedLinear, layers_of, simulate_int8
from mobilevit.recipes import Compute, Data, Optimizer
from mobilevit.tasks.evaluation import evaluate
from mobilevit.training.distillation import Student
from mobilevit.training.loop import TrainingResult, train
from mobilevit.training.run import read_facts
from mobilevit.training.step import trained_network
from mobilevit.weights import read
from small_networks import SMALL, randomize
from small_runs import RECIPE, lines, same_weights, scenes, without_dropout

pytestmark = pytest.mark.filterwarnings("ignore:This process .*is multi-threaded:DeprecationWarning")
AWARE = replace(RECIPE, compute=Compute(quantization_aware=True))


@pytest.fixture(scope="module")
def aware(data: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    return train(AWARE, data, tmp_path_factory.mktemp("aware"))


def test_the_weights_are_ordinary_float_weights(aware: TrainingResult, first: TrainingResult, data: Path):
    ours, theirs = read(aware.weights), read(first.weights)
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert not same_weights(aware.weights, first.weights)
    assert ours.training["recipe"]["compute"]["quantization_aware"] is True
    weight = ours.tensors["backbone.stem.conv.weight"].flatten(1)
    assert len(weight.unique()) > 0.9 * weight.numel()  # not rounded
    assert "quantization_aware" not in read_facts(first.weights.parent)["recipe"]["compute"]
    assert read_facts(aware.weights.parent)["recipe"]["compute"]["quantization_aware"] is True
    # Validation metrics are those of the float weights.
    assert evaluate(aware.weights, data).metrics["loss"] == pytest.approx(aware.epochs[-1]["val_loss"], rel=1e-5)


def test_int8_metrics_are_those_of_a_simulation(aware: TrainingResult, first: TrainingResult, data: Path):
    assert not [name for name in first.epochs[-1] if name.startswith("int8_")]
    assert "in int8, simulated" in (aware.weights.parent / "report.html").read_text()
    assert "in int8, simulated" not in (first.weights.parent / "report.html").read_text()
    record = aware.epochs[-1]
    assert lines(aware.weights.parent / "metrics.jsonl")[-1]["int8_top1"] == record["int8_top1"]
    assert record["int8_loss"] != record["val_loss"]
    assert "int8_num_images" not in record
    model = mobilevit.load(aware.weights)
    pixels = [model.preprocess(file) for file in sorted(data.glob("val/*/*.png"))]
    with torch.no_grad():
        logits = simulate_int8(model, pixels)(torch.cat(pixels))
    loss = nn.functional.cross_entropy(logits, torch.arange(3)).item()
    assert record["int8_loss"] == pytest.approx(loss, rel=1e-3)


def test_the_log_states_the_metric_in_int8(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "mobilevit")
    run = train(replace(AWARE, epochs=1), data, tmp_path)
    assert f"% ({run.epochs[-1]['int8_top1']:.2f} % in int8)" in caplog.text


def test_without_the_option_the_network_itself_is_trained():
    model = randomize(MobileViT(SMALL, num_classes=3))
    assert trained_network(model, RECIPE) is model


def test_the_projection_of_a_student_is_not_rounded():
    student = Student(MobileViT(SMALL, num_classes=3), num_features=5)
    network = trained_network(student, AWARE)
    layers = layers_of(network)
    assert type(layers.pop("projection")) is nn.Linear
    assert {type(layer) for layer in layers.values()} == {RoundedConv2d, RoundedLinear}
    assert {type(layer) for layer in layers_of(student).values()} == {nn.Conv2d, nn.Linear}


def test_frozen_stages_are_rounded_and_do_not_change(data: Path, tmp_path: Path):
    initial = without_dropout()
    recipe = replace(AWARE, epochs=1, optimizer=replace(AWARE.optimizer, freeze="stage3"))
    trained = read(train(recipe, data, tmp_path, pretrained=initial).weights).tensors
    frozen = [name for name in initial.tensors if name.startswith(("backbone.stem.", "backbone.stage3."))]
    assert all(torch.equal(trained[name], initial.tensors[name]) for name in frozen)
    assert not torch.equal(trained["classifier.weight"], initial.tensors["classifier.weight"])


def test_a_device_without_the_operators():
    model = MobileViT(SMALL, num_classes=3).to("meta")
    with pytest.raises(ValueError, match=r"compute.quantization_aware is True.* not on meta; .*--device cpu"):
        trained_network(model, AWARE)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision(data: Path, tmp_path: Path, precision: Any):
    recipe = replace(AWARE, compute=replace(AWARE.compute, precision=precision))
    assert train(recipe, data, tmp_path).epochs[-1]["train_loss"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("task", "metric"), [("detect", "ap"), ("segment", "miou")])
def test_boxes_and_masks(task: Any, metric: str, tmp_path: Path):
    recipe = replace(AWARE, task=task, data=Data(size_px=64, num_workers=0), optimizer=Optimizer(warmup_steps=1))
    run = train(recipe, scenes(tmp_path / "data", task), tmp_path / "run")
    assert f"int8_{metric}" in run.epochs[-1]
    keys = read(run.weights).tensors.keys()
    assert keys == read(run.weights.with_name("raw.safetensors")).build().state_dict().keys()
