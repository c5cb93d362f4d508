"""Holds a pass to its word: makes every check, and hands out what each says as it is known."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vlmopt.core.contract import Case, Pass
from vlmopt.core.errors import PassError
from vlmopt.core.program import Program
from vlmopt.registry import load_pass, suggest
from vlmopt.testing.checks import CHECKS, CaseCheck, Check, PassCheck
from vlmopt.testing.results import CheckResult, PassReport, Verdict
from vlmopt.testing.trial import Blocked, Finding, Inapplicable, Memory, Outcome, Settings, Subject, Trial

CATALOGUE = {check.name: check for check in CHECKS if isinstance(check, CaseCheck)}


def check_pass(
    pass_: type[Pass] | str,
    *,
    pass_dirs: Sequence[Path] = (),
    checks: Sequence[str] = (),
    settings: Settings | None = None,
    memory: Memory | None = None,
) -> PassReport:
    """What every check, or each of those named, says of a pass. Never raises for what the pass does.

    Args:
        pass_: its class, its name, or the path of its file.
        memory: what several passes may share; saves time.

    Raises:
        PassError: the pass cannot be loaded, or a check does not exist.
    """
    start = time.perf_counter()
    subject = subject_of(pass_, pass_dirs=pass_dirs, settings=settings, memory=memory)
    results = tuple(result for check in select(checks) for result in results_of(check, subject))
    return PassReport(subject.name, results, time.perf_counter() - start)


def check_on(
    pass_: type[Pass] | str,
    program: Program,
    *,
    pass_dirs: Sequence[Path] = (),
    options: Mapping[str, object] | None = None,
    settings: Settings | None = None,
) -> PassReport:
    """What every check that must hold on any program says of a pass on this one."""
    start = time.perf_counter()
    subject = subject_of(pass_, pass_dirs=pass_dirs, settings=settings)
    trial = Trial(subject, Case("the program", lambda: program, 0, (), options or {}))
    results = tuple(result_on(check, subject, trial) for check in CATALOGUE.values() if check.is_general)
    return PassReport(subject.name, results, time.perf_counter() - start)


def subject_of(
    pass_: type[Pass] | str,
    *,
    pass_dirs: Sequence[Path] = (),
    settings: Settings | None = None,
    memory: Memory | None = None,
) -> Subject:
    """A pass ready to be checked; PassError where it cannot be loaded."""
    settings = settings or Settings()
    pass_class = load_pass(pass_, pass_dirs, time_limit_s=settings.time_limit_s) if isinstance(pass_, str) else pass_
    return Subject(pass_class, settings, memory)


def select(names: Sequence[str]) -> tuple[Check, ...]:
    """The checks of these names, in the order in which they are made; all without names."""
    known = {check.name for check in CHECKS}
    for name in names:
        if name not in known:
            raise PassError(f"check {name!r}", "there is no check of that name", remedy=suggest(name, known))
    return tuple(check for check in CHECKS if not names or check.name in names)


def results_of(check: Check, subject: Subject) -> Iterator[CheckResult]:
    """What one check says: of the pass, or of each of its cases."""
    if isinstance(check, PassCheck):
        yield _result(check, subject, "", check.outcome(subject, CATALOGUE))
        return
    for trial in subject.trials:
        yield result_on(check, subject, trial)


def result_on(check: CaseCheck, subject: Subject, trial: Trial) -> CheckResult:
    """What one check says of one case."""
    return _result(check, subject, trial.case.name, check.outcome(trial, CATALOGUE))


def _result(check: Check, subject: Subject, case: str, outcome: Outcome) -> CheckResult:
    if isinstance(outcome, Finding):
        found = (outcome.found, outcome.expected, outcome.remedy)
        return CheckResult(subject.name, check.name, case, Verdict.FAILED, *found)
    if isinstance(outcome, Blocked):
        return CheckResult(subject.name, check.name, case, Verdict.NOT_RUN, outcome.reason)
    if isinstance(outcome, Inapplicable):
        return CheckResult(subject.name, check.name, case, Verdict.NOT_APPLICABLE, outcome.reason)
    return CheckResult(subject.name, check.name, case, Verdict.PASSED)
