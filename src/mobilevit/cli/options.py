"""Options that several commands share."""

from __future__ import annotations

import gc
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import tyro

from mobilevit.cli.console import warn
from mobilevit.defaults import MAX_MEGAPIXELS, MIN_SIZE_PX

if TYPE_CHECKING:
    from mobilevit.images import Preprocessing
    from mobilevit.teacher import TeacherNetwork
    from mobilevit.weights import Weights

WEIGHTS = (
    "a file (of mobilevit, Apple or timm), a folder (of transformers), or a Hugging Face hub id such as "
    "apple/mobilevit-small"
)
RUN_FOLDER = "or a run folder, for its model.safetensors (EMA weights of the last epoch)"

FLAT: Any = tyro.conf.arg(name="")
"""On a nested dataclass: the names of its options have no prefix."""
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
"""A switch: only the name that changes the default exists, --json or --no-open."""

SELF_CHECK: Any = tyro.conf.arg(
    help="On another device than the CPU, do not compare a batch of synthetic images with the CPU first."
)


def choices(literal: Any) -> str:
    """The metavar of an option with the values of a `Literal`."""
    return "{" + ",".join(get_args(literal)) + "}"


WeightsArgument = Annotated[
    str, tyro.conf.Positional, tyro.conf.arg(metavar="WEIGHTS", help=f"Weights: {WEIGHTS}; {RUN_FOLDER}.")
]


@dataclass(frozen=True)
class WeightsOptions:
    """How weights are read."""

    download: Flag = False
    """Download weights from the Hugging Face hub if they are not in the local cache."""

    def read(self, name: str) -> Weights:
        """Weights of a file, a folder, a hub id, or a run folder."""
        import_torch()
        from mobilevit.weights import read

        return read(weights_of_run(name)[0], download=self.download)

    def read_teacher(self, name: str) -> TeacherNetwork:
        """As `read`, or a classifier of another library."""
        import_torch()
        from mobilevit.teacher import read_teacher

        return read_teacher(weights_of_run(name)[0], download=self.download)

    def read_for_inference(self, name: str) -> Weights:
        """As `read`, with a warning if the preprocessing is assumed."""
        weights = self.read(name)
        warn_of_assumptions(name, weights)
        return weights


@dataclass(frozen=True)
class DeviceOptions:
    """Where the network runs."""

    device: str = "auto"
    """Device: cpu, cuda, cuda:1, mps, or auto for the first available of cuda, mps and cpu."""
    num_threads: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Number of CPU threads. Default: that of PyTorch."""

    def set_threads(self) -> None:
        require_positive("--num-threads", self.num_threads)
        import_torch()
        from mobilevit.device import use_threads

        use_threads(self.num_threads)

    def apply(self) -> str:
        """Set the number of threads, and return the name of an available device."""
        self.set_threads()
        from mobilevit.device import choose_device

        return choose_device(self.device)


@dataclass(frozen=True)
class ImageOptions:
    """How images are read."""

    max_megapixels: float = MAX_MEGAPIXELS
    """Largest image to read, in megapixels (width x height / 1,000,000)."""

    def apply(self) -> None:
        """Set the limit."""
        from mobilevit.images import limit_megapixels

        require(self.max_megapixels > 0, "--max-megapixels", self.max_megapixels, "above 0")
        limit_megapixels(self.max_megapixels)


@dataclass(frozen=True)
class SampleImages:
    """Images that an exported network is verified on."""

    images: Annotated[tuple[str, ...], tyro.conf.arg(metavar="IMAGE...")] = ()
    """Real images to verify the exported network on, and to calibrate int8: files, folders, patterns, or a dataset as
    for mobilevit train. Default: synthetic images."""
    image_options: Annotated[ImageOptions, FLAT] = ImageOptions()

    def read(self) -> list[Any]:
        """At most 256 images of a dataset; all images of files, folders and patterns."""
        from mobilevit.data.sources import SHARD_SUFFIXES, find_splits, task_of_any_labels
        from mobilevit.data.tables import is_label_file
        from mobilevit.images import find_images, read_image

        self.image_options.apply()
        if len(self.images) != 1:
            return list(find_images(self.images))
        data = expand_data(self.images[0])
        try:
            if not is_label_file(Path(data)) and Path(data).suffix.lower() not in SHARD_SUFFIXES:
                return list(find_images([data]))
        except ValueError:
            if not data.startswith("hf:") and not Path(data).exists():
                raise
        if Path(data).is_dir() and not any(Path(data).iterdir()):
            raise ValueError(f"{data}: no images in this folder")
        source = find_splits(task_of_any_labels(data), data, val_fraction=0.1)[0]
        number = min(256, len(source))
        samples = [source[i * len(source) // number] for i in range(number)]
        return [read_image(sample.image, sample.name) for sample in samples]


def require_positive(name: str, *values: int | None) -> None:
    for value in values:
        require(value is None or value >= 1, name, value, "1 or more")


def require(holds: bool, name: str, value: object, range_: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value}; it must be {range_}")


def height_width(size: tuple[int, ...]) -> tuple[int, int] | None:
    """Input height and width in pixels of an option with one or two values, or None without values."""
    if len(size) > 2 or any(side < MIN_SIZE_PX for side in size):
        value = " ".join(map(str, size))
        raise ValueError(f"--size is {value}; give one number, or height and width, of {MIN_SIZE_PX} px or more")
    return (size[0], size[-1]) if size else None


def weights_of_run(name: str) -> list[str]:
    """If `name` is a run folder, its weights of the last epoch: the EMA weights and the raw weights."""
    folder = expand(Path(name))
    if not (folder / "run.json").is_file():
        return [name]
    found = [str(folder / file) for file in ("model.safetensors", "raw.safetensors") if (folder / file).is_file()]
    if not found:
        raise ValueError(f"{name}: this run has no weights yet; its first epoch has not finished")
    return found


def expand(path: Path) -> Path:
    """Expand a leading ~, which shells leave in --data=~/photos."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path.expanduser fails on a folder called ~photos


def expand_data(data: str) -> str:
    return data if data.startswith("hf:") or "://" in data else str(expand(Path(data)))


def import_torch() -> None:
    """Import torch without garbage collection, which takes a third less time.

    The import creates a million objects that live as long as the process. Frozen, they are not collected at exit.
    """
    if "torch" not in sys.modules:
        gc.disable()
        import torch  # noqa: F401

        gc.freeze()
        gc.enable()


def warn_of_assumptions(source: str, weights: Weights) -> None:
    """Warn if the file does not contain the preprocessing and the class names."""
    if not weights.has_description:
        names = {"detect": "COCO", "segment": "PASCAL VOC"}.get(weights.task, "ImageNet")
        warn(
            f"{source}: does not contain the preprocessing; the published one is assumed: "
            + format_resize(weights.preprocessing)
            + (f", class names of {names}" if weights.class_names else ", no class names")
        )


def warn_of_transparency(weights: Weights) -> None:
    """Warn that preprocessing outside this package must composite transparent images, if training did."""
    if num := weights.training.get("num_transparent"):
        warn(
            f"{num:,} of the training images have an alpha channel or a transparent color; training composited them on "
            f"{weights.preprocessing.background}, and your own preprocessing must do the same (Pillow's convert('RGB') "
            "does not)"
        )


def format_resize(p: Preprocessing) -> str:
    """The resizing and cropping of a preprocessing, as text."""
    if isinstance(p.resize_px, int):
        return f"short side to {p.resize_px} px {p.interpolation}, center crop {p.crop_px} px"
    height, width = p.resize_px
    resized = f"the whole image to {height} x {width} px {p.interpolation}"
    return resized if height == width == p.crop_px else f"{resized}, center crop {p.crop_px} px"
