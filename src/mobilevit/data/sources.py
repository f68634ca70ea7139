"""Where images come from: what is in a place, which part is held out, what can be known to be wrong beforehand."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Generic

from mobilevit.data.archives import (
    Members,
    idx_files,
    is_compressed_tar,
    read_class_names,
    read_idx,
    read_tars,
    refuse_compressed,
)
from mobilevit.data.samples import Label, Labelled, Part, Sample, Source, Subset, few
from mobilevit.data.tables import file_split, hub_splits, read_table, saved_splits
from mobilevit.images import BACKGROUND, Header, ImageError, image_files, images_and_others, read_header

if TYPE_CHECKING:
    from datasets import Dataset

# What the splits are called, and what they are to us.
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val"}
SPLITS |= {"test": "test"}
SHARDS = (".parquet", ".arrow", ".tar")
EXPECTED = (
    "one folder of images for each of two classes or more, or train/ and val/ of those; or idx files, .parquet or "
    ".arrow files, or .tar shards"
)
HEAD_BYTES = 1 << 16  # where the header of nearly every image ends
LARGE_MEGAPIXELS = 50  # of an image, from which the cost of decoding it is worth a warning
# What one core decodes for training, as measured; JPEG is decoded at a reduced scale.
JPEG_MEGAPIXELS_PER_SECOND = 400
OTHER_MEGAPIXELS_PER_SECOND = 50

Parts = dict[str, Callable[[], Part]]


@dataclass(frozen=True)
class Folder(Generic[Label]):
    """Images in files, in folders named after their class say. Below the folder `root` names stay the same.

    `notes` say in a line each what was left out of what was found, or assumed of it, for whoever trains on it to know.
    """

    files: tuple[Path, ...]
    labels: tuple[Label, ...]
    class_names: tuple[str, ...]
    root: Path | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample[Label]:
        file = self.files[index]
        return Sample(file, self.labels[index], str(file))


def find_splits(data: str | Path, val_fraction: float) -> tuple[Source[int], Source[int]]:
    """Training and validation images of `data`, wherever they are kept.

    `data` is one of

    - a folder with a folder of images a class, or with `train/` and `val/` (or `test/`) that hold those;
    - a folder with idx files as MNIST's (train-images-idx3-ubyte, t10k-... and so on, gzipped or not);
    - a folder that `datasets.Dataset.save_to_disk` wrote; .parquet or .arrow files; `hf:owner/name`, a dataset of the
      hub (these need the extra `datasets`);
    - .tar shards of WebDataset.

    Files may lie in `data`, in its `data/`, or in folders named after the splits, and may be named after the splits
    (train-000.tar, validation-00000-of-00001.parquet); or `data` is one such file. classes.txt beside files whose
    labels are numbers names the classes, one a line.

    Data without a validation split are divided: `val_fraction` of every class; see `hold_out`. Hidden files and folders
    are passed over.

    Raises:
        ValueError: nothing or several things found, no label or one out of range, an empty class or only one, a class
            in val that train lacks, too few images to hold some out.
    """
    parts = _find_parts(data)
    if parts is None:
        return _folder_splits(Path(data), val_fraction)
    if "train" not in parts and "all" not in parts:
        raise ValueError(f"{data}: has only the splits {few(list(parts))}; expected one to train on")
    held_out = _held_out(parts)
    if held_out is None:
        check_fraction(val_fraction)
    part = parts["train" if "train" in parts else "all"]()
    class_names = part.own_class_names()
    train = part.source(class_names)
    if held_out is None:
        return hold_out(train, val_fraction, str(data))
    return train, parts[held_out]().source(class_names)


def find_evaluation(
    data: str | Path, class_names: Sequence[str], split: str | None = None, val_fraction: float | None = None
) -> Source[int]:
    """The images that a network with `class_names` is evaluated on: val or else test of `data`, or all of `data`.

    `split` names one: "train", "val", "test", or "all" of data without a validation split. "train" and "val" of such
    data are those that `find_splits` makes with `val_fraction`.

    Classes are matched by name, so that their order may be another, and some may be missing. Where `data` has numbers
    only, and the network has no classes of such names, the numbers are taken for those of the network's classes: there
    is nothing else to go by, and labels beyond them are refused.

    Raises:
        ValueError: as `find_splits`, for a class that is not among `class_names`, and for a split that `data` lacks.
    """
    parts = _find_parts(data)
    if parts is None:
        data = Path(data)
        names = tuple(class_names)
        found = {name: data / name for name in ("train", "val", "test") if (data / name).is_dir()}
        if set(found) <= {"train"}:
            found["all"] = found.pop("train", data)
        readers = {name: partial(_read_folder, folder, names, data) for name, folder in found.items()}
    else:
        if _held_out(parts) is None and "train" in parts:
            parts = {"all": parts["train"]}
        readers = {name: lambda read=read: read().source(class_names) for name, read in parts.items()}
    if split is None:
        split = _held_out(readers) or ("all" if "all" in readers else "train")
    if "all" not in readers or split == "all":
        return readers[check_split(split, readers, data)]()
    train, val = hold_out(readers["all"](), check_divided(split, val_fraction, data), str(data))
    return train if split == "train" else val


def check_split(split: str, found: Iterable[str], data: str | Path) -> str:
    """`split`, if it is among those that were `found`. Raises ValueError where it is not."""
    names = list(found)
    if split not in names:
        raise ValueError(f"{data}: has no split {split!r}; name one of {few(names)} with --split")
    return split


def check_divided(split: str, val_fraction: float | None, data: str | Path) -> float:
    """The fraction by which data without a validation split are divided into "train" and "val".

    Raises:
        ValueError: another split than these, or no fraction.
    """
    if split not in ("train", "val") or val_fraction is None:
        why = "" if split not in ("train", "val") else " of its own, and the weights do not say how to divide it"
        raise ValueError(f"{data}: has no split {split!r}{why}; evaluate all of it with --split all")
    return val_fraction


def held_out_name(data: str | Path) -> str | None:
    """Which split `find_evaluation` takes, "val" or "test"; None where it takes all there is."""
    parts = _find_parts(data)
    if parts is None:
        folder = held_out_folder(Path(data))
        return folder and folder.name
    return _held_out(parts)


def hold_out(source: Source[int], val_fraction: float, where: str) -> tuple[Subset[int], Subset[int]]:
    """Divide `source` into images to train on and to validate on: `val_fraction` of every class, rounded.

    Validated on are those whose keys (name below the data folder; name in the tar; index where there is no name) have
    the smallest hashes. The division is the same wherever the data lie, and each image that is added or removed moves
    at most one other between the splits. Both have an image of every class. `where` is for the error message.

    Raises:
        ValueError: a fraction that is not between 0 and 1, a class of one image.
    """
    check_fraction(val_fraction)
    chances = [chance(key) for key in keys(source)]
    indices_of: list[list[int]] = [[] for _ in source.class_names]
    for i, label in enumerate(source.labels):
        indices_of[label].append(i)
    val: set[int] = set()
    for class_name, indices in zip(source.class_names, indices_of, strict=True):
        if not indices:  # training refuses such data before; in evaluation a class may be missing
            continue
        if len(indices) < 2:
            raise ValueError(
                f"{where}: class {class_name}: one image is too few to train on some and validate on others; add "
                "more or remove the class"
            )
        val.update(smallest(val_fraction, indices, chances))
    train = tuple(i for i in range(len(source)) if i not in val)
    return Subset(source, train), Subset(source, tuple(sorted(val)))


def smallest(fraction: float, indices: Sequence[int], chances: Sequence[float]) -> list[int]:
    """The `fraction` of `indices`, rounded, with the smallest `chances`: at least one of them, and never all."""
    num = min(max(1, round(fraction * len(indices))), len(indices) - 1)
    return sorted(indices, key=lambda i: chances[i])[:num]


def notes_of(source: Source) -> tuple[str, ...]:
    """What was left out of what was found, a line each."""
    base, _ = _unwrap(source, 0)
    return base.notes if isinstance(base, Folder) else ()


def fingerprint(source: Source) -> str:
    """16 hexadecimal digits that tell whether classes, labels or names of images have changed.

    Names are those below the data folder, which may be moved; the pixels are not read.
    """
    digest = hashlib.sha256()
    labels = (str(label) if isinstance(label, int) else label.digest() for label in source.labels)
    for values in (source.class_names, labels, keys(source)):
        for value in values:
            # The length first: two names must not read as another two. A name may be no valid UTF-8.
            encoded = value.encode(errors="surrogateescape")
            digest.update(len(encoded).to_bytes(4, "big") + encoded)
        digest.update(b"\xff" * 4)
    return digest.hexdigest()[:16]


@dataclass
class Scan:
    """What the headers of images say: errors by image, the number of images with transparency, and large images."""

    unreadable: list[str] = field(default_factory=list)
    num_transparent: int = 0
    large: list[tuple[str, Header]] = field(default_factory=list)  # with their names

    def add(self, name: str, header: Header) -> None:
        """Count one image that can be read."""
        self.num_transparent += header.has_transparency
        if header.megapixels > LARGE_MEGAPIXELS:
            self.large.append((name, header))

    def merge(self, other: Scan) -> None:
        """Add what another scan found."""
        self.unreadable += other.unreadable
        self.num_transparent += other.num_transparent
        self.large += other.large

    def notes(self) -> list[str]:
        """Lines for the log of a training run."""
        notes = []
        if self.num_transparent:
            notes.append(
                f"images with transparency: {self.num_transparent:,}; composited on {BACKGROUND} before anything else"
            )
        if self.large:
            worst = sorted(self.large, key=lambda one: -one[1].megapixels)
            names = few([f"{name} ({header.megapixels:,.0f} megapixels)" for name, header in worst])
            seconds = sum(header.megapixels / _rate(header) for _, header in worst)
            notes.append(
                f"images above {LARGE_MEGAPIXELS} megapixels: {len(worst):,}, decoded again in every epoch, which "
                f"takes about {math.ceil(seconds):,} s of one core: {names}; downscaled "
                'copies avoid it: mogrify -resize "2048x2048>" FILE... (ImageMagick, in place), or docs/training.md'
            )
        return notes


def _rate(header: Header) -> float:
    return JPEG_MEGAPIXELS_PER_SECOND if header.format == "JPEG" else OTHER_MEGAPIXELS_PER_SECOND


def check_headers(*sources: Source, max_unreadable: int = 0) -> Scan:
    """Look at the beginning of every image, so that what is none is known before training starts.

    That is quick for files and tars, while tables hand over whole images. At most `max_unreadable` are no images or
    too large. (An image cut short is found when it is read.)

    Raises:
        ImageError: more of them, five by name.
    """
    found = Scan()
    with ThreadPoolExecutor() as pool:
        for source in sources:
            # Some at once: a task for each of a million images would fill the memory.
            ranges = (range(start, min(start + 256, len(source))) for start in range(0, len(source), 256))
            for one in pool.map(partial(_scan, source), ranges):
                found.merge(one)
    refuse_unreadable(found.unreadable, max_unreadable)
    return found


def refuse_unreadable(errors: Sequence[str], max_unreadable: int) -> None:
    """Raise ImageError, with five of the errors, where there are more than `max_unreadable`."""
    if len(errors) > max_unreadable:
        more = f"; and {len(errors) - 5} more" if len(errors) > 5 else ""
        raise ImageError(
            f"{'; '.join(errors[:5])}{more}; replace the files under the same names, or skip them with "
            f"--max-unreadable {len(errors)}"
        )


def _scan(source: Source, indices: Iterable[int]) -> Scan:
    found = Scan()
    for i in indices:
        base, index = _unwrap(source, i)
        if isinstance(base, Labelled) and isinstance(base.images, Members):
            with contextlib.suppress(ImageError):  # said below
                name = base.images.name(index)
                found.add(name, read_header(base.images.read(index, HEAD_BYTES), name))
                continue
        try:
            sample = base[index]
            found.add(sample.name, read_header(sample.image, sample.name))
        except ImageError as error:
            found.unreadable.append(str(error))
    return found


def _unwrap(source: Source, index: int) -> tuple[Source, int]:
    """The same image in the source that a subset, or a subset of one, is taken from."""
    while isinstance(source, Subset):
        source, index = source.source, source.indices[index]
    return source, index


def keys(source: Source) -> Iterator[str]:
    """What tells each image from the others, and stays the same where the data are moved."""
    for i in range(len(source)):
        base, index = _unwrap(source, i)
        if isinstance(base, Folder):
            file = base.files[index]
            yield (file.relative_to(base.root) if base.root else file).as_posix()
        else:
            yield base.images.key(index) if isinstance(base, Labelled) else str(index)


# --- What is in a place -----------------------------------------------------------------------------------------------


def _find_parts(data: str | Path) -> Parts | None:
    """How to read the splits of `data`: "train", "val", "test" or, where it is not divided, "all". None for folders."""
    if str(data).startswith("hf:"):
        return _table_parts(str(data), hub_splits(str(data)))
    data = Path(data)
    refuse_other_data(data)
    if data.is_file():
        refuse_compressed(data)
        ending = data.suffix.lower()
        if ending not in SHARDS:
            raise ValueError(f"{data}: neither a folder nor one of the files {', '.join(SHARDS)}")
        return _shard_parts(data.parent, ending, {"all": [data]}, str(data))
    if not data.is_dir():
        raise ValueError(f"{data}: no such folder")

    files = list(_files(data))
    found: dict[str, Callable[[], Parts]] = {}
    idx = idx_files(data)
    if idx:
        found["idx files"] = lambda: {split: partial(read_idx, *pair) for split, pair in idx.items()}
    if (data / "dataset_dict.json").is_file() or (data / "state.json").is_file():
        found["a saved dataset"] = lambda: _table_parts(str(data), saved_splits(data))
    else:  # whose tables are .arrow files too
        for ending in SHARDS:
            shards = _shards(files, ending)
            if shards:
                found[f"{ending} files"] = partial(_shard_parts, data, ending, shards, str(data))
    if found and _has_class_folders(data):
        found["class folders"] = dict
    if len(found) > 1:
        raise ValueError(f"{data}: holds {' and '.join(found)}; leave one of them there, or name a file of it")
    if found:
        return next(iter(found.values()))()
    for file, _ in files:
        if is_compressed_tar(file) and not _has_class_folders(data):
            refuse_compressed(file)
    return None


def refuse_other_data(data: str | Path) -> None:
    """Raise ValueError, with the remedy, for what users try to give as data: URLs, archives, tables of labels."""
    ending = Path(data).suffix.lower()
    if re.match(r"[A-Za-z][\w+.-]+:/", str(data)):
        url = re.sub(":/+", "://", str(data), count=1)  # a Path has one slash
        raise ValueError(f"{url}: a URL; download it first and give the folder (a dataset of the hub is hf:OWNER/NAME)")
    if Path(data).is_file() and ending in (".zip", ".7z", ".rar"):
        raise ValueError(f"{data}: an archive; extract it (unzip) and give the folder")
    if Path(data).is_file() and ending in (".csv", ".tsv", ".txt", ".json", ".jsonl", ".xlsx", ".xml"):
        raise ValueError(
            f"{data}: a file of labels, which is not supported as data; give the folder: to classify, with one "
            "folder of images for each class; to detect or segment, in a layout of docs/dense.md"
        )


def _held_out(parts: Iterable[str]) -> str | None:
    return next((name for name in ("val", "test") if name in parts), None)


def _table_parts(data: str, tables: Mapping[str, Dataset]) -> Parts:
    splits = {SPLITS[name.lower()]: name for name in reversed(list(tables)) if name.lower() in SPLITS}
    if not splits:
        if len(tables) != 1:
            raise ValueError(f"{data}: has the splits {few(list(tables))}; expected train, and validation or test")
        splits = {"all": next(iter(tables))}
    names = None if data.startswith("hf:") else read_class_names(Path(data))
    return {
        split: partial(read_table, tables[name], data if split == "all" else f"{data} ({name})", names)
        for split, name in splits.items()
    }


def _shard_parts(folder: Path, ending: str, shards: Mapping[str, list[Path]], data: str) -> Parts:
    def read(split: str, files: list[Path]) -> Part:
        where = data if split == "all" else f"{data} ({split})"
        names = read_class_names(files[0].parent, folder)
        return (
            read_tars(files, where, names) if ending == ".tar" else read_table(file_split(files, where), where, names)
        )

    return {split: partial(read, split, files) for split, files in shards.items()}


def _shards(files: Iterable[tuple[Path, str | None]], ending: str) -> dict[str, list[Path]]:
    """Files of that ending, by the split that their folder or their name tells."""
    shards: dict[str, list[Path]] = {}
    for file, split in files:
        if file.suffix.lower() == ending:
            words = {SPLITS[word] for word in re.split("[^a-z]+", file.stem.lower()) if word in SPLITS}
            shards.setdefault(split or (words.pop() if len(words) == 1 else "all"), []).append(file)
    if "all" in shards and len(shards) > 1:
        raise ValueError(
            f"{shards['all'][0]}: its name tells no split, those of other files do; put train, val or test into it"
        )
    return shards


def _files(data: Path) -> Iterator[tuple[Path, str | None]]:
    """Files where shards may lie, with the split that their folder is named after."""
    for folder, split in ((data, None), (data / "data", None), *((data / name, SPLITS[name]) for name in SPLITS)):
        for file in sorted(folder.iterdir()) if folder.is_dir() else ():
            if not file.name.startswith((".", "cache-")) and file.is_file():  # the library's own notes
                yield file, split


def _has_class_folders(data: Path) -> bool:
    """Whether at least two folders of `data`, or of its train/, hold an image."""
    root = data / "train" if (data / "train").is_dir() else data
    folders = (p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    return len(list(itertools.islice((p for p in folders if image_files(p)), 2))) == 2


# --- Class folders ----------------------------------------------------------------------------------------------------


def _folder_splits(data: Path, val_fraction: float) -> tuple[Source, Source]:
    if not (data / "train").is_dir():
        check_fraction(val_fraction)
        return hold_out(_read_folder(data, _class_names(data, EXPECTED), data), val_fraction, str(data))
    val = held_out_folder(data)
    if val is None:
        raise ValueError(f"{data}: has train/ but neither val/ nor test/; add one, or put the class folders in {data}")
    class_names = _class_names(data / "train", "one folder of images for each of two classes or more")
    return _read_folder(data / "train", class_names, data), _read_folder(val, class_names, data)


def held_out_folder(data: Path) -> Path | None:
    """`val/` of `data`, or else `test/`, or None where it has neither."""
    return next((data / name for name in ("val", "test") if (data / name).is_dir()), None)


def _class_names(root: Path, expected: str) -> tuple[str, ...]:
    names = tuple(sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")))
    if len(names) < 2:
        found = f"only the folder {names[0]}" if names else "no folders"
        raise ValueError(f"{root}: found {found}; expected {expected}")
    return names


def _read_folder(root: Path, class_names: tuple[str, ...], data: Path) -> Folder[int]:
    label_of = {name: label for label, name in enumerate(class_names)}
    files: list[Path] = []
    labels: list[int] = []
    ignored: list[Path] = []
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")):
        if folder.name not in label_of:
            raise ValueError(
                f"{folder}: {folder.name!r} is not one of the {len(class_names)} classes ({few(class_names)})"
            )
        found, others = images_and_others(folder)
        if not found:
            holds = f" (it holds {_by_ending(others)})" if others else ""
            raise ValueError(f"{folder}: no images in this class{holds}; fill or remove it")
        files.extend(found)
        labels.extend([label_of[folder.name]] * len(found))
        ignored.extend(others)
    if not files:
        raise ValueError(f"{root}: no class folders with images")
    notes = (f"{root}: ignored, not images: {_by_ending(ignored)}",) if ignored else ()
    return Folder(tuple(files), tuple(labels), class_names, data, notes)


def _by_ending(files: Sequence[Path]) -> str:
    """How many files of each ending there are, and the names of the first five files."""
    counts = Counter(file.suffix.lower() or "without an ending" for file in files)
    return f"{', '.join(f'{num:,} {ending}' for ending, num in counts.most_common())}: {few(list(map(str, files)))}"


def check_fraction(val_fraction: float) -> None:
    """Raise ValueError for a share that is none."""
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}; it must be between 0 and 1")


def chance(key: str) -> float:
    """A number from 0 to below 1, evenly spread over all keys."""
    digest = hashlib.sha256(key.encode(errors="surrogateescape")).digest()  # a name may be no valid UTF-8
    return int.from_bytes(digest[:6], "big") / 2**48
