"""The same images through torch and through an artifact."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from mobilevit.export.artifact import ANSWERS, IOU_THRESHOLD, MAX_PER_IMAGE, NOTHING, SCORE_THRESHOLD, Target

TIMED_SECONDS = 0.5
Run = Callable[[np.ndarray], tuple[np.ndarray, ...]]
"""An artifact in its runtime: an input -> its outputs, in the order of `Target.outputs`."""
LEAST_SCORE = 1e-4  # differences of smaller ones mean nothing
LEAST_IOU = 0.5  # of two boxes around the same thing
CLOSE_IOU = 0.9  # of two that are the same box, so that what they differ by is an error and not another candidate
SHOWN_SCORE = 0.3  # of boxes that anybody would look at


@dataclass(frozen=True)
class Agreement:
    """How far an artifact agrees with torch.

    `error` is the largest difference of a number, in standard deviations of torch's numbers of the same output; scores
    are compared by their logarithms. `same` is the share of answers that are the same, `answers` of them, which are
    `kind`: of images, of pixels, or of boxes that either side would show, or has found where nothing would be shown.
    `latency_ms` is the median time of a batch.
    """

    num_images: int
    error: float
    same: float
    answers: int
    kind: str
    latency_ms: float


def compare(network: nn.Module, run: Run, inputs: Sequence[Tensor], target: Target) -> Agreement:
    """Put `inputs`, (1, ...) each, through `network` and, a batch at a time, through `run`; `target` names the outputs.

    Raises:
        ValueError: a detector that finds nothing on any of the inputs, where nothing else could be compared.
    """
    batches = list(filled_batches(inputs, target.batch_size))
    tally = Tally(target.outputs)
    missing = len(inputs)
    for batch in batches:
        with torch.inference_mode():
            expected = as_arrays(network(batch))
        tally.add(expected, run(batch.numpy()), min(missing, len(batch)))
        missing -= len(batch)
    if not tally.num_answers and (target.answers or target.precision == "int8"):  # elsewhere the numbers are enough
        raise ValueError(
            f"torch finds nothing on any of the {len(inputs)} images, so nothing can be compared; give images "
            "(--images) with something to detect"
        )
    example = batches[0].numpy()
    times_ms = []
    while not times_ms or sum(times_ms) < 1e3 * TIMED_SECONDS:
        started = time.perf_counter()
        run(example)
        times_ms.append(1e3 * (time.perf_counter() - started))
    return Agreement(
        num_images=len(inputs),
        error=tally.error,
        same=tally.num_same / tally.num_answers if tally.num_answers else 1.0,
        answers=tally.num_answers,
        kind=tally.kind,
        latency_ms=float(np.median(times_ms)),
    )


def as_arrays(outputs: Tensor | tuple[Tensor, ...]) -> tuple[np.ndarray, ...]:
    """What a network gives, as an artifact would."""
    return tuple(x.numpy() for x in ([outputs] if isinstance(outputs, Tensor) else outputs))


def filled_batches(inputs: Sequence[Tensor], batch_size: int) -> Iterator[Tensor]:
    """All of `inputs`, (1, ...) each, in batches of one size, the last one filled up from the start."""
    for start in range(0, len(inputs), batch_size):
        yield torch.cat([inputs[(start + i) % len(inputs)] for i in range(batch_size)])


@dataclass
class Spread:
    """Differences of one output, and how widely its numbers are spread, gathered piece by piece."""

    largest: float = 0.0
    count: int = 0
    total: float = 0.0
    total_squares: float = 0.0
    squared_error: float = 0.0

    def add(self, differences: np.ndarray, numbers: np.ndarray) -> None:
        """Some more, the differences from `numbers` among them."""
        if differences.size:
            # Not max(): that would forget what is not a number.
            self.largest = float(np.maximum(self.largest, np.abs(differences).max()))
            self.squared_error += float(np.square(differences, dtype=np.float64).sum())
        self.count += numbers.size
        self.total += float(numbers.sum(dtype=np.float64))
        self.total_squares += float(np.square(numbers, dtype=np.float64).sum())

    @property
    def deviation(self) -> float:
        """The standard deviation."""
        mean = self.total / self.count
        return max(0.0, self.total_squares / self.count - mean * mean) ** 0.5

    @property
    def error(self) -> float:
        """The largest difference in standard deviations."""
        return self.largest / (self.deviation or math.nan) if self.largest else 0.0

    @property
    def mean_error(self) -> float:
        """The root mean square of the differences in standard deviations."""
        return (self.squared_error / self.count) ** 0.5 / (self.deviation or math.nan) if self.largest else 0.0


class Tally:
    """What is gathered while outputs of the names of `Target.outputs` are compared, batch by batch."""

    def __init__(self, names: Sequence[str]):
        self.names = tuple(names)
        self.spreads = {name: Spread() for name in self.names}
        self._counts = [[0, 0], [0, 0]]  # same answers and answers: those that count, and what does where none do
        self.kind = "boxes" if "boxes" in names else "pixels"

    @property
    def num_same(self) -> int:
        """How many answers are the same."""
        return int(self._counted[0])

    @property
    def num_answers(self) -> int:
        """Of how many."""
        return int(self._counted[1])

    @property
    def _counted(self) -> list[int]:
        return self._counts[0] if self._counts[0][1] else self._counts[1]

    @property
    def error(self) -> float:
        """See `Agreement`. Of classes, which are no numbers, it is the share of those that differ."""
        if self.names == ("classes",):
            return 1 - self.num_same / self.num_answers
        return max((spread.error for spread in self.spreads.values() if spread.count), key=_nan_last, default=0.0)

    @property
    def mean_error(self) -> float:
        """The root mean square of the differences instead of the largest; the worst of the outputs."""
        return max((spread.mean_error for spread in self.spreads.values() if spread.count), key=_nan_last, default=0.0)

    def add(self, expected: Sequence[np.ndarray], found: Sequence[np.ndarray], number: int) -> None:
        """The outputs for a batch, whose first `number` images have not been seen yet."""
        shapes = [x.shape for x in found], [x.shape for x in expected]
        assert shapes[0] == shapes[1], f"the artifact answers {shapes[0]}, torch {shapes[1]}"
        theirs, ours = (dict(zip(self.names, (x[:number] for x in side), strict=True)) for side in (expected, found))
        if "labels" in theirs:
            for i in range(len(theirs["labels"])):
                of_image = [{name: side[name][i] for name in self.names} for side in (theirs, ours)]
                pairs = self._count_found(*of_image)
                close = [(a, b) for a, b in pairs if _iou(theirs["boxes"][i, a], ours["boxes"][i, b]) >= CLOSE_IOU]
                a, b = (np.array([pair[side] for pair in close], int) for side in (0, 1))
                self._add_numbers("boxes", ours["boxes"][i, b], theirs["boxes"][i, a])
                self._add_scores(ours["scores"][i, b], theirs["scores"][i, a])
        elif "boxes" in theirs:
            self._add_numbers("boxes", ours["boxes"], theirs["boxes"])
            self._add_scores(ours["scores"], theirs["scores"])
            for i in range(len(theirs["boxes"])):
                self._count_found(*(_found(side["boxes"][i], side["scores"][i]) for side in (theirs, ours)))
        elif "classes" in theirs:
            self._add_answers(ours["classes"], theirs["classes"])
        else:
            self.kind = "images" if theirs["logits"].ndim == 2 else "pixels"
            self._add_numbers("logits", ours["logits"], theirs["logits"])
            self._add_answers(ours["logits"].argmax(1), theirs["logits"].argmax(1))

    def _count_found(
        self, expected: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]
    ) -> list[tuple[int, int]]:
        """Match the boxes that were found in one image, best first; which belong together."""
        theirs, ours = (np.flatnonzero(side["labels"] != NOTHING) for side in (expected, found))
        pairs, left = [], list(ours)
        for i in theirs:
            alike = [j for j in left if found["labels"][j] == expected["labels"][i]]
            overlaps = [_iou(found["boxes"][j], expected["boxes"][i]) for j in alike]
            if overlaps and max(overlaps) >= LEAST_IOU:
                pairs.append((i, alike[int(np.argmax(overlaps))]))
                left.remove(pairs[-1][1])
        scores = [max(expected["scores"][i], found["scores"][j]) for i, j in pairs]
        alone = [expected["scores"][i] for i in theirs if i not in [i for i, _ in pairs]]
        alone += [found["scores"][j] for j in left]
        for count, least in zip(self._counts, (SHOWN_SCORE, 0), strict=True):
            num_same = sum(bool(score >= least) for score in scores)
            count[0] += num_same
            count[1] += num_same + sum(bool(score >= least) for score in alone)
        return pairs

    def _add_answers(self, found: np.ndarray, expected: np.ndarray) -> None:
        self._counts[0][0] += int((found == expected).sum())
        self._counts[0][1] += expected.size

    def _add_numbers(self, name: str, found: np.ndarray, expected: np.ndarray) -> None:
        self.spreads[name].add(found.astype(np.float32) - expected, expected)

    def _add_scores(self, found: np.ndarray, expected: np.ndarray) -> None:
        # Nearly all are nearly 0, so that their deviation says nothing; their logarithms are spread as the logits are.
        differences = np.log(found.astype(np.float32) + LEAST_SCORE) - np.log(expected + LEAST_SCORE)
        self.spreads["scores"].add(differences, np.log(np.maximum(expected, np.finfo(np.float32).tiny)))


def _nan_last(x: float) -> float:
    return math.inf if math.isnan(x) else x


def _found(boxes: np.ndarray, scores: np.ndarray) -> Mapping[str, np.ndarray]:
    """What NMS leaves of the outputs for one image, as an artifact with it inside would answer.

    Anchors are not compared one by one: of the many that an object has, some are always about to change their mind.
    """
    of_anchor, labels = np.nonzero(scores > SCORE_THRESHOLD)
    candidates = (boxes[of_anchor].astype(np.float32), scores[of_anchor, labels].astype(np.float32), labels)
    places, values, classes = map(torch.from_numpy, candidates)
    kept = batched_nms(places, values, classes, IOU_THRESHOLD)[:MAX_PER_IMAGE].numpy()
    return dict(zip(ANSWERS["detect"], (values[kept] for values in candidates), strict=True))


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    """How much of what two boxes cover together both of them cover."""
    shared = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None).prod()
    return float(shared / max(np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - shared, 1e-12))


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


def synthetic_images(number: int, size: tuple[int, int], seed: int = 0) -> list[np.ndarray]:
    """Images (H, W, 3) of overlapping discs and bars with shading and noise, for where there are no real ones."""
    height, width = size
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    x, y = x / width, y / height
    images = []
    for i in range(number):
        random = np.random.default_rng((seed, i))
        a, b, c = random.uniform(0, 1, (3, 3))
        image = a + (b - a) * x[..., None] + (c - a) * y[..., None]
        for _ in range(random.integers(2, 9)):
            cx, cy, angle = random.uniform(0, (1, 1, np.pi))
            u = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
            v = (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
            long, short = random.uniform(0.05, 0.4, 2)
            round_shape = (u / long) ** 2 + (v / short) ** 2 < 1
            inside = round_shape if random.random() < 0.5 else (abs(u) < long) & (abs(v) < short)
            shade = random.uniform(0, 1, 3) * (1 + random.uniform(-0.5, 0.5) * u[..., None] / long)
            image = np.where(inside[..., None], shade, image)
        image += random.normal(0, random.uniform(0, 0.08), image.shape)
        images.append((255 * image.clip(0, 1)).astype(np.uint8))
    return images
