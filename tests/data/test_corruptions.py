"""Common corruptions: deterministic, stronger with severity, and the same as those of the package."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from mobilevit.data.corruptions import CORRUPTIONS, SEVERITIES, Corrupted, Corruption
from mobilevit.data.sampler import Pick
from mobilevit.data.samples import Sample

pytest.importorskip("imagecorruptions")
pytestmark = [
    pytest.mark.filterwarnings("default::DeprecationWarning"),
    pytest.mark.filterwarnings("default::FutureWarning"),
    pytest.mark.filterwarnings("default::UserWarning"),
]


def photograph(height: int, width: int) -> np.ndarray:
    rows, columns = np.indices((height, width))
    waves = [128 + 100 * np.sin(rows / 9 + i) * np.cos(columns / (5 + i)) for i in range(3)]
    return np.stack(waves, -1).astype(np.uint8)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption(name: str):
    pixels = photograph(64, 64)
    np.random.seed(3)
    state = np.random.get_state()[1].tobytes()  # type: ignore[union-attr]
    distances = []
    for severity in SEVERITIES:
        corruption = Corruption(name, severity)  # pyright: ignore[reportArgumentType]
        out = corruption.apply(pixels, 7)
        assert (out.shape, out.dtype) == ((64, 64, 3), np.uint8)
        np.random.random(5)  # other users of the generator have no influence
        assert np.array_equal(corruption.apply(pixels, 7), out)
        distances.append(np.abs(out.astype(float) - pixels).mean())
        np.random.seed(3)
    Corruption(name, 5).apply(pixels, 8)  # pyright: ignore[reportArgumentType]
    assert np.random.get_state()[1].tobytes() == state  # type: ignore[union-attr]
    assert min(distances) > 0.2
    assert distances[4] > distances[0]


@pytest.mark.parametrize("name", ["gaussian_noise", "impulse_noise", "glass_blur", "elastic_transform"])
def test_images_have_different_random_numbers(name: str):
    corruption = Corruption(name, 3)  # pyright: ignore[reportArgumentType]
    out = {corruption.apply(photograph(40, 33), index).tobytes() for index in range(4)}
    assert len(out) == 4


def test_gaussian_noise_against_the_formula():
    """Standard deviation 0.26 at severity 4 (appendix of the paper's code), of values from 0 to 1."""
    noise = Corruption("gaussian_noise", 4).apply(np.full((200, 200, 3), 128, np.uint8), 0) / 255
    inside = noise[(noise > 0) & (noise < 1)]
    assert len(inside) / noise.size == pytest.approx(0.946, abs=0.01)  # 128 +- 1.93 standard deviations
    assert inside.std() == pytest.approx(0.2245, abs=0.005)  # of the truncated normal distribution


def test_the_images_of_a_dataset():
    prepare = Corrupted(lambda sample, pick: (np.asarray(sample.image), sample.label), Corruption("fog", 2))
    sample = Sample(photograph(32, 45), 5, "x")
    pixels, label = prepare(sample, Pick(4, 0, 32))
    assert label == 5
    assert np.array_equal(pixels, Corruption("fog", 2).apply(photograph(32, 45), 4))


@pytest.mark.parametrize(("name", "severity", "message"), [("rain", 1, "'rain'; .*fog"), ("fog", 6, "6; .* 1 to 5")])
def test_wrong_arguments(name: str, severity: int, message: str):
    with pytest.raises(ValueError, match=message):
        Corruption(name, severity)  # pyright: ignore[reportArgumentType]


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(ValueError, match=r"pip install 'mobilevit\[corruptions\]'"):
        Corruption("fog", 1)
