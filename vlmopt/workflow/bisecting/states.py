"""The states of a run: the program after each site, in the order in which a full run applies them.

A full run is made once, and the program after every step is kept (programs share their tensors). A state within a step
is that step again with less fuel. Planner-chosen sites are chosen once; heads are fitted anew as in a full run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vlmopt.core.contract import Context, Pass, Plan, Promise, Site
from vlmopt.core.errors import RecipeError, VlmoptError
from vlmopt.core.guarding import DEFAULT_TIME_LIMIT_S
from vlmopt.core.program import Program
from vlmopt.graph.kept_weights import KeptWeights
from vlmopt.rewrite.pipeline import Observer, StepResult, run_step
from vlmopt.workflow.choosing_edits import choose_among
from vlmopt.workflow.recovering import recovered
from vlmopt.workflow.requested import requested_statistics
from vlmopt.workflow.run_state import RunState
from vlmopt.workflow.stepping import reference_after


@dataclass(frozen=True)
class NumberedSite:
    """One site of the run. `site` is None where a step failed while it planned, so that nothing could be applied."""

    number: int
    step: int
    pass_: Pass
    site: Site | None

    @property
    def title(self) -> str:
        name = "its plan" if self.site is None else self.site.name
        return f"{name} (step {self.step} {self.pass_.name})"


@dataclass(frozen=True)
class Done:
    """One step of a state, with the program that it found."""

    before: Program
    result: StepResult


@dataclass(frozen=True)
class Reached:
    """A state: the program after so many sites, and the steps that led there."""

    number: int
    program: Program
    steps: tuple[Done, ...]


@dataclass
class _Step:
    """What is needed to run a step again in part."""

    number: int
    pass_: Pass
    before: Program
    reference: Program
    importance: dict[str, float]
    learned: dict[str, float] = field(default_factory=dict)  # importance that the planner measured in this step
    chosen: tuple[Site, ...] | None = None  # None until the plan is there
    is_searched: bool = False  # the planner chose among the candidates
    sites: tuple[Site | None, ...] = ()
    result: StepResult | None = None
    after: Program | None = None


class _Watch(Observer):
    """Keeps what a step is about to apply; a failing step returns no result to read it from."""

    def __init__(self, step: _Step, fuel: int | None) -> None:
        self._step, self._fuel = step, fuel

    def planned(self, step: int, pass_: Pass, program: Program, plan: Plan) -> None:
        if plan.is_chosen:
            self._step.chosen = plan.sites[: self._fuel]


class SiteLine:
    """All sites of a run, numbered from 1; state n is the program with the first n of them applied.

    Where a step fails, the line ends with all sites that it was about to apply: the state that fails is found as well.
    """

    def __init__(self, state: RunState, passes: Sequence[Pass], *, time_limit_s: float = DEFAULT_TIME_LIMIT_S) -> None:
        self._state, self._weights = state, KeptWeights(state.original)
        self.time_limit_s = time_limit_s  # of every call of a pass
        self._steps: list[_Step] = []
        self._walk(passes)
        self.sites: list[NumberedSite] = []
        for step in self._steps:
            for site in step.sites:
                self.sites.append(NumberedSite(len(self.sites) + 1, step.number, step.pass_, site))

    def number_of(self, step: int, site: str | None) -> int:
        """The number of a site; RecipeError where the run has no such site any more."""
        for found in self.sites:
            if found.step == step and (None if found.site is None else found.site.name) == site:
                return found.number
        raise RecipeError(f"step {step}", f"applies no site {site}", expected=f"one of {len(self.sites)} sites")

    def step_before(self, number: int) -> Program:
        """The program before the whole step that a site belongs to."""
        return self._step_of(number).before

    def before(self, number: int) -> Program:
        """The program that a site is applied to: within a step, heads have not been fitted anew yet."""
        step = self._step_of(number)
        n_sites = number - 1 - self._first(step)
        return self._again(step, n_sites).program if n_sites else step.before

    def after(self, number: int) -> Program | None:
        """The program that a site leaves; None where the pass fails there."""
        step = self._step_of(number)
        try:
            return self._again(step, number - self._first(step)).program
        except VlmoptError:
            return None

    def importance(self, number: int) -> dict[str, float]:
        """What the pass was told of importance when it applied a site."""
        step = self._step_of(number)
        return {**step.importance, **step.learned}

    def planned(self) -> list[tuple[str, ...] | None]:
        """For every step that was reached, the names of the sites that the planner chose; None where it did not."""
        steps = self._steps
        return [tuple(s.name for s in step.sites if s is not None) if step.is_searched else None for step in steps]

    def _step_of(self, number: int) -> _Step:
        return next(step for step in self._steps if step.number == self.sites[number - 1].step)

    def _first(self, step: _Step) -> int:
        """How many sites lie before a step."""
        return sum(len(other.sites) for other in self._steps if other.number < step.number)

    def reach(self, number: int) -> Reached:
        """The state with the first `number` sites.

        Raises:
            VlmoptError: a pass fails on the way, or breaks an invariant.
        """
        steps: list[Done] = []
        left = number
        program = self._state.original
        for step in self._steps:
            if left <= 0:
                break
            n_sites = min(left, len(step.sites))
            left -= n_sites
            if step.after is not None and step.result is not None and n_sites == len(step.sites):
                result, program = step.result, step.after
            else:
                result = self._again(step, n_sites)
                program = self._recovered(step, result)
            steps.append(Done(step.before, result))
        return Reached(number, program, tuple(steps))

    def _walk(self, passes: Sequence[Pass]) -> None:
        state, program = self._state, self._state.original
        reference, is_cut, n_applied = program, False, 0
        limit = state.recipe.max_sites
        for number, pass_ in enumerate(passes, 1):
            left = None if limit is None else max(0, limit - n_applied)
            step = _Step(number, pass_, program, reference, dict(state.importance))
            self._steps.append(step)
            with state.progress.stage(f"pass {pass_.name}"):
                if not self._complete(step, left) or step.after is None or step.result is None:
                    return
            program = step.after
            n_applied += len(step.result.applied)
            is_cut = is_cut or (pass_.promise is Promise.LOSSY and bool(step.result.applied))
            reference = program if not is_cut else reference_after(state, reference, pass_, step.result)

    def _complete(self, step: _Step, fuel: int | None) -> bool:
        """Runs a step whole; False where it fails."""
        is_choosing = False

        def choose(program: Program, plan: Plan, known: Context) -> list[Site]:
            nonlocal is_choosing
            is_choosing = True  # what the planner raises is no fault of the pass
            sites = [] if fuel == 0 else choose_among(self._state, program, step.pass_, plan, known)
            step.learned = dict(self._state.importance)
            context.update(step.learned)
            step.chosen, step.is_searched = tuple(sites[:fuel]), True
            is_choosing = False
            return sites

        self._state.reference = step.reference
        context = dict(step.importance)
        try:
            step.result = self._run(step, context, choose, fuel, observers=(_Watch(step, fuel),))
            step.sites = step.result.applied
            step.after = self._recovered(step, step.result)
        except VlmoptError as error:
            if is_choosing or type(error) is VlmoptError:  # a full disk, say
                raise
            step.sites = step.sites or step.chosen or (None,)
            return False
        return True

    def _again(self, step: _Step, n_sites: int) -> StepResult:
        """The step with its first `n_sites` sites; those that died with an earlier one cost fuel as well."""
        chosen = step.chosen or ()
        last = step.sites[n_sites - 1]
        fuel = 0 if last is None else chosen.index(last) + 1
        context = dict(step.importance)

        def choose(program: Program, plan: Plan, known: Context) -> tuple[Site, ...]:
            context.update(step.learned)
            return chosen

        return self._run(step, context, choose, fuel)

    def _run(
        self,
        step: _Step,
        importance: dict[str, float],
        choose: Callable[[Program, Plan, Context], Sequence[Site]],
        fuel: int | None,
        *,
        observers: Sequence[Observer] = (),
    ) -> StepResult:
        number, state = step.number, self._state
        known = requested_statistics(
            step.pass_,
            step.before,
            state.bound,
            state.progress,
            step=number,
            num_samples=state.recipe.num_samples,
            time_limit_s=self.time_limit_s,
        )
        context = Context(importance=importance, statistics=known, seed=state.recipe.seed)
        try:
            return run_step(
                step.before,
                step.pass_,
                context,
                step=number,
                choose=lambda program, plan: choose(program, plan, context),
                fuel=fuel,
                observers=observers,
                time_limit_s=self.time_limit_s,
            )
        except VlmoptError:
            self._weights.restore()
            raise

    def _recovered(self, step: _Step, result: StepResult) -> Program:
        self._state.reference = step.reference
        return recovered(self._state, result)
