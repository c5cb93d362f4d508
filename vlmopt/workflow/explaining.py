"""`vlmopt explain`: what a recipe would do, pass by pass. Nothing is written; only what a pass asks for is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlmopt.core.contract import Context, Pass, Plan, Site
from vlmopt.core.cost import Cost
from vlmopt.core.errors import PlanError, RecipeError, VlmoptError
from vlmopt.core.facts import Fact
from vlmopt.core.program import Program
from vlmopt.core.progress import Progress, Silent
from vlmopt.graph.costing import program_cost
from vlmopt.recipe.schema import Recipe
from vlmopt.rewrite.pipeline import Observer, StepResult, run_step
from vlmopt.workflow.choosing import given_profile, worth_cutting
from vlmopt.workflow.choosing_edits import are_cuts
from vlmopt.workflow.opening import OpenedTask, open_recipe, open_task, with_fitted_head
from vlmopt.workflow.optimizing import initial_facts, load_passes
from vlmopt.workflow.refusing import refuse_early
from vlmopt.workflow.requested import requested_statistics
from vlmopt.workflow.samples import sample_feeds
from vlmopt.workflow.watching.observing import Watch, Watching, prepare, start_watching

# With --verify-each a head that the task brings is fitted on at most so many samples, just to let faults through.
VERIFY_SAMPLES = 256


@dataclass(frozen=True)
class Explanation:
    """The plan of every step as plain data; `error` is what stopped the dry run, with the steps before it explained."""

    data: dict[str, Any]
    error: VlmoptError | None = None


def explain(recipe: Recipe, *, watch: Watch | None = None, progress: Progress | None = None) -> Explanation:
    """Facts, plans, predicted savings and refusals of every step, each seeing what the steps before it leave.

    Exact and close passes and sites that the recipe names are applied for real, on clones. Where the planner would
    choose, nothing is applied: the candidates are shown, and later steps see the program uncut.
    """
    show, watch = progress or Silent(), watch or Watch()
    passes = load_passes(recipe, time_limit_s=watch.pass_timeout_s)
    prepare(watch)
    opened = open_recipe(recipe, progress=show)
    bound = None if recipe.task is None else open_task(opened, recipe.task, seed=recipe.seed, progress=show)
    program, fit = opened.program if bound is None else bound.program, None
    if bound is not None and watch.verify_each:
        fit = bound.source.workload(program, "profile", limit=min(VERIFY_SAMPLES, recipe.num_samples or VERIFY_SAMPLES))
        program = with_fitted_head(program, fit, seed=recipe.seed, progress=show)  # through zeros no fault would show
    watching = start_watching(watch, lambda current: sample_feeds(current, fit, seed=recipe.seed))
    context = Context(importance=_importance(recipe, bound), seed=recipe.seed)

    def known(pass_: Pass, current: Program, step: int) -> Context:
        limits: dict[str, Any] = {"num_samples": recipe.num_samples, "time_limit_s": watch.pass_timeout_s}
        found = requested_statistics(pass_, current, bound, show, step=step, **limits)
        return replace(context, statistics=found)

    rows, left, error = _run(recipe, passes, program, known, watching, show, time_limit_s=watch.pass_timeout_s)
    data: dict[str, Any] = {
        "model": recipe.model,
        "task": recipe.task,
        "max_drop": recipe.budgets.max_drop,
        "budgets": recipe.budgets.model_dump(mode="json"),
        "plan": rows,
        "cost": {"before": program_cost(program).as_dict(), "after": program_cost(left).as_dict()},
        "warnings": [*watch.left_out, *_warnings(recipe, rows)],
    }
    if watching.trace is not None:
        data["why"] = watching.trace.answers()
    return Explanation(data, error or _unknown_name(watching))


class _Plans(Observer):
    """Keeps the last plan, which an error in `apply` would lose."""

    plan: Plan | None = None

    def before(self, step: int, pass_: Pass, program: Program) -> None:
        self.plan = None

    def planned(self, step: int, pass_: Pass, program: Program, plan: Plan) -> None:
        self.plan = plan


def _run(
    recipe: Recipe,
    passes: Sequence[Pass],
    program: Program,
    known: Callable[[Pass, Program, int], Context],
    watching: Watching,
    progress: Progress,
    *,
    time_limit_s: float,
) -> tuple[list[dict[str, Any]], Program, VlmoptError | None]:
    """One row a step, the program that is left, and what went wrong."""
    rows: list[dict[str, Any]] = []
    holding, fuel, plans = initial_facts(recipe), recipe.max_sites, _Plans()
    for number, pass_ in enumerate(passes, 1):
        facts = _facts(pass_, holding)
        row = {"step": number, "name": pass_.name, "promise": pass_.promise.value, **facts}
        rows.append(row)
        context = Context()
        try:
            with progress.stage(f"pass {pass_.name}"):
                context = known(pass_, program, number)
                result = run_step(
                    program,
                    pass_,
                    context,
                    step=number,
                    choose=lambda current, plan: () if _is_open(recipe, current, plan) else plan.sites,
                    fuel=fuel,
                    observers=(plans, *watching.observers),
                    time_limit_s=time_limit_s,
                )
        except VlmoptError as error:
            plan = plans.plan or Plan()
            row.update(_plan_row(plan, context), **_outcome(None, plan), decision=f"fails: {error.one_line()}")
            return rows, program, error
        candidates = worth_cutting(recipe, program, result.plan)
        row.update(_plan_row(result.plan, context), **_outcome(result, candidates))
        row["decision"] = _decision(recipe, result, candidates)
        holding = (holding - pass_.breaks) | pass_.produces
        program = result.program
        fuel = None if fuel is None else fuel - len(result.applied)
    return rows, program, None


def _is_open(recipe: Recipe, program: Program, plan: Plan) -> bool:
    """Whether a run would choose: cuts of branches always, other edits where a bound on the drop can be measured."""
    return are_cuts(program, plan) or (recipe.task is not None and recipe.budgets.drop is not None)


def _facts(pass_: Pass, holding: frozenset[Fact]) -> dict[str, list[str]]:
    return {
        "facts_before": _names(holding),
        "requires": _names(pass_.requires),
        "produces": _names(pass_.produces),
        "breaks": _names(pass_.breaks),
        "facts_after": _names((holding - pass_.breaks) | pass_.produces),
    }


def _names(facts: frozenset[Fact]) -> list[str]:
    return sorted(fact.name for fact in facts)


def _plan_row(plan: Plan, context: Context) -> dict[str, Any]:
    return {
        "is_chosen": plan.is_chosen,
        "sites": [_site_row(site, context) for site in plan.sites],
        "refusals": [{"name": r.name, "component": r.component, "reason": r.reason} for r in plan.refusals],
    }


def _site_row(site: Site, context: Context) -> dict[str, Any]:
    row = {"name": site.name, "component": site.component, "summary": site.summary, "saving": site.saving.as_dict()}
    score = context.importance.get(site.name)
    return row if score is None else {**row, "importance": score}


def _outcome(result: StepResult | None, candidates: Plan) -> dict[str, Any]:
    """What was applied; `predicted` is the sum over the candidates where the planner is still to choose."""
    if result is None:
        nothing = Cost().as_dict()
        return {"n_applied": 0, "n_gone": 0, "predicted": nothing, "counted": nothing}
    is_open = not result.plan.is_chosen and not result.applied
    predicted = sum((site.saving for site in candidates.sites), Cost()) if is_open else result.predicted
    numbers = {"n_applied": len(result.applied), "n_gone": len(result.gone)}
    return {**numbers, "predicted": predicted.as_dict(), "counted": result.counted.as_dict()}


def _decision(recipe: Recipe, result: StepResult, candidates: Plan) -> str:
    """In words what becomes of the candidates."""
    if not result.plan.sites:
        return "nothing to do"
    if not result.plan.is_chosen and not result.applied:
        if not recipe.budgets.limits:
            return "candidates; there is neither a budget (--max-drop) nor named sites"
        n_sites, n_candidates = len(result.plan.sites), len(candidates.sites)
        among = f"{n_candidates} of the {n_sites} are candidates" if n_candidates < n_sites else "candidates"
        return f"{among}; the planner chooses up to {recipe.budgets.limits.text}"
    if recipe.max_sites is not None and result.left:
        return f"{len(result.applied)} applied, {len(result.left)} left by --limit {recipe.max_sites}"
    return "all applied"


def _warnings(recipe: Recipe, rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the run itself would refuse, and what the dry run cannot know."""
    found = []
    try:
        refuse_early(recipe)
    except (RecipeError, PlanError) as error:
        found.append(f"optimize refuses this recipe: {error.one_line()}")
    if any(row["sites"] and not row["is_chosen"] for row in rows[:-1]):
        found.append("steps behind the planner's choice are shown for the program uncut")
    return found


def _unknown_name(watching: Watching) -> VlmoptError | None:
    if watching.trace is None or not watching.trace.unknown():
        return None
    pattern = watching.trace.unknown()[0]
    remedy = watching.trace.meant(pattern).removeprefix("; ") or "see `vlmopt inspect MODEL` for the names"
    return VlmoptError(f"--why {pattern}", "nothing of the program has that name", remedy=remedy)


def _importance(recipe: Recipe, bound: OpenedTask | None) -> dict[str, float]:
    profile = None if bound is None else given_profile(recipe, bound)
    return {} if profile is None else profile.importance()
