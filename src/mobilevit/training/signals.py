"""Ctrl-C and SIGTERM during training: finish the step, then stop."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from typing import Any

logger = logging.getLogger(__name__)
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopOnSignal:
    """Context manager that records Ctrl-C and SIGTERM in `signal_number`, so that the loop can finish its step.

    A second signal stops the process immediately. Signals within two seconds count as one: under torchrun, Ctrl-C
    arrives from the terminal and from torchrun.

    A thread receives the signals and logs the announcement. Python's own handlers run only between the calls of the
    main thread, and one call, the backward pass of a large micro-batch, can take many seconds.
    """

    signal_number = 0
    _is_repeated = False

    def __init__(self) -> None:
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():
            self._read_end, self._write_end = os.pipe()
            os.set_blocking(self._write_end, False)
            self._previous_wakeup = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
            for number in SIGNALS:
                self._previous_handlers[number] = signal.signal(number, self._handle)
            self._thread = threading.Thread(target=self._listen, daemon=True)
            self._thread.start()
        return self

    def _listen(self) -> None:
        received_at = 0.0
        while number := os.read(self._read_end, 1)[0]:
            if number not in SIGNALS:
                continue
            if not self.signal_number:
                self.signal_number, received_at = number, time.monotonic()
                with contextlib.suppress(OSError, SystemExit):  # rich exits if standard error is a closed pipe
                    logger.info("finishing this step, then saving; press Ctrl-C again to stop without saving")
            elif not self._is_repeated and time.monotonic() - received_at > 2:
                self._is_repeated = True
                signal.raise_signal(number)  # Python merges the signals that arrive during one call of the main thread

    def _handle(self, number: int, frame: object) -> None:
        if self._is_repeated:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def __exit__(self, *_: object) -> None:
        if self._previous_handlers:
            self._restore()
            signal.set_wakeup_fd(self._previous_wakeup)
            os.write(self._write_end, b"\0")
            self._thread.join()
            os.close(self._read_end)
            os.close(self._write_end)
