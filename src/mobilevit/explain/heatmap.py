"""Heat maps over an image: scaling of values to [0, 1] and the color ramp, for the figure and the page."""

from __future__ import annotations

import numpy as np
from PIL import Image
from torch import Tensor

from mobilevit.draw import Color

# From low to high values. Lightness increases as well, for readers who cannot tell the hues apart.
RAMP: tuple[Color, ...] = ((122, 24, 72), (190, 50, 52), (236, 116, 30), (250, 188, 66), (255, 245, 190))
MAX_OPACITY = 0.75  # of the brightest color
# The brightest color stands for the largest attention, or for this multiple of the mean if that is larger. Scaled by
# the largest value alone, uniform attention would be as bright as attention to a single patch.
MIN_BRIGHTEST = 3.0
UNIFORM_BELOW = 1.1  # attention counts as uniform if its maximum is below this multiple of the mean
GRADIENT_DECADES = 4  # of the logarithmic scale, from the darkest to the brightest color
MIN_GRADIENT_VALUE = 0.1  # of the smallest nonzero gradient, so that it can be told from exactly 0
SMALLEST_GRADIENT_TEXT = f"1/{round(10 ** (GRADIENT_DECADES * (1 - MIN_GRADIENT_VALUE)), -2):,.0f} or less"


def scale(values: Tensor, brightest: float = 0.0) -> np.ndarray:
    """Values divided by their maximum, or by `brightest` if that is larger; negative values become 0."""
    positive = values.clamp(min=0).double()
    return (positive / positive.max().clamp(min=max(brightest, 1e-30))).numpy()


def scale_attention(patches: Tensor) -> np.ndarray:
    """Attention (rows, columns), which sums to 1, scaled by its maximum or by `MIN_BRIGHTEST` times its mean."""
    return scale(patches, MIN_BRIGHTEST / patches.numel())


def scale_gradient(gradient: Tensor) -> np.ndarray:
    """A gradient on a logarithmic scale: 1 for the maximum, at least 0.1 for nonzero values, 0 for exactly 0."""
    ratio = (gradient.double() / gradient.max().clamp(min=1e-30)).numpy()
    logarithm = np.log10(ratio, out=np.full_like(ratio, -np.inf), where=ratio > 0)
    return np.where(ratio > 0, np.clip(1 + logarithm / GRADIENT_DECADES, MIN_GRADIENT_VALUE, 1), 0)


def overlay(gray: np.ndarray, values: np.ndarray) -> Image.Image:
    """Blend the colors of `values` (h, w), 0 to 1, over `gray` (h, w, 1), 0 to 255. Higher values are more opaque."""
    v = values[..., None]
    stops = np.linspace(0, 1, len(RAMP))
    color = np.concatenate([np.interp(v, stops, [stop[c] for stop in RAMP]) for c in range(3)], axis=-1)
    opacity = MAX_OPACITY * v**0.6
    return Image.fromarray((gray * (1 - opacity) + color * opacity).clip(0, 255).astype(np.uint8))
