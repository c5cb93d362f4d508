"""Differences between the final graphs of two runs, from the texts that every run keeps."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from vlmopt.rundir import WORK

_SUFFIX = ".after.txt"
_NUMBER = re.compile(r"%\d+")


def graph_diffs(first: Path, second: Path) -> dict[str, list[str]]:
    """The lines of a unified diff for every component that both runs kept the text of and that differs."""
    old, new = final_texts(first), final_texts(second)
    found = {name: text_diff(old[name], new[name]) for name in old if name in new}
    return {name: lines for name, lines in found.items() if lines}


def final_texts(folder: Path) -> dict[str, str]:
    """The text of every component after the last pass; empty where a run kept none."""
    steps = sorted((folder / WORK / "20-passes").glob("*"))
    if not steps:
        return {}
    return {file.name.removesuffix(_SUFFIX): file.read_text(encoding="utf-8") for file in steps[-1].glob(f"*{_SUFFIX}")}


def text_diff(first: str, second: str) -> list[str]:
    """A unified diff of two graphs in which a removed node does not change every line behind it.

    Lines are compared with the operation of every operand in the place of its number.
    """
    old, new = first.splitlines(), second.splitlines()
    matcher = difflib.SequenceMatcher(None, _without_numbers(old), _without_numbers(new), autojunk=False)
    lines: list[str] = []
    for group in matcher.get_grouped_opcodes(2):
        (_, i, _, j, _), (_, _, i_end, _, j_end) = group[0], group[-1]
        lines.append(f"@@ -{i + 1},{i_end - i} +{j + 1},{j_end - j} @@")
        for kind, a, a_end, b, b_end in group:
            if kind == "equal":
                lines += [f" {line}" for line in old[a:a_end]]
                continue
            lines += [f"-{line}" for line in old[a:a_end]]
            lines += [f"+{line}" for line in new[b:b_end]]
    return lines


def _without_numbers(lines: list[str]) -> list[str]:
    """`%7: float32[2] = relu (%6)` -> `float32[2] = relu (linear fc1)`."""
    operations: dict[str, str] = {}
    found = []
    for line in lines:
        number, separator, rest = line.partition(": ")
        if separator and _NUMBER.fullmatch(number):
            operations[number] = rest.partition(" = ")[2].partition(" (")[0]
            line = rest
        found.append(_NUMBER.sub(lambda match: operations.get(match[0], match[0]), line))
    return found
