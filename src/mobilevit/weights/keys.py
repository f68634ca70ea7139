"""Tensor names of the four formats: a table, detection of a format from its names, and conversion.

`to_standard` checks every key, shape and dtype, and renames to the standard names, which are those of this package.
`from_standard` renames back. No other module depends on the names of other libraries.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mobilevit.models.deeplabv3 import LATER_HEAD, PAPER_HEAD, DeepLabHead
from mobilevit.models.mobilevit import ARCHITECTURES, Architecture
from mobilevit.models.ssdlite import EXTRA_CHANNELS, HEAD_CHANNELS, NUM_ANCHORS
from mobilevit.weights.record import (
    CLASSIFIERS,
    FORMATS,
    NETWORKS,
    TASK_FORMATS,
    Format,
    TaskName,
    WeightsError,
)

STEM = "backbone.stem.conv.weight"
FORMAT_NAMES: dict[Format, str] = {
    "mobilevit": "mobilevit's",
    "apple": "Apple's",
    "timm": "timm's",
    "transformers": "transformers'",
}
_CONV_NORM = {
    # names of the two parts in mobilevit, Apple, timm and transformers
    "conv": ("conv", "conv", "conv", "convolution"),
    "norm": ("norm", "norm", "bn", "normalization"),
}
_BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
Row = tuple[str, str, str, str, str]


@dataclass(frozen=True)
class Layout:
    """Determines the keys of a file and, with the number of classes, their shapes."""

    format: Format
    architecture: Architecture
    task: TaskName = "classify"
    head: DeepLabHead | None = None

    def __str__(self) -> str:
        head = {"classify": "", "detect": " with SSDLite", "segment": " with DeepLabv3"}[self.task]
        return f"MobileViT-{self.architecture.name.upper()}{head} in {FORMAT_NAMES[self.format]} format"


# ---------------------------------------------------------------------------------------------------------------------
# The table


def _modules(a: Architecture, task: TaskName, head: DeepLabHead | None) -> Iterator[Row]:
    """Every module with parameters: (kind, mobilevit's prefix, Apple's, timm's, transformers').

    A prefix is "" if the format has no network for the task.
    """
    encoder = "" if task == "classify" else "encoder."
    yield "conv_norm", "backbone.stem", f"{encoder}conv_1.block", "stem", "mobilevit.conv_stem"
    for i, stage in enumerate(a.stages, start=1):
        m, p, t = f"backbone.stage{i}", f"{encoder}layer_{i}", f"stages.{i - 1}"
        h = f"mobilevit.encoder.layer.{i - 1}"
        for j in range(stage.num_residuals):
            block = f"{h}.downsampling_layer" if stage.transformer else f"{h}.layer.{j}"
            for mj, pj, tj, hj in (
                ("expand", "exp_1x1", "conv1_1x1", "expand_1x1"),
                ("depthwise", "conv_3x3", "conv2_kxk", "conv_3x3"),
                ("reduce", "red_1x1", "conv3_1x1", "reduce_1x1"),
            ):
                yield "conv_norm", f"{m}.{j}.{mj}", f"{p}.{j}.block.{pj}.block", f"{t}.{j}.{tj}", f"{block}.{hj}"
        if stage.transformer is not None:
            m, p, t = (f"{prefix}.{stage.num_residuals}" for prefix in (m, p, t))
            yield from _modules_of_block(stage.transformer.num_layers, m, p, t, h)
    if task == "detect":
        yield from _modules_of_ssdlite(a)
    elif head is not None:
        yield from _modules_of_deeplabv3(head)
    else:
        yield "conv_norm", "head", "conv_1x1_exp.block", "final_conv", "mobilevit.conv_1x1_exp"
        yield "affine", "classifier", "classifier.fc", "head.fc", "classifier"


def _modules_of_block(num_layers: int, m: str, p: str, t: str, h: str) -> Iterator[Row]:
    """A MobileViT block: prefixes of mobilevit (m), Apple (p), timm (t) and transformers (h)."""
    yield "conv_norm", f"{m}.local", f"{p}.local_rep.conv_3x3.block", f"{t}.conv_kxk", f"{h}.conv_kxk"
    yield "weight", f"{m}.to_tokens", f"{p}.local_rep.conv_1x1.block.conv", f"{t}.conv_1x1", f"{h}.conv_1x1.convolution"
    for k in range(num_layers):
        mk, tk, hk = f"{m}.layers.{k}", f"{t}.transformer.{k}", f"{h}.transformer.layer.{k}"
        mha, ffn = f"{p}.global_rep.{k}.pre_norm_mha", f"{p}.global_rep.{k}.pre_norm_ffn"
        yield "affine", f"{mk}.attention_norm", f"{mha}.0", f"{tk}.norm1", f"{hk}.layernorm_before"
        yield "qkv", f"{mk}.attention.qkv", f"{mha}.1.qkv_proj", f"{tk}.attn.qkv", f"{hk}.attention.attention"
        yield "affine", f"{mk}.attention.out", f"{mha}.1.out_proj", f"{tk}.attn.proj", f"{hk}.attention.output.dense"
        yield "affine", f"{mk}.ffn_norm", f"{ffn}.0", f"{tk}.norm2", f"{hk}.layernorm_after"
        yield "affine", f"{mk}.ffn_in", f"{ffn}.1", f"{tk}.mlp.fc1", f"{hk}.intermediate.dense"
        yield "affine", f"{mk}.ffn_out", f"{ffn}.4", f"{tk}.mlp.fc2", f"{hk}.output.dense"
    yield "affine", f"{m}.norm", f"{p}.global_rep.{num_layers}", f"{t}.norm", f"{h}.layernorm"
    yield "conv_norm", f"{m}.from_tokens", f"{p}.conv_proj.block", f"{t}.conv_proj", f"{h}.conv_projection"
    yield "conv_norm", f"{m}.fuse", f"{p}.fusion.block", f"{t}.conv_fusion", f"{h}.fusion"


def _modules_of_ssdlite(a: Architecture) -> Iterator[Row]:
    for i in range(len(EXTRA_CHANNELS)):
        m, p = f"extra_layers.{i}", f"extra_layers.os_{64 << i}"
        yield "conv_norm", f"{m}.depthwise", f"{p}.dw_conv.block", "", ""
        yield "conv_norm", f"{m}.pointwise", f"{p}.pw_conv.block", "", ""
    yield "weight", "pooled", "extra_layers.os_-1.1.block.conv", "", ""
    in_channels = (a.stages[3].channels, a.stages[4].channels, *EXTRA_CHANNELS)
    for i, (width, channels) in enumerate(zip(in_channels, HEAD_CHANNELS, strict=True)):
        m, p = f"heads.{i}", f"ssd_heads.{i}"
        if width != channels:
            yield "conv_norm", f"{m}.project", f"{p}.proj_layer.block", "", ""
        yield "conv_norm", f"{m}.depthwise", f"{p}.loc_cls_layer.dw_conv.block", "", ""
        yield "affine", f"{m}.out", f"{p}.loc_cls_layer.pw_conv.block.conv", "", ""
    last = len(HEAD_CHANNELS)
    yield "affine", f"heads.{last}.out", f"ssd_heads.{last}.loc_cls_layer.block.conv", "", ""


def _modules_of_deeplabv3(head: DeepLabHead) -> Iterator[Row]:
    p, h = "seg_head.aspp.aspp_layer", "segmentation_head.aspp"
    pooled = 1 + len(head.rates)
    for i in range(pooled):
        yield "conv_norm", f"pyramid.convs.{i}", f"{p}.convs.{i}.block", "", f"{h}.convs.{i}"
    yield (
        "conv_norm",
        "pyramid.pooled",
        f"{p}.convs.{pooled}.aspp_pool.conv_1x1.block",
        "",
        f"{h}.convs.{pooled}.conv_1x1",
    )
    yield "conv_norm", "pyramid.project", f"{p}.project.block", "", f"{h}.project"
    # The name of the classifier tells Apple's two releases apart.
    classifier = "classifier.block.conv" if _is_later(head) else "classifier.classifier.block.conv"
    yield "affine", "classifier", f"seg_head.{classifier}", "", "segmentation_head.classifier.convolution"
    if head.auxiliary_channels:
        yield "conv_norm", "auxiliary.project", "seg_head.aux_head.0.block", "", ""
        yield "affine", "auxiliary.classifier", "seg_head.aux_head.2.block.conv", "", ""


def _is_later(head: DeepLabHead | None) -> bool:
    return head is not None and replace(head, dropout=LATER_HEAD.dropout) == LATER_HEAD


def is_bgr(format: Format, head: DeepLabHead | None) -> bool:
    """Whether published weights of this format expect BGR input. Apple changed to RGB after the paper's release."""
    return format == "transformers" or (format == "apple" and not _is_later(head))


def key_names(layout: Layout) -> dict[str, tuple[str, ...]]:
    """Standard key -> the key in the layout's format; three keys if the format separates query, key and value."""
    column = FORMATS.index(layout.format)
    names: dict[str, tuple[str, ...]] = {}
    for kind, *prefixes in _modules(layout.architecture, layout.task, layout.head):
        standard, theirs = prefixes[0], prefixes[column]
        if kind == "conv_norm":
            for part, leaves in (("conv", ("weight",)), ("norm", _BATCH_NORM)):
                for leaf in leaves:
                    names[f"{standard}.{part}.{leaf}"] = (f"{theirs}.{_CONV_NORM[part][column]}.{leaf}",)
        else:
            is_split = kind == "qkv" and layout.format == "transformers"
            parts = [f"{theirs}.{part}" for part in ("query", "key", "value")] if is_split else [theirs]
            for leaf in ("weight",) if kind == "weight" else ("weight", "bias"):
                names[f"{standard}.{leaf}"] = tuple(f"{part}.{leaf}" for part in parts)
    return names


# ---------------------------------------------------------------------------------------------------------------------
# Detect


def detect_format(path: Path, stored: Mapping[str, Tensor]) -> tuple[Format, TaskName]:
    """The format and the task, from the keys of a file.

    Raises:
        WeightsError: not MobileViT, or only a part of it.
    """
    task: TaskName = "classify"
    if any(key.startswith(("heads.", "ssd_heads.")) for key in stored):
        task = "detect"
    elif any(key.startswith(("pyramid.", "seg_head.", "segmentation_head.")) for key in stored):
        task = "segment"
    for format in TASK_FORMATS[task]:
        names = key_names(Layout(format, ARCHITECTURES["s"], task, PAPER_HEAD if task == "segment" else None))
        # The second key excludes networks whose first key is the same (MobileViTv2, other networks with a "stem").
        (attention, *_) = names["backbone.stage3.1.layers.0.attention.qkv.weight"]
        if names[STEM][0] in stored and (attention in stored or format == "mobilevit"):
            return format, task
    if "encoder.conv_1.block.conv.weight" in stored:
        reason = "Apple's detection or segmentation network without its head; get the whole file"
    elif any(key.startswith(("encoder.conv_1.", "mobilevit.")) for key in stored):
        reason = "not a whole MobileViT; get the whole file"
    else:
        reason = (
            f"not MobileViT in any of the four formats ({len(stored)} keys, first {next(iter(stored), 'none')}); "
            "give weights of MobileViT-XXS, XS or S from Apple, timm, transformers or this package"
        )
    raise WeightsError(f"{path}: {reason}")


def closest_layout(format: Format, task: TaskName, head: DeepLabHead | None, stored: Mapping[str, Tensor]) -> Layout:
    """The published size with the most matching shapes, for a file without a description."""

    def num_matching(layout: Layout) -> int:
        shapes = _stored_shapes(layout, num_classes=1)
        return sum(key in stored and stored[key].shape == shape for key, shape in shapes.items())

    return max((Layout(format, a, task, head) for a in ARCHITECTURES.values()), key=num_matching)


@functools.cache  # building a network for its shapes takes longer than reading a file
def _standard_shapes(
    architecture: Architecture, task: TaskName, head: DeepLabHead | None, num_classes: int
) -> dict[str, torch.Size]:
    options = {} if head is None else {"head": head}
    with torch.device("meta"):
        model = NETWORKS[task](architecture, num_classes=num_classes, **options)
    return {key: tensor.shape for key, tensor in model.state_dict().items()}


def _stored_shapes(layout: Layout, num_classes: int) -> dict[str, torch.Size]:
    names = key_names(layout)
    shapes = {}
    for standard, shape in _standard_shapes(layout.architecture, layout.task, layout.head, num_classes).items():
        for theirs in names[standard]:
            shapes[theirs] = torch.Size((shape[0] // len(names[standard]), *shape[1:])) if shape else shape
    return shapes


# ---------------------------------------------------------------------------------------------------------------------
# Convert


def to_standard(path: Path, layout: Layout, stored: Mapping[str, Tensor], *, bgr: bool) -> dict[str, Tensor]:
    """Check every key, shape and dtype; rename, concatenate query, key and value, and reorder the stem to RGB.

    Raises:
        WeightsError: a missing, surplus or mis-shaped tensor, one that is not floating point or not finite.
    """
    names = key_names(layout)
    classifier = CLASSIFIERS[layout.task]
    weight, bias = names[classifier][0], names[classifier.replace("weight", "bias")][0]
    expected = _stored_shapes(layout, _count_classes(path, layout.task, weight, bias, stored))
    names = {standard: theirs for standard, theirs in names.items() if theirs[0] in expected}  # no classifier: no key
    # Some tools drop these counters; inference does not use them.
    counters = {key: torch.tensor(0) for key in expected if key.endswith("num_batches_tracked") and key not in stored}
    stored = {**stored, **counters}

    fix = "get the whole file, or state which network it is from"
    if missing := [key for key in expected if key not in stored]:
        raise WeightsError(f"{path}: key {missing[0]} is missing{_and_more(missing)}, expected in {layout}; {fix}")
    if surplus := [key for key in stored if key not in expected]:
        raise WeightsError(f"{path}: surplus key {surplus[0]}{_and_more(surplus)}, not expected in {layout}; {fix}")
    if wrong := [key for key, shape in expected.items() if stored[key].shape != shape]:
        key = wrong[0]
        raise WeightsError(
            f"{path}: key {key} has shape {tuple(stored[key].shape)}{_and_more(wrong)}, expected "
            f"{tuple(expected[key])} in {layout}; other structures than the three published ones need mobilevit's or "
            "transformers' format, which describe the structure"
        )
    for key, tensor in stored.items():
        is_float = tensor.is_floating_point() and tensor.itemsize > 1  # 8-bit floats are quantized weights
        if not is_float and not key.endswith("num_batches_tracked"):
            raise WeightsError(
                f"{path}: key {key} is {tensor.dtype}, expected floating point; quantized files cannot be read"
            )
        if not torch.isfinite(tensor).all():
            raise WeightsError(f"{path}: key {key} contains NaN or infinity; use a checkpoint from before divergence")

    tensors = {}
    for standard, theirs in names.items():
        parts = [stored[key] for key in theirs]
        tensors[standard] = torch.cat(parts) if len(parts) > 1 else parts[0]
    if bgr:
        tensors[STEM] = tensors[STEM].flip(1)
    return tensors


def _count_classes(path: Path, task: TaskName, weight: str, bias: str, stored: Mapping[str, Tensor]) -> int:
    """The number of classes from the rows of the classifier; 0 for a network without one, which only `classify` has."""
    rows = next((stored[key].shape[0] for key in (weight, bias) if key in stored and stored[key].ndim), 0)
    if task == "classify":
        return rows
    if task == "segment":
        return max(rows, 1)  # without a classifier, the check of the keys reports what is missing
    num_outputs, remainder = divmod(rows, NUM_ANCHORS[-1])
    if rows and (remainder or num_outputs < 6):
        raise WeightsError(
            f"{path}: key {weight} has {rows} rows, expected {NUM_ANCHORS[-1]} anchors times 4 for the box, 1 for the "
            "background and 1 per class; get the whole file"
        )
    return max(num_outputs - 5, 1)


def _and_more(keys: list[str]) -> str:
    return f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""


def from_standard(layout: Layout, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename to the layout's format: the inverse of `to_standard`."""
    names = key_names(layout)
    bgr = is_bgr(layout.format, layout.head)
    stored = {}
    for standard, tensor in tensors.items():
        if bgr and standard == STEM:
            tensor = tensor.flip(1)
        parts = names[standard]
        for name, part in zip(parts, tensor.chunk(len(parts)) if len(parts) > 1 else (tensor,), strict=True):
            stored[name] = part.detach().cpu().contiguous()
    return stored
