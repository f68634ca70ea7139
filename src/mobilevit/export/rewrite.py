"""Exact rewrites: module to module, the same function in eval mode, cheaper to compute.

A rewritten network is for inference: it is trained no further and saved no more. Every function here takes a network
and returns a changed copy; `fast` applies them all and ends in the formulation that a runtime is fastest with.

What may be moved without changing the function:

- a batch norm, into the convolution before it;
- the affine half of a layer norm, into the linear after it;
- the softmax scale, into the query's weights;
- the key's bias: it adds the same number to a query's whole row of scores, which softmax does not see;
- the value's bias: the rows of attention add up to 1, so it passes through into the bias of the projection;
- the subtraction of the mean in a layer norm: only norms read the residual stream, so whatever writes to it can be
  centred over the channels once and for all, in its weights. What is left is a root mean square (RMSNorm).
- 1x1 convolutions across unfold and fold, which move pixels and leave channels alone;
- in the segmentation head, the mean of the map, through the 1x1 convolution behind it before it is spread over the map:
  what it adds to every pixel alike is computed once;
- in the detection heads, the last convolution, in two for classes and for locations: nothing is cut apart later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.onnx.ops import attention

from mobilevit.models.deeplabv3 import DeepLabV3, Pyramid
from mobilevit.models.fuse import Network, fold_batch_norm, frozen_copy
from mobilevit.models.mobilevit import Attention, MobileViTBlock, TransformerLayer, always, resize_map
from mobilevit.models.ssdlite import MapHead, SSDLite


@dataclass(frozen=True)
class Formulation:
    """How a function is spelt; which spelling is fastest depends on the runtime.

    `attention`: torch's fused operator, that of ONNX, which takes the heads apart itself, or matrix products of rank 4
    (batch, heads) or 3.
    `norm`: torch's operator; a layer norm, which subtracts a mean that is 0 but is one operator where the other is six;
    a mean; or the mean as a product with a row of 1/D, for runtimes that are slow at means.
    `joint_qkv`: queries, keys and values by one linear, or by three.
    `silu`: torch's operator, or x * sigmoid(x).
    """

    attention: Literal["fused", "onnx", "rank4", "rank3"] = "fused"
    norm: Literal["fused", "layer", "mean", "linear"] = "fused"
    joint_qkv: bool = False
    silu: Literal["fused", "sigmoid"] = "fused"


EAGER = Formulation(joint_qkv=True)


def fast(model: Network, formulation: Formulation = EAGER) -> Network:
    """A copy of `model` with all rewrites, in the given formulation."""
    model = flatten_tokens(centre(fold_attention(fold_norm_affine(fold_batch_norm(model)))), formulation)
    return split_heads(spread_late(model))


def fold_norm_affine(model: Network) -> Network:
    """A copy of `model` whose layer norms have no weights: they are in the linears behind. Wants folded batch norms."""
    model = frozen_copy(model)
    for module in model.modules():
        if isinstance(module, TransformerLayer):
            _absorb(module.attention_norm, module.attention.qkv)
            _absorb(module.ffn_norm, module.ffn_in)
            module.attention_norm = _bare(module.attention_norm)
            module.ffn_norm = _bare(module.ffn_norm)
        elif isinstance(module, MobileViTBlock):
            # A map resized in between does not mind: the weights of a bilinear mean add up to 1.
            _absorb(module.norm, _conv_of(module.from_tokens))
            module.norm = _bare(module.norm)
    return model


def fold_attention(model: Network) -> Network:
    """A copy of `model` whose attention neither scales its scores nor adds a bias to keys and values."""
    model = frozen_copy(model)
    for module in model.modules():
        if isinstance(module, TransformerLayer):
            module.attention = cast(Attention, BareAttention(module.attention))
    return model


def centre(model: Network) -> Network:
    """A copy of `model` with root mean squares for layer norms. Wants layer norms without weights."""
    model = frozen_copy(model)
    for module in model.modules():
        if isinstance(module, MobileViTBlock):
            _centre(module.to_tokens)
            module.norm = _root_mean_square(module.norm, module.to_tokens.weight.dtype)
        elif isinstance(module, TransformerLayer):
            _centre(module.attention.out)
            _centre(module.ffn_out)
            module.attention_norm = _root_mean_square(module.attention_norm, module.ffn_in.weight.dtype)
            module.ffn_norm = _root_mean_square(module.ffn_norm, module.ffn_in.weight.dtype)
    return model


def flatten_tokens(model: Network, formulation: Formulation = EAGER) -> Network:
    """A copy of `model` whose blocks hold their tokens as one matrix. Wants all the rewrites above."""
    model = frozen_copy(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, MobileViTBlock):
                setattr(parent, name, FlatBlock(child, formulation))
            elif isinstance(child, nn.SiLU) and formulation.silu == "sigmoid":
                setattr(parent, name, SigmoidSiLU())
    return model


def spread_late(model: Network) -> Network:
    """A copy of `model` whose segmentation head, if any, is a `BarePyramid`, and alone. Wants folded batch norms."""
    model = frozen_copy(model)
    for module in list(model.modules()):
        if isinstance(module, DeepLabV3) and isinstance(module.pyramid, Pyramid):  # or it was done before
            module.pyramid = cast(Pyramid, BarePyramid(module.pyramid).eval())
            module.auxiliary = None  # serves training
    return model


def split_heads(model: Network) -> Network:
    """A copy of `model` in which a detector, if any, is a `BareDetector`."""
    model = frozen_copy(model)
    if isinstance(model, SSDLite):
        return cast(Network, BareDetector(model).eval())
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, SSDLite):
                setattr(parent, name, BareDetector(child).eval())
    return model


# ---------------------------------------------------------------------------------------------------------------------
# What takes the place of the network's own modules


class BareAttention(nn.Module):
    """Self-attention that leaves out what was moved into its weights; (B, N, D) -> (B, N, D)."""

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
        """Attend; (B, N, D) -> (B, N, D)."""
        B, N, D = x_BND.shape
        q, k, v = (
            linear(x_BND).reshape(B, N, self.num_heads, D // self.num_heads).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        x = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        return self.out(x.transpose(1, 2).reshape(B, N, D))


class FlatAttention(nn.Module):
    """`BareAttention` over tokens in one matrix, M = groups * N of them; (M, D) -> (M, D)."""

    def __init__(self, attention: BareAttention, formulation: Formulation):
        super().__init__()
        self.num_heads = attention.num_heads
        self.formulation = formulation.attention
        self.out = attention.out
        self.num_linears = 1 if formulation.joint_qkv else 3
        parts = (attention.q, attention.k, attention.v)
        if formulation.joint_qkv:
            assert attention.q.bias is not None
            zero = torch.zeros_like(attention.q.bias)
            bias = torch.cat([attention.q.bias, zero, zero])
            self.qkv = _linear(torch.cat([part.weight for part in parts]), bias)
        else:
            self.q, self.k, self.v = parts

    def forward(self, x: Tensor, num_tokens: int) -> Tensor:
        """Attend among each `num_tokens` rows in a row; (M, D) -> (M, D)."""
        D = x.shape[-1]
        if self.num_linears == 1:
            parts = self.qkv(x).chunk(3, dim=-1)
        else:
            parts = [linear(x) for linear in (self.q, self.k, self.v)]
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
    """A `TransformerLayer` over tokens in one matrix; (M, D) -> (M, D)."""

    def __init__(self, layer: TransformerLayer, formulation: Formulation):
        super().__init__()
        assert isinstance(layer.attention, BareAttention)
        self.attention_norm = _norm(layer.attention_norm, formulation)
        self.attention = FlatAttention(layer.attention, formulation)
        self.ffn_norm = _norm(layer.ffn_norm, formulation)
        self.ffn_in = layer.ffn_in
        self.ffn_out = layer.ffn_out
        self.activation = SigmoidSiLU() if formulation.silu == "sigmoid" else nn.SiLU(inplace=True)

    def forward(self, x: Tensor, num_tokens: int) -> Tensor:
        """Attention among each `num_tokens` rows in a row, then the ffn; (M, D) -> (M, D)."""
        x = x + self.attention(self.attention_norm(x), num_tokens)
        return x + self.ffn_out(self.activation(self.ffn_in(self.ffn_norm(x))))


class FlatBlock(nn.Module):
    """A `MobileViTBlock` that unfolds before it widens and narrows before it folds; (B, C, H, W) -> (B, C, H, W).

    Unfold and fold then move C channels rather than D, and what lies between is one matrix of tokens (P * B * N, D)
    that linears and norms take as it is. No tensor has more than five axes, which is all that some runtimes know.
    """

    def __init__(self, block: MobileViTBlock, formulation: Formulation):
        super().__init__()
        self.patch_px = block.patch_px
        self.local = _with_silu(block.local, formulation)
        to_tokens, from_tokens = block.to_tokens, _conv_of(block.from_tokens)
        self.to_tokens = _linear(to_tokens.weight.flatten(1), to_tokens.bias)
        self.layers = nn.ModuleList(FlatLayer(cast(TransformerLayer, x), formulation) for x in block.layers)
        self.norm = _norm(block.norm, formulation)
        self.from_tokens = _linear(from_tokens.weight.flatten(1), from_tokens.bias)
        self.activation = SigmoidSiLU() if formulation.silu == "sigmoid" else nn.SiLU(inplace=True)
        self.fuse = _with_silu(block.fuse, formulation)

    def forward(self, x: Tensor) -> Tensor:
        """The block; (B, C, H, W) -> (B, C, H, W)."""
        B, C, H, W = x.shape
        p = self.patch_px
        h, w = (H + p - 1) // p, (W + p - 1) // p
        y = resize_map(self.local(x), h * p, w * p).permute(0, 2, 3, 1)
        # Position in the patch, image, patch: (P * B * N, C). To attend, the order of images does not matter.
        if always(y.shape[1] % h == 0) and always(y.shape[2] % w == 0):
            y = y.reshape(B * h, p, w, p, C).permute(1, 3, 0, 2, 4).reshape(-1, C)
        else:  # the same, for sizes that torch.export knows only as symbols and cannot prove to be divisible
            y = torch.stack([y[:, i::p, j::p] for i in range(p) for j in range(p)]).reshape(-1, C)
        y = self.to_tokens(y)
        for layer in self.layers:
            y = layer(y, h * w)
        y = self.from_tokens(self.norm(y))
        y = y.reshape(p, p, B * h, w, C).permute(2, 0, 3, 1, 4).reshape(B, h * p, w * p, C).permute(0, 3, 1, 2)
        y = self.activation(resize_map(y, H, W))
        return self.fuse(torch.cat((x, y), dim=1))


class BarePyramid(nn.Module):
    """A `Pyramid` that adds what the mean of the map has to say, where that gathers it; (B, C, H, W) -> (B, out, H, W).

    Each part is rectified before all are put together, since runtimes do that while they convolve.
    """

    def __init__(self, pyramid: Pyramid):
        super().__init__()
        self.convs = nn.ModuleList(_conv_of(conv) for conv in pyramid.convs)
        self.pooled, project = _conv_of(pyramid.pooled), _conv_of(pyramid.project)
        kept = project.in_channels - self.pooled.out_channels
        self.project = _conv(project.weight[:, :kept], project.bias)
        self.project_pooled = _conv(project.weight[:, kept:], None)

    def forward(self, x: Tensor) -> Tensor:
        """A map of the same size."""
        pooled = self.project_pooled(F.relu(self.pooled(x.mean(dim=(-2, -1), keepdim=True))))
        seen = torch.cat([F.relu(conv(x)) for conv in self.convs], dim=1)
        return F.relu(self.project(seen) + pooled)


class BareHead(nn.Module):
    """A `MapHead` with an end each for classes and locations; (B, C, H, W) -> (B, H * W * anchors, K), (..., 4)."""

    def __init__(self, head: MapHead):
        super().__init__()
        self.project, self.depthwise = head.project, head.depthwise
        rows = torch.arange(head.out.out_channels).unflatten(0, (head.num_anchors, -1))
        assert head.out.bias is not None
        weight, bias = head.out.weight, head.out.bias
        self.classes, self.locations = (
            _conv(weight[chosen.flatten()], bias[chosen.flatten()]) for chosen in (rows[:, 4:], rows[:, :4])
        )
        self.num_anchors = head.num_anchors

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and locations, pixel by pixel in rows and anchor by anchor in a pixel."""
        if self.project is not None:
            x = F.relu(self.project(x))
        if self.depthwise is not None:
            x = self.depthwise(x)
        logits, locations = (
            y.permute(0, 2, 3, 1).reshape(y.shape[0], y.shape[2] * y.shape[3] * self.num_anchors, -1)
            for y in (self.classes(x), self.locations(x))
        )
        return logits, locations


class BareDetector(nn.Module):
    """An `SSDLite` whose classes and locations go separate ways from the last convolutions on."""

    def __init__(self, model: SSDLite):
        super().__init__()
        self.backbone, self.extra_layers, self.pooled = model.backbone, model.extra_layers, model.pooled
        self.heads = nn.ModuleList(BareHead(cast(MapHead, head)) for head in model.heads)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits (B, A, classes + 1) and locations (B, A, 4), as an `SSDLite` gives them."""
        maps = list(self.backbone(images).values())
        for layer in self.extra_layers:
            maps.append(layer(maps[-1]))
        maps.append(F.relu(self.pooled(maps[-1].mean(dim=(-2, -1), keepdim=True))))
        logits, locations = zip(*(head(x) for head, x in zip(self.heads, maps, strict=True)), strict=True)
        return torch.cat(logits, dim=1), torch.cat(locations, dim=1)


class RootMeanSquare(nn.Module):
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
        """Normalise; (..., D) -> (..., D)."""
        if self.formulation == "fused":
            return F.rms_norm(x, (self.dim,), eps=self.eps)
        if self.formulation == "layer":
            return F.layer_norm(x, (self.dim,), eps=self.eps)
        if self.formulation == "mean":
            wide = (
                x.float() if x.dtype == torch.float16 else x
            )  # half precision ends at 65,504, a square soon beyond it
            return x * torch.rsqrt((wide * wide).mean(dim=-1, keepdim=True) + self.eps).to(x.dtype)
        return x * torch.rsqrt(self.mean(x * x))


class Half(nn.Module):
    """A network in half precision between float32 images and float32 outputs."""

    def __init__(self, network: nn.Module):
        super().__init__()
        for block in network.modules():
            if isinstance(block, FlatBlock) and block.norm.formulation == "linear":
                _shrink_residuals(block)
        self.network = network.half()

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """What the network gives."""
        outputs = self.network(images.half())
        return outputs.float() if isinstance(outputs, Tensor) else tuple(output.float() for output in outputs)


class SigmoidSiLU(nn.Module):
    """SiLU as the product that it is."""

    def forward(self, x: Tensor) -> Tensor:
        """Element by element."""
        return x * torch.sigmoid(x)


# ---------------------------------------------------------------------------------------------------------------------
# Moving weights


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone().contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return linear.eval()


def _conv(weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    """A 1x1 convolution."""
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=bias is not None, device="meta")
    conv.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return conv.eval()


def _conv_of(module: nn.Module) -> nn.Conv2d:
    conv = module[0] if isinstance(module, nn.Sequential) else module
    assert isinstance(conv, nn.Conv2d), "batch norms are folded first"
    return conv


def _with_silu(module: nn.Module, formulation: Formulation) -> nn.Module:
    conv = _conv_of(module)
    return nn.Sequential(conv, SigmoidSiLU() if formulation.silu == "sigmoid" else nn.SiLU(inplace=True))


def _absorb(norm: nn.LayerNorm, next_layer: nn.Linear | nn.Conv2d) -> None:
    """Put weight and bias of `norm` into the layer that reads it."""
    assert next_layer.bias is not None
    weight = next_layer.weight.data
    next_layer.bias.data += weight.flatten(1) @ norm.bias.data
    next_layer.weight.data = weight * norm.weight.data.reshape(1, -1, *[1] * (weight.ndim - 2))


def _bare(norm: nn.LayerNorm) -> nn.LayerNorm:
    return nn.LayerNorm(norm.normalized_shape[0], eps=norm.eps, elementwise_affine=False).eval()


def _centre(layer: nn.Linear | nn.Conv2d) -> None:
    """Make the outputs of `layer` have mean 0 over the channels."""
    layer.weight.data = layer.weight.data - layer.weight.data.mean(dim=0, keepdim=True)
    if layer.bias is not None:
        layer.bias.data = layer.bias.data - layer.bias.data.mean()


def _shrink_residuals(block: FlatBlock, factor: float = 1 / 16) -> None:
    """Make the residual stream of `block` smaller, whose squares exceed what half precision holds; exactly.

    Only norms read it, and they take the factor out again.
    """
    layers = [cast(FlatLayer, layer) for layer in block.layers]
    for linear in (block.to_tokens, *(x for layer in layers for x in (layer.attention.out, layer.ffn_out))):
        linear.weight.data = linear.weight.data * factor
        if linear.bias is not None:
            linear.bias.data = linear.bias.data * factor
    for norm in (block.norm, *(x for layer in layers for x in (layer.attention_norm, layer.ffn_norm))):
        assert norm.mean.bias is not None
        norm.mean.bias.data = norm.mean.bias.data * factor**2


def _root_mean_square(norm: nn.LayerNorm, dtype: torch.dtype) -> nn.LayerNorm:
    assert not norm.elementwise_affine, "the weights of the layer norms are moved first"
    return cast(nn.LayerNorm, RootMeanSquare(norm.normalized_shape[0], norm.eps, EAGER, dtype))


def _norm(norm: nn.Module, formulation: Formulation) -> RootMeanSquare:
    assert isinstance(norm, RootMeanSquare), "layer norms are centred first"
    return RootMeanSquare(norm.dim, norm.eps, formulation, norm.dtype)
