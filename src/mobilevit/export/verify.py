"""The same pictures through torch and through an artifact."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

TIMED_SECONDS = 0.5
Run = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Agreement:
    """How far an artifact agrees with torch.

    `error` is the largest difference of a logit, in standard deviations of torch's logits; `top1` the share of pictures
    with the same answer; `latency_ms` the median time of a batch.
    """

    num_pictures: int
    error: float
    top1: float
    latency_ms: float


def compare(network: nn.Module, run: Run, inputs: Sequence[Tensor], batch_size: int) -> Agreement:
    """Put `inputs`, (1, ...) each, through `network` and, `batch_size` at a time, through `run`."""
    missing = -len(inputs) % batch_size
    filled = [*inputs, *(inputs[i % len(inputs)] for i in range(missing))]
    batches = [torch.cat(filled[i : i + batch_size]) for i in range(0, len(filled), batch_size)]
    with torch.inference_mode():
        expected = torch.cat([network(batch) for batch in batches]).float().numpy()
    found = np.concatenate([run(batch.numpy()) for batch in batches]).astype(np.float32)
    assert found.shape == expected.shape, f"the artifact answers {found.shape}, torch {expected.shape}"
    example = batches[0].numpy()
    times_ms = []
    while not times_ms or sum(times_ms) < 1e3 * TIMED_SECONDS:
        started = time.perf_counter()
        run(example)
        times_ms.append(1e3 * (time.perf_counter() - started))
    return Agreement(
        num_pictures=len(inputs),
        error=float(np.abs(found - expected).max() / expected.std()),
        top1=float((found.argmax(1) == expected.argmax(1))[: len(inputs)].mean()),
        latency_ms=float(np.median(times_ms)),
    )


def speed_ratio(run: Run, other: Run, example: np.ndarray, num_rounds: int = 21) -> float:
    """How many times as fast as `other` the first is: the median over rounds in which both are timed in turn."""
    runs, ratios = [run, other], []
    for i in range(num_rounds):
        times = {}
        for one in runs if i % 2 else reversed(runs):
            one(example)  # not timed: it wakes its threads and fills the caches
            started = time.perf_counter()
            one(example)
            times[one] = time.perf_counter() - started
        ratios.append(times[other] / times[run])
    return float(np.median(ratios))


def drawn_pictures(number: int, size: tuple[int, int], seed: int = 0) -> list[np.ndarray]:
    """Pictures (H, W, 3) of overlapping discs and bars with shading and noise, for where there are no real ones."""
    height, width = size
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    x, y = x / width, y / height
    pictures = []
    for i in range(number):
        random = np.random.default_rng((seed, i))
        a, b, c = random.uniform(0, 1, (3, 3))
        picture = a + (b - a) * x[..., None] + (c - a) * y[..., None]
        for _ in range(random.integers(2, 9)):
            cx, cy, angle = random.uniform(0, (1, 1, np.pi))
            u = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
            v = (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
            long, short = random.uniform(0.05, 0.4, 2)
            round_shape = (u / long) ** 2 + (v / short) ** 2 < 1
            inside = round_shape if random.random() < 0.5 else (abs(u) < long) & (abs(v) < short)
            shade = random.uniform(0, 1, 3) * (1 + random.uniform(-0.5, 0.5) * u[..., None] / long)
            picture = np.where(inside[..., None], shade, picture)
        picture += random.normal(0, random.uniform(0, 0.08), picture.shape)
        pictures.append((255 * picture.clip(0, 1)).astype(np.uint8))
    return pictures
