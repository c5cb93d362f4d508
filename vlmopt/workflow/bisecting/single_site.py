"""One site of one pass on its own: what a failing case does, and how it is cut down to a few nodes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from vlmopt.core.contract import Context, Pass, Plan, Site
from vlmopt.core.errors import VlmoptError
from vlmopt.core.guarding import DEFAULT_TIME_LIMIT_S
from vlmopt.core.program import Assembly, Component, Program
from vlmopt.core.workload import Feed
from vlmopt.graph.excerpt import excerpt, grown, input_values, seeds
from vlmopt.graph.kept_weights import KeptWeights
from vlmopt.rewrite.pipeline import run_step
from vlmopt.workflow.bisecting.findings import (
    GOOD,
    Fault,
    Finding,
    broken_promise,
    cannot_run,
    failure,
    not_finite,
    other_file,
)

_HOPS = (0, 1, 2, 4, 8)


@dataclass(frozen=True)
class SingleSite:
    """A site with the program just before it and inputs for every component.

    `reference` is what a promise is held against where that is not the program before the site: the program before the
    whole step, for a CLOSE step whose sites add up. Without a site the pass fails while it plans.
    """

    program: Program
    feeds: Mapping[str, Feed]
    pass_: Pass
    step: int
    site: Site | None
    context: Context
    reference: Program | None = None
    time_limit_s: float = DEFAULT_TIME_LIMIT_S  # of every call of the pass

    def apply(self) -> Program:
        """The program after the site.

        Raises:
            VlmoptError: the pass fails, or breaks an invariant.
        """
        pass_ = self.pass_ if self.site is None else _only(self.pass_, self.site)
        fuel = 0 if self.site is None else None
        kept = KeptWeights(self.program)
        try:
            return run_step(
                self.program, pass_, self.context, step=self.step, fuel=fuel, time_limit_s=self.time_limit_s
            ).program
        except VlmoptError:
            kept.restore()
            raise

    def judge(self, *, files: bool = False) -> Finding:
        """What is wrong after the site; with `files` the emitted ONNX files are looked at as well."""
        try:
            after = self.apply()
        except VlmoptError as error:
            return failure(error)
        try:
            return self._judged(after, files=files)
        except Exception as error:  # noqa: BLE001 - a site that leaves a program which cannot run is bad
            return cannot_run(error)

    def _judged(self, after: Program, *, files: bool) -> Finding:
        name, before = f"step {self.step} {self.pass_.name}", self.reference or self.program
        found = broken_promise(name, self.pass_.promise, before, after, self.feeds) or not_finite(after, self.feeds)
        if found is None and files:
            with tempfile.TemporaryDirectory() as folder:
                parts = ((part, self.feeds[part.name]) for part in after.components.values())
                answers = (other_file(after, part, feed, Path(folder)) for part, feed in parts)
                found = next((answer for answer in answers if answer is not None), None)
        return found or GOOD


def _only(pass_: Pass, site: Site) -> Pass:
    """The same pass, whose plan is this one site; a subclass, so that messages still name the pass and its file."""
    kind = type(pass_)

    def plan(self: Pass, program: Program, context: Context) -> Plan:
        return Plan((site,))

    alone = type(kind.__name__, (kind,), {"plan": plan, "__module__": kind.__module__, "__doc__": kind.__doc__})
    made: Pass = object.__new__(alone)
    made.__dict__.update(vars(pass_))
    return made


def shrunk(case: SingleSite, after: Program | None, wrong: Finding) -> SingleSite:
    """The smallest excerpt around the site that still fails in the same way; the case itself where there is none.

    Args:
        after: the program after the site, where there is one.
        wrong: what is wrong with the whole case; where it fails, it must go on failing with the same words.
    """
    if case.site is None or case.reference is not None or wrong.fault is Fault.FILE:
        return case
    for part in _excerpts(case, case.program.components[case.site.component], after):
        names = [spec.name for spec in part.inputs]
        feed = input_values(case.program.components[part.name], case.feeds[part.name], names)
        smaller = replace(case, program=_alone(case.program, part), feeds={part.name: feed})
        found = smaller.judge()
        if found.fault is wrong.fault and (found.fault is not Fault.FAILS or found.text == wrong.text):
            return smaller
    return case


def _excerpts(case: SingleSite, component: Component, after: Program | None) -> Iterator[Component]:
    assert case.site is not None
    if after is not None and component.name not in after.components:
        return
    names = {node.name for node in component.graph.graph.nodes}
    found = seeds(component, after.components[component.name]) if after is not None else names & {*case.site.target}
    if not found:
        return
    seen: set[int] = set()
    for n_hops in _HOPS:
        part = excerpt(component, grown(component, found, n_hops))
        if part is None or len(part.graph.graph.nodes) in seen:
            continue
        seen.add(len(part.graph.graph.nodes))
        yield part


def _alone(program: Program, component: Component) -> Program:
    """A program of nothing but this part."""
    head = program.heads.get(component.name)
    has_head = any(str(node.target) == head for node in component.graph.graph.nodes)
    return replace(
        program,
        assembly=Assembly.FUSED,
        components={component.name: component},
        similarity=None,
        heads={component.name: head} if head is not None and has_head else {},
        fitted_heads=frozenset(),
        fixed_inputs={},
        labels=(),
    )
