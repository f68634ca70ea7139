"""Suggestions for misspelled names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, names: Iterable[str]) -> str:
    """The start of a hint: "did you mean A or B? ", or "" if no name is similar to `name`. Case is ignored."""
    by_folded = {candidate.casefold(): candidate for candidate in names}
    matches = [by_folded[match] for match in difflib.get_close_matches(name.casefold(), by_folded, n=3)]
    return f"did you mean {' or '.join(matches)}? " if matches else ""
