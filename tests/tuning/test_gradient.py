"""Training on the program's own graph: it recovers what a cut cost, keeps the best epoch, and goes on after a stop."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.profiling.workloads import Classification, planted_program, planted_workload, with_head
from vlmopt.core.contract import Context
from vlmopt.core.errors import TuningError
from vlmopt.core.program import Program
from vlmopt.core.progress import Silent
from vlmopt.graph.replay import run_component
from vlmopt.registry import make_pass
from vlmopt.rewrite.pipeline import run_step
from vlmopt.tuning.gradient import State, teacher_of, tune
from vlmopt.tuning.settings import TuningSettings

FIT, CHECK = planted_workload(seed=1), planted_workload(seed=2)
SETTINGS = TuningSettings(epochs=4, batch_items=16, learning_rate=1e-2, patience=4, distillation=0.3)


class Memory:
    """Keeps every state; `stop_after` epochs it raises, as a kill does."""

    def __init__(self, *, stop_after: int = 0) -> None:
        self.states: list[State] = []
        self.stop_after = stop_after

    def load(self) -> State | None:
        return self.states[-1] if self.states else None

    def save(self, state: State) -> None:
        self.states.append(replace(state, tensors={name: value.clone() for name, value in state.tensors.items()}))
        if len(self.states) == self.stop_after:
            raise KeyboardInterrupt


def cut_program(original: Program) -> Program:
    """Without the block that writes the feature which decides."""
    return run_step(original, make_pass("skip-branches", {"branches": ["layers.1.ffn"]}), Context(), step=1).program


def loss(program: Program, workload: Classification = CHECK) -> float:
    outputs = {"model": run_component(program.components["model"], workload.feeds["model"])}
    return float(workload.losses(outputs).mean())


ORIGINAL = with_head(planted_program(), FIT)
CUT = cut_program(ORIGINAL)
TEACHER = teacher_of(ORIGINAL, FIT, progress=Silent())


def test_the_teacher_is_the_original_on_every_row() -> None:
    graph = ORIGINAL.components["model"].graph
    with torch.no_grad():
        assert torch.allclose(TEACHER.outputs["model"], graph(FIT.x)[0], atol=1e-6)
    head = graph.get_submodule("task_head")
    assert torch.allclose(head(TEACHER.features["model"]), TEACHER.outputs["model"], atol=1e-6)


def test_training_gets_back_a_part_of_what_the_cut_cost() -> None:
    found = tune(CUT, lambda key: True, FIT, CHECK, TEACHER, SETTINGS, progress=Silent())
    assert loss(ORIGINAL) < loss(CUT) - 0.05
    assert loss(found.program) < loss(CUT) - 0.05
    assert found.history[0].validation_loss == pytest.approx(loss(CUT), abs=1e-9)
    assert found.history[found.best].validation_loss == pytest.approx(loss(found.program), abs=1e-9)
    assert found.history[0].train_loss is None
    assert [epoch.number for epoch in found.history] == list(range(len(found.history)))
    graph = CUT.components["model"].graph
    assert found.n_trainable == sum(weight.numel() for weight in graph.parameters())


def test_the_program_given_keeps_every_weight() -> None:
    before = {name: weight.clone() for name, weight in CUT.components["model"].graph.named_parameters()}
    tune(CUT, lambda key: True, FIT, CHECK, TEACHER, SETTINGS, progress=Silent())
    after = dict(CUT.components["model"].graph.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_training_that_only_harms_leaves_the_program_as_it_was() -> None:
    harmful = replace(SETTINGS, learning_rate=30.0, gradient_norm=1e9, patience=2)
    found = tune(CUT, lambda key: True, FIT, CHECK, TEACHER, harmful, progress=Silent())
    assert found.best == 0
    assert len(found.history) == 3  # it stopped after two epochs without a better loss
    assert loss(found.program) == loss(CUT)


def test_a_stopped_training_goes_on_with_the_same_numbers() -> None:
    whole = tune(CUT, lambda key: True, FIT, CHECK, TEACHER, SETTINGS, progress=Silent())
    memory = Memory(stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        tune(CUT, lambda key: True, FIT, CHECK, TEACHER, SETTINGS, progress=Silent(), store=memory)
    resumed = tune(CUT, lambda key: True, FIT, CHECK, TEACHER, SETTINGS, progress=Silent(), store=memory)
    assert len(memory.states) == SETTINGS.epochs
    assert [epoch.validation_loss for epoch in resumed.history] == [epoch.validation_loss for epoch in whole.history]
    ours, theirs = (dict(p.program.components["model"].graph.named_parameters()) for p in (resumed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_only_wanted_weights_change() -> None:
    found = tune(CUT, lambda key: "task_head" in key, FIT, CHECK, TEACHER, SETTINGS, progress=Silent())
    ours, theirs = (dict(p.components["model"].graph.named_parameters()) for p in (found.program, CUT))
    changed = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert changed == {"task_head.weight", "task_head.bias"}


def test_bfloat16_trains_too_and_weights_stay_float32() -> None:
    half = replace(SETTINGS, precision="bfloat16")
    found = tune(CUT, lambda key: True, FIT, CHECK, TEACHER, half, progress=Silent())
    assert found.history[found.best].validation_loss < loss(CUT) - 0.05
    assert {weight.dtype for weight in found.program.components["model"].graph.parameters()} == {torch.float32}


def test_nothing_to_train_is_said() -> None:
    with pytest.raises(TuningError, match="no weight is to be trained"):
        tune(CUT, lambda key: "adapters." in key, FIT, CHECK, TEACHER, SETTINGS, progress=Silent())


def test_a_loss_that_is_no_number_is_said_with_its_step() -> None:
    spoiled = replace(FIT, x=torch.where(torch.arange(FIT.n_items)[:, None] == 3, math.nan, FIT.x))
    with pytest.raises(TuningError, match=r"tuning, step \d+: the loss is not a finite number.*learning_rate"):
        tune(CUT, lambda key: True, spoiled, CHECK, TEACHER, SETTINGS, progress=Silent())
