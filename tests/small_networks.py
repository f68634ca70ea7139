"""Networks for tests."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from mobilevit.models.mobilevit import Architecture, Stage, Transformer

Network = TypeVar("Network", bound=nn.Module)

# Every kind of layer, at widths of S and in two stages, so that exporters and compilers take a sixth of the time.
SMALL = Architecture(
    "small",
    stages=(
        Stage(32, num_residuals=2, stride=2),
        Stage(96, num_residuals=1, stride=2, transformer=Transformer(dim=144, num_layers=1, ffn_dim=288)),
    ),
    head_channels=320,
    expansion=4,
    transformer_dropout=0.1,
)


def randomize(model: Network, seed: int = 0) -> Network:
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
