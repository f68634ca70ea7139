"""Parts of messages: suggestions for misspelled names, lists of names, causes of errors."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def nearest(name: str, names: Iterable[str]) -> str:
    """The start of a hint: "did you mean A or B? ", or "" if no name is similar to `name`. Case is ignored."""
    by_folded = {candidate.casefold(): candidate for candidate in names}
    matches = [by_folded[match] for match in difflib.get_close_matches(name.casefold(), by_folded, n=3)]
    return f"did you mean {' or '.join(matches)}? " if matches else ""


def join_names(names: Iterable[object]) -> str:
    """The first five names, separated by commas; "..." stands for the others."""
    names = [str(name) for name in names]
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def join_classes(names: Sequence[str]) -> str:
    """The first five class names, quoted, after "class" or "classes"."""
    return f"{'class' if len(names) == 1 else 'classes'} {join_names(map(repr, names))}"


def first_line(error: BaseException) -> str:
    """The first line of an error message, or the name of the exception if there is no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
