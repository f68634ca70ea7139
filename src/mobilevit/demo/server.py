"""A local HTTP server for the page."""

from __future__ import annotations

import os
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

# WebAssembly threads need shared memory, which browsers allow only to cross-origin isolated pages.
ISOLATION_HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
}
HEADERS = {**ISOLATION_HEADERS, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
# The tables of some systems call scripts plain text.
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".wasm": "application/wasm",
    ".onnx": "application/octet-stream",
    ".txt": "text/plain; charset=utf-8",
}


class Server(ThreadingHTTPServer):
    """Serves a folder on 127.0.0.1, so that only this machine can reach it. Port 0 selects a free port.

    Raises:
        ValueError: the port is in use, not permitted or out of range.
    """

    daemon_threads = True
    # On Windows, address reuse would allow a second server on a port that is in use.
    allow_reuse_address = os.name != "nt"

    def __init__(self, folder: str | Path, port: int = 0):
        if not 0 <= port <= 65535:
            raise ValueError(f"port is {port}; it must be from 0 (any free port) to 65535")
        try:
            super().__init__(("127.0.0.1", port), partial(_Handler, directory=str(folder)))
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise ValueError(f"port {port} cannot be used ({reason}); choose another, or 0 for any free port") from None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    extensions_map = MEDIA_TYPES

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass
