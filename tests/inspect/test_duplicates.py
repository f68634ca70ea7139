"""Groups of copies: digests and thumbnails."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mobilevit.inspect import duplicates
from mobilevit.inspect.collect import collect
from mobilevit.inspect.duplicates import NEAR, find_duplicates

STAMPS = Path("/usr/share/tuxpaint/stamps/animals")


def brute_force(digests: np.ndarray, thumbnails: np.ndarray, near: float) -> set[frozenset[int]]:
    """The same groups from all pairs, in float64."""
    n = len(digests)
    contrast = thumbnails.reshape(n, -1, 3).astype(np.float64).std(1).max(1)
    limits = near * np.clip(contrast / 16, 0.25, 1)
    group = list(range(n))
    for a in range(n):
        for b in range(a):
            rms = np.sqrt(((thumbnails[a].astype(float) - thumbnails[b]) ** 2).mean())
            if digests[a] == digests[b] or (near and rms <= min(limits[a], limits[b])):
                group = [group[a] if x == group[b] else x for x in group]
    groups = {frozenset(i for i in range(n) if group[i] == x) for x in group}
    return {one for one in groups if len(one) > 1}


@pytest.mark.parametrize(("num", "near"), [(120, 4.0), (61, 0.0), (120, 12.0)])
def test_same_as_comparing_all_pairs(num: int, near: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(duplicates, "QUERIES", 50)
    random = np.random.default_rng(0)
    thumbnails = random.integers(0, 256, (num, 192)).astype(np.uint8)
    thumbnails[:24] = thumbnails[:24] // 32 + 100  # little contrast, and fewer than the candidates of an image
    for i in range(0, num - 1, 3):  # copies at distances around the limit, and chains of copies
        noise = random.normal(0, random.uniform(0, 1.5 * (near or 4)), 192)
        thumbnails[i + 1] = (thumbnails[i] + noise).round().clip(0, 255)
    digests = random.permutation(num).astype(np.uint64)
    digests[[5, 50, 9]] = digests[[4, 51, 58]]  # equal pixels have equal thumbnails
    thumbnails[[5, 50, 9]] = thumbnails[[4, 51, 58]]
    found = find_duplicates(np.arange(num), digests, thumbnails, near)
    expected = brute_force(digests, thumbnails, near)
    assert {frozenset(group.images) for group in found} == expected
    assert len(expected) > 2
    differences = [group.difference for group in found if group.difference is not None]
    assert differences == sorted(differences)
    assert bool(differences) == (near > 0)


def test_many_equal_and_alike_images():
    """Memory and time are bounded if all images are alike."""
    random = np.random.default_rng(0)
    thumbnails = (random.integers(0, 256, 192) + random.integers(-1, 2, (3000, 192))).clip(0, 255).astype(np.uint8)
    digests = np.repeat(np.arange(1500), 2).astype(np.uint64)
    (group,) = find_duplicates(np.arange(3000), digests, thumbnails, NEAR)
    assert group.images == tuple(range(3000))


@pytest.mark.skipif(not STAMPS.is_dir(), reason="Tux Paint's stamps are not installed")
def test_copies_of_real_images(tmp_path: Path):
    """A PNG, its copy as BMP (equal pixels), as JPEG and in half the size, beside other images."""
    files = sorted(STAMPS.rglob("*.png"))[:60:2]
    for i, file in enumerate(files):
        image = Image.alpha_composite(
            Image.new("RGBA", (96, 96), "white"), Image.open(file).convert("RGBA").resize((96, 96))
        )
        for name in ("a", "b"):
            (tmp_path / name).mkdir(exist_ok=True)
        image.convert("RGB").save(tmp_path / f"a/{i:02}.png")
    for i in range(5):
        image = Image.open(tmp_path / f"a/{i:02}.png")
        image.save(tmp_path / f"b/{i:02}.bmp")
    for i in range(5, 10):
        image = Image.open(tmp_path / f"a/{i:02}.png")
        jpeg = io.BytesIO()
        image.resize((48, 48), Image.Resampling.LANCZOS).save(jpeg, "JPEG", quality=80)
        (tmp_path / f"b/{i:02}.jpg").write_bytes(jpeg.getvalue())
    c = collect(tmp_path)
    groups = find_duplicates(c.readable(), c.digests, c.thumbnails, NEAR)
    keys = [{c.key(i).split(".")[0][2:] for i in group.images} for group in groups]
    assert keys[:5] == [{f"{i:02}"} for i in range(5)]
    assert all(group.difference is None for group in groups[:5])
    assert {f"{i:02}" for i in range(5, 10)} <= set().union(*keys[5:])
    assert all(len(names) == 1 for names in keys)  # no other images
