"""The local server."""

from __future__ import annotations

import http.client
import threading
from pathlib import Path

import pytest

from mobilevit.demo import Server


def test_the_server_sends_isolation_headers_and_stays_in_its_folder(tmp_path: Path):
    (tmp_path / "secret.txt").write_text("secret")
    folder = tmp_path / "page"
    (folder / "ort").mkdir(parents=True)
    for name in ("a.js", "a.wasm", "index.html"):
        (folder / name).write_text("x")
    server = Server(folder)
    assert server.server_address[0] == "127.0.0.1"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
        for path, kind in (("/", "text/html"), ("/a.js", "text/javascript"), ("/a.wasm", "application/wasm")):
            connection.request("GET", path)
            response = connection.getresponse()
            assert response.read() == b"x"
            assert response.headers["Content-Type"].startswith(kind)
            assert response.headers["Cross-Origin-Opener-Policy"] == "same-origin"
            assert response.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        connection.request("GET", "/../secret.txt")
        response = connection.getresponse()
        response.read()
        assert response.status == 404
        connection.close()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_invalid_ports(tmp_path: Path):
    with Server(tmp_path) as server, pytest.raises(ValueError, match=f"port {server.server_port} "):
        Server(tmp_path, server.server_port)
    with pytest.raises(ValueError, match="65536"):
        Server(tmp_path, 65536)
