"""Weights and artifacts that tests of several backends share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from dense_networks import dense_weights
from mobilevit.export import Artifact, ExportOptions, export
from mobilevit.export.verify import synthetic_images
from mobilevit.images import Preprocessing
from mobilevit.models.mobilevit import MobileViT
from mobilevit.weights import Weights
from small_networks import SMALL, randomize

ExportOnce = Callable[..., Artifact]


@pytest.fixture(scope="session")
def all_weights() -> dict[str, Weights]:
    """Small networks for 64 px, by task."""
    model = randomize(MobileViT(SMALL, num_classes=7))
    preprocessing = Preprocessing(70, 64, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
    classifier = Weights(model.architecture, model.state_dict(), preprocessing, ("é", '"', "<", *"abcd"))
    detector = replace(dense_weights("detect"), category_ids=tuple(range(7, 21, 2)))
    return {"classify": classifier, "detect": detector, "segment": dense_weights("segment")}


@pytest.fixture(scope="session")
def weights(all_weights: dict[str, Weights]) -> Weights:
    return all_weights["classify"]


@pytest.fixture(scope="session")
def export_once(all_weights: dict[str, Weights], tmp_path_factory: pytest.TempPathFactory) -> ExportOnce:
    """Export one of the networks, once per session for the same options; int8 is calibrated on synthetic images."""
    artifacts: dict[Any, Artifact] = {}

    def get(backend: str, task: str = "classify", **options: Any) -> Artifact:
        key = (backend, task, tuple(sorted(options.items())))
        if key not in artifacts:
            artifacts[key], *_ = export(
                all_weights[task],
                [backend],
                tmp_path_factory.mktemp(backend),
                ExportOptions(num_threads=1, **options),
                images=synthetic_images(12, (80, 90)),
                source="here",
            )
        return artifacts[key]

    return get
