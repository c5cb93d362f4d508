"""A program on an accelerator is fed from the CPU and answers there: the same numbers, up to rounding."""

from __future__ import annotations

import pytest
import torch

from tests.profiling.workloads import planted_program, planted_workload, with_head
from vlmopt.core.program import Program
from vlmopt.core.progress import Silent
from vlmopt.graph.replay import run_component
from vlmopt.planning.meter import CutMeter
from vlmopt.profiling.estimator import no_checkpoint
from vlmopt.profiling.selection import make_estimator
from vlmopt.rewrite.pipeline import clone_program
from vlmopt.tuning.gradient import tune
from vlmopt.tuning.settings import TuningSettings

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
FIT, CHECK = planted_workload(seed=1), planted_workload(seed=2)


def here_and_there() -> tuple[Program, Program]:
    program = with_head(planted_program(), FIT)
    moved = clone_program(program)
    moved.components["model"].graph.to("cuda")
    return program, moved


@needs_cuda
@pytest.mark.parametrize("estimator", ["leave-one-out", "fisher", "logit-distortion", "compensated-distortion"])
def test_scores_are_the_same_on_both(estimator: str) -> None:
    found = []
    for program in here_and_there():
        made = make_estimator(estimator, "refit", with_layers=False, with_stability=None)
        estimate = made.estimate(program, FIT, progress=Silent(), checkpoint=no_checkpoint, seed=0)
        found.append([score.mean for score in estimate.scores])
    assert found[0] == pytest.approx(found[1], abs=1e-3)


@needs_cuda
def test_cuts_are_measured_and_weights_trained_on_both() -> None:
    outcomes = []
    for program in here_and_there():
        (cut,) = CutMeter(program, FIT, CHECK, {}, progress=Silent()).measure([frozenset({"model/layers.0.ffn"})])
        settings = TuningSettings(epochs=2, learning_rate=1e-3)
        tuned = tune(program, lambda key: True, FIT, CHECK, None, settings, progress=Silent())
        outputs = run_component(tuned.program.components["model"], CHECK.feeds["model"])
        assert outputs.device.type == "cpu"
        outcomes.append((cut.drop_points, tuned.history[-1].train_loss))
    assert outcomes[0] == pytest.approx(outcomes[1], rel=1e-2, abs=0.5)
