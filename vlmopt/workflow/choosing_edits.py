"""Which sites of a lossy pass are applied where they are no cuts of branches: those that the bound on the drop allows.

All together are tried first, on the profile and validation splits, heads fitted behind them as behind a cut. Where they
lose too much, every site is tried alone on few items, and as many are taken as the bound allows, in the order of what
they lose for the bytes that they save.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from vlmopt.core.contract import Context, Pass, Plan, Site
from vlmopt.core.program import Program
from vlmopt.core.workload import Workload
from vlmopt.graph.branches import find_branches
from vlmopt.graph.joined import joined
from vlmopt.planning.cuts import Measurement
from vlmopt.planning.meter import CutMeter
from vlmopt.planning.prefix import Edit, longest_prefix
from vlmopt.rewrite.pipeline import clone_program
from vlmopt.workflow.choosing import choose_sites
from vlmopt.workflow.opening import OpenedTask
from vlmopt.workflow.recovering import rounds
from vlmopt.workflow.run_state import RunState

JUDGING_SAMPLES = 512  # of each split, for what is to be taken
TRYING_SAMPLES = 48  # ... for every site alone
_N_NAMED = 5


def choose_among(state: RunState, program: Program, pass_: Pass, plan: Plan, context: Context) -> list[Site]:
    """The sites that are applied, of a plan that leaves it open: cuts of branches are searched, other edits tried."""
    if are_cuts(program, plan):
        return choose_sites(state, program, plan)
    return choose_edits(state, program, pass_, plan, context)


def are_cuts(program: Program, plan: Plan) -> bool:
    """Whether the sites are cuts of branches, which the planner searches by itself."""
    names = {
        f"{name}/{branch.name}" for name, part in program.components.items() for branch in find_branches(part.graph)
    }
    targets = [f"{site.component}/{target}" for site in plan.sites for target in site.target]
    return bool(targets) and names.issuperset(targets)


def choose_edits(state: RunState, program: Program, pass_: Pass, plan: Plan, context: Context) -> list[Site]:
    """The sites to apply; all of them where nothing bounds the drop, or nothing can measure it."""
    drop, bound = state.recipe.budgets.drop, state.bound
    if drop is None or bound is None or not plan.sites:
        return list(plan.sites)
    by_name = {site.name: site for site in plan.sites}
    judge = _Judge(state, bound, program, pass_, context, JUDGING_SAMPLES)

    def sensitivities() -> list[Edit]:
        few = _Judge(state, bound, program, pass_, context, TRYING_SAMPLES)
        before = few.loss([])
        tried = state.progress.track(plan.sites, f"{pass_.name}: every site alone", total=len(plan.sites))
        found = [Edit(site.name, site.saving.parameters_bytes, few.loss([site]) - before) for site in tried]
        state.ledger.note("sensitivity", f"{state.step} {pass_.name}", **{one.name: one.sensitivity for one in found})
        return found

    with state.progress.stage(f"choosing among {len(plan.sites)} sites"):
        limit = drop.resolve(judge.reference_points if drop.is_relative else 100.0) + (
            0.0 if judge.is_trained else state.headroom
        )
        taken = longest_prefix(
            list(by_name), lambda names: judge.measure([by_name[name] for name in names]), sensitivities, limit
        )
    left = [name for name in by_name if name not in taken.names]
    found = asdict(taken.measurement) | {"max_drop_points": limit, "n_measured": taken.n_measured}
    state.ledger.note("plan", f"{state.step} {pass_.name}", names=list(taken.names), left=left, **found)
    state.progress.message(_line(pass_.name, len(by_name), left, taken.measurement, limit))
    return [by_name[name] for name in by_name if name in taken.names]


class _Judge:
    """Measures the program with some sites applied, on so many items of each split, against the original.

    A program that was trained keeps its heads, and only the validation split can tell: halves of it are both splits.
    """

    def __init__(
        self, state: RunState, bound: OpenedTask, program: Program, pass_: Pass, context: Context, n_samples: int
    ) -> None:
        self._state, self._program, self._pass, self._context = state, program, pass_, context
        self.is_trained = state.tuned is not None and rounds(pass_)
        self._bound, self._limit = bound, min(n for n in (n_samples, state.recipe.num_samples) if n is not None)
        self._original = self._meter(state.original, None)

    def _meter(self, program: Program, original: CutMeter | None) -> CutMeter:
        """A meter of a program on both splits, as it reads them."""
        state, source = self._state, self._bound.source
        fit, check = self._splits(program)
        reference = state.outputs_of(state.reference, source.workload(state.reference, "profile", limit=self._limit))
        return CutMeter(
            joined(program).program,
            fit,
            check,
            reference,
            progress=state.progress,
            seed=state.recipe.seed,
            original=original,
            prefix_bytes=0,
            fits_heads=not self.is_trained,
        )

    def _splits(self, program: Program) -> tuple[Workload, Workload]:
        source = self._bound.source
        if not self.is_trained:
            fit, check = (source.workload(program, split, limit=self._limit) for split in ("profile", "validation"))
            return fit, check
        whole = source.workload(program, "validation", limit=2 * self._limit)
        return whole.part(range(0, whole.n_items, 2)), whole.part(range(1, whole.n_items, 2))

    @property
    def headroom(self) -> float:
        """Points on top of the bound, for a training that is still to come."""
        return 0.0 if self.is_trained else self._state.headroom

    @property
    def reference_points(self) -> float:
        return self._original.reference_points

    def measure(self, sites: Sequence[Site]) -> Measurement:
        return self._meter(self._edited(sites), self._original).measure_all([frozenset()])[0]

    def loss(self, sites: Sequence[Site]) -> float:
        return self._meter(self._edited(sites), self._original).mean_loss

    def _edited(self, sites: Sequence[Site]) -> Program:
        edited = clone_program(self._program)
        for site in sites:
            self._pass.apply(edited, site, self._context)
        return edited


def _line(name: str, n_sites: int, left: Sequence[str], found: Measurement, limit: float) -> str:
    taken = f"{name}: {n_sites - len(left)} of {n_sites} sites"
    drop = f"drop {found.drop_points:.2f}, with its margin {found.sort_key:.2f} of {limit:g} points"
    if not left:
        return f"{taken}; {drop}"
    more = ", ..." if len(left) > _N_NAMED else ""
    return f"{taken}; {drop}; left as they were: {', '.join(left[-_N_NAMED:])}{more}"
