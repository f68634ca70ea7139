"""Batches are the same whoever reads them, and a picture that cannot be read is named."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mobilevit.data.loader import Batch, PictureDataset, load
from mobilevit.data.sampler import EpochBatches, Pick, eval_batches
from mobilevit.data.sources import Folder
from mobilevit.data.transforms import Augmentation, Evaluation
from mobilevit.pictures import PictureError, Preprocessing

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # where there is one core
    pytest.mark.filterwarnings("ignore:This process .*is multi-threaded:DeprecationWarning"),
]
AUGMENTATION = Augmentation(min_scale=0.1, flip=True, seed=0)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Ten pictures of noise, each of another size."""
    random = np.random.default_rng(0)
    files = tuple(tmp_path / f"{i}.png" for i in range(10))
    for i, file in enumerate(files):
        Image.fromarray(random.integers(0, 255, (32 + i, 50 - i, 3), dtype=np.uint8)).save(file)
    return Folder(files, labels=tuple(i % 3 for i in range(10)), class_names=("a", "b", "c"))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_pictures_and_labels_belong_together(folder: Folder, num_workers: int):
    dataset = PictureDataset(folder, Evaluation(Preprocessing(resize_px=32, crop_px=32)))
    assert len(dataset) == 10
    order = [[Pick(4, 0, 32), Pick(0, 0, 32)], [Pick(9, 0, 32)]]
    batches = list(load(dataset, order, num_workers=num_workers, device="cpu"))
    assert [batch.labels.tolist() for batch in batches] == [[1, 0], [0]]
    assert [batch.pixels.shape for batch in batches] == [(2, 3, 32, 32), (1, 3, 32, 32)]
    assert {batch.pixels.dtype for batch in batches} == {torch.uint8}
    with Image.open(folder.files[0]) as image:  # 32 px high already: only the middle is cut out
        middle = np.asarray(image)[:, 9:41]
    assert np.array_equal(batches[0].pixels[1].permute(1, 2, 0), middle)


def test_workers_change_nothing(folder: Folder):
    dataset = PictureDataset(folder, AUGMENTATION)
    picks = EpochBatches(10, sizes_px=(32, 40), batch_size=3, base_px=32, epoch=1)
    alone, helped = (list(load(dataset, picks, num_workers=n, device="cpu")) for n in (0, 2))
    assert len(alone) == len(helped) == len(picks)
    for a, b in zip(alone, helped, strict=True):
        assert isinstance(b, Batch)
        assert torch.equal(a.pixels, b.pixels)
        assert torch.equal(a.labels, b.labels)
    picks = EpochBatches(10, sizes_px=(32,), batch_size=3, base_px=32, epoch=2)
    other = torch.cat([batch.pixels for batch in load(dataset, picks, num_workers=0, device="cpu")])
    assert not any(torch.equal(alone[0].pixels[0], pixels) for pixels in other)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_picture_is_named_in_one_line(folder: Folder, num_workers: int):
    whole = folder.files[7].read_bytes()
    folder.files[7].write_bytes(whole[: len(whole) // 2])
    dataset = PictureDataset(folder, AUGMENTATION)
    batches = load(dataset, eval_batches(10, batch_size=3, size_px=32), num_workers=num_workers, device="cpu")
    assert len([next(batches), next(batches)]) == 2
    with pytest.raises(PictureError, match=f"^{folder.files[7]}: damaged picture") as caught:
        next(batches)
    assert "\n" not in str(caught.value)
