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
    first, then the most likely ones; it is empty for networks without classes.
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
