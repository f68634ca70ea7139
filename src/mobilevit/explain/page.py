"""An explanation as one HTML file that stands on its own: the place is moved in it, and the attention computed there.

The page is given the queries and keys of every layer, in 16 bits, and not the attention: they are a fraction of its
size, and from them it makes the attention of any place, layer and head.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mobilevit.draw import LOOK
from mobilevit.explain.attention import BlockAttention
from mobilevit.explain.draw import BRIGHT_TIMES, EVEN_TIMES, FIELD_SCALE, OPACITY, RAMP, SCALE_GREY, in_decades, scaled
from mobilevit.explain.explanation import Explanation
from mobilevit.explain.receptive import Field
from mobilevit.report import jpeg_url

TEMPLATE = Path(__file__).with_name("page.html")
IMAGE_PX = 720  # the longer side of the image in the page
FIELD_PX = 128  # the longer side of a map of gradients


def page_of(explanation: Explanation) -> str:
    """The page, as the text of an HTML file that loads nothing."""
    e = explanation
    data = {
        "network": e.network,
        "task": e.task,
        "image": jpeg_url(e.view.cut(e.image, IMAGE_PX), quality=82),
        "width": e.view.width,
        "height": e.view.height,
        "box": e.view.box,
        "size": e.size_px,
        "place": e.place,
        "ramp": RAMP,
        "opacity": OPACITY,
        "grey": SCALE_GREY,
        "bright": BRIGHT_TIMES,
        "even": EVEN_TIMES,
        "trace": {"value": FIELD_SCALE.least, "text": FIELD_SCALE.low},
        "blocks": [_block(block) for block in e.blocks],
        "fields": [_field(field, e.size_px) for field in e.fields],
        "classes": [
            {
                "name": one.class_name,
                "probability": one.probability,
                "coarse": _bytes(scaled(one.shares)),
                "fine": _bytes(scaled(one.fine)),
            }
            for one in e.evidence
        ],
    }
    # In a script, "<" could begin its end tag; written like this it is the same to JSON.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    template = TEMPLATE.read_text(encoding="utf-8").replace("{{look}}", LOOK.read_text(encoding="utf-8"))
    return template.replace("{{data}}", text)


def _block(block: BlockAttention) -> dict[str, Any]:
    return {
        "name": block.name,
        "patch": block.patch_px,
        "rows": block.rows,
        "columns": block.columns,
        "heads": block.num_heads,
        "layers": [{"queries": _int16(q), "keys": _int16(k)} for q, k in zip(block.queries, block.keys, strict=True)],
    }


def _field(field: Field, size_px: int) -> dict[str, Any]:
    values = in_decades(field.gradient)
    # The largest of a tile, so that what is not nothing does not become it.
    tile = -(-size_px // FIELD_PX)
    padded = np.pad(values, [(0, -side % tile) for side in values.shape])
    height, width = (side // tile for side in padded.shape)
    left, top, right, bottom = field.window
    return {
        "name": field.name,
        "share": field.share,
        "attention": field.has_attention,
        "window": [left / size_px, top / size_px, right / size_px, bottom / size_px],
        "windowShare": (right - left) * (bottom - top) / size_px**2,
        # How many tiles the map is across: the last of them may stick out.
        "across": size_px / tile,
        "map": _bytes(padded.reshape(height, tile, width, tile).max(axis=(1, 3))),
    }


def _int16(values: Tensor) -> dict[str, Any]:
    """Values as whole numbers of 16 bits and the factor that they are to be multiplied by."""
    factor = max(values.abs().max().item(), 1e-30) / 32767
    return {"factor": factor, "numbers": _base64((values / factor).round().numpy().astype("<i2").tobytes())}


def _bytes(values: np.ndarray) -> dict[str, Any]:
    """Values from 0 to 1 (h, w) as whole numbers of 8 bits; what is above 0 stays so."""
    numbers = np.ceil(values * 255).astype(np.uint8)
    return {"rows": values.shape[0], "columns": values.shape[1], "numbers": _base64(numbers.tobytes())}


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
