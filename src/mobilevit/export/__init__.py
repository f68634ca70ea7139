"""Export weights to artifacts for several runtimes, and compare each artifact with torch before it is saved."""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mobilevit.benchmark.timing import measure
from mobilevit.defaults import LABEL_THRESHOLD, MIN_SIZE_PX, NUM_CALIBRATION_IMAGES
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
from mobilevit.export.quantization import Sensitivity, int8_sensitivity
from mobilevit.export.verify import Agreement, compare, synthetic_images
from mobilevit.export_options import ARTIFACT_SUFFIXES, ExportOptions, Precision
from mobilevit.images import ImageInput
from mobilevit.weights import Weights

__all__ = [
    "TOLERANCE",
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


@dataclass(frozen=True)
class Artifact:
    """A written artifact.

    `agreement` and `latency_ms` (median of a batch) are None if the runtime does not exist on this system.
    `speedup_over_fp32` is the median ratio of interleaved times, for int8 artifacts only.
    """

    backend: str
    path: Path
    num_bytes: int
    spec: ArtifactSpec
    operators: Operators
    agreement: Agreement | None
    latency_ms: float | None = None
    speedup_over_fp32: float | None = None

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


def export(
    weights: Weights,
    backends: Sequence[str],
    out: str | Path,
    options: ExportOptions = ExportOptions(),  # noqa: B008 - frozen
    *,
    images: Sequence[ImageInput] = (),
    source: str = "",
    prefix: str = "",
) -> list[Artifact]:
    """Export weights for each backend, and compare each artifact with torch on the same images.

    Args:
        weights: from `mobilevit.weights.read`.
        backends: names of backends: onnx, executorch, openvino, litert, coreml.
        out: folder to write to.
        options: precision, input and outputs.
        images: real images for the comparison and for int8 calibration; default: synthetic images.
        source: origin of the weights, for the metadata.
        prefix: start of the file names; default: "mobilevit_" and the architecture.

    Raises:
        ValueError: an unknown or missing backend, an unsupported option, an existing file without `overwrite`, an
            artifact that disagrees with torch. That artifact is not written; those of earlier backends stay.
        ImageError: an unreadable image.
    """
    return list(export_each(weights, backends, out, options, images=images, source=source, prefix=prefix))


def export_each(
    weights: Weights,
    backends: Sequence[str],
    out: str | Path,
    options: ExportOptions,
    *,
    images: Sequence[ImageInput],
    source: str,
    prefix: str,
) -> Iterator[Artifact]:
    """As `export`, but yield each artifact as soon as it is written. All arguments are checked before the first one."""
    spec = _spec_of(weights, options)
    if not backends:
        raise ValueError(f"no backend is given; the backends are {', '.join(ARTIFACT_SUFFIXES)}")
    modules = {name: find_backend(name, spec) for name in dict.fromkeys(backends)}
    if spec.precision == "int8" and not images:
        raise ValueError("int8 requires real images for calibration; give some with --images")
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
    )
    out.mkdir(parents=True, exist_ok=True)
    for name, backend in modules.items():
        logger.info("%s: converting ...", name)
        artifact = _export_to(name, backend, job, out)
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
    )


def _export_to(name: str, backend: Backend, job: _Job, out: Path) -> Artifact:
    """Write, check and time one artifact in a temporary folder, then move it to `out`."""
    spec, is_int8 = job.spec, job.spec.precision == "int8"
    with tempfile.TemporaryDirectory(dir=out, prefix=".export-") as folder:
        path = Path(folder) / f"{job.stem}{ARTIFACT_SUFFIXES[name]}"
        backend.write(job.network, spec, path, job.metadata, job.inputs if is_int8 else ())
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
    return Artifact(name, out / path.name, num_bytes, spec, operators, agreement, latency_ms, speedup)


def _time(backend: Backend, job: _Job, infer: InferenceFn, file_name: str) -> tuple[float, float | None]:
    """Median latency of a batch, and for int8 the speedup over fp32. Some runtimes are slower in int8."""
    example = torch.cat([job.inputs[0]] * job.spec.batch_size).numpy()
    if job.spec.precision != "int8":
        return float(np.median(measure([partial(infer, example)], NUM_TIMED_ROUNDS))), None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / file_name
        backend.write(job.network, replace(job.spec, precision="fp32"), path, job.metadata, ())
        infer_fp32 = backend.load(path, job.num_threads)
        assert infer_fp32 is not None
        int8_ms, fp32_ms = measure([partial(infer, example), partial(infer_fp32, example)], NUM_TIMED_ROUNDS)
    return float(np.median(int8_ms)), float(np.median(fp32_ms / int8_ms))


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
