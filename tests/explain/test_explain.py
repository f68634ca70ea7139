"""The figure: its size, and that what is painted lies where it was attended."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mobilevit
from conftest import randomise
from mobilevit.explain import Explanation
from mobilevit.explain.draw import (
    CAPTION_PX,
    GAP_PX,
    HEADING_PX,
    LEAST_HEIGHT_PX,
    MARGIN_PX,
    PANEL_PX,
    SCALE_PX,
    WIDTH_PX,
    draw_figure,
    in_decades,
    scaled,
    scaled_attention,
    strength,
)
from mobilevit.images import Preprocessing
from mobilevit.weights import Weights


@pytest.fixture(scope="module")
def weights() -> Weights:
    model = randomise(mobilevit.MobileViT("xxs", num_classes=3))
    return Weights(model.architecture, model.state_dict(), Preprocessing(72, 64), class_names=("ant", "bee", "c" * 90))


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 140, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def explanation(weights: Weights, photo: Image.Image) -> Explanation:
    return mobilevit.explain_image(weights, photo, at=(40, 60), class_name="bee")


def test_the_figure_has_three_rows_of_the_size_that_is_seen(explanation: Explanation, photo: Image.Image):
    figure = draw_figure(explanation)
    assert figure.size == (WIDTH_PX, MARGIN_PX + 3 * (HEADING_PX + PANEL_PX + CAPTION_PX))
    wide = replace(explanation, view=replace(explanation.view, box=(0, 0, 140, 70)))
    assert draw_figure(wide).size == (WIDTH_PX, MARGIN_PX + 3 * (HEADING_PX + PANEL_PX // 2 + CAPTION_PX))


@pytest.mark.parametrize("size", [(900, 30), (5000, 3), (3, 2000)])
@pytest.mark.parametrize("resize_px", [64, (64, 64)])
def test_images_that_are_hardly_more_than_a_line(
    weights: Weights, size: tuple[int, int], resize_px: int | tuple[int, int]
):
    made = mobilevit.explain_image(
        replace(weights, preprocessing=Preprocessing(resize_px, 64)), Image.new("RGB", size, (90, 120, 150))
    )
    figure = draw_figure(made)
    assert figure.width == WIDTH_PX
    assert figure.height >= MARGIN_PX + 3 * (HEADING_PX + LEAST_HEIGHT_PX + CAPTION_PX)


def test_light_is_on_the_patch_that_is_attended(explanation: Explanation):
    """A block of 4 x 4 patches with all of its attention on the one in row 3, column 0."""
    block = explanation.blocks[0]
    assert (block.rows, block.columns) == (4, 4)
    keys = torch.zeros_like(block.keys)
    keys[:, :, 12] = 1000
    grey = Image.new("RGB", explanation.image.size, (90, 90, 90))
    blocks = (replace(block, queries=torch.ones_like(block.queries), keys=keys), *explanation.blocks[1:])
    figure = draw_figure(replace(explanation, image=grey, blocks=blocks))
    top = MARGIN_PX // 2 + 2 * HEADING_PX + PANEL_PX + CAPTION_PX
    for column, share_lit in ((0, 1 / 16), (3, 1 / 64)):
        left = MARGIN_PX + column * (PANEL_PX + GAP_PX)
        panel = np.asarray(figure.crop((left, top, left + PANEL_PX, top + PANEL_PX)), float)
        is_lit = (panel[..., 0] > 200) & (panel[..., 2] < 200)
        rows, columns = is_lit.nonzero()
        assert rows.min() > PANEL_PX * 0.7
        assert columns.max() < PANEL_PX * 0.3
        # What is smooth is lit in the middle of the patch only; the marked place, white, lies elsewhere.
        assert is_lit.mean() == pytest.approx(share_lit, rel=0.6)


def test_even_attention_looks_even_and_faint(explanation: Explanation):
    block = explanation.blocks[0]
    grey = Image.new("RGB", explanation.image.size, (90, 90, 90))
    keys = torch.zeros_like(block.keys)
    keys[:, :, 12] = 1000
    lightness = {}
    for name, to in (("even", torch.zeros_like(keys)), ("one", keys)):
        blocks = (replace(block, queries=torch.ones_like(block.queries), keys=to), *explanation.blocks[1:])
        figure = draw_figure(replace(explanation, image=grey, blocks=blocks)).convert("L")
        top = MARGIN_PX // 2 + 2 * HEADING_PX + PANEL_PX + CAPTION_PX
        # Patch 12 of 4 x 4, in the lower left corner; the mark is far from it.
        panel = np.asarray(figure.crop((MARGIN_PX, top, MARGIN_PX + PANEL_PX, top + PANEL_PX)), float)
        lightness[name] = panel[-PANEL_PX // 4 :, : PANEL_PX // 4]
    assert lightness["even"].std() == 0
    assert lightness["even"].max() < 0.5 * lightness["one"].max()
    assert scaled_attention(torch.full((3, 5), 1 / 15)).tolist() == [[pytest.approx(1 / 3)] * 5] * 3
    assert scaled_attention(torch.tensor([[0.75, 0.25, 0, 0, 0]])).tolist() == [pytest.approx([1, 1 / 3, 0, 0, 0])]
    assert [strength(times) for times in (1.0, 1.099, 1.1, 2.64)] == [
        *["practically even"] * 2,
        "up to 1.1 times the mean",
        "up to 2.6 times the mean",
    ]


def test_every_row_says_what_its_colours_mean(explanation: Explanation):
    """A bar beside each heading, from dark to light, and words on both sides of it, however long the heading is."""
    figure = np.asarray(draw_figure(explanation), float)
    for row in range(3):
        top = MARGIN_PX // 2 + row * (HEADING_PX + PANEL_PX + CAPTION_PX)
        band = figure[top : top + HEADING_PX - 4]
        is_coloured = np.ptp(band, axis=-1) > 40
        (columns,) = is_coloured.any(axis=0).nonzero()
        first, last = columns[0], columns[-1]
        assert SCALE_PX[0] * 0.6 < last - first < SCALE_PX[0]
        lightness = band[is_coloured[:, last].nonzero()[0][0], first : last + 1].mean(axis=-1)
        assert lightness[-1] > lightness[0] + 80
        assert np.diff(lightness).min() > -2
        darkest = band.max(axis=-1).min(axis=0)  # of every column: where there is a letter, it is not white
        assert darkest[last + 1 :].min() < 200
        begin = last - SCALE_PX[0]
        assert darkest[begin - 40 : begin - 8].min() < 200


def test_values_are_scaled_by_the_largest():
    assert scaled(torch.tensor([-1.0, 0.0, 1.0, 4.0])).tolist() == [0, 0, 0.25, 1]
    assert scaled(torch.tensor([-1.0, 0.0, 1.0, 4.0]), bright=8).tolist() == [0, 0, 0.125, 0.5]
    assert scaled(torch.zeros(2)).tolist() == [0, 0]
    decades = in_decades(torch.tensor([0.0, 1e-30, 0.02, 2.0]))
    assert decades.tolist() == pytest.approx([0, 0.1, 0.5, 1])


def test_what_is_written_can_be_opened(weights: Weights, photo: Image.Image, tmp_path: Path):
    image = tmp_path / "photo.png"
    photo.save(image)
    made = mobilevit.explain_image(weights, image, out=tmp_path / "new" / "figure.PNG")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["figure.PNG"]
    with Image.open(tmp_path / "new" / "figure.PNG") as figure:
        figure.load()
        assert figure.format == "PNG"
        assert figure.size == draw_figure(made).size
    assert made.at == (70, 45)
    # Cut to 64 of the 99 by 64 px that it is resized to: half a pixel of those further left than its middle.
    cut = mobilevit.explain_image(replace(weights, preprocessing=Preprocessing(64, 64)), image)
    assert sum(cut.view.box[::2]) / 2 < 69.5
    assert cut.at == (70, 45)
    assert made.evidence[0].class_name == max(made.evidence, key=lambda e: e.probability).class_name
    larger = mobilevit.explain_image(weights, image, size_px=128)
    assert (larger.size_px, larger.blocks[0].rows) == (128, 8)


def test_mistakes_are_said(weights: Weights, photo: Image.Image, tmp_path: Path):
    image = tmp_path / "photo.png"
    photo.save(image)
    before = image.read_bytes()
    with pytest.raises(ValueError, match=r"photo.png: is the image itself"):
        mobilevit.explain_image(weights, image, out=image)
    with pytest.raises(ValueError, match=r"x.jpg: ends in .jpg; write a .html or a .png file"):
        mobilevit.explain_image(weights, image, out=tmp_path / "x.jpg")
    with pytest.raises(ValueError, match=r"class is 'bea', .* they are ant, bee, c"):
        mobilevit.explain_image(weights, image, class_name="bea")
    with pytest.raises(ValueError, match="size is 31; it must be 32 px or more"):
        mobilevit.explain_image(weights, image, size_px=31)
    with pytest.raises(
        ValueError, match="the place is 0 0; of this image of 140 x 90 px the network sees x from 30 to"
    ):
        mobilevit.explain_image(weights, image, at=(0, 0))
    headless = mobilevit.MobileViT("xxs", num_classes=0)
    nameless = Weights(headless.architecture, headless.state_dict(), Preprocessing(72, 64))
    with pytest.raises(ValueError, match=r"class is 'ant'; .* these have none"):
        mobilevit.explain_image(nameless, image, class_name="ant")
    assert mobilevit.explain_image(nameless, image).evidence == ()
    assert image.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"photo.png"}
