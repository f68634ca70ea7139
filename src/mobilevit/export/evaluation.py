"""Evaluate exported artifacts in their runtimes, with the metrics of `mobilevit.evaluate`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from mobilevit.data.loader import Batch
from mobilevit.data.python_data import MapDataset, PythonData, to_data
from mobilevit.export.backend import read_signature
from mobilevit.export.predictor import ArtifactDetector, ArtifactPredictor, ArtifactSegmenter, load_predictor
from mobilevit.models.ssdlite import Detections
from mobilevit.tasks import TASKS
from mobilevit.tasks.detection import MAX_PER_IMAGE, SCORE_THRESHOLD, Detection
from mobilevit.tasks.evaluation import EvaluationOptions, EvaluationResult, Runner, evaluate_network

DEFAULT_OPTIONS = EvaluationOptions()


def evaluate_artifact(
    artifact: str | Path | ArtifactPredictor,
    data: str | os.PathLike[str] | MapDataset | tuple[MapDataset, MapDataset] | PythonData,
    *,
    size_px: int | None = None,
    options: EvaluationOptions = DEFAULT_OPTIONS,
) -> EvaluationResult:
    """Evaluate an artifact on a split of the data, in its runtime on the CPU.

    Images are preprocessed, and metrics computed, as `mobilevit.evaluate` does it for weights.

    Args:
        artifact: an artifact of this package, or its predictor.
        data: as for `mobilevit.evaluate`.
        size_px: input size, for an artifact with a dynamic size; None: the size at its export.
        options: the split, the batch size of reading, and others.

    Raises:
        ValueError: as `load_predictor` and `mobilevit.evaluate`; or the artifact takes another size, or no squares.
    """
    predictor = load_predictor(artifact) if isinstance(artifact, str | Path) else artifact
    size_px = _input_px(predictor, size_px)
    predictor.spec = replace(predictor.spec, height=size_px, width=size_px)
    preprocessing = predictor.preprocessing
    if size_px != preprocessing.crop_px:
        preprocessing = preprocessing.at_size(size_px)
    network = _ArtifactNetwork(predictor)
    task = _ArtifactDetection() if predictor.task == "detect" else TASKS[predictor.task]
    runner = Runner(task, lambda: network, takes_uint8=True)
    return evaluate_network(predictor, to_data(data), preprocessing, runner, options)


def _input_px(predictor: ArtifactPredictor, size_px: int | None) -> int:
    path, height, width = predictor.path, predictor.spec.height, predictor.spec.width
    if size_px is None and height != width:
        raise ValueError(
            f"{path}: its input is {height} x {width} px, but metrics are defined for square inputs; export it again "
            f"with --size {max(height, width)}"
        )
    if size_px not in (None, height) or (size_px is not None and height != width):
        shape = read_signature(path).shape
        if None not in shape[-3:]:  # the axes of height and width, in both layouts
            raise ValueError(
                f"size is {size_px}, but the input of {path} is {height} x {width} px; leave it out, or export again "
                f"with --size {size_px}"
            )
    return size_px or height


class _ArtifactNetwork(nn.Module):
    """Images, uint8 (B, 3, H, W) -> outputs as those of a network."""

    def __init__(self, predictor: ArtifactPredictor):
        super().__init__()
        self.predictor = predictor

    def images(self, pixels: Tensor) -> Tensor:
        """The input of the artifact."""
        if self.predictor.spec.uint8:
            return pixels.permute(0, 2, 3, 1).contiguous()
        return self.predictor.preprocessing.scale(pixels).contiguous()

    def forward(self, pixels: Tensor) -> Tensor:
        if isinstance(self.predictor, ArtifactSegmenter):
            return self.predictor.coarse(self.images(pixels))
        return self.predictor(self.images(pixels))


class _ArtifactDetection(Detection):
    """Detection by an artifact, which decodes its boxes itself."""

    def detect(self, model: nn.Module, batch: Batch) -> tuple[list[Detections], int]:
        assert isinstance(model, _ArtifactNetwork)
        assert isinstance(model.predictor, ArtifactDetector)
        detections = model.predictor.detect(model.images(batch.pixels), SCORE_THRESHOLD, MAX_PER_IMAGE)
        return detections, model.predictor.num_classes
