"""One pass over one program: plan, choose, apply, check. The pass proposes; this module measures and judges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from vlmopt.core.contract import Context, Pass, Plan, Promise, Refusal, Site
from vlmopt.core.cost import Cost
from vlmopt.core.errors import PassError, VlmoptError
from vlmopt.core.program import Program
from vlmopt.graph.costing import program_cost
from vlmopt.graph.modules import clone_graph
from vlmopt.graph.text import component_text
from vlmopt.rewrite.invariants import Snapshot, check_invariants, check_plan, lint, stamp_new_nodes

T = TypeVar("T")
Choose = Callable[[Program, Plan], Sequence[Site]]


class Observer:
    """Sees every step and every site, and changes nothing; what is not overridden is not looked at."""

    def before(self, step: int, pass_: Pass, program: Program) -> None:
        """Called with the program as the step finds it."""

    def planned(self, step: int, pass_: Pass, program: Program, plan: Plan) -> None:
        """Called with all candidates, before any of them is chosen."""

    def applied(self, step: int, pass_: Pass, program: Program, site: Site) -> None:
        """Called after every site that changed the program; `program` is the clone that is being edited."""

    def after(self, result: StepResult) -> None:
        """Called with the checked result."""


@dataclass(frozen=True)
class StepResult:
    """What one pass did. `predicted` is the sum of the applied sites' savings, `counted` the measured difference."""

    step: int
    name: str
    promise: Promise
    program: Program
    plan: Plan
    applied: tuple[Site, ...]
    gone: tuple[Site, ...]  # died with an earlier site of the same step
    left: tuple[Site, ...]  # not chosen, or out of fuel
    predicted: Cost
    counted: Cost
    text_before: dict[str, str]
    text_after: dict[str, str]

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        return self.plan.refusals


def clone_program(program: Program) -> Program:
    """The program with cloned graphs; tensors and leaf modules are shared."""
    return program.with_components(
        {name: replace(part, graph=clone_graph(part.graph)) for name, part in program.components.items()}
    )


def run_step(
    program: Program,
    pass_: Pass,
    context: Context,
    *,
    step: int,
    choose: Choose | None = None,
    fuel: int | None = None,
    observers: Sequence[Observer] = (),
) -> StepResult:
    """Applies one pass to a clone of the program.

    Args:
        choose: picks among the candidates of a LOSSY pass whose options name no sites; without it all are applied.
        fuel: largest number of sites to apply.

    Raises:
        PassError: the pass failed, or broke its contract; the graphs of the program given are untouched.
    """
    for observer in observers:
        observer.before(step, pass_, program)
    before = Snapshot.of(program)
    plan = _plan(program, pass_, context, before, step)
    for observer in observers:
        observer.planned(step, pass_, program, plan)
    chosen = list(plan.sites)
    if not plan.is_chosen and choose is not None:
        chosen = list(choose(program, plan))
    clone = clone_program(program)
    applied, gone = _apply_all(pass_, clone, chosen[:fuel], context, step, observers)
    stamp_new_nodes(before, clone, pass_, step)
    check_invariants(before, clone, pass_, step, n_applied=len(applied))
    handled = {site.name for site in (*applied, *gone)}
    result = StepResult(
        step=step,
        name=pass_.name,
        promise=pass_.promise,
        program=clone,
        plan=plan,
        applied=tuple(applied),
        gone=tuple(gone),
        left=tuple(site for site in plan.sites if site.name not in handled),
        predicted=sum((site.saving for site in applied), Cost()),
        counted=program_cost(program) - program_cost(clone),
        text_before=before.texts,
        text_after=program_text(clone),
    )
    for observer in observers:
        observer.after(result)
    return result


def _plan(program: Program, pass_: Pass, context: Context, before: Snapshot, step: int) -> Plan:
    """The pass's plan, made on a clone: a pass that edits while it plans is caught, and harms nothing."""
    clone = clone_program(program)
    plan = _guarded(pass_, step, "plan", lambda: pass_.plan(clone, context))
    check_plan(plan, f"step {step} {pass_.name}")
    check_invariants(before, clone, pass_, step, n_applied=0)
    return plan


def _apply_all(
    pass_: Pass, program: Program, sites: Sequence[Site], context: Context, step: int, observers: Sequence[Observer]
) -> tuple[list[Site], list[Site]]:
    """Applies the sites in order; returns those that changed the program and those that died with an earlier one."""
    applied: list[Site] = []
    gone: list[Site] = []
    text = program_text(program)
    for site in sites:
        action = f"apply {site.name}"
        _guarded(pass_, step, action, partial(pass_.apply, program, site, context))
        for component in program.components.values():
            lint(component.graph, f"step {step} {pass_.name}, {action}")
            component.graph.recompile()
        found = program_text(program)
        if found == text:
            gone.append(site)
            continue
        text = found
        applied.append(site)
        for observer in observers:
            observer.applied(step, pass_, program, site)
    return applied, gone


def program_text(program: Program) -> dict[str, str]:
    return {name: component_text(component) for name, component in program.components.items()}


def _guarded(pass_: Pass, step: int, action: str, call: Callable[[], T]) -> T:
    try:
        return call()
    except VlmoptError:
        raise
    except Exception as error:
        raise PassError(
            f"step {step} {pass_.name}, {action}",
            f"raised {type(error).__name__}: {error}",
            remedy="leave the pass out, or run with --debug and send its author the traceback",
        ) from error
