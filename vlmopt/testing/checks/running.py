"""Does the pass run at all, in time and in silence; the same every time, and nothing when it may do nothing?"""

from __future__ import annotations

from vlmopt.core.contract import StatRequest
from vlmopt.core.errors import PassError
from vlmopt.core.program import Program
from vlmopt.rewrite.pipeline import clone_program, program_text, run_step
from vlmopt.testing.attempt import Attempt, edits_of, own_copy
from vlmopt.testing.calls import error_text, watched
from vlmopt.testing.checks.check import PLAN, PROGRAM, RESULT, CaseCheck
from vlmopt.testing.trial import Finding, Outcome, Trial


def builds_its_cases(trial: Trial) -> Outcome:
    try:
        trial.program  # noqa: B018 - built on first use
    except PassError as error:
        return Finding.of(error)
    return None


def runs_to_the_end(trial: Trial) -> Outcome:
    for call in trial.attempt.calls:
        if call.error is not None:
            return Finding(
                f"{call.action} raised {error_text(call.error, trial.subject.file)}",
                expected="a result, or a Refusal with its reason",
            )
    return None


def ends_in_time(trial: Trial) -> Outcome:
    for call in trial.attempt.calls:
        if call.done.has_expired:
            found = f"{call.action} is not done after {trial.settings.time_limit_s:g} s"
            return Finding(found, remedy="allow more with --time-limit, if it is slow by right")
    return None


def stays_silent(trial: Trial) -> Outcome:
    for call in trial.attempt.calls:
        if call.printed is not None:
            return Finding(
                f"{call.action} printed {call.printed[:80]!r}",
                expected="no output",
                remedy="say it in Site.summary or Refusal.reason, or with logging",
            )
    return None


def leaves_the_process_alone(trial: Trial) -> Outcome:
    for call in trial.attempt.calls:
        if call.changes:
            return Finding(f"{call.action} changed {call.changes[0]}", expected="a process left as it was")
    return None


def is_deterministic(trial: Trial) -> Outcome:
    found = _otherwise(trial, trial.rebuilt())
    if not found:
        return None
    again = _otherwise(trial, trial.program)  # is it the pass, or the case that is never built twice alike?
    where = f"run a second time, {again}" if again else f"run on the case built anew, {found}"
    return Finding(where, expected="the same plan and the same graph every time")


def _otherwise(trial: Trial, program: Program) -> str:
    """What the pass does otherwise than the first time, in words; empty if nothing."""
    first, again = trial.attempt, trial.attempt_on(program)
    if not again.is_complete:
        return "it does not get to the end"
    if again.plan != first.plan:
        return f"it plans {_plan_difference(first, again)}"
    return "it leaves another graph" if again.texts != first.texts else ""


def _plan_difference(first: Attempt, again: Attempt) -> str:
    for name in ("sites", "refusals"):
        old, new = getattr(first.plan, name), getattr(again.plan, name)
        for before, after in zip(old, new, strict=False):
            if before != after:
                return f"{after}, and before {before}"
        if len(old) != len(new):
            return f"{len(new)} {name}, and before {len(old)}"
    return "other flags"


def does_nothing_without_fuel(trial: Trial) -> Outcome:
    """What it wants and what it plans may be asked at any time; with no fuel that is all that happens."""
    limit = trial.settings.time_limit_s
    idle = trial.attempt_on(trial.program, n_sites=0)
    clone = clone_program(idle.before)
    wants = watched(lambda: tuple(trial.pass_.wants(clone)), "wants", time_limit_s=limit)
    if not wants.has_returned:
        why = f"raised {error_text(wants.error, trial.subject.file)}" if wants.error else "takes too long"
        return Finding(f"wants {why}", expected="the statistics to collect")
    if not all(isinstance(request, StatRequest) for request in wants.value()):
        return Finding(f"wants {wants.value()!r}", expected="StatRequests")
    edits = edits_of(clone, idle.snapshot, idle.before) or edits_of(idle.program, idle.snapshot, idle.before)
    if edits:
        return Finding(f"{edits}, though no site was applied", expected="a program as it was")
    step = run_step(own_copy(trial.program), trial.pass_, trial.case.context, step=1, fuel=0, time_limit_s=limit)
    if step.applied or step.text_after != program_text(trial.program):
        return Finding("the pipeline without fuel leaves another program", expected="a program as it was")
    return None


def finds_nothing_twice(trial: Trial) -> Outcome:
    first = trial.attempt
    second = trial.attempt_on(first.program)
    error = second.planning.error
    if error is not None and isinstance(error, PassError) and "matches nothing" in str(error):
        return None if first.applied and trial.case.options else Finding(error_text(error))  # those named are gone
    failed = next((call for call in second.calls if not call.has_returned), None)
    if failed is not None:
        why = f"raises {error_text(failed.error, trial.subject.file)}" if failed.error else "takes too long"
        return Finding(f"on its own result {failed.action} {why}", expected="nothing left to do")
    if second.applied:
        n, names = len(second.applied), ", ".join(site.name for site in second.applied[:3])
        return Finding(f"on its own result it fires {n} times more ({names})", expected="nothing left to do")
    return None


CHECKS = (
    CaseCheck("builds-its-cases", "the program of every case can be built", builds_its_cases, is_general=True),
    CaseCheck("runs-to-the-end", "plan and apply raise nothing", runs_to_the_end, PROGRAM, is_general=True),
    CaseCheck("ends-in-time", "plan and apply end within the time limit", ends_in_time, PROGRAM, is_general=True),
    CaseCheck("stays-silent", "nothing is printed", stays_silent, PROGRAM, is_general=True),
    CaseCheck(
        "leaves-the-process-alone",
        "working directory, environment and torch's settings stay as they are",
        leaves_the_process_alone,
        PROGRAM,
        is_general=True,
    ),
    CaseCheck(
        "is-deterministic",
        "run again on the case built anew, it plans and leaves the same",
        is_deterministic,
        RESULT,
        is_general=True,
    ),
    CaseCheck(
        "does-nothing-without-fuel",
        "asked what it wants and what it plans, with no site to apply, it changes nothing",
        does_nothing_without_fuel,
        (*PLAN, "plans-without-editing"),
    ),
    CaseCheck(
        "finds-nothing-twice", "on its own result it fires no more", finds_nothing_twice, RESULT, is_general=True
    ),
)
