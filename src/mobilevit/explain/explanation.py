"""The result of `explain_image`."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from mobilevit.explain.attention import BlockAttention
from mobilevit.explain.grad_cam import ClassEvidence
from mobilevit.explain.input_region import InputRegion
from mobilevit.explain.receptive_field import ReceptiveField
from mobilevit.weights import TaskName


@dataclass(frozen=True)
class Explanation:
    """Attention, receptive fields and class evidence of a network for one image.

    `image` is upright. `at` is the query point in its pixels, and `point` the same point relative to `region`, the
    part of the image that the network receives at `size_px` x `size_px`. `class_evidence` lists the requested class
    first, then the most likely ones; it is empty for networks without classes. `prediction` names the predicted class,
    or the labels of a multi-label classifier, with probabilities.
    """

    network: str
    task: TaskName
    image: Image.Image
    region: InputRegion
    at: tuple[float, float]
    point: tuple[float, float]
    size_px: int
    attention: tuple[BlockAttention, ...]
    receptive_fields: tuple[ReceptiveField, ...]
    class_evidence: tuple[ClassEvidence, ...]

    @property
    def prediction(self) -> str:
        predicted = sorted((one for one in self.class_evidence if one.is_predicted), key=lambda one: -one.probability)
        return "; ".join(f"{one.class_name}, {_percent(one.probability)}" for one in predicted) or "no label"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.{1 if 0 < fraction < 0.1 else 0}f} %"
