"""The folder of static files that runs a network in the browser."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from mobilevit.defaults import SCORE_THRESHOLD
from mobilevit.demo.runtime import FILES, find_runtime
from mobilevit.demo.server import ISOLATION_HEADERS
from mobilevit.draw import MASK_OPACITY, PALETTE
from mobilevit.export import ExportOptions, export, thresholds_of
from mobilevit.export.verify import synthetic_images
from mobilevit.export_options import Precision
from mobilevit.images import ImageInput
from mobilevit.report import render
from mobilevit.weights import TaskName, Weights

logger = logging.getLogger(__name__)

STATIC = Path(__file__).parent / "static"
MODEL = "model.onnx"
TEST_IMAGE = "test.png"  # on which the page times the engines of a browser, and compares their outputs
GENERATOR = '<meta name="generator" content="mobilevit demo">'  # in index.html: the file may be overwritten
# The training metric of a task, in percent, and its name on the page.
VALIDATION_METRICS: Mapping[TaskName, tuple[str, str]] = {
    "classify": ("val_top1", "top-1 accuracy"),
    "multilabel": ("val_map", "mean average precision"),
    "detect": ("val_ap", "AP"),
    "segment": ("val_miou", "mean IoU"),
}

DrawingName = Literal["optdigits", "mnist"]


@dataclass(frozen=True)
class Drawing:
    """How handwritten characters are rendered for the network, white on black, `side_px` x `side_px` pixels.

    `height` and `width` of the bounding box and the `stroke` width are fractions of the side.
    """

    side_px: int
    height: float
    width: float
    stroke: float


# As in scikit-learn's digits, which fill all eight rows, and in MNIST and EMNIST, which fill 20 of 28 rows.
DRAWINGS: dict[DrawingName, Drawing] = {
    "optdigits": Drawing(side_px=8, height=1.0, width=0.8, stroke=0.2),
    "mnist": Drawing(side_px=28, height=0.72, width=0.72, stroke=0.09),
}


def default_drawing(weights: Weights) -> DrawingName | None:
    """The rendering of drawings for these weights; None unless their classes are single digits and letters."""
    names = weights.class_names
    if weights.task != "classify" or not names or not all(len(name) == 1 and name.isalnum() for name in names):
        return None
    # The size of the training images is unknown, but networks for up to 32 px are trained on the smallest ones.
    return "optdigits" if weights.preprocessing.crop_px <= 32 else "mnist"


def write_page(
    weights: Weights,
    out: str | Path,
    *,
    source: str = "",
    drawing: DrawingName | None = None,
    precision: Precision = "fp32",
    images: Sequence[ImageInput] = (),
    runtime_folder: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write the page, the exported network and the runtime into `out`, for any host of static files.

    Args:
        weights: weights of any task.
        out: the folder to write to. A page of an earlier call is replaced.
        source: origin of the weights, for the metadata of the ONNX file. It is published with the page.
        drawing: adds a drawing pad for classifiers, see `DRAWINGS`. Default: `default_drawing`.
        precision: fp32; fp16, which halves the file of the network; or int8, which requires images.
        images: images to verify and calibrate the exported network, see `mobilevit.export.export`. Default: synthetic
            ones.
        runtime_folder: a folder with ONNX Runtime Web, see `find_runtime`.
        overwrite: replace files that an earlier call did not write.

    Raises:
        ValueError: the network has no classifier; ONNX or ONNX Runtime Web is missing; int8 without images; `drawing`
            is given for another task; a detector or segmentation network crops its input; `out` contains files of
            something else.
    """
    out = Path(out)
    is_dense = weights.task in ("detect", "segment")
    p = weights.preprocessing
    if weights.task != "classify" and drawing:
        raise ValueError(f"drawing is {drawing!r}, but the task is {weights.task!r}; drawings require a classifier")
    if is_dense and p.resize_px != (p.crop_px, p.crop_px):
        raise ValueError(
            f"resize_px is {p.resize_px} and crop_px {p.crop_px}; for {weights.task!r} the page requires a network "
            f"that receives the whole image; train with resize_px=({p.crop_px}, {p.crop_px})"
        )
    if precision == "int8" and not images:
        raise ValueError("int8 requires real images for calibration; give some with --images")
    # Some servers do not know the media type of .mjs, and browsers run only scripts with the right one.
    runtime_names = {name: f"ort/{name.replace('.bundle.min.mjs', '.js')}" for name in FILES}
    # index.html is written first: after an interruption it identifies the folder as one of ours.
    static_files = sorted(STATIC.iterdir(), key=lambda file: file.name != "index.html")
    if not overwrite:
        names = [*(file.name for file in static_files), *runtime_names.values()]
        names += [MODEL, TEST_IMAGE, "style.css", "network.json"]
        _check_folder(out, names)
    runtime_folder = find_runtime(runtime_folder)  # first, because it fails faster than the export
    with tempfile.TemporaryDirectory() as temporary:
        logger.info("exporting to ONNX ...")
        options = ExportOptions(precision, postprocess=is_dense, browser=precision == "int8")
        (artifact,) = export(weights, ["onnx"], temporary, options, images=images, source=source)
        (out / "ort").mkdir(parents=True, exist_ok=True)
        for file in static_files:
            shutil.copyfile(file, out / file.name)
        shutil.copyfile(artifact.path, out / MODEL)
    (test_image,) = synthetic_images(1, (p.crop_px, p.crop_px))
    Image.fromarray(test_image).save(out / TEST_IMAGE)
    for name, target in runtime_names.items():
        shutil.copyfile(runtime_folder / name, out / target)
    (out / "style.css").write_text(render("style.css"), encoding="utf-8")
    # Some hosts read the response headers from this file.
    lines = [f"  {name}: {value}" for name, value in ISOLATION_HEADERS.items()]
    (out / "_headers").write_text("\n".join(["/*", *lines, ""]))
    drawing = drawing or default_drawing(weights)
    network = {
        "task": weights.task,
        "name": weights.name,
        "model": MODEL,
        "class_names": weights.class_names,
        "thresholds": thresholds_of(weights) or None,
        "num_classes": weights.num_classes,
        "num_parameters": sum(parameter.numel() for parameter in weights.build().parameters()),
        "num_bytes": artifact.num_bytes,
        "preprocessing": p.to_dict(),
        "calibration": asdict(weights.calibration),
        "validation": _validation(weights, precision),
        "drawing": asdict(DRAWINGS[drawing]) if drawing else None,
        "palette": PALETTE if is_dense else None,
        # Initial value of the slider.
        "slider": {"detect": SCORE_THRESHOLD, "segment": MASK_OPACITY}.get(weights.task),
        "mobilevit": version("mobilevit"),
    }
    (out / "network.json").write_text(json.dumps(network, ensure_ascii=False, indent=1), encoding="utf-8")


def _check_folder(out: Path, names: Sequence[str]) -> None:
    """Refuse to overwrite files unless an earlier call wrote them."""
    index = out / "index.html"
    if index.is_file() and GENERATOR in index.read_text(encoding="utf-8", errors="replace"):
        return
    for name in names:
        if (out / name).exists():
            raise ValueError(
                f"{out / name}: exists and was not written by mobilevit demo; choose another folder, or replace it "
                "with --overwrite"
            )


def _validation(weights: Weights, precision: Precision) -> dict[str, Any] | None:
    """The metric after training, if it is stored with the weights. int8 can lose some of it."""
    key, name = VALIDATION_METRICS[weights.task]
    metrics = weights.training.get("metrics")
    value = metrics.get(key) if isinstance(metrics, Mapping) else None
    if value is None:
        return None
    return {"percent": value, "metric": f"{name} after training" + (", before int8" if precision == "int8" else "")}
