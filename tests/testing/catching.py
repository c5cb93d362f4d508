"""The tester, tested: for every check the bad pass that it must catch, and whether it does."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import replace
from pathlib import Path

from tests.testing import bad
from vlmopt.core.contract import Pass
from vlmopt.testing.harness import check_pass
from vlmopt.testing.results import PassReport
from vlmopt.testing.trial import Memory, Settings

FOLDER = Path(bad.__file__).parent
GOLDEN = FOLDER / "golden"

# check -> file of the pass that it must catch
BAD = {
    "has-a-firing-case": "skip_nothing",
    "knows-its-facts": "drop_with_unknown_fact",
    "keeps-its-options": "drop_by_percent",
    "builds-its-cases": "drop_without_program",
    "runs-to-the-end": "drop_and_raise",
    "ends-in-time": "drop_for_ever",
    "stays-silent": "drop_and_print",
    "leaves-the-process-alone": "drop_and_set",
    "is-deterministic": "drop_at_random",
    "does-nothing-without-fuel": "drop_while_asked",
    "finds-nothing-twice": "insert_scaling",
    "plans-sites-and-refusals": "drop_twice_named",
    "plans-without-editing": "drop_while_planning",
    "fires-as-its-cases-say": "drop_too_little",
    "refuses-as-its-cases-say": "refuse_otherwise",
    "saves-what-it-predicts": "drop_for_nothing",
    "leaves-sound-graphs": "drop_and_break",
    "writes-no-weight": "drop_and_write",
    "edits-no-shared-module": "drop_and_alter",
    "keeps-the-signature": "drop_and_rename",
    "adds-no-alias": "drop_and_return",
    "has-fresh-metadata": "replace_with_old_shape",
    "stamps-what-it-made": "drop_and_claim",
    "returns-what-its-specs-say": "drop_and_widen",
    "keeps-its-promise": "replace_with_limit",
    "keeps-numbers-finite": "replace_with_ratio",
    "stays-dynamic": "drop_and_freeze",
    "is-sound-after-every-site": "replace_by_halves",
    "exports-again": "replace_with_sign",
    "is-accepted-by-the-pipeline": "drop_and_forget",
    "works-in-bfloat16": "replace_with_wide_zero",
    "holds-on-random-programs": "drop_activation",
    "matches-its-golden-text": "drop_otherwise",
    "has-no-orphaned-golden-text": "drop_and_leave",
}
_SETTINGS = Settings(n_programs=1)
_ONLY = {  # what a check needs beside that
    "ends-in-time": {"time_limit_s": 1.0},
    "holds-on-random-programs": {"n_programs": 4},
    "matches-its-golden-text": {"golden": GOLDEN},
    "has-no-orphaned-golden-text": {"golden": GOLDEN},
}


def bad_pass(check: str) -> type[Pass]:
    """The class of the pass that breaks what the check holds passes to, and nothing else."""
    module = importlib.import_module(f"{bad.__name__}.{BAD[check]}")
    (found,) = (
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Pass) and value.__module__ == module.__name__
    )
    return found


def report_on(check: str, *, memory: Memory, checks: tuple[str, ...] = ()) -> PassReport:
    """What the harness says of that pass."""
    settings = replace(_SETTINGS, **_ONLY.get(check, {}))  # type: ignore[arg-type]
    return check_pass(bad_pass(check), checks=checks, settings=settings, memory=memory)


def count_caught() -> tuple[int, int]:
    """How many checks there are, and how many of them catch the bad pass made for them, and only they do."""
    from vlmopt.testing.checks import CHECKS

    memory = Memory()
    caught = [
        check.name in BAD and report_on(check.name, memory=memory).failed_checks == {check.name} for check in CHECKS
    ]
    return len(CHECKS), sum(caught)
