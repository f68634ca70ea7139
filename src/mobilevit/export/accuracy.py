"""Accuracy of int8 artifacts, and the groups of layers that stay in float so that its loss is within a limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mobilevit.data import sources
from mobilevit.data.python_data import Data
from mobilevit.export.artifact import evenly_spaced
from mobilevit.export.evaluation import evaluate_artifact
from mobilevit.export.predictor import load_predictor
from mobilevit.images import read_image
from mobilevit.recipes import Recipe
from mobilevit.tasks.evaluation import EvaluationOptions
from mobilevit.weights import Weights

AGREEMENT = "agreement"
# Names of metrics in messages.
NAMES = {"top1": "top-1", "miou": "mIoU", "map": "mAP", "ap": "AP"}


@dataclass(frozen=True)
class Measured:
    """A metric of an artifact in percent.

    `metric` is the main metric of the task on labeled images, such as "top1". Without labels it is "agreement": the
    fraction of predictions that are those of torch in fp32. `split` is "" without labels.
    """

    metric: str
    value: float
    num_images: int
    split: str = ""


@dataclass(frozen=True)
class Accuracy:
    """A metric in percent of an int8 artifact, and of the same network in fp32 in the same runtime; see `Measured`."""

    metric: str
    fp32: float
    int8: float
    num_images: int
    split: str

    @classmethod
    def of(cls, fp32: Measured, int8: Measured) -> Accuracy:
        return cls(fp32.metric, fp32.value, int8.value, fp32.num_images, fp32.split)

    @property
    def loss(self) -> float:
        """Percentage points that int8 loses; negative if it is better."""
        return self.fp32 - self.int8

    def describe(self) -> str:
        """The two figures as text."""
        images = f"{self.num_images:,} images" + (f" of the {self.split} split" if self.split else "")
        name = NAMES.get(self.metric, self.metric)
        return f"{name} {self.fp32:.2f} % in fp32, {self.int8:.2f} % in int8 (loss {self.loss:.2f}; {images})"


class LabeledData:
    """A dataset that calibrates and evaluates int8 artifacts of `weights`.

    Data with splits: artifacts are evaluated on val, or else test. Data without splits are divided as in the training
    of the weights, or as the default recipe does it, and artifacts are evaluated on the validation split.

    Raises:
        ValueError: the data cannot be read, or have other classes.
    """

    def __init__(self, weights: Weights, data: Data):
        self._weights, self._data = weights, data
        self._val_fraction = weights.val_fraction or Recipe().data.val_fraction
        split = sources.default_split(weights.task, data)
        self.split = "val" if split == "all" else split

    def training_images(self, num: int) -> list[Image.Image]:
        """At most `num` images of the training split, evenly spaced.

        Raises:
            ValueError: the data have no training split. ImageError: an image that cannot be read.
        """
        weights, data = self._weights, self._data
        if not weights.class_names:
            raise ValueError("these weights have no class names, which are required to match the classes of the data")
        source = sources.find_evaluation_split(weights.task, data, weights.class_names, "train", self._val_fraction)
        samples = [source[i] for i in evenly_spaced(range(len(source)), num)]
        return [read_image(sample.image, sample.name) for sample in samples]

    def measure(self, path: Path) -> Measured:
        """Evaluate an artifact on the validation split, in its runtime."""
        predictor = load_predictor(path)
        predictor.val_fraction = self._val_fraction
        result = evaluate_artifact(predictor, self._data, options=EvaluationOptions(self.split))
        metric, metrics = result.results.main_metric, result.metrics
        return Measured(metric, metrics[metric], int(metrics["num_images"]), self.split)


def shortest_prefix(groups: Sequence[str], is_accurate: Callable[[tuple[str, ...]], bool]) -> tuple[str, ...] | None:
    """The first groups, as few as necessary, with which the artifact is accurate; None if all but one do not suffice.

    At least one is necessary. The number is doubled until it suffices, and then bisected, because every trial converts
    and evaluates an artifact.
    """
    insufficient, num = 0, 1
    while not is_accurate(tuple(groups[:num])):
        if num >= len(groups) - 1:
            return None
        insufficient, num = num, min(2 * num, len(groups) - 1)
    while num - insufficient > 1:
        middle = (insufficient + num) // 2
        if is_accurate(tuple(groups[:middle])):
            num = middle
        else:
            insufficient = middle
    return tuple(groups[:num])
