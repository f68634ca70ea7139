"""Draw the figures of the documentation: `python docs/figures.py` writes them to docs/figures/.

Every figure shows computed values: receptive fields come from gradients, the unfolded map from `unfold`, the batches
from the sampler. `tests/test_docs.py` compares the receptive fields with those in the documentation.
"""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, Rectangle
from torch import Tensor

from mobilevit.data.sampler import PAPER_SIZES_PX, BatchShapes, EpochBatches
from mobilevit.models.mobilevit import MobileViTBlock, Transformer, fold, unfold

SIDE, ROW, COLUMN, PATCH = 16, 5, 10, 2  # map side, position of the output pixel, patch side; in pixels

# The palette of Okabe and Ito, which is safe for color blindness.
INK, OUTSIDE, ORANGE, BLUE = "#22262b", "#eceef0", "#eba52a", "#0a6eb0"
POSITION_TINTS = ("#9fd0ee", "#f6cf85", "#8fd6bf", "#e3b3d0")  # light enough for dark numbers
MARKER: dict[str, Any] = {"marker": "o", "markerfacecolor": "white", "markeredgecolor": INK, "markeredgewidth": 1.8}
TOP = 1.45  # of the tables in the figure of unfold


def receptive_fields() -> dict[str, Tensor]:
    """Boolean maps (SIDE, SIDE): the receptive fields of the output pixel (ROW, COLUMN)."""
    torch.manual_seed(0)
    transformer = Transformer(dim=64, num_layers=2, ffn_dim=128, patch_px=PATCH)
    block = MobileViTBlock(48, transformer, dropout=0.0).eval()

    def attend(y: Tensor) -> Tensor:
        tokens = unfold(y, PATCH)
        for layer in block.layers:
            tokens = layer(tokens)
        return fold(block.norm(tokens), PATCH, SIDE, SIDE)

    def field_of(function: Callable[[Tensor], Tensor], channels: int) -> Tensor:
        x = torch.randn(1, channels, SIDE, SIDE, requires_grad=True)
        (gradient,) = torch.autograd.grad(function(x)[0, 0, ROW, COLUMN], x)
        return gradient[0].abs().sum(0) > 0

    return {
        "convolution": field_of(block.local, 48),
        "attention": field_of(attend, 64),
        "block": field_of(block, 48),
    }


def draw_receptive_fields() -> Figure:
    """Receptive fields of a convolution, of attention alone and of the MobileViT block."""
    masks = receptive_fields()
    convolution, attention, block = masks["convolution"], masks["attention"], masks["block"]
    panels = (
        ("3x3 convolution", convolution, convolution.int()),
        ("Attention alone", attention, 2 * attention.int()),
        # Pixels that attention does not cover enter through the windows of the convolution.
        ("MobileViT block", block, torch.where(attention, 2, block.int())),
    )
    figure = Figure(figsize=(8, 3.5), dpi=200)
    figure.suptitle("Receptive field of one output pixel on a 16x16 map", fontsize=13, color=INK, y=0.97)
    for i, (title, mask, colors) in enumerate(panels):
        axes = figure.add_axes((0.015 + i * 0.3325, 0.125, 0.305, 0.305 * 8 / 3.5))
        axes.pcolormesh(colors.numpy(), cmap=ListedColormap([OUTSIDE, ORANGE, BLUE]), vmin=0, vmax=2)
        for edge in range(SIDE + 1):
            is_patch = edge % PATCH == 0
            style = {"color": INK, "linewidth": 0.8, "zorder": 3} if is_patch else {"color": "white", "linewidth": 0.6}
            axes.plot((edge, edge), (0, SIDE), solid_capstyle="projecting", **style)
            axes.plot((0, SIDE), (edge, edge), solid_capstyle="projecting", **style)
        axes.plot(COLUMN + 0.5, ROW + 0.5, **MARKER, markersize=7, zorder=4)
        axes.set(xlim=(-0.1, SIDE + 0.1), ylim=(SIDE + 0.1, -0.1))
        axes.axis("off")
        axes.set_title(f"{title}: {int(mask.sum())} of {mask.numel()}", fontsize=10.5, color=INK, pad=5)
    handles = [
        Line2D([], [], **MARKER, linestyle="none", markersize=9),
        *(Rectangle((0, 0), 1, 1, facecolor=color, edgecolor=INK, linewidth=0.8) for color in (ORANGE, BLUE, OUTSIDE)),
    ]
    figure.legend(
        handles,
        ("the output pixel", "through a 3x3 window", "by attention", "outside the receptive field"),
        loc="lower center",
        bbox_to_anchor=(0.5, 0.0),
        ncols=4,
        frameon=False,
        fontsize=10,
        labelcolor=INK,
        handlelength=1.0,
        handleheight=1.0,
        handletextpad=0.6,
        columnspacing=2.2,
    )
    return figure


def draw_unfold() -> Figure:
    """A map of 1 to 16, its pixels grouped by position in the patch, and the folded map."""
    side, N = 4, 4
    numbers = torch.arange(1, side * side + 1).reshape(1, 1, side, side)
    tokens = unfold(numbers, PATCH)  # (P, N, 1)
    positions = torch.arange(PATCH * PATCH).reshape(-1, 1, 1).expand(-1, N, 1)
    tints = fold(positions, PATCH, side, side)[0, 0]  # position of every pixel within its patch
    folded = fold(tokens, PATCH, side, side)[0, 0]

    figure = Figure(figsize=(8, 2.7), dpi=200)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 19), ylim=(6.4125, 0))  # equal units on both axes
    axes.axis("off")

    def write(x: float, y: float, words: str, size: float, **alignment: Any) -> None:
        axes.text(x, y, words, fontsize=size, color=INK, va="center_baseline", **{"ha": "center", **alignment})

    def draw_table(left: float, title: str, values: Tensor, colors: Tensor, outlines: tuple[int, int]) -> None:
        """A 4x4 table, with an outline around every `outlines` (rows, columns) of its cells."""
        write(left + 2, 0.5, title, 11)
        for row, column in product(range(4), range(4)):
            tint = POSITION_TINTS[int(colors[row, column])]
            axes.add_patch(Rectangle((left + column, TOP + row), 1, 1, facecolor=tint, edgecolor="white"))
            write(left + column + 0.5, TOP + row + 0.5, str(int(values[row, column])), 12.5)
        height, width = outlines
        for row, column in product(range(0, 4, height), range(0, 4, width)):
            corner = (left + column, TOP + row)
            axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=INK, linewidth=1.4))

    def draw_arrow(start: float, end: float, words: str) -> None:
        axes.add_patch(
            FancyArrowPatch((start, TOP + 2), (end, TOP + 2), arrowstyle="-|>", mutation_scale=14, color=INK)
        )
        write((start + end) / 2, TOP + 1.6, words, 10.5)

    draw_table(0.3, "a map in 2x2 patches", numbers[0, 0], tints, (PATCH, PATCH))
    draw_arrow(4.6, 6.2, "unfold")
    draw_table(8.0, "positions x patches", tokens[..., 0], positions[..., 0], (1, N))
    write(7.85, TOP - 0.3, "patch", 9, ha="right")
    for i in range(4):
        write(7.85, TOP + i + 0.5, f"position {i}", 9, ha="right")
        write(8.5 + i, TOP - 0.3, str(i), 9)
    write(10, TOP + 4.6, "attention operates within a row, not between rows", 9.5)
    draw_arrow(12.5, 14.1, "fold")
    draw_table(14.7, "the folded map", folded, tints, (PATCH, PATCH))
    return figure


def draw_sampler() -> Figure:
    """Batch size (bar height) and image size (color) of the first steps of an epoch."""
    num_steps, colors = 100, ("#d3e8f6", "#9fd0ee", "#5aa9d6", BLUE, "#08395c")
    figure = Figure(figsize=(8, 5.2), dpi=200, layout="constrained")
    rows = figure.subplots(3, 1, sharex=True, sharey=True)
    for axes, variant in zip(rows, ("equation", "v0.1", "main"), strict=True):
        epoch = EpochBatches(1_281_167, BatchShapes(PAPER_SIZES_PX, 128, 256, variant), world_size=8)
        for step in range(num_steps):
            color = colors[PAPER_SIZES_PX.index(epoch.size_px(step))]
            axes.bar(step, len(epoch[step]), width=0.85, color=color)
        axes.set_title(f"{variant}: {len(epoch):,} steps in this epoch", fontsize=10, loc="left", color=INK)
        axes.axhline(128, color=ORANGE, linewidth=1.2)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.set_xlim(-1, num_steps)
    rows[1].set_ylabel("images in the batch of one process", fontsize=9, color=INK)
    rows[2].set_xlabel("step", fontsize=9, color=INK)
    handles: list[Any] = [
        Rectangle((0, 0), 1, 1, color=color, label=f"{size} px")
        for color, size in zip(colors, PAPER_SIZES_PX, strict=True)
    ]
    handles.append(Line2D([], [], color=ORANGE, label="128 images"))
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False, fontsize=8.5)
    return figure


def main(folder: Path) -> None:
    """Write every figure into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in (("receptive_field", draw_receptive_fields), ("unfold", draw_unfold), ("sampler", draw_sampler)):
        # Without the version of matplotlib in the file, an unchanged figure stays the same file.
        draw().savefig(folder / f"{name}.png", metadata={"Software": None})


if __name__ == "__main__":
    main(Path(__file__).parent / "figures")
