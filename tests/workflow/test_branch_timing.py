"""Times of branches: what is left out takes time, what is alike gets one time, and sums are held against a real cut."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.workflow.profiles import profile
from vlmopt.core.progress import Silent
from vlmopt.graph.branches import find_branches
from vlmopt.graph.costing import component_cost
from vlmopt.graph.example import program_of
from vlmopt.workflow.branch_timing import ComponentTimes, error_lines, has_times, time_branches, with_latency
from vlmopt.workflow.cutting import cut_program


class Stack(nn.Module):
    """Residual blocks, two of them much wider than the other two."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1024, 1024, 8, 8)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(256, width), nn.ReLU(), nn.Linear(width, 256)) for width in widths
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_wide_branches_take_longer_than_narrow_ones_and_those_alike_the_same() -> None:
    program = program_of(Stack(), torch.ones(2, 64, 256))
    (name,) = program.components
    feed = {program.components[name].inputs[0].name: torch.ones(2, 64, 256)}
    found = time_branches(program, {name: feed}, progress=Silent(), runs=30)[name]
    times = list(found.branches_us.values())
    assert len(times) == 4
    assert times[0] == times[1] > 4 * times[2]
    assert times[2] == times[3] >= 0.0
    assert sum(times) < 1.3 * found.whole_us  # all there is but the clock
    assert found.mixed_predicted_us == pytest.approx(found.whole_us - times[0] - times[2], rel=1e-12)
    assert found.error is not None
    assert abs(found.error) < 0.5


def test_a_program_is_cut_without_touching_the_original() -> None:
    program = program_of(Stack(), torch.ones(2, 4, 256))
    (name,) = program.components
    before = component_cost(program.components[name], program.dims)
    branches = [branch.name for branch in find_branches(program.components[name].graph)]
    cut = cut_program(program, {name: branches[:2]})
    after = component_cost(cut.components[name], cut.dims)
    assert component_cost(program.components[name], program.dims) == before
    assert before.parameters - after.parameters == 2 * (2 * 256 * 1024 + 1024 + 256)
    assert [branch.name for branch in find_branches(cut.components[name].graph)] == branches[2:]


def test_times_are_put_into_the_profile_and_layers_are_sums() -> None:
    made = profile("style", seed=0, with_times=False)
    assert not has_times(made)
    branches = {s.name: float(i) for i, s in enumerate(s for s in made.scores if s.scope == "branch")}
    program = program_of(Stack(), torch.ones(2, 4, 256))
    timed = with_latency(made, program, {"encoder": ComponentTimes(50.0, branches)})
    assert has_times(timed)
    by_name = {score.name: score.latency_us for score in timed.scores}
    assert by_name["layers.1.attention"] == 2.0
    assert by_name["layers.1"] == 2.0 + 3.0
    assert timed.totals[0].latency_us == 50.0
    assert [score.score for score in timed.scores] == [score.score for score in made.scores]


def test_a_branch_that_cannot_be_timed_has_no_time() -> None:
    made = profile("style", seed=0, with_times=False)
    program = program_of(Stack(), torch.ones(2, 4, 256))
    timed = with_latency(made, program, {"encoder": ComponentTimes(50.0, {"layers.0.ffn": 3.0})})
    by_name = {score.name: score.latency_us for score in timed.scores}
    assert by_name["layers.0.ffn"] == 3.0
    assert by_name["layers.0"] is by_name["layers.0.attention"] is None


def test_the_error_of_the_sum_is_told_with_its_sign() -> None:
    lines = error_lines({"model": ComponentTimes(100.0, {}, 60.0, 80.0), "head": ComponentTimes(9.0, {})})
    assert lines == ["model: a mixed cut takes 80 us, the sum of branch times says 60 us (-25 %)"]
