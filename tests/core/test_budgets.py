"""Budgets are read as a user means them, or refused with the reason."""

from __future__ import annotations

import pytest

from vlmopt.core.budgets import Limit, Quantity, amount_text, parse_budgets, parse_limit
from vlmopt.core.errors import BudgetError

DROP, LATENCY, SIZE, MACS = Quantity.DROP, Quantity.LATENCY, Quantity.SIZE, Quantity.MACS


@pytest.mark.parametrize(
    ("quantity", "given", "value", "is_relative"),
    [
        (DROP, 1, 1.0, False),
        (DROP, "0.5", 0.5, False),
        (DROP, "2%", 0.02, True),
        (LATENCY, "5ms", 5000.0, False),
        (LATENCY, "800 us", 800.0, False),
        (LATENCY, "1.5s", 1.5e6, False),
        (LATENCY, "0.5x", 0.5, True),
        (SIZE, "20MB", 2e7, False),
        (SIZE, "512KiB", 524288.0, False),
        (MACS, "1.2G", 1.2e9, False),
        (MACS, 1_000_000, 1e6, False),
        (MACS, "1x", 1.0, True),
    ],
)
def test_a_budget_is_read_in_the_unit_of_its_quantity(
    quantity: Quantity, given: object, value: float, is_relative: bool
) -> None:
    found = parse_limit(quantity, given)
    assert (found.value, found.is_relative) == (pytest.approx(value, rel=1e-12), is_relative)
    assert found.resolve(40.0) == pytest.approx(40.0 * value if is_relative else value, rel=1e-12)


@pytest.mark.parametrize(
    ("quantity", "given", "words"),
    [
        (LATENCY, "5", "has no unit"),
        (LATENCY, "5msec", "unknown unit 'msec'"),
        (LATENCY, "5MS", "did you mean 'ms'"),
        (SIZE, "20M", "unknown unit 'M'"),
        (SIZE, "20mb", "did you mean 'MB'"),
        (MACS, "1.2g", "did you mean 'G'"),
        (MACS, "0", "can never be met"),
        (MACS, "1.5x", "no share of the original's macs"),
        (MACS, "0x", "no share"),
        (MACS, True, "is no budget"),
        (MACS, float("nan"), "is no budget"),
        (MACS, "-3M", "is no budget"),
        (MACS, "1e999", "is not finite"),
        (DROP, "1pt", "unknown unit 'pt'"),
        (DROP, "0.5x", "unknown unit 'x'"),
        (DROP, 101, "more than there is"),
        (DROP, "", "is no budget"),
    ],
)
def test_a_budget_that_means_nothing_is_refused_with_the_reason(quantity: Quantity, given: object, words: str) -> None:
    with pytest.raises(BudgetError, match=quantity.option) as caught:
        parse_limit(quantity, given)
    assert words in caught.value.found
    assert caught.value.expected


def test_amounts_are_written_with_the_unit_that_fits() -> None:
    assert amount_text(LATENCY, 5000.0) == "5ms"
    assert amount_text(SIZE, 20_480_000.0) == "20.48MB"
    assert amount_text(MACS, 1.2e9) == "1.2G"
    assert amount_text(MACS, 0.0) == "0"
    assert [Limit(DROP, 0.02, is_relative=True).text, Limit(MACS, 0.5, is_relative=True).text] == ["2%", "0.5x"]


def test_only_what_was_given_is_a_budget() -> None:
    found = parse_budgets({DROP: None, MACS: "0.5x", SIZE: "20MB"})
    assert found.drop is None
    assert [limit.quantity for limit in found.resources] == [MACS, SIZE]
    assert found.text == "--macs 0.5x --size 20MB"
    assert not parse_budgets({DROP: None})
