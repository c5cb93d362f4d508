"""Plain data as indented lines, for results that have no table of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence


def lines_of(data: object, indent: int = 0) -> Iterator[str]:
    """`key: value` lines; nested mappings and lists are indented, short lists of plain values stay on one line."""
    pad = "  " * indent
    if isinstance(data, Mapping):
        for key, value in data.items():
            if _is_plain(value):
                yield f"{pad}{key}: {_plain(value)}"
            else:
                yield f"{pad}{key}:"
                yield from lines_of(value, indent + 1)
    elif isinstance(data, Sequence) and not isinstance(data, str):
        for item in data:
            if _is_plain(item):
                yield f"{pad}- {_plain(item)}"
            else:
                first, *rest = [*lines_of(item, indent + 1)] or [""]
                yield f"{pad}- {first.strip()}"
                yield from rest
    else:
        yield f"{pad}{_plain(data)}"


def _is_plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return not value
    if isinstance(value, Sequence) and not isinstance(value, str):
        return all(not isinstance(item, (Mapping, list, tuple)) for item in value) and len(value) <= 8
    return True


def _plain(value: object) -> str:
    if value is None or value == {}:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(item) for item in value) or "none"
    return str(value)
