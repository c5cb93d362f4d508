"""Text and numbers as XML, for everything that this room draws."""

from __future__ import annotations

import html
import re
from importlib import resources

_NOT_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def text(value: str) -> str:
    """The value for XML and HTML, inside of elements and of quoted attributes; what XML cannot hold becomes U+FFFD.

    Line breaks are written as references: XML turns those of an attribute into spaces.
    """
    return html.escape(_NOT_XML.sub("\ufffd", value), quote=True).replace("\n", "&#10;")


def number(value: float) -> str:
    """At most two decimals, and no `-0`."""
    shown = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if shown == "-0" else shown


def short(value: str, longest: int) -> str:
    """The value, or its beginning and its end around an ellipsis; names differ in their ends."""
    if len(value) <= longest:
        return value
    front = (longest - 1) // 3
    return f"{value[:front]}…{value[len(value) - (longest - 1 - front) :]}"


def asset(name: str) -> str:
    """A style sheet or script of this room."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8").strip()
