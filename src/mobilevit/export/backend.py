"""The interface of a backend, and the functions that find a backend by its name or by an artifact's file ending.

A backend is a module of this package that defines everything that `Backend` lists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from torch import Tensor, nn

from mobilevit.defaults import NUM_THREADS
from mobilevit.export.artifact import DECODED_OUTPUTS, ArtifactSpec
from mobilevit.export_options import ARTIFACT_SUFFIXES, Precision, backend_of_file
from mobilevit.files import MissingExtraError, require
from mobilevit.messages import first_line
from mobilevit.weights import TaskName

LITERT_ENVIRONMENT = "python3 -m venv .venv-litert && .venv-litert/bin/pip install 'mobilevit[litert]'"
InferenceFn = Callable[[np.ndarray], tuple[np.ndarray, ...]]
"""A loaded artifact: an input batch -> the outputs, in the order of `ArtifactSpec.outputs`."""


@dataclass(frozen=True)
class Operators:
    """Operators of an artifact. `fallback` names those that the runtime's optimized part does not execute."""

    num_operators: int
    fallback: tuple[str, ...]


@dataclass(frozen=True)
class Signature:
    """Input shape of an artifact, None for a dynamic axis, and the last dimension of its first output."""

    shape: tuple[int | None, ...]
    uint8: bool
    num_classes: int


class Backend(Protocol):
    """The interface of a backend module. Importing the module imports its runtime."""

    PRECISIONS: tuple[Precision, ...]
    DYNAMIC: tuple[Literal["batch", "size"], ...]  # axes that may be dynamic
    POSTPROCESS_TASKS: tuple[TaskName, ...]  # tasks with decoded outputs

    def write(
        self,
        network: nn.Module,
        spec: ArtifactSpec,
        path: Path,
        metadata: Mapping[str, str],
        calibration: Sequence[Tensor],
    ) -> None:
        """Convert `network` and write the artifact to `path`.

        Args:
            network: an `ExportModel`, or a bare network with the outputs that `spec` names; in eval mode, before
                `optimize_for_inference`. It is not modified.
            spec: input, outputs and precision.
            path: file (or folder, for CoreML) to write.
            metadata: stored in the artifact.
            calibration: for int8: inputs (1, ...) with real images.
        """
        ...

    def load(self, path: Path, num_threads: int) -> InferenceFn | None:
        """Load the artifact into its runtime; None if the runtime does not exist on this system."""
        ...

    def operators(self, path: Path) -> Operators:
        """Count the operators. Raises ValueError if the runtime would reject the artifact."""
        ...

    def read_metadata(self, path: Path) -> dict[str, str]:
        """Return the metadata given to `write`, and entries that the backend added."""
        ...

    def signature(self, path: Path) -> Signature:
        """Read the input and output shapes from the artifact."""
        ...


def load_backend(name: str) -> Backend:
    """Import the backend `name`.

    Raises:
        ValueError: no such backend, or its packages are not installed (`MissingExtraError`).
    """
    if name not in ARTIFACT_SUFFIXES:
        raise ValueError(f"there is no backend {name!r}; the backends are {', '.join(ARTIFACT_SUFFIXES)}")
    try:
        return require(f"mobilevit.export.{name}", name, f"export to {name}")
    except MissingExtraError as error:
        if name != "litert":
            raise
        raise MissingExtraError(f"{error}, in a separate environment: {LITERT_ENVIRONMENT}") from None


def installed(name: str) -> bool:
    """Whether the packages of a backend are installed."""
    try:
        load_backend(name)
    except MissingExtraError:
        return False
    return True


def find_backend(name: str, spec: ArtifactSpec) -> Backend:
    """Import the backend `name`, for artifacts as `spec` describes them.

    Raises:
        ValueError: no such backend, not installed, or unable to write an artifact as described.
    """
    backend = load_backend(name)
    if spec.precision not in backend.PRECISIONS:
        raise ValueError(f"{name} does not support {spec.precision}; it supports {', '.join(backend.PRECISIONS)}")
    for requested, axis in ((spec.dynamic_batch, "batch"), (spec.dynamic_size, "size")):
        if requested and axis not in backend.DYNAMIC:
            raise ValueError(f"{name} requires a fixed {axis}; leave out --dynamic-{axis}")
    if spec.browser and (name, spec.precision) != ("onnx", "int8"):
        raise ValueError(f"--browser is an option of onnx in int8, not of {name} in {spec.precision}; leave it out")
    if spec.task == "detect" and spec.dynamic_size:
        raise ValueError("the anchors of a detector depend on the input size; leave out --dynamic-size")
    if spec.postprocess and spec.task not in DECODED_OUTPUTS:
        raise ValueError(f"the task {spec.task!r} has no decoded outputs; leave out --postprocess")
    if spec.postprocess and spec.task not in backend.POSTPROCESS_TASKS:
        raise ValueError(f"{name} has no NMS; leave out --postprocess and apply NMS yourself, see docs/export.md")
    return backend


def load_artifact(path: str | Path, num_threads: int = NUM_THREADS) -> InferenceFn:
    """Load an artifact into its runtime: input batch as a NumPy array -> tuple of outputs.

    Raises:
        ValueError: no such file, unknown file ending, runtime not installed or not available on this system.
    """
    path = Path(path)
    infer = _backend_for(path).load(path, num_threads)
    if infer is None:
        raise ValueError(
            f"{path}: CoreML runs on Apple systems only; export for another runtime, --to onnx for example"
        )
    return infer


def read_metadata(path: str | Path) -> dict[str, str]:
    """Read the metadata of an artifact.

    Raises:
        ValueError: no such file, unknown file ending, unreadable file, runtime not installed.
    """
    return _backend_for(Path(path)).read_metadata(Path(path))


def read_signature(path: str | Path) -> Signature:
    """Read the input and output shapes of an artifact.

    Raises:
        ValueError: as `read_metadata`, or the input is not a batch of images.
    """
    path = Path(path)
    backend = _backend_for(path)
    try:
        signature = backend.signature(path)
    except (OSError, ValueError):
        raise
    except Exception as error:  # each runtime raises its own type for a damaged file
        name = backend_of_file(path)
        raise ValueError(f"{path}: {name} cannot read it ({first_line(error)}); copy or export it again") from None
    if len(signature.shape) != 4:
        raise ValueError(f"{path}: its input is {signature.shape}; expected (batch, 3, height, width)")
    return signature


def _backend_for(path: Path) -> Backend:
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    name = backend_of_file(path)
    if name is None:
        raise ValueError(f"{path}: not an artifact; artifacts end in {', '.join(ARTIFACT_SUFFIXES.values())}")
    return load_backend(name)
