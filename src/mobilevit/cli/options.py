"""Options that several commands share, and what resolves their values."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from mobilevit.defaults import MAX_MEGAPIXELS
from mobilevit.export_options import ARTIFACT_SUFFIXES

if TYPE_CHECKING:
    from mobilevit.images import Preprocessing
    from mobilevit.weights import Weights
from mobilevit.cli.console import warn

WEIGHTS = "a file (ours, Apple's, timm's), a folder in transformers' layout, or a hub id such as apple/mobilevit-small"


ARTIFACTS = tuple(ARTIFACT_SUFFIXES.values())


OR_RUN = "or a run folder, of which model.safetensors is read: the averaged weights of the last epoch"


SomeWeights = Annotated[
    str, tyro.conf.Positional, tyro.conf.arg(metavar="WEIGHTS", help=f"Weights: {WEIGHTS}; {OR_RUN}.")
]


Download = Annotated[bool, tyro.conf.arg(help="Fetch a hub id that is not in the local cache.")]


Device = Annotated[str, tyro.conf.arg(help="Where to compute: auto, cpu, cuda, cuda:1, mps.")]


MaxMegapixels = Annotated[
    float, tyro.conf.arg(help="Largest image file to read, width times height in millions of pixels.")
]


NumThreads = Annotated[int | None, tyro.conf.arg(help="CPU threads to compute with; unless given, PyTorch's default.")]


def some_images(names: tuple[str, ...], number: int = 256) -> list[Any]:
    """The images that `names` stand for: files, folders and patterns, or, evenly over it, a data set for training."""
    from mobilevit.data.sources import find_splits
    from mobilevit.images import find_images, read_image

    limit_megapixels()
    if len(names) == 1:
        data = expand_data(names[0])
        try:
            return list(find_images([data]))
        except ValueError:
            if not data.startswith("hf:") and not Path(data).exists():
                raise
        try:
            source = find_splits(data, val_fraction=0.1)[0]
        except ValueError as error:
            if Path(data).is_dir() and not any(Path(data).iterdir()):
                raise ValueError(f"{names[0]}: no images in this folder") from None
            raise error
        number = min(number, len(source))
        samples = [source[i * len(source) // number] for i in range(number)]
        return [read_image(sample.image, sample.name) for sample in samples]
    return list(find_images(names))


def weights_of_run(name: str) -> list[str]:
    """What a run left, if `name` is its folder: the averaged weights of the last epoch and the raw ones."""
    folder = expand(Path(name))
    if not (folder / "run.json").is_file():
        return [name]
    found = [str(folder / file) for file in ("model.safetensors", "raw.safetensors") if (folder / file).is_file()]
    if not found:
        raise ValueError(f"{name}: this run has no weights yet; the first are there after its first epoch")
    return found


def read_weights(source: str, download: bool) -> Weights:
    """Weights of a file, a folder or a hub id; of a run folder, its model.safetensors."""
    from mobilevit.weights import read

    return read(weights_of_run(source)[0], download=download)


def artifact_name(source: str) -> str:
    """Name for artifacts: of the run folder or the weights file; "" where that does not tell weights apart."""
    path = expand(Path(source))
    if (path / "run.json").is_file():
        return path.resolve().name
    if not path.is_file():
        return ""
    if path.stem not in ("model", "raw", "best", "pytorch_model"):
        return path.stem
    if not path.with_name("run.json").is_file():
        return ""
    return path.resolve().parent.name + ("" if path.stem == "model" else f"_{path.stem}")


def expand(path: Path) -> Path:
    """With the home folder for a leading ~, which no shell sees to in --data=~/photos."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path's own stops at a folder called ~photos


def expand_data(data: str) -> str:
    return data if data.startswith("hf:") or "://" in data else str(expand(Path(data)))


def limit_megapixels(max_megapixels: float = MAX_MEGAPIXELS) -> None:
    from mobilevit.images import limit_megapixels

    if not max_megapixels > 0:
        raise ValueError(f"max megapixels is {max_megapixels}; it must be above 0")
    limit_megapixels(max_megapixels)


def use_threads(num_threads: int | None) -> None:
    from mobilevit.device import use_threads

    use_threads(num_threads)


def choose_device(name: str) -> str:
    from mobilevit.device import choose_device

    return choose_device(name)


def warn_of_assumptions(source: str, weights: Weights) -> None:
    if not weights.described:
        p = weights.preprocessing
        names = {"classify": "ImageNet", "detect": "COCO", "segment": "PASCAL VOC"}[weights.task]
        warn(
            f"{source}: says nothing of its input; assumed is what was published: {_resized(p)}"
            + (f", {names}'s class names" if weights.class_names else ", and no class names")
        )


def warn_of_transparency(weights: Weights) -> None:
    """Tell whoever writes the preprocessing on a device what happens to transparency, if training met any."""
    if num := weights.training.get("num_transparent"):
        warn(
            f"{num:,} of the training images have an alpha channel or a transparent color; training composited them on "
            f"{weights.preprocessing.background}, and your own preprocessing must do the same (Pillow's convert('RGB') "
            "does not)"
        )


def _resized(p: Preprocessing) -> str:
    """How an image becomes a square."""
    if isinstance(p.resize_px, int):
        return f"short side to {p.resize_px} px {p.interpolation}, middle {p.crop_px} px"
    height, width = p.resize_px
    warped = f"the whole image to {width} x {height} px {p.interpolation}"
    return warped if height == width == p.crop_px else f"{warped}, middle {p.crop_px} px"
