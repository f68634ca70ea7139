"""Batches of a source, read in worker processes."""

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
from torch.utils.data import DataLoader, Dataset

from mobilevit.data.sampler import Pick
from mobilevit.data.samples import Sample, Source
from mobilevit.images import ImageError, Preprocessing, limit_megapixels, megapixel_limit


class Batch(NamedTuple):
    """Images (B, 3, H, W) in channels-last layout, their labels and their numbers in the source.

    What labels are is up to the task: class numbers (B,), or whatever its datasets stack them to. `unreadable` names
    the images that should be here and could not be read.
    """

    pixels: Tensor
    labels: Any
    numbers: tuple[int, ...] = ()
    unreadable: tuple[str, ...] = ()


class Item(NamedTuple):
    """An image of a batch, uint8 (H, W, 3), its label and its number in the source."""

    pixels: np.ndarray
    label: Any
    number: int


class Unreadable(NamedTuple):
    """An image that could not be read, the side in pixels it was wanted at, and why it could not."""

    name: str
    size_px: int
    error: ImageError


def stack_numbers(labels: Sequence[int]) -> Tensor:
    """The labels of a batch where they are class numbers: (B,)."""
    return torch.tensor(labels, dtype=torch.long)


class ImageDataset(Dataset):
    """Images of a source, each made ready by `prepare(sample, pick)`, which raises ImageError.

    That gives the image as uint8 (H, W, 3), and its label; `stack` makes one of the labels of a batch. An item is
    asked for by a `Pick`. An image that cannot be read is handed on as `Unreadable`, so that whoever reads the batches
    can say which one it was, whatever process met it.
    """

    def __init__(
        self,
        source: Source,
        prepare: Callable[[Sample, Pick], tuple[np.ndarray, Any]],
        stack: Callable[[list[Any]], Any] = stack_numbers,
        notes: Sequence[str] = (),
        num_transparent: int = 0,
    ):
        self.notes = notes  # what whoever trains on them should know
        self.num_transparent = num_transparent  # images with transparency, of these and those to validate on
        self.source = source
        self.prepare = prepare
        self.stack = stack

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, pick: Pick) -> Item | Unreadable:
        name = ""
        try:
            sample = self.source[pick.number]
            name = sample.name
            return Item(*self.prepare(sample, pick), pick.number)
        except ImageError as error:
            return Unreadable(name or str(error), pick.size_px, error)


class Loader(Iterator[Batch]):
    """What `load` returns: an iterator that goes once through the batches.

    `waited_seconds` is how long it has kept its user waiting for data so far, the start of the workers included;
    `unreadable` names the images that could not be read so far. Who may leave it before its end calls `close`.
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
        pixels, labels = (moved(x, self._device) for x in (batch.pixels, batch.labels))
        if self._preprocessing is not None:
            pixels = self._preprocessing.scale(pixels)
        return Batch(pixels, labels, tuple(batch.numbers), tuple(batch.unreadable))  # pinning makes lists of tuples

    def close(self) -> None:
        """End the workers; no batch comes after it."""
        self._batches = iter(())


def load(
    dataset: ImageDataset,
    batches: Iterable[list[Pick]],
    *,
    num_workers: int,
    device: str,
    preprocessing: Preprocessing | None = None,
    max_unreadable: int = 0,
    stand_in: bool = True,
) -> Loader:
    """The given batches on `device`, in their order.

    Pixels are uint8, or where `preprocessing` is given float32 as the network expects them, scaled on `device`.

    With `max_unreadable` above 0 an image that cannot be read is replaced by the next one of its batch, in a circle,
    and named in `unreadable`; to count them is up to the caller. Without `stand_in` it is left out, and the batch is
    smaller, or empty.

    Raises:
        ImageError: when a batch comes in which an image, or with `max_unreadable` above 0 each, cannot be read.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=partial(
            _collate,
            stack=dataset.stack,
            skip=max_unreadable > 0,
            stand_in=stand_in,
        ),
        num_workers=num_workers,
        pin_memory=device.startswith("cuda"),
        worker_init_fn=partial(_start_worker, megapixel_limit()),
    )
    return Loader(loader, device, preprocessing)


# Python, at its end, sends its children SIGTERM and waits for them: for ever, if a worker that ignores it was not told
# to go, as happens where the garbage collector finds a loader in a cycle (it ends torch's queue before the message).
_workers: WeakSet[BaseProcess] = WeakSet()


@atexit.register
def _kill_workers() -> None:
    for worker in _workers:
        worker.kill()


def _start_worker(max_megapixels: float, _: int) -> None:
    if max_megapixels < math.inf:  # a worker that is spawned does not inherit the limit
        limit_megapixels(max_megapixels)
    # Ctrl-C and a batch system's SIGTERM reach workers as well, and the step they read for is still to be finished.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def moved(values: Any, device: str) -> Any:
    """`values` on `device`: a tensor, or the tensors of a named tuple; all else stays where it is."""
    if isinstance(values, Tensor):
        return values.to(device, non_blocking=True)
    if isinstance(values, tuple) and hasattr(values, "_fields"):
        return type(values)(*(moved(value, device) for value in values))
    return values


def _collate(
    items: list[Item | Unreadable], stack: Callable[[list[Any]], Any], skip: bool, stand_in: bool
) -> Batch | ImageError:
    unreadable = [item for item in items if isinstance(item, Unreadable)]
    if unreadable and not skip:
        return ImageError(f"{unreadable[0].error}; or skip up to NUMBER of them with --max-unreadable NUMBER")
    if unreadable and stand_in and len(unreadable) == len(items):
        return unreadable[0].error
    chosen: list[Item] = []
    for i, item in enumerate(items):
        if isinstance(item, Item):
            chosen.append(item)
        elif stand_in:
            chosen.append(next(other for other in items[i:] + items[:i] if isinstance(other, Item)))
    if chosen:
        pixels = np.stack([item.pixels for item in chosen])
    else:
        pixels = np.empty((0, unreadable[0].size_px, unreadable[0].size_px, 3), np.uint8)
    return Batch(
        # As the rows lie in memory already; the network wants the same layout.
        torch.from_numpy(pixels).permute(0, 3, 1, 2),
        stack([item.label for item in chosen]),
        tuple(item.number for item in chosen),
        tuple(item.name for item in unreadable),
    )
