"""`mobilevit evaluate`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mobilevit.cli.console import stdout
from mobilevit.cli.options import (
    FLAT,
    SELF_CHECK,
    WEIGHTS,
    DeviceOptions,
    Flag,
    ImageOptions,
    WeightsOptions,
    choices,
    expand,
    expand_data,
    require,
    warn_of_assumptions,
    weights_of_run,
)
from mobilevit.defaults import MIN_SIZE_PX, CorruptionName
from mobilevit.export_options import ARTIFACT_SUFFIXES, backend_of_file

if TYPE_CHECKING:
    from mobilevit.data.corruptions import Corruption
    from mobilevit.export.predictor import ArtifactPredictor
    from mobilevit.tasks.evaluation import EvaluationResult
    from mobilevit.tasks.task import ClassMetrics, Described
    from mobilevit.weights import Weights

Split = Literal["train", "val", "test", "all"]
PROBABILITIES = ("threshold",)  # metrics from 0 to 1
# Headings and decimals of metrics. Others are counts.
HEADINGS = {
    "loss": "loss",
    "top1": "top-1 %",
    "top5": "top-5 %",
    "knn_top1": "k-NN top-1 %",
    "miou": "mIoU %",
    "iou": "IoU %",
    "map": "mAP %",
    "micro_f1": "micro F1 %",
    "macro_f1": "macro F1 %",
    "f1": "F1 %",
} | {
    name: f"{name.replace('ap', 'AP', 1) if name.startswith('ap') else name} %".replace("_", " ")
    for name in (
        "recall",
        "precision",
        "pixel_accuracy",
        "balanced_accuracy",
        "ap",
        "ap50",
        "ap75",
        "ap_small",
        "ap_medium",
        "ap_large",
        "agreement",
    )
}
HEADINGS |= {
    "ece": "ECE %",
    "ece_uncalibrated": "ECE % uncalibrated",
    "coverage": "coverage %",
    "accepted_top1": "top-1 % accepted",
    "ood_auroc": "OOD AUROC %",
}


@dataclass(frozen=True)
class Evaluate:
    """Evaluate weights or exported artifacts on labeled images, at one or several input sizes.

    Metrics: top-1, top-5 and balanced accuracy, macro F1 and calibration error (ECE) of classification, mAP and F1 of
    several labels per image, AP of detection, mIoU of segmentation.
    """

    weights: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(
            metavar="WEIGHTS...",
            help=f"Weights: {WEIGHTS}; a run folder, for its EMA and raw weights of the last epoch; or an exported "
            f"artifact ({', '.join(ARTIFACT_SUFFIXES.values())}), run on the CPU.",
        ),
    ]
    data: Annotated[str, tyro.conf.arg(metavar="DATA")]
    """Dataset, as for mobilevit train."""
    split: Annotated[Split | None, tyro.conf.arg(metavar=choices(Split))] = None
    """Split to evaluate. Default: val, or test if there is no val. Data without splits are split as in training if the
    weights were trained on them; otherwise all images are evaluated."""
    size: Annotated[tuple[int, ...], tyro.conf.arg(metavar="PX...")] = ()
    """Input sizes in pixels. Default: the input size in training, or that of the artifact."""
    ood: Annotated[str | None, tyro.conf.arg(metavar="DATA")] = None
    """Classification: images of another source (out of distribution), a folder of images or a dataset. Reports the
    AUROC of the energy: the probability that such an image has a higher energy than one of --data."""
    knn: Flag = False
    """Classification: predict the most frequent class of the nearest training images, by the cosine of the pooled
    features, instead of that of the classifier. The weights need no classifier."""
    k: int = 20
    """Number of nearest training images for --knn."""
    corrupt: Annotated[
        tuple[CorruptionName, ...] | None, tyro.conf.arg(metavar="[CORRUPTION...]", help_behavior_hint="")
    ] = None
    """Also evaluate on corrupted images, at severities 1 to 5: the 15 common corruptions of ImageNet-C, or those named,
    such as gaussian_noise fog (docs/training.md). Takes 5 evaluations per corruption."""
    per_class: Flag = False
    """Also print the metrics of each class."""
    json: Flag = False
    """Print one JSON object per line instead of a table."""
    batch_size: int = 32
    """Batch size in images."""
    num_workers: int = 2
    """Number of processes that read images; 0 reads them in the main process."""
    max_unreadable: int = 0
    """Maximum number of unreadable images to skip."""
    image_options: Annotated[ImageOptions, FLAT] = ImageOptions()
    device_options: Annotated[DeviceOptions, FLAT] = DeviceOptions()
    self_check: Annotated[Flag, SELF_CHECK] = True
    weights_options: Annotated[WeightsOptions, FLAT] = WeightsOptions()

    def run(self) -> int:
        """Evaluate, and print the metrics."""
        from mobilevit.weights import Weights, read

        self._check()
        device = self.device_options.apply()
        self.image_options.apply()
        # Read all weights before the first evaluation, so that a wrong name fails at once.
        names = [name for given in self.weights for name in weights_of_run(given)]
        named: dict[str, Weights | ArtifactPredictor] = {
            name: self._artifact(name)
            if backend_of_file(Path(name))
            else read(name, download=self.weights_options.download)
            for name in names
        }
        data = expand_data(self.data)
        tasks = {weights.task for weights in named.values()}
        if len(tasks) > 1:
            raise ValueError(
                f"the weights are for several tasks: {', '.join(sorted(tasks))}; evaluate one task at a time"
            )
        rows: list[tuple[str, str, int, dict[str, float]]] = []
        tables: list[tuple[str, Any]] = []
        self._corruptions()  # reports a missing package before the first evaluation
        splits: list[str] = []
        for name, weights in named.items():
            if isinstance(weights, Weights):
                warn_of_assumptions(name, weights)
                sizes_px = self.size or (weights.preprocessing.crop_px,)
            else:
                sizes_px = self.size or (None,)
            for requested_px in sizes_px:
                result = self._evaluate(weights, data, requested_px, device)
                split, size_px = result.split, result.size_px
                robustness = self._robustness(weights, data, result, device)
                if self.json:
                    line: dict[str, Any] = {"weights": name, "size_px": size_px, "split": split, **result.metrics}
                    if self.per_class:
                        line["classes"] = [row.as_dict() for row in result.per_class]
                    if robustness:
                        line["robustness"] = robustness.as_dict()
                    print(json.dumps(line), flush=True)
                    continue
                rows.append((name, split, size_px, result.metrics))
                if self.per_class:
                    tables.append((f"{name} at {size_px} px", _class_table(result.per_class)))
                if robustness:
                    tables.append((f"{name} at {size_px} px, {robustness.describe()}", _corruption_table(robustness)))
                splits.append(split_line(weights, split, self.split, result.metrics["num_images"], data))
        if rows:
            console = stdout()
            console.print(_table(rows))
            for title, table in tables:
                console.print(title)
                console.print(table)
            for text in dict.fromkeys(splits):
                console.print(text)
        return 0

    def _corruptions(self) -> list[Corruption]:
        """Each corruption at five severities. Raises ValueError if the package is missing."""
        if self.corrupt is None:
            return []
        from mobilevit.data.corruptions import CORRUPTIONS, SEVERITIES, Corruption

        names = tuple(dict.fromkeys(self.corrupt)) or CORRUPTIONS
        return [Corruption(name, severity) for name in names for severity in SEVERITIES]

    def _artifact(self, name: str) -> ArtifactPredictor:
        from mobilevit.export.predictor import load_predictor

        return load_predictor(expand(Path(name)))

    def _robustness(
        self, weights: Weights | ArtifactPredictor, data: str, clean: EvaluationResult, device: str
    ) -> _Robustness | None:
        """The metrics on corrupted images, if they are requested. Shows a progress bar."""
        if self.corrupt is None:
            return None
        from rich.progress import track

        from mobilevit.data.corruptions import describe_package
        from mobilevit.logs import CONSOLE

        metric = clean.results.main_metric
        values: dict[str, list[float]] = {}
        for corruption in track(self._corruptions(), "corruptions", console=CONSOLE):
            result = self._evaluate(weights, data, clean.size_px, device, corruption)
            values.setdefault(corruption.name, []).append(result.metrics[metric])
        return _Robustness(metric, clean.metrics[metric], values, describe_package())

    def _evaluate(
        self,
        weights: Weights | ArtifactPredictor,
        data: str,
        size_px: int | None,
        device: str,
        corruption: Corruption | None = None,
    ) -> EvaluationResult:
        from mobilevit.embed import EmbedOptions
        from mobilevit.tasks.evaluation import EvaluationOptions, evaluate
        from mobilevit.tasks.knn import evaluate_knn
        from mobilevit.weights import Weights

        ood = expand_data(self.ood) if self.ood and corruption is None else None
        if not isinstance(weights, Weights):
            from mobilevit.export.evaluation import evaluate_artifact

            options = EvaluationOptions(
                self.split, self.batch_size, self.num_workers, self.max_unreadable, corruption, ood
            )
            return evaluate_artifact(weights, data, size_px=size_px, options=options)
        if self.knn:
            return evaluate_knn(
                weights,
                data,
                k=self.k,
                split=self.split,
                size_px=size_px,
                max_unreadable=self.max_unreadable,
                options=EmbedOptions(self.batch_size, self.num_workers, device, self.self_check),
            )
        return evaluate(
            weights,
            data,
            split=self.split,
            size_px=size_px,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            max_unreadable=self.max_unreadable,
            device=device,
            self_check=self.self_check and corruption is None,
            corruption=corruption,
            ood=ood,
        )

    def _check(self) -> None:
        if self.knn and self.ood:
            raise ValueError(f"--ood is {self.ood}, but --knn has no logits to compute energies from; leave one out")
        if self.knn and self.corrupt is not None:
            raise ValueError("--corrupt evaluates the classifier, and --knn replaces it; give only one of them")
        if not self.weights:
            raise ValueError("no weights are given; give files, hub ids or a run folder")
        for size_px in self.size:
            require(size_px >= MIN_SIZE_PX, "--size", size_px, f"{MIN_SIZE_PX} px or more")
        for name in self.weights:
            if not backend_of_file(Path(name)):
                continue
            if self.knn:
                raise ValueError(f"{name}: --knn needs features, and an artifact returns none; give weights")
            device = self.device_options.device
            if device not in ("auto", "cpu"):
                raise ValueError(
                    f"--device is {device}, but {name} is an artifact and runs on the CPU; leave out --device"
                )
        require(self.max_unreadable >= 0, "--max-unreadable", self.max_unreadable, "0 or more")
        require(self.num_workers >= 0, "--num-workers", self.num_workers, "0 or more")


@dataclass(frozen=True)
class _Robustness:
    """The main metric in percent: on the images as they are, and by corruption, at severities 1 to 5."""

    metric: str
    clean: float
    by_corruption: dict[str, list[float]]
    package: str

    @property
    def mean(self) -> float:
        """The mean over all corruptions and severities."""
        return fmean(value for values in self.by_corruption.values() for value in values)

    def describe(self) -> str:
        return (
            f"{_heading(self.metric)} on corrupted images: mean {self.mean:.2f}, without corruption {self.clean:.2f} "
            f"({len(self.by_corruption)} of the 15 common corruptions at 5 severities, {self.package})"
        )

    def as_dict(self) -> dict[str, Any]:
        values = {"metric": self.metric, "clean": self.clean, "mean": self.mean, "package": self.package}
        return {**values, "corruptions": self.by_corruption}


def _corruption_table(robustness: _Robustness) -> Any:
    from rich.box import SIMPLE
    from rich.table import Column, Table

    table = Table(
        "corruption",
        *(Column(f"severity {i}", justify="right") for i in range(1, 6)),
        Column("mean", justify="right"),
        box=SIMPLE,
    )
    for name, values in robustness.by_corruption.items():
        table.add_row(name.replace("_", " "), *(f"{value:.2f}" for value in (*values, fmean(values))))
    return table


def split_line(weights: Described, split: str, requested: str | None, num_images: float, data: str) -> str:
    """A line that names the evaluated images."""
    line = f"evaluated: {'all' if split == 'all' else f'the {split} split'} of {data}, {num_images:,} images"
    if split == "all" and requested is None:  # these are not recognized as training data
        line += "; training images among them, if any, are included"
        line += "" if weights.val_fraction is None else " (to exclude them: --split val)"
    return line


def format_metric(name: str, value: float) -> str:
    """A metric as text, such as "top-1 78.40 %"."""
    heading, percent, _ = _heading(name).partition(" %")
    return f"{heading} {_text(name, value)}{percent}"


def _heading(name: str) -> str:
    return HEADINGS.get(name, name.removeprefix("num_").replace("_", " "))


def _text(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    if name in PROBABILITIES:
        return f"{value:.3f}"
    if name not in HEADINGS:
        return f"{value:,}"
    return f"{value:.4f}" if name == "loss" else f"{value:.2f}"


def _table(rows: list[tuple[str, str, int, dict[str, float]]]) -> Any:
    from rich.box import SIMPLE
    from rich.table import Column, Table

    # Metrics of objects of a size are missing where the data have none.
    metrics = list(dict.fromkeys(name for *_, metrics in rows for name in metrics))
    table = Table(
        "weights", "split", *(Column(_heading(name), justify="right") for name in ("px", *metrics)), box=SIMPLE
    )
    for name, split, size_px, values in rows:
        table.add_row(name, split, str(size_px), *(_text(metric, values.get(metric)) for metric in metrics))
    return table


def _class_table(rows: list[ClassMetrics]) -> Any:
    from rich.box import SIMPLE
    from rich.table import Column, Table

    table = Table("class", *(Column(_heading(name), justify="right") for name in rows[0].metrics), box=SIMPLE)
    for row in rows:
        table.add_row(row.class_name, *(_text(name, value) for name, value in row.metrics.items()))
    return table
