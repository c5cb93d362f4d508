from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Site
from vlmopt.core.errors import RecipeError
from vlmopt.core.facts import CANONICAL, CAPTURED, STREAM_CUT, Fact
from vlmopt.core.program import Program
from vlmopt.recipe import check_order
from vlmopt.registry import PassInfo


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


def known(*passes: type[Pass]) -> dict[str, tuple[PassInfo, ...]]:
    """What the registry would say of these passes."""
    facts: dict[str, tuple[PassInfo, ...]] = {}
    for step in passes:
        sets = [tuple(sorted(f.name for f in found)) for found in (step.requires, step.produces, step.breaks)]
        info = PassInfo(step.name, "", Promise.EXACT, *sets, "", "", Path(), "", "")
        for fact in sets[1]:
            facts[fact] = (*facts.get(fact, ()), info)
    return facts


def declared(name: str, requires: str, produces: str, breaks: str = "") -> type[Pass]:
    """A pass of this name; facts are one letter each."""
    sets = (frozenset(Fact(letter, "") for letter in letters) for letters in (requires, produces, breaks))
    return type(name, (_Step,), {"name": name, **dict(zip(("requires", "produces", "breaks"), sets, strict=True))})


def message(*passes: type[Pass], initial: str = "", installed: Sequence[type[Pass]] = ()) -> str:
    with pytest.raises(RecipeError) as caught:
        check_order(passes, initial=[Fact(letter, "") for letter in initial], producers=known(*installed))
    return str(caught.value)


class Tidy(_Step):
    name: ClassVar[str] = "tidy"
    produces: ClassVar[frozenset[Fact]] = frozenset({CANONICAL})


def test_a_fact_that_nobody_in_the_recipe_produces_names_the_passes_that_would() -> None:
    with pytest.raises(RecipeError, match="put 'clean' or 'tidy' before 'cut'"):
        check_order([Cut], initial=[CAPTURED], producers=known(Tidy, Clean))
    with pytest.raises(RecipeError, match="no known pass produces it: leave 'clean' out"):
        check_order([Clean], initial=[])


def test_a_pass_that_would_produce_the_fact_but_cannot_work_there_is_not_advised() -> None:
    with pytest.raises(RecipeError, match="put 'tidy' before 'cut'"):
        check_order([Cut], initial=[], producers=known(Tidy, Clean))


def test_a_fact_that_takes_several_passes_names_them_in_order() -> None:
    a, b, c = declared("a", "x", "y"), declared("b", "y", "z"), declared("c", "z", "")
    assert message(c, initial="x", installed=(a, b)).endswith("put 'a', then 'b' before 'c'")
    assert message(c, b, initial="x", installed=(a,)).endswith("put 'a', then 'b' before 'c' (moving step 2)")


def test_passes_that_require_each_other_are_named_as_a_circle() -> None:
    a, b = declared("a", "g", "f"), declared("b", "f", "g")
    expected = (
        "they require each other in a circle: 'a' requires 'g', which only 'b' produces, "
        "and 'b' requires 'f', which only 'a' produces, and 'a' requires 'g'; no order works: leave 'a' out"
    )
    assert message(a, b).endswith(expected)
    assert "in a circle" in message(b, installed=(a,))
    assert message(a, b, installed=(declared("c", "", "g"),)).endswith("put 'c' before 'a'")
    alone = declared("alone", "f", "f")
    assert "'alone' requires 'f', which only 'alone' produces" in message(alone)


def test_a_producer_that_lacks_what_nobody_produces_is_no_way_out() -> None:
    a, b = declared("a", "g", "f"), declared("b", "f", "")
    expected = "no known pass produces 'g': 'b' requires 'f', which only 'a' produces, and 'a' requires 'g'"
    assert message(b, installed=(a,)).endswith(f"{expected}; leave 'b' out")


def test_facts_that_undo_each_other_cannot_be_had_at_once() -> None:
    a, b, c = declared("a", "", "f", "g"), declared("b", "", "g", "f"), declared("c", "fg", "")
    assert message(a, b, c).endswith("no order of the known passes gives 'f' and 'g' at once; leave 'c' out")


FACTS = st.text("fgh", max_size=2)


@st.composite
def recipes(draw: st.DrawFn) -> tuple[list[type[Pass]], list[type[Pass]], str]:
    def made(name: str) -> type[Pass]:
        produces = draw(FACTS)
        breaks = "".join(letter for letter in draw(FACTS) if letter not in produces)
        return declared(name, draw(FACTS), produces, breaks)

    installed = [made(name) for name in "abcd"[: draw(st.integers(1, 4))]]
    steps = draw(st.lists(st.sampled_from(installed), min_size=1, max_size=4))
    return steps, installed, draw(FACTS)


def follow(remedy: str, steps: list[type[Pass]], index: int, by_name: Mapping[str, type[Pass]]) -> list[type[Pass]]:
    """The recipe as somebody makes it who does what the remedy says, and nothing else."""
    moved = {int(n) - 1 for part in re.findall(r"step (\d+(?: and \d+)*)", remedy) for n in part.split(" and ")}
    names = re.findall(r"'(\w+)'", remedy)[:-1]
    if " or " in remedy:
        names = names[-1:]  # whichever the reader likes
    rest = [step for n, step in enumerate(steps) if n > index and n not in moved]
    return [*steps[:index], *(by_name[name] for name in names), steps[index], *rest]


@settings(max_examples=300, derandomize=True, deadline=None)
@given(recipes())
def test_following_the_remedies_makes_a_recipe_pass_or_nobody_can(
    drawn: tuple[list[type[Pass]], list[type[Pass]], str],
) -> None:
    steps, installed, letters = drawn
    initial = [Fact(letter, "") for letter in letters]
    by_name = {step.name: step for step in installed}
    for _ in range(20):
        try:
            check_order(steps, initial=initial, producers=known(*installed))
        except RecipeError as error:
            index = int(re.findall(r"step (\d+)", error.place)[0]) - 1
            if error.remedy.endswith("out"):
                assert not is_possible(steps, index, initial, installed)
                steps = [*steps[:index], *steps[index + 1 :]]
            else:
                steps = follow(error.remedy, steps, index, by_name)
                check_order(steps[: index + 1], initial=initial)  # as far as before, and the way to the step as well
        else:
            return
    pytest.fail("the remedies lead nowhere")


def is_possible(
    steps: Sequence[type[Pass]], index: int, initial: Sequence[Fact], installed: Sequence[type[Pass]]
) -> bool:
    """Whether up to four passes put before the step make it work."""
    for n in range(5):
        for added in itertools.product(installed, repeat=n):
            with contextlib.suppress(RecipeError):
                check_order([*steps[:index], *added, steps[index]], initial=initial)
                return True
    return False
