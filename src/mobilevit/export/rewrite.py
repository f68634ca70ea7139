"""Exact rewrites: modules are replaced by others that compute the same function in eval mode at a lower cost.

Every function returns a rewritten copy of a network, for inference only. `optimize_for_inference` applies all rewrites
in the formulation that a runtime executes fastest.

The rewrites use these identities:

- A batch norm folds into the convolution before it.
- The affine part of a layer norm folds into the linear layer after it.
- The softmax scale folds into the query weights.
- The key bias adds one constant to a query's row of scores, and softmax is invariant to it.
- The rows of attention sum to 1, so the value bias passes through to the bias of the output projection.
- Only norms read the residual stream. If the weights of every layer that writes to it are centered over the output
  channels, the mean that a layer norm subtracts is 0, and the layer norm is an RMSNorm.
- Unfold and fold move pixels and do not mix channels, so they commute with 1x1 convolutions.
- In the segmentation head, the pooled branch is constant over the map, so the 1x1 convolution after it can be applied
  before the branch is broadcast.
- In the detection heads, the last convolution splits into one for classes and one for locations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.onnx.ops import attention

from mobilevit.models.deeplabv3 import DeepLabV3, Pyramid
from mobilevit.models.fuse import Network, fold_batch_norm, frozen_copy, replace_modules
from mobilevit.models.mobilevit import Attention, MobileViTBlock, TransformerLayer, always, resize_map
from mobilevit.models.ssdlite import MapHead, SSDLite

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class Formulation:
    """The operators that express a function. Which formulation is fastest depends on the runtime.

    Attributes:
        attention: torch's fused operator; ONNX's operator, which splits the heads itself; or matrix products of rank 4
            (batch, heads) or rank 3.
        norm: torch's RMSNorm; a layer norm (the mean that it subtracts is 0), for runtimes that have this operator but
            would need six for RMSNorm; an explicit mean; or the mean as a linear layer with weights 1/D, for runtimes
            with slow means.
        joint_qkv: one linear layer for queries, keys and values instead of three.
        silu: torch's operator, or x * sigmoid(x).
    """

    attention: Literal["fused", "onnx", "rank4", "rank3"] = "fused"
    norm: Literal["fused", "layer", "mean", "linear"] = "fused"
    joint_qkv: bool = False
    silu: Literal["fused", "sigmoid"] = "fused"


EAGER = Formulation(joint_qkv=True)


def optimize_for_inference(model: Network, formulation: Formulation = EAGER) -> Network:
    """Apply all rewrites, in the given formulation."""
    model = flatten_tokens(center_residuals(fold_attention(fold_norm_affine(fold_batch_norm(model)))), formulation)
    return split_heads(fold_pooled_branch(model))


def fold_norm_affine(model: Network) -> Network:
    """Fold the affine part of layer norms into the linear layers after them. Requires folded batch norms."""
    model = frozen_copy(model)
    for module in model.modules():
        if isinstance(module, TransformerLayer):
            _fold_affine(module.attention_norm, module.attention.qkv)
            _fold_affine(module.ffn_norm, module.ffn_in)
            module.attention_norm = _without_affine(module.attention_norm)
            module.ffn_norm = _without_affine(module.ffn_norm)
        elif isinstance(module, MobileViTBlock):
            # Commutes with the resize in between: bilinear weights sum to 1.
            _fold_affine(module.norm, _conv_of(module.from_tokens))
            module.norm = _without_affine(module.norm)
    return model


def fold_attention(model: Network) -> Network:
    """Fold the softmax scale and the biases of keys and values into other weights."""
    model = frozen_copy(model)
    for module in model.modules():
        if isinstance(module, TransformerLayer):
            module.attention = cast(Attention, FoldedAttention(module.attention))
    return model


def center_residuals(model: Network) -> Network:
    """Center the residual stream and replace layer norms by RMSNorm. Requires layer norms without weights."""
    model = frozen_copy(model)
    for module in model.modules():
        if isinstance(module, MobileViTBlock):
            _center_outputs(module.to_tokens)
            module.norm = _rms_norm(module.norm, module.to_tokens.weight.dtype)
        elif isinstance(module, TransformerLayer):
            _center_outputs(module.attention.out)
            _center_outputs(module.ffn_out)
            module.attention_norm = _rms_norm(module.attention_norm, module.ffn_in.weight.dtype)
            module.ffn_norm = _rms_norm(module.ffn_norm, module.ffn_in.weight.dtype)
    return model


def flatten_tokens(model: Network, formulation: Formulation = EAGER) -> Network:
    """Replace MobileViT blocks by `FlatBlock`. Requires all the rewrites above."""

    def flat(module: nn.Module) -> nn.Module:
        if isinstance(module, MobileViTBlock):
            return FlatBlock(module, formulation)
        return _silu(formulation) if isinstance(module, nn.SiLU) else module

    return replace_modules(frozen_copy(model), flat)


def fold_pooled_branch(model: Network) -> Network:
    """Replace the pyramid of a segmentation network by `FoldedPyramid`.

    Requires folded batch norms. The auxiliary head is dropped.
    """
    model = frozen_copy(model)
    for module in list(model.modules()):
        if isinstance(module, DeepLabV3) and isinstance(module.pyramid, Pyramid):  # not yet replaced
            module.pyramid = cast(Pyramid, FoldedPyramid(module.pyramid).eval())
            module.auxiliary = None  # for training only
    return model


def split_heads(model: Network) -> Network:
    """Replace a detector, `model` itself or inside it, by `SplitDetector`."""

    def split(module: nn.Module) -> nn.Module:
        return SplitDetector(module).eval() if isinstance(module, SSDLite) else module

    return replace_modules(cast(Network, split(frozen_copy(model))), split)


# ---------------------------------------------------------------------------------------------------------------------
# Replacement modules


class FoldedAttention(nn.Module):
    """Self-attention without scale and without biases of keys and values; (B, N, D) -> (B, N, D)."""

    def __init__(self, attention: Attention):
        super().__init__()
        self.num_heads = attention.num_heads
        D = attention.out.in_features
        weights, biases = attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3)
        scale = (D // self.num_heads) ** -0.5
        self.q = _linear(weights[0] * scale, biases[0] * scale)
        self.k = _linear(weights[1], None)
        self.v = _linear(weights[2], None)
        out = attention.out
        self.out = _linear(out.weight, out.bias + out.weight @ biases[2])

    def forward(self, x_BND: Tensor) -> Tensor:
        B, N, D = x_BND.shape
        q, k, v = (
            linear(x_BND).reshape(B, N, self.num_heads, D // self.num_heads).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        x = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        return self.out(x.transpose(1, 2).reshape(B, N, D))


class FlatAttention(nn.Module):
    """`FoldedAttention` within groups of `num_tokens` consecutive rows of a token matrix; (M, D) -> (M, D)."""

    def __init__(self, attention: FoldedAttention, formulation: Formulation):
        super().__init__()
        self.num_heads = attention.num_heads
        self.formulation = formulation.attention
        self.out = attention.out
        self.joint_qkv = formulation.joint_qkv
        parts = (attention.q, attention.k, attention.v)
        if self.joint_qkv:
            bias = torch.cat([attention.q.bias, attention.q.bias.new_zeros(2 * attention.q.out_features)])
            self.qkv = _linear(torch.cat([part.weight for part in parts]), bias)
        else:
            self.q, self.k, self.v = parts

    def forward(self, x: Tensor, num_tokens: int) -> Tensor:
        D = x.shape[-1]
        parts = self.qkv(x).chunk(3, dim=-1) if self.joint_qkv else (self.q(x), self.k(x), self.v(x))
        if self.formulation == "onnx":
            q, k, v = (part.reshape(-1, num_tokens, D) for part in parts)
            y, *_ = attention(q, k, v, q_num_heads=self.num_heads, kv_num_heads=self.num_heads, scale=1.0)
            return self.out(y.reshape(-1, D))
        parts = [part.reshape(-1, num_tokens, self.num_heads, D // self.num_heads) for part in parts]
        if self.formulation == "fused":
            q, k, v = (part.transpose(1, 2) for part in parts)
            y = F.scaled_dot_product_attention(q, k, v, scale=1.0)
            return self.out(y.transpose(1, 2).reshape(-1, D))
        q = parts[0].permute(0, 2, 1, 3)  # (groups, heads, N, d)
        k = parts[1].permute(0, 2, 3, 1)  # (groups, heads, d, N)
        v = parts[2].permute(0, 2, 1, 3)
        if self.formulation == "rank4":
            y = (q @ k).softmax(dim=-1) @ v
        else:
            d = D // self.num_heads
            q, k, v = q.reshape(-1, num_tokens, d), k.reshape(-1, d, num_tokens), v.reshape(-1, num_tokens, d)
            y = torch.bmm(torch.bmm(q, k).softmax(dim=-1), v).reshape(-1, self.num_heads, num_tokens, d)
        return self.out(y.permute(0, 2, 1, 3).reshape(-1, D))


class FlatLayer(nn.Module):
    """A `TransformerLayer` on a token matrix; (M, D) -> (M, D)."""

    def __init__(self, layer: TransformerLayer, formulation: Formulation):
        super().__init__()
        assert isinstance(layer.attention, FoldedAttention)
        self.attention_norm = _formulated_norm(layer.attention_norm, formulation)
        self.attention = FlatAttention(layer.attention, formulation)
        self.ffn_norm = _formulated_norm(layer.ffn_norm, formulation)
        self.ffn_in = layer.ffn_in
        self.ffn_out = layer.ffn_out
        self.activation = _silu(formulation)

    def forward(self, x: Tensor, num_tokens: int) -> Tensor:
        x = x + self.attention(self.attention_norm(x), num_tokens)
        return x + self.ffn_out(self.activation(self.ffn_in(self.ffn_norm(x))))


class FlatBlock(nn.Module):
    """A `MobileViTBlock` that unfolds before `to_tokens` and folds after `from_tokens`; (B, C, H, W) -> (B, C, H, W).

    Unfold and fold move C channels instead of D, and all layers between them use one token matrix (P * B * N, D). No
    tensor has more than five axes, the limit of some runtimes.
    """

    def __init__(self, block: MobileViTBlock, formulation: Formulation):
        super().__init__()
        self.patch_px = block.patch_px
        self.local = nn.Sequential(_conv_of(block.local), _silu(formulation))
        to_tokens, from_tokens = block.to_tokens, _conv_of(block.from_tokens)
        self.to_tokens = _linear(to_tokens.weight.flatten(1), to_tokens.bias)
        self.layers = nn.ModuleList(FlatLayer(cast(TransformerLayer, x), formulation) for x in block.layers)
        self.norm = _formulated_norm(block.norm, formulation)
        self.from_tokens = _linear(from_tokens.weight.flatten(1), from_tokens.bias)
        self.activation = _silu(formulation)
        self.fuse = nn.Sequential(_conv_of(block.fuse), _silu(formulation))

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        p = self.patch_px
        h, w = (H + p - 1) // p, (W + p - 1) // p
        y = resize_map(self.local(x), h * p, w * p).permute(0, 2, 3, 1)
        # Rows by position in the patch, image, patch: (P * B * N, C). Attention is within a position and an image.
        if always(y.shape[1] % h == 0) and always(y.shape[2] % w == 0):
            y = y.reshape(B * h, p, w, p, C).permute(1, 3, 0, 2, 4).reshape(-1, C)
        else:  # the same for symbolic sizes, which torch.export cannot prove to be divisible
            y = torch.stack([y[:, i::p, j::p] for i in range(p) for j in range(p)]).reshape(-1, C)
        y = self.to_tokens(y)
        for layer in self.layers:
            y = layer(y, h * w)
        y = self.from_tokens(self.norm(y))
        y = y.reshape(p, p, B * h, w, C).permute(2, 0, 3, 1, 4).reshape(B, h * p, w * p, C).permute(0, 3, 1, 2)
        y = self.activation(resize_map(y, H, W))
        return self.fuse(torch.cat((x, y), dim=1))


class FoldedPyramid(nn.Module):
    """A `Pyramid` whose pooled branch is projected before it is broadcast; (B, C, H, W) -> (B, out, H, W).

    ReLU is before the concatenation, where runtimes fuse it into the convolutions.
    """

    def __init__(self, pyramid: Pyramid):
        super().__init__()
        self.convs = nn.ModuleList(_conv_of(conv) for conv in pyramid.convs)
        self.pooled, project = _conv_of(pyramid.pooled), _conv_of(pyramid.project)
        num_map_channels = project.in_channels - self.pooled.out_channels
        self.project = _conv(project.weight[:, :num_map_channels], project.bias)
        self.project_pooled = _conv(project.weight[:, num_map_channels:], None)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.project_pooled(F.relu(self.pooled(x.mean(dim=(-2, -1), keepdim=True))))
        maps = torch.cat([F.relu(conv(x)) for conv in self.convs], dim=1)
        return F.relu(self.project(maps) + pooled)


class SplitHead(nn.Module):
    """A `MapHead` with two last convolutions: (B, C, H, W) -> logits (B, H * W * anchors, K), locations (..., 4)."""

    def __init__(self, head: MapHead):
        super().__init__()
        self.project, self.depthwise = head.project, head.depthwise
        rows = torch.arange(head.out.out_channels).unflatten(0, (head.num_anchors, -1))
        weight, bias = head.out.weight, head.out.bias
        assert bias is not None
        self.classes, self.locations = (
            _conv(weight[channels.flatten()], bias[channels.flatten()]) for channels in (rows[:, 4:], rows[:, :4])
        )
        self.num_anchors = head.num_anchors

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.project is not None:
            x = F.relu(self.project(x))
        if self.depthwise is not None:
            x = self.depthwise(x)
        logits, locations = (
            y.permute(0, 2, 3, 1).reshape(y.shape[0], y.shape[2] * y.shape[3] * self.num_anchors, -1)
            for y in (self.classes(x), self.locations(x))
        )
        return logits, locations


class SplitDetector(nn.Module):
    """An `SSDLite` with `SplitHead`s: class logits (B, A, classes + 1) and locations (B, A, 4)."""

    def __init__(self, model: SSDLite):
        super().__init__()
        self.backbone, self.extra_layers, self.pooled = model.backbone, model.extra_layers, model.pooled
        self.heads = nn.ModuleList(SplitHead(cast(MapHead, head)) for head in model.heads)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = list(self.backbone(images).values())
        for layer in self.extra_layers:
            maps.append(layer(maps[-1]))
        maps.append(F.relu(self.pooled(maps[-1].mean(dim=(-2, -1), keepdim=True))))
        logits, locations = zip(*(head(x) for head, x in zip(self.heads, maps, strict=True)), strict=True)
        return torch.cat(logits, dim=1), torch.cat(locations, dim=1)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x * x) + eps) over the last axis, (..., D) -> (..., D)."""

    def __init__(self, dim: int, eps: float, formulation: Formulation, dtype: torch.dtype):
        super().__init__()
        self.eps = eps
        self.dim = dim
        self.dtype = dtype
        self.formulation = formulation.norm
        if formulation.norm == "linear":
            self.mean = _linear(torch.full((1, dim), 1 / dim, dtype=dtype), torch.tensor([eps], dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        if self.formulation == "fused":
            return F.rms_norm(x, (self.dim,), eps=self.eps)
        if self.formulation == "layer":
            return F.layer_norm(x, (self.dim,), eps=self.eps)
        if self.formulation == "mean":
            wide = x.float() if x.dtype == torch.float16 else x  # squares overflow float16 (65,504)
            return x * torch.rsqrt((wide * wide).mean(dim=-1, keepdim=True) + self.eps).to(x.dtype)
        return x * torch.rsqrt(self.mean(x * x))


class HalfPrecision(nn.Module):
    """A network in half precision with float32 images and outputs."""

    def __init__(self, network: nn.Module):
        super().__init__()
        for block in network.modules():
            if isinstance(block, FlatBlock) and block.norm.formulation == "linear":
                _scale_residuals(block)
        self.network = network.half()

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        outputs = self.network(images.half())
        return outputs.float() if isinstance(outputs, Tensor) else tuple(output.float() for output in outputs)


class SigmoidSiLU(nn.Module):
    """SiLU as x * sigmoid(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    return _with_weights(linear, weight.contiguous(), bias)


def _conv(weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    """A 1x1 convolution."""
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=bias is not None, device="meta")
    return _with_weights(conv, weight, bias)


def _with_weights(layer: Layer, weight: Tensor, bias: Tensor | None) -> Layer:
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer.eval()


def _conv_of(module: nn.Module) -> nn.Conv2d:
    conv = module[0] if isinstance(module, nn.Sequential) else module
    assert isinstance(conv, nn.Conv2d), "batch norms must be folded first"
    return conv


def _silu(formulation: Formulation) -> nn.Module:
    return SigmoidSiLU() if formulation.silu == "sigmoid" else nn.SiLU(inplace=True)


def _fold_affine(norm: nn.LayerNorm, next_layer: nn.Linear | nn.Conv2d) -> None:
    """Fold weight and bias of `norm` into the layer that reads its output."""
    assert next_layer.bias is not None
    weight = next_layer.weight.data
    next_layer.bias.data += weight.flatten(1) @ norm.bias.data
    next_layer.weight.data = weight * norm.weight.data.reshape(1, -1, *[1] * (weight.ndim - 2))


def _without_affine(norm: nn.LayerNorm) -> nn.LayerNorm:
    return nn.LayerNorm(norm.normalized_shape[0], eps=norm.eps, elementwise_affine=False).eval()


def _center_outputs(layer: nn.Linear | nn.Conv2d) -> None:
    """Give the outputs of `layer` mean 0 over the channels."""
    layer.weight.data = layer.weight.data - layer.weight.data.mean(dim=0, keepdim=True)
    if layer.bias is not None:
        layer.bias.data = layer.bias.data - layer.bias.data.mean()


def _scale_residuals(block: FlatBlock, factor: float = 1 / 16) -> None:
    """Scale the residual stream of `block`, whose squares overflow half precision; the function stays the same.

    Only norms read the residual stream, and they cancel the factor.
    """
    layers = [cast(FlatLayer, layer) for layer in block.layers]
    for linear in (block.to_tokens, *(x for layer in layers for x in (layer.attention.out, layer.ffn_out))):
        linear.weight.data = linear.weight.data * factor
        if linear.bias is not None:
            linear.bias.data = linear.bias.data * factor
    for norm in (block.norm, *(x for layer in layers for x in (layer.attention_norm, layer.ffn_norm))):
        assert norm.mean.bias is not None
        norm.mean.bias.data = norm.mean.bias.data * factor**2


def _rms_norm(norm: nn.LayerNorm, dtype: torch.dtype) -> nn.LayerNorm:
    assert not norm.elementwise_affine, "layer norm weights must be folded first"
    return cast(nn.LayerNorm, RMSNorm(norm.normalized_shape[0], norm.eps, EAGER, dtype))


def _formulated_norm(norm: nn.Module, formulation: Formulation) -> RMSNorm:
    assert isinstance(norm, RMSNorm), "the residual stream must be centered first"
    return RMSNorm(norm.dim, norm.eps, formulation, norm.dtype)
