"""Main effects of skipping from logged evaluations of random subsets: ridge regression instead of a bandit's rule.

    loss(S, batch) - mean of the batch = sum over i in S of score_i + sum over chosen pairs in S of interaction_ij

It reads the very evaluations that a bandit makes, so it costs nothing more. All subsets of one log have one size, so
scores are known up to a common constant, and the ridge picks those with the smallest squares.

What differs from the paper's rule (see `das_bandit`): every evaluation counts alike and not through the drift of a
preference, the difficulty of a batch is taken out, and there are standard errors.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlmopt.core.errors import ProfileError
from vlmopt.core.program import Program
from vlmopt.core.progress import Progress
from vlmopt.core.workload import Workload
from vlmopt.graph.precision import lowered_precision
from vlmopt.profiling.das_bandit import DasBandit, scores_of_arms
from vlmopt.profiling.estimator import Checkpoint, Estimate, Evaluation, Interaction, Unit, program_units

_STRENGTHS = tuple(10.0**power for power in range(-4, 3))  # relative to the mean of the diagonal of X'X
_FOLDS = 5
# The best of hundreds of pairs fits noise: with none real it lowers the held-out error by about 1.3 of its standard
# errors, so two are asked for.
_PROOF_IN_STANDARD_ERRORS = 2.0
_LEAST_SEEN = 4  # evaluations in which a pair must have been skipped together


@dataclass(frozen=True)
class RidgeScores:
    """`scores` and `errors` [k] by arm; `interactions` by pair of arms; `held_out_error` is a mean square."""

    scores: Tensor
    errors: Tensor
    interactions: dict[tuple[int, int], float]
    strength: float
    held_out_error: float


@dataclass(frozen=True)
class SubsetRidge:
    """Evaluates subsets as `bandit` does, and fits their losses."""

    bandit: DasBandit = field(default_factory=DasBandit)
    name: str = "subset-ridge"
    unit: str = "loss"

    def estimate(
        self, program: Program, workload: Workload, *, progress: Progress, checkpoint: Checkpoint, seed: int
    ) -> Estimate:
        found = self.bandit.search(program, workload, progress=progress, checkpoint=checkpoint, seed=seed)
        fit = ridge_scores(found.log, found.arms, seed=seed)
        units = program_units(program, workload, with_layers=self.bandit.with_layers)
        scores = scores_of_arms(found.arms, fit.scores.tolist(), fit.errors.tolist(), units=units)
        pairs = tuple(
            Interaction(found.arms[i].site, found.arms[j].site, value) for (i, j), value in fit.interactions.items()
        )
        precision = lowered_precision(program.components[name] for name in workload.feeds)
        return Estimate(
            scores, float("nan"), found.forward_passes, interactions=pairs, subsets=found.log, precision=precision
        )


def ridge_scores(log: Sequence[Evaluation], arms: Sequence[Unit], *, seed: int = 0) -> RidgeScores:
    """Scores of the arms from a log of evaluations, with those interactions that predict evaluations not fitted.

    Raises:
        ProfileError: no batch was evaluated twice, so nothing can be compared.
    """
    skipped = torch.tensor([[float(arm.sites <= entry.skipped) for arm in arms] for entry in log], dtype=torch.float64)
    batches = torch.tensor([entry.batch for entry in log])
    losses = torch.tensor([entry.loss for entry in log], dtype=torch.float64)
    design, target = _demeaned(skipped, batches), _demeaned(losses[:, None], batches)[:, 0]
    if not design.any():
        raise ProfileError("subset-ridge", "no two different subsets were evaluated on one batch", remedy="allow more")
    folds = torch.randperm(len(log), generator=torch.Generator().manual_seed(seed)) % min(_FOLDS, len(log))
    pairs: list[tuple[int, int]] = []
    strength, errors = _best_strength(design, target, folds)
    while (pair := _most_telling(skipped, batches, design, target, strength, pairs)) is not None:
        column = _demeaned((skipped[:, pair[0]] * skipped[:, pair[1]])[:, None], batches)
        wider = torch.cat([design, column], dim=1)
        new_strength, new_errors = _best_strength(wider, target, folds)
        gain = errors - new_errors
        if float(gain.mean()) <= _PROOF_IN_STANDARD_ERRORS * float(gain.std()) / len(gain) ** 0.5:
            break
        pairs.append(pair)
        design, strength, errors = wider, new_strength, new_errors
    weights, spread = _fit_with_errors(design, target, strength, n_means=len(set(batches.tolist())))
    k = len(arms)
    interactions = dict(zip(pairs, weights[k:].tolist(), strict=True))
    return RidgeScores(weights[:k], spread[:k], interactions, strength, float(errors.mean()))


def _demeaned(values: Tensor, batches: Tensor) -> Tensor:
    """Values [N, c] minus the mean over the evaluations on the same batch."""
    result = values.clone()
    for batch in set(batches.tolist()):
        inside = batches == batch
        result[inside] -= values[inside].mean(dim=0)
    return result


def _solve(design: Tensor, target: Tensor, strength: float) -> Tensor:
    solution: Tensor = torch.linalg.solve(_regularised(design, strength), design.T @ target)
    return solution


def _regularised(design: Tensor, strength: float) -> Tensor:
    gram = design.T @ design
    ridge = strength * gram.diagonal().mean().clamp(min=1e-12)
    return gram + ridge * torch.eye(len(gram), dtype=gram.dtype)


def _best_strength(design: Tensor, target: Tensor, folds: Tensor) -> tuple[float, Tensor]:
    """The strength that predicts evaluations outside the fit best, and its squared error for every evaluation."""
    best: tuple[float, Tensor] | None = None
    for strength in _STRENGTHS:
        errors = torch.zeros_like(target)
        for fold in set(folds.tolist()):
            inside = folds != fold
            weights = _solve(design[inside], target[inside], strength)
            errors[~inside] = (target[~inside] - design[~inside] @ weights) ** 2
        if best is None or errors.mean() < best[1].mean():
            best = strength, errors
    assert best is not None
    return best


def _most_telling(
    skipped: Tensor, batches: Tensor, design: Tensor, target: Tensor, strength: float, taken: Sequence[tuple[int, int]]
) -> tuple[int, int] | None:
    """The pair of arms whose joint absence explains most of what the fit leaves over."""
    residual = target - design @ _solve(design, target, strength)
    pairs = [
        (i, j)
        for i, j in itertools.combinations(range(skipped.shape[1]), 2)
        if (i, j) not in taken and float(skipped[:, i] @ skipped[:, j]) >= _LEAST_SEEN
    ]
    if not pairs:
        return None
    first, second = (torch.tensor([pair[side] for pair in pairs]) for side in (0, 1))
    columns = _demeaned(skipped[:, first] * skipped[:, second], batches)
    columns = columns - design @ torch.linalg.solve(_regularised(design, strength), design.T @ columns)
    explained = (columns.T @ residual) ** 2 / (columns**2).sum(dim=0).clamp(min=1e-9)
    return pairs[int(explained.argmax())]


def _fit_with_errors(design: Tensor, target: Tensor, strength: float, *, n_means: int) -> tuple[Tensor, Tensor]:
    """Weights and their standard errors.

    Source: the sandwich A^-1 X'X A^-1 sigma^2 of ridge regression with A = X'X + ridge; sigma^2 from the residuals with
    as many degrees of freedom as the trace of the hat matrix and the means of the batches leave.
    """
    inverse = torch.linalg.inv(_regularised(design, strength))
    gram = design.T @ design
    weights = inverse @ (design.T @ target)
    freedom = max(1.0, len(target) - n_means - float((inverse @ gram).trace()))
    variance = ((target - design @ weights) ** 2).sum() / freedom
    return weights, (variance * (inverse @ gram @ inverse).diagonal().clamp(min=0)).sqrt()
