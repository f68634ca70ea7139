"""The common corruptions of Hendrycks and Dietterich (2019, arXiv 1903.12261): 15 kinds at five severities.

The package imagecorruptions-imaug computes them, a maintained version of imagecorruptions (Michaelis et al. 2019, arXiv
1907.07484). As in ImageNet-C, an image is corrupted after it has been resized and cropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, get_args

import numpy as np

from mobilevit.data.sampler import Pick
from mobilevit.data.samples import Sample
from mobilevit.defaults import CorruptionName
from mobilevit.files import require

CORRUPTIONS: tuple[CorruptionName, ...] = get_args(CorruptionName)
SEVERITIES = (1, 2, 3, 4, 5)
SEEDED = ("impulse_noise", "glass_blur")  # they use generators of their own


@dataclass(frozen=True)
class Corruption:
    """A corruption of images.

    Args:
        name: one of `CORRUPTIONS`.
        severity: 1 (weak) to 5 (strong).

    Raises:
        ValueError: another name or severity, or the package is missing.
    """

    name: CorruptionName
    severity: int

    def __post_init__(self) -> None:
        if self.name not in CORRUPTIONS:
            raise ValueError(f"the corruption is {self.name!r}; it must be one of {', '.join(CORRUPTIONS)}")
        if self.severity not in SEVERITIES:
            raise ValueError(f"the severity is {self.severity}; it must be from 1 to 5")
        # Reports a missing package early, and compiles glass_blur (seconds) before worker processes start.
        self.apply(np.zeros((32, 32, 3), np.uint8), 0)

    def apply(self, pixels: np.ndarray, image_index: int) -> np.ndarray:
        """Corrupt uint8 pixels (H, W, 3). The random numbers depend on the corruption and `image_index` only."""
        entropy = (image_index, CORRUPTIONS.index(self.name), self.severity)
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        before = np.random.get_state()
        np.random.seed(seed)  # most corruptions use numpy's global generator
        try:
            options = {"seed": seed} if self.name in SEEDED else {}
            package = require("imagecorruptions", "corruptions", "corrupting images")
            return package.corrupt(pixels, corruption_name=self.name, severity=self.severity, **options)
        finally:
            np.random.set_state(before)


@dataclass(frozen=True)
class Corrupted:
    """The `prepare` of an `ImageDataset`, followed by a corruption."""

    prepare: Callable[[Sample, Pick], tuple[np.ndarray, Any]]
    corruption: Corruption

    def __call__(self, sample: Sample, pick: Pick) -> tuple[np.ndarray, Any]:
        pixels, label = self.prepare(sample, pick)
        return self.corruption.apply(pixels, pick.image_index), label


def describe_package() -> str:
    """Name and version of the package that computes the corruptions."""
    return f"imagecorruptions-imaug {version('imagecorruptions-imaug')}"
