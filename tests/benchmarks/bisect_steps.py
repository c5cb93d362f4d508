"""How many checks `vlmopt bisect` takes to find a fault at any of the 64 sites of a program."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.workflow.sums import passes_of, recipe_of, run_of, sums
from vlmopt.core.program import Program
from vlmopt.verify.bisection import Outcome
from vlmopt.workflow.bisecting.judging import PromiseJudge
from vlmopt.workflow.bisecting.search import search
from vlmopt.workflow.bisecting.states import SiteLine

N_SITES = 64


def bisect_part() -> dict[str, float]:
    """The largest number of checks over all positions of the fault, states and files being real ones."""
    program = sums(N_SITES)
    counts = []
    with tempfile.TemporaryDirectory() as folder:
        with run_of(program, recipe_of({}), Path(folder) / "judge") as judged:
            judge = PromiseJudge(judged)  # one for all searches: a file that was found equal is not written again
            for broken in range(1, N_SITES + 1):
                counts.append(_n_checks(program, broken, judge, Path(folder) / str(broken)))
    return {"bisect_steps_for_64_sites": max(counts)}


def _n_checks(program: Program, broken: int, judge: PromiseJudge, folder: Path) -> int:
    recipe = recipe_of({"broken": broken})
    with run_of(program, recipe, folder) as state:
        line = SiteLine(state, passes_of(recipe))
        verdict, _ = search(state, line, judge)
    if (verdict.outcome, verdict.first, len(line.sites)) != (Outcome.SITE, broken, N_SITES):
        raise RuntimeError(f"a fault at site {broken} was taken for {verdict}")
    return verdict.n_checks
