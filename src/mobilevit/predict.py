"""Pictures in, class names out: a network together with what it needs to read a picture and to name what it sees."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeGuard, cast, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mobilevit.models.mobilevit import Backbone, MobileViT
from mobilevit.models.weights import PAPER_PREPROCESSING, Format, Weights, read, write
from mobilevit.pictures import Picture, PictureError, Preprocessing, picture_files


@dataclass(frozen=True)
class Prediction:
    """One class, with the probability (0 to 1) that the network gives it."""

    class_name: str
    probability: float
    class_index: int


class Classifier(MobileViT):
    """A `MobileViT` that knows its preprocessing and its class names; `load` makes one.

    `model(pixels)` is the network: RGB float pictures (B, 3, H, W) -> logits (B, num_classes).
    """

    preprocessing: Preprocessing = PAPER_PREPROCESSING
    class_names: tuple[str, ...] = ()

    def reset_classifier(self, num_classes: int) -> None:
        """Put a newly initialised classifier in place; its classes have no names until `class_names` is set."""
        super().reset_classifier(num_classes)
        self.class_names = ()

    def preprocess(self, pictures: Picture | Sequence[Picture]) -> Tensor:
        """One picture or several (paths, PIL images, uint8 arrays) -> (B, 3, crop_px, crop_px) on the model's device.

        Raises:
            PictureError: a picture that cannot be read, by name.
            ValueError: no pictures.
        """
        several = [pictures] if _is_one(pictures) else cast(Sequence[Picture], pictures)
        if not len(several):
            raise ValueError("no pictures are given; preprocess takes one or several")
        return torch.stack([self.preprocessing(picture) for picture in several]).to(next(self.parameters()))

    @overload
    def predict(self, pictures: Picture, top_k: int = 5) -> list[Prediction]: ...
    @overload
    def predict(self, pictures: Sequence[Picture], top_k: int = 5) -> list[list[Prediction]]: ...
    def predict(
        self, pictures: Picture | Sequence[Picture], top_k: int = 5
    ) -> list[Prediction] | list[list[Prediction]]:
        """The `top_k` most likely classes of one picture, likeliest first, or of each of several pictures."""
        predictions = self.predict_pixels(self.preprocess(pictures), top_k)
        return predictions[0] if _is_one(pictures) else predictions

    @torch.inference_mode()
    def predict_pixels(self, pixels: Tensor, top_k: int = 5) -> list[list[Prediction]]:
        """The `top_k` most likely classes of each of a batch of preprocessed pictures (B, 3, H, W)."""
        if not self.num_classes:
            raise ValueError("this network has no classifier, so it can name nothing; give it one and train it")
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}; it must be 1 or more")
        if self.training:
            raise RuntimeError("the model is in training mode; call model.eval() before predicting")
        probabilities = self(pixels).float().softmax(dim=-1)
        values, indices = probabilities.topk(min(top_k, self.num_classes))
        return [
            [Prediction(self.class_name(i), p, i) for p, i in zip(row_values, row_indices, strict=True)]
            for row_values, row_indices in zip(values.tolist(), indices.tolist(), strict=True)
        ]

    def class_name(self, index: int) -> str:
        """The name of a class, or "class 7" where nobody named the classes."""
        return self.class_names[index] if self.class_names else f"class {index}"


def _is_one(pictures: Picture | Sequence[Picture]) -> TypeGuard[Picture]:
    if isinstance(pictures, str | os.PathLike | Image.Image | np.ndarray):
        return True
    if isinstance(pictures, list | tuple):
        return False
    raise TypeError(
        f"found {type(pictures).__name__}; a picture is a path, a PIL image or a uint8 array, several a list"
    )


def load(
    source: str | os.PathLike[str],
    *,
    download: bool = False,
    num_classes: int | None = None,
    output_stride: int | None = None,
    device: str = "cpu",
) -> Classifier:
    """A classifier in eval mode, from a hub id, a file or a folder: Apple's, timm's, transformers' or our format.

    See `mobilevit.models.weights.read` for what `source` can be and what is raised. `num_classes` is a check: weights
    with another number are an error (`reset_classifier` puts a new classifier in place). `output_stride` replaces the
    one that the weights were trained with.

    >>> model = mobilevit.load("apple/mobilevit-small", download=True)
    >>> model.predict("cat.jpg")[0].class_name
    """
    weights = read(source, download=download, num_classes=num_classes)
    if output_stride is not None:
        weights = replace(weights, output_stride=output_stride)
    return classifier(weights).to(device)


def load_backbone(
    source: str | os.PathLike[str],
    *,
    out_stages: Iterable[str] | str = ("stage1", "stage2", "stage3", "stage4", "stage5"),
    output_stride: int | None = None,
    download: bool = False,
) -> Backbone:
    """A pretrained `Backbone` in eval mode, for a head of your own; `source` as in `load`, else as in `Backbone`."""
    weights = read(source, download=download)
    backbone = Backbone(
        weights.architecture, out_stages=out_stages, output_stride=output_stride or weights.output_stride
    )
    tensors = {key.removeprefix("backbone."): tensor for key, tensor in weights.tensors.items()}
    backbone.load_state_dict({key: tensors[key] for key in backbone.state_dict()})
    return backbone.eval()


def classifier(weights: Weights) -> Classifier:
    """A classifier in eval mode with these weights."""
    model = weights.build(Classifier)
    assert isinstance(model, Classifier)
    model.preprocessing = weights.preprocessing
    model.class_names = weights.class_names
    return model


def save(model: MobileViT, path: str | os.PathLike[str], format: Format = "mobilevit") -> None:
    """Write a network in one of the four formats, with the preprocessing and class names of a `Classifier`.

    Raises:
        WeightsError: `format` cannot express this network, or `path` has the wrong ending for it.
    """
    write(
        Weights(
            architecture=model.architecture,
            tensors=model.state_dict(),
            preprocessing=model.preprocessing if isinstance(model, Classifier) else PAPER_PREPROCESSING,
            class_names=model.class_names if isinstance(model, Classifier) else (),
            output_stride=model.backbone.output_stride,
        ),
        path,
        format,
    )


def find_pictures(names: Iterable[str]) -> list[Path]:
    """The pictures that files, folders (searched through, hidden ones aside) and globs stand for, each once, in order.

    Raises:
        ValueError: a name that stands for nothing.
    """
    found: dict[Path, None] = {}
    for name in names:
        path = Path(os.path.expanduser(name))  # noqa: PTH111 - Path's own stops at a file called ~cat.jpg
        if path.is_dir():
            matches = picture_files(path)
            if not matches:
                raise ValueError(f"{name}: no pictures in this folder")
        elif path.exists():
            matches = [path]
        else:
            matches = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())  # noqa: PTH207
            if not matches:
                raise ValueError(f"{name}: no such picture, folder or pattern")
        found.update(dict.fromkeys(matches))
    return list(found)


def predict_pictures(
    model: Classifier, paths: Sequence[Path], *, top_k: int = 5, batch_size: int = 16
) -> Iterator[tuple[Path, list[Prediction] | PictureError]]:
    """Predictions of many pictures in their order; a picture that cannot be read gives its error instead."""
    if batch_size < 1:
        raise ValueError(f"batch size is {batch_size}; it must be 1 or more")

    def read_one(path: Path) -> Tensor | PictureError:
        try:
            return model.preprocessing(path)
        except PictureError as error:
            return error

    starts = range(0, len(paths), batch_size)
    with ThreadPoolExecutor() as pool:
        # One batch is read while the one before is predicted; a million pictures need no more memory than two batches.
        def submit(start: int) -> list[Future[Tensor | PictureError]]:
            return [pool.submit(read_one, path) for path in paths[start : start + batch_size]]

        ahead = submit(0)
        for start in starts:
            pictures, ahead = [future.result() for future in ahead], submit(start + batch_size)
            pixels = [one for one in pictures if isinstance(one, Tensor)]
            on_device = torch.stack(pixels).to(next(model.parameters())) if pixels else None
            predicted = iter(model.predict_pixels(on_device, top_k) if on_device is not None else ())
            for path, one in zip(paths[start : start + batch_size], pictures, strict=True):
                yield path, one if isinstance(one, PictureError) else next(predicted)
