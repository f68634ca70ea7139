"""MobileViT (Mehta and Rastegari, ICLR 2022, arXiv 2110.02178): the whole network, top to bottom.

A convolution unfolds its input into windows, multiplies each by one matrix, and folds the results back into a map.
MobileViT replaces the matrix by a transformer: it cuts a map into patches of p by p pixels, lets the pixels at the same
position in their patches attend to each other across all patches, and folds the map together again. A 3x3 convolution
before the unfold covers each pixel's own patch, so the receptive field afterwards is the whole image.

Shapes: B batch, C channels of a map, H W its height and width, p patch side, P = p * p pixel positions in a patch,
N patches in a map, D width of a token. Maps are (B, C, H, W) in channels-last memory format, so that the channels of a
pixel are adjacent: a 1x1 convolution and a linear layer are the same matrix product, LayerNorm needs no transpose, and
unfold and fold move whole rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Transformer:
    """The transformer in a MobileViT block."""

    dim: int
    num_layers: int
    ffn_dim: int
    num_heads: int = 4
    patch_px: int = 2  # of the map, not of the image


@dataclass(frozen=True)
class Stage:
    """Inverted residuals, the first with `stride`, then a MobileViT block if there is a transformer."""

    channels: int
    num_residuals: int
    stride: int
    transformer: Transformer | None = None


@dataclass(frozen=True)
class Architecture:
    """Everything that defines the network except output stride, number of classes and weights."""

    name: str
    stages: tuple[Stage, ...]
    head_channels: int
    expansion: int  # of the inverted residuals
    transformer_dropout: float
    stem_channels: int = 16
    classifier_dropout: float = 0.1


# Sources: table 4 and appendix A of the paper; the released code for `ffn_dim`.
XXS = Architecture(
    name="xxs",
    stages=(
        Stage(16, num_residuals=1, stride=1),
        Stage(24, num_residuals=3, stride=2),
        Stage(48, num_residuals=1, stride=2, transformer=Transformer(dim=64, num_layers=2, ffn_dim=128)),
        Stage(64, num_residuals=1, stride=2, transformer=Transformer(dim=80, num_layers=4, ffn_dim=160)),
        Stage(80, num_residuals=1, stride=2, transformer=Transformer(dim=96, num_layers=3, ffn_dim=192)),
    ),
    head_channels=320,
    expansion=2,
    transformer_dropout=0.05,
)
"""MobileViT-XXS: 1.3 million parameters."""
XS = Architecture(
    name="xs",
    stages=(
        Stage(32, num_residuals=1, stride=1),
        Stage(48, num_residuals=3, stride=2),
        Stage(64, num_residuals=1, stride=2, transformer=Transformer(dim=96, num_layers=2, ffn_dim=192)),
        Stage(80, num_residuals=1, stride=2, transformer=Transformer(dim=120, num_layers=4, ffn_dim=240)),
        Stage(96, num_residuals=1, stride=2, transformer=Transformer(dim=144, num_layers=3, ffn_dim=288)),
    ),
    head_channels=384,
    expansion=4,
    transformer_dropout=0.1,
)
"""MobileViT-XS: 2.3 million parameters."""
S = Architecture(
    name="s",
    stages=(
        Stage(32, num_residuals=1, stride=1),
        Stage(64, num_residuals=3, stride=2),
        Stage(96, num_residuals=1, stride=2, transformer=Transformer(dim=144, num_layers=2, ffn_dim=288)),
        Stage(128, num_residuals=1, stride=2, transformer=Transformer(dim=192, num_layers=4, ffn_dim=384)),
        Stage(160, num_residuals=1, stride=2, transformer=Transformer(dim=240, num_layers=3, ffn_dim=480)),
    ),
    head_channels=640,
    expansion=4,
    transformer_dropout=0.1,
)
"""MobileViT-S: 5.6 million parameters."""
ARCHITECTURES = {architecture.name: architecture for architecture in (XXS, XS, S)}
"""The published architectures by name: "xxs", "xs", "s"."""


# ---------------------------------------------------------------------------------------------------------------------
# Unfold, attend, fold


def unfold(x_BCHW: Tensor, patch_px: int) -> Tensor:
    """Cut a map into patches and group pixels by their position in the patch: (B, C, H, W) -> (B * P, N, C).

    H and W must be multiples of `patch_px`. Positions and patches are in row-major order.
    """
    B, C, H, W = x_BCHW.shape
    p = patch_px
    x_BHWC = x_BCHW.permute(0, 2, 3, 1)
    if always(H % (H // p) == 0) and always(W % (W // p) == 0):
        x = x_BHWC.reshape(B, H // p, p, W // p, p, C).permute(0, 2, 4, 1, 3, 5)
    else:  # the same for symbolic sizes, which torch.export cannot prove to be divisible
        x = torch.stack([x_BHWC[:, i::p, j::p] for i in range(p) for j in range(p)], dim=1)
    return x.reshape(B * p * p, (H // p) * (W // p), C)


def fold(x_BPNC: Tensor, patch_px: int, height: int, width: int) -> Tensor:
    """The inverse of `unfold`: (B * P, N, C) -> (B, C, height, width)."""
    p = patch_px
    C = x_BPNC.shape[-1]
    x = x_BPNC.reshape(-1, p, p, height // p, width // p, C).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(-1, height, width, C).permute(0, 3, 1, 2)


def resize_map(x_BCHW: Tensor, height: int, width: int) -> Tensor:
    """Resize a map bilinearly, unless it has this size.

    Under `torch.export` with symbolic sizes, the resize stays in the graph, so that one program is correct for every
    size. A resize to the same size is the identity.
    """
    H, W = x_BCHW.shape[-2:]
    if always(height == H) and always(width == W):
        return x_BCHW
    return F.interpolate(x_BCHW, size=(height, width), mode="bilinear", align_corners=False)


def always(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes is true; for symbolic sizes, whether it is known to be true for all of them."""
    if torch.compiler.is_compiling() or isinstance(condition, torch.SymBool):
        # Imported on use: it takes a fifth of the import time of torch, and only compilers have symbolic sizes.
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(condition)
    return bool(condition)


def silu(x: Tensor) -> Tensor:
    """SiLU of a tensor that nothing else uses: in place, unless autograd needs `x` for the gradient.

    Not in place while tracing: torch.jit checks a trace against one without autograd, with the same operators.
    """
    is_tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    return F.silu(x, inplace=not x.requires_grad and not is_tracing)


class Attention(nn.Module):
    """Multi-head self-attention over N tokens, (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x_BND: Tensor) -> Tensor:
        B, N, D = x_BND.shape
        qkv = self.qkv(x_BND).reshape(B, N, 3, self.num_heads, D // self.num_heads)
        # Transposed after the split, so that autograd concatenates the three gradients with one copy, not two.
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))  # (B, heads, N, D / heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.out(x.transpose(1, 2).reshape(B, N, D))


class TransformerLayer(nn.Module):
    """Pre-norm attention, then a pre-norm two-layer network with SiLU; (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = Attention(dim, num_heads)
        self.ffn_norm = nn.LayerNorm(dim)
        self.ffn_in = nn.Linear(dim, ffn_dim)
        self.ffn_out = nn.Linear(ffn_dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BND = x_BND + self.dropout(self.attention(self.attention_norm(x_BND)))
        y = silu(self.ffn_in(self.ffn_norm(x_BND)))
        return x_BND + self.dropout(self.ffn_out(y))


# ---------------------------------------------------------------------------------------------------------------------
# The blocks


class ConvNorm(nn.Module):
    """Convolution, batch norm and optionally SiLU; (B, C, H, W) -> (B, out, H / stride, W / stride)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_px: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        activation: bool = True,
    ):
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_px,
            stride=stride,
            padding=dilation * (kernel_px // 2),
            dilation=dilation,
            groups=groups,
            bias=False,
        )
        self.norm = nn.BatchNorm2d(out_channels)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return silu(x) if self.activation else x


class InvertedResidual(nn.Module):
    """MobileNetv2's block: 1x1 expansion, 3x3 depthwise convolution, linear 1x1 projection."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, dilation: int, expansion: int):
        super().__init__()
        hidden = round_to_8(in_channels * expansion)
        self.residual = stride == 1 and in_channels == out_channels
        self.expand = ConvNorm(in_channels, hidden, 1)
        self.depthwise = ConvNorm(hidden, hidden, 3, stride=stride, dilation=dilation, groups=hidden)
        self.reduce = ConvNorm(hidden, out_channels, 1, activation=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.reduce(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class MobileViTBlock(nn.Module):
    """Local features by convolution, then global ones by attention; (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, transformer: Transformer, dropout: float):
        super().__init__()
        t = transformer
        self.patch_px = t.patch_px
        self.local = ConvNorm(channels, channels, 3)
        self.to_tokens = nn.Conv2d(channels, t.dim, 1, bias=False)
        self.layers = nn.ModuleList(
            TransformerLayer(t.dim, t.ffn_dim, t.num_heads, dropout) for _ in range(t.num_layers)
        )
        self.norm = nn.LayerNorm(t.dim)
        self.from_tokens = ConvNorm(t.dim, channels, 1)
        self.fuse = ConvNorm(2 * channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[-2:]
        p = self.patch_px
        patched_H, patched_W = (H + p - 1) // p * p, (W + p - 1) // p * p
        y = resize_map(self.to_tokens(self.local(x)), patched_H, patched_W)
        y_BND = unfold(y, p)
        for layer in self.layers:
            y_BND = layer(y_BND)
        y = fold(self.norm(y_BND), p, patched_H, patched_W)
        y = self.from_tokens(resize_map(y, H, W))
        return self.fuse(torch.cat((x, y), dim=1))


def round_to_8(channels: float) -> int:
    """The nearest multiple of 8, at least 8 and not more than 10 % below `channels` (MobileNet's rule)."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


# ---------------------------------------------------------------------------------------------------------------------
# The network


class Backbone(nn.Module):
    """Stem and stages: images in, named feature maps out.

    Args:
        architecture: "xxs", "xs", "s" or an `Architecture`.
        out_stages: names of the maps to return, from "stem" and "stage1" to "stage5". Stages after the last of them are
            not built, so that there are no unused parameters.
        output_stride: of stage 5. At 16, stage 5 does not downsample; at 8, stage 4 does not either, and the depthwise
            convolution of stage 5 has dilation 2 (the rule of the released code).

    Attributes:
        channels: number of channels of each returned map, by name.
        strides: pixels of the image per pixel of each returned map, by name.

    Raises:
        ValueError: an unknown architecture, stage or output stride.
    """

    def __init__(
        self,
        architecture: Architecture | str = S,
        *,
        out_stages: Iterable[str] | str = ("stage1", "stage2", "stage3", "stage4", "stage5"),
        output_stride: int = 32,
    ):
        super().__init__()
        self.architecture = a = find_architecture(architecture)
        self.output_stride = output_stride
        names = ["stem", *(f"stage{i}" for i in range(1, len(a.stages) + 1))]
        self.out_stages = (out_stages,) if isinstance(out_stages, str) else tuple(out_stages)
        if not self.out_stages or set(self.out_stages) - set(names):
            raise ValueError(f"out_stages is {self.out_stages}; name at least one, and only of {', '.join(names)}")
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride is {output_stride}; it can be 8, 16 or 32")

        self.stem = ConvNorm(3, a.stem_channels, 3, stride=2)
        channels = {"stem": a.stem_channels}
        strides = {"stem": 2}
        in_channels, stride, dilation = a.stem_channels, 2, 1
        last = max(names.index(name) for name in self.out_stages)
        for name, stage in zip(names[1 : last + 1], a.stages, strict=False):
            # A stage that would exceed the output stride does not downsample. Its convolutions have the dilation of the
            # stages before it: only the stages after it have to compensate for the missing stride.
            downsamples = stage.stride > 1 and stride * stage.stride <= output_stride
            blocks: list[nn.Module] = []
            for i in range(stage.num_residuals):
                blocks.append(
                    InvertedResidual(
                        in_channels,
                        stage.channels,
                        stride=stage.stride if downsamples and i == 0 else 1,
                        dilation=dilation,
                        expansion=a.expansion,
                    )
                )
                in_channels = stage.channels
            if stage.transformer is not None:
                blocks.append(MobileViTBlock(stage.channels, stage.transformer, a.transformer_dropout))
            if downsamples:
                stride *= stage.stride
            else:
                dilation *= stage.stride
            self.add_module(name, nn.Sequential(*blocks))
            channels[name] = stage.channels
            strides[name] = stride
        self.channels = {name: channels[name] for name in self.out_stages}
        self.strides = {name: strides[name] for name in self.out_stages}
        self.apply(initialize)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Maps by name, in the order of `out_stages`, of RGB `images` (B, 3, H, W) in [0, 1], H and W at least 32."""
        check_input(images)
        maps = dict.fromkeys(self.out_stages, images)  # placeholders, for the order
        x = images  # in any memory format: convolutions use that of their weights
        for name, stage in self.named_children():
            x = stage(x)
            if name in maps:
                maps[name] = x
        return maps


class MobileViT(nn.Module):
    """The classifier: backbone, 1x1 convolution, global average, linear; images (B, 3, H, W) -> logits (B, classes).

    Args:
        architecture: "xxs", "xs", "s" or an `Architecture`.
        num_classes: 0 for no classifier: the output is then the pooled features (B, head_channels).
        output_stride: see `Backbone`.

    Raises:
        ValueError: an unknown architecture or output stride, a negative number of classes.
    """

    def __init__(self, architecture: Architecture | str = S, *, num_classes: int = 1000, output_stride: int = 32):
        super().__init__()
        last = f"stage{len(find_architecture(architecture).stages)}"
        self.backbone = Backbone(architecture, out_stages=(last,), output_stride=output_stride)
        self.architecture = a = self.backbone.architecture
        self.head = ConvNorm(self.backbone.channels[last], a.head_channels, 1)
        self.dropout = nn.Dropout(a.classifier_dropout)
        self.head.apply(initialize).to(memory_format=torch.channels_last)
        self.reset_classifier(num_classes)

    @property
    def num_classes(self) -> int:
        """0 without a classifier."""
        return self.classifier.out_features if isinstance(self.classifier, nn.Linear) else 0

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a newly initialized one; 0 removes it."""
        if num_classes < 0:
            raise ValueError(f"num_classes is {num_classes}; it must be 0 (no classifier) or more")
        self.classifier = nn.Linear(self.architecture.head_channels, num_classes) if num_classes else nn.Identity()
        self.classifier.apply(initialize).to(self.head.norm.weight)  # its device and dtype

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of RGB `images` (B, 3, H, W) in [0, 1], H and W at least 32."""
        return self.classify(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """Pooled features (B, head_channels), the input of the classifier."""
        (x,) = self.backbone(images).values()
        return self.head(x).mean(dim=(-2, -1), keepdim=True).flatten(1)  # keepdim: runtimes recognize a pooling layer

    def classify(self, features: Tensor) -> Tensor:
        """Logits (B, num_classes) of pooled features."""
        return self.classifier(self.dropout(features))


def check_input(images: Tensor) -> None:
    """Check that `images` is a float tensor of shape (B, 3, H, W).

    Raises:
        TypeError: not a tensor, or not floating point.
        ValueError: another shape.
    """
    expected = "expected a float tensor of shape (B, 3, H, W)"
    if not isinstance(images, Tensor):
        raise TypeError(f"{expected}, found {type(images).__name__}; use model.preprocess(...) or torch.from_numpy(x)")
    if not images.is_floating_point():
        raise TypeError(f"{expected}, found {images.dtype}; use model.preprocess(...) or x.float() / 255")
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"{expected}, found shape {tuple(images.shape)}; use model.preprocess(...), x[None] for one image, or "
            "x.permute(0, 3, 1, 2) for channels last"
        )


def find_architecture(architecture: Architecture | str) -> Architecture:
    """The architecture itself, or the published one of that name."""
    if isinstance(architecture, Architecture):
        return architecture
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture is {architecture!r}; the published ones are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[architecture]


def initialize(module: nn.Module) -> None:
    """As published: convolutions Kaiming normal (fan-out), linear layers truncated normal (std 0.02, at 2 std)."""
    if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        return  # no values to initialize, and PyTorch would import its compiler
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
        nn.init.zeros_(module.bias)
