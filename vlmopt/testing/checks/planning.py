"""Is the plan one, is it made without editing, and does it say what the cases say?"""

from __future__ import annotations

from vlmopt.core.cost import Cost
from vlmopt.graph.costing import program_cost
from vlmopt.testing.checks.check import PLAN, PROGRAM, RESULT, CaseCheck
from vlmopt.testing.trial import Finding, Outcome, Trial


def plans_sites_and_refusals(trial: Trial) -> Outcome:
    problem = trial.attempt.plan_problem
    return Finding(problem, expected="a Plan of sites and refusals") if problem else None


def plans_without_editing(trial: Trial) -> Outcome:
    edits = trial.attempt.plan_edits
    return Finding(f"plan {edits}", expected="a plan that only reads") if edits else None


def fires_as_its_cases_say(trial: Trial) -> Outcome:
    found, wanted = trial.attempt, trial.case.n_sites
    n = len(found.plan.sites)
    if n != wanted:
        names = ", ".join(site.name for site in found.plan.sites[:3])
        return Finding(f"plans {n} sites" + (f" ({names})" if names else ""), expected=f"{wanted}, as n_sites says")
    if wanted and not found.applied and not found.broken:
        return Finding(f"none of its {n} sites changed anything", expected="at least one that does")
    return None


def refuses_as_its_cases_say(trial: Trial) -> Outcome:
    refusals, wanted = trial.attempt.plan.refusals, trial.case.refusals
    for reason in wanted:
        if not any(reason in refusal.reason for refusal in refusals):
            given = "; ".join(dict.fromkeys(refusal.reason for refusal in refusals)) or "nothing"
            return Finding(f"refuses {given}", expected=f"a refusal that says {reason!r}")
    for refusal in refusals:
        if not any(reason in refusal.reason for reason in wanted):
            found = f"refuses {refusal.name}: {refusal.reason}"
            return Finding(found, expected="no other refusals than the case names", remedy="name it in the case")
    return None


def saves_what_it_predicts(trial: Trial) -> Outcome:
    found = trial.attempt
    predicted = sum((site.saving for site in found.applied), Cost())
    counted = program_cost(found.before) - program_cost(found.program)
    wrong = [name for name, value in predicted.as_dict().items() if value != counted.as_dict()[name]]
    if not wrong:
        return None
    pairs = ", ".join(f"{name} {predicted.as_dict()[name]} against {counted.as_dict()[name]}" for name in wrong)
    return Finding(
        f"predicted against counted: {pairs}",
        expected="the same number",
        remedy="vlmopt.graph.costing.nodes_cost counts what dies with some nodes",
    )


CHECKS = (
    CaseCheck(
        "plans-sites-and-refusals",
        "the plan holds sites and refusals of components that exist, each site under its own name",
        plans_sites_and_refusals,
        (*PROGRAM, "runs-to-the-end", "ends-in-time"),
        is_general=True,
    ),
    CaseCheck(
        "plans-without-editing",
        "planning changes neither graphs nor weights nor what the program says of itself",
        plans_without_editing,
        (*PROGRAM, "runs-to-the-end", "ends-in-time"),
        is_general=True,
    ),
    CaseCheck(
        "fires-as-its-cases-say", "there are as many sites as the case says, and they do something",
        fires_as_its_cases_say, PLAN,
    ),
    CaseCheck(
        "refuses-as-its-cases-say", "there are the refusals that the case names, and no others",
        refuses_as_its_cases_say, PLAN,
    ),
    CaseCheck(
        "saves-what-it-predicts",
        "the savings of the applied sites add up to what is counted before and after",
        saves_what_it_predicts,
        RESULT,
        is_general=True,
    ),
)  # fmt: skip
