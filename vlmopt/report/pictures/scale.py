"""The colours of importance: viridis in nine steps, even to the eye and told apart by colour-blind people.

In light the important is dark, in dark it is bright, so that it stands out in both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

# Sampled from matplotlib's viridis (CC0), from its low end to its high end.
_VIRIDIS = ("#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725")
N_STEPS = len(_VIRIDIS)
UNKNOWN = "none"


@dataclass(frozen=True)
class Scale:
    """Values as steps of colour, from 0 to the largest one. Importance spans decades, so `is_root` gives its low end
    more of the steps; values below zero have the lowest."""

    maximum: float
    is_root: bool

    @classmethod
    def over(cls, values: Iterable[float | None], *, is_root: bool) -> Scale:
        known = [value for value in values if is_known(value) and value is not None]
        return cls(max([0.0, *known]), is_root)

    def step(self, value: float | None) -> str:
        """The class of the value's colour: `s0` to `s8`, or `none`."""
        if value is None or not is_known(value):
            return UNKNOWN
        if value <= 0 or self.maximum <= 0:
            return "s0"
        share = min(value / self.maximum, 1.0)
        return f"s{min(int((math.sqrt(share) if self.is_root else share) * N_STEPS), N_STEPS - 1)}"

    def bound(self, step: int) -> float:
        """The value at which a step begins."""
        share = step / N_STEPS
        return self.maximum * (share * share if self.is_root else share)


def is_known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def colours_css(selector: str) -> str:
    """The steps as variables that a page may set otherwise."""
    steps = "".join(
        f"--vo-s{i}:light-dark({light},{dark});"
        for i, (light, dark) in enumerate(zip(reversed(_VIRIDIS), _VIRIDIS, strict=True))
    )
    fills = "".join(f"{selector} .s{i}{{fill:var(--vo-s{i})}}" for i in range(N_STEPS))
    return f"{selector}{{{steps}}}{fills}"


def plain_colour(step: str) -> str:
    """For programs that read no style sheets."""
    return "#d5dbe3" if step == UNKNOWN else tuple(reversed(_VIRIDIS))[int(step.removeprefix("s"))]
