"""A detector and a segmentation network with random weights, whose answers are more than one class."""

from __future__ import annotations

import numpy as np
import torch

from conftest import randomise
from mobilevit.export.verify import synthetic_images
from mobilevit.images import Preprocessing
from mobilevit.models.deeplabv3 import PAPER_HEAD, DeepLabHead, DeepLabV3
from mobilevit.models.ssdlite import SSDLite
from mobilevit.weights import TaskName, Weights

PREPROCESSING = Preprocessing((64, 64), 64, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))


def dense_weights(task: TaskName) -> Weights:
    """Weights for 64 px; 7 classes of things, or 5 of pixels."""
    return detector() if task == "detect" else segmentation()


def detector() -> Weights:
    """An XXS with 7 classes."""
    model = randomise(SSDLite("xxs", 7))
    return Weights(model.architecture, model.state_dict(), PREPROCESSING, tuple("abcdefg"), task="detect")


def segmentation(head: DeepLabHead = PAPER_HEAD, output_stride: int = 16) -> Weights:
    """An XXS with 5 classes, none of which is preferred."""
    model = randomise(DeepLabV3("xxs", 5, output_stride, head))
    pixels = torch.from_numpy(np.stack(synthetic_images(8, (64, 64)))).permute(0, 3, 1, 2)
    with torch.no_grad():
        logits = model(PREPROCESSING.scale(pixels))
        assert model.classifier.bias is not None
        model.classifier.bias -= logits.mean((0, 2, 3))
        shares = model(PREPROCESSING.scale(pixels)).argmax(1).flatten().bincount(minlength=5) / logits[:, 0].numel()
    assert shares.max() < 0.6
    options = {"output_stride": output_stride, "task": "segment", "head": head}
    return Weights(model.architecture, model.state_dict(), PREPROCESSING, tuple("abcde"), **options)
