"""Everything that a run needs before its first step: data, initial weights, loss, micro-batches."""

from __future__ import annotations

import copy
import hashlib
import logging
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mobilevit.benchmark.rivals import randomize
from mobilevit.data.loader import Batch, ImageDataset, to_device
from mobilevit.data.python_data import Data, PythonData
from mobilevit.data.samples import fingerprint
from mobilevit.defaults import TrackerName
from mobilevit.recipes import METRICS, Distill, Imbalance, Multilabel, Recipe
from mobilevit.report.training import Origin
from mobilevit.self_check import DeviceError, check_device
from mobilevit.tasks import TASKS, Task
from mobilevit.tasks.classification import Classification
from mobilevit.tasks.distillation import Distillation
from mobilevit.tasks.imbalance import LossCorrection, advice, check, count_classes
from mobilevit.teacher import Teacher, TeacherNetwork
from mobilevit.training.distillation import DistillationLoss, Student
from mobilevit.training.distributed import Processes
from mobilevit.training.external import ExternalClassifier, ExternalWeights, check_recipe, initial_weights
from mobilevit.training.memory import max_micro_batch_pixels
from mobilevit.training.optim import build_optimizer
from mobilevit.training.plan import Plan
from mobilevit.training.run import Identity
from mobilevit.training.step import Loss, autocast, prepare_model, trained_network
from mobilevit.training.track import TRACKERS, import_package
from mobilevit.weights import Weights
from mobilevit.weights.record import hash_tensors

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainOptions:
    """The arguments of `train`, checked."""

    recipe: Recipe
    data: Data
    out: Path
    pretrained: Weights | None
    classifier: ExternalClassifier | None
    teacher: TeacherNetwork | nn.Module | None
    checkpoint_minutes: float
    trackers: tuple[TrackerName, ...]
    extend: bool
    self_check: bool
    origin: Origin


@dataclass(frozen=True)
class Setup:
    """A run before its first step.

    `initial` describes the network and has its initial weights. `model` is the network on the device, or with a teacher
    a `Student`. `loss` is called with the model, possibly wrapped, and each micro-batch.
    """

    options: TrainOptions
    processes: Processes
    task: Task
    train_set: ImageDataset
    val_set: ImageDataset
    initial: Weights | ExternalWeights
    model: nn.Module
    loss: Loss
    plan: Plan
    val_fingerprint: str
    identity: Identity

    @property
    def checkpoint_bytes(self) -> int:
        """Approximate size of a checkpoint: raw weights, EMA weights, two moments of AdamW."""
        return 4 * sum(tensor.nbytes for tensor in self.model.state_dict().values())


def prepare(options: TrainOptions, processes: Processes) -> Setup:
    """Find the data, build the network, and measure the maximum micro-batch size.

    Raises:
        ValueError: a recipe, data or weights that cannot be used; see `mobilevit.train`.
    """
    recipe, device = options.recipe, processes.device
    _check_recipe(options)
    for name in options.trackers:
        if name not in TRACKERS:
            raise ValueError(f"trackers has {name!r}; the trackers are {', '.join(TRACKERS)}")
        if processes.rank == 0:
            import_package(name)
    check(recipe, has_teacher=options.teacher is not None)
    teacher = _teacher(options, device)
    if teacher and teacher.size_px:  # also of a teacher that accepts one size only
        recipe = replace(recipe, distill=replace(recipe.distill, size_px=teacher.size_px))
        options = replace(options, recipe=recipe)
    task = Distillation(teacher) if recipe.task == "distill" and teacher else TASKS[recipe.task]
    train_set, val_set = task.datasets(recipe, options.data)
    _check_data(options, len(train_set), processes.world_size)
    labels = None
    if recipe.task == "classify":
        task, labels = _balance(recipe, train_set, processes)
    torch.manual_seed(recipe.seed)
    initial = (
        initial_weights(options.classifier, recipe, train_set)
        if options.classifier
        else task.build(recipe, train_set, options.pretrained)
    )
    model = initial.build().to(device)
    if options.self_check:
        _check_device(model, recipe, processes)
    loss: Loss = partial(task.loss, recipe)
    if teacher:
        loss = DistillationLoss(recipe, task, teacher, initial.class_names)
        model = Student(model, teacher.num_features if recipe.distill.feature_weight else 0).to(device)
    val_fingerprint = fingerprint(val_set.source)
    with autocast(recipe, device), torch.compiler.set_stance("force_eager"):
        blank = blank_batch(task, recipe, device, (2, 3, recipe.data.size_px, recipe.data.size_px))
        measured = trained_network(copy.deepcopy(model).train(), recipe)
        max_pixels = max_micro_batch_pixels(recipe, loss, measured, blank, device, teacher)
    return Setup(
        options=options,
        processes=processes,
        task=task,
        train_set=train_set,
        val_set=val_set,
        initial=initial,
        model=prepare_model(model, recipe, device),
        loss=loss,
        plan=Plan(recipe, len(train_set), processes.world_size, min(processes.gather(max_pixels)), labels),
        val_fingerprint=val_fingerprint,
        identity=Identity(
            recipe=recipe,
            data=f"{fingerprint(train_set.source)} {val_fingerprint}",
            weights=_fingerprint(options.pretrained) if options.pretrained else "random",
            network=initial.name if options.classifier else None,
            teacher=teacher.fingerprint() if teacher else None,
        ),
    )


def _balance(recipe: Recipe, train_set: ImageDataset, processes: Processes) -> tuple[Classification, np.ndarray | None]:
    """The task with the recipe's correction for imbalanced classes, and the labels if they are to be sampled equally.

    Logs a warning if the classes are imbalanced and the recipe has no correction.
    """
    options, source = recipe.imbalance, train_set.source
    counts = count_classes(source.labels, len(source.class_names))
    if options == Imbalance():
        if processes.rank == 0 and (text := advice(counts, source.class_names)):
            logger.warning(text)
        return Classification(), None
    if options.balanced_sampler:
        return Classification(), np.array(source.labels)
    return Classification(LossCorrection.from_counts(options, counts, processes.device)), None


def blank_batch(task: Task, recipe: Recipe, device: torch.device, shape: tuple[int, ...]) -> Batch:
    """A batch of black images for an input of `shape` (B, 3, size, size); larger if the teacher's input is larger."""
    batch_size, _, size_px, _ = shape
    loaded_px = (
        max(size_px, recipe.distill.size_px) if recipe.task in ("classify", "multilabel", "distill") else size_px
    )
    pixels = torch.zeros(batch_size, 3, loaded_px, loaded_px, device=device).to(memory_format=torch.channels_last)
    labels = to_device(task.blank_labels(batch_size, size_px), str(device))
    return Batch(pixels, labels, tuple(range(batch_size)), size_px=size_px)


def _teacher(options: TrainOptions, device: torch.device) -> Teacher | None:
    recipe = options.recipe
    if options.teacher is None:
        if recipe.task == "distill":
            raise ValueError("the recipe distill needs a teacher: name one with --teacher (in Python: teacher=)")
        if changed := _first_changed(recipe.distill, Distill()):
            raise ValueError(f"distill.{changed}, which needs a teacher: name one with --teacher (in Python: teacher=)")
        return None
    if options.classifier:
        raise ValueError(f"{options.classifier.name} cannot have a teacher; only MobileViT can")
    inputs = options.pretrained.preprocessing if options.pretrained else None
    sizes_px = (recipe.data.size_px,) if recipe.sampler.variant == "standard" else recipe.sampler.sizes_px
    teacher = Teacher(options.teacher, size_px=recipe.distill.size_px, sizes_px=sizes_px, inputs=inputs)
    if recipe.task == "distill" and not teacher.class_names:
        raise ValueError(
            f"teacher {teacher.name}: has no class names, which the trained weights need; give weights with class names"
        )
    return teacher.to(device)


def _first_changed(options: Distill | Multilabel, defaults: Distill | Multilabel) -> str:
    """The first option that is not the default, such as "loss is asymmetric"; "" without one."""
    return next((f"{name} is {value}" for name, value in vars(options).items() if value != getattr(defaults, name)), "")


def _check_device(model: nn.Module, recipe: Recipe, processes: Processes) -> None:
    """Compare a training step with the CPU. All processes raise an error if the device of one of them is wrong."""
    # The activations of a new network lose their scale from layer to layer, which enlarges rounding errors.
    scaled = randomize(copy.deepcopy(model), seed=0)
    message = ""
    try:
        check_device(
            scaled, recipe.data.size_px, recipe.compute.precision, partial(build_optimizer, recipe=recipe.optimizer)
        )
    except DeviceError as error:
        message = str(error)
    for found in filter(None, processes.gather(message)):
        raise DeviceError(found)


def _check_recipe(options: TrainOptions) -> None:
    assert not (options.pretrained and options.classifier)
    recipe = options.recipe
    if recipe.metric not in ("auto", *METRICS[recipe.task]):
        names = ", ".join(METRICS[recipe.task])
        raise ValueError(
            f"metric is {recipe.metric}, which the task {recipe.task} does not have; it must be auto or {names}"
        )
    if options.classifier:
        check_recipe(options.recipe)
    if isinstance(options.data, PythonData) and options.recipe.task == "distill":
        raise ValueError(f"{options.data}: the recipe distill uses a folder of images, not a dataset in Python")
    if recipe.task != "multilabel" and (changed := _first_changed(recipe.multilabel, Multilabel())):
        raise ValueError(f"multilabel.{changed}, which needs the task multilabel: use the recipe multilabel")
    if options.pretrained is None:
        optimizer = options.recipe.optimizer
        for name, value, default in (
            ("freeze", optimizer.freeze, "nothing"),
            ("backbone_lr_scale", optimizer.backbone_lr_scale, 1),
        ):
            if value != default:
                raise ValueError(
                    f"optimizer.{name} is {value}, which needs a pretrained backbone, and this run starts from random "
                    f"weights; pass pretrained weights (--weights), or set it to {default}"
                )


def _check_data(options: TrainOptions, num_images: int, world_size: int) -> None:
    out = options.out
    if num_images < 2 * world_size:
        crops = " or raise --data.crops-per-image" if options.recipe.task == "distill" else ""
        raise ValueError(f"{options.data}: {num_images} training images are too few; add images{crops}")
    if isinstance(options.data, PythonData):
        return
    data = Path(options.data)
    if data.is_dir() and out.resolve().is_relative_to(data.resolve()) and not (data / "train").is_dir():
        raise ValueError(f"{out}: is inside {data}, where it would be read as a class folder; choose another folder")


def _fingerprint(weights: Weights) -> str:
    digest = hashlib.sha256()
    hash_tensors(digest, weights.tensors)
    return digest.hexdigest()[:16]
