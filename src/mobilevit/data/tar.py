"""Tar shards as WebDataset defines them."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from mobilevit.data.class_sets import labels_of, split_of_labels
from mobilevit.data.samples import Split
from mobilevit.images import ImageError
from mobilevit.messages import first_line

BLOCK_BYTES = 512  # a tar file is a sequence of blocks
LABEL_SUFFIXES = (".cls", ".json")
LABEL_KEYS = ("label", "cls", "class", "class_name", "labels", "tags")  # in a .json file


@dataclass(frozen=True)
class TarImages:
    """Images in tar files, located by shard, offset and size in bytes.

    No file stays open: each read opens its shard. So processes can fork, and the index can be pickled.
    """

    shards: tuple[Path, ...]
    shard: np.ndarray  # index of the shard; arrays, because forked processes share their memory
    offset: np.ndarray
    size: np.ndarray
    keys: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> bytes:
        return self.read(index)

    def read(self, index: int, max_bytes: int | None = None) -> bytes:
        """The bytes of an image, or the first `max_bytes` of them. Raises ImageError if the shard cannot be read."""
        size = int(self.size[index])
        try:
            with self.shards[self.shard[index]].open("rb", buffering=0) as file:
                file.seek(int(self.offset[index]))
                return file.read(size if max_bytes is None else min(size, max_bytes))
        except OSError as error:
            raise ImageError(f"{self.name(index)}: cannot be read ({(error.strerror or str(error)).lower()})") from None

    def key(self, index: int) -> str:
        return f"{self.shards[self.shard[index]].name}/{self.keys[index]}"

    def name(self, index: int) -> str:
        return f"{self.shards[self.shard[index]]}/{self.keys[index]}"


@dataclass
class _Entry:
    """The files of one key: the location of the image, the contents of the label."""

    offset: int = -1
    size: int = 0
    suffixes: tuple[str, ...] = ()
    cls: bytes | None = None
    json: bytes | None = None


def read_tars(
    shards: Sequence[Path], location: str, class_names: tuple[str, ...] | None, *, multilabel: bool = False
) -> Split:
    """Images of tar files and their labels, from one pass over the headers.

    Files with the same name up to the first dot form a sample: one image, and its label in a .cls file (class index or
    name) or in a .json file (an object with one of `LABEL_KEYS`). Other files are ignored. With `multilabel`, an image
    has any number of labels: a list in the .json file, or one text with separators.

    Raises:
        ValueError: a file that is not an uncompressed tar or is truncated, a label without an image, two images or
            labels for one key; without `multilabel`, several labels for one image.
    """
    places: list[tuple[int, int, int]] = []
    keys: list[str] = []
    labels: list[tuple[str, ...] | None] = []
    several: list[str] = []
    for i, shard in enumerate(shards):
        for key, entry in _read_headers(shard).items():
            if entry.offset >= 0:
                places.append((i, entry.offset, entry.size))
                keys.append(key)
                name = f"{shard}/{key}"
                of_image = _labels(entry, name)
                if not multilabel and of_image is not None and len(of_image) > 1:
                    several.append(f"{name}: {'|'.join(of_image)}")
                labels.append(of_image)
            elif entry.cls is not None:
                suffixes = ", ".join(entry.suffixes)
                raise ValueError(f"{shard}/{key}: has a label but no image (found {suffixes}); add or remove it")
    if not keys:
        raise ValueError(f"{location}: no images in the tar; expected pairs like 0001.jpg and 0001.cls")
    if several:
        raise ValueError(
            f"{location}: {len(several):,} of {len(keys):,} images have several labels (first: {several[0]}); train "
            "them with the recipe multilabel (compare and inspect: --task multilabel), or keep one label of each"
        )
    columns = np.array(places, np.int64).T.copy()
    images = TarImages(tuple(shards), *columns, keys=tuple(keys))
    if multilabel:
        return split_of_labels(location, images, labels, class_names, multilabel=True)
    return Split(location, images, [_single(of_image) for of_image in labels], class_names)


def _read_headers(shard: Path) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    image_suffixes = {suffix for suffix, format in Image.registered_extensions().items() if format in Image.OPEN}
    with shard.open("rb") as file:
        refuse_compressed(shard, file.read(6))
        length = file.seek(0, 2)
        file.seek(0)
        end = 0
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (info := tar.next()) is not None:
                    tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue] - a kilobyte for each file
                    end = tar.offset
                    path = PurePosixPath(info.name)
                    stem, _, suffix = path.name.partition(".")
                    if not info.isreg() or not stem or end > length:
                        continue
                    suffix = "." + suffix.lower()
                    if suffix not in LABEL_SUFFIXES and suffix not in image_suffixes:
                        continue
                    entry = entries.setdefault(str(path.with_name(stem)), _Entry())
                    if suffix in entry.suffixes or (suffix in image_suffixes and entry.offset >= 0):
                        raise ValueError(f"{shard}: {info.name} is a duplicate for its key; rename or remove it")
                    entry.suffixes += (suffix,)
                    if suffix in image_suffixes:
                        entry.offset, entry.size = info.offset_data, info.size
                        continue
                    file.seek(info.offset_data)
                    if suffix == ".cls":
                        entry.cls = file.read(info.size)
                    else:
                        entry.json = file.read(info.size)
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(f"{shard}: damaged tar file ({first_line(error)}); download or pack it again") from None
        # tarfile treats the end of the file, and anything that is not a header, as the end of the archive.
        file.seek(end)
        if end > length or file.read(BLOCK_BYTES) != bytes(BLOCK_BYTES):
            raise ValueError(
                f"{shard}: truncated tar file, without end-of-archive block after {len(entries):,} keys; download or "
                "pack it again"
            )
    return entries


def _labels(entry: _Entry, name: str) -> tuple[str, ...] | None:
    """The labels of an image; None if it has no file with labels, or one without any of `LABEL_KEYS`."""
    if entry.cls is not None:
        try:
            return tuple(filter(None, [entry.cls.decode().strip()]))
        except UnicodeDecodeError:
            raise ValueError(f"{name}.cls: not UTF-8 text; write the class index or the class name") from None
    if entry.json is None:
        return None
    try:
        values = json.loads(entry.json)
    except ValueError as error:
        raise ValueError(f"{name}.json: not JSON ({first_line(error)}); fix it") from None
    key = next((key for key in LABEL_KEYS if key in values), None) if isinstance(values, dict) else None
    if key is None:
        return None
    labels = labels_of(values[key])
    if labels is None:
        raise ValueError(f"{name}.json: {key} is {values[key]!r}; it must be a class index, a class name or a list")
    return labels


def _single(labels: tuple[str, ...] | None) -> int | str | None:
    """The only label as a class index or a class name."""
    label = labels[0] if labels else None
    is_index = label is not None and label.removeprefix("-").isdecimal() and label.isascii()
    return int(label) if label is not None and is_index else label


def refuse_compressed(file: Path, start: bytes = b"") -> None:
    """Raise ValueError if the name or the first bytes are those of a compressed file."""
    magic = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
    suffixes = {".gz": "gunzip", ".tgz": "gunzip", ".bz2": "bunzip2", ".xz": "unxz", ".zst": "unzstd"}
    by_content = next((tool for prefix, tool in magic.items() if start.startswith(prefix)), None)
    tool = suffixes.get(file.suffix.lower()) or by_content
    if tool:
        raise ValueError(f"{file}: a compressed tar has no random access to its images; uncompress it with {tool}")


def is_compressed_tar(file: Path) -> bool:
    """Whether the file name ends like that of a compressed tar."""
    return file.name.lower().endswith((".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst"))
