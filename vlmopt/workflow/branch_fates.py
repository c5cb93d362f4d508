"""What became of every branch of the original: its cost and importance, the step that cut it, or why it stays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from vlmopt.core.contract import Promise, Site
from vlmopt.core.program import Program
from vlmopt.graph.branches import find_branches
from vlmopt.profiling.document import Profile
from vlmopt.profiling.stability import cut_certainty
from vlmopt.rewrite.pipeline import StepResult
from vlmopt.workflow.inspecting import branch_rows
from vlmopt.workflow.run_state import RunState

_SHOWN = ("name", "kind", "layer", "params", "macs")


def branch_section(state: RunState, steps: Sequence[StepResult]) -> list[dict[str, Any]]:
    """A row a branch, but for components that were folded away whole, which is no cut."""
    scores = (
        {} if state.profile is None else {(s.component, s.name): s for s in state.profile.scores if s.scope == "branch"}
    )
    rows = []
    for name, component in state.original.components.items():
        if name not in state.optimized.components:
            continue
        cuts = _cuts(state, steps, name)
        for row in branch_rows(state.original, component):
            score = scores.get((name, row["name"]))
            is_kept = row["name"] not in cuts
            rows.append(
                {
                    **{key: row[key] for key in _SHOWN},
                    "component": name,
                    "score": None if score is None else score.score,
                    "stderr": None if score is None else score.stderr,
                    "kept": is_kept,
                    "cut_by": cuts.get(row["name"], ""),
                    "reason": "; ".join(_reasons(state, steps, name, row)) if is_kept else "",
                }
            )
    return with_certainty(rows, state.profile)


def _cuts(state: RunState, steps: Sequence[StepResult], component: str) -> dict[str, str]:
    """The step that cut each branch that is gone. What keeps its function is no cut, though no branch can be told there
    any more, as where one token is read."""
    cuts: dict[str, str] = {}
    before = _branch_names(state.original, component)
    for step in steps:
        left = _branch_names(step.program, component)
        if step.promise is Promise.LOSSY:
            cuts |= dict.fromkeys(before - left, f"{step.step} {step.name}")
        before = left
    return cuts


def with_certainty(rows: Sequence[dict[str, Any]], profile: Profile | None) -> list[dict[str, Any]]:
    """The rows, every cut with its certainty where the profile measured stability."""
    if profile is None or profile.stability is None:
        return [{**row, "certainty": None} for row in rows]
    names = [f"{row['component']}/{row['name']}" for row in rows]
    cut = [name for name, row in zip(names, rows, strict=True) if not row["kept"] and name in profile.stability.ranks]
    certainty = cut_certainty(profile, cut)
    return [{**row, "certainty": certainty.get(name)} for name, row in zip(names, rows, strict=True)]


def _branch_names(program: Program, component: str) -> frozenset[str]:
    if component not in program.components:
        return frozenset()
    return frozenset(branch.name for branch in find_branches(program.components[component].graph))


def _reasons(state: RunState, steps: Sequence[StepResult], component: str, row: dict[str, Any]) -> Iterator[str]:
    """Why each step that considered the branch, or the layer it is in, left it alone, or what is left of it."""
    names = {f"{component}/{row['name']}", f"{component}/{row['layer_name']}", row["name"], row["layer_name"]}
    n_before = 0
    for step in steps:
        place = f"{step.step} {step.name}"
        if step.promise is Promise.LOSSY:
            refusals = [refusal for refusal in step.refusals if refusal.component == component]
            yield from (f"{place}: {refusal.reason}" for refusal in refusals if refusal.name in names)
            thinned = [site for site in step.applied if site.component == component and row["name"] in site.target]
            yield from (f"{place}: {site.summary}" for site in thinned if site.summary and site.saving.macs > 0)
            left = [site for site in step.left if site.component == component and row["name"] in site.target]
            if left:
                yield f"{place}: {_why_left(state, step, left, n_before=n_before)}"
        n_before += len(step.applied)


def _why_left(state: RunState, step: StepResult, left: Sequence[Site], *, n_before: int) -> str:
    choice, budgets, limit = state.choice, state.recipe.budgets.limits, state.recipe.max_sites
    is_spent = limit is not None and n_before >= limit
    is_wanted = choice is not None and any(site.name in choice.names for site in left)
    if is_spent or is_wanted or step.plan.is_chosen or choice is None or not budgets:
        return "the largest number of sites was reached"
    if budgets.resources:
        return f"not in the cut that loses least of those that meet {budgets.text}"
    max_drop = state.choice_max_drop
    if not choice.names:
        return f"no cut stayed within a drop of {max_drop:g} points"
    return f"not in the cut that saves most of those that stayed within a drop of {max_drop:g} points"
