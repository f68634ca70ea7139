"""What tests of several files share."""

from __future__ import annotations

from typing import TypeVar

import pytest
import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def randomise(model: Network, seed: int = 0) -> Network:
    """Random weights whose activations keep their scale, and norms that are not the identity; eval mode.

    With default initial values the running statistics are 0 and 1 and the biases 0, and mixing them up goes unseen.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            z = torch.randn(tensor.shape, generator=generator)
            if key.endswith("num_batches_tracked"):
                tensor.fill_(7)
            elif key.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif key.endswith(("running_mean", "bias")):
                tensor.copy_(0.1 * z)
            elif tensor.ndim == 1:
                tensor.copy_(1 + 0.1 * z)
            else:
                tensor.copy_(1.3 * z / tensor[0].numel() ** 0.5)
    return model.eval()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # It forks, and autograd refuses to work in a fork of a process in which it has had threads.
    items.sort(key=lambda item: item.path.name != "test_resume.py")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
