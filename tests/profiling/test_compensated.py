"""Distortions are what they say, and PRESS is leave-one-out without the fits."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from tests.profiling.workloads import planted_program, planted_workload, with_head
from vlmopt.core.errors import ProfileError
from vlmopt.core.program import Program
from vlmopt.core.progress import Silent
from vlmopt.graph.replay import run_component
from vlmopt.profiling.compensated import CompensatedDistortion, compensated_changes
from vlmopt.profiling.distortion import Distortion, distortions
from vlmopt.profiling.estimator import no_checkpoint
from vlmopt.profiling.part import feeds_of_rows, sampled_rows
from vlmopt.profiling.press import Kernel, press, press_errors


@pytest.fixture(scope="module")
def program() -> Program:
    return with_head(planted_program(), planted_workload())


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("width", [5, 40], ids=["more rows than features", "fewer rows than features"])
def test_press_predicts_every_row_as_a_fit_without_it_does(width: int) -> None:
    x, y = draws(20, width), draws(20, 3, seed=1)
    ridge = 0.3 * float(((x - x.mean(0)) ** 2).sum()) / 20  # the mean of the kernel's diagonal, of all rows
    found = Kernel.of(x).left_out(y, 0.3)
    for i in range(20):
        inside = [j for j in range(20) if j != i]
        mean_x, mean_y = x[inside].mean(0), y[inside].mean(0)
        a = x[inside] - mean_x
        weight = torch.linalg.solve(a.T @ a + ridge * torch.eye(width, dtype=torch.float64), a.T @ (y[inside] - mean_y))
        assert found[i].numpy() == pytest.approx((mean_y + (x[i] - mean_x) @ weight).numpy(), abs=1e-9)


def test_press_chooses_the_strength_that_predicts_best() -> None:
    x, y = draws(30, 6), draws(30, 1, seed=1)
    strengths = (1e-3, 1e-1, 1e1, 1e3)
    errors = [float(((Kernel.of(x).left_out(y, s) - y) ** 2).mean()) for s in strengths]
    assert press(x, y, strengths=strengths).strength == strengths[errors.index(min(errors))]


def test_a_change_of_basis_costs_nothing_and_lost_information_does() -> None:
    x = draws(60, 6)
    target = x @ draws(6, 2, seed=1)
    rotated = x @ torch.linalg.qr(draws(6, 6, seed=2))[0]
    without_a_column = x.clone()
    without_a_column[:, 0] = 0.0
    turned, lost = compensated_changes(x, [rotated, without_a_column], [(1.0, target)])
    assert turned.abs().max() < 1e-9
    assert float(lost.mean()) > 0.05
    assert float(distortions(x, rotated).mean()) > 0.5  # without compensation both look alike


def test_errors_of_press_are_shares_of_the_targets_variance() -> None:
    noise = draws(200, 4, seed=5)
    assert float(press_errors(draws(200, 3), noise).mean()) == pytest.approx(1.0, abs=0.05)
    assert float(press_errors(noise, noise).mean()) < 1e-6


@pytest.mark.parametrize("targets", ["task", "outputs", "both"])
def test_compensated_distortion_finds_the_needed_branch(
    program: Program, targets: Literal["task", "outputs", "both"]
) -> None:
    found = CompensatedDistortion(n_samples=48, targets=targets).estimate(
        program, planted_workload(), progress=Silent(), checkpoint=no_checkpoint, seed=0
    )
    scores = {score.unit.name: score.mean for score in found.scores}
    assert scores["layers.3.ffn"] == pytest.approx(0.0, abs=1e-9)
    assert scores["layers.1.ffn"] > 5 * max(abs(scores["layers.0.ffn"]), abs(scores["layers.2.ffn"]))
    assert found.forward_passes < 48 * 4


def test_subsets_are_scored_like_units_and_a_superset_of_a_useless_branch_costs_the_same(program: Program) -> None:
    estimator, work = CompensatedDistortion(n_samples=48), planted_workload()
    one, both, useless = ({"model/layers.1.ffn"}, {"model/layers.1.ffn", "model/layers.3.ffn"}, {"model/layers.3.ffn"})
    subsets = [frozenset(one), frozenset(both), frozenset(useless), frozenset[str]()]
    found = estimator.score_subsets(program, work, subsets, progress=Silent())
    single = estimator.estimate(program, work, progress=Silent(), checkpoint=no_checkpoint, seed=0).scores
    assert [score.skipped for score in found] == subsets
    assert found[0].mean == pytest.approx(single[1].mean, abs=1e-9)
    assert found[1].mean == pytest.approx(found[0].mean, abs=1e-6)
    assert found[3].mean == 0.0


@pytest.mark.parametrize("of_features", [True, False], ids=["features", "outputs"])
def test_distortion_is_the_relative_change_of_features_or_outputs(program: Program, of_features: bool) -> None:
    work = planted_workload()
    estimator = Distortion(of_features=of_features, n_samples=40)
    found = estimator.estimate(program, work, progress=Silent(), checkpoint=no_checkpoint, seed=0)
    rows = sampled_rows(work, "model", 40, seed=0)
    module, x = program.components["model"].graph, work.x[rows]

    def run(skipped: int) -> Tensor:
        value = x
        for i in range(4):
            layer = module.get_submodule(f"layers.{i}")
            value = value if i == skipped else value + layer.down(torch.relu(layer.up(value)))
        value = value if of_features else module.get_submodule(program.heads["model"])(value)
        return value.detach().double()

    whole = run(-1)
    for i, score in enumerate(found.scores):
        change = ((run(i) - whole) ** 2).sum(1).mean() / ((whole - whole.mean(0)) ** 2).sum(1).mean()
        assert score.mean == pytest.approx(float(change), rel=1e-4, abs=1e-9)


def test_sampled_rows_come_in_batches_and_in_order(program: Program) -> None:
    work = planted_workload()
    rows = sampled_rows(work, "model", 50, seed=4)
    assert len(set(rows.tolist())) == 50
    feeds = list(feeds_of_rows(work.feeds["model"], rows))
    assert torch.equal(torch.cat([feed["x"] for feed in feeds]), work.x[rows])
    assert min(len(feed["x"]) for feed in feeds[:-1]) >= 32
    assert run_component(program.components["model"], feeds).shape == (50, 2)


def test_values_that_are_no_numbers_are_refused_with_batch_and_branch(program: Program) -> None:
    work = planted_workload()
    work.x[3, 0] = float("nan")
    with pytest.raises(ProfileError, match=r"model, batch 0: values of the whole model are not finite"):
        Distortion(n_samples=96).estimate(program, work, progress=Silent(), checkpoint=no_checkpoint, seed=0)


def test_scores_are_the_growth_of_both_errors_by_weight(program: Program) -> None:
    """48 rows: labels weigh 48 / 64 and outputs 16 / 64."""
    work = planted_workload()
    score = {
        targets: CompensatedDistortion(n_samples=48, targets=targets)
        .estimate(program, work, progress=Silent(), checkpoint=no_checkpoint, seed=0)
        .scores[1]
        .mean
        for targets in ("task", "outputs", "both")
    }
    rows = sampled_rows(work, "model", 48, seed=0)
    module, x = program.components["model"].graph, work.x[rows]
    values = {}
    for skipped in (-1, 1):
        value = x
        for i in range(4):
            layer = module.get_submodule(f"layers.{i}")
            value = value if i == skipped else value + layer.down(torch.relu(layer.up(value)))
        values[skipped] = value.detach()
    labels = torch.nn.functional.one_hot(work.targets[rows], 2).double()
    growth = (press_errors(values[1], labels) - press_errors(values[-1], labels)).mean()
    assert score["task"] == pytest.approx(float(growth), abs=1e-6)
    assert score["both"] == pytest.approx(0.75 * score["task"] + 0.25 * score["outputs"], abs=1e-9)
