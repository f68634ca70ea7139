"""Images in, class names, boxes or masks out: networks that can read an image and name what they see.

Three kinds of weights, three classes: `Classifier` says what an image shows, `Detector` where each thing is,
`Segmenter` what every pixel belongs to. Where things are is told in pixels of the image as a person sees it, upright
and of its own size, whatever the network was shown.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeGuard, TypeVar, cast, overload

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mobilevit.images import ImageError, ImageInput, Preprocessing, read_image
from mobilevit.models.deeplabv3 import DeepLabV3
from mobilevit.models.mobilevit import Backbone, MobileViT
from mobilevit.models.ssdlite import Detections, SSDLite, detect
from mobilevit.weights import (
    NETWORKS,
    PREPROCESSING,
    Format,
    TaskName,
    Weights,
    WeightsError,
    backbone_tensors,
    read,
    write,
)

# (width, height) of an image in pixels.
Size = tuple[int, int]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Prediction:
    """One class, with the probability (0 to 1) that the network gives it."""

    class_name: str
    probability: float
    class_index: int


@dataclass(frozen=True)
class Detection:
    """One thing found: its class, the probability (0 to 1) that the network gives it, and where it is.

    `box` is (x1, y1, x2, y2) in pixels of the upright image: (0, 0) is its upper left corner, (width, height) its
    lower right one, and the box lies within.
    """

    class_name: str
    score: float
    class_index: int
    box: tuple[float, float, float, float]


class Predictor(nn.Module):
    """What `Classifier`, `Detector` and `Segmenter` have in common: they can read images, and know their classes."""

    task: TaskName
    preprocessing: Preprocessing
    class_names: tuple[str, ...] = ()

    def preprocess(self, images: ImageInput | Sequence[ImageInput]) -> Tensor:
        """One image or several (paths, PIL images, uint8 arrays) -> (B, 3, crop_px, crop_px) on the model's device.

        Raises:
            ImageError: an image that cannot be read, by name.
            ValueError: no images.
        """
        return self._read_all(images)[0]

    def class_name(self, index: int) -> str:
        """The name of a class, or "class 7" where nobody named the classes."""
        return self.class_names[index] if self.class_names else f"class {index}"

    def _read_all(self, images: ImageInput | Sequence[ImageInput]) -> tuple[Tensor, list[Size]]:
        several = [images] if _is_one(images) else cast(Sequence[ImageInput], images)
        if not len(several):
            raise ValueError("no images are given; preprocess takes one or several")
        return self._batch([self._read(image) for image in several])

    def _read(self, source: ImageInput) -> tuple[Tensor, Size]:
        """What the network is to see of an image (3, crop_px, crop_px), and the size of the image itself."""
        image = read_image(source)
        return self.preprocessing(image), image.size

    def _batch(self, read: Sequence[tuple[Tensor, Size]]) -> tuple[Tensor, list[Size]]:
        pixels, sizes = zip(*read, strict=True)
        return torch.stack(pixels).to(next(self.parameters())), list(sizes)

    def _check_mode(self) -> None:
        if self.training:
            raise RuntimeError("the model is in training mode; call model.eval() before predicting")

    def _check_warp(self) -> None:
        """What is found in the whole image, warped to a square, can be told in its own pixels by two factors."""
        p = self.preprocessing
        if p.resize_px != (p.crop_px, p.crop_px):
            raise ValueError(
                f"resize_px is {p.resize_px} and crop_px {p.crop_px}; this network has to see whole images: set "
                f"preprocessing to resize_px=({p.crop_px}, {p.crop_px}) and train with that"
            )


class Classifier(Predictor, MobileViT):
    """A `MobileViT` that knows its preprocessing and its class names; `load` makes one.

    `model(pixels)` is the network: RGB float images (B, 3, H, W) -> logits (B, num_classes).
    """

    task = "classify"
    preprocessing: Preprocessing = PREPROCESSING["classify"]

    def reset_classifier(self, num_classes: int) -> None:
        """Put a newly initialised classifier in place; its classes have no names until `class_names` is set."""
        super().reset_classifier(num_classes)
        self.class_names = ()

    @overload
    def predict(self, images: ImageInput, top_k: int = 5) -> list[Prediction]: ...
    @overload
    def predict(self, images: Sequence[ImageInput], top_k: int = 5) -> list[list[Prediction]]: ...
    def predict(
        self, images: ImageInput | Sequence[ImageInput], top_k: int = 5
    ) -> list[Prediction] | list[list[Prediction]]:
        """The `top_k` most likely classes of one image, likeliest first, or of each of several images."""
        predictions = self.predict_pixels(self.preprocess(images), top_k)
        return predictions[0] if _is_one(images) else predictions

    @torch.inference_mode()
    def predict_pixels(self, pixels: Tensor, top_k: int = 5) -> list[list[Prediction]]:
        """The `top_k` most likely classes of each of a batch of preprocessed images (B, 3, H, W)."""
        if not self.num_classes:
            raise ValueError("this network has no classifier, so it can name nothing; give it one and train it")
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}; it must be 1 or more")
        self._check_mode()
        probabilities = self(pixels).float().softmax(dim=-1)
        values, indices = probabilities.topk(min(top_k, self.num_classes))
        return [
            [Prediction(self.class_name(i), p, i) for p, i in zip(row_values, row_indices, strict=True)]
            for row_values, row_indices in zip(values.tolist(), indices.tolist(), strict=True)
        ]


class Detector(Predictor, SSDLite):
    """An `SSDLite` that knows its preprocessing and its class names; `load_detector` makes one.

    `model(pixels)` is the network: RGB float images (B, 3, H, W) -> class logits and locations of all anchors. The
    background, class 0 of the logits, is no class here.
    """

    task = "detect"
    preprocessing: Preprocessing = PREPROCESSING["detect"]
    category_ids: tuple[int, ...] = ()  # those of the classes in COCO's annotations, where somebody said

    def reset_classes(self, num_classes: int) -> None:
        """Make room for new classes; they have no names until `class_names` is set."""
        super().reset_classes(num_classes)
        self.class_names = self.category_ids = ()

    @overload
    def predict(
        self, images: ImageInput, score_threshold: float = 0.3, max_per_image: int = 100
    ) -> list[Detection]: ...
    @overload
    def predict(
        self, images: Sequence[ImageInput], score_threshold: float = 0.3, max_per_image: int = 100
    ) -> list[list[Detection]]: ...
    def predict(
        self, images: ImageInput | Sequence[ImageInput], score_threshold: float = 0.3, max_per_image: int = 100
    ) -> list[Detection] | list[list[Detection]]:
        """What is in one image and where, best first, or in each of several images.

        Shown is what has a score above `score_threshold` (0 to 1), at most `max_per_image` of it.
        """
        found = self.predict_pixels(*self._read_all(images), score_threshold, max_per_image)
        return found[0] if _is_one(images) else found

    @torch.inference_mode()
    def predict_pixels(
        self, pixels: Tensor, sizes: Sequence[Size], score_threshold: float = 0.3, max_per_image: int = 100
    ) -> list[list[Detection]]:
        """What is in each of a batch of preprocessed images (B, 3, H, W); boxes are in pixels of `sizes`.

        `sizes` are the (width, height) that the upright images had before they were preprocessed.
        """
        if not 0 <= score_threshold <= 1:
            raise ValueError(f"score_threshold is {score_threshold}; it must be from 0 to 1")
        if max_per_image < 1:
            raise ValueError(f"max_per_image is {max_per_image}; it must be 1 or more")
        self._check_mode()
        self._check_warp()
        found = self._find(pixels, score_threshold, max_per_image)
        return [
            [
                Detection(self.class_name(label), score, label, box)
                for label, score, box in zip(
                    one.labels.tolist(), one.scores.tolist(), _in_pixels(one.boxes, size), strict=True
                )
                if box[0] < box[2] and box[1] < box[3]  # beside the image there is nothing to show
            ]
            for one, size in zip(found, sizes, strict=True)
        ]

    def _find(self, pixels: Tensor, score_threshold: float, max_per_image: int) -> list[Detections]:
        class_logits, locations = self(pixels)
        height, width = pixels.shape[-2:]
        return detect(
            class_logits,
            locations,
            self.anchors(height, width),
            score_threshold=score_threshold,
            max_per_image=max_per_image,
        )


class Segmenter(Predictor, DeepLabV3):
    """A `DeepLabV3` that knows its preprocessing and its class names; `load_segmenter` makes one.

    `model(pixels)` is the network: RGB float images (B, 3, H, W) -> logits (B, num_classes, H, W).
    """

    task = "segment"
    preprocessing: Preprocessing = PREPROCESSING["segment"]

    def reset_classes(self, num_classes: int) -> None:
        """Put newly initialised classifiers in place; their classes have no names until `class_names` is set."""
        super().reset_classes(num_classes)
        self.class_names = ()

    @overload
    def predict(self, images: ImageInput) -> np.ndarray: ...
    @overload
    def predict(self, images: Sequence[ImageInput]) -> list[np.ndarray]: ...
    def predict(self, images: ImageInput | Sequence[ImageInput]) -> np.ndarray | list[np.ndarray]:
        """The class number of every pixel of one image, uint8 (H, W) of its own size, or of each of several."""
        masks = self.predict_pixels(*self._read_all(images))
        return masks[0] if _is_one(images) else masks

    @torch.inference_mode()
    def predict_pixels(self, pixels: Tensor, sizes: Sequence[Size]) -> list[np.ndarray]:
        """The classes, uint8 (height, width), of each of a batch of preprocessed images (B, 3, H, W).

        `sizes` are the (width, height) that the upright images had before they were preprocessed.
        """
        if self.num_classes > 256:
            raise ValueError(f"this network knows {self.num_classes} classes; a mask of bytes holds at most 256")
        self._check_mode()
        self._check_warp()
        masks = []
        for coarse, size in zip(self.coarse(pixels).float(), sizes, strict=True):
            # A class that another one beats in every pixel is beaten between them too: few are left to be enlarged.
            flat = coarse.flatten(1)
            classes = [c for c, logits in enumerate(flat) if not (flat > logits).all(dim=1).any()]
            places = _highest(self._resize(coarse[None, classes], pixels)[0], size)
            masks.append(np.array(classes, np.uint8)[places.cpu().numpy()])
        return masks


def _in_pixels(boxes: Tensor, size: Size) -> list[tuple[float, float, float, float]]:
    """Boxes (found, 4) in units of the image -> in pixels, clipped to the image."""
    clipped = boxes.cpu().clamp(0, 1) * torch.tensor(size * 2)
    return [(x1, y1, x2, y2) for x1, y1, x2, y2 in clipped.tolist()]


def _highest(maps_CHW: Tensor, size: Size) -> Tensor:
    """Which of these maps, enlarged to `size`, is highest in every pixel, uint8 (height, width)."""

    # Map by map: 21 of them enlarged to an image of 12 megapixels would be a gigabyte. By the middles of pixels, as
    # the image was warped, whatever the head does: `align_corners` is the network's own.
    def enlarge(c: int) -> Tensor:
        return F.interpolate(maps_CHW[None, None, c], size=size[::-1], mode="bilinear", align_corners=False)[0, 0]

    best = enlarge(0)
    places = torch.zeros_like(best, dtype=torch.uint8)
    for c in range(1, len(maps_CHW)):
        one = enlarge(c)
        places[one > best] = c
        best = torch.maximum(best, one)
    return places


def _is_one(images: ImageInput | Sequence[ImageInput]) -> TypeGuard[ImageInput]:
    if isinstance(images, str | os.PathLike | Image.Image | np.ndarray):
        return True
    if isinstance(images, list | tuple):
        return False
    raise TypeError(f"found {type(images).__name__}; an image is a path, a PIL image or a uint8 array, several a list")


PREDICTORS: dict[TaskName, type[Predictor]] = {"classify": Classifier, "detect": Detector, "segment": Segmenter}
LOADERS: dict[TaskName, str] = {"classify": "load", "detect": "load_detector", "segment": "load_segmenter"}


def load(
    source: str | os.PathLike[str],
    *,
    download: bool = False,
    num_classes: int | None = None,
    output_stride: int | None = None,
    device: str = "cpu",
) -> Classifier:
    """A classifier in eval mode, from a hub id, a file or a folder: Apple's, timm's, transformers' or our format.

    See `mobilevit.weights.read` for what `source` can be and what is raised. `num_classes` is a check: weights
    with another number are an error (`reset_classifier` puts a new classifier in place). `output_stride` replaces the
    one that the weights were trained with. Weights of another task are an error that names the function for them.

    >>> model = mobilevit.load("apple/mobilevit-small", download=True)
    >>> model.predict("cat.jpg")[0].class_name
    """
    weights = _read_for("classify", source, download, num_classes)
    if output_stride is not None:
        weights = replace(weights, output_stride=output_stride)
    return classifier(weights).to(device)


def load_detector(
    source: str | os.PathLike[str], *, download: bool = False, num_classes: int | None = None, device: str = "cpu"
) -> Detector:
    """A detector in eval mode; arguments and errors as of `load`.

    >>> model = mobilevit.load_detector("runs/coco/model.safetensors")
    >>> model.predict("street.jpg")[0].box
    """
    return detector(_read_for("detect", source, download, num_classes)).to(device)


def load_segmenter(
    source: str | os.PathLike[str],
    *,
    download: bool = False,
    num_classes: int | None = None,
    output_stride: int | None = None,
    device: str = "cpu",
) -> Segmenter:
    """A segmentation network in eval mode; arguments and errors as of `load`.

    >>> model = mobilevit.load_segmenter("apple/deeplabv3-mobilevit-small", download=True)
    >>> model.predict("street.jpg").shape
    """
    weights = _read_for("segment", source, download, num_classes)
    if output_stride is not None:
        weights = replace(weights, output_stride=output_stride)
    return segmenter(weights).to(device)


def load_backbone(
    source: str | os.PathLike[str],
    *,
    out_stages: Iterable[str] | str = ("stage1", "stage2", "stage3", "stage4", "stage5"),
    output_stride: int | None = None,
    download: bool = False,
) -> Backbone:
    """A pretrained `Backbone` in eval mode, for a head of your own.

    `source` as in `load`, but of any task, else as in `Backbone`.
    """
    weights = read(source, download=download)
    backbone = Backbone(
        weights.architecture, out_stages=out_stages, output_stride=output_stride or weights.output_stride
    )
    tensors = backbone_tensors(weights)
    backbone.load_state_dict({key: tensors[key] for key in backbone.state_dict()})
    return backbone.eval()


def classifier(weights: Weights) -> Classifier:
    """A classifier in eval mode with these weights."""
    return _described(weights.build(Classifier), weights)


def detector(weights: Weights) -> Detector:
    """A detector in eval mode with these weights."""
    model = _described(weights.build(Detector), weights)
    model.category_ids = weights.category_ids
    return model


def segmenter(weights: Weights) -> Segmenter:
    """A segmentation network in eval mode with these weights."""
    return _described(weights.build(Segmenter), weights)


Described = TypeVar("Described", bound=Predictor)


def _described(model: Described, weights: Weights) -> Described:
    model.preprocessing, model.class_names = weights.preprocessing, weights.class_names
    return model


def _read_for(task: TaskName, source: str | os.PathLike[str], download: bool, num_classes: int | None) -> Weights:
    weights = read(source, download=download, num_classes=num_classes)
    if weights.task != task:
        raise WeightsError(
            f"{os.fspath(source)}: weights to {weights.task}, not to {task}; load them with "
            f"mobilevit.{LOADERS[weights.task]}"
        )
    return weights


def save(model: MobileViT | SSDLite | DeepLabV3, path: str | os.PathLike[str], format: Format = "mobilevit") -> None:
    """Write a network in one of the four formats, with its preprocessing and class names where it is a `Predictor`.

    Raises:
        WeightsError: `format` cannot express this network, or `path` has the wrong ending for it.
    """
    task: TaskName = next(task for task, network in NETWORKS.items() if isinstance(model, network))
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
        ),
        path,
        format,
    )


def predict_images(
    model: Classifier, paths: Sequence[Path], *, top_k: int = 5, batch_size: int = 16
) -> Iterator[tuple[Path, list[Prediction] | ImageError]]:
    """Predictions of many images in their order; an image that cannot be read gives its error instead."""
    return _of_many(model, paths, batch_size, lambda pixels, sizes: model.predict_pixels(pixels, top_k))


def detect_images(
    model: Detector,
    paths: Sequence[Path],
    *,
    score_threshold: float = 0.3,
    max_per_image: int = 100,
    batch_size: int = 16,
) -> Iterator[tuple[Path, list[Detection] | ImageError]]:
    """What is found in many images, in their order; an image that cannot be read gives its error instead."""
    return _of_many(
        model,
        paths,
        batch_size,
        lambda pixels, sizes: model.predict_pixels(pixels, sizes, score_threshold, max_per_image),
    )


def segment_images(
    model: Segmenter, paths: Sequence[Path], *, batch_size: int = 16
) -> Iterator[tuple[Path, np.ndarray | ImageError]]:
    """Masks of many images in their order; an image that cannot be read gives its error instead."""
    return _of_many(model, paths, batch_size, model.predict_pixels)


def _of_many(
    model: Predictor,
    paths: Sequence[Path],
    batch_size: int,
    predict: Callable[[Tensor, list[Size]], list[Result]],
) -> Iterator[tuple[Path, Result | ImageError]]:
    """What `predict` makes of images read ahead; it is given pixels (B, 3, H, W) and the images' own sizes."""
    if batch_size < 1:
        raise ValueError(f"batch size is {batch_size}; it must be 1 or more")

    def read_one(path: Path) -> tuple[Tensor, Size] | ImageError:
        try:
            return model._read(path)
        except ImageError as error:
            return error

    starts = range(0, len(paths), batch_size)
    with ThreadPoolExecutor() as pool:
        # One batch is read while the one before is predicted; a million images need no more memory than two batches.
        def submit(start: int) -> list[Future[tuple[Tensor, Size] | ImageError]]:
            return [pool.submit(read_one, path) for path in paths[start : start + batch_size]]

        ahead = submit(0)
        for start in starts:
            images, ahead = [future.result() for future in ahead], submit(start + batch_size)
            whole = [one for one in images if not isinstance(one, ImageError)]
            predicted = iter(predict(*model._batch(whole)) if whole else ())
            for path, one in zip(paths[start : start + batch_size], images, strict=True):
                yield path, one if isinstance(one, ImageError) else next(predicted)
