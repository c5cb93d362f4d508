"""What can be wrong with a program after a site: each question answers with the fault, or with None."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

import torch

from vlmopt.core.contract import Promise
from vlmopt.core.errors import ArtifactError, EmitError, VlmoptError
from vlmopt.core.program import Component, Program
from vlmopt.core.progress import Silent
from vlmopt.core.workload import Feed
from vlmopt.emit import DEFAULT_OPSET, emit_program
from vlmopt.graph.replay import inputs_of, run_outputs
from vlmopt.verify.bisection import Answer
from vlmopt.verify.parity import check_file, check_step, two_shapes

CANNOT_SAY = 125  # the exit code by which a check says so, as for `git bisect run`


class Fault(Enum):
    """What kind of thing is wrong."""

    NONE = "none"
    FAILS = "fails"  # a pass raises or breaks an invariant, or the program cannot be run
    PROMISE = "promise"
    FINITE = "finite"
    FILE = "file"  # the emitted file cannot be made, or computes something else
    DROP = "drop"
    COMMAND = "command"


@dataclass(frozen=True)
class Finding:
    """The answer for one state, with one line about what is wrong."""

    answer: Answer
    fault: Fault = Fault.NONE
    text: str = ""

    @property
    def exit_code(self) -> int:
        """What a script exits with, in the terms of `git bisect run`."""
        return {Answer.GOOD: 0, Answer.BAD: 1, Answer.UNKNOWN: CANNOT_SAY}[self.answer]


GOOD = Finding(Answer.GOOD)


def bad(fault: Fault, text: str) -> Finding:
    return Finding(Answer.BAD, fault, text)


def failure(error: VlmoptError) -> Finding:
    """A state that cannot be built, for this reason."""
    return bad(Fault.FAILS, VlmoptError(error.place, error.found, expected=error.expected).one_line())


def cannot_run(error: Exception) -> Finding:
    """A program that raises when it is run."""
    reason = " ".join(str(error).split())[:200]
    return bad(Fault.FAILS, f"the program cannot be run: {type(error).__name__}: {reason}")


def broken_promise(
    name: str, promise: Promise, before: Program, after: Program, feeds: Mapping[str, Feed]
) -> Finding | None:
    """A step that changes the result by more than its promise allows."""
    gate = check_step(name, promise, before, after, feeds)
    if gate is None or gate.passed:
        return None
    text = f"{name} promises to be {promise.value}, and changes the result by {gate.found:.3g} of the largest output"
    return bad(Fault.PROMISE, f"{text} (allowed {gate.allowed:.0e})")


def not_finite(program: Program, feeds: Mapping[str, Feed]) -> Finding | None:
    """The first output that holds a NaN or an infinity."""
    for name, component in program.components.items():
        feed = program.fixed_inputs.get(name) or feeds[name]
        with torch.no_grad():
            values = component.graph(*inputs_of(component, feed))
        for spec, value in zip(component.outputs, values, strict=True):
            n = int((~torch.isfinite(value)).sum())
            if n:
                found = f"{n} of {value.numel()} values that are not finite"
                return bad(Fault.FINITE, f"output {spec.name} of {name} holds {found}")
    return None


def other_file(
    program: Program,
    component: Component,
    feed: Feed,
    folder: Path,
    *,
    formats: Sequence[str] = ("onnx",),
    opset: int = DEFAULT_OPSET,
) -> Finding | None:
    """A file of the component that cannot be written, or computes something else in its own runtime."""
    alone = program.with_components({component.name: component})
    shapes = [feed] if program.generation is not None else two_shapes(component, feed, program.dims)
    cases = [(case, run_outputs(component, case)) for case in shapes]
    try:
        files = emit_program(alone, formats, folder, progress=Silent(), opset=opset)
        for kind in formats:
            file = files[component.name][kind]
            gate = check_file(file, folder / file, kind, cases, dtype=component.outputs[0].dtype)
            if not gate.passed:
                text = f"{file} differs from the program by {gate.found:.3g} of the largest output"
                return bad(Fault.FILE, f"{text} (allowed {gate.allowed:.0e})")
    except (EmitError, ArtifactError) as error:
        return replace(failure(error), fault=Fault.FILE)
    return None
