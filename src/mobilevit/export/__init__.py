"""Export weights to artifacts for several runtimes, and compare each artifact with torch before it is saved."""

from __future__ import annotations

import json
import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mobilevit.benchmark.timing import measure
from mobilevit.data.python_data import to_data
from mobilevit.defaults import LABEL_THRESHOLD, MIN_SIZE_PX, NUM_CALIBRATION_IMAGES
from mobilevit.export.accuracy import AGREEMENT, Accuracy, LabeledData, Measured, shortest_prefix
from mobilevit.export.artifact import (
    ArtifactSpec,
    ExportModel,
    artifact_input,
    build_export_model,
    evenly_spaced,
    metadata_of,
)
from mobilevit.export.backend import (
    Backend,
    InferenceFn,
    Operators,
    find_backend,
    installed,
    load_artifact,
    read_metadata,
    read_signature,
)
from mobilevit.export.quantization import ALL_LAYERS, Sensitivity, int8_sensitivity
from mobilevit.export.verify import Agreement, compare, synthetic_images
from mobilevit.export_options import ARTIFACT_SUFFIXES, ExportOptions, Precision
from mobilevit.images import ImageInput
from mobilevit.weights import Weights

__all__ = [
    "TOLERANCE",
    "Accuracy",
    "Agreement",
    "Artifact",
    "ArtifactSpec",
    "ExportOptions",
    "Operators",
    "export",
    "export_each",
    "find_backend",
    "installed",
    "load_artifact",
    "read_metadata",
    "read_signature",
    "sensitivity",
]

logger = logging.getLogger(__name__)
# Largest allowed `Agreement.max_error`. For int8 only the predictions are compared.
TOLERANCE: Mapping[Precision, float] = {"fp32": 1e-3, "fp16": 0.1, "bf16": 0.5, "int8": math.inf}
MIN_PREDICTION_AGREEMENT = 0.9
NUM_VERIFY_IMAGES = 32
NUM_TIMED_ROUNDS = 15
MAX_UNSEEN_IMAGES = 1000  # to measure the agreement on


@dataclass(frozen=True)
class Artifact:
    """A written artifact.

    `agreement` and `latency_ms` (median of a batch) are None if the runtime does not exist on this system.
    `speedup_over_fp32` is the median ratio of interleaved times, for int8 artifacts only. `accuracy` is None unless
    labeled data or a maximum loss are given for an int8 artifact; `spec.float_groups` are the layers that stay float.
    """

    backend: str
    path: Path
    num_bytes: int
    spec: ArtifactSpec
    operators: Operators
    agreement: Agreement | None
    latency_ms: float | None = None
    speedup_over_fp32: float | None = None
    accuracy: Accuracy | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"path": str(self.path), "verified": self.agreement is not None}


@dataclass(frozen=True)
class _Job:
    """Inputs of the backends, prepared once per export."""

    network: ExportModel
    spec: ArtifactSpec
    stem: str
    metadata: Mapping[str, str]
    inputs: list[Tensor]
    other_inputs: list[tuple[ArtifactSpec, list[Tensor]]]  # of other sizes, if there are dynamic axes
    num_threads: int
    thresholds: tuple[float, ...]  # of a multi-label classifier
    max_loss: float | None
    labeled: LabeledData | None
    unseen_inputs: list[Tensor]  # that do not calibrate; empty without a maximum loss


def export(
    weights: Weights,
    backends: Sequence[str],
    out: str | Path,
    options: ExportOptions = ExportOptions(),  # noqa: B008 - frozen
    *,
    images: Sequence[ImageInput] = (),
    data: str | Path | None = None,
    source: str = "",
    prefix: str = "",
) -> list[Artifact]:
    """Export weights for each backend, and compare each artifact with torch on the same images.

    Args:
        weights: from `mobilevit.weights.read`.
        backends: names of backends: onnx, executorch, openvino, litert, coreml.
        out: folder to write to.
        options: precision, input and outputs.
        images: real images for the comparison and for int8 calibration; default: training images of `data`, or
            synthetic images.
        data: labeled data, as for `mobilevit.evaluate`, to evaluate int8 artifacts on.
        source: origin of the weights, for the metadata.
        prefix: start of the file names; default: "mobilevit_" and the architecture.

    Raises:
        ValueError: an unknown or missing backend, an unsupported option, an existing file without `overwrite`, an
            artifact that disagrees with torch or exceeds `max_loss`. That artifact is not written; those of earlier
            backends stay.
        ImageError: an unreadable image.
    """
    return list(export_each(weights, backends, out, options, images=images, data=data, source=source, prefix=prefix))


def export_each(
    weights: Weights,
    backends: Sequence[str],
    out: str | Path,
    options: ExportOptions,
    *,
    images: Sequence[ImageInput],
    data: str | Path | None,
    source: str,
    prefix: str,
) -> Iterator[Artifact]:
    """As `export`, but yield each artifact as soon as it is written. All arguments are checked before the first one."""
    spec = _spec_of(weights, options)
    if not backends:
        raise ValueError(f"no backend is given; the backends are {', '.join(ARTIFACT_SUFFIXES)}")
    modules = {name: find_backend(name, spec) for name in dict.fromkeys(backends)}
    labeled = None if data is None else LabeledData(weights, to_data(data))
    if labeled and not images:
        images = labeled.training_images(NUM_CALIBRATION_IMAGES)
    if spec.precision == "int8" and not images:
        raise ValueError("int8 requires real images for calibration; give some with --images or --data")
    _check_max_loss(options, list(modules), labeled)
    out = Path(out)
    stem = spec.file_stem(prefix or f"mobilevit_{weights.architecture.name}")
    for name in modules:
        path = out / f"{stem}{ARTIFACT_SUFFIXES[name]}"
        if path.exists() and not options.overwrite:
            raise ValueError(
                f"{path}: already exists; replace it with --overwrite, or choose another folder with --out"
            )

    num_images = NUM_CALIBRATION_IMAGES if spec.precision == "int8" else NUM_VERIFY_IMAGES
    selected = evenly_spaced(images, num_images) or synthetic_images(NUM_VERIFY_IMAGES, (spec.height, spec.width))

    def inputs_for(spec: ArtifactSpec, images: Sequence[ImageInput]) -> list[Tensor]:
        return [artifact_input(image, weights.preprocessing, spec) for image in images]

    job = _Job(
        build_export_model(weights, spec),
        spec,
        stem,
        metadata_of(weights, spec, source),
        inputs_for(spec, selected),
        [(other, inputs_for(other, selected[:4])) for other in _other_specs(spec)],
        options.num_threads,
        thresholds_of(weights),
        options.max_loss,
        labeled if spec.precision == "int8" else None,
        inputs_for(spec, _unseen(images, selected)) if options.max_loss is not None and not labeled else [],
    )
    out.mkdir(parents=True, exist_ok=True)
    ranked_groups = cache(lambda: _most_sensitive_groups(job))  # the same for all backends
    for name, backend in modules.items():
        logger.info("%s: converting ...", name)
        artifact = _export_to(name, backend, job, out, ranked_groups)
        logger.info("%s: wrote %s", name, artifact.path)
        yield artifact


def sensitivity(weights: Weights, images: Sequence[ImageInput]) -> list[Sensitivity]:
    """Measure the effect of int8 on each group of layers with real `images`; see `mobilevit.export.quantization`.

    Raises:
        ValueError: no images. ImageError: an unreadable image.
    """
    if not images:
        raise ValueError("the int8 sensitivity is measured on real images; give some with --images")
    size_px = weights.preprocessing.crop_px
    spec = ArtifactSpec("int8", size_px, size_px, task=weights.task)
    selected = evenly_spaced(images, NUM_CALIBRATION_IMAGES)
    inputs = [artifact_input(image, weights.preprocessing, spec) for image in selected]
    return int8_sensitivity(build_export_model(weights, spec), inputs, spec.outputs, thresholds_of(weights))


def thresholds_of(weights: Weights) -> tuple[float, ...]:
    """The threshold of each class of a multi-label classifier; empty for other tasks."""
    return weights.thresholds or (LABEL_THRESHOLD,) * weights.num_classes if weights.task == "multilabel" else ()


def _spec_of(weights: Weights, options: ExportOptions) -> ArtifactSpec:
    sides = list(options.size) or [weights.preprocessing.crop_px]
    if len(sides) > 2:
        raise ValueError(f"size is {options.size}; give one number, or height and width")
    min_px, where = (65, ", if the size is dynamic") if options.dynamic_size else (MIN_SIZE_PX, "")
    if min(sides) < min_px:
        raise ValueError(f"size is {sides[0]} x {sides[-1]} px; the minimum is {min_px} px{where}")
    for name, value in (("batch size", options.batch_size), ("num threads", options.num_threads)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be 1 or more")
    if not weights.num_classes:
        raise ValueError("these weights have no classifier, so there are no predictions to compare")
    return ArtifactSpec(
        options.precision,
        sides[0],
        sides[-1],
        options.batch_size,
        options.dynamic_batch,
        options.dynamic_size,
        options.uint8,
        weights.task,
        options.postprocess,
        options.browser,
    )


def _export_to(name: str, backend: Backend, job: _Job, out: Path, ranked_groups: Callable[[], list[str]]) -> Artifact:
    """Write, check and time one artifact in a temporary folder, then move it to `out`."""
    with tempfile.TemporaryDirectory(dir=out, prefix=".export-") as folder:
        path = Path(folder) / f"{job.stem}{ARTIFACT_SUFFIXES[name]}"
        job, accuracy = _limit_loss(name, backend, job, ranked_groups)
        spec = job.spec
        _write(backend, job, path)
        operators = backend.operators(path)
        infer = backend.load(path, job.num_threads)
        agreement = latency_ms = speedup = None
        if infer is not None:
            agreement = compare(job.network, infer, evenly_spaced(job.inputs, NUM_VERIFY_IMAGES), spec, job.thresholds)
            _check(name, spec, agreement)
            for other, inputs in job.other_inputs:
                _check(name, other, compare(job.network, infer, inputs, other, job.thresholds))
            latency_ms, speedup = _time(backend, job, infer, path.name)
        num_bytes = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        for file in Path(folder).iterdir():  # OpenVINO has a second file with the weights
            if (out / file.name).is_dir():
                shutil.rmtree(out / file.name)
            file.replace(out / file.name)
    return Artifact(name, out / path.name, num_bytes, spec, operators, agreement, latency_ms, speedup, accuracy)


def _write(backend: Backend, job: _Job, path: Path) -> None:
    backend.write(job.network, job.spec, path, job.metadata, job.inputs if job.spec.precision == "int8" else ())


def _limit_loss(
    name: str, backend: Backend, job: _Job, ranked_groups: Callable[[], list[str]]
) -> tuple[_Job, Accuracy | None]:
    """Measure the accuracy of int8, and keep groups of layers in float until its loss is within the limit.

    `ranked_groups` returns all groups, the most sensitive one first. The result is the job with the groups that stay in
    float, and with the figures in its metadata.
    """
    if not job.labeled and job.max_loss is None:
        return job, None
    limit = math.inf if job.max_loss is None else job.max_loss
    trials: dict[tuple[str, ...], Accuracy] = {}

    def measured(spec: ArtifactSpec) -> Measured:
        with tempfile.TemporaryDirectory() as folder:  # of its own: OpenVINO maps the file of a loaded artifact
            path = Path(folder) / f"artifact{ARTIFACT_SUFFIXES[name]}"
            _write(backend, replace(job, spec=spec), path)
            return job.labeled.measure(path) if job.labeled else _agreement(backend, job, path)

    fp32 = measured(replace(job.spec, precision="fp32"))

    def is_accurate(groups: tuple[str, ...]) -> bool:
        trials[groups] = Accuracy.of(fp32, measured(replace(job.spec, float_groups=groups)))
        logger.info("%s: %s; in float: %s", name, trials[groups].describe(), ", ".join(groups) or "none")
        return trials[groups].loss <= limit

    groups = () if is_accurate(()) else shortest_prefix(ranked_groups(), is_accurate)
    if groups is None:
        best = min(trials.values(), key=lambda accuracy: accuracy.loss)
        raise ValueError(
            f"max loss is {limit:g}, but {name} int8 loses at least {best.loss:.2f} points, even with all groups of "
            f"layers but the least sensitive one in float ({best.describe()}); allow more, calibrate on more images, "
            "or use --precision fp16; nothing was written"
        )
    accuracy = trials[groups]
    figures = {**asdict(accuracy), "max_loss": job.max_loss}
    metadata = {**job.metadata, "accuracy": json.dumps(figures), "float_groups": json.dumps(groups)}
    return replace(job, spec=replace(job.spec, float_groups=groups), metadata=metadata), accuracy


def _agreement(backend: Backend, job: _Job, path: Path) -> Measured:
    infer = backend.load(path, job.num_threads)
    assert infer is not None
    agreement = compare(job.network, infer, job.unseen_inputs, replace(job.spec, precision="int8"), job.thresholds)
    return Measured(AGREEMENT, 100 * agreement.prediction_agreement, agreement.num_images)


def _most_sensitive_groups(job: _Job) -> list[str]:
    """All groups of layers, the most sensitive one first."""
    measured = int8_sensitivity(job.network, job.inputs, job.spec.outputs, job.thresholds)
    ranked = sorted(measured, key=lambda one: one.rms_error, reverse=True)
    return [one.group for one in ranked if one.group != ALL_LAYERS]


def _time(backend: Backend, job: _Job, infer: InferenceFn, file_name: str) -> tuple[float, float | None]:
    """Median latency of a batch, and for int8 the speedup over fp32. Some runtimes are slower in int8."""
    example = torch.cat([job.inputs[0]] * job.spec.batch_size).numpy()
    if job.spec.precision != "int8":
        return float(np.median(measure([partial(infer, example)], NUM_TIMED_ROUNDS))), None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / file_name
        _write(backend, replace(job, spec=replace(job.spec, precision="fp32")), path)
        infer_fp32 = backend.load(path, job.num_threads)
        assert infer_fp32 is not None
        int8_ms, fp32_ms = measure([partial(infer, example), partial(infer_fp32, example)], NUM_TIMED_ROUNDS)
    return float(np.median(int8_ms)), float(np.median(fp32_ms / int8_ms))


def _check_max_loss(options: ExportOptions, backends: Sequence[str], labeled: LabeledData | None) -> None:
    limit = options.max_loss
    if limit is not None and options.precision != "int8":
        raise ValueError(f"max loss is {limit:g}, but the precision is {options.precision}; add --precision int8")
    if limit is not None and not 0 <= limit < 100:  # also true for NaN
        raise ValueError(f"max loss is {limit:g}; it must be from 0 to 100 percentage points")
    if options.precision != "int8" or (limit is None and labeled is None):
        return
    if "coreml" in backends:
        raise ValueError("coreml: the accuracy of its artifacts cannot be measured; leave out --max-loss and --data")
    if labeled and len(options.size) == 2 and options.size[0] != options.size[1]:
        raise ValueError(f"size is {options.size}, but accuracy is measured on squares; give one number, or no --data")


def _unseen(images: Sequence[ImageInput], calibration: Sequence[ImageInput]) -> list[ImageInput]:
    """The images that do not calibrate, at most `MAX_UNSEEN_IMAGES`; those that do if there are no others."""
    used = set(map(id, calibration))
    unseen = [image for image in images if id(image) not in used]
    return evenly_spaced(unseen, MAX_UNSEEN_IMAGES) or list(calibration)


def _other_specs(spec: ArtifactSpec) -> list[ArtifactSpec]:
    """Other values of the dynamic axes. An artifact is compared at these, too."""
    batches = [replace(spec, batch_size=spec.batch_size + 2)] if spec.dynamic_batch else []
    sizes = [replace(spec, height=spec.height + 37, width=spec.width + 64)] if spec.dynamic_size else []
    return batches + sizes


def _check(name: str, spec: ArtifactSpec, agreement: Agreement) -> None:
    tolerance = TOLERANCE[spec.precision]
    if not agreement.max_error <= tolerance:  # also true for NaN
        raise ValueError(
            f"{name} {spec.precision}: the outputs ({', '.join(spec.outputs)}) differ from torch by up to "
            f"{agreement.max_error:.2g} of their standard deviation (tolerance {tolerance:g}); nothing was written"
        )
    if agreement.prediction_agreement < MIN_PREDICTION_AGREEMENT:
        raise ValueError(
            f"{name} {spec.precision}: only {100 * agreement.prediction_agreement:.3g} % of "
            f"{agreement.num_predictions:,} {agreement.prediction_unit} have the same prediction as in torch (minimum "
            f"{100 * MIN_PREDICTION_AGREEMENT:.0f} %); nothing was written"
        )
