"""Runs the passes of a recipe one after another: each is noted, held to its promise, and recovered from when it cut."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from itertools import count

from vlmopt.core.adapter_file import NONE
from vlmopt.core.contract import Context, Pass, Plan, Promise, Site
from vlmopt.core.errors import GateError
from vlmopt.core.guarding import DEFAULT_TIME_LIMIT_S
from vlmopt.core.program import Program
from vlmopt.graph.modules import ADAPTERS
from vlmopt.recipe.schema import ADAPTER_NAME
from vlmopt.rewrite.pipeline import Observer, StepResult, run_step
from vlmopt.verify.parity import check_step
from vlmopt.workflow.attaching import AttachedAdapter, trained_adapter
from vlmopt.workflow.choosing_edits import choose_among
from vlmopt.workflow.letting_through import let_through
from vlmopt.workflow.measuring import note_gates, note_mixtures
from vlmopt.workflow.recovering import lost_too_much, recovered, rounds, trains_after, tuned
from vlmopt.workflow.refusing import refuse_idle_quantization
from vlmopt.workflow.requested import requested_statistics
from vlmopt.workflow.run_state import RunState
from vlmopt.workflow.together import begins_together, plan_together

_LEAST_HEADROOM = 0.5  # points; below it the choice is made as if nothing were trained


def run_passes(
    state: RunState,
    passes: Sequence[Pass],
    *,
    observers: Sequence[Observer] = (),
    fuel: int | None = None,
    time_limit_s: float = DEFAULT_TIME_LIMIT_S,
) -> list[StepResult]:
    """Runs the passes on the original of `state` and leaves the result in it.

    Where training has not made up for what a chosen cut lost, they run again with a more cautious choice.

    Args:
        fuel: largest number of sites to apply, over all passes together; the recipe's `max_sites` holds beside it.
        time_limit_s: for each call of a pass.

    Raises:
        GateError: a pass broke its promise.
        PassError: a pass failed, or broke its contract.
    """
    state.headroom, asked = state.recipe.recovery.headroom if state.recipe.recovery.trains else 0.0, state.recipe
    limits = tuple(limit for limit in (fuel, state.recipe.max_sites) if limit is not None)
    while True:
        state.recipe = asked  # one plan over several passes writes its sites there
        steps = _run_once(state, passes, observers, limits, time_limit_s)
        if not lost_too_much(state):
            return steps
        state.headroom = state.headroom / 2 if state.headroom > _LEAST_HEADROOM else 0.0
        state.progress.message(f"plan: chosen again with a headroom of {state.headroom:g} points")


def _run_once(
    state: RunState,
    passes: Sequence[Pass],
    observers: Sequence[Observer],
    limits: Sequence[int],
    time_limit_s: float,
) -> list[StepResult]:
    program, steps = state.original, list[StepResult]()
    state.reference, state.gates, state.traversal_gates = state.original, [], {}
    state.tuned, state.trained, state.through, state.mixtures = None, None, None, []
    training = trains_after(passes, state.recipe.recovery)
    for number in count(1):
        state.step = number
        if number <= len(passes) and begins_together(state.recipe, passes, number):
            passes = plan_together(state, program, passes)
            training = trains_after(passes, state.recipe.recovery)
        if number > len(passes):
            break
        pass_ = passes[number - 1]
        left = None if not limits else max(0, min(limits) - sum(len(done.applied) for done in steps))
        if training is None or number > training:  # what follows may fold them
            note_mixtures(state, program)
        with state.progress.stage(f"pass {pass_.name}"), state.ledger.timed(f"20-passes/{number:02d}-{pass_.name}"):
            context = _context(state, program, pass_, time_limit_s)
            result = run_step(
                program,
                pass_,
                context,
                step=number,
                choose=partial(_chosen, state, pass_, context, left),
                fuel=left,
                observers=observers,
                time_limit_s=time_limit_s,
            )
            refuse_idle_quantization(pass_, result)
            steps.append(result)
            _note(state, result)
            hold_to_promise(state, program, result)
            program = recovered(state, result, is_rounding=rounds(pass_))
            if number == training and any(step.promise is Promise.LOSSY and step.applied for step in steps):
                program = tuned(state, program)
                state.trained, state.through = _trained(state, program, steps), let_through(state, program)
            is_cut = any(step.promise is Promise.LOSSY and step.applied for step in steps)
            state.reference = program if not is_cut else reference_after(state, state.reference, pass_, result)
    note_gates(state, program)
    note_mixtures(state, program)
    state.optimized = program
    return steps


def _context(state: RunState, program: Program, pass_: Pass, time_limit_s: float) -> Context:
    """What the pass may know beside the program."""
    note_gates(state, program, pass_)
    known = requested_statistics(
        pass_,
        program,
        state.bound,
        state.progress,
        step=state.step,
        num_samples=state.recipe.num_samples,
        time_limit_s=time_limit_s,
    )
    return Context(importance=state.importance, statistics=known, seed=state.recipe.seed)


def _trained(state: RunState, program: Program, steps: Sequence[StepResult]) -> AttachedAdapter | None:
    """The adapter that the training made, named after its task; None where all weights were trained."""
    bound = state.bound
    if bound is None or state.recipe.recovery.level != ADAPTERS:
        return None
    name, opened = bound.task.specification.name, state.opened
    return trained_adapter(
        name if re.fullmatch(ADAPTER_NAME, name) and name != NONE else "trained",
        program,
        base=opened.program,
        steps=steps,
        options=[step.options for step in state.recipe.passes[: len(steps)]],
        data=bound.task.fingerprint,
        seed=state.recipe.seed,
        on=opened.adapters[0] if opened.adapters else None,
    )


def reference_after(state: RunState, reference: Program, pass_: Pass, result: StepResult) -> Program:
    """The original behind a step that follows the first cut: its components must stay comparable with the program's.

    Until then the program itself is the reference.
    """
    if pass_.promise is Promise.LOSSY or not pass_.changes_signature or not result.applied:
        return reference
    return run_step(reference, pass_, Context(seed=state.recipe.seed), step=result.step).program


def _chosen(
    state: RunState, pass_: Pass, context: Context, fuel: int | None, program: Program, plan: Plan
) -> list[Site]:
    if fuel == 0:
        return []  # a search for what cannot be cut is spared
    return choose_among(state, program, pass_, plan, context)


def _note(state: RunState, result: StepResult) -> None:
    folder = state.run.work(f"20-passes/{result.step:02d}-{result.name}")
    for name, text in result.text_before.items():
        (folder / f"{name}.before.txt").write_text(text, encoding="utf-8")
    for name, text in result.text_after.items():
        (folder / f"{name}.after.txt").write_text(text, encoding="utf-8")
    state.ledger.note("passes", result.name, n_sites=len(result.plan.sites), n_applied=len(result.applied))


def hold_to_promise(state: RunState, before: Program, result: StepResult) -> None:
    feeds = state.sample_feeds(before)
    gate = check_step(f"{result.step} {result.name}", result.promise, before, result.program, feeds)
    if gate is not None:
        state.gates.append(gate)
        if not gate.passed:
            found = f"changed the result by {gate.found:.2g} of the largest output"
            raise GateError(f"step {result.step} {result.name}", found, expected=f"at most {gate.allowed:.0e}")
