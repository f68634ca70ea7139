"""Ctrl-C is logged while the main thread computes; a second one stops immediately."""

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from mobilevit.training import signals
from mobilevit.training.signals import StopOnSignal, logger


@pytest.fixture(autouse=True)
def raises_on_ctrl_c() -> Iterator[None]:
    """Processes in the background of a shell ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def busy_until() -> Callable[[threading.Event], bool]:
    """Blocks the main thread in a C call, during which no Python handler runs, until an event; False on a timeout."""

    def wait(event: threading.Event) -> bool:
        reading, writing = os.pipe()
        threading.Thread(target=lambda: os.write(writing, b"y" if event.wait(20) else b"n")).start()
        for number in signals.SIGNALS:
            signal.siginterrupt(number, False)  # a signal does not interrupt `read`
        byte = ctypes.create_string_buffer(1)
        ctypes.CDLL(None).read(reading, byte, 1)
        return byte.raw == b"y"

    return wait


@pytest.fixture
def on_message(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str], object]], None]:
    """Replaces the logger's `info`."""
    return lambda function: monkeypatch.setattr(logger, "info", function)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_logged_during_a_call(
    busy_until: Callable[[threading.Event], bool], on_message: Callable[..., None], number: signal.Signals
):
    messages, logged = [], threading.Event()
    on_message(lambda text: (messages.append(text), logged.set()))
    handler = signal.getsignal(number)
    with StopOnSignal() as stop:
        threading.Thread(target=lambda: os.kill(os.getpid(), number)).start()
        assert busy_until(logged)
        assert stop.signal_number == number
        os.kill(os.getpid(), number)  # within two seconds: counts as the same signal
    assert len(messages) == 1
    assert signal.getsignal(number) is handler
    assert signal.set_wakeup_fd(-1) == -1


def test_a_second_signal_stops_immediately_even_during_one_call(
    busy_until: Callable[[threading.Event], bool], on_message: Callable[..., None], monkeypatch: pytest.MonkeyPatch
):
    now, done = [100.0], threading.Event()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    raise_signal = signal.raise_signal

    def raise_and_record(number: int) -> None:
        raise_signal(number)
        done.set()

    def interrupt(text: str) -> None:
        now[0] += 3
        os.kill(os.getpid(), signal.SIGINT)

    on_message(interrupt)
    monkeypatch.setattr(signal, "raise_signal", raise_and_record)

    def stop_twice() -> None:
        with StopOnSignal():
            threading.Thread(target=lambda: os.kill(os.getpid(), signal.SIGINT)).start()
            assert busy_until(done)

    with pytest.raises(KeyboardInterrupt):
        stop_twice()


def test_in_a_thread_that_receives_no_signals():
    stops = []

    def enter() -> None:
        with StopOnSignal() as stop:
            stops.append(stop)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert [stop.signal_number for stop in stops] == [0]


def test_closed_standard_error(busy_until: Callable[[threading.Event], bool], on_message: Callable[..., None]):
    """The thread survives, for the second Ctrl-C."""
    logged = threading.Event()

    def fail(text: str) -> None:
        logged.set()
        raise SystemExit(1)  # as rich does

    on_message(fail)
    with StopOnSignal() as stop:
        threading.Thread(target=lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        assert busy_until(logged)
        stop._thread.join(0.2)
        assert stop._thread.is_alive()
    assert not stop._thread.is_alive()
