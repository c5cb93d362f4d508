"""Takes as many edits as a bound allows, what loses least for what it saves first.

For edits that hardly hinder each other (layers that are quantized, each by itself): one order serves, and each step
takes one more. Where all together are within the bound nothing else is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vlmopt.planning.cuts import Measurement


@dataclass(frozen=True)
class Edit:
    """Something that can be taken: what it saves (bytes), and how much the task's loss grows by it alone."""

    name: str
    saving: float
    sensitivity: float

    @property
    def price(self) -> tuple[bool, float]:
        """What saves nothing comes last, then what loses more for what it saves."""
        return self.saving <= 0, max(self.sensitivity, 0.0) / max(self.saving, 1.0)


@dataclass(frozen=True)
class Taken:
    """The names taken, what was measured about them, and how often anything was measured."""

    names: tuple[str, ...]
    measurement: Measurement
    n_measured: int


def longest_prefix(
    edits: Sequence[str],
    measure: Callable[[Sequence[str]], Measurement],
    sensitivities: Callable[[], Sequence[Edit]],
    max_drop: float,
) -> Taken:
    """All edits where they are within the bound, else the longest beginning of their order that is, by halving.

    Args:
        measure: what these together lose, on many items.
        sensitivities: every edit, measured by itself; asked for only where all together lose too much.
        max_drop: points; held to with the margin of a one-sided 95 % interval.
    """
    every = measure(edits)
    if every.sort_key <= max_drop:
        return Taken(tuple(edits), every, 1)
    order = [edit.name for edit in sorted(sensitivities(), key=lambda edit: edit.price)]
    fits, too_many = Taken((), Measurement(0.0, 0.0), 0), len(order)
    n_measured = 1
    while too_many - len(fits.names) > 1:
        middle = (len(fits.names) + too_many) // 2
        found = measure(order[:middle])
        n_measured += 1
        if found.sort_key <= max_drop:
            fits = Taken(tuple(order[:middle]), found, n_measured)
        else:
            too_many = middle
    return Taken(fits.names, fits.measurement, n_measured)
