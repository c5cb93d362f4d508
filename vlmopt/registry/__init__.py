"""Finds passes by entry point and by folder, lists them without importing them, and checks them when they load.

Passes may import torch, which costs seconds: a listing reads a pass's source (`ast`), and only `load_pass` imports it.

What is refused, naming the file and the reason:
1. an unknown public class attribute (a misspelled `requires` is never silent);
2. an unregistered fact, and a fact that is registered with another meaning;
3. a second claimant of a name;
4. no pass or more than one pass in a file;
5. a failed import, one that never ends and one that prints;
6. a name that is not kebab-case, or that its file and class do not repeat;
7. a pass for another vlmopt (`needs_vlmopt`, or what its distribution requires).

A plugin that is refused is set aside: `vlmopt passes list` shows it, and everything that does not name it works on.
"""

from __future__ import annotations

from vlmopt.registry.cases import build_case, cases_of
from vlmopt.registry.listing import (
    GROUP,
    BrokenPass,
    Survey,
    find_broken,
    find_pass,
    find_passes,
    producers,
    survey,
)
from vlmopt.registry.loading import PassDescription, describe_pass, load_class, load_pass, make_pass
from vlmopt.registry.options import Option, instantiate
from vlmopt.registry.source import PassInfo
from vlmopt.registry.suggestions import suggest

__all__ = [
    "GROUP",
    "BrokenPass",
    "Option",
    "PassDescription",
    "PassInfo",
    "Survey",
    "build_case",
    "cases_of",
    "describe_pass",
    "find_broken",
    "find_pass",
    "find_passes",
    "instantiate",
    "load_class",
    "load_pass",
    "make_pass",
    "producers",
    "suggest",
    "survey",
]
