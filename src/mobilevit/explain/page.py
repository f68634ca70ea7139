"""An explanation as one self-contained HTML page in which the point can be moved.

The page contains the queries and keys of every layer as 16-bit integers and computes the attention from them. Attention
matrices for every point would be many times larger.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from torch import Tensor

from mobilevit.explain import heatmap
from mobilevit.explain.attention import BlockAttention
from mobilevit.explain.explanation import Explanation
from mobilevit.explain.figure import LEGEND_GRAY
from mobilevit.explain.receptive_field import ReceptiveField
from mobilevit.report import jpeg_url, render

IMAGE_PX = 720  # long side of the image
GRADIENT_PX = 128  # largest side of a gradient map


def render_page(explanation: Explanation) -> str:
    """The HTML page. It loads no other files."""
    e = explanation
    data = {
        "box": e.region.box,
        "point": e.point,
        "ramp": heatmap.RAMP,
        "opacity": heatmap.MAX_OPACITY,
        "gray": LEGEND_GRAY,
        "minBrightest": heatmap.MIN_BRIGHTEST,
        "uniformBelow": heatmap.UNIFORM_BELOW,
        "smallestGradient": {"value": heatmap.MIN_GRADIENT_VALUE, "text": heatmap.SMALLEST_GRADIENT_TEXT},
        "blocks": [_block(block) for block in e.attention],
        "receptiveFields": [_receptive_field(field) for field in e.receptive_fields],
        "classes": [
            {
                "name": one.class_name,
                "probability": one.probability,
                "gradCam": _uint8(heatmap.scale(one.grad_cam)),
                "layerCam": _uint8(heatmap.scale(one.layer_cam)),
            }
            for one in e.class_evidence
        ],
    }
    return render(
        "explain.html",
        explanation=e,
        image_url=jpeg_url(e.region.crop(e.image, IMAGE_PX), quality=82),
        data=data,
    )


def _block(block: BlockAttention) -> dict[str, Any]:
    return {
        "name": block.title,
        "patch": block.patch_px,
        "rows": block.rows,
        "columns": block.columns,
        "heads": block.num_heads,
        "layers": [{"queries": _int16(q), "keys": _int16(k)} for q, k in zip(block.queries, block.keys, strict=True)],
    }


def _receptive_field(field: ReceptiveField) -> dict[str, Any]:
    values = heatmap.scale_gradient(field.gradient)
    # The maximum of every tile, so that nonzero gradients stay nonzero.
    tile = -(-max(values.shape) // GRADIENT_PX)
    padded = np.pad(values, [(0, -side % tile) for side in values.shape])
    height, width = (side // tile for side in padded.shape)
    return {
        "name": field.title,
        "fraction": field.fraction,
        "hasAttention": field.has_attention,
        "window": field.conv_window_relative,
        "windowFraction": field.conv_fraction,
        "tilesAcross": values.shape[1] / tile,  # not an integer if the last tile is padded
        "map": _uint8(padded.reshape(height, tile, width, tile).max(axis=(1, 3))),
    }


def _int16(values: Tensor) -> dict[str, Any]:
    """Values as little-endian 16-bit integers, to be multiplied by `factor`."""
    factor = max(values.abs().max().item(), 1e-30) / 32767
    return {"factor": factor, "numbers": _base64((values / factor).round().numpy().astype("<i2").tobytes())}


def _uint8(values: np.ndarray) -> dict[str, Any]:
    """Values (h, w) in [0, 1] as 8-bit integers, rounded up so that nonzero values stay nonzero."""
    numbers = np.ceil(values * 255).astype(np.uint8)
    return {"rows": values.shape[0], "columns": values.shape[1], "numbers": _base64(numbers.tobytes())}


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
