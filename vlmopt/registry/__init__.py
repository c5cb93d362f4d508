"""Finds passes by entry point and by folder, lists them without importing them, and checks them when they load.

Passes may import torch, which costs seconds: a listing reads a pass's source (`ast`), and only `load_pass` imports it.

What is refused, naming the file and the reason:
1. an unknown public class attribute (a misspelled `requires` is never silent);
2. an unregistered fact;
3. a second claimant of a name;
4. no pass or more than one pass in a file;
5. a failed import;
6. a name that is not kebab-case, or that its file and class do not repeat.
"""

from __future__ import annotations

from vlmopt.registry.listing import GROUP, PassInfo, find_pass, find_passes, producers
from vlmopt.registry.loading import PassDescription, describe_pass, load_pass, make_pass
from vlmopt.registry.options import Option, instantiate
from vlmopt.registry.suggestions import suggest

__all__ = [
    "GROUP",
    "Option",
    "PassDescription",
    "PassInfo",
    "describe_pass",
    "find_pass",
    "find_passes",
    "instantiate",
    "load_pass",
    "make_pass",
    "producers",
    "suggest",
]
