"""Does the result compute what was promised: on all kinds of inputs, at every batch, and in ONNX Runtime?"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vlmopt.core.errors import VlmoptError
from vlmopt.core.program import Component, Program
from vlmopt.emit import emit_onnx
from vlmopt.graph.text import component_text
from vlmopt.rewrite.pipeline import run_step
from vlmopt.runtime.session import open_session
from vlmopt.testing.attempt import STEP, own_copy
from vlmopt.testing.checks.check import RESULT, CaseCheck
from vlmopt.testing.inputs import Feeds, feeds_of, shape_at, sizes_of
from vlmopt.testing.numbers import first_not_finite, outputs_of, widest_gap
from vlmopt.testing.trial import Finding, Inapplicable, Outcome, Trial
from vlmopt.verify.parity import difference
from vlmopt.verify.tolerances import ARTIFACT

BATCHES = (1, 2, 5)
EXPORT_BATCH = 3
MAX_STOPS = 4


def keeps_its_promise(trial: Trial) -> Outcome:
    broken = broken_promise(trial, trial.attempt.program)
    if broken is None and trial.pass_.promise.value == "lossy":
        return Inapplicable("the task judges what a lossy pass does")
    return broken


def broken_promise(trial: Trial, program: Program) -> Finding | None:
    """The first kind of input on which the program computes something else than before the pass."""
    for kind, feeds in trial.feeds.items():
        gap = widest_gap(trial.pass_.promise, trial.attempt.before, program, feeds)
        if gap is not None and gap.is_too_wide:
            found = f"on {kind} inputs {gap.output} differs by {gap.found:.3g}"
            return Finding(found, expected=f"at most {gap.allowed:g}, as {trial.pass_.promise.value} promises")
    return None


def keeps_numbers_finite(trial: Trial) -> Outcome:
    for kind, feeds in trial.feeds.items():
        if first_not_finite(trial.attempt.before, feeds) is not None:
            continue
        where = first_not_finite(trial.attempt.program, feeds)
        if where is not None:
            return Finding(f"on {kind} inputs {where} is not finite", expected="finite numbers, as before")
    return None


def stays_dynamic(trial: Trial) -> Outcome:
    before, after = trial.attempt.before, trial.attempt.program
    frozen = _frozen_dimension(before, after)
    if frozen:
        return Finding(frozen, expected="the named dimension that was there")
    if not any(
        isinstance(size, str) for part in after.components.values() for spec in part.inputs for size in spec.shape
    ):
        return Inapplicable("the case has no named dimensions")
    for more, batch in enumerate(BATCHES):
        feeds = feeds_of((before, after), kind="random", seed=trial.settings.seed + 10 + batch, batch=batch, more=more)
        try:
            problem = _problem_at(trial, feeds, batch=batch, more=more)
        except RuntimeError as error:  # what torch raises for shapes that do not fit
            problem = f"cannot be run ({' '.join(str(error).split())[:150]})"
        if problem:
            return Finding(f"at batch {batch} it {problem}", expected="a program for every size of its dimensions")
    return None


def _frozen_dimension(before: Program, after: Program) -> str:
    for name, part in after.components.items():
        known = before.components.get(name)
        if known is None:
            continue
        old_inputs = {spec.name: spec for spec in known.inputs}
        pairs = [(old_inputs[spec.name], spec) for spec in part.inputs if spec.name in old_inputs]
        pairs += list(zip(known.outputs, part.outputs, strict=False))
        for old, new in pairs:
            for axis, (size, found) in enumerate(zip(old.shape, new.shape, strict=False)):
                if isinstance(size, str) and found != size:
                    return f"dimension {axis} of {new.name} was {size} and is {found}"
    return ""


def _problem_at(trial: Trial, feeds: Feeds, *, batch: int, more: int) -> str:
    program = trial.attempt.program
    sizes = sizes_of(program.dims, batch=batch, more=more)
    found = outputs_of(program, feeds)
    for name, part in program.components.items():
        for spec in part.outputs if name not in program.fixed_inputs else ():
            shape = tuple(found[f"{name}/{spec.name}"].shape)
            if shape != shape_at(spec, sizes):
                return f"returns {spec.name} of shape {shape}, not {shape_at(spec, sizes)}"
    gap = widest_gap(trial.pass_.promise, trial.attempt.before, program, feeds)
    return f"differs by {gap.found:.3g} in {gap.output}" if gap is not None and gap.is_too_wide else ""


def exports_again(trial: Trial) -> Outcome:
    """The ONNX file of the result computes what the result computes."""
    if not trial.attempt.applied:
        return Inapplicable("nothing was changed")
    program = trial.attempt.program
    feeds = feeds_of((program,), kind="random", seed=trial.settings.seed + 20, batch=EXPORT_BATCH)
    for name, component in program.components.items():
        key = (_key(component), tuple(program.dims.values()), trial.settings.seed)
        memory = trial.subject.memory.exports
        if key not in memory:
            memory[key] = _export_problem(component, program, feeds)
        if memory[key]:
            return Finding(f"component {name}: {memory[key]}", expected="a graph that exports and runs")
    return None


def _export_problem(component: Component, program: Program, feeds: Feeds) -> str:
    feed = feeds[component.name]
    arrays = {key: np.ascontiguousarray(value.numpy()) for key, value in feed.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        try:
            emit_onnx(component, program.dims, path)
            session = open_session(path, threads=1)
            found = session.run([spec.name for spec in component.outputs], arrays)
        except VlmoptError as error:
            return error.found
        except Exception as error:  # noqa: BLE001 - ONNX Runtime's own exceptions share no public base class
            return f"ONNX Runtime cannot run it ({' '.join(str(error).split())[:150]})"
    with torch.no_grad():
        wanted: tuple[Tensor, ...] = component.graph(*(feed[spec.name] for spec in component.inputs))
    for spec, value, number in zip(component.outputs, wanted, found, strict=True):
        gap = difference(torch.from_numpy(np.asarray(number)), value)
        limit = ARTIFACT.get(str(value.dtype).removeprefix("torch."), 0.0)
        if not gap <= limit:
            return f"in ONNX Runtime {spec.name} differs by {gap:.3g}, allowed {limit:g}"
    return ""


def _key(component: Component) -> object:
    """What tells one graph from another for the export: its text, its modules' settings and its numbers."""
    modules = tuple(repr(module) for module in component.graph.modules() if module is not component.graph)
    digest = hashlib.sha256()
    for tensor in (*component.graph.parameters(), *component.graph.buffers()):
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return component_text(component), component.inputs, component.outputs, modules, digest.hexdigest()


def is_sound_after_every_site(trial: Trial) -> Outcome:
    """A run may stop after any site (`--limit`, `bisect`): what is there then must compute what was promised."""
    n_sites = len(trial.attempt.applied) + len(trial.attempt.gone)
    if n_sites < 2:
        return Inapplicable("fewer than two sites")
    for n in range(1, min(n_sites, MAX_STOPS + 1)):
        part = trial.attempt_on(trial.program, n_sites=n)
        if not part.is_complete:
            return Finding(f"stopped after {n} of {n_sites} sites, the program cannot be run: {part.broken}")
        broken = broken_promise(trial, part.program)
        if broken is not None:
            return Finding(f"stopped after {n} of {n_sites} sites, {broken.found}", broken.expected)
    return None


def is_accepted_by_the_pipeline(trial: Trial) -> Outcome:
    program, limit = own_copy(trial.program), trial.settings.time_limit_s
    step = run_step(program, trial.pass_, trial.case.context, step=STEP, time_limit_s=limit)
    if step.text_after != trial.attempt.texts:
        return Finding("the pipeline gets another graph out of it", expected="the same graph")
    return None


CHECKS = (
    CaseCheck(
        "keeps-its-promise",
        "exact and close passes: outputs are equal on example, zero, large (1e3) and seeded random inputs",
        keeps_its_promise,
        RESULT,
        is_general=True,
    ),
    CaseCheck(
        "keeps-numbers-finite", "inputs that gave finite outputs still do", keeps_numbers_finite, RESULT,
        is_general=True,
    ),
    CaseCheck(
        "stays-dynamic",
        "named dimensions stay named, and the result runs at batch 1, 2 and 5",
        stays_dynamic,
        RESULT,
        is_general=True,
    ),
    CaseCheck(
        "is-sound-after-every-site",
        "a run that stops between two sites keeps the promise as well",
        is_sound_after_every_site,
        (*RESULT, "keeps-its-promise"),
        is_general=True,
    ),
    CaseCheck(
        "exports-again", "the result exports to ONNX, and ONNX Runtime computes the same", exports_again,
        (*RESULT, "adds-no-alias"),
    ),
    CaseCheck(
        "is-accepted-by-the-pipeline",
        "the pipeline runs the pass and finds no rule broken",
        is_accepted_by_the_pipeline,
        (
            *RESULT, "stays-silent", "leaves-the-process-alone", "plans-without-editing", "writes-no-weight",
            "edits-no-shared-module", "keeps-the-signature", "adds-no-alias", "has-fresh-metadata",
            "returns-what-its-specs-say",
        ),
        is_general=True,
    ),
)  # fmt: skip
