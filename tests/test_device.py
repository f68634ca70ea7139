"""Device, number of threads, and the advice about threads."""

import pytest
import torch

from mobilevit import device
from mobilevit.device import choose_device, thread_advice, use_threads


@pytest.fixture(autouse=True)
def threads_restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_choose_device():
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert choose_device("auto") == best
    assert choose_device("cpu") == "cpu"


@pytest.mark.parametrize("name", ["tpu9", "meta", "cuda:99"])
def test_an_unavailable_device(name: str):
    with pytest.raises(ValueError, match=rf"device '{name}' cannot be used here .*; use auto, cpu"):
        choose_device(name)


def test_use_threads():
    use_threads(3)
    assert torch.get_num_threads() == 3
    use_threads(None)
    assert torch.get_num_threads() == 3
    with pytest.raises(ValueError, match="num threads is 0; it must be 1 or more"):
        use_threads(0)


@pytest.mark.parametrize(
    ("num_threads", "speeds", "message"),
    [
        (2, {1: 1000.0, 2: 40.0}, "2 threads are slower than 1 here (40 against 1,000 convolutions per second"),
        (4, {1: 1000.0, 4: 1000.0}, "--num-threads 1"),
        (4, {1: 1000.0, 4: 1700.0}, ""),
        (1, {}, ""),  # nothing to measure
    ],
)
def test_thread_advice(monkeypatch: pytest.MonkeyPatch, num_threads: int, speeds: dict[int, float], message: str):
    torch.set_num_threads(num_threads)
    monkeypatch.setattr(device, "_convolutions_per_second", lambda number: speeds[number])
    advice = thread_advice()
    assert message in advice
    assert bool(advice) == bool(message)


def test_advice_does_not_change_the_random_state(monkeypatch: pytest.MonkeyPatch):
    torch.set_num_threads(2)
    monkeypatch.setattr(device, "CALIBRATION_SECONDS", 1e-9)  # one call each
    before = torch.get_rng_state()
    thread_advice()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == 2
