"""Pooled features of images, in memory and as a Parquet file that an interrupted command completes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mobilevit.data.loader import ImageDataset, load
from mobilevit.data.sampler import Pick, eval_batches
from mobilevit.data.samples import ImageFiles, Images, Source
from mobilevit.data.tar import read_tars
from mobilevit.data.transforms import Evaluation
from mobilevit.device import choose_device
from mobilevit.files import require, write_atomic
from mobilevit.images import ImageError, find_images, read_image
from mobilevit.logs import Progress
from mobilevit.messages import first_line, join_names
from mobilevit.self_check import check_device
from mobilevit.weights import Weights, to_weights
from mobilevit.weights.record import hash_tensors

logger = logging.getLogger(__name__)
METADATA = "mobilevit"  # key in the metadata of a Parquet file: the description
PART_IMAGES = 1024  # images of a part: an interrupted command loses at most one, and the memory holds one


@dataclass(frozen=True)
class EmbedOptions:
    """How images are read and processed.

    Attributes:
        batch_size: images per batch.
        num_workers: processes that read images; 0 reads them in this process.
        device: "auto" is the first available one of cuda, mps and cpu.
        self_check: on another device than the CPU, first compare a batch with the CPU; see `mobilevit.self_check`.
    """

    batch_size: int = 32
    num_workers: int = 0
    device: str = "auto"
    self_check: bool = True

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch size is {self.batch_size}; it must be 1 or more")
        if self.num_workers < 0:
            raise ValueError(f"num workers is {self.num_workers}; it must be 0 or more")


DEFAULT_OPTIONS = EmbedOptions()


@dataclass(frozen=True)
class FeatureBatch:
    """Features (n, D) float32 of the images `indices` (n,) of a source, and the names of unreadable images."""

    indices: np.ndarray
    features: np.ndarray
    unreadable: tuple[str, ...]


@dataclass(frozen=True)
class Embedded:
    """A Parquet file of features: numbers of images and of features, and the ids of unreadable images."""

    path: Path
    num_images: int
    num_features: int
    unreadable: tuple[str, ...]


# ---------------------------------------------------------------------------------------------------------------------
# In memory


def feature_batches(
    weights: Weights, source: Source[Any], batches: Sequence[list[Pick]], options: EmbedOptions
) -> Iterator[FeatureBatch]:
    """The input of the classifier for the images of each batch, one after the other.

    Raises:
        ValueError: weights of another task; the device is not available or computes other results than the CPU.
    """
    _check_task(weights)
    device = choose_device(options.device)
    model = weights.build().to(device)
    if options.self_check:
        check_device(model, weights.preprocessing.crop_px)
    dataset = ImageDataset(source, Evaluation(weights.preprocessing), stack=list)
    loader = load(
        dataset,
        batches,
        num_workers=options.num_workers,
        device=device,
        preprocessing=weights.preprocessing,
        max_unreadable=len(source),
        replace_unreadable=False,
    )
    with contextlib.closing(loader):
        for batch in loader:
            features = np.zeros((0, weights.architecture.head_channels), np.float32)
            if batch.indices:
                with torch.inference_mode():
                    features = model.features(batch.pixels).float().cpu().numpy()
            yield FeatureBatch(np.array(batch.indices, np.int64), features, batch.unreadable)


def _check_task(weights: Weights) -> None:
    if weights.task not in ("classify", "multilabel"):
        raise ValueError(f"weights for the task {weights.task!r} have no pooled features; give those of a classifier")


def features_of(
    weights: Weights, source: Source[Any], options: EmbedOptions, *, max_unreadable: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The indices (n,) of the readable images of `source`, and their features (n, D) float32.

    Raises:
        ImageError: more than `max_unreadable` images cannot be read, or all of them.
        ValueError: see `feature_batches`.
    """
    picks = eval_batches(len(source), batch_size=options.batch_size, size_px=weights.preprocessing.crop_px)
    progress = Progress("embedded", len(source))
    found: list[FeatureBatch] = []
    for batch in feature_batches(weights, source, picks, options):
        found.append(batch)
        progress.add(len(batch.indices))
    unreadable = [name for batch in found for name in batch.unreadable]
    if len(unreadable) > max_unreadable or len(unreadable) == len(source):
        raise ImageError(
            f"{len(unreadable)} images cannot be read ({join_names(unreadable)}), and max_unreadable is "
            f"{max_unreadable}; replace them, or skip them with --max-unreadable {len(unreadable)}"
        )
    return np.concatenate([batch.indices for batch in found]), np.concatenate([batch.features for batch in found])


# ---------------------------------------------------------------------------------------------------------------------
# In a file


def embed_images(
    weights: Weights | str | os.PathLike[str],
    images: str | Sequence[str],
    out: str | os.PathLike[str],
    *,
    options: EmbedOptions = DEFAULT_OPTIONS,
    download: bool = False,
    overwrite: bool = False,
) -> Embedded:
    """Write the pooled features of images to a Parquet file. An interrupted call is completed by the same call.

    The columns are "id", the path of the image relative to the folder `images` (or to the common folder of several
    arguments, or in a tar shard the name of the shard and the key of the image), and "vector", a list of D float32: the
    input of the classifier. Rows are in the order of `find_images`; unreadable images have none. The key "mobilevit" of
    the file's metadata is a JSON object with the SHA-256 of the weights, the architecture, the preprocessing and the
    ids of the unreadable images.

    Finished parts are in the folder `out` + ".parts", which is deleted at the end. The memory holds one part of 1,024
    images.

    Examples:
        >>> mobilevit.embed_images("weights.safetensors", "photos", "vectors.parquet").num_images

    Args:
        weights: a path, a hub id or `Weights`, of a classifier; one without classes is sufficient.
        images: files, folders (searched recursively) or patterns; or .tar shards of WebDataset.
        out: the file to write. If it has the features of the same weights and images, nothing is computed.
        options: batch size, processes and device.
        download: fetch a hub id that is not in the local cache.
        overwrite: replace a file, or finished parts, of other weights or images.

    Raises:
        ValueError: the weights cannot be read or are of another task; no images, or none can be read; `out` has another
            ending, or is of other weights or images; pyarrow is not installed.
    """
    pq = require("pyarrow.parquet", "parquet", "writing Parquet files")
    out = Path(out)
    if out.suffix != ".parquet":
        raise ValueError(f"{out}: the file name must end in .parquet")
    weights = to_weights(weights, download=download)
    _check_task(weights)
    files = _find([images] if isinstance(images, str) else images)
    description = _describe(weights, files)
    if out.exists() and _is_of(out, out, description, overwrite):
        logger.info(f"{out}: is complete")
        return _read_embedded(out)
    folder = out.with_name(f"{out.name}.parts")
    parts = [folder / f"{start:09d}.parquet" for start in range(0, len(files), PART_IMAGES)]
    if not all(_is_of(folder, part, description, overwrite) for part in sorted(folder.glob("*.parquet"))):
        shutil.rmtree(folder)
    missing = [i for i, part in enumerate(parts) if not part.exists()]
    if len(missing) < len(parts):
        logger.info(f"{folder}: resuming after {len(parts) - len(missing)} of {len(parts)} parts")
    for i, indices, vectors in _compute_parts(weights, files, missing, options):
        table = _table(files, i, indices, vectors, description)
        write_atomic(parts[i], partial(pq.write_table, table, use_dictionary=False))
    is_empty = all(pq.read_metadata(part).num_rows == 0 for part in parts)
    if not is_empty:
        write_atomic(out, partial(_merge, pq, parts, description))
    shutil.rmtree(folder)
    if is_empty:
        raise ImageError(
            f"none of the {len(files)} images can be read ({join_names(map(files.name, range(len(files))))})"
        )
    return _read_embedded(out)


def _find(images: Sequence[str]) -> Images:
    paths = find_images(images)
    if shards := [path for path in paths if path.suffix.lower() == ".tar"]:
        if len(shards) < len(paths):
            other = next(path for path in paths if path not in shards)
            raise ValueError(f"{other}: is not a .tar shard, but {shards[0]} is; embed them into separate files")
        if len({shard.name for shard in shards}) < len(shards):
            raise ValueError(f"{join_names(shards)}: shards have the same name; embed them into separate files")
        return read_tars(shards, join_names(shards), None, multilabel=True).images  # any number of labels
    if len(images) == 1 and (root := Path(os.path.expanduser(images[0]))).is_dir():  # noqa: PTH111
        return ImageFiles(tuple(paths), root)
    paths = [path.absolute() for path in paths]
    return ImageFiles(tuple(paths), Path(os.path.commonpath([path.parent for path in paths])))


def _id(files: Images, index: int) -> str:
    """The key of an image as UTF-8 text, which Parquet requires; a file name may be other bytes."""
    return os.fsencode(files.key(index)).decode("utf-8", "backslashreplace")


def _describe(weights: Weights, files: Images) -> dict[str, Any]:
    """What determines the vectors, as JSON values."""
    tensors, ids = hashlib.sha256(), hashlib.sha256()
    hash_tensors(tensors, weights.tensors)
    for i in range(len(files)):
        ids.update(_id(files, i).encode() + b"\0")
    return {
        "weights_sha256": tensors.hexdigest(),
        "architecture": weights.architecture.name,
        "preprocessing": json.loads(json.dumps(weights.preprocessing.to_dict())),
        "num_images": len(files),
        "images_sha256": ids.hexdigest(),
    }


def _read_description(path: Path) -> dict[str, Any]:
    """The description in a Parquet file, {} if it has none. Raises ValueError if it is not a Parquet file."""
    pq = require("pyarrow.parquet", "parquet", "reading Parquet files")
    try:
        return json.loads((pq.read_schema(path).metadata or {}).get(METADATA.encode(), b"{}"))
    except ValueError as error:  # pyarrow's error for another or damaged file is a ValueError
        raise ValueError(f"{path}: not a Parquet file ({first_line(error)}); delete it or give another --out") from None


def _is_of(target: Path, path: Path, description: dict[str, Any], overwrite: bool) -> bool:
    """Whether the file `path` has this description; False if it has another one and may be replaced."""
    found = _read_description(path)
    different = [key for key, value in description.items() if found.get(key) != value]
    if different and not overwrite:
        key = different[0]
        raise ValueError(
            f"{target}: has {key} {found.get(key)}, and these weights and images have {description[key]}; give another "
            "--out, or replace it with --overwrite"
        )
    return not different


def _compute_parts(
    weights: Weights, files: Images, parts: Sequence[int], options: EmbedOptions
) -> Iterator[tuple[int, list[int], np.ndarray]]:
    """Index of the part, indices of its readable images, and their vectors; logs why an image cannot be read."""
    batches: list[list[Pick]] = []
    ends: dict[int, int] = {}  # number of batches up to the end of a part -> the part
    size_px = weights.preprocessing.crop_px
    for part in parts:
        # A batch never contains images of two parts, so that its values do not depend on where a command resumed.
        start, end = part * PART_IMAGES, min((part + 1) * PART_IMAGES, len(files))
        picks = [Pick(i, 0, size_px) for i in range(start, end)]
        batches += [picks[first : first + options.batch_size] for first in range(0, len(picks), options.batch_size)]
        ends[len(batches)] = part
    source = Source(files, (0,) * len(files), ())
    progress = Progress("embedded", sum(map(len, batches)))
    found: list[FeatureBatch] = []
    for i, batch in enumerate(feature_batches(weights, source, batches, options) if batches else (), 1):
        found.append(batch)
        progress.add(len(batches[i - 1]))
        for index in {pick.image_index for pick in batches[i - 1]} - {*batch.indices.tolist()}:
            _warn_unreadable(files, index)
        if i in ends:
            indices = np.concatenate([one.indices for one in found])
            yield ends[i], indices.tolist(), np.concatenate([one.features for one in found])
            found = []


def _warn_unreadable(files: Images, index: int) -> None:
    try:
        read_image(files[index], files.name(index))
    except ImageError as error:
        logger.warning(str(error))


def _table(files: Images, part: int, indices: Sequence[int], vectors: np.ndarray, description: dict[str, Any]) -> Any:
    """A part as a table, with the ids of its unreadable images in the metadata."""
    pa = require("pyarrow", "parquet", "writing Parquet files")
    everything = range(part * PART_IMAGES, min((part + 1) * PART_IMAGES, len(files)))
    unreadable = [_id(files, i) for i in sorted({*everything} - {*indices})]
    return pa.table(
        {
            "id": pa.array([_id(files, i) for i in indices], pa.string()),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1]),
        },
        metadata={METADATA: json.dumps({**description, "unreadable": unreadable})},
    )


def _merge(pq: Any, parts: Sequence[Path], description: dict[str, Any], target: Path) -> None:
    unreadable = [name for part in parts for name in _read_description(part)["unreadable"]]
    metadata = {METADATA: json.dumps({**description, "unreadable": unreadable})}
    schema = pq.read_schema(parts[0]).with_metadata(metadata)
    with pq.ParquetWriter(target, schema, use_dictionary=False) as writer:
        for part in parts:
            writer.write_table(pq.read_table(part).cast(schema))


def _read_embedded(path: Path) -> Embedded:
    pq = require("pyarrow.parquet", "parquet", "reading Parquet files")
    schema, description = pq.read_schema(path), _read_description(path)
    num_images = pq.read_metadata(path).num_rows
    return Embedded(path, num_images, schema.field("vector").type.list_size, tuple(description["unreadable"]))
