"""ONNX Runtime Web, the library that runs the network in the browser: 40 MB, downloaded into the cache on first use."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from mobilevit.files import write_atomic

logger = logging.getLogger(__name__)

PACKAGE = "onnxruntime-web@1.30.0"
# SHA-256 of the files of dist/ that the page loads: one build for the CPU, one, twice as large, for WebGPU.
FILES = {
    "ort.wasm.bundle.min.mjs": "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
    "ort.webgpu.bundle.min.mjs": "0730816731ce2cdfb06f273da065d4a1c7091eb9d1756a83b2916c8a89d015e2",
    "ort-wasm-simd-threaded.asyncify.wasm": "39f9f0894d478800487ed9f7dbe92618498db320cf55c8e3d89adff8dce658da",
}
MANUAL_DOWNLOAD = (
    f"run `npm pack {PACKAGE}` on a machine that can, unpack the archive, and pass the path of its package/dist with "
    "--runtime-folder"
)


class ChecksumError(ValueError):
    """A file differs from the one that was tested."""


def find_runtime(folder: Path | None = None) -> Path:
    """A folder that contains `FILES` with the expected checksums: `folder` if given, otherwise the cache.

    Files that are missing in the cache are downloaded with npm.

    Raises:
        ChecksumError: a file has another checksum.
        ValueError: a file is missing in `folder`, or the download is not possible.
    """
    if folder is not None:
        for name in FILES:
            if not (folder / name).is_file():
                raise ValueError(f"{folder}: {name} is missing; the folder must be package/dist of npm's {PACKAGE}")
            _check(folder / name, (folder / name).read_bytes())
        return folder
    folder = cache_folder()
    if not all(_is_valid(folder / name) for name in FILES):
        _download(folder)
    return folder


def cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "mobilevit" / PACKAGE.replace("@", "-")


def _download(folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(f"the demo requires {PACKAGE}, but npm is not installed; install npm, or {MANUAL_DOWNLOAD}")
    logger.info("downloading %s with npm into %s (once) ...", PACKAGE, folder)
    with tempfile.TemporaryDirectory() as temporary:
        command = [npm, "pack", PACKAGE, "--loglevel", "error", "--ignore-scripts", "--pack-destination", temporary]
        process = subprocess.run(command, cwd=temporary, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        archives = list(Path(temporary).glob("*.tgz"))
        if process.returncode or len(archives) != 1:
            lines = [line for line in (process.stderr + process.stdout).splitlines() if "error" in line.lower()]
            reason = f" ({lines[0].strip()})" if lines else ""
            raise ValueError(f"npm could not download {PACKAGE}{reason}; check the network, or {MANUAL_DOWNLOAD}")
        with tarfile.open(archives[0]) as archive:
            for name in FILES:
                member = archive.extractfile(f"package/dist/{name}")
                content = member.read() if member else b""
                _check(Path(name), content)
                write_atomic(folder / name, content)


def _check(path: Path, content: bytes) -> None:
    if hashlib.sha256(content).hexdigest() != FILES[path.name]:
        raise ChecksumError(f"{path}: SHA-256 differs from that of {PACKAGE}; the file is not used")


def _is_valid(path: Path) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == FILES[path.name]
