"""A pass as its own cases show it: what it finds and refuses on each, and the graphs before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmopt.core.contract import Case, Pass
from vlmopt.core.errors import VlmoptError
from vlmopt.core.guarding import DEFAULT_TIME_LIMIT_S
from vlmopt.core.progress import Progress, Silent
from vlmopt.registry import build_case, cases_of, instantiate, load_pass
from vlmopt.rewrite.pipeline import run_step
from vlmopt.workflow.watching.observing import program_diff


@dataclass(frozen=True)
class ShownCase:
    """One case of a pass, run. `diff` is a unified diff of the graphs; `error` says in one line why there is none."""

    name: str
    options: dict[str, object]
    sites: tuple[str, ...]
    refusals: tuple[str, ...]  # "candidate: reason"
    before: dict[str, str]
    after: dict[str, str]
    diff: tuple[str, ...]
    error: str = ""


def show_cases(
    name: str,
    pass_dirs: Sequence[Path] = (),
    *,
    progress: Progress | None = None,
    time_limit_s: float = DEFAULT_TIME_LIMIT_S,
) -> tuple[ShownCase, ...]:
    """Every case of a pass, run; a case that fails says so, and the others are shown all the same.

    Args:
        name: of the pass, or the path of its `.py` file.

    Raises:
        PassError: there is no such pass, or its cases cannot be read.
    """
    progress = progress or Silent()
    pass_class = load_pass(name, pass_dirs, time_limit_s=time_limit_s)
    cases = cases_of(pass_class, time_limit_s=time_limit_s)
    return tuple(
        _shown(pass_class, case, time_limit_s) for case in progress.track(cases, f"cases of {pass_class.name}")
    )


def _shown(pass_class: type[Pass], case: Case, time_limit_s: float) -> ShownCase:
    try:
        pass_ = instantiate(pass_class, case.options)
        program = build_case(pass_class, case, time_limit_s=time_limit_s)
        result = run_step(program, pass_, case.context, step=1, time_limit_s=time_limit_s)
    except VlmoptError as error:
        return ShownCase(case.name, dict(case.options), (), (), {}, {}, (), error.one_line())
    return ShownCase(
        case.name,
        dict(case.options),
        tuple(site.name for site in result.applied),
        tuple(f"{refusal.name}: {refusal.reason}" for refusal in result.refusals),
        result.text_before,
        result.text_after,
        tuple(program_diff(program, result.program)),
    )
