"""ONNX Runtime for browsers: 40 MB that belong into the wheel and not into the repository.

The build of the wheel puts them in; a checkout fetches them on first use, through npm. Nothing but the standard library
is imported here, since the build loads this file without the package.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

VERSION = "1.30.0"
PACKAGE = f"onnxruntime-web@{VERSION}"
# The two builds that the page chooses from, with what each loads: the processor's is half as large.
FILES = {
    "ort.wasm.bundle.min.mjs": "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
    "ort.webgpu.bundle.min.mjs": "0730816731ce2cdfb06f273da065d4a1c7091eb9d1756a83b2916c8a89d015e2",
    "ort-wasm-simd-threaded.asyncify.wasm": "39f9f0894d478800487ed9f7dbe92618498db320cf55c8e3d89adff8dce658da",
}
IN_WHEEL = Path(__file__).parent / "static" / "ort"
REMEDY = "or name a folder that has its files (--ort)"


class ChecksumError(ValueError):
    """What was fetched is not what was tested."""


def find(folder: Path | None = None, say: Callable[[str], None] = lambda text: None) -> Path:
    """A folder with `FILES`: the one that is given, the wheel's, the cache; fetched into the cache if need be.

    Raises:
        ValueError: files are missing from `folder`, or cannot be fetched.
    """
    if folder is not None:
        missing = [name for name in FILES if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder}: has no {missing[0]}; what is wanted is dist/ of npm's {PACKAGE}")
        return folder
    if all((IN_WHEEL / name).is_file() for name in FILES):
        return IN_WHEEL
    return fetch(say)


def cache() -> Path:
    """Where fetched files are kept."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "mobilevit" / PACKAGE.replace("@", "-")


def fetch(say: Callable[[str], None] = lambda text: None) -> Path:
    """The cache, filled through npm where it does not hold `FILES` yet, each with the right checksum.

    Raises:
        ValueError: there is no npm, it could not fetch, or what came is not what was expected.
    """
    folder = cache()
    if all(_is_right(folder / name) for name in FILES):
        return folder
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(f"the page runs on {PACKAGE}, which npm fetches, and npm is not here; install it, {REMEDY}")
    say(f"fetching {PACKAGE} through npm, once, into {folder} ...")
    with tempfile.TemporaryDirectory() as aside:
        command = [npm, "pack", PACKAGE, "--loglevel", "error", "--ignore-scripts", "--pack-destination", aside]
        done = subprocess.run(command, cwd=aside, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        archives = list(Path(aside).glob("*.tgz"))
        if done.returncode or len(archives) != 1:
            lines = [line for line in (done.stderr + done.stdout).splitlines() if "error" in line.lower()]
            why = f" ({lines[0].strip()})" if lines else ""
            raise ValueError(f"npm could not fetch {PACKAGE}{why}; try again where there is a network, {REMEDY}")
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archives[0]) as archive:
            for name, checksum in FILES.items():
                file = archive.extractfile(f"package/dist/{name}")
                content = file.read() if file else b""
                if hashlib.sha256(content).hexdigest() != checksum:
                    raise ChecksumError(f"{PACKAGE}: {name} is not the file that was tested; nothing of it is used")
                # Whole or not at all, whoever else fetches at the same time.
                part = folder / f"{name}.{os.getpid()}.part"
                part.write_bytes(content)
                part.replace(folder / name)
    return folder


def _is_right(path: Path) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == FILES[path.name]
