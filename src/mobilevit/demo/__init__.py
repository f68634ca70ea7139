"""The network in the browser: a page, and a server for it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

from mobilevit.demo import runtime
from mobilevit.draw import LOOK, OPACITY, PALETTE
from mobilevit.export import ExportOptions, export
from mobilevit.images import ImageInput
from mobilevit.tasks.detection import SHOWN_SCORE
from mobilevit.weights import TaskName, Weights

STATIC = Path(__file__).parent / "static"
MODEL = "model.onnx"
# A page that says this of itself may share memory between threads. Nothing is loaded from elsewhere, so nothing breaks.
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
# Not left to the system's tables, which on some machines call scripts plain text.
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".wasm": "application/wasm",
    ".onnx": "application/octet-stream",
    ".txt": "text/plain; charset=utf-8",
}

# What training says of the weights, by task, and how the page calls it; in per cent.
VALIDATION: Mapping[TaskName, tuple[str, str]] = {
    "classify": ("val_top1", "right"),
    "detect": ("val_ap", "average precision"),
    "segment": ("val_miou", "mean IoU"),
}

DrawingName = Literal["optdigits", "mnist"]


@dataclass(frozen=True)
class Drawing:
    """How images of handwriting look, white on black: `side_px` pixels square, the rest in shares of the side.

    `height` and `width` is the most that the writing takes up, `stroke` how thick it is.
    """

    side_px: int
    height: float
    width: float
    stroke: float


# Of the digits in scikit-learn, which fill all eight rows; of MNIST and EMNIST, where 20 of 28 are filled.
DRAWINGS: dict[DrawingName, Drawing] = {
    "optdigits": Drawing(side_px=8, height=1.0, width=0.8, stroke=0.2),
    "mnist": Drawing(side_px=28, height=0.72, width=0.72, stroke=0.09),
}
DRAWING_NAMES: tuple[DrawingName, ...] = get_args(DrawingName)


def drawing_for(weights: Weights) -> DrawingName | None:
    """What a drawing should look like to these weights; None where their classes are no single digits and letters."""
    names = weights.class_names
    if weights.task != "classify" or not names or not all(len(name) == 1 and name.isalnum() for name in names):
        return None
    # Weights do not say how large the files were. Networks for 32 px and less are trained on the smallest.
    return "optdigits" if weights.preprocessing.crop_px <= 32 else "mnist"


def write_page(
    weights: Weights,
    out: str | Path,
    *,
    source: str = "",
    drawing: DrawingName | None = None,
    images: Sequence[ImageInput] = (),
    ort: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Write the page with its network and the runtime into `out`, for any host of static files.

    Args:
        weights: of any task.
        out: a folder; files there that have the same names are replaced.
        source: where the weights come from, for the ONNX file's metadata. It is published with the page.
        drawing: how drawings are brought to a classifier, see `DRAWINGS`; what `drawing_for` says, unless given.
        images: to compare the exported network with torch on, see `mobilevit.export.export`; else drawn ones.
        ort: a folder with ONNX Runtime Web, see `mobilevit.demo.runtime.find`.
        say: told what takes long.

    Raises:
        ValueError: no classifier, no ONNX installed, no ONNX Runtime Web; `drawing` for a network that does not
            classify, a network for boxes or masks that sees only a part of the image.
    """
    out = Path(out)
    dense = weights.task != "classify"
    p = weights.preprocessing
    if dense and drawing:
        raise ValueError(f"a pad to draw on is for classifiers; these are weights to {weights.task}")
    if dense and p.resize_px != (p.crop_px, p.crop_px):
        raise ValueError(
            f"resize_px is {p.resize_px} and crop_px {p.crop_px}; where things are can be shown for networks that see "
            f"whole images: set preprocessing to resize_px=({p.crop_px}, {p.crop_px}) and train with that"
        )
    ort = runtime.find(ort, say)  # first: it fails sooner than the export
    with tempfile.TemporaryDirectory() as aside:
        say("exporting to ONNX ...")
        (artifact,) = export(weights, ["onnx"], aside, ExportOptions(postprocess=dense), images=images, source=source)
        (out / "ort").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(artifact.path, out / MODEL)
    for file in (LOOK, *STATIC.iterdir()):
        if file.is_file():
            shutil.copyfile(file, out / file.name)
    for name in runtime.FILES:
        # As .js: there are servers that do not know .mjs, and browsers run no script whose type is not a script's.
        shutil.copyfile(ort / name, out / "ort" / name.replace(".bundle.min.mjs", ".js"))
    # Some hosts read the headers to send from a file of this name.
    lines = [f"  {name}: {value}" for name, value in HEADERS.items() if name.startswith("Cross-Origin")]
    (out / "_headers").write_text("\n".join(["/*", *lines, ""]))
    drawing = drawing or drawing_for(weights)
    network = {
        "task": weights.task,
        "name": weights.name,
        "model": MODEL,
        "class_names": weights.class_names,
        "num_classes": weights.num_classes,
        "num_parameters": sum(parameter.numel() for parameter in weights.build().parameters()),
        "num_bytes": artifact.num_bytes,
        "preprocessing": p.to_dict(),
        "validation": _validation(weights),
        "drawing": asdict(DRAWINGS[drawing]) if drawing else None,
        "palette": PALETTE if dense else None,
        # Of the page's slider at the start: the least score, or how much a mask hides.
        "shown": {"detect": SHOWN_SCORE, "segment": OPACITY}.get(weights.task),
        "mobilevit": version("mobilevit"),
    }
    (out / "network.json").write_text(json.dumps(network, ensure_ascii=False, indent=1), encoding="utf-8")


def _validation(weights: Weights) -> dict[str, Any] | None:
    """What the weights were worth when they were trained; None where nobody said."""
    name, meaning = VALIDATION[weights.task]
    metrics = weights.training.get("metrics")
    value = metrics.get(name) if isinstance(metrics, Mapping) else None
    return None if value is None else {"per_cent": value, "meaning": meaning}


class Server(ThreadingHTTPServer):
    """Serves a folder on 127.0.0.1, to this machine alone; port 0 is any that is free.

    Raises:
        ValueError: the port is taken or not allowed.
    """

    daemon_threads = True
    # Where the port can be taken a second time while it is in use, the page of another would come up.
    allow_reuse_address = os.name != "nt"

    def __init__(self, folder: str | Path, port: int = 0):
        if not 0 <= port <= 65535:
            raise ValueError(f"port is {port}; it must be from 0 (any that is free) to 65535")
        try:
            super().__init__(("127.0.0.1", port), partial(_Handler, directory=str(folder)))
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise ValueError(f"port {port} cannot be used ({reason}); choose another, or 0 for any") from None

    @property
    def url(self) -> str:
        """Of the page."""
        return f"http://127.0.0.1:{self.server_port}/"


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    extensions_map = TYPES

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nobody wants to read of every file."""
