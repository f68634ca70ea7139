"""Rewrites preserve the function: in float64 to 1e-9, each alone and all together, at two sizes of which one is odd."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from mobilevit.export.rewrite import (
    FlatBlock,
    Formulation,
    HalfPrecision,
    RMSNorm,
    _scale_residuals,
    center_residuals,
    flatten_tokens,
    fold_attention,
    fold_norm_affine,
    fold_pooled_branch,
    optimize_for_inference,
    split_heads,
)
from mobilevit.models.deeplabv3 import LATER_HEAD, DeepLabV3, Pyramid
from mobilevit.models.fuse import fold_batch_norm
from mobilevit.models.mobilevit import MobileViT, MobileViTBlock, TransformerLayer
from mobilevit.models.ssdlite import SSDLite
from small_networks import randomize

SIZES = [(64, 96), (75, 130)]


@pytest.fixture(scope="module")
def model() -> MobileViT:
    return randomize(MobileViT("xxs", num_classes=10)).double()


def difference(model: nn.Module, other: nn.Module, size: tuple[int, int]) -> float:
    """The largest difference of an output value, in standard deviations of the output."""
    x = torch.rand(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, actual = model(x), other(x)
    pairs = [(actual, expected)] if isinstance(actual, Tensor) else list(zip(actual, expected, strict=True))
    assert all(x.shape == y.shape for x, y in pairs)
    return max(float((x - y).abs().max() / y.std()) for x, y in pairs)


def of_type(model: nn.Module, *types: type[nn.Module]) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, types)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["xxs", "s"])
def test_fold_batch_norm(name: str, size: tuple[int, int]) -> None:
    model = randomize(MobileViT(name, num_classes=10)).double()
    folded = fold_batch_norm(model)
    assert difference(model, folded, size) < 1e-9
    assert not of_type(folded, nn.BatchNorm2d)


@pytest.mark.parametrize("size", SIZES)
def test_fold_norm_affine(model: MobileViT, size: tuple[int, int]) -> None:
    folded = fold_norm_affine(fold_batch_norm(model))
    assert difference(model, folded, size) < 1e-9
    norms = of_type(folded, nn.LayerNorm)
    assert len(norms) == 2 * 9 + 3
    assert not any(list(norm.parameters()) for norm in norms)


@pytest.mark.parametrize("size", SIZES)
def test_fold_attention_alone(model: MobileViT, size: tuple[int, int]) -> None:
    folded = fold_attention(model)
    assert difference(model, folded, size) < 1e-9
    for layer in of_type(folded, TransformerLayer):
        assert isinstance(layer, TransformerLayer)
        assert layer.attention.k.bias is None  # pyright: ignore[reportAttributeAccessIssue]
        assert layer.attention.v.bias is None  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("size", SIZES)
def test_center_residuals(model: MobileViT, size: tuple[int, int]) -> None:
    centered = center_residuals(fold_norm_affine(fold_batch_norm(model)))
    assert difference(model, centered, size) < 1e-9
    assert not of_type(centered, nn.LayerNorm)
    assert len(of_type(centered, RMSNorm)) == 2 * 9 + 3


FORMULATIONS = [
    Formulation(attention, norm, joint_qkv, silu)
    for attention, norm, joint_qkv, silu in product(
        ("fused", "onnx", "rank4", "rank3"), ("fused", "layer", "mean", "linear"), (False, True), ("fused",)
    )
] + [Formulation(silu="sigmoid")]


@pytest.mark.parametrize("formulation", FORMULATIONS, ids=str)
def test_every_formulation(model: MobileViT, formulation: Formulation) -> None:
    for size in SIZES:
        assert difference(model, optimize_for_inference(model, formulation), size) < 1e-9


@pytest.mark.parametrize("output_stride", [8, 16])
def test_other_architectures_and_strides(output_stride: int) -> None:
    model = randomize(MobileViT("xs", num_classes=3, output_stride=output_stride)).double()
    rewritten = optimize_for_inference(model)
    assert difference(model, rewritten, (96, 70)) < 1e-9
    assert not of_type(rewritten, nn.BatchNorm2d, nn.LayerNorm, MobileViTBlock, TransformerLayer)


DENSE = {
    "detect": lambda: SSDLite("xxs", 5),
    "segment": lambda: DeepLabV3("xxs", 5),
    "segment at stride 8": lambda: DeepLabV3("xxs", 5, 8, LATER_HEAD),
}


@pytest.mark.parametrize("name", DENSE)
def test_dense_networks(name: str) -> None:
    model = randomize(DENSE[name]()).double()
    chosen = FORMULATIONS[::3]  # blocks are tested above
    for formulation, size in zip(chosen, SIZES * len(chosen), strict=False):
        assert difference(model, optimize_for_inference(model, formulation), size) < 1e-9, f"{formulation}"
    for size in SIZES:
        for step in (fold_pooled_branch, split_heads):
            assert difference(model, step(fold_batch_norm(model)), size) < 1e-9
        # Inside another module, as in an `ExportModel`
        assert difference(model, optimize_for_inference(nn.Sequential(model).eval()), size) < 1e-9
    rewritten = optimize_for_inference(model)
    assert not rewritten.training
    assert difference(model, optimize_for_inference(rewritten), SIZES[1]) < 1e-9  # applying it twice
    assert not of_type(rewritten, nn.BatchNorm2d, nn.LayerNorm, MobileViTBlock, SSDLite, Pyramid)
    assert not any("auxiliary" in key for key in rewritten.state_dict())


def test_half_precision_with_a_large_residual_stream() -> None:
    model = randomize(MobileViT("xxs", num_classes=7))
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        # Squares overflow float16 (65,504)
        model.backbone.stage5[1].to_tokens.weight *= 300  # pyright: ignore
        expected = model(x)
        actual = HalfPrecision(optimize_for_inference(model, Formulation(norm="linear")))(x)
    assert isinstance(actual, Tensor)
    assert float((actual - expected).abs().max() / expected.std()) < 0.05


def test_scaled_residual_stream_is_the_same_function(model: MobileViT) -> None:
    rewritten = optimize_for_inference(model, Formulation(norm="linear"))
    for block in of_type(rewritten, FlatBlock):
        assert isinstance(block, FlatBlock)
        _scale_residuals(block)
    assert difference(model, rewritten, SIZES[1]) < 1e-9


def test_no_tensor_has_more_than_five_axes(model: MobileViT) -> None:
    program = torch.export.export(
        optimize_for_inference(model, Formulation("rank4", "mean")), (torch.rand(2, 3, 75, 130).double(),)
    )
    ranks = [node.meta["val"].ndim for node in program.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    assert 3 < max(ranks) <= 5


@pytest.mark.parametrize("rewrite", [fold_batch_norm, fold_attention, optimize_for_inference])
def test_the_input_model_is_not_modified(rewrite: Callable[[nn.Module], nn.Module], model: MobileViT) -> None:
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    rewrite(model)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    "rewrite",
    [fold_batch_norm, fold_norm_affine, fold_attention, center_residuals, flatten_tokens, optimize_for_inference],
)
def test_training_mode_is_refused(rewrite: Callable[[nn.Module], nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"training mode.*model.eval\(\)"):
        rewrite(MobileViT("xxs").train())
