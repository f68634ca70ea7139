"""idx files, the format of MNIST."""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from mobilevit.data.samples import Split, Splits, read_class_names
from mobilevit.messages import first_line


@dataclass(frozen=True)
class ImageArray:
    """Images in memory, uint8 (N, H, W) or (N, H, W, channels)."""

    pixels: np.ndarray
    location: str

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.pixels[index]

    def key(self, index: int) -> str:
        return str(index)

    def name(self, index: int) -> str:
        return f"{self.location}[{index}]"


def idx_splits(folder: Path) -> Splits:
    """Images and labels under their usual names (train-images-idx3-ubyte, t10k-...), gzipped or not.

    Raises:
        ValueError: images without labels, or labels without images.
    """
    splits: dict[str, partial[Split]] = {}
    for split, prefixes in (("train", ("train",)), ("test", ("t10k", "test"))):
        for prefix in prefixes:
            images = _idx_file(folder, f"{prefix}-images", (3, 4))
            labels = _idx_file(folder, f"{prefix}-labels", (1,))
            if (images is None) != (labels is None):
                missing = f"{prefix}-images-idx3-ubyte" if images is None else f"{prefix}-labels-idx1-ubyte"
                raise ValueError(f"{images or labels}: {missing} or {missing}.gz is missing; put it beside this file")
            if images is not None and labels is not None:
                splits.setdefault(split, partial(_read_split, images, labels))
    return splits


def _idx_file(folder: Path, stem: str, num_axes: tuple[int, ...]) -> Path | None:
    names = (f"{stem}{mark}idx{n}-ubyte{gz}" for n in num_axes for mark in "-." for gz in ("", ".gz"))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read_split(images: Path, labels: Path) -> Split:
    pixels, indices = read_idx_file(images), read_idx_file(labels)
    if pixels.ndim == 4 and pixels.shape[3] == 1:
        pixels = pixels[..., 0]
    if pixels.ndim not in (3, 4) or 0 in pixels.shape[1:] or (pixels.ndim == 4 and pixels.shape[3] not in (3, 4)):
        raise ValueError(
            f"{images}: shape is {pixels.shape}; expected (images, height, width) or (images, height, width, channels) "
            "with 1, 3 or 4 channels"
        )
    if indices.ndim != 1 or len(pixels) != len(indices):
        raise ValueError(
            f"{images}: {len(pixels)} images, but the labels in {labels.name} have shape {indices.shape}; use images "
            "and labels of the same dataset"
        )
    return Split(str(images), ImageArray(pixels, str(images)), indices.tolist(), read_class_names(images.parent))


def read_idx_file(file: Path) -> np.ndarray:
    """The array in an idx file of unsigned bytes, gzipped or not. Raises ValueError."""
    data = file.read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{file}: damaged gzip file ({first_line(error)}); download it again") from None
    # Two zeros, the type (8: unsigned bytes), the number of axes, then their lengths as big-endian 32-bit integers.
    if len(data) < 4 or data[:3] != b"\0\0\x08" or not data[3]:
        start = data[:4].hex(" ") or "nothing"
        raise ValueError(f"{file}: starts with {start}; an idx file of unsigned bytes starts with 00 00 08")
    start = 4 + 4 * data[3]
    shape = tuple(int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4))
    if len(data) != start + math.prod(shape):
        raise ValueError(
            f"{file}: {len(data):,} bytes do not match the shape {shape}; the file may be truncated, download it again"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
