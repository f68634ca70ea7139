"""How far layers see, against the arithmetic of their windows and against what changes when a pixel does."""

from __future__ import annotations

import pytest
import torch

from conftest import randomise
from mobilevit import XXS, Backbone
from mobilevit.explain.attention import find_blocks
from mobilevit.explain.receptive import fields_of


def side_of_window(stage: str) -> int:
    """How many pixels wide the window of a place behind the 3x3 convolutions up to the end of a stage is.

    Each adds twice the stride gathered before it; the MobileViT blocks have two more, before and behind the
    transformer.
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
def test_convolutions_see_a_window_and_blocks_everything(size: tuple[int, int]):
    backbone = randomise(Backbone("xxs")).double()
    pixels = torch.rand(1, 3, *size, dtype=torch.float64)
    fields = fields_of(backbone, pixels, 0.5, 0.5)
    assert [(field.stage, field.is_before_transformer) for field in fields] == [
        ("stage2", False),
        ("stage3", True),
        ("stage3", False),
        ("stage4", False),
        ("stage5", False),
    ]
    stage2, before, *blocks = fields
    # Before the transformer the block has one of its two 3x3 convolutions, at stride 8, behind it.
    for field, side in ((stage2, side_of_window("stage2")), (before, side_of_window("stage3") - 2 * 8)):
        left, top, right, bottom = field.window
        assert (right - left, bottom - top) == (side, side)
        seen = torch.zeros(size, dtype=torch.bool)
        seen[top:bottom, left:right] = True
        assert (field.gradient > 0).equal(seen)  # exactly 0 outside of the window
        assert field.share == side**2 / (size[0] * size[1])
        assert abs((left + right) / 2 - size[1] / 2) <= 8
        assert not field.has_attention
    for field in blocks:
        assert field.share == 1
        assert field.has_attention
    left, top, right, bottom = blocks[0].window
    if all(
        side % 16 == 0 for side in size
    ):  # else the map is resized to whole patches, and what is seen widened by that
        assert (right - left, bottom - top) == (side_of_window("stage3"),) * 2
    assert right - left < size[1] / 2


def test_the_network_is_left_as_it_was():
    backbone = randomise(Backbone("xxs"))
    pixels = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        before = backbone(pixels)["stage5"]
        fields_of(backbone, pixels, 0.2, 0.7)
        assert backbone(pixels)["stage5"].equal(before)
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert not pixels.requires_grad


@torch.no_grad()
def test_what_is_outside_of_the_window_changes_nothing():
    """A corner of the image turned white: the layer before the transformer does not notice, that behind it does."""
    backbone = randomise(Backbone("xxs")).double()
    pixels = torch.rand(1, 3, 128, 128, dtype=torch.float64)
    changed = pixels.clone()
    changed[..., :8, :8] = 1
    block = find_blocks(backbone)["stage3"]
    for x, is_noticed in ((pixels, False), (changed, True)):
        maps = []
        for image in (pixels, x):
            map_BCHW = image
            for name, stage in backbone.named_children():
                map_BCHW = stage[0](map_BCHW) if name == "stage3" else stage(map_BCHW)  # pyright: ignore
                if name == "stage3":
                    break
            maps.append((block.local(map_BCHW)[0, :, 10, 10], block(map_BCHW)[0, :, 10, 10]))
        (local, whole), (local_changed, whole_changed) = maps
        assert local.equal(local_changed)
        assert whole.equal(whole_changed) != is_noticed
