"""Batch-norm folding, for inference in PyTorch and before every export."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

from torch import nn
from torch.nn.utils import fuse_conv_bn_eval

from mobilevit.models.mobilevit import ConvNorm

Network = TypeVar("Network", bound=nn.Module)


def fold_batch_norm(model: Network, *, inplace: bool = False) -> Network:
    """Fold every batch norm into the convolution before it: one pass over each map instead of two.

    Returns a copy without gradients, unless `inplace`.

    Raises:
        ValueError: `model` is in training mode, where batch norm depends on the batch.
    """

    def folded(module: nn.Module) -> nn.Module:
        if not isinstance(module, ConvNorm):
            return module
        conv = fuse_conv_bn_eval(module.conv, module.norm)
        return nn.Sequential(conv, nn.SiLU(inplace=True)) if module.activation else conv

    model = _check_eval(model).requires_grad_(False) if inplace else frozen_copy(model)
    return replace_modules(model, folded)


def replace_modules(model: Network, replacement: Callable[[nn.Module], nn.Module]) -> Network:
    """Replace each module inside `model` by `replacement(module)`, in place; returns `model`."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            setattr(parent, name, replacement(child))
    return model


def frozen_copy(model: Network) -> Network:
    """Return a deep copy of `model` without gradients.

    Raises:
        ValueError: `model` is in training mode.
    """
    return copy.deepcopy(_check_eval(model)).requires_grad_(False)


def _check_eval(model: Network) -> Network:
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() first")
    return model
