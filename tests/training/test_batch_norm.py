"""Running statistics against float64, however a step is shared out."""

import pytest
import torch
from torch import Tensor, nn

from mobilevit.training.batch_norm import RunningStatistics
from mobilevit.training.distributed import Processes

ALONE = Processes(0, 1, torch.device("cpu"))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.SiLU(), nn.BatchNorm2d(4), nn.BatchNorm2d(4)).train()


def seen_by_norms(model: nn.Module, pixels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Mean and variance (unbiased) of what goes into each batch norm, in float64."""
    seen: list[tuple[Tensor, Tensor]] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().double().movedim(1, 0).flatten(1)
        seen.append((x.mean(1), x.var(1)))

    handles = [m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    model(pixels)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("lengths", [[6], [4, 3], [2, 3, 2, 5]])
def test_a_step_moves_them_by_a_tenth_of_the_mean_over_its_parts(lengths: list[int]):
    model = network()
    norms = [module for module in model if isinstance(module, nn.BatchNorm2d)]
    running = [(torch.zeros(4).double(), torch.ones(4).double()) for _ in norms]
    statistics = RunningStatistics(model)
    for _ in range(3):
        parts = []
        for length in lengths:
            parts.append(seen_by_norms(model, 2 * torch.randn(length, 3, 5, 3) + 1))
            statistics.note()
        statistics.update(len(lengths), ALONE)
        for i, norm in enumerate(norms):
            mean, var = (sum(part[i][which] for part in parts) / len(parts) for which in (0, 1))
            running[i] = (0.9 * running[i][0] + 0.1 * mean, 0.9 * running[i][1] + 0.1 * var)
            assert norm.running_mean is not None
            assert norm.running_var is not None
            torch.testing.assert_close(norm.running_mean.double(), running[i][0], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(norm.running_var.double(), running[i][1], rtol=1e-5, atol=1e-6)


def test_one_part_a_step_is_what_pytorch_does():
    ours, theirs = network(), network()
    statistics = RunningStatistics(ours)
    for _ in range(4):
        pixels = torch.randn(5, 3, 4, 4)
        torch.testing.assert_close(ours(pixels), theirs(pixels), rtol=0, atol=0)
        statistics.note()
        statistics.update(1, ALONE)
    for name, x in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], x, rtol=1e-5, atol=1e-6, msg=name)


def test_parts_in_several_processes_are_the_same_parts(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(1)
    parts = [torch.randn(3, 3, 4, 4) for _ in range(4)]
    alone, first, second = network(), network(), network()
    statistics = {model: RunningStatistics(model) for model in (alone, first, second)}
    for i, pixels in enumerate(parts):
        for model in (alone, first if i % 2 == 0 else second):
            model(pixels)
            statistics[model].note()
    statistics[alone].update(4, ALONE)
    # What `sum` would do between two processes, one after the other in this one.
    together = [x + y for x, y in zip(statistics[first]._sums, statistics[second]._sums, strict=True)]

    def give(_: Processes, tensors: list[Tensor]) -> None:
        for tensor, total in zip(tensors, together, strict=True):
            tensor.copy_(total)

    monkeypatch.setattr(Processes, "sum", give)
    for model in (first, second):
        statistics[model].update(4, ALONE)
        for name, x in alone.state_dict().items():
            if not name.endswith("num_batches_tracked"):
                torch.testing.assert_close(model.state_dict()[name], x, rtol=1e-6, atol=1e-7, msg=name)


def test_layers_that_are_not_trained_are_left_alone():
    model = network()
    frozen = model[1].eval()
    assert isinstance(frozen, nn.BatchNorm2d)
    statistics = RunningStatistics(model)
    model(torch.randn(4, 3, 4, 4))
    statistics.note()
    statistics.update(1, ALONE)
    assert frozen.running_mean is not None
    assert torch.equal(frozen.running_mean, torch.zeros(4))
    assert frozen.momentum == 0.1
    nothing = RunningStatistics(nn.Linear(2, 2))
    nothing.note()
    nothing.update(1, ALONE)


def test_a_loaded_state_is_taken_up_where_it_was():
    model = network()
    with torch.no_grad():
        for name, x in model.state_dict().items():
            if "running" in name:
                x.fill_(3.0)
    statistics = RunningStatistics(model)
    mean = seen_by_norms(model, torch.randn(4, 3, 4, 4))[0][0]
    statistics.note()
    statistics.update(1, ALONE)
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    torch.testing.assert_close(norm.running_mean.double(), 0.9 * 3 + 0.1 * mean, rtol=1e-5, atol=1e-6)
