"""The steps of a recipe that are planned together, and the recipe with the sites of a plan written out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmopt.core.contract import Context, Pass, Promise, Site
from vlmopt.core.contract import Plan as PassPlan
from vlmopt.core.facts import QUANTIZED
from vlmopt.core.program import Program
from vlmopt.graph.branches import find_branches
from vlmopt.graph.modules import has_path
from vlmopt.planning.together import Edit, Plan, Role
from vlmopt.recipe.schema import SHORTENING_PASSES, PassStep, Recipe
from vlmopt.registry import make_pass
from vlmopt.rewrite.pipeline import run_step
from vlmopt.workflow.budgeting import folded_components
from vlmopt.workflow.choosing_edits import are_cuts
from vlmopt.workflow.refusing import SITE_OPTIONS
from vlmopt.workflow.requested import requested_statistics
from vlmopt.workflow.run_state import RunState

# The option that names the sites of a pass, where they may be planned together with those of others.
_NAMED_BY = {**SITE_OPTIONS, "prune-ffn": "branches", "prune-heads": "branches", "prune-tokens": "tokens"}
_WIDTH = "@"  # what stands between the branch and its width in the name of a site


@dataclass(frozen=True)
class OpenStep:
    """A step whose sites are open. `sites` are those by name that edit a known place, `places` where each does."""

    number: int
    step: PassStep
    pass_: Pass
    context: Context
    role: Role
    sites: dict[str, Site]
    places: dict[str, frozenset[str]]

    def edit(self, site: str) -> Edit:
        return self.number, site


def is_open(step: PassStep, pass_: Pass) -> bool:
    option = _NAMED_BY.get(step.name)
    return option is not None and pass_.promise is Promise.LOSSY and not step.options.get(option)


def begins_together(recipe: Recipe, passes: Sequence[Pass], number: int) -> bool:
    """Whether the step of this number (from 1) is the first of those that are planned together."""
    if recipe.planning != "together" or recipe.task is None:
        return False
    first = next((i for i, pair in enumerate(zip(recipe.passes, passes, strict=True), 1) if is_open(*pair)), None)
    return first == number


def open_steps(state: RunState, program: Program, passes: Sequence[Pass]) -> list[OpenStep]:
    """All open steps with their candidates on the program as it is in front of the first of them."""
    folded = folded_components(state.recipe, program)
    found = []
    for number, (step, pass_) in enumerate(zip(state.recipe.passes, passes, strict=True), 1):
        if not is_open(step, pass_):
            continue
        context = context_of(state, program, pass_, number)
        plan = pass_.plan(program, context)
        role = _role(program, pass_, plan)
        sites = {site.name: site for site in plan.sites if site.component not in folded}
        places = {name: _places(program, site, role) for name, site in sites.items()}
        found.append(OpenStep(number, step, pass_, context, role, sites, places))
    return found


def _role(program: Program, pass_: Pass, plan: PassPlan) -> Role:
    """What the sites of a pass do; those that edit neither branches nor precisions reduce what a component hands on."""
    if are_cuts(program, plan):
        return Role.REMOVES
    if QUANTIZED in pass_.produces:
        return Role.QUANTIZES
    branches = {
        (name, branch.name) for name, part in program.components.items() for branch in find_branches(part.graph)
    }
    is_inside = all((site.component, site.target[0]) in branches for site in plan.sites)
    return Role.NARROWS if is_inside else Role.REDUCES


def context_of(state: RunState, program: Program, pass_: Pass, number: int) -> Context:
    """What a pass may know of this program."""
    limit = state.recipe.num_samples
    known = requested_statistics(pass_, program, state.bound, state.progress, step=number, num_samples=limit)
    return Context(importance=state.importance, statistics=known, seed=state.recipe.seed)


def _places(program: Program, site: Site, role: Role) -> frozenset[str]:
    """The branches that a site edits, as COMPONENT/BRANCH, or its module where that lies outside of all branches; what
    reduces that which a component hands on has a place of its own."""
    if role is Role.REDUCES:
        return frozenset({site.name})
    if role is Role.REMOVES:
        return frozenset(f"{site.component}/{name}" for name in site.target)
    if role is Role.NARROWS:
        return frozenset({f"{site.component}/{site.target[0]}"})
    (path, *_) = site.target
    for branch in find_branches(program.components[site.component].graph):
        if any(node.op == "call_module" and node.target == path for node in branch.region):
            return frozenset({f"{site.component}/{branch.name}"})
    return frozenset({f"{site.component}/{path}"})


def resolved(recipe: Recipe, steps: Sequence[OpenStep], plan: Plan) -> Recipe:
    """The recipe with the sites of a plan written out; open steps that got none are left out."""
    by_number = {step.number: step for step in steps}
    passes = []
    for number, step in enumerate(recipe.passes, 1):
        if number in by_number:
            names = [site.split(_WIDTH)[0] for site in by_number[number].sites if (number, site) in plan]
            if names:
                passes.append(PassStep(name=step.name, options={**step.options, _NAMED_BY[step.name]: names}))
        else:
            passes.append(step)
    return recipe.model_copy(update={"passes": tuple(passes), "planning": "in-turn"})


def program_behind(state: RunState, program: Program, steps: Sequence[OpenStep], plan: Plan) -> Program:
    """The program behind all steps from the first open one to the last, and what spares products behind it, without
    training."""
    return behind(state, program, steps, plan)[0]


def behind(
    state: RunState, program: Program, steps: Sequence[OpenStep], plan: Plan
) -> tuple[Program, tuple[PassStep, ...]]:
    """That program, and all steps of the recipe with the sites of the plan written out; a quantization leaves out what
    steps before it have taken from the program."""
    rounding = {step.step.name for step in steps if step.role is Role.QUANTIZES}
    first, n_left = steps[0].number, len(state.recipe.passes) - steps[-1].number
    recipe = resolved(state.recipe, steps, plan)
    passes, later = list(recipe.passes[: first - 1]), list(recipe.passes[first - 1 :])
    folders = [Path(folder) for folder in recipe.pass_dirs]
    while len(later) > n_left or (later and later[0].name in SHORTENING_PASSES):
        step = later.pop(0)
        if step.name in rounding:
            option = _NAMED_BY[step.name]
            names = [name for name in step.options[option] if _is_there(program, name)]
            step = PassStep(name=step.name, options={**step.options, option: names})
            if not names:
                continue
        passes.append(step)
        pass_ = make_pass(step.name, step.options, folders)
        context = context_of(state, program, pass_, len(passes))
        program = run_step(program, pass_, context, step=len(passes)).program
    return program, (*passes, *later)


def _is_there(program: Program, name: str) -> bool:
    component, _, path = name.partition("/")
    return component in program.components and has_path(program.components[component].graph, path)
