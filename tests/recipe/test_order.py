from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import pytest

from vlmopt.core.contract import Case, Context, Pass, Plan, Site
from vlmopt.core.errors import RecipeError
from vlmopt.core.facts import CANONICAL, CAPTURED, STREAM_CUT, Fact
from vlmopt.core.program import Program
from vlmopt.recipe import check_order


class _Step(Pass):
    def plan(self, program: Program, context: Context) -> Plan:
        return Plan()

    def apply(self, program: Program, site: Site, context: Context) -> None:
        return None

    @classmethod
    def cases(cls) -> Iterable[Case]:
        return ()


class Clean(_Step):
    name: ClassVar[str] = "clean"
    requires: ClassVar[frozenset[Fact]] = frozenset({CAPTURED})
    produces: ClassVar[frozenset[Fact]] = frozenset({CANONICAL})


class Cut(_Step):
    name: ClassVar[str] = "cut"
    requires: ClassVar[frozenset[Fact]] = frozenset({CANONICAL})
    produces: ClassVar[frozenset[Fact]] = frozenset({STREAM_CUT})
    breaks: ClassVar[frozenset[Fact]] = frozenset({CANONICAL})


def test_an_order_that_fits_returns_the_facts_that_hold_at_the_end() -> None:
    assert check_order([Clean, Cut], initial=[CAPTURED]) == {CAPTURED, STREAM_CUT}
    assert check_order([Clean(), Cut(), Clean()], initial=[CAPTURED]) == {CAPTURED, STREAM_CUT, CANONICAL}


def test_a_fact_that_comes_too_late_is_to_be_moved() -> None:
    with pytest.raises(RecipeError) as caught:
        check_order([Cut, Clean], initial=[CAPTURED])
    assert str(caught.value).startswith("recipe, step 1 ('cut'): 'cut' requires 'canonical' (")
    assert str(caught.value).endswith("which no step before it produces; move step 2 ('clean') before 'cut'")


def test_a_fact_that_was_broken_names_who_broke_it() -> None:
    with pytest.raises(RecipeError) as caught:
        check_order([Clean, Cut, Cut], initial=[CAPTURED])
    assert "step 3 ('cut')" in str(caught.value)
    assert str(caught.value).endswith("which step 2 ('cut') breaks; put 'clean' before 'cut'")


def test_a_fact_that_nobody_in_the_recipe_produces_names_the_passes_that_would() -> None:
    with pytest.raises(RecipeError, match="put 'canonicalize' or 'tidy' before 'cut'"):
        check_order([Cut], initial=[CAPTURED], producers={"canonical": ("tidy", "canonicalize")})
    with pytest.raises(RecipeError, match="no known pass produces it"):
        check_order([Clean], initial=[])
