"""Images packed in files: idx, as MNIST is published, and the tar shards of WebDataset."""

from __future__ import annotations

import gzip
import json
import math
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from mobilevit.data.samples import Part
from mobilevit.images import ImageError, first_line

BLOCK = 512  # a tar is made of these


def read_class_names(*folders: Path) -> tuple[str, ...] | None:
    """The lines of classes.txt in the first folder that has one: names by class number. None where none has.

    Raises:
        ValueError: a file that is not UTF-8, an empty line, a name that comes twice.
    """
    file = next((folder / "classes.txt" for folder in folders if (folder / "classes.txt").is_file()), None)
    if file is None:
        return None
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text ({first_line(error)}); save it as such") from None
    for i, name in enumerate(names):
        if not name:  # which would move the numbers of all that follow
            raise ValueError(f"{file}: line {i + 1} is empty; name one class a line")
        if name in names[:i]:
            raise ValueError(f"{file}: {name!r} is in line {names.index(name) + 1} and in line {i + 1}; name it once")
    if not names:
        raise ValueError(f"{file}: is empty; name one class a line")
    return tuple(names)


# --- idx --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrays:
    """Images in memory, uint8 (images, H, W) or (images, H, W, channels)."""

    pixels: np.ndarray
    where: str

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.pixels[index]

    def key(self, index: int) -> str:
        """Its number."""
        return str(index)

    def name(self, index: int) -> str:
        """File and number."""
        return f"{self.where}[{index}]"


def idx_files(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Images and labels of each split under one of their usual names, gzipped or not.

    Raises:
        ValueError: images without labels or labels without images.
    """
    found: dict[str, tuple[Path, Path]] = {}
    for split, prefixes in (("train", ("train",)), ("test", ("t10k", "test"))):
        for prefix in prefixes:
            images = _idx_file(folder, f"{prefix}-images", (3, 4))
            labels = _idx_file(folder, f"{prefix}-labels", (1,))
            if (images is None) != (labels is None):
                missing = f"{prefix}-images-idx3-ubyte" if images is None else f"{prefix}-labels-idx1-ubyte"
                raise ValueError(f"{images or labels}: stands alone; put {missing} or {missing}.gz beside it")
            if images is not None and labels is not None:
                found.setdefault(split, (images, labels))
    return found


def read_idx(images: Path, labels: Path) -> Part:
    """A split of idx files; classes.txt beside them names the classes, one a line.

    Raises:
        ValueError: a file that is no such file, is cut short or does not fit the other.
    """
    pixels, numbers = read_idx_file(images), read_idx_file(labels)
    if pixels.ndim == 4 and pixels.shape[3] == 1:
        pixels = pixels[..., 0]
    if pixels.ndim not in (3, 4) or 0 in pixels.shape[1:] or (pixels.ndim == 4 and pixels.shape[3] not in (3, 4)):
        raise ValueError(
            f"{images}: shape {pixels.shape} is not that of images; it must be (images, height, width), with 1, "
            "3 or 4 channels after these, if at all"
        )
    if numbers.ndim != 1 or len(pixels) != len(numbers):
        raise ValueError(
            f"{images}: {len(pixels)} images do not fit labels of shape {numbers.shape} in {labels.name}; "
            "take both from the same place"
        )
    return Part(str(images), Arrays(pixels, str(images)), numbers.tolist(), read_class_names(images.parent))


def read_idx_file(file: Path) -> np.ndarray:
    """The array in an idx file of unsigned bytes, gzipped or not. Raises ValueError."""
    data = file.read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{file}: damaged gzip file ({first_line(error)}); fetch it again") from None
    # Two zeros, the type (8: unsigned bytes), the number of axes, then their lengths, high byte first.
    if len(data) < 4 or data[:3] != b"\0\0\x08" or not data[3]:
        raise ValueError(f"{file}: begins with {data[:4].hex(' ') or 'nothing'}; an idx file of bytes, with 00 00 08")
    start = 4 + 4 * data[3]
    shape = tuple(int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4))
    if len(data) != start + math.prod(shape):
        raise ValueError(
            f"{file}: holds {len(data):,} bytes, which does not fit its shape {shape}; cut short? Fetch it again"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _idx_file(folder: Path, stem: str, num_axes: tuple[int, ...]) -> Path | None:
    names = (f"{stem}{mark}idx{n}-ubyte{gz}" for n in num_axes for mark in "-." for gz in ("", ".gz"))
    return next((folder / name for name in names if (folder / name).is_file()), None)


# --- WebDataset -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Members:
    """Images in tar files, found by their place.

    Nothing is kept open: a read opens its shard, as a folder of images opens its file, so that processes may fork and
    the index be sent to others as it is.
    """

    shards: tuple[Path, ...]
    shard: np.ndarray  # whose number holds the image; arrays, because forked processes share them as they are
    offset: np.ndarray
    size: np.ndarray
    keys: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> bytes:
        return self.read(index)

    def read(self, index: int, most: int | None = None) -> bytes:
        """The bytes of an image, the first `most` of them if given. Raises ImageError where the shard is gone."""
        size = int(self.size[index])
        try:
            with self.shards[self.shard[index]].open("rb", buffering=0) as file:
                file.seek(int(self.offset[index]))
                return file.read(size if most is None else min(size, most))
        except OSError as error:
            raise ImageError(f"{self.name(index)}: cannot be read ({(error.strerror or str(error)).lower()})") from None

    def key(self, index: int) -> str:
        """Shard and key."""
        return f"{self.shards[self.shard[index]].name}/{self.keys[index]}"

    def name(self, index: int) -> str:
        """Shard, with its folder, and key."""
        return f"{self.shards[self.shard[index]]}/{self.keys[index]}"


@dataclass
class _Member:
    """What the files of one key in a shard have told so far."""

    offset: int = -1
    size: int = 0
    endings: tuple[str, ...] = ()
    cls: bytes | None = None
    json: bytes | None = None


def read_tars(shards: Sequence[Path], where: str, class_names: tuple[str, ...] | None) -> Part:
    """Images of tar files and their labels, found in one pass over the headers.

    Files whose names are the same up to the first dot belong together: one image, and its label in a .cls file (a
    number or the name of a class) or in a .json file (an object with "label" or "cls"). Others are passed over.

    Raises:
        ValueError: a file that is no plain tar or is cut short, a label without an image, two images or labels.
    """
    places: list[tuple[int, int, int]] = []
    keys: list[str] = []
    labels: list[int | str | None] = []
    for number, shard in enumerate(shards):
        for key, member in _index(shard).items():
            if member.offset >= 0:
                places.append((number, member.offset, member.size))
                keys.append(key)
                labels.append(_label(member, f"{shard}/{key}"))
            elif member.cls is not None:
                found = ", ".join(member.endings)
                raise ValueError(f"{shard}/{key}: has a label but no image (found {found}); add or remove it")
    table = np.array(places, np.int64).reshape(-1, 3)
    members = Members(tuple(shards), *table.T.copy(), keys=tuple(keys))
    if not keys:
        raise ValueError(f"{where}: no images in the tar; expected pairs like 0001.jpg and 0001.cls")
    return Part(where, members, labels, class_names)


def _index(shard: Path) -> dict[str, _Member]:
    members: dict[str, _Member] = {}
    images = {ending for ending, format in Image.registered_extensions().items() if format in Image.OPEN}
    with shard.open("rb") as file:
        refuse_compressed(shard, file.read(6))
        file.seek(0, 2)
        length = file.tell()
        file.seek(0)
        end = 0
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (info := tar.next()) is not None:
                    tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue] - it keeps all, a kilobyte each
                    end = tar.offset
                    path = PurePosixPath(info.name)
                    stem, _, ending = path.name.partition(".")
                    if not info.isreg() or not stem or end > length:
                        continue
                    ending = "." + ending.lower()
                    if ending not in (".cls", ".json") and ending not in images:
                        continue
                    member = members.setdefault(str(path.with_name(stem)), _Member())
                    if ending in member.endings or (ending in images and member.offset >= 0):
                        raise ValueError(f"{shard}: {info.name} is the second of its kind and key; rename or remove it")
                    member.endings += (ending,)
                    if ending in images:
                        member.offset, member.size = info.offset_data, info.size
                        continue
                    file.seek(info.offset_data)
                    if ending == ".cls":
                        member.cls = file.read(info.size)
                    else:
                        member.json = file.read(info.size)
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(f"{shard}: not a whole tar file ({first_line(error)}); fetch or pack it again") from None
        # tarfile takes the end of the file, and what is no header, for the end of the archive.
        file.seek(end)
        if end > length or file.read(BLOCK) != bytes(BLOCK):
            raise ValueError(
                f"{shard}: breaks off after {len(members):,} keys, without the mark that ends a tar; cut short? "
                "Fetch or pack it again"
            )
    return members


def _label(member: _Member, name: str) -> int | str | None:
    if member.cls is not None:
        try:
            label: object = member.cls.decode().strip()
        except UnicodeDecodeError:
            raise ValueError(f"{name}.cls: not UTF-8 text; write the number or the name of the class") from None
    elif member.json is not None:
        try:
            values = json.loads(member.json)
        except ValueError as error:
            raise ValueError(f"{name}.json: not JSON ({first_line(error)}); mend it") from None
        label = next((values[k] for k in ("label", "cls") if k in values), None) if isinstance(values, dict) else None
        if label is not None and (isinstance(label, bool) or not isinstance(label, int | str)):
            raise ValueError(f"{name}.json: label {label!r} is neither a whole number nor a name")
    else:
        return None
    if isinstance(label, str):
        return int(label) if label.removeprefix("-").isdecimal() and label.isascii() else label or None
    assert label is None or isinstance(label, int)
    return label


def refuse_compressed(file: Path, beginning: bytes = b"") -> None:
    """Raise ValueError where name or beginning say that a tar is compressed."""
    marks = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
    endings = {".gz": "gunzip", ".tgz": "gunzip", ".bz2": "bunzip2", ".xz": "unxz", ".zst": "unzstd"}
    by_name = endings.get(file.suffix.lower())
    remedy = by_name or next((tool for mark, tool in marks.items() if beginning.startswith(mark)), None)
    if remedy:
        raise ValueError(
            f"{file}: compressed, so its images cannot be found by their place (and hardly get smaller); "
            f"uncompress it with {remedy}"
        )


def is_compressed_tar(file: Path) -> bool:
    """By its name."""
    return file.name.lower().endswith((".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst"))
