"""Pictures in, class names out: a network together with what it needs to read a picture and to name what it sees."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mobilevit.models.mobilevit import MobileViT
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
        several = [pictures] if isinstance(pictures, str | os.PathLike | Image.Image | np.ndarray) else pictures
        if not len(several):
            raise ValueError("no pictures are given; preprocess takes one or several")
        return torch.stack([self.preprocessing(picture) for picture in several]).to(next(self.parameters()))

    def predict(self, picture: Picture, top_k: int = 5) -> list[Prediction]:
        """The `top_k` most likely classes of one picture, likeliest first."""
        return self.predict_pixels(self.preprocess(picture), top_k)[0]

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


def load(
    source: str | os.PathLike[str], *, download: bool = False, num_classes: int | None = None, device: str = "cpu"
) -> Classifier:
    """A classifier in eval mode, from a hub id, a file or a folder: Apple's, timm's, transformers' or our format.

    See `mobilevit.models.weights.read` for what `source` can be and what is raised.

    >>> model = mobilevit.load("apple/mobilevit-small", download=True)
    >>> model.predict("cat.jpg")[0].class_name
    """
    return classifier(read(source, download=download, num_classes=num_classes)).to(device)


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
