"""Ridge regression in closed form, cross-fitted by groups: the re-fit of a linear head.

Solves `min |F W + b - Y|^2 + strength |W - W0|^2` for features F [n, d] and targets Y [n, k]. The intercept is not
penalised. The strength is chosen by the error on rows that the fit has not seen, and rows of one group (four drawings
of one concept) are never split between fit and check, since that would reward memorising the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FOLDS = 5
STRENGTHS = tuple(10.0**power for power in range(-5, 4))  # relative to the mean eigenvalue of F'F


@dataclass(frozen=True)
class RidgeFit:
    """`weight` [k, d] and `bias` [k] fitted on all rows; `held_out` [n, k] predicts each row by a fit without it."""

    weight: Tensor
    bias: Tensor
    held_out: Tensor
    strength: float


def fit_ridge(
    features: Tensor, targets: Tensor, groups: Sequence[str], *, prior: Tensor | None = None, seed: int = 0
) -> RidgeFit:
    """The fit with the strength that predicts held-out rows best, in float64.

    Args:
        groups: one entry a row.
        prior: weight [k, d] that the fit is drawn towards; zero by default.
    """
    x, y = features.double(), targets.double()
    start = torch.zeros(y.shape[1], x.shape[1], dtype=x.dtype) if prior is None else prior.double()
    residual = y - x @ start.T
    folds = fold_numbers(groups, seed=seed)
    held_out = torch.zeros(len(STRENGTHS), *y.shape, dtype=x.dtype)
    for fold in range(int(folds.max()) + 1):
        inside = folds != fold
        solutions = _solve(x[inside], residual[inside])
        for i, (weight, bias) in enumerate(solutions):
            held_out[i, ~inside] = x[~inside] @ weight.T + bias
    errors = ((held_out - residual) ** 2).mean(dim=(1, 2))
    best = int(errors.argmin())
    weight, bias = _solve(x, residual, strengths=(STRENGTHS[best],))[0]
    return RidgeFit(weight + start, bias, held_out[best] + x @ start.T, STRENGTHS[best])


def _solve(x: Tensor, y: Tensor, *, strengths: Sequence[float] = STRENGTHS) -> list[tuple[Tensor, Tensor]]:
    """(weight, bias) for every strength from one eigendecomposition."""
    mean_x, mean_y = x.mean(dim=0), y.mean(dim=0)
    centred = x - mean_x
    if len(x) < x.shape[1]:
        return _solve_by_kernel(centred, y, mean_x, mean_y, strengths)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    rotated = vectors.T @ (centred.T @ (y - mean_y))
    scale = values.clamp(min=0).mean().clamp(min=1e-12)
    solutions = []
    for strength in strengths:
        inverse = 1.0 / (values.clamp(min=0) + strength * scale)
        weight = (vectors @ (inverse[:, None] * rotated)).T
        solutions.append((weight, mean_y - weight @ mean_x))
    return solutions


def _solve_by_kernel(
    centred: Tensor, y: Tensor, mean_x: Tensor, mean_y: Tensor, strengths: Sequence[float]
) -> list[tuple[Tensor, Tensor]]:
    """The same solutions from the eigenvectors of F F', which is smaller where there are fewer rows than features."""
    values, vectors = torch.linalg.eigh(centred @ centred.T)
    rotated = vectors.T @ (y - mean_y)
    scale = (values.clamp(min=0).sum() / centred.shape[1]).clamp(min=1e-12)
    solutions = []
    for strength in strengths:
        inverse = 1.0 / (values.clamp(min=0) + strength * scale)
        weight = (centred.T @ (vectors @ (inverse[:, None] * rotated))).T
        solutions.append((weight, mean_y - weight @ mean_x))
    return solutions


def fold_numbers(groups: Sequence[str], *, seed: int = 0) -> Tensor:
    """A fold for every row, [n]; rows of one group share it."""
    names = sorted(set(groups))
    count = min(FOLDS, len(names))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(names), generator=generator).tolist()
    fold_of = {names[index]: position % count for position, index in enumerate(order)}
    return torch.tensor([fold_of[group] for group in groups])
