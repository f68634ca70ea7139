"""Knowledge distillation: the losses of a student that imitates a frozen teacher.

The teacher sees the images that the student sees, after augmentation, Mixup and CutMix (Beyer et al. 2022, arXiv
2106.05237). The loss is

    (1 - soft_weight) * label loss + soft_weight * T^2 KL(teacher / T || student / T) + feature_weight * (1 - cosine)

with the temperature T (Hinton et al. 2015, arXiv 1503.02531), and the cosine similarity between the teacher's features
and a linear projection of the student's. The projection is not part of the trained weights.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilevit.data.loader import Batch
from mobilevit.models.deeplabv3 import DeepLabV3
from mobilevit.models.mobilevit import MobileViT
from mobilevit.models.ssdlite import SSDLite
from mobilevit.recipes import Recipe
from mobilevit.tasks import Task
from mobilevit.tasks.distillation import student_view
from mobilevit.teacher import Teacher, match_classes


class Student(nn.Module):
    """A network and the projection of its features to those of the teacher; images -> (outputs, projected features).

    The features are the input of the classifier, or, for detection and segmentation, the mean of the backbone's last
    map. Without a projection (`num_features` 0) the second output is None.
    """

    def __init__(self, network: nn.Module, num_features: int):
        super().__init__()
        self.network = network
        self.projection = nn.Linear(_feature_dim(network), num_features) if num_features else None

    def forward(self, images: Tensor) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor | None]:
        if self.projection is None:
            return self.network(images), None
        if isinstance(self.network, MobileViT):
            features = self.network.features(images)
            return self.network.classify(features), self.projection(features)
        assert isinstance(self.network, SSDLite | DeepLabV3)
        maps = self.network.backbone(images)
        features = list(maps.values())[-1].mean(dim=(-2, -1))
        projected = self.projection(features)
        if isinstance(self.network, DeepLabV3):
            return self.network.from_maps(maps, images), projected
        return self.network.from_maps(maps), projected


def _feature_dim(network: nn.Module) -> int:
    if isinstance(network, MobileViT):
        return network.architecture.head_channels
    assert isinstance(network, SSDLite | DeepLabV3)
    return list(network.backbone.channels.values())[-1]


def network_of(model: nn.Module) -> nn.Module:
    """The network that is trained, without a projection."""
    return model.network if isinstance(model, Student) else model


class _Recorder(nn.Module):
    """Calls a student at its input size; keeps the images, and the student's outputs and features."""

    images: Tensor
    results: tuple[Tensor, Tensor | None]

    def __init__(self, student: nn.Module, size_px: int):
        super().__init__()
        self.student, self.size_px = student, size_px

    def forward(self, images: Tensor) -> Tensor:
        self.images, self.results = images, self.student(student_view(images, self.size_px))
        return self.results[0]


class DistillationLoss:
    """The loss of a `Student`; called as `mobilevit.training.step.Loss`.

    Args:
        task: of the student; its loss is the label loss.
        class_names: of the student; soft targets match them with the teacher's by name.

    Raises:
        ValueError: weights that are all 0, classes that the teacher does not have, soft targets for a task other than
            classification, or features of a teacher that has none.
    """

    def __init__(self, recipe: Recipe, task: Task, teacher: Teacher, class_names: tuple[str, ...]):
        options = recipe.distill
        if not options.soft_weight and not options.feature_weight:
            raise ValueError("distill.soft_weight is 0, and so is distill.feature_weight; one of them must be above 0")
        if options.feature_weight and not teacher.num_features:
            raise ValueError(
                f"distill.feature_weight is {options.feature_weight}, but teacher {teacher.name} does not end in a "
                "linear layer, whose input would be the features; set it to 0 (--distill.feature-weight 0)"
            )
        if recipe.task == "distill" and options.soft_weight < 1:
            raise ValueError(
                f"distill.soft_weight is {options.soft_weight}, but without labels the teacher's class probabilities "
                "are the only targets of the classifier; it must be 1"
            )
        if options.soft_weight and recipe.task in ("multilabel", "detect", "segment"):
            raise ValueError(
                f"distill.soft_weight is {options.soft_weight}, but soft targets are probabilities of one class per "
                f"image, which the task {recipe.task!r} does not have; it must be 0 (with distill.feature_weight 1)"
            )
        self.recipe, self.task, self.teacher, self.options = recipe, task, teacher, options
        self.columns: list[int] | slice = slice(None)  # of the teacher's logits: the student's classes
        if options.soft_weight and class_names != teacher.class_names:
            self.columns = match_classes(teacher.class_names, class_names, teacher.name)
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []  # start and end, not read yet
        self._forward: nn.Module = teacher
        if recipe.compute.compile:
            self._forward = torch.compile(teacher, dynamic=False)  # pyright: ignore[reportAttributeAccessIssue]

    def __call__(self, student: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of a micro-batch. `student` is a `Student`, possibly compiled or distributed."""
        # The task augments the batch and calls the network with the result, which the teacher sees as well.
        network = _Recorder(student, batch.size_px)
        label_loss = self.task.loss(self.recipe, network, batch)
        outputs, features = network.results
        logits, teacher_features = self._run_teacher(network.images)
        options = self.options
        loss = (1 - options.soft_weight) * label_loss
        if options.soft_weight:
            loss = loss + options.soft_weight * soft_target_loss(
                outputs.float(), logits[:, self.columns].float(), options.temperature
            )
        if features is not None:
            similarity = F.cosine_similarity(features.float(), teacher_features.float())
            loss = loss + options.feature_weight * (1 - similarity).mean()
        return loss

    def _run_teacher(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        if pixels.device.type != "cuda":
            started = time.perf_counter()
            outputs = self._forward(pixels)
            self._seconds += time.perf_counter() - started
            return outputs
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        events[0].record()
        outputs = self._forward(pixels)
        events[1].record()
        self._events.append(events)
        return outputs

    def describe(self) -> str:
        """The teacher and the weights of the losses, for the log."""
        teacher, options = self.teacher, self.options
        num = sum(x.numel() for x in teacher.state_dict().values())
        size = f"{teacher.size_px} px" if teacher.size_px else "the input size of the student"
        soft = f"class probabilities with weight {options.soft_weight:g} at temperature {options.temperature:g}"
        features = f"features of dimension {teacher.num_features} with weight {options.feature_weight:g}"
        parts = [text for text, weight in ((soft, options.soft_weight), (features, options.feature_weight)) if weight]
        return (
            f"teacher {teacher.name}: {teacher.num_classes} classes, {num / 1e6:.1f} M values, at {size}; "
            f"{', '.join(parts)}"
        )

    def take_teacher_seconds(self) -> float:
        """Time spent in the teacher since the last call. Waits for the device."""
        seconds, self._seconds = self._seconds, 0.0
        events, self._events = self._events, []
        if events:
            events[-1][1].synchronize()
        return seconds + sum(start.elapsed_time(end) for start, end in events) / 1000


def soft_target_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean KL divergence of softened distributions from logits (B, C), times the squared temperature."""
    student, teacher = ((logits / temperature).log_softmax(1) for logits in (student, teacher))
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
