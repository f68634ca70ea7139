"""`Classifier`, `Detector` and `Segmenter` whose network is an exported artifact, run by its runtime."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mobilevit.export.artifact import RAW_OUTPUTS, SCORE_THRESHOLD, ArtifactSpec, artifact_input, fill_batches
from mobilevit.export.backend import load_artifact, read_metadata
from mobilevit.images import Preprocessing
from mobilevit.models.ssdlite import Detections, suppress
from mobilevit.predict import Classifier, Detector, MultilabelClassifier, Predictor, Segmenter
from mobilevit.weights import UNCALIBRATED, Calibration


class Artifact(Predictor):
    """Base class of exported predictors: preprocessing and class names from the metadata of the artifact.

    The runtime replaces the network, so the model can be neither trained nor saved. `val_fraction` and `val_data` are
    those of `Weights`.

    Raises:
        ValueError: not an artifact, one without this package's metadata, or the runtime is not installed.
    """

    thresholds: tuple[float, ...] = ()
    calibration: Calibration = UNCALIBRATED

    def __init__(self, path: Path):
        nn.Module.__init__(self)
        self.eval()
        self.path = path
        metadata = read_metadata(path)
        try:
            preprocessing = json.loads(metadata["preprocessing"])
            uint8 = preprocessing.pop("scaled_inside")
            height, width = map(int, metadata["size"].split())
            self.spec = ArtifactSpec(
                precision=metadata["precision"],  # pyright: ignore[reportArgumentType] - one of ours
                height=height,
                width=width,
                batch_size=int(metadata["batch_size"]),
                uint8=uint8,
                task=self.task,
                postprocess=metadata["outputs"] != " ".join(RAW_OUTPUTS[self.task]),
            )
            self.preprocessing = Preprocessing.from_dict(preprocessing)
            self._num_classes = int(metadata["num_classes"])
            self.class_names = tuple(json.loads(metadata["class_names"]))
            self.category_ids = tuple(json.loads(metadata.get("category_ids", "[]")))
            training = json.loads(metadata.get("training", "{}"))
            self.val_fraction, self.val_data = training.get("val_fraction"), training.get("val_data")
        except KeyError as error:
            raise _incomplete(path, error) from None
        self._run = load_artifact(path, torch.get_num_threads())

    @property
    def num_classes(self) -> int:
        """Without the background of a detector."""
        return self._num_classes

    def outputs(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """The outputs of the artifact, computed in batches of its batch size."""
        batches = [self._run(batch.numpy()) for batch in fill_batches(pixels.split(1), self.spec.batch_size)]
        return tuple(torch.from_numpy(np.concatenate(parts)[: len(pixels)]) for parts in zip(*batches, strict=True))

    def _pixels(self, image: Image.Image) -> Tensor:
        return artifact_input(image, self.preprocessing, self.spec)[0]

    def _batch(self, pixels: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(pixels))


class ArtifactClassifier(Artifact, Classifier):
    """An exported classifier; the calibration is in the metadata."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.calibration = Calibration(**json.loads(read_metadata(path).get("calibration", "{}")))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes)."""
        (logits,) = self.outputs(images)
        return logits


class ArtifactMultilabelClassifier(Artifact, MultilabelClassifier):
    """An exported multi-label classifier; the thresholds are in the metadata."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.thresholds = tuple(json.loads(read_metadata(path).get("thresholds", "[]")))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes)."""
        (logits,) = self.outputs(images)
        return logits


class ArtifactDetector(Artifact, Detector):
    """An exported detector; with decoded outputs, NMS is part of the artifact."""

    def _detect(self, pixels: Tensor, score_threshold: float, max_per_image: int) -> list[Detections]:
        return self.detect(pixels, score_threshold, max_per_image)

    def detect(self, pixels: Tensor, score_threshold: float, max_per_image: int) -> list[Detections]:
        """Detections in preprocessed images, in relative coordinates."""
        if not self.spec.postprocess:
            boxes, scores = self.outputs(pixels)
            return suppress(boxes.float(), scores.float(), score_threshold=score_threshold, max_per_image=max_per_image)
        if score_threshold < SCORE_THRESHOLD:
            raise ValueError(
                f"score threshold is {score_threshold}, but this artifact omits boxes below {SCORE_THRESHOLD}; use a "
                "higher threshold, or export without --postprocess"
            )
        detections = []
        for boxes, scores, labels in zip(*self.outputs(pixels), strict=True):
            top = (scores > score_threshold).nonzero()[:max_per_image, 0]  # sorted by score
            detections.append(Detections(boxes[top], scores[top], labels[top]))
        return detections


class ArtifactSegmenter(Artifact, Segmenter):
    """An exported segmentation network; the output is logits or, with decoded outputs, class indices."""

    def coarse(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes, H, W), or the class indices one-hot encoded."""
        (output,) = self.outputs(images)
        return F.one_hot(output.long(), self.num_classes).permute(0, 3, 1, 2) if self.spec.postprocess else output

    def _resize(self, logits: Tensor, images: Tensor) -> Tensor:
        return logits  # part of the artifact


ArtifactPredictor = ArtifactClassifier | ArtifactMultilabelClassifier | ArtifactDetector | ArtifactSegmenter


def load_predictor(path: str | Path) -> ArtifactPredictor:
    """The predictor of an artifact, by the task in its metadata; errors as for `Artifact`."""
    path = Path(path)
    try:
        task = read_metadata(path)["task"]
    except KeyError as error:
        raise _incomplete(path, error) from None
    predictors = {
        "classify": ArtifactClassifier,
        "multilabel": ArtifactMultilabelClassifier,
        "detect": ArtifactDetector,
        "segment": ArtifactSegmenter,
    }
    return predictors[task](path)


def _incomplete(path: Path, error: KeyError) -> ValueError:
    return ValueError(f"{path}: its metadata has no {error.args[0]!r}; export it with this version of mobilevit")
