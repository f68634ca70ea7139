"""A small detector and a small segmentation network with random weights that predict more than one class."""

from __future__ import annotations

import numpy as np
import torch

from mobilevit.export.verify import synthetic_images
from mobilevit.images import Preprocessing
from mobilevit.models.deeplabv3 import PAPER_HEAD, DeepLabHead, DeepLabV3
from mobilevit.models.mobilevit import Architecture, Stage, Transformer
from mobilevit.models.ssdlite import SSDLite
from mobilevit.weights import TaskName, Weights
from small_networks import randomize

PREPROCESSING = Preprocessing((64, 64), 64, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
# Five stages, as both heads require, and two transformer layers.
SMALL_BACKBONE = Architecture(
    "small",
    stages=(
        Stage(16, num_residuals=1, stride=1),
        Stage(24, num_residuals=1, stride=2),
        Stage(32, num_residuals=1, stride=2, transformer=Transformer(dim=64, num_layers=1, ffn_dim=128)),
        Stage(48, num_residuals=1, stride=2),
        Stage(64, num_residuals=1, stride=2, transformer=Transformer(dim=80, num_layers=1, ffn_dim=160)),
    ),
    head_channels=320,
    expansion=2,
    transformer_dropout=0.1,
)


def dense_weights(task: TaskName) -> Weights:
    return detector() if task == "detect" else segmentation()


def detector() -> Weights:
    """7 classes."""
    model = randomize(SSDLite(SMALL_BACKBONE, 7))
    return Weights(model.architecture, model.state_dict(), PREPROCESSING, tuple("abcdefg"), task="detect")


def segmentation(head: DeepLabHead = PAPER_HEAD, output_stride: int = 16) -> Weights:
    """5 classes, each for less than 60 % of the pixels."""
    model = randomize(DeepLabV3(SMALL_BACKBONE, 5, output_stride, head))
    pixels = PREPROCESSING.scale(torch.from_numpy(np.stack(synthetic_images(8, (64, 64)))).permute(0, 3, 1, 2))
    with torch.no_grad():
        assert model.classifier.bias is not None
        model.classifier.bias -= model(pixels).mean((0, 2, 3))
        classes = model(pixels).argmax(1).flatten()
    assert classes.bincount(minlength=5).max() < 0.6 * len(classes)
    options = {"output_stride": output_stride, "task": "segment", "head": head}
    return Weights(model.architecture, model.state_dict(), PREPROCESSING, tuple("abcde"), **options)
