"""Attention against the outputs of the network's own attention layers, and its mapping to image positions."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor, nn

from mobilevit import MobileViT
from mobilevit.explain.attention import BlockAttention, capture_outputs, compute_attention, find_blocks
from mobilevit.models.mobilevit import Attention, TransformerLayer, fold, unfold
from small_networks import randomize

SIZES = [(64, 64), (70, 97)]  # the second has feature maps with odd sides, which are resized to whole patches


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_attention_reproduces_the_output_of_the_attention_layers(size: tuple[int, int]):
    model = randomize(MobileViT("xxs", num_classes=3))
    pixels = torch.rand(1, 3, *size)
    blocks = compute_attention(model.backbone, pixels)
    assert [(block.stage, block.num_layers, block.num_heads) for block in blocks] == [
        ("stage3", 2, 4),
        ("stage4", 4, 4),
        ("stage5", 3, 4),
    ]
    attentions = {
        f"{stage} {i}": cast(Attention, cast(TransformerLayer, layer).attention)
        for stage, block in find_blocks(model.backbone).items()
        for i, layer in enumerate(block.layers)
    }
    _, outputs = capture_outputs(model, pixels, attentions)
    modules: dict[str, nn.Module] = {name: attention.qkv for name, attention in attentions.items()}
    _, projections = capture_outputs(model, pixels, modules)
    for block in blocks:
        for i in range(block.num_layers):
            attention = attentions[f"{block.stage} {i}"]
            v_PNhd = projections[f"{block.stage} {i}"].unflatten(-1, (3, block.num_heads, -1))[:, :, 2]
            for position in range(block.patch_px**2):
                matrices = block.matrices(i, position)
                torch.testing.assert_close(matrices.sum(-1), torch.ones(matrices.shape[:2]))
                mixed = torch.einsum("hnm,mhd->nhd", matrices, v_PNhd[position]).flatten(1)
                expected = outputs[f"{block.stage} {i}"][position]
                torch.testing.assert_close(attention.out(mixed), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_a_pixel_attends_to_its_own_position_in_every_patch(size: tuple[int, int]):
    """Compared with the gradient through a transformer layer of the network."""
    model = randomize(MobileViT("xxs", num_classes=3)).double()
    pixels = torch.rand(1, 3, *size, dtype=torch.float64)
    block = compute_attention(model.backbone, pixels)[1]
    x, y = 0.61, 0.34
    patches = block.from_point(x, y, layer=1)
    folded = block.to_map(patches, x, y)
    height, width = folded.shape
    assert (height, width) == (2 * block.rows, 2 * block.columns)
    row, column = int(y * height), int(x * width)
    shown = folded > 0
    expected = torch.zeros_like(shown)
    expected[row % 2 :: 2, column % 2 :: 2] = True
    assert shown.equal(expected)
    assert folded.sum() == pytest.approx(1)
    layer = find_blocks(model.backbone)["stage4"].layers[1]
    tokens = torch.randn(1, 80, height, width, dtype=torch.float64, requires_grad=True)
    after = fold(layer(unfold(tokens, 2)), 2, height, width)
    (gradient,) = torch.autograd.grad(after[0, :, row, column].square().sum(), tokens)
    assert (gradient[0].abs().sum(0) > 0).equal(expected)


def make_block(rows: int, columns: int, patch_px: int, matrix_NN: Tensor, num_layers: int = 1) -> BlockAttention:
    """A block with one head whose attention is `matrix_NN` at every position and in every layer."""
    N = rows * columns
    # The softmax of the logarithm of a row is the row. Keys are unit vectors.
    q = matrix_NN.clamp(min=1e-30).log() * N**0.5
    shape = (num_layers, patch_px**2, N, 1, N)
    return BlockAttention(
        "stage3", patch_px, rows, columns, q[:, None].expand(shape), torch.eye(N)[:, None].expand(shape)
    )


@pytest.mark.parametrize("patch_px", [2, 3])
def test_attention_to_one_patch_covers_the_region_of_that_patch(patch_px: int):
    """Of 3 x 5 patches, (row 0, column 1) attends to (row 2, column 3), from every pixel of the patch."""
    rows, columns = 3, 5
    matrix = torch.full((15, 15), 1 / 15)
    source, target = 0 * columns + 1, 2 * columns + 3
    matrix[source] = 0
    matrix[source, target] = 1
    block = make_block(rows, columns, patch_px, matrix)
    for i in range(patch_px):
        for j in range(patch_px):
            x, y = (1 + (j + 0.5) / patch_px) / columns, (0 + (i + 0.5) / patch_px) / rows
            patches = block.from_point(x, y)
            assert patches.argmax() == target
            assert patches.max() == pytest.approx(1)
            # On an image of 50 x 90 px, the patch covers rows 60 to 89 and columns 30 to 39.
            bright = patches.repeat_interleave(30, 0).repeat_interleave(10, 1) > 0.5
            assert bright.nonzero().min(0).values.tolist() == [60, 30]
            assert bright.nonzero().max(0).values.tolist() == [89, 39]
            folded = block.to_map(patches, x, y)
            assert folded.argmax() == (2 * patch_px + i) * columns * patch_px + 3 * patch_px + j
    assert block.from_point(0.99, 0.99).flatten().tolist() == pytest.approx([1 / 15] * 15)


def test_rollout_through_two_layers():
    """Each patch attends to the next one. With the residual connections, two layers give 1/4, 1/2, 1/4."""
    matrix = torch.eye(4).roll(1, dims=1)  # row i is 1 at i + 1
    block = make_block(1, 4, 2, matrix, num_layers=2)
    assert block.rollout(0.1, 0.5).flatten().tolist() == pytest.approx([0.25, 0.5, 0.25, 0])
    assert block.rollout(0.9, 0.5).flatten().tolist() == pytest.approx([0.5, 0.25, 0, 0.25])


def test_attention_is_averaged_over_layers_and_heads():
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 2, 4, 6, 3, 5, generator=generator).unbind(0)
    block = BlockAttention("stage3", 2, 2, 3, q, k)
    single = torch.stack(
        [torch.stack([block.from_point(0.4, 0.6, layer=i, head=j) for j in range(3)]) for i in range(2)]
    )
    torch.testing.assert_close(block.from_point(0.4, 0.6), single.mean((0, 1)))
    torch.testing.assert_close(block.from_point(0.4, 0.6, layer=1), single[1].mean(0))
    torch.testing.assert_close(block.from_point(0.4, 0.6, head=2), single[:, 2].mean(0))
    assert single.std(0).max() > 0.01
