"""The interleaved timer: its order, and ratios on a machine whose speed changes."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from mobilevit.benchmark import timing
from mobilevit.benchmark.timing import Spread


class Clock:
    """A fake clock that only the measured callables advance; `factor` slows all of them down."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now, self.factor = 0.0, 1.0
        self.log: list[str] = []
        monkeypatch.setattr(timing.time, "perf_counter", self.read)
        monkeypatch.setattr(timing.time, "sleep", lambda seconds: self.log.append("pause"))

    def read(self) -> float:
        self.log.append("clock")
        return self.now

    def run(self, name: str, seconds: float) -> Any:
        def call() -> None:
            self.log.append(name)
            self.now += seconds * self.factor

        return call


def test_order(monkeypatch: pytest.MonkeyPatch):
    clock = Clock(monkeypatch)
    names = ["a", "b", "c", "d"]
    timing.measure([clock.run(name, 1) for name in names], 16)
    warm_up = 4 * timing.WARM_UP_CALLS
    assert Counter(clock.log[:warm_up]) == dict.fromkeys(names, timing.WARM_UP_CALLS)
    steps = [clock.log[i : i + 5] for i in range(warm_up, len(clock.log), 5)]
    assert all(step == ["pause", step[1], "clock", step[1], "clock"] for step in steps)
    order = [step[1] for step in steps]
    rounds = [order[i : i + 4] for i in range(0, len(order), 4)]
    assert all(sorted(one) == names for one in rounds)
    for position in range(4):  # each callable is in each position equally often
        assert Counter(one[position] for one in rounds) == dict.fromkeys(names, 4)
    pairs = {(one[i], one[i + 1]) for one in rounds for i in range(3)}
    assert all(len({before for before, after in pairs if after == name}) > 1 for name in names)


def test_ratios_do_not_depend_on_the_clock_speed(monkeypatch: pytest.MonkeyPatch):
    clock = Clock(monkeypatch)
    num_calls = 0
    first, second = clock.run("a", 1), clock.run("b", 1.25)

    def slow_in_odd_rounds(call: Any) -> Any:
        def wrapped() -> None:
            nonlocal num_calls
            index = num_calls - 2 * timing.WARM_UP_CALLS
            clock.factor = 5 if index >= 0 and index // 4 % 2 == 1 else 1  # four calls per round
            num_calls += 1
            call()

        return wrapped

    times_ms = timing.measure([slow_in_odd_rounds(first), slow_in_odd_rounds(second)], 10)
    np.testing.assert_allclose(times_ms[0], [1e3, 5e3] * 5)
    spread = Spread.of(times_ms[1] / times_ms[0])
    assert (spread.median, spread.p10, spread.p90) == pytest.approx((1.25, 1.25, 1.25))


def test_spread():
    assert Spread.of(np.arange(101.0)) == Spread(median=50, p10=10, p90=90)
