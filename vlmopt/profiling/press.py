"""How well targets can be predicted linearly from features, each row by a fit without it: ridge with PRESS.

For ridge regression with an intercept that is not penalised the error of the fit without row i is known from the fit of
all rows, e_i = (y_i - fitted_i) / (1 - h_ii), with H the hat matrix. H comes from the eigenvectors of the kernel
(F - mean)(F - mean)', which is n x n, so there may be fewer rows than features.

Source: Allen, "The relationship between variable selection and data augmentation" (1974).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STRENGTHS = tuple(10.0 ** (power / 2) for power in range(-8, 5))  # relative to the mean of the kernel's diagonal


@dataclass(frozen=True)
class Press:
    """`predicted` [n, k]: every row by the fit without it, at the strength that predicts best."""

    predicted: Tensor
    strength: float


@dataclass(frozen=True)
class Kernel:
    """The centred features of n rows through the eigenvectors of their kernel."""

    vectors: Tensor  # [n, n]
    values: Tensor  # [n]

    @classmethod
    def of(cls, features: Tensor) -> Kernel:
        """Of features [n, ...]."""
        flat = features.double().reshape(len(features), -1)
        centred = flat - flat.mean(dim=0)
        values, vectors = torch.linalg.eigh(centred @ centred.T)
        return cls(vectors, values.clamp(min=0))

    def left_out(self, targets: Tensor, strength: float) -> Tensor:
        """Every row's targets [n, k] predicted by the fit without it."""
        n = len(self.values)
        shrink = self.values / (self.values + strength * self.values.mean().clamp(min=1e-12))
        hat = (self.vectors * shrink) @ self.vectors.T + 1.0 / n
        residual = targets - hat @ targets
        return targets - residual / (1.0 - hat.diagonal()).clamp(min=1e-9)[:, None]


def press(features: Tensor, targets: Tensor, *, strengths: Sequence[float] = STRENGTHS) -> Press:
    """Predictions of targets [n, k] from features [n, ...] with the strength whose squared error is least."""
    kernel, wanted = Kernel.of(features), targets.double()
    best: tuple[float, Press] | None = None
    for strength in strengths:
        predicted = kernel.left_out(wanted, strength)
        error = float(((predicted - wanted) ** 2).mean())
        if best is None or error < best[0]:
            best = error, Press(predicted, strength)
    assert best is not None
    return best[1]


def press_errors(features: Tensor, targets: Tensor, *, strengths: Sequence[float] = STRENGTHS) -> Tensor:
    """For every row the squared error of `press` over the variance of the targets, [n], float64."""
    wanted = targets.double()
    spread = ((wanted - wanted.mean(dim=0)) ** 2).sum(dim=1).mean().clamp(min=1e-300)
    return ((press(features, wanted, strengths=strengths).predicted - wanted) ** 2).sum(dim=1) / spread
