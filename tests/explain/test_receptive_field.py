"""Receptive fields against the arithmetic of convolutions, and against the effect of changed pixels."""

from __future__ import annotations

import pytest
import torch

from mobilevit import XXS, Backbone
from mobilevit.explain.attention import capture_outputs, find_blocks
from mobilevit.explain.receptive_field import compute_receptive_fields
from small_networks import randomize


def window_px(stage: str) -> int:
    """The receptive field of the 3x3 convolutions up to the end of a stage, in pixels.

    Each adds twice the stride before it. MobileViT blocks have two more, before and after the transformer.
    """
    side, stride = 3, 2  # the stem
    for i, one in enumerate(XXS.stages, 1):
        for j in range(one.num_residuals):
            side += 2 * stride
            stride *= one.stride if j == 0 else 1
        side += 2 * 2 * stride if one.transformer else 0
        if stage == f"stage{i}":
            return side
    raise AssertionError(stage)


@pytest.mark.parametrize("size", [(192, 192), (130, 193)])
def test_convolutions_have_a_window_and_transformers_the_whole_image(size: tuple[int, int]):
    backbone = randomize(Backbone("xxs")).double()
    pixels = torch.rand(1, 3, *size, dtype=torch.float64)
    fields = compute_receptive_fields(backbone, pixels, 0.5, 0.5)
    assert [(field.stage, field.is_before_transformer) for field in fields] == [
        ("stage2", False),
        ("stage3", True),
        ("stage3", False),
        ("stage4", False),
        ("stage5", False),
    ]
    stage2, before, *blocks = fields
    # One of the block's two 3x3 convolutions, at stride 8, comes after the transformer.
    for field, side in ((stage2, window_px("stage2")), (before, window_px("stage3") - 2 * 8)):
        left, top, right, bottom = field.conv_window
        assert (right - left, bottom - top) == (side, side)
        expected = torch.zeros(size, dtype=torch.bool)
        expected[top:bottom, left:right] = True
        assert (field.gradient > 0).equal(expected)  # exactly 0 outside of the window
        assert field.fraction == side**2 / (size[0] * size[1])
        assert abs((left + right) / 2 - size[1] / 2) <= 8
        assert not field.has_attention
    for field in blocks:
        assert field.fraction == 1
        assert field.has_attention
    left, top, right, bottom = blocks[0].conv_window
    if all(side % 16 == 0 for side in size):  # else the map is resized to whole patches, which widens the window
        assert (right - left, bottom - top) == (window_px("stage3"),) * 2
    assert right - left < size[1] / 2


def test_the_network_is_unchanged():
    backbone = randomize(Backbone("xxs"))
    pixels = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        before = backbone(pixels)["stage5"]
        compute_receptive_fields(backbone, pixels, 0.2, 0.7)
        assert backbone(pixels)["stage5"].equal(before)
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert not pixels.requires_grad


@torch.no_grad()
def test_pixels_outside_the_window_have_no_effect():
    """A white corner changes the output of the transformer, but not its input."""
    backbone = randomize(Backbone("xxs")).double()
    pixels = torch.rand(1, 3, 128, 128, dtype=torch.float64)
    changed = pixels.clone()
    changed[..., :8, :8] = 1
    block = find_blocks(backbone)["stage3"]
    modules = {"before": block.local, "after": block}
    maps, changed_maps = (capture_outputs(backbone, image, modules)[1] for image in (pixels, changed))
    assert maps["before"][0, :, 10, 10].equal(changed_maps["before"][0, :, 10, 10])
    assert not maps["after"][0, :, 10, 10].equal(changed_maps["after"][0, :, 10, 10])
