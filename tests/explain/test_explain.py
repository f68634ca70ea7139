"""`explain_image` and its figure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mobilevit
from mobilevit.explain import Explanation
from mobilevit.explain.figure import (
    CAPTION_PX,
    GAP_PX,
    HEADING_PX,
    LEGEND_PX,
    MARGIN_PX,
    MIN_ROW_PX,
    PANEL_PX,
    WIDTH_PX,
    draw_figure,
)
from mobilevit.explain.heatmap import scale, scale_attention, scale_gradient
from mobilevit.images import Preprocessing
from mobilevit.weights import Weights
from small_networks import randomize


@pytest.fixture(scope="module")
def weights() -> Weights:
    model = randomize(mobilevit.MobileViT("xxs", num_classes=3))
    return Weights(model.architecture, model.state_dict(), Preprocessing(72, 64), class_names=("ant", "bee", "c" * 90))


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 140, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def explanation(weights: Weights, photo: Image.Image) -> Explanation:
    return mobilevit.explain_image(weights, photo, at=(40, 60), class_name="bee")


def test_the_figure_has_three_rows_of_the_size_of_the_input(explanation: Explanation, photo: Image.Image):
    figure = draw_figure(explanation)
    assert figure.size == (WIDTH_PX, MARGIN_PX + 3 * (HEADING_PX + PANEL_PX + CAPTION_PX))
    wide = replace(explanation, region=replace(explanation.region, box=(0, 0, 140, 70)))
    assert draw_figure(wide).size == (WIDTH_PX, MARGIN_PX + 3 * (HEADING_PX + PANEL_PX // 2 + CAPTION_PX))


@pytest.mark.parametrize("size", [(900, 30), (5000, 3), (3, 2000)])
@pytest.mark.parametrize("resize_px", [64, (64, 64)])
def test_images_of_extreme_aspect_ratio(weights: Weights, size: tuple[int, int], resize_px: int | tuple[int, int]):
    explanation = mobilevit.explain_image(
        replace(weights, preprocessing=Preprocessing(resize_px, 64)), Image.new("RGB", size, (90, 120, 150))
    )
    figure = draw_figure(explanation)
    assert figure.width == WIDTH_PX
    assert figure.height >= MARGIN_PX + 3 * (HEADING_PX + MIN_ROW_PX + CAPTION_PX)


def attention_panel(explanation: Explanation, column: int, keys: torch.Tensor) -> np.ndarray:
    """A panel of the attention row on a gray image, RGB, where block 0 has constant queries and these keys."""
    block = explanation.attention[0]
    assert (block.rows, block.columns) == (4, 4)
    gray = Image.new("RGB", explanation.image.size, (90, 90, 90))
    blocks = (replace(block, queries=torch.ones_like(block.queries), keys=keys), *explanation.attention[1:])
    figure = draw_figure(replace(explanation, image=gray, attention=blocks))
    left, top = MARGIN_PX + column * (PANEL_PX + GAP_PX), MARGIN_PX // 2 + 2 * HEADING_PX + PANEL_PX + CAPTION_PX
    return np.asarray(figure.crop((left, top, left + PANEL_PX, top + PANEL_PX)), float)


@pytest.fixture
def keys_of_patch_12(explanation: Explanation) -> torch.Tensor:
    """Keys of 4 x 4 patches that direct all attention to row 3, column 0."""
    keys = torch.zeros_like(explanation.attention[0].keys)
    keys[:, :, 12] = 1000
    return keys


# The smooth panel is bright only in the middle of the patch. The white marker is elsewhere.
@pytest.mark.parametrize(("column", "fraction"), [(0, 1 / 16), (3, 1 / 64)])
def test_the_attended_patch_is_bright(
    explanation: Explanation, keys_of_patch_12: torch.Tensor, column: int, fraction: float
):
    panel = attention_panel(explanation, column, keys_of_patch_12)
    is_bright = (panel[..., 0] > 200) & (panel[..., 2] < 200)
    rows, columns = is_bright.nonzero()
    assert rows.min() > PANEL_PX * 0.7
    assert columns.max() < PANEL_PX * 0.3
    assert is_bright.mean() == pytest.approx(fraction, rel=0.6)


def test_uniform_attention_is_uniform_and_dim(explanation: Explanation, keys_of_patch_12: torch.Tensor):
    uniform, attended = (
        attention_panel(explanation, 0, keys)[-PANEL_PX // 4 :, : PANEL_PX // 4].mean(axis=-1)  # patch 12
        for keys in (torch.zeros_like(keys_of_patch_12), keys_of_patch_12)
    )
    assert uniform.std() == 0
    assert uniform.max() < 0.5 * attended.max()


def test_every_row_has_a_legend(explanation: Explanation):
    """A color bar from dark to light with text on both sides, however long the heading is."""
    figure = np.asarray(draw_figure(explanation), float)
    for row in range(3):
        top = MARGIN_PX // 2 + row * (HEADING_PX + PANEL_PX + CAPTION_PX)
        band = figure[top : top + HEADING_PX - 4]
        is_colored = np.ptp(band, axis=-1) > 40
        (columns,) = is_colored.any(axis=0).nonzero()
        first, last = columns[0], columns[-1]
        assert LEGEND_PX[0] * 0.6 < last - first < LEGEND_PX[0]
        lightness = band[is_colored[:, last].nonzero()[0][0], first : last + 1].mean(axis=-1)
        assert lightness[-1] > lightness[0] + 80
        assert np.diff(lightness).min() > -2
        darkest = band.max(axis=-1).min(axis=0)  # per column; below 200 there is text
        assert darkest[last + 1 :].min() < 200
        begin = last - LEGEND_PX[0]
        assert darkest[begin - 40 : begin - 8].min() < 200


def test_scaling():
    assert scale_attention(torch.full((3, 5), 1 / 15)).tolist() == [[pytest.approx(1 / 3)] * 5] * 3
    assert scale_attention(torch.tensor([[0.75, 0.25, 0, 0, 0]])).tolist() == [pytest.approx([1, 1 / 3, 0, 0, 0])]
    assert scale(torch.tensor([-1.0, 0.0, 1.0, 4.0])).tolist() == [0, 0, 0.25, 1]
    assert scale(torch.tensor([-1.0, 0.0, 1.0, 4.0]), brightest=8).tolist() == [0, 0, 0.125, 0.5]
    assert scale(torch.zeros(2)).tolist() == [0, 0]
    scaled = scale_gradient(torch.tensor([0.0, 1e-30, 0.02, 2.0]))
    assert scaled.tolist() == pytest.approx([0, 0.1, 0.5, 1])


def test_figure_files(weights: Weights, photo: Image.Image, tmp_path: Path):
    image = tmp_path / "photo.png"
    photo.save(image)
    explanation = mobilevit.explain_image(weights, image, out=tmp_path / "new" / "figure.PNG")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["figure.PNG"]
    with Image.open(tmp_path / "new" / "figure.PNG") as figure:
        figure.load()
        assert figure.format == "PNG"
        assert figure.size == draw_figure(explanation).size
    assert explanation.at == (70, 45)
    # Cropped to 64 of 99 x 64 px: the crop's center is half a pixel further left than the image's.
    cropped = mobilevit.explain_image(replace(weights, preprocessing=Preprocessing(64, 64)), image)
    assert sum(cropped.region.box[::2]) / 2 < 69.5
    assert cropped.at == (70, 45)
    assert (
        explanation.class_evidence[0].class_name
        == max(explanation.class_evidence, key=lambda e: e.probability).class_name
    )
    larger = mobilevit.explain_image(weights, image, size_px=128)
    assert (larger.size_px, larger.attention[0].rows) == (128, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": "photo.png"}, r"photo\.png.*input image"),
        ({"out": "x.jpg"}, r"x\.jpg.*\.html or \.png"),
        ({"class_name": "bea"}, "'bea'.*ant, bee, c"),
        ({"size_px": 31}, "31.*32"),
        ({"at": (0, 0)}, "0 0 is outside.* x from 30 to"),
    ],
)
def test_invalid_arguments(
    weights: Weights, photo: Image.Image, options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: Any
):
    monkeypatch.chdir(tmp_path)
    photo.save("photo.png")
    before = Path("photo.png").read_bytes()
    with pytest.raises(ValueError, match=message):
        mobilevit.explain_image(weights, "photo.png", **options)
    assert Path("photo.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]


def test_networks_without_a_classifier_have_no_class_evidence(photo: Image.Image):
    model = mobilevit.MobileViT("xxs", num_classes=0)
    weights = Weights(model.architecture, model.state_dict(), Preprocessing(72, 64))
    assert mobilevit.explain_image(weights, photo).class_evidence == ()
    with pytest.raises(ValueError, match=r"'ant'.*no classifier"):
        mobilevit.explain_image(weights, photo, class_name="ant")


def test_a_single_position_is_reported(weights: Weights, photo: Image.Image, caplog: pytest.LogCaptureFixture):
    mobilevit.explain_image(weights, photo)
    assert not caplog.records
    explanation = mobilevit.explain_image(weights, photo, size_px=32)
    assert explanation.class_evidence[0].grad_cam.shape == (1, 1)
    assert "uniform" in caplog.text
