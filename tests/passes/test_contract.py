"""Every registered pass keeps the contract on its own cases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from vlmopt.core.contract import Case, Pass, Promise
from vlmopt.core.errors import PassError
from vlmopt.core.program import Component, Program
from vlmopt.emit import emit_onnx
from vlmopt.graph.replay import run_component
from vlmopt.registry import find_passes, load_pass, make_pass
from vlmopt.rewrite.pipeline import StepResult, program_text, run_step
from vlmopt.verify.parity import check_step
from vlmopt.verify.tolerances import ARTIFACT

CASES = [(name, case) for name in find_passes() for case in load_pass(name).cases()]
IDS = [f"{name}: {case.name}" for name, case in CASES]
every_case = pytest.mark.parametrize(("name", "case"), CASES, ids=IDS)


def random_feeds(program: Program, *, seed: int, batch: int) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: {
            spec.name: torch.randn([batch if d == "batch" else int(d) for d in spec.shape], generator=generator)
            for spec in component.inputs
        }
        for name, component in program.components.items()
    }


BUILT: dict[str, tuple[Program, Pass, StepResult]] = {}


def step_of(name: str, case: Case) -> tuple[Program, Pass, StepResult]:
    """The case's program, its pass and what the pass made of it; built once, since nothing may change a program."""
    key = f"{name}: {case.name}"
    if key not in BUILT:
        program, pass_ = case.build(), make_pass(name, case.options)
        BUILT[key] = (program, pass_, run_step(program, pass_, case.context, step=1))
    return BUILT[key]


def weights_of(program: Program) -> dict[str, Tensor]:
    parts = program.components.items()
    return {
        f"{name}/{path}": tensor.clone()
        for name, part in parts
        for path, tensor in [*part.graph.named_parameters(), *part.graph.named_buffers()]
    }


@every_case
def test_it_fires_and_refuses_as_its_case_says(name: str, case: Case) -> None:
    _, _, result = step_of(name, case)
    assert len(result.plan.sites) == case.n_sites
    assert len(result.applied) + len(result.gone) == case.n_sites
    reasons = [refusal.reason for refusal in result.refusals]
    for wanted in case.refusals:
        assert any(wanted in reason for reason in reasons), reasons
    assert bool(reasons) == bool(case.refusals)


@every_case
def test_it_keeps_its_promise_on_random_inputs(name: str, case: Case) -> None:
    program, pass_, result = step_of(name, case)
    for seed, batch in ((0, 2), (1, 5)):
        gate = check_step(name, pass_.promise, program, result.program, random_feeds(program, seed=seed, batch=batch))
        if pass_.promise is Promise.LOSSY:
            assert gate is None
        else:
            assert gate is not None
            assert gate.passed, gate
            assert gate.allowed == (0.0 if pass_.promise is Promise.EXACT else 1e-5)


@every_case
def test_it_saves_what_it_predicts(name: str, case: Case) -> None:
    _, _, result = step_of(name, case)
    assert result.predicted == result.counted


@every_case
def test_a_second_time_it_finds_nothing_to_do(name: str, case: Case) -> None:
    _, pass_, result = step_of(name, case)
    if result.applied and case.options:  # the sites that the options name are gone
        with pytest.raises(PassError, match="matches nothing"):
            run_step(result.program, pass_, case.context, step=2)
        return
    again = run_step(result.program, pass_, case.context, step=2)
    assert again.applied == ()
    assert again.text_after == result.text_after


@every_case
def test_it_does_the_same_every_time_and_leaves_its_input_alone(name: str, case: Case) -> None:
    program, pass_, first = step_of(name, case)
    text, weights = program_text(program), weights_of(program)
    second = run_step(program, pass_, case.context, step=1)
    assert first.plan == second.plan
    assert first.text_after == second.text_after
    assert program_text(program) == text == first.text_before
    after = weights_of(program)
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[key], weights[key]) for key in weights)
    rebuilt = run_step(case.build(), pass_, case.context, step=1)
    assert rebuilt.text_after == first.text_after


@every_case
def test_without_fuel_nothing_happens(name: str, case: Case) -> None:
    program, pass_, _ = step_of(name, case)
    result = run_step(program, pass_, case.context, step=1, fuel=0)
    assert result.applied == ()
    assert len(result.left) == case.n_sites
    assert program_text(program) == result.text_after


@every_case
def test_its_new_nodes_name_their_maker(name: str, case: Case) -> None:
    program, _, result = step_of(name, case)
    known = {(c, node.name) for c, part in program.components.items() for node in part.graph.graph.nodes}
    for component, part in result.program.components.items():
        for node in part.graph.graph.nodes:
            assert ("made_by" in node.meta) == ((component, node.name) not in known)
            assert node.meta.get("made_by", (1, name)) == (1, name)


@every_case
def test_its_result_exports_again_and_runs_in_onnx_runtime(name: str, case: Case, tmp_path: Path) -> None:
    _, _, result = step_of(name, case)
    program = result.program
    feeds = random_feeds(program, seed=2, batch=3)
    for component_name, component in program.components.items():
        feed = feeds[component_name]
        wanted = run_component(component, [feed])
        found = in_onnx_runtime(component, program, feed, tmp_path / f"{component_name}.onnx")
        assert found.shape == wanted.shape
        scale = float(wanted.abs().max())
        assert float((found - wanted).abs().max()) <= ARTIFACT[component.outputs[0].dtype] * scale


def in_onnx_runtime(component: Component, program: Program, feed: dict[str, Tensor], path: Path) -> Tensor:
    """The first output of the component, exported again through torch.export and run as an ONNX file."""
    emit_onnx(component, program.dims, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    arrays = {key: value.numpy() for key, value in feed.items()}
    return torch.from_numpy(np.asarray(session.run(None, arrays)[0]))
