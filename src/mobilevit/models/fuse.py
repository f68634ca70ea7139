"""Batch norm folding: for inference in PyTorch, and the first rewrite of every export."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn
from torch.nn.utils import fuse_conv_bn_eval

from mobilevit.models.mobilevit import ConvNorm

Network = TypeVar("Network", bound=nn.Module)


def fold_batch_norm(model: Network) -> Network:
    """Return a copy of `model` with every batch norm folded into the convolution before it.

    Raises:
        ValueError: the model is in training mode, where batch norm depends on the batch.
    """
    model = frozen_copy(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, ConvNorm):
                conv = fuse_conv_bn_eval(child.conv, child.norm)
                setattr(parent, name, nn.Sequential(conv, nn.SiLU(inplace=True)) if child.activation else conv)
    return model


def frozen_copy(model: Network) -> Network:
    """Return a deep copy of `model` without gradients.

    Raises:
        ValueError: the model is in training mode.
    """
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() first")
    return copy.deepcopy(model).requires_grad_(False)
