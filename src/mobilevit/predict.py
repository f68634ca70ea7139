"""Classify, detect and segment images: networks with preprocessing and class names.

`load`, `load_multilabel`, `load_detector` and `load_segmenter` return a `Classifier`, `MultilabelClassifier`,
`Detector` or `Segmenter`. Boxes and masks are in pixels of the upright image at its original size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, Self, TypeGuard, TypeVar, cast, overload

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mobilevit.defaults import LABEL_THRESHOLD, MAX_PER_IMAGE, PREDICT_BATCH_SIZE, SCORE_THRESHOLD, TOP_K
from mobilevit.images import ImageError, ImageInput, Preprocessing, read_image
from mobilevit.models.deeplabv3 import DeepLabV3
from mobilevit.models.mobilevit import Backbone, MobileViT
from mobilevit.models.ssdlite import Detections, SSDLite, detect
from mobilevit.self_check import check_device
from mobilevit.weights import (
    NETWORKS,
    PREPROCESSING,
    UNCALIBRATED,
    Calibration,
    Format,
    TaskName,
    Weights,
    WeightsError,
    backbone_tensors,
    read,
    write,
)

# `predict_images` stores the decoded images of a batch up to this total, to limit the memory.
MAX_DECODED_MEGAPIXELS = 100
Size = tuple[int, int]  # (width, height) of an image in pixels


@dataclass(frozen=True)
class Prediction:
    """A class and its probability, 0 to 1. It is rejected if the probability is too low; see `Calibration`."""

    class_name: str
    probability: float
    class_index: int
    rejected: bool = False


@dataclass(frozen=True)
class Detection:
    """A detected object: class, score (0 to 1) and box.

    `box` is (x1, y1, x2, y2) in pixels of the upright image, clipped to it. (0, 0) is the upper left corner of the
    image and (width, height) the lower right one.
    """

    class_name: str
    score: float
    class_index: int
    box: tuple[float, float, float, float]


class Predictor(nn.Module):
    """Base class of `Classifier`, `MultilabelClassifier`, `Detector` and `Segmenter`: preprocessing and class names."""

    task: TaskName
    preprocessing: Preprocessing
    _class_names: tuple[str, ...] = ()

    @classmethod
    def from_weights(cls, weights: Weights) -> Self:
        """The model with these weights, in eval mode.

        Raises:
            WeightsError: weights of another task.
        """
        model = weights.build(cls)
        model.preprocessing, model.class_names = weights.preprocessing, weights.class_names
        return model

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by class index; empty if unknown. Setting another number of names than classes is a ValueError."""
        return self._class_names

    @class_names.setter
    def class_names(self, names: Sequence[str]) -> None:
        if names and len(names) != self.num_classes:
            raise ValueError(f"class_names has {len(names)} names for {self.num_classes} classes; give one per class")
        self._class_names = tuple(names)

    def class_name(self, index: int) -> str:
        """The name of a class, or "class 7" if names are unknown."""
        return self.class_names[index] if self.class_names else f"class {index}"

    def preprocess(self, images: ImageInput | Sequence[ImageInput]) -> Tensor:
        """One image or several (paths, PIL images, uint8 arrays) -> (B, 3, crop_px, crop_px) on the model's device.

        Raises:
            ImageError: an image that cannot be read.
            ValueError: no images.
        """
        return self._read_all(images)[0]

    def _read_all(self, images: ImageInput | Sequence[ImageInput]) -> tuple[Tensor, list[Size]]:
        decoded = [read_image(image) for image in ([images] if _is_one(images) else cast(Sequence[ImageInput], images))]
        if not decoded:
            raise ValueError("no images; give one or several")
        return self._batch([self._pixels(image) for image in decoded]), [image.size for image in decoded]

    def _pixels(self, image: Image.Image) -> Tensor:
        """The network's input for one decoded image, (3, crop_px, crop_px)."""
        return self.preprocessing(image)

    def _batch(self, pixels: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(pixels)).to(next(self.parameters()))

    def _check_mode(self) -> None:
        if self.training:
            raise RuntimeError("the model is in training mode; call model.eval() before predicting")

    def _check_whole_image(self) -> None:
        """Check that preprocessing does not crop: predicted coordinates are relative to the whole image."""
        p = self.preprocessing
        if p.resize_px != (p.crop_px, p.crop_px):
            raise ValueError(
                f"resize_px is {p.resize_px} and crop_px {p.crop_px}, but this network needs whole images; set "
                f"preprocessing to resize_px=({p.crop_px}, {p.crop_px}) and train with that"
            )


class Classifier(Predictor, MobileViT):
    """A `MobileViT` with preprocessing and class names; see `load`.

    `model(pixels)` is the network: RGB float images (B, 3, H, W) -> logits (B, num_classes). `calibration` holds for
    the weights that it was fitted for: set it to `UNCALIBRATED` after training them.
    """

    task: TaskName = "classify"
    preprocessing: Preprocessing = PREPROCESSING["classify"]
    calibration: Calibration = UNCALIBRATED

    @classmethod
    def from_weights(cls, weights: Weights) -> Self:
        model = super().from_weights(weights)
        model.calibration = weights.calibration
        return model

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a newly initialized one, without class names and without calibration."""
        self._class_names, self.calibration = (), UNCALIBRATED
        super().reset_classifier(num_classes)

    @overload
    def predict(self, images: ImageInput, top_k: int = TOP_K) -> list[Prediction]: ...
    @overload
    def predict(self, images: Sequence[ImageInput], top_k: int = TOP_K) -> list[list[Prediction]]: ...
    def predict(
        self, images: ImageInput | Sequence[ImageInput], top_k: int = TOP_K
    ) -> list[Prediction] | list[list[Prediction]]:
        """The `top_k` most probable classes of one image, most probable first, or a list of them for several images."""
        predictions = self.predict_pixels(*self._read_all(images), top_k)
        return predictions[0] if _is_one(images) else predictions

    def predict_pixels(self, pixels: Tensor, sizes: Sequence[Size] = (), top_k: int = TOP_K) -> list[list[Prediction]]:
        """The `top_k` most probable classes of each preprocessed image of a batch (B, 3, H, W); `sizes` is not used."""
        return self.decode(self.logits(pixels), top_k)

    @torch.inference_mode()
    def logits(self, pixels: Tensor) -> Tensor:
        """The network's output for preprocessed images (B, 3, H, W): float32 logits (B, num_classes).

        Raises:
            ValueError: no classifier. RuntimeError: training mode.
        """
        if not self.num_classes:
            raise ValueError("this network has no classifier; call reset_classifier(num_classes) and train it")
        self._check_mode()
        return self(pixels).float()

    @staticmethod
    def energy(logits: Tensor) -> Tensor:
        """The energy -logsumexp(logits) of each image, (B,): higher for many images unlike the training images.

        After Liu et al. 2020 (arXiv 2010.03759), at temperature 1. docs/calibration.md says what it does not promise.
        """
        return -logits.logsumexp(dim=-1)

    def decode(self, logits: Tensor, top_k: int = TOP_K) -> list[list[Prediction]]:
        """Logits (B, num_classes) -> the `top_k` most probable classes of each image, with calibrated probabilities."""
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}; it must be 1 or more")
        probabilities = (logits / self.calibration.temperature).softmax(dim=-1)
        values, indices = probabilities.topk(min(top_k, self.num_classes))
        return [
            [
                Prediction(self.class_name(i), p, i, rejected=p < self.calibration.min_probability)
                for p, i in zip(row_values, row_indices, strict=True)
            ]
            for row_values, row_indices in zip(values.tolist(), indices.tolist(), strict=True)
        ]


class MultilabelClassifier(Predictor, MobileViT):
    """A `MobileViT` with a probability and a threshold for each class; see `load_multilabel`.

    `model(pixels)` is the network: RGB float images (B, 3, H, W) -> logits (B, num_classes). The probability of a class
    is the sigmoid of its logit.
    """

    task: TaskName = "multilabel"
    preprocessing: Preprocessing = PREPROCESSING["multilabel"]
    thresholds: tuple[float, ...] = ()  # by class index; empty: `LABEL_THRESHOLD` for all classes

    @classmethod
    def from_weights(cls, weights: Weights) -> Self:
        model = super().from_weights(weights)
        model.thresholds = weights.thresholds
        return model

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a newly initialized one, without class names and thresholds."""
        self._class_names = self.thresholds = ()
        super().reset_classifier(num_classes)

    @overload
    def predict(self, images: ImageInput, score_threshold: float | None = None) -> list[Prediction]: ...
    @overload
    def predict(self, images: Sequence[ImageInput], score_threshold: float | None = None) -> list[list[Prediction]]: ...
    def predict(
        self, images: ImageInput | Sequence[ImageInput], score_threshold: float | None = None
    ) -> list[Prediction] | list[list[Prediction]]:
        """The classes of one image, most probable first and possibly none, or a list of them for several images.

        These are the classes whose probability is at least their threshold; `score_threshold` (0 to 1) replaces the
        thresholds of all classes.
        """
        predictions = self.predict_pixels(*self._read_all(images), score_threshold)
        return predictions[0] if _is_one(images) else predictions

    @torch.inference_mode()
    def predict_pixels(
        self, pixels: Tensor, sizes: Sequence[Size] = (), score_threshold: float | None = None
    ) -> list[list[Prediction]]:
        """The classes of each preprocessed image of a batch (B, 3, H, W); see `predict`. `sizes` is not used."""
        if score_threshold is not None and not 0 <= score_threshold <= 1:
            raise ValueError(f"score_threshold is {score_threshold}; it must be from 0 to 1")
        self._check_mode()
        thresholds = self.thresholds if score_threshold is None else (score_threshold,) * self.num_classes
        thresholds = thresholds or (LABEL_THRESHOLD,) * self.num_classes
        return [
            [
                Prediction(self.class_name(i), row[i], i)
                for i in sorted(range(len(row)), key=row.__getitem__, reverse=True)
                if row[i] >= thresholds[i]
            ]
            for row in self(pixels).float().sigmoid().tolist()
        ]


class Detector(Predictor, SSDLite):
    """An `SSDLite` with preprocessing and class names; see `load_detector`.

    `model(pixels)` is the network: RGB float images (B, 3, H, W) -> class logits and locations of all anchors. Class 0
    of the logits is the background, which has no class index and no name here.
    """

    task: TaskName = "detect"
    preprocessing: Preprocessing = PREPROCESSING["detect"]
    category_ids: tuple[int, ...] = ()  # of the classes in COCO annotations; empty if unknown

    @classmethod
    def from_weights(cls, weights: Weights) -> Self:
        model = super().from_weights(weights)
        model.category_ids = weights.category_ids
        return model

    def reset_classes(self, num_classes: int) -> None:
        """Replace the classifiers by newly initialized ones; class names are unknown until they are set."""
        super().reset_classes(num_classes)
        self.class_names = self.category_ids = ()

    @overload
    def predict(
        self, images: ImageInput, score_threshold: float = SCORE_THRESHOLD, max_per_image: int = MAX_PER_IMAGE
    ) -> list[Detection]: ...
    @overload
    def predict(
        self, images: Sequence[ImageInput], score_threshold: float = SCORE_THRESHOLD, max_per_image: int = MAX_PER_IMAGE
    ) -> list[list[Detection]]: ...
    def predict(
        self,
        images: ImageInput | Sequence[ImageInput],
        score_threshold: float = SCORE_THRESHOLD,
        max_per_image: int = MAX_PER_IMAGE,
    ) -> list[Detection] | list[list[Detection]]:
        """The objects in one image, highest score first, or a list of them for several images.

        At most `max_per_image` objects with a score above `score_threshold` (0 to 1).
        """
        detections = self.predict_pixels(*self._read_all(images), score_threshold, max_per_image)
        return detections[0] if _is_one(images) else detections

    @torch.inference_mode()
    def predict_pixels(
        self,
        pixels: Tensor,
        sizes: Sequence[Size],
        score_threshold: float = SCORE_THRESHOLD,
        max_per_image: int = MAX_PER_IMAGE,
    ) -> list[list[Detection]]:
        """The objects in each preprocessed image of a batch (B, 3, H, W).

        `sizes` are the (width, height) of the upright images before preprocessing; boxes are in these pixels.
        """
        if not 0 <= score_threshold <= 1:
            raise ValueError(f"score_threshold is {score_threshold}; it must be from 0 to 1")
        if max_per_image < 1:
            raise ValueError(f"max_per_image is {max_per_image}; it must be 1 or more")
        self._check_mode()
        self._check_whole_image()
        detections = self._detect(pixels, score_threshold, max_per_image)
        return [
            [
                Detection(self.class_name(label), score, label, box)
                for label, score, box in zip(
                    one.labels.tolist(), one.scores.tolist(), _in_pixels(one.boxes, size), strict=True
                )
                if box[0] < box[2] and box[1] < box[3]  # not entirely outside the image
            ]
            for one, size in zip(detections, sizes, strict=True)
        ]

    def _detect(self, pixels: Tensor, score_threshold: float, max_per_image: int) -> list[Detections]:
        class_logits, locations = self(pixels)
        anchors = self.anchors(*pixels.shape[-2:])
        return detect(class_logits, locations, anchors, score_threshold=score_threshold, max_per_image=max_per_image)


class Segmenter(Predictor, DeepLabV3):
    """A `DeepLabV3` with preprocessing and class names; see `load_segmenter`.

    `model(pixels)` is the network: RGB float images (B, 3, H, W) -> logits (B, num_classes, H, W).
    """

    task: TaskName = "segment"
    preprocessing: Preprocessing = PREPROCESSING["segment"]

    def reset_classes(self, num_classes: int) -> None:
        """Replace the classifiers by newly initialized ones; class names are unknown until they are set."""
        super().reset_classes(num_classes)
        self.class_names = ()

    @overload
    def predict(self, images: ImageInput) -> np.ndarray: ...
    @overload
    def predict(self, images: Sequence[ImageInput]) -> list[np.ndarray]: ...
    def predict(self, images: ImageInput | Sequence[ImageInput]) -> np.ndarray | list[np.ndarray]:
        """The class index of every pixel of one image, uint8 (H, W), or a list of them for several images."""
        masks = self.predict_pixels(*self._read_all(images))
        return masks[0] if _is_one(images) else masks

    @torch.inference_mode()
    def predict_pixels(self, pixels: Tensor, sizes: Sequence[Size]) -> list[np.ndarray]:
        """The class indices, uint8 (height, width), of each preprocessed image of a batch (B, 3, H, W).

        `sizes` are the (width, height) of the upright images before preprocessing, and of the masks.
        """
        if self.num_classes > 256:
            raise ValueError(f"this network has {self.num_classes} classes; a uint8 mask has at most 256")
        self._check_mode()
        self._check_whole_image()
        masks = []
        for coarse, size in zip(self.coarse(pixels).float(), sizes, strict=True):
            # A class whose logits are below those of another class at every position is also below it after
            # interpolation. Few classes remain.
            flat = coarse.flatten(1)
            classes = [c for c, logits in enumerate(flat) if not (flat > logits).all(dim=1).any()]
            best = _resized_argmax(self._resize(coarse[None, classes], pixels)[0], size)
            masks.append(np.array(classes, np.uint8)[best.cpu().numpy()])
        return masks


def _in_pixels(boxes: Tensor, size: Size) -> list[tuple[float, float, float, float]]:
    """Boxes (n, 4) in relative coordinates -> in pixels, clipped to the image."""
    clipped = boxes.cpu().clamp(0, 1) * torch.tensor(size * 2)
    return [(x1, y1, x2, y2) for x1, y1, x2, y2 in clipped.tolist()]


def _resized_argmax(maps_CHW: Tensor, size: Size) -> Tensor:
    """The argmax over C, uint8 (height, width), of maps resized to `size`."""

    # One map at a time: 21 maps at the size of a 12-megapixel image need a gigabyte. `align_corners` is False because
    # the image was resized that way; the head's own setting does not matter here.
    def resized(c: int) -> Tensor:
        return F.interpolate(maps_CHW[None, None, c], size=size[::-1], mode="bilinear", align_corners=False)[0, 0]

    highest = resized(0)
    argmax = torch.zeros_like(highest, dtype=torch.uint8)
    for c in range(1, len(maps_CHW)):
        logits = resized(c)
        argmax[logits > highest] = c
        highest = torch.maximum(highest, logits)
    return argmax


def _is_one(images: ImageInput | Sequence[ImageInput]) -> TypeGuard[ImageInput]:
    if isinstance(images, str | os.PathLike | Image.Image | np.ndarray):
        return True
    if isinstance(images, list | tuple):
        return False
    raise TypeError(f"found {type(images).__name__}; give a path, a PIL image or a uint8 array, or a list of them")


# ---------------------------------------------------------------------------------------------------------------------
# Load and save

PREDICTORS: dict[TaskName, type[Classifier | MultilabelClassifier | Detector | Segmenter]] = {
    "classify": Classifier,
    "multilabel": MultilabelClassifier,
    "detect": Detector,
    "segment": Segmenter,
}
_LOADERS: dict[TaskName, str] = {
    "classify": "load",
    "multilabel": "load_multilabel",
    "detect": "load_detector",
    "segment": "load_segmenter",
}
AnyPredictor = TypeVar("AnyPredictor", bound=Predictor)


def load(
    source: str | os.PathLike[str],
    *,
    download: bool = False,
    num_classes: int | None = None,
    output_stride: int | None = None,
    device: str = "cpu",
    self_check: bool = True,
) -> Classifier:
    """A classifier in eval mode, from a hub id, a file or a folder of any of the four formats.

    Args:
        source: see `mobilevit.weights.read`.
        download: download a hub id that is not in the local cache.
        num_classes: the expected number of classes; `reset_classifier` changes it.
        output_stride: replaces that of the weights.
        device: of the model.
        self_check: on another device than the CPU, first compare a batch with the CPU; see `mobilevit.self_check`.

    Raises:
        WeightsError: see `mobilevit.weights.read`; also weights of another task, or another number of classes.
        DeviceError: the device computes other results than the CPU.

    Examples:
        >>> model = mobilevit.load("apple/mobilevit-small", download=True)
        >>> model.predict("cat.jpg")[0].class_name
    """
    return _to_device(_load(Classifier, source, download, num_classes, output_stride), device, self_check)


def load_multilabel(
    source: str | os.PathLike[str], *, download: bool = False, num_classes: int | None = None, device: str = "cpu"
) -> MultilabelClassifier:
    """A multi-label classifier in eval mode; arguments and errors as for `load`.

    Examples:
        >>> model = mobilevit.load_multilabel("runs/photos/model.safetensors")
        >>> [label.class_name for label in model.predict("beach.jpg")]
    """
    return _load(MultilabelClassifier, source, download, num_classes).to(device)


def load_detector(
    source: str | os.PathLike[str],
    *,
    download: bool = False,
    num_classes: int | None = None,
    device: str = "cpu",
    self_check: bool = True,
) -> Detector:
    """A detector in eval mode; arguments and errors as for `load`.

    Examples:
        >>> model = mobilevit.load_detector("runs/coco/model.safetensors")
        >>> model.predict("street.jpg")[0].box
    """
    return _to_device(_load(Detector, source, download, num_classes), device, self_check)


def load_segmenter(
    source: str | os.PathLike[str],
    *,
    download: bool = False,
    num_classes: int | None = None,
    output_stride: int | None = None,
    device: str = "cpu",
    self_check: bool = True,
) -> Segmenter:
    """A segmentation network in eval mode; arguments and errors as for `load`.

    Examples:
        >>> model = mobilevit.load_segmenter("apple/deeplabv3-mobilevit-small", download=True)
        >>> model.predict("street.jpg").shape
    """
    return _to_device(_load(Segmenter, source, download, num_classes, output_stride), device, self_check)


def _load(
    kind: type[AnyPredictor],
    source: str | os.PathLike[str],
    download: bool,
    num_classes: int | None,
    output_stride: int | None = None,
) -> AnyPredictor:
    weights = read(source, download=download, num_classes=num_classes)
    if weights.task != kind.task:
        raise WeightsError(
            f"{os.fspath(source)}: weights for the task {weights.task!r}, not {kind.task!r}; load them with "
            f"mobilevit.{_LOADERS[weights.task]}"
        )
    return kind.from_weights(weights if output_stride is None else replace(weights, output_stride=output_stride))


def _to_device(model: AnyPredictor, device: str, self_check: bool) -> AnyPredictor:
    model = model.to(device)
    if self_check:
        check_device(model, model.preprocessing.crop_px)
    return model


def load_backbone(
    source: str | os.PathLike[str],
    *,
    out_stages: Iterable[str] | str = ("stage1", "stage2", "stage3", "stage4", "stage5"),
    output_stride: int | None = None,
    download: bool = False,
) -> Backbone:
    """A pretrained `Backbone` in eval mode, from weights of any task.

    `source` and `download` as for `load`, the other arguments as for `Backbone`.
    """
    weights = read(source, download=download)
    backbone = Backbone(
        weights.architecture, out_stages=out_stages, output_stride=output_stride or weights.output_stride
    )
    tensors = backbone_tensors(weights)
    backbone.load_state_dict({key: tensors[key] for key in backbone.state_dict()})
    return backbone.eval()


def save(model: MobileViT | SSDLite | DeepLabV3, path: str | os.PathLike[str], format: Format = "mobilevit") -> None:
    """Write a network in one of the four formats, with preprocessing and class names if it is a `Predictor`.

    Raises:
        WeightsError: `format` cannot express this network, or `path` has the wrong ending for it.
    """
    if isinstance(model, Predictor):
        task: TaskName = model.task
    else:
        task = next(name for name, network in NETWORKS.items() if isinstance(model, network))
    write(
        Weights(
            architecture=model.architecture,
            tensors=model.state_dict(),
            preprocessing=model.preprocessing if isinstance(model, Predictor) else PREPROCESSING[task],
            class_names=model.class_names if isinstance(model, Predictor) else (),
            output_stride=model.backbone.output_stride,
            task=task,
            head=model.head if isinstance(model, DeepLabV3) else None,
            category_ids=model.category_ids if isinstance(model, Detector) else (),
            thresholds=model.thresholds if isinstance(model, MultilabelClassifier) else (),
            calibration=model.calibration if isinstance(model, Classifier) else UNCALIBRATED,
        ),
        path,
        format,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Many images

Result = TypeVar("Result")


@dataclass(frozen=True)
class ImageResult(Generic[Result]):
    """The prediction for an image file.

    `result` is an `ImageError` if the file cannot be read. `image` is the decoded image, or None if it cannot be read
    or is too large to be stored.
    """

    path: Path
    result: Result | ImageError
    image: Image.Image | None

    def value(self) -> Result:
        """The prediction.

        Raises:
            ImageError: the file could not be read.
        """
        if isinstance(self.result, ImageError):
            raise self.result
        return self.result

    def decoded(self) -> Image.Image:
        """The decoded image; read again if it was not stored. Errors as for `read_image`."""
        return read_image(self.path) if self.image is None else self.image


def predict_images(
    model: Predictor,
    paths: Sequence[Path],
    predict: Callable[[Tensor, Sequence[Size]], list[Result]],
    *,
    batch_size: int = PREDICT_BATCH_SIZE,
) -> Iterator[ImageResult[Result]]:
    """Predictions for many image files, in order. Files are decoded in threads, one batch ahead.

    `predict` is `model.predict_pixels`, or calls it with other options.

    Examples:
        >>> for one in predict_images(model, find_images(["photos"]), model.predict_pixels):
        ...     print(one.path, one.result)
    """
    if batch_size < 1:
        raise ValueError(f"batch size is {batch_size}; it must be 1 or more")
    max_pixels = MAX_DECODED_MEGAPIXELS * 1e6 / max(1, min(batch_size, len(paths)))

    def read_one(path: Path) -> tuple[Tensor, Size, Image.Image | None] | ImageError:
        try:
            image = read_image(path)
        except ImageError as error:
            return error
        is_stored = image.width * image.height <= max_pixels
        return model._pixels(image), image.size, image if is_stored else None

    with ThreadPoolExecutor() as pool:
        ahead = pool.map(read_one, paths[:batch_size])
        for start in range(0, len(paths), batch_size):
            end = start + batch_size
            images, ahead = list(ahead), pool.map(read_one, paths[end : end + batch_size])
            readable = [one for one in images if not isinstance(one, ImageError)]
            results: Iterator[Result] = iter(())
            if readable:
                pixels, sizes, _ = zip(*readable, strict=True)
                results = iter(predict(model._batch(pixels), sizes))
            for path, one in zip(paths[start:end], images, strict=True):
                if isinstance(one, ImageError):
                    yield ImageResult(path, one, None)
                else:
                    yield ImageResult(path, next(results), one[2])
