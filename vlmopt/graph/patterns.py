"""Names and patterns that users write for branches and layers."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from vlmopt.core.errors import PassOptionError


def is_match(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name `COMPONENT/PATH` is meant by one of the patterns, which may leave the component out."""
    short = name.partition("/")[2]
    return any(fnmatchcase(name, pattern) or fnmatchcase(short, pattern) for pattern in patterns)


def check_patterns(place: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    """Refuses a pattern that means nothing.

    Raises:
        PassOptionError: naming the pattern and the closest name there is.
    """
    for pattern in patterns:
        if any(is_match(name, [pattern]) for name in names):
            continue
        known = [*names, *(name.partition("/")[2] for name in names)]
        close = get_close_matches(pattern, known, n=1)
        remedy = f"did you mean {close[0]!r}?" if close else "see `vlmopt inspect MODEL` for the names"
        raise PassOptionError(
            place, f"{pattern!r} matches nothing", expected=f"one of {len(names)} names", remedy=remedy
        )
