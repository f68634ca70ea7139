"""Knowledge distillation: its losses, runs with a teacher, and bad input."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import softmax
from torch import Tensor, nn

from mobilevit.data.class_sets import ClassSet
from mobilevit.data.loader import Batch
from mobilevit.models.deeplabv3 import DeepLabV3
from mobilevit.models.mobilevit import MobileViT
from mobilevit.models.ssdlite import SSDLite
from mobilevit.recipes import Compute, Data, Distill, Recipe
from mobilevit.tasks import TASKS
from mobilevit.tasks.multilabel import stack_class_sets
from mobilevit.teacher import Teacher, TeacherNetwork
from mobilevit.training.distillation import DistillationLoss, Student, soft_target_loss
from mobilevit.training.loop import Stopped, train
from mobilevit.training.step import TrainStep
from mobilevit.weights import Weights, read, write
from small_networks import SMALL, randomize
from small_runs import CLASS_NAMES, RECIPE, lines, same_weights, scenes, without_dropout, without_times

pytestmark = pytest.mark.filterwarnings("ignore:This process .*is multi-threaded:DeprecationWarning")
DISTILL = replace(RECIPE, distill=Distill(soft_weight=0.7, temperature=3.0, feature_weight=0.5))
UNLABELED = replace(
    RECIPE, task="distill", data=replace(RECIPE.data, crops_per_image=2), distill=Distill(1.0, feature_weight=1.0)
)


class Linear(nn.Module):
    """A classifier of mean colors that records its inputs."""

    def __init__(self, num_classes: int = 3):
        super().__init__()
        torch.manual_seed(1)
        self.classifier = nn.Linear(3, num_classes)
        self.inputs: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.inputs.append(images)
        return self.classifier(4 * images.mean(dim=(-2, -1)))


def teacher_network(num_classes: int = 3) -> TeacherNetwork:
    names = (*reversed(CLASS_NAMES), "other")[:num_classes]
    return TeacherNetwork(Linear(num_classes), "linear", names, mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 1.0))


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a MobileViT with the classes of the data."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    model = randomize(MobileViT(SMALL, num_classes=3))
    write(Weights(SMALL, model.state_dict(), class_names=CLASS_NAMES), path)
    return path


def test_soft_targets():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(5, 7)), 3 * rng.normal(size=(5, 7))
    p, q = softmax(teacher / 2.5, 1), softmax(student / 2.5, 1)
    expected = 2.5**2 * (p * np.log(p / q)).sum(1).mean()
    assert float(soft_target_loss(torch.tensor(student), torch.tensor(teacher), 2.5)) == pytest.approx(expected)
    assert float(soft_target_loss(torch.tensor(student), torch.tensor(student), 2.5)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("policy", ["basic", "advanced"])
def test_loss_with_labels(policy: Any):
    """The teacher sees the images of the student at its own size and normalization; classes are matched by name."""
    recipe = replace(DISTILL, data=replace(RECIPE.data, policy=policy), distill=replace(DISTILL.distill, size_px=48))
    teacher = Teacher(teacher_network(4), size_px=48)
    loss = DistillationLoss(recipe, TASKS["classify"], teacher, CLASS_NAMES)
    weights = without_dropout()
    student = Student(weights.build(), teacher.num_features)
    batch = Batch(torch.rand(4, 3, 48, 48), torch.tensor([0, 2, 1, 0]), (0, 1, 2, 3), size_px=32)

    class At32Px(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return student(F.interpolate(images, (32, 32), mode="bilinear", antialias=True))[0]

    torch.manual_seed(5)
    value = loss(student, batch)
    spy = teacher.network
    assert isinstance(spy, Linear)
    seen = spy.inputs[-1] * torch.tensor([0.25, 0.5, 1.0])[:, None, None] + 0.5
    if policy == "basic":
        torch.testing.assert_close(seen, batch.pixels)
    else:
        assert not torch.allclose(seen, batch.pixels)  # mixed
    with torch.no_grad():
        small = F.interpolate(seen, (32, 32), mode="bilinear", antialias=True)
        logits, features = student(small)
        teacher_features = 4 * spy.inputs[-1].mean(dim=(-2, -1))
        teacher_logits = teacher.classifier(teacher_features)[:, [2, 1, 0]]
        soft = soft_target_loss(logits, teacher_logits, 3.0)
        cosine = F.cosine_similarity(features, teacher_features).mean()
        torch.manual_seed(5)
        label = TASKS["classify"].loss(recipe, At32Px(), batch)
    assert value.item() == pytest.approx(float(0.3 * label + 0.7 * soft + 0.5 * (1 - cosine)), rel=1e-5)
    value.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())


@pytest.mark.parametrize("policy", ["basic", "advanced"])
def test_features_with_several_labels(policy: Any):
    """The loss of the labels, and the distance of the features for the images that both networks saw."""
    data, distill = replace(RECIPE.data, policy=policy), Distill(0.0, feature_weight=0.5)
    recipe = replace(RECIPE, task="multilabel", data=data, distill=distill)
    teacher = Teacher(teacher_network())
    loss = DistillationLoss(recipe, TASKS["multilabel"], teacher, ("x", "y", "z"))  # the classes do not matter
    student = Student(without_dropout().build(), teacher.num_features)
    labels = stack_class_sets([ClassSet(indices) for indices in ((0, 2), (), (1,), (0, 1, 2))])
    batch = Batch(torch.rand(4, 3, 32, 32), labels, (0, 1, 2, 3), size_px=32)

    class Network(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return student(images)[0]

    torch.manual_seed(5)
    value = loss(student, batch)
    spy = teacher.network
    assert isinstance(spy, Linear)
    with torch.no_grad():
        _, features = student(spy.inputs[-1] * torch.tensor([0.25, 0.5, 1.0])[:, None, None] + 0.5)
        cosine = F.cosine_similarity(features, 4 * spy.inputs[-1].mean(dim=(-2, -1))).mean()
        torch.manual_seed(5)
        label = TASKS["multilabel"].loss(recipe, Network(), batch)
    assert value.item() == pytest.approx(float(label + 0.5 * (1 - cosine)), rel=1e-5)


def test_training_with_several_labels_and_a_teacher(data: Path, teacher_file: Path, tmp_path: Path):
    shutil.copytree(data, tmp_path / "data")
    images = [path.relative_to(data) for path in sorted(data.rglob("*.png"))]
    rows = [f"{path.as_posix()},{path.parts[1]}|shape,{path.parts[0]}" for path in images]
    file = tmp_path / "data" / "labels.csv"
    file.write_text("\n".join(["path,labels,split", *rows]) + "\n")
    recipe = replace(RECIPE, task="multilabel", distill=Distill(0.0, feature_weight=1.0))
    run = train(recipe, file, tmp_path / "with", teacher=teacher_file)
    without = train(replace(recipe, distill=Distill()), file, tmp_path / "without")
    assert not same_weights(run.weights, without.weights)
    assert 0 < run.epochs[-1]["teacher_fraction"] < 1
    weights = read(run.weights)
    assert (weights.task, weights.class_names, len(weights.thresholds)) == (
        "multilabel",
        (*sorted((*CLASS_NAMES, "shape")),),
        4,
    )
    assert weights.tensors.keys() == read(without.weights).tensors.keys()  # no projection


@pytest.mark.parametrize("network_class", [SSDLite, DeepLabV3, MobileViT])
@pytest.mark.parametrize("size", [(64, 64), (75, 90)])
def test_a_student_computes_the_outputs_of_its_network(network_class: Any, size: tuple[int, int]):
    network = randomize(network_class("xxs", num_classes=3))
    student, images = Student(network, 5), torch.rand(2, 3, *size)
    outputs, features = student(images)
    assert features is not None
    assert features.shape == (2, 5)
    expected = network(images)
    for ours, theirs in zip(*((x,) if isinstance(x, Tensor) else x for x in (outputs, expected)), strict=True):
        assert torch.equal(ours, theirs)
    assert Student(network, 0)(images)[1] is None


def test_training_with_a_teacher(data: Path, teacher_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """The teacher changes the result; the weights have no projection; the log names the teacher."""
    without, distilled = (
        train(RECIPE, data, tmp_path / "without"),
        train(DISTILL, data, tmp_path / "with", teacher=teacher_file),
    )
    assert not same_weights(without.weights, distilled.weights)
    assert read(distilled.weights).tensors.keys() == read(without.weights).tensors.keys()
    assert 0 < distilled.epochs[-1]["teacher_fraction"] < 1
    assert "teacher_fraction" not in without.epochs[-1]
    assert f"teacher {teacher_file}: 3 classes" in caplog.text


def test_a_larger_teacher_and_frozen_stages(data: Path, teacher_file: Path, tmp_path: Path):
    """The teacher sees larger crops; frozen stages keep the pretrained weights."""
    pretrained = without_dropout()
    optimizer = replace(RECIPE.optimizer, freeze="stage2")
    recipe = replace(DISTILL, optimizer=optimizer, distill=replace(DISTILL.distill, size_px=64))
    run = train(recipe, data, tmp_path / "run", pretrained=pretrained, teacher=teacher_file)
    small = train(
        replace(recipe, distill=DISTILL.distill), data, tmp_path / "s", pretrained=pretrained, teacher=teacher_file
    )
    assert not same_weights(run.weights, small.weights)
    tensors = read(run.weights).tensors
    frozen = ("backbone.stem", "backbone.stage1", "backbone.stage2")
    changed = {key for key, tensor in pretrained.tensors.items() if not torch.equal(tensor, tensors[key])}
    assert not [key for key in changed if key.startswith(frozen)]
    assert [key for key in changed if key.startswith("backbone.stage3")]


@pytest.mark.parametrize("size_px", [0, 48])
def test_compiled_graphs_are_used(data: Path, tmp_path: Path, size_px: int, monkeypatch: pytest.MonkeyPatch):
    """Every full batch has the shape of a compiled graph, also if the teacher's images are larger."""
    seen: list[tuple[torch.Size, int]] = []
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    accumulate = TrainStep.accumulate

    def spy(step: TrainStep, micro_batch: Any, batch: Batch, epoch: int) -> bool:
        seen.append((batch.pixels.shape, batch.size_px))
        assert seen[-1] in step.compiled_shapes
        return accumulate(step, micro_batch, batch, epoch)

    monkeypatch.setattr(TrainStep, "accumulate", spy)
    recipe = replace(
        DISTILL, epochs=1, compute=Compute(compile=True), distill=replace(DISTILL.distill, size_px=size_px)
    )
    run = train(recipe, data, tmp_path / "run", teacher=teacher_network())
    assert {shape[-1] for shape, _ in seen} == {max(32, size_px)}
    assert {size for _, size in seen} == {32}
    assert 0 < run.epochs[0]["teacher_fraction"] < 1


def test_resume_is_exact(data: Path, teacher_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def stop(step: int) -> None:
        """Send SIGTERM in a forward pass of the teacher."""
        run_teacher, calls = Teacher.forward, [0]

        def forward(teacher: Teacher, images: Tensor) -> tuple[Tensor, Tensor]:
            calls[0] += 1
            if calls[0] == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return run_teacher(teacher, images)

        monkeypatch.setattr(Teacher, "forward", forward)

    recipe = replace(DISTILL, data=replace(RECIPE.data, policy="advanced"))
    whole = train(recipe, data, tmp_path / "whole", teacher=teacher_file)
    with monkeypatch.context():
        stop(5)
        with pytest.raises(Stopped):
            train(recipe, data, tmp_path / "stopped", teacher=teacher_file)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="teacher"):
        train(recipe, data, tmp_path / "stopped", teacher=teacher_network())
    resumed = train(recipe, data, tmp_path / "stopped", teacher=teacher_file)
    assert 0 < len(lines(tmp_path / "stopped" / "steps.jsonl")) == len(lines(tmp_path / "whole" / "steps.jsonl"))
    for name in ("model", "raw", "best"):
        assert same_weights(whole.weights.with_stem(name), resumed.weights.with_stem(name))
    assert without_times(whole.epochs) == without_times(resumed.epochs)


@pytest.mark.slow
def test_two_processes_match_one(data: Path, teacher_file: Path, tmp_path: Path):
    options = ["--data", str(data), "--teacher", str(teacher_file), "--device", "cpu", "--num-threads", "1"]
    options += ["--epochs", "3", "--batch-size", "12", "--compute.micro-batch-size", "6"]
    options += ["--distill.feature-weight", "1", "--no-flip"]
    one = [sys.executable, "-m"]
    two = [*one, "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    for command, name in ((one, "one"), (two, "two")):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        command = [*command, "mobilevit", "train", "tiny", *options, "--out", str(tmp_path / name)]
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=180)
    ours, theirs = (lines(tmp_path / name / "steps.jsonl") for name in ("one", "two"))
    assert [line["loss"] for line in theirs] == pytest.approx([line["loss"] for line in ours], rel=1e-5)


def test_training_without_labels(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    images = data / "train"
    run = train(UNLABELED, images, tmp_path / "run", teacher=teacher_network(4))
    assert "2 of 12 images are used for validation" in caplog.text
    assert {"agreement", "agreement5", "kl", "num_images"} <= {name.removeprefix("val_") for name in run.epochs[-1]}
    assert run.main_metric == "agreement"
    assert run.epochs[-1]["val_num_images"] == 2
    weights = read(run.weights)
    assert (weights.task, weights.class_names) == ("classify", (*reversed(CLASS_NAMES), "other"))
    assert all(line["images"] <= 3 for line in lines(tmp_path / "run" / "steps.jsonl"))
    assert sum(line["images"] for line in lines(tmp_path / "run" / "steps.jsonl")) == 2 * 2 * 10
    report = (tmp_path / "run" / "report.html").read_text()
    assert "Agreement with the teacher" in report
    assert "In the teacher" in report
    assert "4 classes, " in report
    assert "at the input size of the student" in report
    finetuned = train(RECIPE, data, tmp_path / "finetuned", pretrained=run.weights)
    assert finetuned.main_metric == "top1"


def test_a_student_agrees_with_itself(teacher_file: Path, data: Path):
    from mobilevit.data.loader import load
    from mobilevit.data.sampler import eval_batches
    from mobilevit.tasks.distillation import Distillation
    from mobilevit.teacher import read_teacher

    task = Distillation(Teacher(read_teacher(teacher_file)))
    _, val_set = task.datasets(replace(UNLABELED, data=replace(UNLABELED.data, val_fraction=0.9)), data / "train")
    batches = eval_batches(len(val_set), batch_size=4, size_px=32)
    preprocessing = read(teacher_file).preprocessing
    loader = list(load(val_set, batches, num_workers=0, device="cpu", preprocessing=preprocessing))
    results = task.evaluate(read(teacher_file).build(), loader)
    metrics = results.metrics()
    assert (metrics["agreement"], metrics["agreement5"], metrics["num_images"]) == (100, 100, len(val_set))
    assert metrics["kl"] == pytest.approx(0, abs=1e-6)
    assert results.disagreements(5) == []
    assert len(results.agreements(3)) == 3
    assert len(task._targets) == len(val_set)
    task.teacher.forward = pytest.fail  # pyright: ignore[reportAttributeAccessIssue] -- its outputs are known now
    again = task.evaluate(read(teacher_file).build(), loader)
    np.testing.assert_array_equal(again.divergences, results.divergences)


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_features_of_dense_tasks(task: Any, tmp_path: Path, teacher_file: Path):
    recipe = replace(
        RECIPE,
        task=task,
        epochs=1,
        batch_size=4,
        data=Data(size_px=64, num_workers=0),
        distill=Distill(0, feature_weight=1),
    )
    folder = scenes(tmp_path, task) or tmp_path
    run = train(recipe, folder, tmp_path.with_name(f"run_{task}"), teacher=teacher_file)
    assert 0 < run.epochs[-1]["teacher_fraction"] < 1
    with pytest.raises(ValueError, match=rf"soft_weight is 0\.5.*{task}.*must be 0"):
        train(replace(recipe, distill=Distill()), folder, tmp_path.with_name("no"), teacher=teacher_file)


@pytest.mark.parametrize(
    ("recipe", "teacher", "facts"),
    [
        (RECIPE, TeacherNetwork(Linear(), "t", ("circle", "line", "cube")), ["square", "cube", "--distill"]),
        (RECIPE, Linear(), ["Linear", "class names", "--distill"]),
        (replace(RECIPE, distill=Distill(0.0)), teacher_network(), ["soft_weight is 0", "feature_weight"]),
        (replace(RECIPE, distill=Distill(temperature=3.0)), None, ["distill.temperature is 3.0", "--teacher"]),
        (UNLABELED, None, ["distill", "--teacher"]),
        (UNLABELED, Linear(), ["Linear", "class names"]),
        (DISTILL, TeacherNetwork(nn.Flatten(), "t"), ["feature_weight is 0.5", "t", "--distill.feature-weight 0"]),
        (DISTILL, TeacherNetwork(Linear(4), "t", CLASS_NAMES), ["t", "4 outputs", "3 class names"]),
        (
            replace(UNLABELED, distill=Distill(0.0, feature_weight=1.0)),
            teacher_network(),
            ["soft_weight is 0", "must be 1"],
        ),
        (DISTILL, TeacherNetwork(nn.Conv2d(3, 4, 3), "t", CLASS_NAMES), ["t", "(2, 4, 30, 30)", "logits"]),
        (DISTILL, TeacherNetwork(nn.Linear(3, 4), "t", CLASS_NAMES), ["t", "distill.size_px"]),
    ],
)
def test_mistakes(recipe: Recipe, teacher: Any, facts: list[str], data: Path, tmp_path: Path):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the facts are asserted
        train(recipe, data, tmp_path / "run", teacher=teacher)
    assert not [fact for fact in facts if fact not in str(caught.value)], str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_large_teacher_reduces_the_micro_batch(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any
):
    class Wide(Linear):
        def __init__(self):
            super().__init__()
            self.wide = nn.Conv2d(3, 4096, 1)

        def forward(self, images: Tensor) -> Tensor:
            return super().forward(self.wide(images)[:, :3])

    monkeypatch.setattr("mobilevit.training.memory._memory_bytes", lambda device: 150_000_000)
    train(RECIPE, data, tmp_path / "run", teacher=TeacherNetwork(Wide(), "wide", CLASS_NAMES))
    assert "the teacher leaves memory for micro-batches of" in caplog.text
    monkeypatch.setattr("mobilevit.training.memory._memory_bytes", lambda device: 100_000)
    with pytest.raises(ValueError, match=r"teacher.*GB.*smaller teacher"):
        train(RECIPE, data, tmp_path / "none", teacher=TeacherNetwork(Wide(), "wide", CLASS_NAMES))
