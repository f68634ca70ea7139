"""Ctrl-C and SIGTERM during training: finish the step, then stop."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ANNOUNCEMENT = "finishing this step, then saving; press Ctrl-C again to stop without saving"


class StopOnSignal:
    """Notes Ctrl-C and SIGTERM, so that a step can be finished; another one ends the process at once.

    Within two seconds they count as one: under torchrun, Ctrl-C comes from the terminal and from torchrun.

    A thread receives the signals and announces the stop with `say`. Python's own handlers run only between the calls of
    the main thread, and one call, the backward pass of a large micro-batch, can take many seconds.
    """

    signal_number = 0
    _is_repeated = False

    def __init__(self, say: Callable[[str], object]):
        self._say = say
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():
            self._reading, self._writing = os.pipe()
            os.set_blocking(self._writing, False)
            self._wakeup_before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
            self._thread = threading.Thread(target=self._listen, daemon=True)
            self._thread.start()
        return self

    def _listen(self) -> None:
        noted_at = 0.0
        while number := os.read(self._reading, 1)[0]:
            if number not in SIGNALS:
                continue
            if not self.signal_number:
                self.signal_number, noted_at = number, time.monotonic()
                with contextlib.suppress(OSError, SystemExit):  # nobody reads any more; rich exits then
                    self._say(ANNOUNCEMENT)
            elif not self._is_repeated and time.monotonic() - noted_at > 2:
                self._is_repeated = True
                signal.raise_signal(number)  # Python merges the signals that arrive during one call of the main thread

    def _handle(self, number: int, frame: object) -> None:
        if self._is_repeated:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __exit__(self, *_: object) -> None:
        if self._before:
            self._restore()
            signal.set_wakeup_fd(self._wakeup_before)
            os.write(self._writing, b"\0")
            self._thread.join()
            os.close(self._reading)
            os.close(self._writing)
