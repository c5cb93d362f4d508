"""`vlmopt bisect`: the one site after which something is wrong, written out as a failing case."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from vlmopt import __version__
from vlmopt.core.contract import Context, Pass
from vlmopt.core.errors import RecipeError
from vlmopt.core.guarding import DEFAULT_TIME_LIMIT_S
from vlmopt.core.ledger import Ledger
from vlmopt.core.machine import versions
from vlmopt.core.manifest import sha256_of
from vlmopt.core.progress import Progress, Silent
from vlmopt.graph.excerpt import changes_between
from vlmopt.recipe.loading import recipe_digest
from vlmopt.recipe.schema import PassStep, Recipe
from vlmopt.registry import find_pass
from vlmopt.rundir import LOG, RunDirectory
from vlmopt.verify.bisection import Answer, Outcome, Verdict, first_bad, most_checks
from vlmopt.workflow.bisecting.failing_case import (
    CHECKS,
    Found,
    publish_case,
    refuse_existing_case,
    shows_alone,
    write_case,
)
from vlmopt.workflow.bisecting.findings import Fault, Finding
from vlmopt.workflow.bisecting.judging import Judge, judge_state, judges_drop, make_judge, refuse_unknown_command
from vlmopt.workflow.bisecting.single_site import SingleSite, shrunk
from vlmopt.workflow.bisecting.states import NumberedSite, SiteLine
from vlmopt.workflow.choosing import given_profile
from vlmopt.workflow.opening import open_recipe, open_task
from vlmopt.workflow.optimizing import load_passes, set_up
from vlmopt.workflow.profiling import digest
from vlmopt.workflow.refusing import SITE_OPTIONS, refuse_early
from vlmopt.workflow.run_state import RunState

_N_NODES = 4  # names of changed nodes in the summary


def bisect(
    recipe: Recipe,
    output: Path | None = None,
    *,
    check: str | None = None,
    force: bool = False,
    time_limit_s: float = DEFAULT_TIME_LIMIT_S,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Finds the site after which something is wrong and writes it out as a failing case; returns what was found.

    Args:
        output: folder of the case; `bisect-PASS` where it is not given.
        check: shell command that says whether a state is good (0), bad, or cannot be told (125); without it a state is
            good when promises, finite outputs, emitted files and the drop on the validation split are as a run wants.
        time_limit_s: for every call of a pass; one that takes longer is what is looked for.

    Raises:
        VlmoptError: the recipe, the command or the output cannot be used.
    """
    show = progress or Silent()
    passes = load_passes(recipe, time_limit_s=time_limit_s)
    refuse_early(recipe)
    if recipe.planning == "together":
        raise RecipeError(
            "planning",
            "is together, and a search for a site needs sites that are written out",
            remedy="bisect the recipe.yaml that the run wrote, or set planning: in-turn",
        )
    if check is not None:
        refuse_unknown_command(check)
    if output is not None:
        refuse_existing_case(output, force=force)
    with _opened(recipe, scratch_path(output), check, show) as state:
        result = bisect_state(state, passes, output, check=check, force=force, time_limit_s=time_limit_s)
        state.run.discard()
    return result


def bisect_state(
    state: RunState,
    passes: Sequence[Pass],
    output: Path | None = None,
    *,
    check: str | None = None,
    force: bool = False,
    time_limit_s: float = DEFAULT_TIME_LIMIT_S,
) -> dict[str, Any]:
    """The same on a run that is set up, with its passes loaded; the answers stay in the run's folder."""
    line = SiteLine(state, passes, time_limit_s=time_limit_s)
    judge = make_judge(state, check)
    verdict, findings = search(state, line, judge)
    result = _result(line, verdict, findings)
    if verdict.outcome is Outcome.SITE:
        result |= _case(state, line, verdict.first, findings[verdict.first], check, output, force=force)
    result["line"] = summary(result)
    if verdict.outcome is Outcome.NOTHING and check is None and judges_drop(state):
        result["line"] += "; the metric was judged on the validation split, and the gate of a run judges the test split"
    return result


def scratch_path(output: Path | None) -> Path:
    """The name under which a search keeps its answers until it is done."""
    path = output or Path("bisect")
    return path.with_name(f"{path.name}.search")


def judge_again(recipe: Recipe, *, step: int, site: str | None, check: str | None = None) -> Finding:
    """What is wrong after this site of the recipe, everything before it applied; what a written case calls."""
    passes = load_passes(recipe)
    with tempfile.TemporaryDirectory() as folder, _opened(recipe, Path(folder) / "again", check, Silent()) as state:
        line = SiteLine(state, passes)
        judge = make_judge(state, check)
        return judge_state(line, line.number_of(step, site), judge)


def _counted(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def summary(result: dict[str, Any]) -> str:
    """One line that says where the fault is and what is wrong."""
    n = ", ".join(_counted(result[f"n_{what}s"], what) for what in ("site", "check"))
    if result["outcome"] == Outcome.NOTHING.name.lower():
        return f"nothing is bad ({n})"
    if result["outcome"] == Outcome.ORIGINAL.name.lower():
        return f"the original is bad before any pass: {result['found']} ({n})"
    sites = result["sites"]
    if result["outcome"] == Outcome.RANGE.name.lower():
        names = " or ".join([*(site["name"] for site in sites), *result["or"]])
        return f"the check could not tell more than that it is {names} ({n})"
    site = sites[0]
    more = len(site["nodes"]) - _N_NODES
    shown = [*site["nodes"][:_N_NODES], *([f"{more} more"] if more > 0 else [])]
    nodes = f", nodes {', '.join(shown)}" if shown else ""
    if site["component"] is None:
        return f"{result['found']} ({n})"  # a plan failed, and what was found says whose
    where = f"site {site['number']}, {site['name']} of step {site['step']} {site['pass']}"
    return f"{where} (component {site['component']}{nodes}): {result['found']} ({n})"


@contextmanager
def _opened(recipe: Recipe, scratch: Path, check: str | None, show: Progress) -> Iterator[RunState]:
    """The run before its first pass; answers of an interrupted search are kept for the same one."""
    opened = open_recipe(recipe, progress=show)
    bound = None if recipe.task is None else open_task(opened, recipe.task, seed=recipe.seed, progress=show)
    profile = None if bound is None else given_profile(recipe, bound)
    task = "" if bound is None else bound.task.fingerprint
    sources = [sha256_of(find_pass(step.name, [Path(d) for d in recipe.pass_dirs]).file) for step in recipe.passes]
    source = opened.program.source.fingerprint
    key = digest([__version__, versions(), recipe_digest(recipe), source, task, check, *sources])
    with RunDirectory(scratch, key=key) as run:
        if run.has_resumed:
            show.message(f"taking up the answers in {run.partial}; remove it to begin anew")
        state = RunState(recipe, run, opened, bound, Ledger(), show, profile=profile)
        set_up(state)
        yield state


def search(state: RunState, line: SiteLine, judge: Judge) -> tuple[Verdict, dict[int, Finding]]:
    """The verdict, and what was found in every state that was looked at; answers known already are taken up."""
    findings: dict[int, Finding] = {}
    most = most_checks(len(line.sites))

    def check(number: int) -> Answer:
        step = f"answers/{number:06d}"
        known = state.run.finished(step)
        if known is not None:
            findings[number] = Finding(Answer(known["answer"]), Fault(known["fault"]), known["text"])
        else:
            sites = f"{number} of {len(line.sites)} sites"
            with state.progress.stage(f"check {len(findings) + 1} of at most {most}: {sites}"):
                found = findings[number] = judge_state(line, number, judge)
            state.run.finish(step, {"answer": found.answer.value, "fault": found.fault.value, "text": found.text})
        state.progress.message(f"  {findings[number].answer.value} {findings[number].text}".rstrip())
        return findings[number].answer

    return first_bad(len(line.sites), check), findings


def _result(line: SiteLine, verdict: Verdict, findings: dict[int, Finding]) -> dict[str, Any]:
    suspects = line.sites[max(verdict.first - 1, 0) : verdict.last]
    wrong = findings.get(verdict.last)
    others = []
    if verdict.outcome is Outcome.RANGE:
        others += ["the original"] if verdict.first == 0 else []
        others += ["nothing at all"] if verdict.last > len(line.sites) else []
    return {
        "outcome": verdict.outcome.name.lower(),
        "n_sites": len(line.sites),
        "n_checks": verdict.n_checks,
        "at_most": most_checks(len(line.sites)),
        "fault": Fault.NONE.value if wrong is None else wrong.fault.value,
        "found": "" if wrong is None or verdict.outcome is Outcome.NOTHING else wrong.text,
        "sites": [_site(suspect) for suspect in suspects],
        "or": others,
        "checks": [
            {"sites": number, "answer": answer.value, "text": findings[number].text}
            for number, answer in verdict.answers
        ],
        "case": None,
    }


def _site(suspect: NumberedSite) -> dict[str, Any]:
    site = suspect.site
    return {
        "number": suspect.number,
        "step": suspect.step,
        "pass": suspect.pass_.name,
        "name": "its plan" if site is None else site.name,
        "component": None if site is None else site.component,
        "summary": "" if site is None else site.summary,
        "nodes": [],
    }


def _case(
    state: RunState,
    line: SiteLine,
    number: int,
    finding: Finding,
    check: str | None,
    output: Path | None,
    *,
    force: bool,
) -> dict[str, Any]:
    """Writes the failing case; returns what the result says about it."""
    suspect, before = line.sites[number - 1], line.before(number)
    after = line.after(number)
    site = _site(suspect)
    part = None if suspect.site is None else suspect.site.component
    if after is not None and part in before.components and part in after.components:
        changes = changes_between(before.components[part], after.components[part])
        site["nodes"] = list(changes.names)
    found = Found(
        title=f"{site['name']} of step {suspect.step} {suspect.pass_.name}",
        finding=finding,
        recipe=_resolved(state.recipe, line),
        step=suspect.step - _n_dropped(state.recipe, line, suspect.step - 1),
        pass_name=suspect.pass_.name,
        options=state.recipe.passes[suspect.step - 1].options,
        site=suspect.site,
        before=before,
        after=after,
        case=None if check is not None else _alone(state, line, suspect, finding.fault),
        check=check,
    )
    with state.progress.stage("writing the failing case"):
        folder = state.run.work("case")
        shutil.rmtree(folder)  # what a try that was stopped had written
        folder.mkdir()
        if check is not None:
            shutil.copyfile(state.run.path(LOG), folder / CHECKS)
        is_alone = write_case(found, folder)
        final = publish_case(folder, output, suspect.pass_.name, force=force)
    n_nodes = None
    if found.case is not None and is_alone:
        n_nodes = sum(len(p.graph.graph.nodes) for p in found.case.program.components.values())
    return {"sites": [site], "case": str(final), "needs_model": not is_alone, "n_nodes": n_nodes}


def _alone(state: RunState, line: SiteLine, suspect: NumberedSite, fault: Fault) -> SingleSite | None:
    """The site on its own, as small as it still fails; None where the fault does not show so."""
    if not shows_alone(fault):
        return None
    program = line.before(suspect.number)
    if tuple(suspect.pass_.wants(program)):  # its case would need the task as well
        return None
    context = Context(importance=line.importance(suspect.number), seed=state.recipe.seed)
    case = SingleSite(
        program,
        state.sample_feeds(program),
        suspect.pass_,
        suspect.step,
        suspect.site,
        context,
        time_limit_s=line.time_limit_s,
    )
    if fault is Fault.PROMISE and case.judge().fault is not fault:  # the sites of the step add up
        first = line.step_before(suspect.number)
        case = replace(case, reference=first, feeds={**state.sample_feeds(first), **case.feeds})
    wrong = case.judge(files=fault is Fault.FILE)
    return shrunk(case, line.after(suspect.number), wrong) if wrong.fault is fault else None


def _n_dropped(recipe: Recipe, line: SiteLine, n_steps: int) -> int:
    """How many of the first steps `_resolved` leaves out."""
    steps = list(zip(recipe.passes, line.planned(), strict=False))[:n_steps]
    return sum(step.name in SITE_OPTIONS and sites == () for step, sites in steps)


def _resolved(recipe: Recipe, line: SiteLine) -> Recipe:
    """The recipe with the sites that the planner chose written out, without steps where it chose none."""
    passes = []
    for step, sites in zip_longest(recipe.passes, line.planned()):
        option = SITE_OPTIONS.get(step.name)
        if sites is None or option is None:
            passes.append(step)
        elif sites:
            passes.append(PassStep(name=step.name, options={**step.options, option: list(sites)}))
    return recipe.model_copy(update={"passes": tuple(passes)})
