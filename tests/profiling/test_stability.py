"""Ranks over resamples, agreement under disturbance, and which cuts are certain."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.profiling.workloads import planted_program, planted_workload, with_head
from vlmopt.core.errors import ProfileError
from vlmopt.core.program import Program
from vlmopt.core.progress import Silent
from vlmopt.graph.branches import find_branches
from vlmopt.graph.head import head_features
from vlmopt.graph.refit import fit_head, prior_weight
from vlmopt.graph.replay import Replay, run_component
from vlmopt.profiling.document import (
    Profile,
    ProfileCost,
    ProfiledModel,
    ProfiledScore,
    ProfiledTask,
    ProfileStability,
    spearman,
)
from vlmopt.profiling.estimator import Estimate, no_checkpoint
from vlmopt.profiling.leave_one_out import LeaveOneOut
from vlmopt.profiling.stability import bootstrap_ranks, cut_certainty, few_items
from vlmopt.tasks.mislabelling import mislabelled


@pytest.fixture(scope="module")
def program() -> Program:
    return with_head(planted_program(), planted_workload())


@pytest.fixture(scope="module")
def found(program: Program) -> Estimate:
    estimator = LeaveOneOut(with_stability=True)
    return estimator.estimate(program, planted_workload(), progress=Silent(), checkpoint=no_checkpoint, seed=0)


def test_ranks_of_a_clear_order_do_not_move_and_those_of_equals_do() -> None:
    generator = np.random.default_rng(0)
    means = np.array([0.0, 1.0, 2.0, 2.0, 3.0])
    values = torch.tensor(means[:, None] + generator.normal(0, 0.5, (5, 200)))
    ranks = bootstrap_ranks(values, [str(i) for i in range(200)])
    assert ranks[0] == (0.0, 0.0)
    assert ranks[1] == (1.0, 1.0)
    assert ranks[4] == (4.0, 4.0)
    assert {ranks[2][0], ranks[3][0], ranks[2][1], ranks[3][1]} <= {2.0, 3.0}


def test_ranks_agree_with_a_bootstrap_in_numpy_over_groups() -> None:
    generator = np.random.default_rng(1)
    groups = np.repeat(np.arange(30), 4)
    values = generator.normal(0, 1, (6, 30))[:, groups] + np.linspace(0, 1, 6)[:, None]
    ranks = bootstrap_ranks(torch.tensor(values), [f"g{g}" for g in groups], n_resamples=4000)
    picked = generator.integers(0, 30, (4000, 30))
    draws = values.reshape(6, 30, 4).mean(axis=2)[:, picked].mean(axis=2)
    wanted = np.quantile(draws.argsort(axis=0).argsort(axis=0), (0.05, 0.95), axis=1).T
    assert np.array(ranks) == pytest.approx(wanted, abs=0.51)
    alone = np.array(bootstrap_ranks(torch.tensor(values), [str(i) for i in range(120)], n_resamples=4000))
    assert (alone[:, 1] - alone[:, 0]).sum() < (np.array(ranks)[:, 1] - np.array(ranks)[:, 0]).sum()


def test_a_needed_branch_stays_last_and_agreement_is_reported_for_every_disturbance(found: Estimate) -> None:
    assert found.stability is not None
    assert found.stability.ranks["model/layers.1.ffn"] == (3.0, 3.0)
    assert list(found.stability.agreement) == ["5% of the labels wrong", "20% of the labels wrong", "10% of the items"]


def test_agreement_with_wrong_labels_is_that_of_a_profile_of_those_labels(program: Program, found: Estimate) -> None:
    work = planted_workload()
    wrong = replace(work, targets=mislabelled(work.targets, 2, 0.2, seed=0))
    component = program.components["model"]
    branches = find_branches(component.graph)
    replay = Replay(component, branches, head_features(component, program.heads["model"]))
    reference = {"model": run_component(component, work.feeds["model"])}
    losses = []
    for skips in [frozenset[str](), *(frozenset({branch.name}) for branch in branches)]:
        features = torch.cat([replay.run(feed, skips) for feed in work.feeds["model"]])
        fit = fit_head("model", features, wrong, reference, prior=prior_weight(program, "model"), seed=0)
        assert fit is not None
        losses.append(float(wrong.losses({"model": fit.held_out}).mean()))
    own = [score.mean for score in found.scores]
    assert found.stability is not None
    agreement = found.stability.agreement["20% of the labels wrong"]
    assert agreement == pytest.approx(spearman(own, [loss - losses[0] for loss in losses[1:]]))


def test_stability_changes_no_score_and_no_cost(program: Program, found: Estimate) -> None:
    plain = LeaveOneOut().estimate(program, planted_workload(), progress=Silent(), checkpoint=no_checkpoint, seed=0)
    assert plain.stability is None
    assert plain.scores == found.scores
    assert plain.forward_passes == found.forward_passes


def test_wrong_labels_are_wrong_and_as_many_as_asked_for() -> None:
    targets = torch.arange(100) % 5
    wrong = mislabelled(targets, 5, 0.2, seed=0)
    assert int((wrong != targets).sum()) == 20
    assert wrong.min() >= 0
    assert wrong.max() < 5
    assert torch.equal(mislabelled(targets * 0, 1, 0.2, seed=0), targets * 0)


def test_a_tenth_of_the_items_takes_whole_groups() -> None:
    work = planted_workload(n=96, per_group=4)
    part = few_items(work, {"model": torch.zeros(96, 2)}, 0.125, seed=0)
    assert part is not None
    assert part.n_items == 12
    assert len(set(part.item_groups)) == 3
    assert part.items.tolist() == part.rows["model"].tolist()
    assert few_items(work, {"model": torch.zeros(96, 2)}, 0.02, seed=0) is None


def profile(ranks: dict[str, tuple[float, float]] | None) -> Profile:
    scores = tuple(
        ProfiledScore(
            component="model", name=name, scope="branch", kind="ffn", layer=0, branches=(name,), params=1, macs=1,
            score=0.0, stderr=None,
        )
        for name in "abcd"
    )  # fmt: skip
    return Profile(
        vlmopt="0", created="", model=ProfiledModel(path="", model_type="", architecture="", fingerprint=""),
        task=ProfiledTask(name="", kind="", fingerprint="", n_items=1), estimator="", scoring="", unit="", seed=0,
        dtype="", versions={}, cost=ProfileCost(forward_passes=1, seconds=1), reference_loss=None, scores=scores,
        stability=None if ranks is None else ProfileStability(n_resamples=9, ranks=ranks, agreement={}),
    )  # fmt: skip


def test_a_cut_is_certain_while_its_rank_stays_within_the_number_of_cuts() -> None:
    ranks = {"model/a": (0.0, 1.0), "model/b": (0.0, 2.0), "model/c": (1.0, 3.0), "model/d": (2.0, 3.0)}
    two = cut_certainty(profile(ranks), ["model/a", "model/b"])
    assert two == {"model/a": "certain", "model/b": "uncertain"}
    three = cut_certainty(profile(ranks), ["model/a", "model/b", "model/c"])
    assert three == {"model/a": "certain", "model/b": "certain", "model/c": "uncertain"}
    with pytest.raises(ProfileError, match=r"has no rank of model/z"):
        cut_certainty(profile(ranks), ["model/z"])
    with pytest.raises(ProfileError, match="has no stability"):
        cut_certainty(profile(None), ["model/a"])
