"""Silence while converters and runtimes work."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep to themselves what libraries say to their own developers: prints, logs, warnings, C++ and progress bars."""
    disabled = logging.root.manager.disable
    sys.stderr.flush()
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)  # what is not written in Python writes there by itself
        logging.disable(logging.WARNING)
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)
