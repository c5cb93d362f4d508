"""Small random programs through every exact and close pass."""

from __future__ import annotations

import os
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from vlmopt.core.contract import Promise
from vlmopt.emit.exported import export_component
from vlmopt.graph.costing import component_cost
from vlmopt.registry import find_passes, load_pass
from vlmopt.rewrite.pipeline import program_text
from vlmopt.testing.graphs import BLOCKS, STEMS, Blueprint, blueprints, build_program, fitting, random_blueprint
from vlmopt.testing.harness import CATALOGUE, result_on, subject_of
from vlmopt.testing.inputs import feeds_of
from vlmopt.testing.numbers import outputs_of
from vlmopt.testing.trial import Case, Trial

KEPT = [name for name, info in find_passes().items() if info.promise is not Promise.LOSSY]
IN_CI = bool(os.environ.get("CI"))
quick = settings(max_examples=12, deadline=None, derandomize=IN_CI)
thorough = settings(max_examples=50, deadline=None, derandomize=IN_CI)


def hold(blueprint: Blueprint, *, is_emitted: bool) -> None:
    """Every exact and close pass keeps every general rule on this program, and what it leaves exports again."""
    for name in KEPT:
        subject = subject_of(name)
        program = build_program(fitting(blueprint, subject.pass_class))
        trial = Trial(subject, Case("random", lambda made=program: made, 0))
        results = [result_on(check, subject, trial) for check in CATALOGUE.values() if check.is_general]
        assert [result.one_line() for result in results if not result.is_fine] == []
        if is_emitted:
            assert result_on(CATALOGUE["exports-again"], subject, trial).is_fine
        elif trial.attempt.applied:
            assert_exports(trial)


def assert_exports(trial: Trial) -> None:
    after = trial.attempt.program
    feeds = feeds_of((after,), kind="random", seed=4, batch=3)
    wanted = outputs_of(after, feeds)
    for name, component in after.components.items():
        exported = export_component(component, after.dims).module()
        found = exported(*feeds[name].values())
        for spec, value in zip(component.outputs, found, strict=True):
            assert torch.equal(value, wanted[f"{name}/{spec.name}"])


@given(blueprints())
@quick
def test_exact_and_close_passes_hold_on_any_small_program(blueprint: Blueprint) -> None:
    hold(blueprint, is_emitted=False)


@pytest.mark.slow
@given(blueprints())
@thorough
def test_they_hold_on_many_more(blueprint: Blueprint) -> None:
    hold(blueprint, is_emitted=False)


@pytest.mark.slow
@given(blueprints())
@quick
def test_what_they_leave_runs_in_onnx_runtime(blueprint: Blueprint) -> None:
    hold(blueprint, is_emitted=True)


@pytest.mark.parametrize("stem", STEMS)
def test_every_block_of_the_random_programs_builds_and_runs(stem: str) -> None:
    blueprint = Blueprint(stem, tuple(BLOCKS), 4, 0, has_head=True, is_raw=True)
    program = build_program(blueprint)
    outputs = outputs_of(program, feeds_of((program,), kind="random", seed=0, batch=5))
    assert [value.shape[0] for value in outputs.values()] == [5, 5]
    assert component_cost(program.components["model"], program.dims).parameters > 0
    assert program_text(build_program(blueprint)) == program_text(program)


def test_random_blueprints_come_from_their_numbers_alone() -> None:
    made = [random_blueprint(random.Random(f"{seed}")) for seed in range(50)]
    assert made == [random_blueprint(random.Random(f"{seed}")) for seed in range(50)]
    assert {blueprint.stem for blueprint in made} == set(STEMS)
    assert {name for blueprint in made for name in blueprint.blocks} == set(BLOCKS)
    assert {blueprint.is_raw for blueprint in made} == {True, False}


def test_dead_code_is_left_to_the_pass_whose_work_it_is() -> None:
    blueprint = Blueprint("values", ("ffn", "dead code"), 4, 0, has_head=False, is_raw=True)
    assert fitting(blueprint, load_pass("canonicalize")) == blueprint
    assert fitting(blueprint, load_pass("fold-constants")) == replace(blueprint, blocks=("ffn",))
    assert fitting(blueprint, load_pass("skip-branches")) == replace(blueprint, blocks=("ffn",), is_raw=False)
