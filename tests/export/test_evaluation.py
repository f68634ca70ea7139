"""Metrics of artifacts in their runtimes, compared with those of the same weights in torch."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from command_line import check_refused, run
from mobilevit.data.corruptions import Corruption
from mobilevit.export import ExportOptions, export, installed
from mobilevit.export.evaluation import evaluate_artifact
from mobilevit.export.verify import synthetic_images
from mobilevit.models.deeplabv3 import DeepLabHead, DeepLabV3
from mobilevit.models.mobilevit import XXS, MobileViT
from mobilevit.models.ssdlite import SSDLite
from mobilevit.tasks.evaluation import EvaluationOptions, evaluate
from mobilevit.weights import PREPROCESSING, Calibration, TaskName, Weights, write
from small_networks import randomize
from small_runs import scenes

slow = partial(pytest.param, marks=pytest.mark.slow)
COLORS = ("green", "red")


def weights_of(task: TaskName, **values: Any) -> Weights:
    """XXS with random weights for the classes green and red."""
    networks = {"detect": SSDLite, "segment": partial(DeepLabV3, head=DeepLabHead(channels=16))}
    names = {"detect": ("red", "green"), "segment": ("nothing", "red", "green")}.get(task, COLORS)
    model = randomize(networks.get(task, MobileViT)(XXS, num_classes=len(names)))
    preprocessing = PREPROCESSING[task].at_size(64)
    head = {"head": DeepLabHead(channels=16)} if task == "segment" else {}
    return Weights(XXS, model.state_dict(), preprocessing, names, task=task, **head, **values)


def photos(folder: Path) -> Path:
    """11 images: class folders green and red; labels.csv has two labels for some images."""
    rows = ["path,labels"]
    for i, pixels in enumerate(synthetic_images(11, (70, 90))):
        path = folder / COLORS[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        rows.append(f"{path.relative_to(folder)},{'green red' if i % 3 == 0 else COLORS[i % 2]}")
    (folder / "labels.csv").write_text("\n".join(rows))
    return folder


def exported(weights: Weights, backend: str, folder: Path, **options: Any) -> Path:
    if not installed(backend):
        pytest.skip(f"{backend} is not installed")
    images = synthetic_images(4, (80, 90))
    [artifact] = export(weights, [backend], folder, ExportOptions(num_threads=1, **options), images=images)
    return artifact.path


@pytest.mark.parametrize(
    ("task", "backend", "options"),
    [
        ("classify", "onnx", {"uint8": True, "batch_size": 3}),
        ("multilabel", "openvino", {}),
        ("detect", "onnx", {}),
        ("segment", "onnx", {}),
        slow("classify", "executorch", {}),
        slow("detect", "openvino", {"postprocess": True}),
        slow("classify", "litert", {}),
    ],
)
def test_metrics_of_torch(task: TaskName, backend: str, options: dict[str, Any], tmp_path: Path):
    if task in ("detect", "segment"):
        data = scenes(tmp_path / "data", task)
    else:
        data = photos(tmp_path / "data")
        data = data / "labels.csv" if task == "multilabel" else data
    values: dict[str, Any] = {"calibration": Calibration(2.0)} if task == "classify" else {}
    weights = weights_of(task, **values)
    expected = evaluate(weights, data)
    found = evaluate_artifact(exported(weights, backend, tmp_path, **options), data)
    assert (found.split, found.size_px) == (expected.split, 64)
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-3, abs=1e-3)
    assert [row.as_dict() for row in found.per_class] == [
        pytest.approx(row.as_dict(), rel=1e-3, abs=1e-3) for row in expected.per_class
    ]
    assert expected.metrics[expected.results.main_metric] > 0


def test_other_sizes_corruptions_and_images_of_another_source(tmp_path: Path):
    weights, data = weights_of("classify"), photos(tmp_path / "data")
    path = exported(weights, "onnx", tmp_path, dynamic_size=True, size=(96,))
    (tmp_path / "other").mkdir()
    for i, pixels in enumerate(synthetic_images(5, (80, 64), seed=7)):
        Image.fromarray(pixels).save(tmp_path / f"other/{i}.png")
    for size_px, corruption in ((96, None), (70, None), (70, Corruption("fog", 3))):
        options = {"corruption": corruption, "ood": None if corruption else tmp_path / "other"}
        expected = evaluate(weights, data, size_px=size_px, **options)
        found = evaluate_artifact(path, data, size_px=size_px, options=EvaluationOptions(**options))
        assert found.size_px == size_px
        assert found.metrics == pytest.approx(expected.metrics, rel=1e-3, abs=1e-3)
    assert evaluate_artifact(path, data).size_px == 96


def test_the_validation_split_of_the_training_run(tmp_path: Path):
    """The artifact contains what is needed to find it again."""
    data = photos(tmp_path / "data")
    training = {"recipe": {"data": {"val_fraction": 0.3}}}
    weights = weights_of("classify", training=training)
    val = evaluate(weights, data, split="val")
    found = evaluate_artifact(exported(weights, "onnx", tmp_path), data, options=EvaluationOptions(split="val"))
    assert found.metrics == pytest.approx(val.metrics, rel=1e-3, abs=1e-3)
    assert 0 < found.metrics["num_images"] < 11


def test_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    data = photos(tmp_path / "data")
    weights = weights_of("classify")
    write(weights, tmp_path / "w.safetensors")
    path = exported(weights, "onnx", tmp_path)
    assert run(f"evaluate w.safetensors {path.name} --data data --num-workers 0 --json --device cpu") == 0
    ours, theirs = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (ours.pop("weights"), theirs.pop("weights")) == ("w.safetensors", path.name)
    assert (ours.pop("split"), theirs.pop("split")) == ("all", "all")
    assert theirs == pytest.approx(ours, rel=1e-3, abs=1e-3)
    assert run(f"evaluate {path.name} --data data --num-workers 0") == 0
    assert f"{theirs['top1']:.2f}" in capsys.readouterr().out

    wide = exported(weights, "onnx", tmp_path, size=(64, 96)).name
    other = onnx.load(path)
    del other.metadata_props[:]
    onnx.save(other, tmp_path / "other.onnx")
    Path("text.onnx").write_text("no model")
    command = "evaluate {} --data data --num-workers 0"
    for args, facts in {
        f"{path.name} --knn --k 1": f"{path.name} --knn features weights",
        f"{path.name} --device cuda": "--device cuda CPU leave out",
        f"{path.name} --size 96": f"--size 96 {path.name} 64 x leave out --size",
        wide: f"{wide} 64 x 96 square --size 96",
        "other.onnx": "other.onnx 'task' export",
        "text.onnx": "text.onnx not an ONNX model",
        "nothere.onnx": "nothere.onnx no such file",
    }.items():
        check_refused(capsys, command.format(args), facts)
    assert np.isfinite(theirs["loss"])
    write(replace(weights, class_names=()), tmp_path / "unnamed.safetensors")
    unnamed = exported(replace(weights, class_names=()), "onnx", tmp_path / "unnamed")
    check_refused(capsys, command.format(unnamed), "no class names")
