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

    # A pipe has no width: lines are then as long as they need to be, for whatever reads them. Names of files and
    # classes are printed as they are, whatever [brackets] or :colons: are in them.
    width = None if sys.stdout.isatty() else 10_000
    return Console(width=width, markup=False, emoji=False, highlight=False)
