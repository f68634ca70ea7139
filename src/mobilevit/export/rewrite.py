"""Exact rewrites: module to module, the same function in eval mode, cheaper to compute.

A rewritten network is for inference: it is trained no further and saved no more.
"""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn
from torch.nn.utils import fuse_conv_bn_eval

from mobilevit.models.mobilevit import ConvNorm

Network = TypeVar("Network", bound=nn.Module)


def fold_batch_norm(model: Network) -> Network:
    """A copy of `model` with every batch norm in the convolution before it: one pass over each map instead of two.

    Raises:
        ValueError: a model in training mode, where batch norm depends on the batch.
    """
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() before folding its batch norms")
    model = copy.deepcopy(model).requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, ConvNorm):
                conv = fuse_conv_bn_eval(child.conv, child.norm)
                setattr(parent, name, nn.Sequential(conv, nn.SiLU(inplace=True)) if child.activation else conv)
    return model
