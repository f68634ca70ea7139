"""The records of a comparison: rows, timings and reports; numbers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any, Literal, get_args

from mobilevit.benchmark.cost import Cost
from mobilevit.benchmark.timing import Machine, Spread
from mobilevit.compare.models import Augmentation, Family, LibraryWeights, PublishedModel
from mobilevit.compare.statistics import Comparison

Runtime = Literal["torch", "onnx"]
Baseline = Literal["nearest", "mobilevit-xxs", "mobilevit-xs", "mobilevit-s"]
RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)
METRIC_TITLES = {"top1": "top-1", "map": "mAP", **{f"{name}_f1": f"{name} F1" for name in ("micro", "macro")}}
METRIC_TITLES |= {"balanced_accuracy": "balanced accuracy"}
RUNTIME_TITLES: dict[Runtime, str] = {"torch": "torch", "onnx": "ONNX Runtime"}


@dataclass(frozen=True)
class Timing:
    """The time of a batch in one runtime.

    `layout` is the memory layout of the weights in torch. `error` is the largest difference from the logits of torch,
    in standard deviations of the logits. `ratios` divide the time by those of the MobileViTs in the same round, `ratio`
    by that of `baseline`.
    """

    runtime: Runtime
    batch_size: int
    layout: str | None
    error: float | None
    latency_ms: Spread
    images_per_second: float
    ratios: dict[str, Spread]
    baseline: str | None = None
    ratio: Spread | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model of the comparison. `cost` is None if it cannot be built."""

    name: str
    family: Family
    paper: str
    library: str
    size_px: int
    cost: Cost | None
    timings: tuple[Timing, ...] = ()

    def timing(self, runtime: Runtime, batch_size: int) -> Timing | None:
        return next((t for t in self.timings if (t.runtime, t.batch_size) == (runtime, batch_size)), None)


@dataclass(frozen=True, kw_only=True)
class PublishedRow(Row):
    """A model with its published figures; see `models.toml`."""

    cost: Cost
    published_parameters: int
    published_top1: float
    augmentation: Augmentation | None
    source: str
    library_weights: tuple[LibraryWeights, ...]

    @classmethod
    def of(cls, model: PublishedModel, size_px: int, cost: Cost) -> PublishedRow:
        return cls(
            name=model.name,
            family=model.family,
            paper=model.paper,
            library=model.library,
            size_px=size_px,
            cost=cost,
            published_parameters=model.published_parameters,
            published_top1=model.published_top1,
            augmentation=model.augmentation,
            source=model.source,
            library_weights=model.library_weights,
        )

    @property
    def best_weights(self) -> LibraryWeights | None:
        return max(self.library_weights, key=lambda weights: weights.top1, default=None)


@dataclass(frozen=True)
class SeedRun:
    """The metrics of one training run, of the EMA weights, in percent.

    `score` is the metric that is compared, after the last epoch; `metrics` are others after the last epoch.
    """

    seed: int
    score: float
    metrics: dict[str, float]
    score_by_epoch: tuple[float, ...]
    train_loss_by_epoch: tuple[float, ...]
    seconds_by_epoch: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class TrainedRow(Row):
    """A trained model. Mean and standard deviation are over the seeds; `failures` has a reason by seed."""

    score: float | None
    score_std: float | None
    seconds_per_epoch: float | None
    images_per_second: float | None
    runs: tuple[SeedRun, ...]
    failures: dict[str, str] = field(default_factory=dict)

    def mean_of(self, metric: str) -> float | None:
        """The mean of another metric over the seeds; None if a run has not computed it."""
        values = [run.metrics.get(metric) for run in self.runs]
        return fmean(value for value in values if value is not None) if values and None not in values else None


@dataclass(frozen=True)
class Claim:
    """`ours` has a top-1 of `difference` points more than `other`, which has `times_larger` times its parameters."""

    ours: str
    other: str
    difference: float
    times_larger: float | None = None


@dataclass(frozen=True)
class CheckedClaim:
    """A claim and the numbers it is recomputed from; pairs are (ours, other).

    `best_top1` is the top-1 of the best weights in the libraries; None if one of the two models has none.
    """

    claim: Claim
    top1: tuple[float, float]
    num_parameters: tuple[int, int]
    difference: float
    times_larger: float
    holds: bool
    best_top1: tuple[float, float] | None

    def describe(self) -> str:
        """The checked claim as a sentence."""
        c, (ours, other) = self.claim, self.top1
        small, large = (f"{number / 1e6:.2f} M" for number in self.num_parameters)
        text = (
            f"{c.ours} over {c.other}: claimed +{c.difference:.1f}, {ours:.1f} - {other:.1f} = {self.difference:+.1f}"
        )
        if c.times_larger:
            text += f"; claimed {c.times_larger:.1f} times smaller, {large} / {small} = {self.times_larger:.2f}"
        else:
            text += f", at {small} and {large} parameters"
        text += "; holds" if self.holds else "; does not hold"
        if self.best_top1:
            ours, other = self.best_top1
            text += f" (best library weights: {ours:.2f} - {other:.2f} = {ours - other:+.2f})"
        return text


@dataclass(frozen=True)
class SpeedRatio:
    """The time of `other` divided by that of `ours`: as published for the CPU of an iPhone 12, and as measured here."""

    ours: str
    other: str
    published_ratio: float
    runtime: str
    batch_size: int
    ratio: float


@dataclass(frozen=True)
class DenseRow:
    """A backbone with a detection or segmentation head. `published` is COCO mAP or PASCAL VOC mIoU in percent."""

    backbone: str
    published_parameters: int
    published: float
    num_parameters: int | None = None


@dataclass(frozen=True)
class Setting:
    """Where and how models were timed; `device` is that of torch. `num_rounds` is 0 if nothing was timed."""

    machine: Machine
    device: str
    num_rounds: int
    num_timing_threads: int
    baseline: Baseline

    @property
    def where(self) -> str:
        """The device of torch: the accelerator, or the processor and its threads."""
        num_threads = self.machine.num_threads
        threads = f"{num_threads} thread{'s' if num_threads > 1 else ''}"
        return self.device if self.device != "cpu" else f"{self.machine.processor}, {threads}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """The result of a comparison."""

    setting: Setting
    rows: Sequence[Row]
    notes: Sequence[str]

    @property
    def timed(self) -> list[tuple[Runtime, int]]:
        """The runtimes and batch sizes that were timed."""
        return list(dict.fromkeys((t.runtime, t.batch_size) for row in self.rows for t in row.timings))

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        values = asdict(self)
        setting = values.pop("setting")
        return {**setting.pop("machine"), **setting, **values}


@dataclass(frozen=True, kw_only=True)
class PublishedReport(Report):
    """Published accuracy beside costs and times measured here."""

    rows: Sequence[PublishedRow]
    claims: Sequence[CheckedClaim]
    speeds: Sequence[SpeedRatio]
    dense: dict[str, list[DenseRow]]


@dataclass(frozen=True, kw_only=True)
class TrainedReport(Report):
    """Models trained on the same data with the same recipe.

    `val_split` is the folder that the models are evaluated on; None if a fraction of the data is. The first of
    `metrics` is compared: "top1", or "map" with several labels per image. `constant_score` is its value in percent for
    equal predictions for all images.
    """

    rows: Sequence[TrainedRow]
    data: str
    val_split: str | None
    num_train: int
    num_val: int
    num_classes: int
    metrics: Sequence[str]
    constant_score: float
    recipe: dict[str, Any]
    seeds: Sequence[int]
    comparisons: Sequence[Comparison]

    @property
    def metric_title(self) -> str:
        """The metric that is compared, as text."""
        return METRIC_TITLES[self.metrics[0]]
