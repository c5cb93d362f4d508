"""The bandit follows the paper's rule, and the ridge finds the effects that a loss was built from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from tests.profiling.workloads import Classification, planted_program, planted_workload, with_head
from vlmopt.core.contract import Context
from vlmopt.core.errors import ProfileError
from vlmopt.core.program import Program
from vlmopt.core.progress import Silent
from vlmopt.graph.head import head_features
from vlmopt.graph.refit import fit_head, prior_weight
from vlmopt.graph.replay import run_component
from vlmopt.profiling.das_bandit import DasBandit, Search, draw_subsets, updated
from vlmopt.profiling.estimator import Evaluation, Unit, no_checkpoint
from vlmopt.profiling.part import batch_part
from vlmopt.profiling.subset_losses import SubsetLosses
from vlmopt.profiling.subset_ridge import SubsetRidge, ridge_scores
from vlmopt.registry import make_pass
from vlmopt.rewrite.pipeline import run_step


@pytest.fixture(scope="module")
def program() -> Program:
    return with_head(planted_program(), planted_workload())


def search(bandit: DasBandit, program: Program, workload: Classification) -> Search:
    return bandit.search(program, workload, progress=Silent(), checkpoint=no_checkpoint, seed=3)


def arm(number: int) -> Unit:
    return Unit("model", f"b{number}", False, (f"b{number}",))


def skipping(*numbers: int) -> frozenset[str]:
    return frozenset(f"model/b{number}" for number in numbers)


def test_the_bandit_follows_the_papers_rule(program: Program) -> None:
    found = search(DasBandit(n_updates=40, subset_size=2, learning_rate=0.7), program, planted_workload())
    s = np.zeros(4)
    for turn in range(40):
        evaluations = found.log[3 * turn : 3 * turn + 3]
        rewards = np.array([math.exp(-entry.loss) for entry in evaluations])
        p = 1 / (1 + np.exp(-s))
        for entry, reward in zip(evaluations, rewards, strict=True):
            for i in range(4):
                if f"model/layers.{i}.ffn" in entry.skipped:
                    s[i] += 0.7 * (reward - rewards.mean()) * p[i] * (1 - p[i])
    assert found.preferences.numpy() == pytest.approx(s, abs=1e-12)
    assert int(found.preferences.argmin()) == 1  # the branch that the task needs


def test_every_turn_draws_distinct_subsets_and_batches_take_turns(program: Program) -> None:
    found = search(DasBandit(n_updates=12, subset_size=2), program, planted_workload())
    assert [entry.batch for entry in found.log[::3]] == [0, 1, 2, 3, 4, 5] * 2
    for turn in range(12):
        subsets = {entry.skipped for entry in found.log[3 * turn : 3 * turn + 3]}
        assert len(subsets) == 3
        assert {len(subset) for subset in subsets} == {2}


def test_subsets_are_drawn_by_the_sigmoid_of_the_preferences() -> None:
    generator = torch.Generator().manual_seed(0)
    preferences = torch.tensor([2.0, 0.0, -2.0], dtype=torch.float64)
    drawn = [draw_subsets(preferences, 1, 1, generator=generator)[0][0] for _ in range(4000)]
    weights = torch.sigmoid(preferences)
    assert np.bincount(drawn) / 4000 == pytest.approx((weights / weights.sum()).numpy(), abs=0.03)
    assert sorted(draw_subsets(preferences, 2, 9, generator=generator)) == [(0, 1), (0, 2), (1, 2)]


def test_a_turn_of_equal_losses_moves_nothing() -> None:
    moved = updated(torch.tensor([0.3, -0.3, 1.0]), [(0, 1), (1, 2)], torch.tensor([0.7, 0.7]), learning_rate=1.0)
    assert torch.equal(moved, torch.tensor([0.3, -0.3, 1.0]))


@pytest.mark.parametrize("is_refit", [True, False], ids=["refit", "raw"])
def test_the_loss_of_a_subset_is_that_of_the_cut_program_on_the_batch(program: Program, is_refit: bool) -> None:
    workload = planted_workload()
    meter = SubsetLosses(program, workload, is_refit=is_refit, progress=Silent())
    names = [f"layers.{i}.ffn" for i in (0, 1)]
    cut = run_step(program, make_pass("skip-branches", {"branches": names}), Context(), step=1).program
    component = cut.components["model"]
    rows = slice(32, 48)
    part = Classification(workload.x[rows], workload.targets[rows], workload.group_names[rows])
    outputs = run_component(component, part.feeds["model"])
    if is_refit:
        features = run_component(component, part.feeds["model"], head_features(component, cut.heads["model"]))
        reference = {"model": run_component(program.components["model"], part.feeds["model"])}
        fit = fit_head("model", features, part, reference, prior=prior_weight(program, "model"))
        assert fit is not None
        outputs = fit.held_out
    wanted = float(part.losses({"model": outputs}).mean())
    found = meter.losses(2, [frozenset(f"model/{name}" for name in names)])
    assert float(found[0]) == pytest.approx(wanted, abs=1e-6)
    assert meter.forward_passes == (96.0 if is_refit else 0.0)  # a re-fit may need the original's outputs


def test_a_batch_of_a_workload_holds_its_rows_and_the_items_that_read_them() -> None:
    workload = planted_workload(n=40)
    part = batch_part(workload, {"model": torch.zeros(40, 2)}, 2)
    assert part.rows["model"].tolist() == part.items.tolist() == list(range(32, 40))
    logits = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        part.losses({"model": logits}),
        torch.nn.functional.cross_entropy(logits.double(), workload.targets[32:], reduction="none"),
    )


def test_layers_as_arms_are_skipped_whole_and_too_many_are_refused(program: Program) -> None:
    with pytest.raises(ProfileError, match=r"subset size: 4 of 4 branches .* expected 1 to 3"):
        search(DasBandit(n_updates=1, subset_size=4), program, planted_workload())


@pytest.mark.parametrize(
    ("is_refit", "whose"),
    [(True, "of the whole model"), (False, r"without model/layers\.\d\.ffn")],
    ids=["refit", "raw"],
)
def test_values_that_are_no_numbers_are_refused_with_their_batch(program: Program, is_refit: bool, whose: str) -> None:
    workload = planted_workload()
    workload.x[20, 0] = float("nan")
    bandit = DasBandit(n_updates=6, subset_size=1, is_refit=is_refit)
    with pytest.raises(ProfileError, match=rf"^model, batch 1: values {whose} are not finite"):
        search(bandit, program, workload)


def additive_log(effects: Sequence[float], *, noise: float, pair: float = 0.0, seed: int = 0) -> list[Evaluation]:
    """Losses of random subsets of three: the sum of their effects, a level of the batch, and noise."""
    generator = np.random.default_rng(seed)
    levels = generator.normal(0, 5, 6)
    log = []
    for turn in range(120):
        batch = turn % 6
        for _ in range(3):
            subset = generator.choice(len(effects), 3, replace=False).tolist()
            loss = levels[batch] + sum(effects[i] for i in subset) + generator.normal(0, noise)
            loss += pair if {0, 1} <= set(subset) else 0.0
            log.append(Evaluation(skipping(*subset), float(loss), batch))
    return log


EFFECTS = [0.9, 0.5, 0.2, 0.0, -0.1, 0.3, 0.7, 0.4]


def test_ridge_finds_the_effects_that_an_additive_loss_was_built_from() -> None:
    fit = ridge_scores(additive_log(EFFECTS, noise=0.0), [arm(i) for i in range(8)])
    wanted = np.array(EFFECTS) - np.mean(EFFECTS)  # all subsets have one size, so a constant is free
    assert fit.scores.numpy() - fit.scores.mean().item() == pytest.approx(wanted, abs=1e-3)
    assert fit.interactions == {}


def test_standard_errors_of_ridge_are_those_of_repeated_logs() -> None:
    fits = [ridge_scores(additive_log(EFFECTS, noise=0.3, seed=seed), [arm(i) for i in range(8)]) for seed in range(60)]
    plain = [fit for fit in fits if not fit.interactions]
    assert len(plain) >= 54  # without real interactions at most one log in ten shows one
    spread = torch.stack([fit.scores for fit in plain]).std(dim=0)
    claimed = torch.stack([fit.errors for fit in plain]).mean(dim=0)
    assert (spread / claimed).numpy() == pytest.approx(np.ones(8), abs=0.35)


def test_a_pair_that_costs_more_than_its_sum_is_reported() -> None:
    fit = ridge_scores(additive_log(EFFECTS, noise=0.1, pair=0.8), [arm(i) for i in range(8)])
    assert list(fit.interactions) == [(0, 1)]
    assert fit.interactions[(0, 1)] == pytest.approx(0.8, abs=0.1)


def test_ridge_ranks_the_needed_branch_first_from_the_bandits_own_evaluations(program: Program) -> None:
    bandit = DasBandit(n_updates=30, subset_size=1)
    found = SubsetRidge(bandit).estimate(
        program, planted_workload(), progress=Silent(), checkpoint=no_checkpoint, seed=3
    )
    log = search(bandit, program, planted_workload()).log
    assert found.subsets == log
    scores = {score.unit.name: score.mean for score in found.scores}
    assert max(scores, key=lambda name: scores[name]) == "layers.1.ffn"
    # Of subsets of one arm the mean loss by arm is the answer, but for the batches' levels.
    assert found.forward_passes == pytest.approx(sum(16.0 for _ in range(30)) * 2.5, rel=0.35)


def test_a_log_without_two_evaluations_of_a_batch_is_refused() -> None:
    log = [Evaluation(skipping(0), 1.0, 0), Evaluation(skipping(1), 2.0, 1)]
    with pytest.raises(ProfileError, match="no two different subsets were evaluated on one batch"):
        ridge_scores(log, [arm(0), arm(1)])
