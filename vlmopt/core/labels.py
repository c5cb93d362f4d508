"""Labels of several tasks side by side: each is qualified by its task's name, and a task's labels are one block."""

from __future__ import annotations

from collections.abc import Sequence

SEPARATOR = ": "  # between a task's name, which does not hold it, and a label


def qualified_label(task: str, label: str) -> str:
    return f"{task}{SEPARATOR}{label}"


def task_of(label: str) -> str:
    """The name of the task that a qualified label belongs to."""
    return label.partition(SEPARATOR)[0]


def label_blocks(labels: Sequence[str]) -> dict[str, range]:
    """The columns of every task's qualified labels, which lie side by side."""
    blocks: dict[str, range] = {}
    for column, label in enumerate(labels):
        name = task_of(label)
        blocks[name] = range(blocks[name].start if name in blocks else column, column + 1)
    return blocks
