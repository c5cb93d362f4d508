"""How well cheap importance ranks what leave-one-out with re-fitted heads ranks, on the tower's three real tasks.

The reference looks at 512 profile items; estimators that look at few rows are means over draws. For sets of branches
the reference is the loss without the set, its head fitted again; predicted by the sum of single scores, and by scoring
the set itself where the estimator can.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tests.benchmarks.towers import cache
from vlmopt.core.program import Program
from vlmopt.core.progress import Silent
from vlmopt.core.workload import Workload
from vlmopt.graph.branches import by_component, find_branches
from vlmopt.graph.head import head_features
from vlmopt.graph.refit import fit_head, prior_weight
from vlmopt.graph.replay import Replay, run_component
from vlmopt.profiling.compensated import CompensatedDistortion
from vlmopt.profiling.document import spearman
from vlmopt.profiling.estimator import Estimate, no_checkpoint, program_units
from vlmopt.profiling.selection import make_estimator
from vlmopt.tasks.binding import TaskWorkload
from vlmopt.workflow.opening import open_model, open_task, with_fitted_head

N_ITEMS, N_FEW = 512, 64
N_DRAWS = 2
TWENTIETH = N_ITEMS // 20  # rows at which a score that looks at rows alone costs a twentieth of the reference
SAMPLED = ("logit-distortion", "feature-distortion", "compensated-distortion")
OTHERS = ("gate-gradient", "fisher", "block-influence")
OF_SUBSETS = ("das-bandit", "subset-ridge")  # both on the same evaluations; not cheap, and what the paper does
N_SUBSETS, SUBSET_SIZES = 24, (2, 10)


@dataclass(frozen=True)
class Case:
    """A task with its reference: scores of single branches, and losses of sets of them."""

    program: Program
    workload: TaskWorkload
    sites: tuple[str, ...]
    reference: Estimate

    @property
    def scores(self) -> list[float]:
        return _scores(self.reference, self.sites)


def figures(task: str) -> dict[str, float]:
    """Spearman to the reference and cost as a share of the reference's, for every estimator."""
    case = _case(task)
    found = {f"cheap_depth_spearman_{task}": _agreement(case, [-float(i) for i in range(len(case.sites))])}
    for name in OTHERS:
        found |= _row(case, name, task, [_estimate(case, name, N_ITEMS, seed=0)])
    for name in SAMPLED:
        for rows in (TWENTIETH, N_FEW):
            made = [_estimate(case, name, rows, seed=seed) for seed in range(N_DRAWS)]
            found |= _row(case, f"{name}-{rows}", task, made)
    for name in OF_SUBSETS:
        found |= _row(case, name, task, [_estimate(case, name, N_ITEMS, seed=0, scoring="refit")])
    found |= _halves(case, task)
    found |= _subsets(case, task)
    best = f"compensated_distortion_{TWENTIETH}"
    found[f"cheap_vs_leave_one_out_spearman_{task}"] = found[f"cheap_{best}_spearman_{task}"]
    found["cheap_cost_over_leave_one_out"] = found[f"cheap_{best}_cost_{task}"]
    return found


def _case(task: str) -> Case:
    home = cache() / "emoji"
    opened = open_model(str(home / "model"), device="cpu", dtype="float32", allow_pickle=False, progress=Silent())
    bound = open_task(opened, str(home / "tasks" / task), seed=0, progress=Silent())
    workload = bound.source.workload(bound.program, "profile", limit=N_ITEMS)
    program = with_fitted_head(bound.program, workload, seed=0, progress=Silent())
    sites = tuple(unit.site for unit in program_units(program, workload, with_layers=False))
    estimator = make_estimator("leave-one-out", "refit", with_layers=False, with_stability=False)
    reference = estimator.estimate(program, workload, progress=Silent(), checkpoint=no_checkpoint, seed=0)
    return Case(program, workload, sites, reference)


def _estimate(case: Case, name: str, rows: int, *, seed: int, scoring: str = "raw") -> Estimate:
    estimator = make_estimator(name, scoring, with_layers=False, sample_size=rows)
    return estimator.estimate(case.program, case.workload, progress=Silent(), checkpoint=no_checkpoint, seed=seed)


def _scores(estimate: Estimate, sites: Sequence[str]) -> list[float]:
    found = {score.unit.site: score.mean for score in estimate.scores if not score.unit.is_layer}
    return [found[site] for site in sites]


def _agreement(case: Case, scores: list[float]) -> float:
    found = spearman(case.scores, scores)
    assert found is not None
    return found


def _row(case: Case, name: str, task: str, estimates: Sequence[Estimate]) -> dict[str, float]:
    key = f"cheap_{name.replace('-', '_')}"
    cost = statistics.mean(estimate.forward_passes for estimate in estimates) / case.reference.forward_passes
    agreement = statistics.mean(_agreement(case, _scores(estimate, case.sites)) for estimate in estimates)
    return {f"{key}_spearman_{task}": agreement, f"{key}_cost_{task}": cost}


def _halves(case: Case, task: str) -> dict[str, float]:
    """How well the reference agrees with itself: two halves of the items, each a profile of its own."""
    names = list(dict.fromkeys(case.workload.item_groups))
    random.Random(0).shuffle(names)
    halves = []
    for half in (set(names[::2]), set(names[1::2])):
        items = [item for item, group in enumerate(case.workload.item_groups) if group in half]
        part = case.workload.part(items)
        estimator = make_estimator("leave-one-out", "refit", with_layers=False, with_stability=False)
        estimate = estimator.estimate(case.program, part, progress=Silent(), checkpoint=no_checkpoint, seed=0)
        halves.append(_scores(estimate, case.sites))
    found = spearman(halves[0], halves[1])
    assert found is not None
    return {f"leave_one_out_half_spearman_{task}": found}


def _subsets(case: Case, task: str) -> dict[str, float]:
    """Spearman of predicted to measured losses over random sets of branches."""
    drawn, generator = list[frozenset[str]](), random.Random(0)
    for _ in range(N_SUBSETS):
        drawn.append(frozenset(generator.sample(case.sites, generator.randint(*SUBSET_SIZES))))
    measured = _losses(case.program, case.workload, drawn)
    few = _estimate(case, "compensated-distortion", N_FEW, seed=0)
    logits = _estimate(case, "logit-distortion", N_FEW, seed=0)
    whole = CompensatedDistortion(N_FEW).score_subsets(case.program, case.workload, drawn, progress=Silent())
    predicted = {
        "leave_one_out_sum": _sums(case, case.scores, drawn),
        "compensated_sum": _sums(case, _scores(few, case.sites), drawn),
        "logit_sum": _sums(case, _scores(logits, case.sites), drawn),
        "compensated_set": [one.mean for one in whole],
        "n_skipped": [float(len(one)) for one in drawn],
    }
    found = {name: spearman(measured, values) for name, values in predicted.items()}
    return {f"subsets_{name}_spearman_{task}": value for name, value in found.items() if value is not None}


def _sums(case: Case, scores: Sequence[float], subsets: Sequence[frozenset[str]]) -> list[float]:
    by_site = dict(zip(case.sites, scores, strict=True))
    return [sum(by_site[site] for site in subset) for subset in subsets]


def _losses(program: Program, workload: Workload, subsets: Sequence[frozenset[str]]) -> list[float]:
    """Mean loss without each set, heads fitted again on rows that are not judged."""
    plans = [by_component(subset) for subset in subsets]
    made: list[dict[str, torch.Tensor]] = [{} for _ in subsets]
    reference = {name: run_component(program.components[name], feeds) for name, feeds in workload.feeds.items()}
    for name, feeds in workload.feeds.items():
        component = program.components[name]
        replay = Replay(component, find_branches(component.graph), head_features(component, program.heads.get(name)))
        skips = [plan.get(name, frozenset()) for plan in plans]
        parts = [replay.variants(feed, skips) for feed in feeds]
        for i, outputs in enumerate(made):
            features = torch.cat([part[i] for part in parts])
            fit = fit_head(name, features, workload, reference, prior=prior_weight(program, name))
            outputs[name] = features if fit is None else fit.held_out
    return [float(workload.losses(outputs).mean()) for outputs in made]
