"""What follows a cut: heads fitted anew, closed-form compensation, and training where the recipe asks for it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from vlmopt.core.contract import Pass, Promise
from vlmopt.core.errors import TuningError
from vlmopt.core.facts import ADAPTERS_INSERTED, QUANTIZED
from vlmopt.core.program import Program
from vlmopt.core.workload import by_part
from vlmopt.graph.adapters import adapter_parameters
from vlmopt.graph.joined import Joined, joined
from vlmopt.graph.modules import ADAPTERS
from vlmopt.recipe.schema import RecoverySettings
from vlmopt.rewrite.pipeline import StepResult
from vlmopt.rundir import TUNING_WORK, atomic_write
from vlmopt.tuning.closed_form import recover_closed_form, recover_heads
from vlmopt.tuning.gradient import Epoch, State, Tuned, teacher_of, tune
from vlmopt.tuning.trainable import Wanted
from vlmopt.workflow.remembering import tuning_key
from vlmopt.workflow.run_state import RunState
from vlmopt.workflow.trainings import followed, trainings_of

_STATE = "state.safetensors"


def recovered(state: RunState, result: StepResult, *, is_rounding: bool = False) -> Program:
    """After a cut the heads behind it are fitted anew on the whole profile split, and kept branches where asked for.

    Weights that are rounded behind a training keep the heads that were trained with them.
    """
    cut = frozenset(site.component for site in result.applied)
    if result.promise is not Promise.LOSSY or not cut or state.bound is None:
        return result.program
    if state.tuned is not None and is_rounding:
        return result.program
    if result.program.generation is not None:
        return result.program  # the last linear map gives the words of a language, which no single task can fit
    fit = state.bound.source.workload(result.program, "profile", limit=state.recipe.num_samples)
    reference = state.outputs_of(state.reference, fit)
    program, seed = result.program, state.recipe.seed
    if state.recipe.recovery.level != "closed-form":
        return recover_heads(program, fit, reference, components=cut, progress=state.progress, seed=seed)
    check = state.bound.source.workload(program, "validation", limit=state.recipe.num_samples)
    references = reference, state.outputs_of(state.reference, check)
    found = recover_closed_form(
        program, state.reference, fit, check, references, components=cut, progress=state.progress, seed=seed
    )
    for name, losses in found.losses.items():
        fits = [asdict(one) for one in found.compensations.get(name, ())]
        state.ledger.note("compensation", name, heads_alone=losses[0], compensated=losses[1], fits=fits)
        verdict = "taken over" if fits else "left out, it is no better"
        state.progress.message(f"compensation of {name}: loss {losses[0]:.4g} to {losses[1]:.4g}, {verdict}")
    return found.program


def trains_after(passes: Sequence[Pass], recovery: RecoverySettings) -> int | None:
    """The number of the step behind which the recipe's training takes place: the last that changes the function, in
    front of those that take out or replace what was inserted to be trained, and of those that leave integers where
    weights are to train."""
    if not recovery.trains:
        return None
    lossy = [number for number, pass_ in enumerate(passes, 1) if pass_.promise is Promise.LOSSY]
    taking = [number for number in lossy if ADAPTERS_INSERTED in passes[number - 1].requires]
    rounding = [number for number in lossy if recovery.level == "weights" and rounds(passes[number - 1])]
    changing = [number for number in lossy if number not in taking]
    in_front = [number for number in changing if number < min([*taking, *rounding], default=math.inf)]
    return max(in_front or changing, default=None)


def rounds(pass_: Pass) -> bool:
    """Whether the pass leaves integers in the place of weights."""
    return QUANTIZED in pass_.produces


def tuned(state: RunState, program: Program) -> Program:
    """The program after training on the profile split, judged on the validation split after every epoch.

    Raises:
        TuningError: there is no task to train on, nothing to train, or a loss that is not finite.
    """
    recipe, recovery = state.recipe, state.recipe.recovery
    if state.bound is None:
        raise TuningError("recovery", f"{recovery.level} trains on a task", remedy="give the recipe a task")
    if recovery.level == ADAPTERS and not recovery.stages and not adapter_parameters(program):
        raise TuningError(
            "recovery",
            "the program holds no adapters, so only the heads would be trained",
            remedy="insert adapters with a pass (`vlmopt passes list`), or train with level: weights",
        )
    fit = state.bound.source.workload(program, "profile", limit=recipe.num_samples)
    check = state.bound.source.workload(program, "validation", limit=recipe.num_samples)
    key = tuning_key(state, state.bound, program, workloads=[fit.fingerprint, check.fingerprint])
    with state.stage("tuning"):
        trainings = trainings_of(program, recovery, seed=recipe.seed)
        distils = any(one.settings.distils for one in trainings)
        teacher = teacher_of(state.reference, fit, progress=state.progress) if distils else None
        whole = joined(program)
        found: Tuned | None = None
        for number, one in enumerate(trainings):
            folder = f"{key}-{number}" if number else key
            store = FileStore(state.run.work(f"{TUNING_WORK}/{folder}"))
            start = whole.program if found is None else found.program
            wanted = partial(_is_wanted, one.wanted, whole)
            own = tune(start, wanted, fit, check, teacher, one.settings, progress=state.progress, store=store)
            found = own if found is None else followed(found, own)
        assert found is not None
        found = replace(found, program=whole.separated(program, found.program))
    state.tuned = found
    best = found.history[found.best]
    history = [asdict(epoch) for epoch in found.history]
    state.ledger.note("tuning", recovery.level, best=found.best, n_trainable=found.n_trainable, history=history)
    state.progress.message(_line(found, best))
    return found.program


def lost_too_much(state: RunState) -> bool:
    """Whether training left a chosen cut with too large a drop on validation, and a smaller cut may be tried."""
    drop, bound = state.recipe.budgets.drop, state.bound
    if drop is None or bound is None or state.tuned is None or state.choice is None or state.headroom <= 0:
        return False
    check = bound.source.workload(bound.program, "validation", limit=state.recipe.num_samples)
    scores = check.item_scores(dict(state.outputs_of(state.original, check)))
    best = state.tuned.history[state.tuned.best]
    worst, found, allowed = -math.inf, 0.0, 0.0
    for part, own in by_part(check, scores).items():
        original = 100 * float(own.mean())
        lost, may = original - 100 * best.part_scores[part], drop.resolve(original)
        if lost - may > worst:
            worst, found, allowed = lost - may, lost, may
    if worst <= 0:
        return False
    what = f"after training the drop on validation is {found:.2f} points, {allowed:g} allowed"
    state.ledger.note("tuning", "lost too much", drop_points=found, allowed_points=allowed, headroom=state.headroom)
    state.progress.message(f"tuning: {what}")
    state.warnings.append(f"a cut was given up: {what}")
    return True


def _line(found: Tuned, best: Epoch) -> str:
    before = found.history[0]
    return (
        f"tuning: {found.n_trainable:,} weights, best of {len(found.history) - 1} epochs is {found.best}; "
        f"validation loss {before.validation_loss:.4g} to {best.validation_loss:.4g}, "
        f"metric {100 * before.validation_score:.1f} to {100 * best.validation_score:.1f}"
    )


def _is_wanted(wanted: Wanted, whole: Joined, key: str) -> bool:
    return wanted(whole.own_path(key))


class FileStore:
    """Keeps the state of a training in one file, written atomically: a killed run loses one epoch at most."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _STATE

    def load(self) -> State | None:
        """What was saved last; None where nothing was, or where the file was torn by a crash."""
        with suppress(SafetensorError, FileNotFoundError, ValidationError, KeyError, TypeError):
            with safe_open(self._path, framework="pt") as file:
                facts = json.loads(file.metadata()["facts"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            history = TypeAdapter(tuple[Epoch, ...]).validate_python(facts["history"])
            return State(tensors, int(facts["step"]), int(facts["best"]), history)
        return None

    def save(self, state: State) -> None:
        facts = {"step": state.step, "best": state.best, "history": [asdict(epoch) for epoch in state.history]}
        tensors = {name: tensor.contiguous().clone() for name, tensor in state.tensors.items()}
        with torch.no_grad():
            atomic_write(self._path, save(tensors, metadata={"facts": json.dumps(facts)}))
