"""The cases of a pass, which its author wrote, asked for and built under guard."""

from __future__ import annotations

from collections.abc import Callable

from vlmopt.core.contract import Case, Context, Pass
from vlmopt.core.errors import PassError
from vlmopt.core.guarding import DEFAULT_TIME_LIMIT_S, Owner, guarded_call
from vlmopt.core.program import Program


def cases_of(pass_class: type[Pass], *, time_limit_s: float = DEFAULT_TIME_LIMIT_S) -> tuple[Case, ...]:
    """The cases of a pass.

    Raises:
        PassError: `cases` fails, or gives something else than cases with a name each.
    """
    place = f"pass {pass_class.name}, cases"
    cases: tuple[object, ...] = guarded_call(
        lambda: tuple(pass_class.cases()),
        place=place,
        owner=Owner.of(pass_class, pass_class.name),
        time_limit_s=time_limit_s,
    )
    known: dict[str, Case] = {}
    for case in cases:
        if not isinstance(case, Case):
            raise PassError(place, f"hold a {type(case).__name__}", expected="a Case")
        _check(case, f"{place}, {case.name!r}")
        if case.name in known:
            raise PassError(place, f"two are named {case.name!r}", expected="names that are unique")
        known[case.name] = case
    return tuple(known.values())


def build_case(pass_class: type[Pass], case: Case, *, time_limit_s: float = DEFAULT_TIME_LIMIT_S) -> Program:
    """The program of a case.

    Raises:
        PassError: building it fails, or gives something else than a program.
    """
    place = f"pass {pass_class.name}, case {case.name!r}, build"
    build: Callable[[], object] = case.build
    program = guarded_call(build, place=place, owner=Owner.of(pass_class, pass_class.name), time_limit_s=time_limit_s)
    if not isinstance(program, Program):
        expected = "a Program (vlmopt.graph.example.program_of makes one)"
        raise PassError(place, f"gave a {type(program).__name__}", expected=expected)
    return program


def _check(case: Case, place: str) -> None:
    if not (isinstance(case.name, str) and case.name.strip()):
        raise PassError(place, "the case has no name", expected="a few words")
    if not isinstance(case.n_sites, int) or case.n_sites < 0:
        raise PassError(place, f"n_sites is {case.n_sites!r}", expected="how many times the pass fires")
    if not (isinstance(case.refusals, tuple) and all(isinstance(reason, str) and reason for reason in case.refusals)):
        raise PassError(place, f"refusals is {case.refusals!r}", expected='a tuple of reasons: ("the reason",)')
    if not callable(case.build):
        raise PassError(place, f"build is {case.build!r}", expected="a function that makes the program")
    if not isinstance(case.context, Context):
        raise PassError(place, f"context is {case.context!r}", expected="a Context")
