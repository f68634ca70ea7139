"""`mobilevit demo`."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    pass
from mobilevit.cli.options import Download, SomeWeights, expand, read_weights, some_images, warn_of_assumptions


@dataclass(frozen=True)
class Demo:
    """Run a network in the browser, or write the page for a website.

    Inputs are image files, the camera or drawings. Nothing is uploaded.
    """

    weights: SomeWeights
    port: int = 0
    """Of the page on this machine, which alone can see it; 0 is any that is free."""
    open: bool = True
    """Do not open the page in the browser. The URL is always printed."""
    export: Annotated[Path | None, tyro.conf.arg(name="out", metavar="FOLDER")] = None
    """Write the page and all it needs into this folder, for any host of static files, instead of serving it."""
    drawing: Literal["optdigits", "mnist"] | None = None
    """Draw digits and letters like scikit-learn's (8 px) or MNIST's and EMNIST's (28 px); unless given, the former for
    networks of up to 32 px. Other classifiers get no pad to draw on unless this is given."""
    images: Annotated[tuple[str, ...], tyro.conf.arg(name="images", metavar="IMAGE...")] = ()
    """Real images to compare the exported network with torch on: files, folders, patterns, or data as for train.
    Unless given, synthetic ones are compared."""
    ort: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder with ONNX Runtime Web's files; unless given, those of the wheel, or fetched through npm and kept."""
    download: Download = False

    def run(self) -> int:
        """Write the page; serve it until interrupted."""
        import tempfile
        import webbrowser

        from mobilevit.demo import Server, write_page

        weights = read_weights(self.weights, self.download)
        warn_of_assumptions(self.weights, weights)
        file = expand(Path(self.weights))
        source = file.name if file.exists() else self.weights  # a page for the world does not tell of folders here
        with tempfile.TemporaryDirectory() as aside:
            out = expand(self.export) if self.export else Path(aside)
            with contextlib.nullcontext() if self.export else Server(out, self.port) as server:
                write_page(
                    weights,
                    out,
                    source=source,
                    drawing=self.drawing,
                    images=some_images(self.images),
                    ort=expand(self.ort) if self.ort else None,
                    say=lambda text: print(text, file=sys.stderr, flush=True),
                )
                if server is None:
                    num_bytes = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
                    print(f"{out}: a page of {num_bytes / 1e6:.0f} MB; put it on any host of static files, with https")
                    print(
                        "Browsers do not run it from disk. To try it here, run "
                        f'python -m http.server -b 127.0.0.1 -d "{out}" and open http://127.0.0.1:8000/'
                    )
                    return 0
                print(f"{server.url} (Ctrl-C stops it)", flush=True)
                with contextlib.suppress(KeyboardInterrupt):
                    if self.open:
                        webbrowser.open(server.url)
                    server.serve_forever()
        return 0
