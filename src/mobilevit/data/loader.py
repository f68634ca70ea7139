"""Batches of a source, read in worker processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mobilevit.data.sampler import Pick
from mobilevit.data.sources import Source
from mobilevit.pictures import PictureError


class Batch(NamedTuple):
    """Pictures as uint8 (B, 3, H, W), to be scaled where the network runs, and their labels (B,)."""

    pixels: Tensor
    labels: Tensor


class PictureDataset(Dataset):
    """Pictures of a source, each made ready by `prepare(picture, pick)`, as uint8 (3, H, W) with their label.

    An item is asked for by a `Pick`. A picture that cannot be read is handed on as its PictureError, so that whoever
    reads the batches can say which one it was, whatever process met it.
    """

    def __init__(self, source: Source, prepare: Callable[[Image.Image, Pick], Image.Image]):
        self.source = source
        self.prepare = prepare

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, pick: Pick) -> tuple[Tensor, int] | PictureError:
        try:
            sample = self.source[pick.number]
        except PictureError as error:
            return error
        pixels = np.array(self.prepare(sample.picture, pick))
        return torch.from_numpy(pixels).permute(2, 0, 1), sample.label


def load(dataset: PictureDataset, batches: Iterable[list[Pick]], *, num_workers: int, device: str) -> Iterator[Batch]:
    """The given batches on `device`, in their order. Raises PictureError."""
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=_collate,
        num_workers=num_workers,
        pin_memory=device.startswith("cuda"),
    )
    for batch in loader:
        if isinstance(batch, PictureError):
            raise batch
        yield Batch(*(tensor.to(device, non_blocking=True) for tensor in batch))


def _collate(items: list[tuple[Tensor, int] | PictureError]) -> Batch | PictureError:
    for item in items:
        if isinstance(item, PictureError):
            return item
    pixels, labels = zip(*cast(list[tuple[Tensor, int]], items), strict=True)
    return Batch(torch.stack(pixels), torch.tensor(labels))
