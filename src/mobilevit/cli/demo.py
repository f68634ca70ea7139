"""`mobilevit demo`."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mobilevit.cli.options import (
    FLAT,
    Flag,
    SampleImages,
    WeightsArgument,
    WeightsOptions,
    choices,
    expand,
)

Drawing = Literal["optdigits", "mnist"]
Precision = Literal["fp32", "fp16", "int8"]


@dataclass(frozen=True)
class Demo:
    """Run a network in the browser, or write a page that does.

    Inputs are image files, the camera or drawings. They stay in the browser.
    """

    weights: WeightsArgument
    port: int = 0
    """Port of the local server, which only this machine can reach. 0 selects a free port."""
    open: Flag = True
    """Do not open the page in the browser. The URL is always printed."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Write the page to this folder, for any host of static files, instead of serving it."""
    overwrite: Flag = False
    """With --out: replace files that mobilevit demo did not write."""
    precision: Precision = "fp32"
    """Numeric precision. fp16 halves the file of the network. int8 has less than a third, and is faster in most cases
    (docs/export.md); it is calibrated on --images."""
    drawing: Annotated[Drawing | None, tyro.conf.arg(metavar=choices(Drawing))] = None
    """Add a canvas to draw digits and letters, rendered like scikit-learn's digits (optdigits, 8 px) or like MNIST and
    EMNIST (mnist, 28 px). Default: for classifiers of single characters, optdigits up to 32 px input and mnist above;
    otherwise none."""
    runtime_folder: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder with ONNX Runtime Web (package/dist of npm's onnxruntime-web). Default: the cache, into which npm
    downloads it on first use."""
    sample_images: Annotated[SampleImages, FLAT] = SampleImages()
    weights_options: Annotated[WeightsOptions, FLAT] = WeightsOptions()

    def run(self) -> int:
        import tempfile
        import webbrowser

        from mobilevit.demo import Server, write_page

        weights = self.weights_options.read_for_inference(self.weights)
        file = expand(Path(self.weights))
        with tempfile.TemporaryDirectory() as temporary:
            out = expand(self.out) if self.out else Path(temporary)
            with contextlib.nullcontext() if self.out else Server(out, self.port) as server:
                write_page(
                    weights,
                    out,
                    source=file.name if file.exists() else self.weights,  # a public page must not contain local paths
                    drawing=self.drawing,
                    precision=self.precision,
                    images=self.sample_images.read(),
                    runtime_folder=expand(self.runtime_folder) if self.runtime_folder else None,
                    overwrite=self.overwrite,
                )
                if server is None:
                    num_bytes = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
                    print(f"{out}: wrote the page ({num_bytes / 1e6:.0f} MB); upload it to any host of static files")
                    print(
                        "Browsers cannot open it from disk. To try it here, run "
                        f'python -m http.server -b 127.0.0.1 -d "{out}" and open http://127.0.0.1:8000/'
                    )
                    return 0
                print(f"{server.url} (press Ctrl-C to stop)", flush=True)
                with contextlib.suppress(KeyboardInterrupt):
                    if self.open:
                        webbrowser.open(server.url)
                    server.serve_forever()
        return 0
