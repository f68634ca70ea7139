"""Rewrites change the graph and not the function: float64, 1e-9."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from conftest import randomise
from mobilevit.export.rewrite import fold_batch_norm
from mobilevit.models.mobilevit import MobileViT


@pytest.mark.parametrize("size", [(64, 96), (75, 130)])
@pytest.mark.parametrize("name", ["xxs", "s"])
def test_fold_batch_norm(name: str, size: tuple[int, int]) -> None:
    model = randomise(MobileViT(name, num_classes=10)).double()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    folded = fold_batch_norm(model)
    x = torch.rand(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        difference = (folded(x) - model(x)).abs().max() / model(x).std()
    assert difference < 1e-9
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        fold_batch_norm(MobileViT("xxs").train())
