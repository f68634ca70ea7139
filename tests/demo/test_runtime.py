"""Download and verification of ONNX Runtime Web."""

from __future__ import annotations

import hashlib
import io
import sys
import tarfile
from pathlib import Path

import pytest

from mobilevit.demo import runtime


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return runtime.cache_folder()


@pytest.fixture
def contents(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Small files in place of ONNX Runtime Web."""
    contents = {name: name.encode() for name in runtime.FILES}
    checksums = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setattr(runtime, "FILES", checksums)
    return contents


def install_fake_npm(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_npm_is_missing(empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=rf"{runtime.PACKAGE}.*npm is not installed.*--runtime-folder"):
        runtime.find_runtime()


@pytest.mark.skipif(sys.platform == "win32", reason="the npm of the test is a shell script")
def test_the_network_is_missing(empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    install_fake_npm(tmp_path / "bin", monkeypatch, "echo npm error code ENOTFOUND >&2; exit 1")
    with pytest.raises(ValueError, match=rf"{runtime.PACKAGE}.*ENOTFOUND.*--runtime-folder"):
        runtime.find_runtime()
    assert not empty_cache.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="the npm of the test is a shell script")
def test_downloads_are_verified_and_cached(
    empty_cache: Path, contents: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    archive = tmp_path / "ort.tgz"

    def pack(contents: dict[str, bytes]) -> None:
        with tarfile.open(archive, "w:gz") as tar:
            for name, content in contents.items():
                entry = tarfile.TarInfo(f"package/dist/{name}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))

    install_fake_npm(tmp_path / "bin", monkeypatch, f'cp "{archive}" .')
    pack({**contents, "ort-wasm-simd-threaded.wasm": b"another"})
    with pytest.raises(runtime.ChecksumError, match=r"ort-wasm-simd-threaded.wasm"):
        runtime.find_runtime()
    pack(contents)
    assert runtime.find_runtime() == empty_cache
    assert {file.name: file.read_bytes() for file in empty_cache.iterdir()} == contents
    archive.unlink()
    assert runtime.find_runtime() == empty_cache  # without npm


def test_a_given_folder_is_verified(contents: dict[str, bytes], tmp_path: Path):
    with pytest.raises(ValueError, match=r"ort.wasm.bundle.min.mjs is missing"):
        runtime.find_runtime(tmp_path)
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    assert runtime.find_runtime(tmp_path) == tmp_path
    (tmp_path / "ort.webgpu.bundle.min.mjs").write_text("another")
    with pytest.raises(runtime.ChecksumError, match=r"ort.webgpu.bundle.min.mjs"):
        runtime.find_runtime(tmp_path)
