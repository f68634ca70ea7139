"""Images without labels, each decoded once and cropped many times."""

from __future__ import annotations

import logging
import math
import os
import tempfile
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from mobilevit.data.samples import ImageFiles, Source, divide
from mobilevit.images import ImageError, find_images, read_image

logger = logging.getLogger(__name__)
CHUNK = 64  # images that are decoded before they are written


@dataclass(frozen=True)
class Slot:
    """Where the pixels of an image are in the file of `DecodedImages`."""

    offset: int
    height: int
    width: int


class DecodedImages:
    """The `Images` of files, of which the first ones are decoded: uint8 (H, W, 3) in one memory-mapped file.

    Worker processes share the pixels through the page cache of the system. The file is deleted with this object.
    """

    def __init__(self, images: ImageFiles, slots: Sequence[Slot | None], file: Path):
        self.images, self._slots, self._file = images, slots, file
        self._pixels: np.memmap | None = None
        weakref.finalize(self, _remove, file, os.getpid())

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> np.ndarray | Path:
        slot = self._slots[index]
        if slot is None:
            return self.images[index]
        if self._pixels is None:  # on first use, in each worker
            self._pixels = np.memmap(self._file, np.uint8, "r")
        end = slot.offset + slot.height * slot.width * 3
        return self._pixels[slot.offset : end].reshape(slot.height, slot.width, 3)

    def key(self, index: int) -> str:
        return self.images.key(index)

    def name(self, index: int) -> str:
        return self.images.name(index)

    def __getstate__(self) -> dict[str, object]:  # for workers that are spawned instead of forked
        return {**vars(self), "_pixels": None}


def _remove(file: Path, process: int) -> None:
    if os.getpid() == process:  # not in a forked worker
        file.unlink(missing_ok=True)


def find_unlabeled(
    data: str | Path, val_fraction: float, class_names: tuple[str, ...]
) -> tuple[Source[int], Source[int]]:
    """Training and validation images of a folder, with subfolders, or of one image file. All labels are 0.

    `class_names` are those of the teacher. The validation split is `val_fraction` of the images, chosen as `divide`
    does. A single image is in both splits.

    Raises:
        ValueError: no images.
    """
    if not Path(data).exists():
        raise ValueError(f"{data}: no such folder; give a folder of images")
    files = tuple(find_images([str(data)]))
    root = Path(data) if Path(data).is_dir() else Path(data).parent
    source = Source(ImageFiles(files, root), (0,) * len(files), class_names)
    if len(files) == 1:
        note = f"{data}: one image only, so validation uses other crops of the same image"
        return replace(source, notes=(note,)), source
    train, val = divide(source, val_fraction, data)
    note = f"{data}: {len(val):,} of {len(source):,} images are used for validation"
    return replace(train, notes=(note,)), val


def repeat(source: Source[int], num: int) -> Source[int]:
    """`source` with each image `num` times in a row: an epoch uses that many crops of it."""
    return source if num == 1 else source.subset([i for i in range(len(source)) for _ in range(num)])


def decode_once(source: Source[int], *, min_px: int, max_bytes: float) -> Source[int]:
    """`source` with decoded images, as long as they fit into `max_bytes`; the other images remain files.

    Images whose short side exceeds `min_px` are reduced to it. Unreadable images remain files, too, so that reading
    them reports the error. Which images are decoded depends on the images and the arguments only.
    """
    if max_bytes <= 0:
        return source
    images = source.images
    assert isinstance(images, ImageFiles)
    used = sorted({source.index_of_image(i) for i in range(len(source))})
    slots: list[Slot | None] = [None] * len(images)
    for file in Path(tempfile.gettempdir()).glob("mobilevit-*-*.pixels"):  # of killed processes
        process = file.name.split("-")[1]
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            file.unlink(missing_ok=True)
    handle, name = tempfile.mkstemp(prefix=f"mobilevit-{os.getpid()}-", suffix=".pixels")
    decoded_images = DecodedImages(images, slots, Path(name))
    offset = 0
    with os.fdopen(handle, "wb") as file, ThreadPoolExecutor() as pool:
        chunks = (used[start : start + CHUNK] for start in range(0, len(used), CHUNK))
        decoded = chain.from_iterable(pool.map(partial(_decode, images, min_px), chunk) for chunk in chunks)
        for index, pixels in zip(used, decoded, strict=True):
            if pixels is None:
                continue
            if offset + pixels.nbytes > max_bytes:
                break
            file.write(pixels.data)
            slots[index] = Slot(offset, *pixels.shape[:2])
            offset += pixels.nbytes
    num = sum(slot is not None for slot in slots)
    logger.info(f"decoded {num:,} of {len(used):,} images once, {offset / 1e6:,.0f} MB; crops are cut from the pixels")
    return replace(source, images=decoded_images) if num else source


def _decode(images: ImageFiles, min_px: int, index: int) -> np.ndarray | None:
    try:
        image = read_image(images[index], images.name(index))
    except ImageError:
        return None
    factor = min(image.size) / min_px
    if factor > 1:
        size = (max(1, round(image.width / factor)), max(1, round(image.height / factor)))
        image = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=3)
    return np.array(image)


def cached_short_side(size_px: int, min_scale: float) -> int:
    """Short side in pixels from which the smallest square crop still has `size_px`: no crop loses detail."""
    return math.ceil(size_px / math.sqrt(min_scale))
