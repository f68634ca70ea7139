"""Find images with equal or nearly equal content.

Equal: the same decoded RGB pixels. Nearly equal: thumbnails of 8 x 8 px that differ by a small root mean square (RMS).
In measurements on three data sets (docs/inspect.md), this separates re-encoded and resized copies from other images
better than 64-bit perceptual hashes do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mobilevit.files import require

NEAR = 4.0  # default for the largest RMS difference, in levels of 0 to 255
NUM_COMPONENTS = 12  # of the search tree
MAX_CANDIDATES = 32  # of an image: bounds time and memory if thousands of images are alike
QUERIES = 1024  # images that are searched for at a time
FULL_CONTRAST = 16  # standard deviation of a thumbnail below which the difference must be smaller


@dataclass(frozen=True)
class Group:
    """Indices of images that are copies of each other, ascending.

    `difference` is the largest RMS difference of two thumbnails that were linked; None if all pixels are equal.
    """

    images: tuple[int, ...]
    difference: float | None


def find_duplicates(images: np.ndarray, digests: np.ndarray, thumbnails: np.ndarray, near: float) -> list[Group]:
    """Groups of copies among `images` (n,), indices into `digests` (N,) and `thumbnails` (N, D).

    An image is in at most one group: copies of copies are in the same. `near` is the largest RMS difference of
    thumbnails; 0 finds equal pixels only. Groups with equal pixels are first, then by their difference.

    Raises:
        ValueError: `near` above 0, and scipy is not installed.
    """
    _, first, component = np.unique(digests[images], return_index=True, return_inverse=True)
    differences: dict[int, float] = {}
    if near > 0 and len(first) > 1:
        graph = require("scipy.sparse.csgraph", "inspect", "finding near duplicates")
        sparse = require("scipy.sparse", "inspect", "finding near duplicates")
        found = list(_near_pairs(thumbnails[images[first]], near))
        a, b, rms = (np.concatenate(column) for column in zip(*found, strict=True))
        links = sparse.coo_array((np.ones(len(a), np.int8), (a, b)), shape=(len(first), len(first)))
        of_content = graph.connected_components(links, directed=False)[1]
        for group, value in zip(of_content[a].tolist(), rms.tolist(), strict=True):
            differences[group] = max(value, differences.get(group, 0.0))
        component = of_content[component]
    order = np.argsort(component, kind="stable")
    starts = np.flatnonzero(np.diff(component[order], prepend=-1))
    members = np.split(images[order], starts[1:])
    groups = [
        Group(tuple(sorted(of_group.tolist())), differences.get(int(component[order[start]])))
        for of_group, start in zip(members, starts, strict=True)
        if len(of_group) > 1
    ]
    return sorted(groups, key=lambda group: (-1.0 if group.difference is None else group.difference, group.images))


def _near_pairs(thumbnails: np.ndarray, near: float) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Pairs a < b of rows whose RMS difference is small, and that difference.

    A tree of the first principal components finds candidates: a projection never increases a distance, so no pair is
    missed unless an image has more than MAX_CANDIDATES candidates. Of those, the nearest are compared.
    """
    spatial = require("scipy.spatial", "inspect", "finding near duplicates")
    values = thumbnails.astype(np.float32)
    values -= values.mean(0)
    axes = np.linalg.eigh((values.T @ values).astype(np.float64))[1][:, -NUM_COMPONENTS:]
    projected = values.astype(np.float64) @ axes
    tree = spatial.cKDTree(projected)
    num_values = thumbnails.shape[1]
    # Images with little contrast, such as skies, are alike without being copies.
    contrast = thumbnails.reshape(len(thumbnails), -1, 3).std(1).max(1)
    limits = near * np.clip(contrast / FULL_CONTRAST, 0.25, 1)
    radius = near * num_values**0.5 * (1 + 1e-6)
    for start in range(0, len(values), QUERIES):
        rows = np.arange(start, min(start + QUERIES, len(values)))
        neighbors = tree.query(projected[rows], k=MAX_CANDIDATES + 1, distance_upper_bound=radius)[1]
        a, b = np.repeat(rows, MAX_CANDIDATES + 1), neighbors.ravel()
        a, b = a[b < len(values)], b[b < len(values)]  # len(values) stands for no neighbor
        a, b = a[a != b], b[a != b]
        rms = np.sqrt(np.square(values[a] - values[b]).mean(1))
        is_near = rms <= np.minimum(limits[a], limits[b])
        yield np.minimum(a, b)[is_near], np.maximum(a, b)[is_near], rms[is_near]
