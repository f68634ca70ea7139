"""HTML reports: Jinja2 templates in `templates/`, one stylesheet, and charts."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


@cache
def _environment() -> Environment:
    loader = PackageLoader("mobilevit", "report/templates")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def render(template: str, **context: Any) -> str:
    """The page that `templates/<template>` gives for `context`. Values are escaped unless they are `markupsafe.Markup`.

    Templates include the stylesheet with `{% include "style.css" %}`.
    """
    return _environment().get_template(template).render(context)
