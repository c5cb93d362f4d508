"""Budgets: what a compiled model must stay within, as a user writes them, and in the units that the code counts in.

`1` is one point of the metric and `2%` two percent of the original's metric; `5ms`, `20MB` and `1.2G` are amounts, and
`0.5x` is half of what the original takes. Read here and nowhere else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType

from vlmopt.core.errors import BudgetError


class Quantity(Enum):
    """What can be limited. The value is the key in a recipe."""

    DROP = "max_drop"  # points of the task's metric
    LATENCY = "latency"  # microseconds of one call of every component
    SIZE = "size"  # bytes of the graph files, weights included
    MACS = "macs"  # multiply-accumulates for one sample

    @property
    def option(self) -> str:
        return f"--{self.value.replace('_', '-')}"


RESOURCES = (Quantity.MACS, Quantity.LATENCY, Quantity.SIZE)
_UNITS: Mapping[Quantity, Mapping[str, float]] = {
    Quantity.LATENCY: {"us": 1.0, "ms": 1e3, "s": 1e6},
    Quantity.SIZE: {"B": 1.0, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20,
                    "GiB": 2.0**30},
    Quantity.MACS: {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12},
    Quantity.DROP: {"": 1.0},
}  # fmt: skip
_EXPECTED = {
    Quantity.DROP: "points from 0 to 100 such as 1, or percent of the original's metric such as 2%",
    Quantity.LATENCY: "a time such as 5ms or 800us, or a share of the original's such as 0.5x",
    Quantity.SIZE: "a size such as 20MB or 512kB, or a share of the original's such as 0.5x",
    Quantity.MACS: "a number such as 1.2G or 300M, or a share of the original's such as 0.5x",
}
_NUMBER = re.compile(r"([0-9]+(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?)\s*([A-Za-z%]*)")


@dataclass(frozen=True)
class Limit:
    """An upper bound: an amount in the quantity's unit, or, where it is relative, a share of the original's."""

    quantity: Quantity
    value: float
    is_relative: bool = False

    def resolve(self, original: float) -> float:
        """The bound in the quantity's unit, given what the original takes (for a drop: its metric in points)."""
        return self.value * original if self.is_relative else self.value

    @property
    def text(self) -> str:
        """As a user would write it."""
        if not self.is_relative:
            return amount_text(self.quantity, self.value)
        return f"{100 * self.value:.6g}%" if self.quantity is Quantity.DROP else f"{self.value:.6g}x"


@dataclass(frozen=True)
class Budgets:
    """The limits that were set, at most one a quantity."""

    limits: Mapping[Quantity, Limit] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def drop(self) -> Limit | None:
        return self.limits.get(Quantity.DROP)

    @property
    def resources(self) -> tuple[Limit, ...]:
        return tuple(self.limits[quantity] for quantity in RESOURCES if quantity in self.limits)

    @property
    def text(self) -> str:
        """`--max-drop 1 --macs 0.5x`, for messages."""
        return " ".join(f"{quantity.option} {limit.text}" for quantity, limit in self.limits.items())

    def __bool__(self) -> bool:
        return bool(self.limits)


def parse_limit(quantity: Quantity, given: object) -> Limit:
    """The limit that a user wrote.

    Raises:
        BudgetError: no number, no or a misspelled unit, or a value that can bind nothing.
    """
    text = str(given).strip()
    found = _NUMBER.fullmatch(text)
    if isinstance(given, bool) or not isinstance(given, str | int | float) or found is None:
        raise BudgetError(quantity.option, f"{given!r} is no budget", expected=_EXPECTED[quantity])
    value, unit = float(found[1]), found[2]
    if not math.isfinite(value):
        raise BudgetError(quantity.option, f"{text!r} is not finite", expected=_EXPECTED[quantity])
    if quantity is Quantity.DROP:
        return _drop(value, unit, text)
    if unit == "x":
        if not 0 < value <= 1:
            found_text = f"{text!r} is no share of the original's {quantity.value}"
            raise BudgetError(quantity.option, found_text, expected="more than 0x and at most 1x")
        return Limit(quantity, value, is_relative=True)
    if unit not in _UNITS[quantity]:
        raise BudgetError(quantity.option, _unit_fault(text, unit, quantity), expected=_EXPECTED[quantity])
    if value == 0:
        raise BudgetError(quantity.option, f"{text!r} can never be met", expected="more than nothing")
    return Limit(quantity, value * _UNITS[quantity][unit])


def parse_budgets(given: Mapping[Quantity, object]) -> Budgets:
    """The budgets that were written; None stands for none."""
    limits = {quantity: parse_limit(quantity, value) for quantity, value in given.items() if value is not None}
    return Budgets(MappingProxyType(limits))


def amount_text(quantity: Quantity, value: float) -> str:
    """An amount with its unit, to four digits: 5ms, 20MB, 1.2G."""
    steps = [item for item in _UNITS[quantity].items() if item[0] not in ("KB", "K", "KiB", "MiB", "GiB")]
    for unit, size in sorted(steps, key=lambda item: -item[1]):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    unit, size = min(steps, key=lambda item: item[1])
    return f"{value / size:.4g}{unit}"


def _drop(value: float, unit: str, text: str) -> Limit:
    if unit not in ("", "%"):
        raise BudgetError(
            Quantity.DROP.option, _unit_fault(text, unit, Quantity.DROP), expected=_EXPECTED[Quantity.DROP]
        )
    if value > 100:
        found = f"{text!r} is more than there is"
        raise BudgetError(Quantity.DROP.option, found, expected=_EXPECTED[Quantity.DROP])
    return Limit(Quantity.DROP, value / 100 if unit else value, is_relative=bool(unit))


def _unit_fault(text: str, unit: str, quantity: Quantity) -> str:
    if not unit:
        return f"{text!r} has no unit"
    close = [known for known in (*_UNITS[quantity], "x") if known.lower() == unit.lower()]
    return f"{text!r} has the unknown unit {unit!r}" + (f" (did you mean {close[0]!r}?)" if close else "")
