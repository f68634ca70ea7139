"""The models that a benchmark times: each is a file in the format of its runtime, ours and those of other libraries."""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from mobilevit.benchmark import rivals
from mobilevit.benchmark.cost import profile
from mobilevit.benchmark.timing import measure
from mobilevit.export import find_backend, load_artifact, read_metadata, read_signature
from mobilevit.export.artifact import ArtifactSpec, as_arrays
from mobilevit.export.backend import InferenceFn, Signature
from mobilevit.export.rewrite import optimize_for_inference
from mobilevit.export.verify import synthetic_images
from mobilevit.export_options import ARTIFACT_SUFFIXES, PRECISIONS, Precision, backend_of_file
from mobilevit.messages import first_line
from mobilevit.models.deeplabv3 import PAPER_HEAD, DeepLabHead, DeepLabV3
from mobilevit.models.mobilevit import ARCHITECTURES, MobileViT
from mobilevit.models.ssdlite import SSDLite
from mobilevit.weights import TaskName, Weights

logger = logging.getLogger(__name__)

TORCH = ("torch", "compiled")  # eager, and torch.compile with frozen weights
RUNTIMES = (*TORCH, *ARTIFACT_SUFFIXES)
CALIBRATION_IMAGES = 16  # few, because the calibration does not affect the speed
LAYOUT_ROUNDS = 3
Rival = tuple[str, bool]  # name of a model for `rivals.build`, and whether it is built for export
# File names of artifacts that are named after the architecture, as `mobilevit export` does for hub ids.
_ARTIFACT = re.compile(
    rf"(?P<network>mobilevit_(?P<architecture>{'|'.join(ARCHITECTURES)})(?:_(?P<task>detect|segment))?_\d+x\d+)"
    rf"_(?P<precision>{'|'.join(PRECISIONS)})(?:_uint8)?(?P<postprocess>_postprocess|_answers)?(?P<browser>_browser)?"
)


@dataclass(frozen=True)
class BenchmarkModel:
    """A model to time: the file `path`, which `runtime` reads, for an input of `shape`.

    `network` is equal for files with the same function. `num_macs` is per image. `expected` are the outputs that torch
    computes for `example_input`. `baseline` is the label of the model that this one is compared with.
    """

    name: str
    network: str
    runtime: str
    precision: str
    path: Path
    shape: tuple[int, ...]
    uint8: bool = False
    num_macs: int | None = None
    expected: tuple[np.ndarray, ...] | None = None
    baseline: str | None = None

    @property
    def label(self) -> str:
        """Unique among the models of one batch size."""
        label = f"{self.name} {self.runtime} {self.precision}"
        return f"{label} against {self.baseline}" if self.baseline else label

    @property
    def batch_size(self) -> int:
        return self.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return (self.shape[1], self.shape[2]) if self.uint8 else (self.shape[2], self.shape[3])

    @property
    def num_bytes(self) -> int:
        """Size on disk. OpenVINO stores its weights in a second file."""
        files = [self.path, *([self.path.with_suffix(".bin")] if self.path.suffix == ".xml" else [])]
        return sum(file.stat().st_size for file in files if file.is_file())

    def example_input(self) -> np.ndarray:
        """A random input batch, always the same."""
        random = np.random.default_rng(0)
        if self.uint8:
            return random.integers(0, 256, self.shape, dtype=np.uint8)
        return random.random(self.shape, dtype=np.float32)

    def error(self, outputs: Sequence[np.ndarray]) -> float | None:
        """The largest difference of `outputs` from `expected`, in standard deviations of the expected output."""
        if self.expected is None:
            return None
        pairs = zip(outputs, self.expected, strict=True)
        return float(np.max([np.abs(x.astype(np.float32) - expected).max() / expected.std() for x, expected in pairs]))

    def load(self, num_threads: int) -> InferenceFn:
        """Load the model into its runtime: input batch -> outputs."""
        if self.runtime not in TORCH:
            return load_artifact(self.path, num_threads)
        torch.set_num_threads(num_threads)
        network = torch.load(self.path, weights_only=False)
        if self.runtime == "compiled":
            network = torch.compile(network, dynamic=False, options={"freezing": True})

        def run(images: np.ndarray) -> tuple[np.ndarray, ...]:
            with torch.no_grad() if self.runtime == "compiled" else torch.inference_mode():
                return as_arrays(network(torch.from_numpy(images)))

        return run


def models_from_weights(
    name: str,
    weights: Weights,
    folder: Path,
    *,
    runtimes: Sequence[str] = ("torch",),
    precisions: Sequence[Precision] = ("fp32",),
    batch_sizes: Sequence[int] = (1,),
    size: tuple[int, int] | None = None,
    against: Sequence[str] = (),
    browser: bool = False,
) -> list[BenchmarkModel]:
    """Write `weights` to `folder` for every runtime, precision and batch size, each with the models to compare it with.

    `against` are names for `rivals.build`, and "self". A model of another library that a runtime cannot convert is left
    out with a warning. int8 is that of `ArtifactSpec.browser`, for all models, if `browser`.

    Raises:
        ValueError: an unknown name, a runtime that is not installed, an unsupported combination.
    """
    if not weights.num_classes:
        raise ValueError(f"{name}: these weights have no classifier, so there are no outputs to compare")
    model = weights.build().requires_grad_(False)
    height, width = size or (weights.preprocessing.crop_px,) * 2
    # Artifacts without postprocessing (NMS, argmax): other libraries do it outside of their models.
    specs = [
        ArtifactSpec(p, height, width, b, task=weights.task, browser=browser and p == "int8")
        for p in precisions
        for b in batch_sizes
    ]
    combinations = [(runtime, spec) for runtime in runtimes for spec in specs]
    for runtime, spec in combinations:  # all before the first export, which takes long
        _check_runtime(runtime, spec)
    networks = _build_rivals(against, weights, exportable={runtime not in TORCH for runtime in runtimes})
    num_macs = _num_macs(model, (height, width))
    models = []
    for runtime, spec in combinations:
        _log_writing(name, runtime, spec)
        ours = replace(write_model(name, model, runtime, spec, folder), num_macs=num_macs)
        models += [ours, *_write_rivals(against, networks, ours, spec, folder)]
    return models


def models_from_artifact(
    path: Path,
    folder: Path,
    *,
    batch_sizes: Sequence[int] = (),
    size: tuple[int, int] | None = None,
    against: Sequence[str] = (),
) -> list[BenchmarkModel]:
    """The artifact `path`, and the models to compare it with, which are written to `folder`.

    The network and the precision are taken from the file name, if the artifact is named after the architecture.

    Raises:
        ValueError: no artifact, a batch or image size that it does not accept, `against` with another file name.
    """
    runtime = backend_of_file(path)
    if runtime is None or not path.exists():
        load_artifact(path)  # raises an error with the reason
        raise AssertionError("unreachable")
    _check_runtime(runtime, None)
    found = read_signature(path)
    match = _ARTIFACT.fullmatch(path.stem)
    if against and not match:
        raise ValueError(
            f"{path}: the file name does not identify the network, which --against needs; give the weights and "
            f"--runtime {runtime} instead, or rename the file like mobilevit_xs_256x256_fp32{path.suffix}"
        )
    weights = _weights_like(path, match, found) if match else None
    networks = _build_rivals(against, weights, exportable=[True]) if weights else {}
    models = []
    for batch_size in batch_sizes or (found.shape[0] or 1,):
        ours = BenchmarkModel(
            name=str(path),
            network=match["network"] + (match["postprocess"] or "") if match else str(path),
            runtime=runtime,
            precision=match["precision"] if match else "-",
            path=path,
            shape=input_shape(path, found, batch_size, size),
            uint8=found.uint8,
        )
        if not weights:
            models.append(ours)
            continue
        ours = replace(ours, num_macs=_num_macs(weights.build(), ours.size))
        precision, browser = cast(Precision, ours.precision), bool(match and match["browser"])
        spec = ArtifactSpec(precision, *ours.size, batch_size, task=weights.task, browser=browser)
        models += [ours, *_write_rivals(against, networks, ours, spec, folder)]
    return models


def write_model(name: str, network: nn.Module, runtime: str, spec: ArtifactSpec, folder: Path) -> BenchmarkModel:
    """Write `network`, ours or another one, in eval mode, to a new file in `folder`."""
    stem = re.sub(r"[^\w.-]", "_", f"{name}_{spec.height}x{spec.width}_b{spec.batch_size}_{spec.precision}")
    path = folder / f"{stem}_{len(list(folder.iterdir()))}{ARTIFACT_SUFFIXES.get(runtime, '.pt')}"
    shape = (spec.batch_size, 3, spec.height, spec.width)
    model = BenchmarkModel(name, name, runtime, spec.precision, path, shape)
    images = torch.from_numpy(model.example_input())
    with torch.inference_mode():
        expected = as_arrays(network(images))
    if runtime in TORCH:
        torch.save(faster_layout(optimize_for_inference(network), images)[0], path)
    else:
        synthetic = synthetic_images(CALIBRATION_IMAGES if spec.precision == "int8" else 0, model.size)
        calibration = [torch.from_numpy(p).permute(2, 0, 1)[None].contiguous() / 255 for p in synthetic]
        find_backend(runtime, spec).write(network, spec, path, {}, calibration)
    return replace(model, expected=expected)


def _build_rivals(names: Sequence[str], weights: Weights, *, exportable: Collection[bool]) -> dict[Rival, nn.Module]:
    """Build models of other libraries, before any export, so that a wrong name fails early."""
    names = [name for name in names if name != "self"]
    return {(name, e): rivals.build(name, weights, exportable=e) for name in names for e in sorted(exportable)}


def _write_rivals(
    names: Sequence[str],
    networks: Mapping[Rival, nn.Module],
    ours: BenchmarkModel,
    spec: ArtifactSpec,
    folder: Path,
) -> list[BenchmarkModel]:
    """Write the models `names` to `folder`, with `ours` as their baseline."""
    models = []
    for name in dict.fromkeys(names):
        if name == "self":
            models.append(replace(ours, name="self", baseline=ours.label))
            continue
        _log_writing(name, ours.runtime, spec)
        try:
            model = write_model(name, networks[name, ours.runtime not in TORCH], ours.runtime, spec, folder)
        except Exception as error:  # a converter may raise anything
            logger.warning(
                "%s %s: %s is left out, its conversion failed (%s)",
                *(ours.runtime, spec.precision, name, first_line(error)),
            )
            continue
        if name in rivals.SAME_MODEL:
            expected = model.expected if ours.expected is None else ours.expected
            model = replace(model, network=ours.network, num_macs=ours.num_macs, expected=expected)
        else:
            for output in model.expected or ():
                rivals.check_scale(name, torch.from_numpy(output))
        models.append(replace(model, baseline=ours.label))
    return models


def input_shape(path: Path, found: Signature, batch_size: int, size: tuple[int, int] | None) -> tuple[int, ...]:
    """The input shape of an artifact for a batch and an image size, by default its own, else 256 px."""
    if found.shape[0] not in (None, batch_size):
        raise ValueError(
            f"{path}: its batch size is {found.shape[0]}, not {batch_size}; give --batch-size {found.shape[0]}, or "
            f"export it with --batch-size {batch_size}"
        )
    fixed = found.shape[1:3] if found.uint8 else found.shape[2:4]
    height, width = size or [side or 256 for side in fixed]
    if any(side not in (None, requested) for side, requested in zip(fixed, (height, width), strict=True)):
        raise ValueError(f"{path}: its input is {fixed[0]} x {fixed[1]} px, not {height} x {width}; leave out --size")
    return (batch_size, height, width, 3) if found.uint8 else (batch_size, 3, height, width)


def _weights_like(path: Path, match: re.Match[str], found: Signature) -> Weights:
    """Random weights of the network that an artifact contains."""
    if match["task"] is None:
        return rivals.random_weights(match["architecture"], num_classes=found.num_classes)
    metadata = read_metadata(path)
    head: dict[str, Any] = json.loads(metadata["head"]) if "head" in metadata else {}
    return rivals.random_weights(
        match["architecture"],
        task=cast(TaskName, match["task"]),
        num_classes=int(metadata["num_classes"]),
        output_stride=int(metadata["output_stride"]),
        head=DeepLabHead(**{**head, "rates": tuple(head["rates"])}) if head else PAPER_HEAD,
    )


def _check_runtime(runtime: str, spec: ArtifactSpec | None) -> None:
    """Raise ValueError if a runtime is unknown, not installed, or does not support `spec`."""
    if runtime not in RUNTIMES:
        raise ValueError(f"there is no runtime {runtime!r}; the runtimes are {', '.join(RUNTIMES)}")
    if runtime not in TORCH:
        find_backend(runtime, spec or ArtifactSpec("fp32", 256, 256))
    elif spec and spec.precision != "fp32":
        raise ValueError(f"{runtime} is timed in fp32 only; leave out {spec.precision} or {runtime}")


def runner(network: nn.Module, images: Tensor) -> Callable[[], None]:
    """A function that runs `network` on `images` and waits for the result."""

    def run() -> None:
        with torch.inference_mode():
            network(images)
        if images.device.type != "cpu":
            torch.accelerator.synchronize(images.device)

    return run


def faster_layout(network: nn.Module, images: Tensor) -> tuple[nn.Module, str]:
    """`network` with its weights in the memory layout that is faster on this machine, and the name of that layout."""
    channels_last = copy.deepcopy(network).to(memory_format=torch.channels_last)
    layouts = {"channels first": network, "channels last": channels_last}
    times_ms = measure([runner(x, images) for x in layouts.values()], LAYOUT_ROUNDS)
    layout = list(layouts)[int(times_ms.min(axis=1).argmin())]
    return layouts[layout], layout


def _num_macs(model: MobileViT | SSDLite | DeepLabV3, size: tuple[int, int]) -> int:
    cost = profile(model, size)
    return cost.num_macs + cost.num_attention_macs


def _log_writing(name: str, runtime: str, spec: ArtifactSpec) -> None:
    logger.info("%s %s: writing %s, batch size %d ...", runtime, spec.precision, name, spec.batch_size)
