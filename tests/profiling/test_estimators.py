"""Importance scores are what skipping a branch really costs, with honest errors, and nothing is measured twice."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.profiling.workloads import (
    Classification,
    StoppedError,
    StopsAfter,
    planted_program,
    planted_workload,
    relabelled,
    with_head,
    with_memorised_head,
)
from vlmopt.core.contract import Context
from vlmopt.core.errors import ProfileError
from vlmopt.core.program import Program
from vlmopt.core.progress import Silent
from vlmopt.graph.head import head_features
from vlmopt.graph.refit import fit_head, prior_weight
from vlmopt.graph.replay import run_component
from vlmopt.profiling.block_influence import BlockInfluence
from vlmopt.profiling.compensated import CompensatedDistortion
from vlmopt.profiling.das_bandit import DasBandit
from vlmopt.profiling.distortion import Distortion
from vlmopt.profiling.estimator import Checkpoint, Estimate, Estimator, Unit, no_checkpoint
from vlmopt.profiling.gates import GateGradient
from vlmopt.profiling.leave_one_out import LeaveOneOut
from vlmopt.profiling.subset_ridge import SubsetRidge
from vlmopt.registry import make_pass
from vlmopt.rewrite.pipeline import run_step
from vlmopt.workflow.profiling import checkpoint_in


@pytest.fixture(scope="module")
def program() -> Program:
    return with_head(planted_program(), planted_workload())


def estimate(
    estimator: Estimator, program: Program, workload: Classification, checkpoint: Checkpoint = no_checkpoint
) -> Estimate:
    return estimator.estimate(program, workload, progress=Silent(), checkpoint=checkpoint, seed=0)


def scores_of(found: Estimate) -> dict[str, float]:
    return {score.unit.name: score.mean for score in found.scores if not score.unit.is_layer}


def without(program: Program, unit: Unit) -> Program:
    options = {"branches": list(unit.branches)}
    return run_step(program, make_pass("skip-branches", options), Context(), step=1).program


def losses(program: Program, workload: Classification, *, is_refit: bool) -> Tensor:
    """Losses of the program as it stands, computed from its graph and not by a replay."""
    component, feeds = program.components["model"], workload.feeds["model"]
    if not is_refit:
        return workload.losses({"model": run_component(component, feeds)})
    features = run_component(component, feeds, head_features(component, program.heads["model"]))
    fit = fit_head("model", features, workload, {}, prior=prior_weight(program, "model"), seed=0)
    assert fit is not None
    return workload.losses({"model": fit.held_out})


@pytest.mark.parametrize("is_refit", [True, False], ids=["refit", "raw"])
def test_leave_one_out_equals_really_skipping_and_evaluating_again(program: Program, is_refit: bool) -> None:
    workload = planted_workload()
    found = estimate(LeaveOneOut(is_refit=is_refit), program, workload)
    whole = losses(program, workload, is_refit=is_refit)
    assert found.reference_loss == pytest.approx(float(whole.mean()), abs=1e-12)
    assert [score.unit.name for score in found.scores] == [f"layers.{i}.ffn" for i in range(4)]
    for score in found.scores:
        cut = losses(without(program, score.unit), workload, is_refit=is_refit)
        assert score.mean == pytest.approx(float((cut - whole).mean()), abs=1e-7)


@pytest.mark.parametrize("is_refit", [True, False], ids=["refit", "raw"])
def test_a_needed_branch_scores_high_and_a_useless_one_nothing(program: Program, is_refit: bool) -> None:
    workload = planted_workload()
    found = estimate(LeaveOneOut(is_refit=is_refit), program, workload)
    scores = scores_of(found)
    assert scores["layers.3.ffn"] == 0.0
    assert scores["layers.1.ffn"] > 0.15
    assert max(abs(scores["layers.0.ffn"]), abs(scores["layers.2.ffn"])) < 0.3 * scores["layers.1.ffn"]
    needed = next(score for score in found.scores if score.unit.name == "layers.1.ffn")
    assert needed.mean > 4 * needed.standard_error


def test_standard_errors_agree_with_a_bootstrap_over_groups(program: Program) -> None:
    workload = planted_workload(per_group=4)
    found = estimate(LeaveOneOut(is_refit=False), program, workload)
    score = next(score for score in found.scores if score.unit.name == "layers.1.ffn")
    whole, cut = (losses(p, workload, is_refit=False) for p in (program, without(program, score.unit)))
    by_group = (cut - whole).reshape(-1, 4).mean(dim=1).numpy()
    generator = np.random.default_rng(0)
    draws = generator.choice(by_group, (4000, len(by_group))).mean(axis=1)
    assert score.standard_error == pytest.approx(draws.std(), rel=0.1)


def test_groups_of_copies_make_the_error_larger_and_not_smaller(program: Program) -> None:
    single = planted_workload(n=48, per_group=1)
    doubled = Classification(
        single.x.repeat_interleave(4, 0),
        single.targets.repeat_interleave(4),
        [name for name in single.group_names for _ in range(4)],
    )
    one, four = (estimate(LeaveOneOut(is_refit=False), program, w).scores[1] for w in (single, doubled))
    assert four.standard_error == pytest.approx(one.standard_error, rel=1e-6)
    one, four = (estimate(BlockInfluence(), program, w).scores[1] for w in (single, doubled))
    assert four.standard_error == pytest.approx(one.standard_error, rel=1e-6)


def test_block_influence_is_the_cosine_distance_over_the_branch(program: Program) -> None:
    workload = planted_workload()
    found = scores_of(estimate(BlockInfluence(), program, workload))
    assert found["layers.3.ffn"] == pytest.approx(0.0, abs=1e-12)
    assert found["layers.1.ffn"] > 0.01
    first = program.components["model"].graph.get_submodule("layers.0")
    x = workload.x
    after = (x + first.down(torch.relu(first.up(x)))).detach()
    wanted = 1 - torch.cosine_similarity(x.double(), after.double(), dim=-1).mean()
    assert found["layers.0.ffn"] == pytest.approx(float(wanted), abs=1e-7)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_labels_without_meaning_give_the_loss_of_a_guess(n_classes: int) -> None:
    """The reference is scored on rows that its head has not seen; else it would beat log(n) on random labels."""
    guess, bare = math.log(n_classes), planted_program(n_classes)
    honest, leaking = [], []
    for seed in range(8):
        workload = relabelled(planted_workload(n=16, per_group=1), n_classes, seed=seed)
        program = with_memorised_head(bare, workload)
        honest.append(losses(program, workload, is_refit=True).mean())
        unmarked = replace(program, fitted_heads=frozenset())  # as if the head were the model's own
        leaking.append(losses(unmarked, workload, is_refit=True).mean())
        assert estimate(LeaveOneOut(), program, workload).reference_loss == pytest.approx(float(honest[-1]))
    assert float(torch.stack(honest).mean()) > guess - 0.05
    assert float(torch.stack(leaking).mean()) < guess - 0.1


class Counting:
    """A checkpoint folder that counts what had to be computed."""

    def __init__(self, folder: Path) -> None:
        self.inner, self.computed = checkpoint_in(folder), list[str]()

    def __call__(self, key: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        def counted() -> dict[str, Tensor]:
            self.computed.append(key)
            return compute()

        return self.inner(key, counted)


@pytest.mark.parametrize("estimator", [LeaveOneOut(), LeaveOneOut(is_refit=False), BlockInfluence()], ids=repr)
def test_a_stopped_profile_continues_where_it_was_and_ends_the_same(
    estimator: Estimator, program: Program, tmp_path: Path
) -> None:
    workload = planted_workload()  # six batches
    first = Counting(tmp_path / "work")
    with pytest.raises(StoppedError):
        estimator.estimate(program, workload, progress=StopsAfter(4), checkpoint=first, seed=0)
    assert first.computed == [f"model-{i:05d}" for i in range(4)]
    second = Counting(tmp_path / "work")
    resumed = estimate(estimator, program, workload, second)
    assert second.computed == ["model-00004", "model-00005"]
    assert repr(resumed) == repr(estimate(estimator, program, workload))  # bit-equal; repr, since a NaN is not itself


@pytest.mark.parametrize(
    ("estimator", "done", "left"),
    [
        (GateGradient(), ["model-00000", "model-00001"], ["model-00002", "model-00003", "model-00004", "model-00005"]),
        (Distortion(n_samples=96), ["model-00000", "model-00001"], ["model-00002"]),
        (CompensatedDistortion(n_samples=96), ["model-00000", "model-00001"], ["model-00002"]),
        (DasBandit(n_updates=3, subset_size=2), ["turn-00000", "turn-00001"], ["turn-00002"]),
        (SubsetRidge(DasBandit(n_updates=3, subset_size=2)), ["turn-00000", "turn-00001"], ["turn-00002"]),
    ],
    ids=lambda value: value.name if hasattr(value, "name") else "",
)
def test_every_estimator_continues_where_it_was_and_ends_the_same(
    estimator: Estimator, done: list[str], left: list[str], program: Program, tmp_path: Path
) -> None:
    workload = planted_workload()
    first = Counting(tmp_path / "work")
    with pytest.raises(StoppedError):
        estimator.estimate(program, workload, progress=StopsAfter(2), checkpoint=first, seed=0)
    assert first.computed == done
    second = Counting(tmp_path / "work")
    resumed = estimate(estimator, program, workload, second)
    assert second.computed == left
    assert repr(resumed) == repr(estimate(estimator, program, workload))


def test_leave_one_out_measures_the_drop_of_the_metric_on_the_same_items(program: Program) -> None:
    workload = planted_workload()
    found = estimate(LeaveOneOut(is_refit=False), program, workload)
    outputs = [
        run_component(part.components["model"], workload.feeds["model"])
        for part in (program, *(without(program, score.unit) for score in found.scores))
    ]
    whole, *cut = [(value.argmax(1) == workload.targets).double().mean() for value in outputs]
    assert [s.drop_points for s in found.scores] == pytest.approx([100 * float(whole - c) for c in cut], abs=1e-9)
    assert found.scores[1].drop_points == max(s.drop_points or 0.0 for s in found.scores)
    assert found.scores[1].drop_error is not None
    assert 1.0 < found.scores[1].drop_error < 20.0


def test_the_cost_of_leave_one_out_counts_what_is_computed(program: Program) -> None:
    """Four blocks of 64 MACs and a head of 16: skipping block i computes the blocks behind it and the head."""
    raw = estimate(LeaveOneOut(is_refit=False), program, planted_workload())
    assert raw.forward_passes == pytest.approx(96 * (1 + sum(64 * (3 - i) + 16 for i in range(4)) / 272))
    refit = estimate(LeaveOneOut(), program, planted_workload())  # features need no head, the original's outputs do
    assert refit.forward_passes == pytest.approx(96 * (1 + (256 + sum(64 * (3 - i) for i in range(4))) / 272))


def test_leave_one_out_names_the_batch_and_the_branch_whose_values_are_no_numbers(program: Program) -> None:
    workload = planted_workload()
    workload.x[40, 2] = float("nan")
    with pytest.raises(ProfileError, match=r"model, batch 2: values of the whole model are not finite numbers"):
        estimate(LeaveOneOut(), program, workload)


def test_a_torn_checkpoint_is_computed_again(tmp_path: Path) -> None:
    keep = Counting(tmp_path)
    values = {"a": torch.arange(6.0).reshape(2, 3)[:, :2], "b": torch.tensor([1.5])}
    assert keep("batch", lambda: values) is not None
    file = tmp_path / "batch.safetensors"
    file.write_bytes(file.read_bytes()[:20])
    again = keep("batch", lambda: values)
    assert torch.equal(again["a"], values["a"])
    assert keep.computed == ["batch", "batch"]
    assert torch.equal(load_file(file)["b"], values["b"])
    assert [path.name for path in tmp_path.iterdir()] == ["batch.safetensors"]
