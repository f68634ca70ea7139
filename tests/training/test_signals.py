"""Ctrl-C is announced while the main thread computes; a second one stops at once."""

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from mobilevit.training import signals
from mobilevit.training.signals import ANNOUNCEMENT, StopOnSignal


@pytest.fixture(autouse=True)
def raises_on_ctrl_c() -> Iterator[None]:
    """A shell that starts the tests in the background lets them ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def busy_until() -> Callable[[threading.Event], bool]:
    """Keeps the main thread in one call of C, in which no Python handler runs, until an event; False if it never is."""

    def wait(event: threading.Event) -> bool:
        reading, writing = os.pipe()
        threading.Thread(target=lambda: os.write(writing, b"y" if event.wait(20) else b"n")).start()
        for number in signals.SIGNALS:
            signal.siginterrupt(number, False)  # the call of read goes on after a signal
        answer = ctypes.create_string_buffer(1)
        ctypes.CDLL(None).read(reading, answer, 1)
        return answer.raw == b"y"

    return wait


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_announced_during_a_call(busy_until: Callable[[threading.Event], bool], number: signal.Signals):
    said, announced = [], threading.Event()

    def say(text: str) -> None:
        said.append(text)
        announced.set()

    handler = signal.getsignal(number)
    with StopOnSignal(say) as stop:
        threading.Thread(target=lambda: os.kill(os.getpid(), number)).start()
        assert busy_until(announced)
        assert stop.signal_number == number
        os.kill(os.getpid(), number)  # within two seconds the same
    assert said == [ANNOUNCEMENT]
    assert signal.getsignal(number) is handler
    assert signal.set_wakeup_fd(-1) == -1


def test_a_second_one_stops_at_once_even_if_both_come_during_one_call(
    busy_until: Callable[[threading.Event], bool], monkeypatch: pytest.MonkeyPatch
):
    now, done = [100.0], threading.Event()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    raise_signal = signal.raise_signal

    def raise_and_note(number: int) -> None:
        raise_signal(number)
        done.set()

    def interrupt(text: str) -> None:
        now[0] += 3
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(signal, "raise_signal", raise_and_note)

    def stop_twice() -> None:
        with StopOnSignal(interrupt):
            threading.Thread(target=lambda: os.kill(os.getpid(), signal.SIGINT)).start()
            assert busy_until(done)

    with pytest.raises(KeyboardInterrupt):
        stop_twice()


def test_in_a_thread_that_receives_no_signals():
    stops = []

    def enter() -> None:
        with StopOnSignal(print) as stop:
            stops.append(stop)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert [stop.signal_number for stop in stops] == [0]


def test_nobody_reads_the_announcement(busy_until: Callable[[threading.Event], bool]):
    """A pipe whose reader was interrupted too: the thread must live on, for the second Ctrl-C."""
    announced = threading.Event()

    def say(text: str) -> None:
        announced.set()
        raise SystemExit(1)  # as rich does

    with StopOnSignal(say) as stop:
        threading.Thread(target=lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        assert busy_until(announced)
        stop._thread.join(0.2)  # it would have ended by now
        assert stop._thread.is_alive()
    assert not stop._thread.is_alive()
