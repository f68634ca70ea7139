"""Everything that is known of why a network answered as it did to one image."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from mobilevit.explain.attention import BlockAttention
from mobilevit.explain.evidence import Evidence
from mobilevit.explain.receptive import Field
from mobilevit.explain.view import View
from mobilevit.weights import TaskName


@dataclass(frozen=True)
class Explanation:
    """What a network attends to from one place of an image, what that place depends on, what speaks for a class.

    `image` is upright, `at` the place in its pixels, `place` the same in shares of what the network sees of it.
    `size_px` is the side of what the network is given. `evidence` is of the chosen class and then of the likeliest;
    only classifiers have it.
    """

    network: str
    task: TaskName
    image: Image.Image
    view: View
    at: tuple[float, float]
    place: tuple[float, float]
    size_px: int
    blocks: tuple[BlockAttention, ...]
    fields: tuple[Field, ...]
    evidence: tuple[Evidence, ...]
