"""Checks of image headers and annotation sizes before training starts."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from mobilevit.data.python_data import DatasetImages
from mobilevit.data.samples import Source
from mobilevit.data.tar import TarImages
from mobilevit.images import BACKGROUND, Header, ImageError, read_header
from mobilevit.messages import join_names

HEAD_BYTES = 1 << 16  # contain the header of nearly every image
LARGE_MEGAPIXELS = 50  # a warning gives the cost of decoding images above this
# Measured decoding speed of one core in training, where JPEG is decoded at a reduced scale.
JPEG_MEGAPIXELS_PER_SECOND = 400
OTHER_MEGAPIXELS_PER_SECOND = 50
CHUNK = 256  # images per task of the thread pool


@dataclass
class Scan:
    """Results of reading image headers."""

    unreadable: list[str] = field(default_factory=list)  # error messages
    mismatches: list[str] = field(default_factory=list)  # error messages: annotations of another size
    num_transparent: int = 0
    large: list[tuple[str, Header]] = field(default_factory=list)  # names and headers

    def merge(self, other: Scan) -> None:
        self.unreadable += other.unreadable
        self.mismatches += other.mismatches
        self.num_transparent += other.num_transparent
        self.large += other.large

    def notes(self) -> list[str]:
        """Lines for the log of a training run."""
        notes = []
        if self.num_transparent:
            notes.append(f"images with transparency: {self.num_transparent:,}; composited on {BACKGROUND}")
        if self.large:
            largest = sorted(self.large, key=lambda one: -one[1].megapixels)
            names = join_names(f"{name} ({header.megapixels:,.0f} megapixels)" for name, header in largest)
            seconds = sum(header.megapixels / _speed(header) for _, header in largest)
            notes.append(
                f"images above {LARGE_MEGAPIXELS} megapixels: {len(largest):,}; decoding them takes about "
                f"{math.ceil(seconds):,} s of one core per epoch: {names}; to avoid it, downscale them: "
                'mogrify -resize "2048x2048>" FILE... (ImageMagick, in place), or see docs/training.md'
            )
        return notes


def _speed(header: Header) -> float:
    return JPEG_MEGAPIXELS_PER_SECOND if header.format == "JPEG" else OTHER_MEGAPIXELS_PER_SECOND


def check_images(*sources: Source[Any], max_unreadable: int = 0) -> Scan:
    """Read the header of every image, and compare its size with that of its annotation.

    This reads the first bytes of files and tar members, but whole images of tables. Truncated images and wrong values
    in masks are found later, when they are read; so are the images of a dataset in Python that returns pixels, because
    it may not allow threads. Up to `max_unreadable` images may be unreadable or too large.

    Raises:
        ImageError: more unreadable images, or annotations of another size; names five of them.
    """
    scan = Scan()
    with ThreadPoolExecutor() as pool:
        for source in sources:
            if isinstance(source.images, DatasetImages):
                continue
            # In chunks: a task for each of a million images would fill the memory.
            ranges = (range(start, min(start + CHUNK, len(source))) for start in range(0, len(source), CHUNK))
            for of_chunk in pool.map(partial(_scan, source), ranges):
                scan.merge(of_chunk)
    if len(scan.unreadable) > max_unreadable:
        raise ImageError(
            f"{_first_five(scan.unreadable)}; replace the files under the same names, or skip them with "
            f"--max-unreadable {len(scan.unreadable)}"
        )
    if scan.mismatches:
        raise ImageError(_first_five(scan.mismatches))
    return scan


def _first_five(errors: Sequence[str]) -> str:
    return "; ".join(errors[:5]) + (f"; and {len(errors) - 5} more" if len(errors) > 5 else "")


def _scan(source: Source[Any], indices: Iterable[int]) -> Scan:
    scan = Scan()
    for i in indices:
        try:
            name, header = _read_header(source, i)
        except ImageError as error:
            scan.unreadable.append(str(error))
            continue
        scan.num_transparent += header.has_transparency
        if header.megapixels > LARGE_MEGAPIXELS:
            scan.large.append((name, header))
        label = source.labels[i]
        if not isinstance(label, int) and (mismatch := label.mismatch(name, header.size)):
            scan.mismatches.append(mismatch)
    return scan


def _read_header(source: Source[Any], index: int) -> tuple[str, Header]:
    if isinstance(source.images, TarImages):
        i = source.index_of_image(index)
        name = source.images.name(i)
        with contextlib.suppress(ImageError):  # reading the whole image reports it
            return name, read_header(source.images.read(i, HEAD_BYTES), name)
    sample = source[index]
    return sample.name, read_header(sample.image, sample.name)
