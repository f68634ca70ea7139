"""Batches of a source, loaded by worker processes."""

from __future__ import annotations

import atexit
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from mobilevit.data.sampler import Pick
from mobilevit.data.samples import Sample, Source
from mobilevit.images import ImageError, Preprocessing, limit_megapixels, megapixel_limit


class Batch(NamedTuple):
    """Images (B, 3, H, W) in channels-last layout, their labels and their indices in the source.

    The labels are class indices (B,), or the output of the dataset's `stack`. `unreadable` names the images that are
    missing because they could not be read. `size_px` is the input size of the network; images for a teacher can be
    larger.
    """

    pixels: Tensor
    labels: Any
    indices: tuple[int, ...] = ()
    unreadable: tuple[str, ...] = ()
    size_px: int = 0


class Item(NamedTuple):
    """One image of a batch, uint8 (H, W, 3), its label, its index in the source, and the input size of the network."""

    pixels: np.ndarray
    label: Any
    image_index: int
    size_px: int


class Unreadable(NamedTuple):
    """An image that could not be read: its name, the requested side in pixels, and the error."""

    name: str
    size_px: int
    error: ImageError


def stack_indices(labels: Sequence[int]) -> Tensor:
    """The class indices of a batch: (B,) int64."""
    return torch.tensor(labels, dtype=torch.long)


class ImageDataset(Dataset):
    """The images of a source after `prepare(sample, pick)`.

    `prepare` returns the image as uint8 (H, W, 3) and its label, or raises ImageError. `stack` combines the labels of
    a batch. Items are requested by `Pick`. An image that cannot be read is returned as `Unreadable`, so that the
    process that consumes the batches can name it. `notes` are lines for the log; `num_transparent` is the number of
    images with transparency in the training and validation splits.
    """

    def __init__(
        self,
        source: Source[Any],
        prepare: Callable[[Sample, Pick], tuple[np.ndarray, Any]],
        stack: Callable[[list[Any]], Any] = stack_indices,
        notes: Sequence[str] = (),
        num_transparent: int = 0,
    ):
        self.source = source
        self.prepare = prepare
        self.stack = stack
        self.notes = notes
        self.num_transparent = num_transparent

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, pick: Pick) -> Item | Unreadable:
        name = ""
        try:
            sample = self.source[pick.image_index]
            name = sample.name
            return Item(*self.prepare(sample, pick), pick.image_index, pick.size_px)
        except ImageError as error:
            return Unreadable(name or str(error), pick.size_px, error)


class Loader(Iterator[Batch]):
    """One pass over the batches; made by `load`.

    `waited_seconds` is the time that the consumer has waited for data so far, including the start of the workers.
    `unreadable` names the images that could not be read so far. Call `close` to stop before the last batch.
    """

    def __init__(self, batches: DataLoader, device: str, preprocessing: Preprocessing | None):
        self.waited_seconds = 0.0
        self.unreadable: list[str] = []
        self._loader = batches
        self._batches: Iterator[Batch | ImageError] | None = None
        self._device = device
        self._preprocessing = preprocessing

    def __next__(self) -> Batch:
        started = time.perf_counter()
        try:
            if self._batches is None:
                others = active_children()
                self._batches = iter(self._loader)
                _workers.update(worker for worker in active_children() if worker not in others)
            batch = next(self._batches)
            if isinstance(batch, ImageError):
                raise batch
        except Exception:
            self.close()
            raise
        finally:
            self.waited_seconds += time.perf_counter() - started
        self.unreadable += batch.unreadable
        pixels, labels = (to_device(x, self._device) for x in (batch.pixels, batch.labels))
        if self._preprocessing is not None:
            pixels = self._preprocessing.scale(pixels)
        # Pinning turns tuples into lists.
        return Batch(pixels, labels, tuple(batch.indices), tuple(batch.unreadable), batch.size_px)

    def close(self) -> None:
        """Stop the workers; the loader returns no further batch."""
        self._batches = iter(())


def load(
    dataset: ImageDataset,
    batches: Iterable[list[Pick]],
    *,
    num_workers: int,
    device: str,
    preprocessing: Preprocessing | None = None,
    max_unreadable: int = 0,
    replace_unreadable: bool = True,
) -> Loader:
    """Load the given batches onto `device`, in order.

    Pixels are uint8, or float32 scaled by `preprocessing` on `device` if it is given.

    If `max_unreadable` is above 0, an unreadable image is replaced by the next readable image of its batch (after the
    last comes the first) and named in `unreadable`; the caller counts them. With `replace_unreadable=False` the batch
    is smaller instead, and possibly empty.

    Raises:
        ImageError: while iterating, for an unreadable image; if `max_unreadable` is above 0, for a batch in which all
            images are unreadable.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=partial(_collate, stack=dataset.stack, skip=max_unreadable > 0, replace=replace_unreadable),
        num_workers=num_workers,
        pin_memory=device.startswith("cuda"),
        worker_init_fn=partial(_start_worker, megapixel_limit()),
    )
    return Loader(loader, device, preprocessing)


# At exit, Python sends SIGTERM to its children and waits for them. It would wait forever for a worker that ignores the
# signal and was not stopped before, as happens if the garbage collector finds a loader in a cycle and closes torch's
# queue before it sends the stop message.
_workers: WeakSet[BaseProcess] = WeakSet()


@atexit.register
def _kill_workers() -> None:
    for worker in _workers:
        worker.kill()


def _start_worker(max_megapixels: float, _: int) -> None:
    if max_megapixels < math.inf:  # a spawned worker does not inherit the limit
        limit_megapixels(max_megapixels)
    # Ctrl-C and a batch system's SIGTERM are sent to workers as well, but the main process still finishes its step.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def to_device(values: Any, device: str) -> Any:
    """Move a tensor, or the tensors of a named tuple, to `device`; return other values unchanged."""
    if isinstance(values, Tensor):
        return values.to(device, non_blocking=True)
    if isinstance(values, tuple) and hasattr(values, "_fields"):
        return type(values)(*(to_device(value, device) for value in values))
    return values


def _collate(
    items: list[Item | Unreadable], stack: Callable[[list[Any]], Any], skip: bool, replace: bool
) -> Batch | ImageError:
    unreadable = [item for item in items if isinstance(item, Unreadable)]
    if unreadable and not skip:
        return ImageError(f"{unreadable[0].error}; or skip up to NUMBER of them with --max-unreadable NUMBER")
    if unreadable and replace and len(unreadable) == len(items):
        return unreadable[0].error
    chosen: list[Item] = []
    for i, item in enumerate(items):
        if isinstance(item, Item):
            chosen.append(item)
        elif replace:
            chosen.append(next(other for other in items[i:] + items[:i] if isinstance(other, Item)))
    height, width = chosen[0].pixels.shape[:2] if chosen else (unreadable[0].size_px,) * 2
    pixels = _empty(len(chosen), height, width, 3)
    if chosen:
        np.stack([item.pixels for item in chosen], out=pixels.numpy())
    return Batch(
        pixels.permute(0, 3, 1, 2),  # without a copy: the memory layout remains channels last
        stack([item.label for item in chosen]),
        tuple(item.image_index for item in chosen),
        tuple(item.name for item in unreadable),
        items[0].size_px,
    )


def _empty(*shape: int) -> Tensor:
    """An uninitialized uint8 tensor. In a worker it is in shared memory, which saves the queue a copy."""
    pixels = torch.empty(shape, dtype=torch.uint8)
    return pixels if get_worker_info() is None else pixels.share_memory_()
