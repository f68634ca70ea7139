"""Output of the commands: tables on standard output, warnings on standard error."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

logger = logging.getLogger(__name__)


def warn(message: str) -> None:
    logger.warning(message)


def stdout() -> Console:
    from rich.console import Console

    # Without a terminal, lines are not wrapped. Markup is off, because names of files and classes may contain
    # [brackets] or :colons:.
    width = None if sys.stdout.isatty() else 10_000
    return Console(width=width, markup=False, emoji=False, highlight=False)
