"""Backends, file endings and options of `mobilevit export`. Torch-free, so that the command line can import it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from mobilevit.defaults import NUM_THREADS

Precision = Literal["fp32", "fp16", "bf16", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
BackendName = Literal["onnx", "executorch", "openvino", "litert", "coreml"]
ARTIFACT_SUFFIXES: dict[str, str] = {
    "onnx": ".onnx",
    "executorch": ".pte",
    "openvino": ".xml",
    "litert": ".tflite",
    "coreml": ".mlpackage",
}
"""File ending of each backend's artifacts. A backend's module in `mobilevit.export` and its extra have its name."""


def backend_of_file(path: Path) -> str | None:
    """Name of the backend that reads `path`, by the file's ending; None if it is no artifact."""
    return next((name for name, suffix in ARTIFACT_SUFFIXES.items() if path.suffix == suffix), None)


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export."""

    precision: Precision = "fp32"
    """Numeric precision; int8 is calibrated on --images or --data."""
    max_loss: float | None = None
    """int8: largest loss of the main metric (top-1, AP, mIoU, mAP) on the validation split of --data, relative to fp32
    in the same runtime, in percentage points. The most sensitive groups of layers stay in float until the loss is
    within this limit. Without --data: of the agreement with the predictions of fp32 on --images."""
    browser: bool = False
    """int8 for ONNX Runtime Web (onnx only): depthwise convolutions and the activations after them stay in float, which
    makes int8 faster in WebAssembly, and slower in native ONNX Runtime."""
    size: tuple[int, ...] = ()
    """Input size in pixels, or height and width. Default: that of the weights."""
    batch_size: int = 1
    """Batch size in images."""
    dynamic_batch: bool = False
    """Export a dynamic batch size (onnx and openvino only)."""
    dynamic_size: bool = False
    """Export a dynamic height and width of 65 px or more (onnx and openvino only, no detectors)."""
    uint8: bool = False
    """Take uint8 pixels (batch, height, width, 3), RGB, and normalize them inside the artifact."""
    postprocess: bool = False
    """Export decoded outputs: boxes, scores and labels after NMS (detection; onnx and openvino only), or the class of
    each pixel (segmentation)."""
    num_threads: int = NUM_THREADS
    """Number of CPU threads when the artifact is timed."""
    overwrite: bool = False
    """Replace existing files."""
