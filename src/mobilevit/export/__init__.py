"""Deployment: from weights to artifacts that runtimes read, each compared with torch before it counts as written."""

from __future__ import annotations

import importlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn

from mobilevit.export.artifact import (
    ANSWERS,
    IOU_THRESHOLD,
    MAX_PER_IMAGE,
    SCORE_THRESHOLD,
    Precision,
    Target,
    deployed,
)
from mobilevit.export.quantization import Cost, costs_of_int8
from mobilevit.export.verify import Agreement, Run, compare, speed_ratio, synthetic_images
from mobilevit.images import ImageInput, Preprocessing, read_image
from mobilevit.weights import TaskName, Weights

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
# The largest difference of a number from torch's, in standard deviations of torch's, that an artifact may have, see
# `Agreement`. What int8 does to the numbers says little; there the answers count.
TOLERANCE: Mapping[Precision, float] = {"fp32": 1e-3, "fp16": 0.1, "bf16": 0.5, "int8": math.inf}
LEAST_AGREEMENT = 0.9  # of the answers, whatever the precision
CALIBRATION_IMAGES = 256
LITERT_ENVIRONMENT = "python3 -m venv .venv-litert && .venv-litert/bin/pip install 'mobilevit[litert]'"
VERIFY_IMAGES = 32


@dataclass(frozen=True)
class Operators:
    """How many operators an artifact has, and the names of those that the runtime's fast part leaves to others."""

    num_operators: int
    outside: tuple[str, ...]


class Backend(Protocol):
    """What a module of this package offers to be in `BACKENDS`. Its runtime is imported with it."""

    PRECISIONS: tuple[Precision, ...]
    DYNAMIC: tuple[Literal["batch", "size"], ...]  # what need not be fixed
    ANSWERS: tuple[TaskName, ...]  # the tasks whose answers it can give, see `Target.answers`

    def write(
        self, network: nn.Module, target: Target, path: Path, metadata: Mapping[str, str], calibration: Sequence[Tensor]
    ) -> None:
        """Write `network`, which is not rewritten yet and takes what `target` says, as the artifact `path`.

        `network` is a `Deployed`, or one alone that gives as many outputs as `target` names. `calibration` are inputs
        (1, ...) as the artifact will get them, real ones, for int8.
        """
        ...

    def load(self, path: Path, num_threads: int) -> Run | None:
        """The artifact in its runtime, from inputs to outputs; None where this machine cannot run it."""
        ...

    def operators(self, path: Path) -> Operators:
        """What the artifact consists of. Raises ValueError where the runtime would not take it."""
        ...

    def read_metadata(self, path: Path) -> dict[str, str]:
        """What `write` was given as metadata, and what the backend added."""
        ...


# Name of the backend, of its module and of the extra that installs what it needs -> the ending of its artifacts.
BACKENDS = {
    "onnx": ".onnx",
    "executorch": ".pte",
    "openvino": ".xml",
    "litert": ".tflite",
    "coreml": ".mlpackage",
}


@dataclass(frozen=True)
class Artifact:
    """A file (or folder) that was written. `agreement` is None where it was converted but could not be run here.

    `speed_ratio` tells of an int8 artifact that was run how many times as fast it is as the same in fp32.
    """

    backend: str
    path: Path
    num_bytes: int
    target: Target
    operators: Operators
    agreement: Agreement | None
    speed_ratio: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self) | {"path": str(self.path), "verified": self.agreement is not None}


def export(
    weights: Weights,
    to: Sequence[str],
    out: str | Path,
    *,
    precision: Precision = "fp32",
    size: tuple[int, int] | None = None,
    batch_size: int = 1,
    dynamic_batch: bool = False,
    dynamic_size: bool = False,
    uint8: bool = False,
    answers: bool = False,
    images: Sequence[ImageInput] = (),
    source: str = "",
    prefix: str = "",
    overwrite: bool = True,
    num_threads: int = 2,
    on_start: Callable[[str], None] = lambda backend: None,
    on_written: Callable[[Artifact], None] = lambda artifact: None,
) -> list[Artifact]:
    """Write one artifact a backend into the folder `out`, each run and compared with torch on `images` first.

    Args:
        weights: of any origin, see `mobilevit.weights.read`.
        to: names of `BACKENDS`.
        out: a folder.
        precision: int8 needs `images`: those calibrate it.
        size: (height, width) in pixels; what the weights were made for, unless given.
        batch_size: of the input.
        dynamic_batch: leave the batch open, where the runtime can; `dynamic_size` likewise.
        dynamic_size: leave height and width open, from 65 px up.
        uint8: bake the scaling of pixels in, see `Target`.
        answers: of a detector what it has found, after NMS, and of a segmentation network the class of every pixel.
        images: real ones to compare on, and to calibrate with; drawn ones take their place.
        source: where the weights come from, for the artifact's metadata.
        prefix: what the files' names begin with; "mobilevit" and the architecture unless given.
        overwrite: replace files that exist.
        num_threads: of the runtimes while they are timed.
        on_start: told the name of every backend before its turn.
        on_written: given every artifact when it is in its place.

    Raises:
        ValueError: a backend that is unknown or not installed, what it cannot do, a file that exists without
            `overwrite`, an artifact that does not agree with torch (it is not left in `out`). Artifacts of backends
            before it stay.
        ImageError: an image that cannot be read.
    """
    p = weights.preprocessing
    height, width = size or (p.crop_px, p.crop_px)
    if min(height, width) < (65 if dynamic_size else 32):
        least = "65 px, where the size is dynamic" if dynamic_size else "32 px"
        raise ValueError(f"size is {height} x {width} px; an image has at least {least}")
    if batch_size < 1:
        raise ValueError(f"batch size is {batch_size}; it must be 1 or more")
    if not weights.num_classes:
        raise ValueError("these weights have no classifier, so there are no answers to compare")
    if not to:
        raise ValueError(f"no backend is named; there are {', '.join(BACKENDS)}")
    target = Target(precision, height, width, batch_size, dynamic_batch, dynamic_size, uint8, weights.task, answers)
    # All of them first: what is missing or impossible is said before minutes of work.
    backends = {name: find_backend(name, target) for name in dict.fromkeys(to)}
    if precision == "int8" and not images:
        raise ValueError("int8 is calibrated on real images; name some of those that the network is for (--images)")
    out = Path(out)
    stem = file_stem(prefix or f"mobilevit_{weights.architecture.name}", target)
    for path in (out / f"{stem}{BACKENDS[backend]}" for backend in backends):
        if path.exists() and not overwrite:
            raise ValueError(f"{path}: already exists; replace it with --overwrite, or write elsewhere with --out")

    network = deployed(weights, target)
    wanted = CALIBRATION_IMAGES if precision == "int8" else VERIFY_IMAGES
    chosen = _spread(images, wanted) or synthetic_images(VERIFY_IMAGES, (height, width))
    inputs = [artifact_input(image, p, target) for image in chosen]
    checks = _spread(inputs, VERIFY_IMAGES)
    metadata = _metadata(weights, target, source)
    out.mkdir(parents=True, exist_ok=True)
    artifacts = []
    for name, backend in backends.items():
        on_start(name)
        with tempfile.TemporaryDirectory(dir=out, prefix=".export-") as aside:
            path = Path(aside) / f"{stem}{BACKENDS[name]}"
            backend.write(network, target, path, metadata, inputs if precision == "int8" else ())
            operators = backend.operators(path)
            run = backend.load(path, num_threads)
            agreement = run and compare(network, run, checks, target)
            if run and agreement:
                _check(name, target, agreement)
                for other in _others(target):  # what was left open is tried at another value
                    few = [artifact_input(image, p, other) for image in chosen[:4]]
                    _check(name, other, compare(network, run, few, other))
            ratio = None
            if run and precision == "int8":  # not faster everywhere, and better said here than found out later
                with tempfile.TemporaryDirectory() as folder:
                    float_path = Path(folder) / path.name
                    backend.write(network, replace(target, precision="fp32"), float_path, metadata, ())
                    float_run = backend.load(float_path, num_threads)
                    assert float_run is not None
                    ratio = speed_ratio(run, float_run, torch.cat([checks[0]] * batch_size).numpy())
            num_bytes = sum(file.stat().st_size for file in Path(aside).rglob("*") if file.is_file())
            for file in Path(aside).iterdir():  # one, but for OpenVINO, whose weights lie in a second file
                _replace(file, out / file.name)
        artifacts.append(Artifact(name, out / path.name, num_bytes, target, operators, agreement, ratio))
        on_written(artifacts[-1])
    return artifacts


def sensitivity(weights: Weights, images: Sequence[ImageInput]) -> list[Cost]:
    """What int8 costs each part of the network on real `images`; see `mobilevit.export.quantization`.

    Raises:
        ValueError: no images. ImageError: one that cannot be read.
    """
    if not images:
        raise ValueError("what int8 costs is measured on real images; name some (--images)")
    p = weights.preprocessing
    target = Target("int8", p.crop_px, p.crop_px, task=weights.task)
    inputs = [artifact_input(image, p, target) for image in _spread(images, CALIBRATION_IMAGES)]
    return costs_of_int8(deployed(weights, target), inputs, target.outputs)


def load_artifact(path: str | Path, num_threads: int = 2) -> Run:
    """An artifact in its runtime, whichever it is by its ending: inputs as a numpy array -> a tuple of outputs.

    Raises:
        ValueError: an unknown ending, a runtime that is not installed or does not run on this machine.
    """
    path = Path(path)
    run = _backend_of(path).load(path, num_threads)
    if run is None:
        raise ValueError(
            f"{path}: only Apple systems can run CoreML; export for another runtime, --to onnx for example"
        )
    return run


def read_metadata(path: str | Path) -> dict[str, str]:
    """What an artifact says of itself, whichever it is by its ending.

    Raises:
        ValueError: an unknown ending, a runtime that is not installed.
    """
    return _backend_of(Path(path)).read_metadata(Path(path))


def _backend_of(path: Path) -> Backend:
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    for name, ending in BACKENDS.items():
        if path.suffix == ending:
            return _import(name)
    raise ValueError(f"{path}: not an artifact; their endings are {', '.join(BACKENDS.values())}")


def installed(name: str) -> bool:
    """Whether what a backend needs is installed."""
    try:
        _import(name)
    except ValueError:
        return False
    return True


def _import(name: str) -> Backend:
    try:
        module: ModuleType = importlib.import_module(f"mobilevit.export.{name}")
    except ImportError as error:
        package = (error.name or str(error)).partition(".")[0]
        how = f"pip install 'mobilevit[{name}]'"
        if name == "litert":
            how = f"its converter wants an environment of its own: {LITERT_ENVIRONMENT}"
        raise ValueError(f"{name} needs {package}, which is not installed: {how}") from None
    return cast(Backend, module)


def find_backend(name: str, target: Target) -> Backend:
    """The backend of that name. Raises ValueError: unknown, not installed, not able to do what `target` asks."""
    if name not in BACKENDS:
        raise ValueError(f"there is no backend {name!r}; there are {', '.join(BACKENDS)}")
    backend = _import(name)
    if target.precision not in backend.PRECISIONS:
        raise ValueError(f"{name} does not come in {target.precision}; it can be {', '.join(backend.PRECISIONS)}")
    for wanted, what in ((target.dynamic_batch, "batch"), (target.dynamic_size, "size")):
        if wanted and what not in backend.DYNAMIC:
            raise ValueError(f"{name} is exported for one {what}; leave out --dynamic-{what}")
    if target.task == "detect" and target.dynamic_size:
        raise ValueError("the anchors of a detector belong to one size; leave out --dynamic-size")
    if target.answers and target.task not in ANSWERS:
        raise ValueError(f"with the task {target.task!r} the logits are all there is; leave out --answers")
    if target.answers and target.task not in backend.ANSWERS:
        raise ValueError(f"{name} has no NMS; leave out --answers, see docs/export.md for what to do then")
    return backend


def file_stem(prefix: str, target: Target) -> str:
    """The name of an artifact, without its ending."""
    task = [] if target.task == "classify" else [target.task]
    options = [name for name, wanted in (("uint8", target.uint8), ("answers", target.answers)) if wanted]
    parts = [prefix, *task, f"{target.height}x{target.width}", target.precision, *options]
    return "_".join(parts)


def _others(target: Target) -> list[Target]:
    """What a dynamic artifact must be able to do as well, odd sizes among it."""
    others = []
    if target.dynamic_batch:
        others.append(replace(target, batch_size=target.batch_size + 2))
    if target.dynamic_size:
        others.append(replace(target, height=target.height + 37, width=target.width + 64))
    return others


def _spread(things: Sequence[Any], number: int) -> list[Any]:
    """At most `number` of them, evenly from the first to the last."""
    number = min(number, len(things))
    return [things[i * len(things) // number] for i in range(number)]


def artifact_input(source: ImageInput, preprocessing: Preprocessing, target: Target) -> Tensor:
    """One image as the artifact gets it, (1, ...)."""
    p = preprocessing
    if (target.height, target.width) == (p.crop_px, p.crop_px):
        image = p.resize_and_crop(read_image(source, copy=False))
    elif target.height == target.width:
        image = p.at_size(target.height).resize_and_crop(read_image(source, copy=False))
    else:  # no preprocessing keeps the ratio of any image at any size
        image = read_image(source, copy=False).resize((target.width, target.height))
    pixels = torch.from_numpy(np.array(image))[None]
    return pixels if target.uint8 else p.scale(pixels.permute(0, 3, 1, 2)).contiguous()


def _metadata(weights: Weights, target: Target, source: str) -> dict[str, str]:
    layout = "uint8 (batch, height, width, 3), RGB" if target.uint8 else "float32 (batch, 3, height, width), RGB"
    preprocessing = weights.preprocessing.to_dict() | {"scaled_inside": target.uint8}
    nms = {
        "score_threshold": SCORE_THRESHOLD,
        "iou_threshold": IOU_THRESHOLD,
        "max_per_image": MAX_PER_IMAGE,
    }
    return {
        "mobilevit": version("mobilevit"),
        "architecture": weights.architecture.name,
        "task": weights.task,
        "num_classes": str(weights.num_classes),
        "output_stride": str(weights.output_stride),
        **({"head": json.dumps(asdict(weights.head))} if weights.head else {}),
        "outputs": " ".join(target.outputs),
        **({"nms": json.dumps(nms)} if weights.task == "detect" and target.answers else {}),
        "precision": target.precision,
        "size": f"{target.height} {target.width}",
        "batch_size": str(target.batch_size),
        "input": layout,
        "preprocessing": json.dumps(preprocessing),
        "class_names": json.dumps(list(weights.class_names), ensure_ascii=False),
        **({"category_ids": json.dumps(weights.category_ids)} if weights.category_ids else {}),
        "source": source,
    }


def _check(name: str, target: Target, agreement: Agreement) -> None:
    tolerance = TOLERANCE[target.precision]
    if not agreement.error <= tolerance:  # not a number included
        raise ValueError(
            f"{name} in {target.precision} answers otherwise than torch: a number of the outputs "
            f"({', '.join(target.outputs)}) differs by {agreement.error:.2g} of their standard deviation, allowed are "
            f"{tolerance:g}; nothing was written"
        )
    if agreement.same < LEAST_AGREEMENT:
        raise ValueError(
            f"{name} in {target.precision} gives torch's answer on only {100 * agreement.same:.3g} % of "
            f"{agreement.answers:,} {agreement.kind}, {100 * LEAST_AGREEMENT:.0f} % are asked for; nothing was written"
        )


def _replace(source: Path, target: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    source.replace(target)
