"""MobileViT in PyTorch: pretrained weights, training as in the paper, verified exports."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mobilevit.embed import embed_images
    from mobilevit.explain import explain_image
    from mobilevit.images import Preprocessing
    from mobilevit.inspect import inspect_data
    from mobilevit.models.mobilevit import XS, XXS, Architecture, Backbone, MobileViT, S
    from mobilevit.predict import (
        Classifier,
        Detection,
        Detector,
        MultilabelClassifier,
        Prediction,
        Segmenter,
        load,
        load_backbone,
        load_detector,
        load_multilabel,
        load_segmenter,
        save,
    )
    from mobilevit.recipes import RECIPES, Recipe
    from mobilevit.tasks.evaluation import evaluate
    from mobilevit.training.loop import train

# Public name -> its module, imported on first use, so that `mobilevit --help` does not import torch.
_MODULES = {
    "embed_images": "embed",
    "explain_image": "explain",
    "inspect_data": "inspect",
    "Architecture": "models.mobilevit",
    "Backbone": "models.mobilevit",
    "MobileViT": "models.mobilevit",
    "S": "models.mobilevit",
    "XS": "models.mobilevit",
    "XXS": "models.mobilevit",
    "Preprocessing": "images",
    "Classifier": "predict",
    "Detection": "predict",
    "Detector": "predict",
    "MultilabelClassifier": "predict",
    "Prediction": "predict",
    "Segmenter": "predict",
    "load": "predict",
    "load_backbone": "predict",
    "load_detector": "predict",
    "load_multilabel": "predict",
    "load_segmenter": "predict",
    "save": "predict",
    "RECIPES": "recipes",
    "Recipe": "recipes",
    "evaluate": "tasks.evaluation",
    "train": "training.loop",
}

__all__ = [
    "RECIPES",
    "XS",
    "XXS",
    "Architecture",
    "Backbone",
    "Classifier",
    "Detection",
    "Detector",
    "MobileViT",
    "MultilabelClassifier",
    "Prediction",
    "Preprocessing",
    "Recipe",
    "S",
    "Segmenter",
    "embed_images",
    "evaluate",
    "explain_image",
    "inspect_data",
    "load",
    "load_backbone",
    "load_detector",
    "load_multilabel",
    "load_segmenter",
    "save",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'mobilevit' has no attribute {name!r}")
    return getattr(import_module(f"mobilevit.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
