"""Fixtures of the training tests."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mobilevit.training.loop import TrainingResult, train
from small_runs import CLASS_NAMES, RECIPE


@pytest.fixture(scope="package")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, num in (("train", 4), ("val", 1)):
        for label, class_name in enumerate(CLASS_NAMES):
            for i in range(num):
                file = folder / split / class_name / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                pixels = rng.integers(0, 100 + 70 * label, (32 + i, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(file)
    return folder


@pytest.fixture(scope="package")
def first(data: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    """A finished run of `RECIPE`."""
    return train(RECIPE, data, tmp_path_factory.mktemp("first"))


@pytest.fixture(autouse=True)
def log_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mobilevit")
