"""Exported artifacts as predictors: images in, class names, boxes or masks out, computed by the artifact's runtime."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilevit.export.artifact import RAW_OUTPUTS, SCORE_THRESHOLD, ArtifactSpec, artifact_input, fill_batches
from mobilevit.export.backend import load_artifact, read_metadata
from mobilevit.images import ImageInput, Preprocessing, read_image
from mobilevit.models.ssdlite import Detections, suppress
from mobilevit.predict import Classifier, Detector, Predictor, Segmenter, Size


class Artifact(Predictor):
    """The predictor of an artifact; preprocessing and class names are those in its metadata.

    It replaces the network of the class that it is combined with, so that nothing can be trained or saved.

    Raises:
        ValueError: no artifact, without this package's metadata, or of a runtime that is not installed.
    """

    def __init__(self, path: Path):
        nn.Module.__init__(self)
        self.eval()
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
            self.class_names = tuple(json.loads(metadata["class_names"]))
            self.category_ids = tuple(json.loads(metadata.get("category_ids", "[]")))
            self._num_classes = int(metadata["num_classes"])
        except KeyError as error:
            raise _not_described(path, error) from None
        self._run = load_artifact(path, torch.get_num_threads())

    @property
    def num_classes(self) -> int:
        """The background of a detector is not counted."""
        return self._num_classes

    def outputs(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """The outputs of the artifact, in as many runs as its batch size requires."""
        batches = [self._run(batch.numpy()) for batch in fill_batches(pixels.split(1), self.spec.batch_size)]
        return tuple(torch.from_numpy(np.concatenate(parts)[: len(pixels)]) for parts in zip(*batches, strict=True))

    def _read(self, source: ImageInput) -> tuple[Tensor, Size]:
        image = read_image(source)
        return artifact_input(image, self.preprocessing, self.spec)[0], image.size

    def _batch(self, read: Sequence[tuple[Tensor, Size]]) -> tuple[Tensor, list[Size]]:
        pixels, sizes = zip(*read, strict=True)
        return torch.stack(pixels), list(sizes)


class ArtifactClassifier(Artifact, Classifier):
    """An exported classifier."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes)."""
        (logits,) = self.outputs(images)
        return logits


class ArtifactDetector(Artifact, Detector):
    """An exported detector, with NMS inside or without."""

    def _find(self, pixels: Tensor, score_threshold: float, max_per_image: int) -> list[Detections]:
        if not self.spec.postprocess:
            boxes, scores = self.outputs(pixels)
            return suppress(boxes.float(), scores.float(), score_threshold=score_threshold, max_per_image=max_per_image)
        if score_threshold < SCORE_THRESHOLD:
            raise ValueError(
                f"score threshold is {score_threshold}; this artifact leaves out boxes below {SCORE_THRESHOLD}: give "
                "that or more, or export without --postprocess"
            )
        found = []
        for boxes, scores, labels in zip(*self.outputs(pixels), strict=True):
            shown = (scores > score_threshold).nonzero()[:max_per_image, 0]  # best first
            found.append(Detections(boxes[shown], scores[shown], labels[shown]))
        return found


class ArtifactSegmenter(Artifact, Segmenter):
    """An exported segmentation network, with logits or the class of every pixel as its output."""

    def coarse(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes, H, W), or 1 for the class of a pixel and 0 for the others."""
        (output,) = self.outputs(images)
        return F.one_hot(output.long(), self.num_classes).permute(0, 3, 1, 2) if self.spec.postprocess else output

    def _resize(self, logits: Tensor, images: Tensor) -> Tensor:
        return logits  # the artifact has done it


def load_predictor(path: str | Path) -> ArtifactClassifier | ArtifactDetector | ArtifactSegmenter:
    """The predictor of an artifact, as its task requires; errors as of `Artifact`."""
    path = Path(path)
    try:
        task = read_metadata(path)["task"]
    except KeyError as error:
        raise _not_described(path, error) from None
    predictors = {"classify": ArtifactClassifier, "detect": ArtifactDetector, "segment": ArtifactSegmenter}
    return predictors[task](path)


def _not_described(path: Path, error: KeyError) -> ValueError:
    return ValueError(f"{path}: {error.args[0]!r} is missing in its metadata; export it with this version of mobilevit")
