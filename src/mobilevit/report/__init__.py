"""HTML reports: Jinja2 templates and one stylesheet in `templates/`, and charts."""

from __future__ import annotations

import base64
import io
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image


@cache
def _environment() -> Environment:
    loader = PackageLoader("mobilevit", "report/templates")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def render(template: str, **context: Any) -> str:
    """The page that `templates/<template>` gives for `context`. Values are escaped unless they are `markupsafe.Markup`.

    Templates include the stylesheet with `{% include "style.css" %}`.
    """
    return _environment().get_template(template).render(context)


def jpeg_url(image: Image.Image, quality: int) -> str:
    """An RGB image as a JPEG in a data URL; `quality` as in Pillow, 0 to 95."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
