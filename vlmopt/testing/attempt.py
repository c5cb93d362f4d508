"""A pass run on a program of its own, by nobody's rules: the checks judge afterwards what it did.

The pipeline (`vlmopt.rewrite`) stops at the first broken rule. Here every rule is a check of its own, so nothing is
judged before the pass is done, and everything that it touches is a copy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from vlmopt.core.contract import Context, Pass, Plan, Site
from vlmopt.core.errors import PassError
from vlmopt.core.program import Program
from vlmopt.graph.modules import output_values, placeholders
from vlmopt.rewrite.invariants import check_component, judging, lint, stamp_new_nodes
from vlmopt.rewrite.pipeline import clone_program, program_text
from vlmopt.rewrite.planned import check_plan
from vlmopt.rewrite.snapshot import Snapshot, contents_of, described
from vlmopt.testing.calls import Watched, watched

STEP = 1


@dataclass(frozen=True)
class Attempt:
    """What a pass did. `program` is what it left; `is_complete` when every call returned and the graphs can be run."""

    before: Program
    snapshot: Snapshot  # of `before`, taken first
    planning: Watched[Plan]
    plan_problem: str  # why what `plan` returned is no plan
    plan_edits: str  # what `plan` changed
    applying: tuple[Watched[None], ...]
    applied: tuple[Site, ...]
    gone: tuple[Site, ...]  # changed nothing, since an earlier site took them along
    program: Program
    broken: str  # why the program that it left cannot be run

    @property
    def calls(self) -> tuple[Watched[Plan] | Watched[None], ...]:
        return (self.planning, *self.applying)

    @property
    def plan(self) -> Plan:
        return self.planning.value()

    @property
    def is_complete(self) -> bool:
        return all(call.has_returned for call in self.calls) and not self.plan_problem and not self.broken

    @property
    def texts(self) -> dict[str, str]:
        return program_text(self.program)


def attempt(
    program: Program, pass_: Pass, context: Context, *, time_limit_s: float, n_sites: int | None = None
) -> Attempt:
    """Plans and applies on a copy of the program, at most `n_sites` sites; never raises for what the pass does."""
    before = own_copy(program)
    snapshot = Snapshot.of(before)
    looked_at = clone_program(before)
    planning = watched(lambda: pass_.plan(looked_at, context), "plan", time_limit_s=time_limit_s)
    problem = _plan_problem(planning, program)
    edits = edits_of(looked_at, snapshot, before)
    work = _Work(clone_program(before))
    if planning.has_returned and not problem:
        work.apply(planning.value().sites[:n_sites], pass_, context, time_limit_s)
    if not work.broken:
        stamp_new_nodes(snapshot, work.program, pass_, STEP)
    return Attempt(
        before=before,
        snapshot=snapshot,
        planning=planning,
        plan_problem=problem,
        plan_edits=edits,
        applying=tuple(work.calls),
        applied=tuple(work.applied),
        gone=tuple(work.gone),
        program=work.program,
        broken=work.broken,
    )


def own_copy(program: Program) -> Program:
    """The program with graphs, leaf modules and tensors of its own; what its components share stays shared."""
    graphs = copy.deepcopy({name: part.graph for name, part in program.components.items()})
    parts = {name: replace(part, graph=graphs[name]) for name, part in program.components.items()}
    return program.with_components(parts)


def edits_of(program: Program, snapshot: Snapshot, before: Program) -> str:
    """What differs from the snapshot, in words; empty when nothing does."""
    written = [stored.path for stored in snapshot.tensors if not stored.is_unchanged]
    if written:
        return f"wrote the tensor {written[0]}"
    changed = [leaf.path for leaf in snapshot.leaves if not leaf.is_unchanged]
    if changed:
        return f"changed the module {changed[0]}"
    problem = soundness_problem(program)
    if problem or contents_of(program) != snapshot.contents:
        return "changed the graph"
    found = described(program)
    other = [what for what, value in snapshot.described.items() if found[what] != value]
    if program.heads != before.heads:
        other.append("heads")
    return f"changed the program's {other[0]}" if other else ""


def soundness_problem(program: Program) -> str:
    """Why a program cannot be run at all; empty when it can. Makes its graphs ready to run."""
    try:
        with judging("it"):
            for name, component in program.components.items():
                check_component(component, name, "it")
                lint(component.graph, f"component {name}")
                component.graph.recompile()
                taken = [str(node.target) for node in placeholders(component.graph)]
                wanted = [spec.name for spec in component.inputs]
                if taken != wanted:
                    return f"component {name} takes {', '.join(taken)}, and its specs say {', '.join(wanted)}"
                n_outputs = len(output_values(component.graph))
                if n_outputs != len(component.outputs):
                    return f"component {name} returns {n_outputs} values, and its specs name {len(component.outputs)}"
    except PassError as error:
        return f"{error.place}: {error.found}"
    return ""


def _plan_problem(planning: Watched[Plan], program: Program) -> str:
    if not planning.has_returned:
        return ""
    try:
        check_plan(planning.value(), "plan", components=program.components)
    except PassError as error:
        return error.one_line()
    return ""


class _Work:
    """The program while sites are applied to it."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.calls: list[Watched[None]] = []
        self.applied: list[Site] = []
        self.gone: list[Site] = []
        self.broken = ""

    def apply(self, sites: Sequence[Site], pass_: Pass, context: Context, time_limit_s: float) -> None:
        contents = contents_of(self.program)
        for site in sites:
            call = watched(self._application(pass_, site, context), f"apply {site.name}", time_limit_s=time_limit_s)
            self.calls.append(call)
            self.broken = soundness_problem(self.program)
            if not call.has_returned or self.broken:
                return
            found = contents_of(self.program)
            (self.gone if found == contents else self.applied).append(site)
            contents = found

    def _application(self, pass_: Pass, site: Site, context: Context) -> Callable[[], None]:
        return lambda: pass_.apply(self.program, site, context)
