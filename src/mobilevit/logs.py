"""Messages: modules log with `logging.getLogger(__name__)`, and one handler writes them to standard error."""

from __future__ import annotations

import logging
import os
import time

from rich.console import Console

CONSOLE = Console(stderr=True)
"""Standard error. Progress bars use it as well, so that messages appear above a bar and not inside it."""


class _StderrHandler(logging.Handler):
    """Writes a message as one line; from warnings on, the line starts with the program's name."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
            if record.levelno >= logging.WARNING:
                text = f"mobilevit: {' '.join(text.splitlines())}"
            CONSOLE.print(text, highlight=False, soft_wrap=True, markup=False, emoji=False)
        except Exception:
            self.handleError(record)


def log_to_stderr(*, force: bool = False) -> None:
    """Write the package's messages of level INFO and above to standard error.

    `mobilevit.train` calls it. A program that configures `logging` itself keeps its configuration, unless `force` is
    true, as in the command line.
    """
    logger = logging.getLogger("mobilevit")
    has_handler = bool(logger.handlers) if force else logger.hasHandlers()
    if not has_handler:
        logger.addHandler(_StderrHandler())
        # Of the processes of torchrun, rank 0 reports progress; every process reports its own problems.
        logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)


class Progress:
    """Logs how many images of a long task are done, every 15 seconds, such as "embedded 512 of 70,000 images"."""

    interval_seconds = 15.0

    def __init__(self, verb: str, total: int):
        self._verb, self._total, self._num_done = verb, total, 0
        self._started = self._logged = time.monotonic()

    def add(self, num: int) -> None:
        """`num` more images are done."""
        self._num_done += num
        now = time.monotonic()
        if now - self._logged >= self.interval_seconds:
            self._logged = now
            speed = self._num_done / (now - self._started)
            logging.getLogger(__name__).info(
                f"{self._verb} {self._num_done:,} of {self._total:,} images, {speed:,.0f} images/s"
            )
