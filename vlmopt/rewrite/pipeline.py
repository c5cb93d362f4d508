"""One pass over one program: plan, choose, apply, check. The pass proposes; this module measures and judges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import TypeVar

from vlmopt.core.contract import Context, Pass, Plan, Promise, Refusal, Site
from vlmopt.core.cost import Cost
from vlmopt.core.guarding import DEFAULT_TIME_LIMIT_S, Owner, guarded_call
from vlmopt.core.program import Program
from vlmopt.graph.costing import program_cost
from vlmopt.graph.modules import clone_graph, make_code
from vlmopt.graph.text import component_text
from vlmopt.rewrite.invariants import check_component, check_invariants, judging, lint, stamp_new_nodes
from vlmopt.rewrite.planned import check_plan
from vlmopt.rewrite.snapshot import Snapshot, contents_of

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
    only: frozenset[str] | None = None,
    fuel: int | None = None,
    observers: Sequence[Observer] = (),
    time_limit_s: float = DEFAULT_TIME_LIMIT_S,
) -> StepResult:
    """Applies one pass to a clone of the program.

    Args:
        choose: picks among the candidates of a LOSSY pass whose options name no sites; without it all are applied.
        only: names of the sites to apply, where an earlier run has chosen; by default all.
        fuel: largest number of sites to apply.
        time_limit_s: for each call of the pass: its plan, and every site.

    Raises:
        PassError: the pass failed, took too long, printed, or broke its contract; the program given is untouched.
    """
    for observer in observers:
        observer.before(step, pass_, program)
    before = Snapshot.of(program)
    calls = _Calls(pass_, _read_only(context), step, time_limit_s)
    plan = _plan(program, calls, before)
    for observer in observers:
        observer.planned(step, pass_, program, plan)
    chosen = [site for site in plan.sites if only is None or site.name in only]
    if not plan.is_chosen and choose is not None:
        chosen = list(choose(program, plan))
    clone = clone_program(program)
    applied, gone = _apply_all(calls, clone, chosen[:fuel], observers)
    stamp_new_nodes(before, clone, pass_, step)
    check_invariants(before, clone, pass_, step, n_applied=len(applied))
    for component in clone.components.values():
        make_code(component.graph)
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


@dataclass(frozen=True)
class _Calls:
    """Calls the methods of a pass, each guarded."""

    pass_: Pass
    context: Context
    step: int
    time_limit_s: float

    @property
    def place(self) -> str:
        return f"step {self.step} {self.pass_.name}"

    def plan(self, program: Program) -> Plan:
        return self._guarded("plan", partial(self.pass_.plan, program, self.context))

    def apply(self, program: Program, site: Site) -> None:
        self._guarded(f"apply {site.name}", partial(self.pass_.apply, program, site, self.context))

    def _guarded(self, action: str, call: Callable[[], T]) -> T:
        owner = Owner.of(type(self.pass_), self.pass_.name)
        return guarded_call(call, place=f"{self.place}, {action}", owner=owner, time_limit_s=self.time_limit_s)


def _read_only(context: Context) -> Context:
    """The context behind views: its mappings are also the planner's."""
    return replace(
        context,
        importance=MappingProxyType(dict(context.importance)),
        statistics=MappingProxyType(dict(context.statistics)),
        device_costs_us=MappingProxyType(dict(context.device_costs_us)),
    )


def _plan(program: Program, calls: _Calls, before: Snapshot) -> Plan:
    """The pass's plan, made on a clone: a pass that edits while it plans is caught, and harms nothing."""
    clone = clone_program(program)
    plan = calls.plan(clone)
    check_plan(plan, f"{calls.place}, plan", components=program.components)
    check_invariants(before, clone, calls.pass_, calls.step, n_applied=0)
    return plan


def _apply_all(
    calls: _Calls, program: Program, sites: Sequence[Site], observers: Sequence[Observer]
) -> tuple[list[Site], list[Site]]:
    """Applies the sites in order; returns those that changed the program and those that died with an earlier one."""
    applied: list[Site] = []
    gone: list[Site] = []
    contents = contents_of(program)
    for site in sites:
        calls.apply(program, site)
        found = _after_site(program, f"{calls.place}, apply {site.name}")
        if found == contents:
            gone.append(site)
            continue
        contents = found
        applied.append(site)
        for observer in observers:
            observer.applied(calls.step, calls.pass_, program, site)
    return applied, gone


def _after_site(program: Program, place: str) -> dict[str, object]:
    """What the program holds now, its graphs made ready to run."""
    with judging(place):
        for name, component in program.components.items():
            check_component(component, name, place)
            lint(component.graph, place)
            component.graph.recompile()
        return contents_of(program)


def program_text(program: Program) -> dict[str, str]:
    return {name: component_text(component) for name, component in program.components.items()}
