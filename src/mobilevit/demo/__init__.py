"""Run a network in the browser: a page with the exported network, and a local server for it."""

from __future__ import annotations

from mobilevit.demo.page import write_page
from mobilevit.demo.server import Server

__all__ = ["Server", "write_page"]
