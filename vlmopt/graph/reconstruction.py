"""Which units of a width to keep, and what the kept ones take over of the others: one least-squares problem.

Let `h` [D] be what the consumers W [out, D] read, and S the columns of the units that are cut. With what is kept, K,

    W h  ~  (W_K + W_S A) h_K + W_S a,     A = C_SK (C_KK + damping I)^-1,   C = E[(h - m)(h - m)^T],   a = m_S - A m_K

has the least mean square error on task data, so cut units live on in the consumers at no cost. Where a consumer has no
bias, m is 0 and a goes. Choosing S is the problem of Optimal Brain Surgeon with blocks of columns for weights: a unit u
costs `tr(W_u [(C^-1)_uu]^-1 W_u^T)`, and once it is gone W and C^-1 are those of the rest.

What is fitted on a part of the rows is judged on others, and a cut that takes nothing over (A = 0, a = 0), of the units
that are the best for that, is among the candidates: compensation never makes the error on unseen rows larger.

Source: Hassibi and Stork 1992; for whole columns Kurtic et al. 2023, ZipLM, arXiv 2302.04089, eq. 3 to 5. What differs:
means are taken over by the bias, the damping is chosen on unseen rows, and all consumers of a value are one problem.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_SELECTION_DAMPING = 1e-2  # relative to the mean of the diagonal, as are these:
DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_ROUNDS = 256  # units go one by one where no more than this go, and in as many rounds otherwise
_EVERY = 5  # one part in so many of the rows is kept out of the fit


StandIn = tuple[Tensor, Tensor]  # what stands for the cut columns: A [cut, kept] and a [cut]


@dataclass(frozen=True)
class Choice:
    """Which units are kept, and what stands for the others in their consumers; None where nothing does.

    Errors are mean squares of the consumers' output on rows that the fit has not seen, relative to that output's own:
    `error` of this choice, `plain_error` of the cut where nothing is taken over.
    """

    kept: tuple[int, ...]
    stand_in: StandIn | None
    error: float
    plain_error: float


@dataclass(frozen=True)
class Problem:
    """`rows` [n, D] of what the consumers read, `weight` [out, D] of all of them, `columns` [U, b] of every unit.

    `is_centred`: the consumers have biases, which take means over.
    """

    rows: Tensor
    weight: Tensor
    columns: Tensor
    is_centred: bool


def choose_units(problem: Problem, n_kept: int, *, compensates: bool) -> Choice:
    """The units to keep, and what takes the place of the others."""
    rows = problem.rows.double()
    fitted, unseen = _parts(rows)
    moments = _moments(fitted, is_centred=problem.is_centred)
    n_cut = len(problem.columns) - n_kept
    plain = _least_read(problem, moments, n_cut)
    tried: list[tuple[frozenset[int], float | None]] = [(plain, None)]
    if compensates:
        missed = _least_missed(problem, moments, n_cut)
        tried += [(cut, damping) for cut in dict.fromkeys((missed, plain)) for damping in DAMPINGS]
    errors = [_error(problem, cut, _stand_in(problem, moments, cut, damping), unseen) for cut, damping in tried]
    best = min(range(len(tried)), key=errors.__getitem__)
    cut, damping = tried[best]
    every = _moments(rows, is_centred=problem.is_centred)
    units = tuple(unit for unit in range(len(problem.columns)) if unit not in cut)
    scale = max(_size(problem, moments, unseen), 1e-30)
    return Choice(units, _stand_in(problem, every, cut, damping), errors[best] / scale, errors[0] / scale)


def taken_over(columns: Tensor, choice: Choice, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight [out, kept columns] and bias of a consumer that reads the kept columns alone, in float64."""
    kept, gone = _sides(columns, weight.shape[1], frozenset(range(len(columns))) - frozenset(choice.kept))
    own, shift = weight.detach().double(), None if bias is None else bias.detach().double()
    if choice.stand_in is None:
        return own[:, kept], shift
    matrix, offset = (part.to(own) for part in choice.stand_in)
    return own[:, kept] + own[:, gone] @ matrix, None if shift is None else shift + own[:, gone] @ offset


def _parts(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows to fit and rows to judge: neighbours come from one sample, so the last ones are kept out, not each fifth."""
    n_unseen = len(rows) // _EVERY
    return (rows[:-n_unseen], rows[-n_unseen:]) if n_unseen else (rows, rows)


class _Moments(NamedTuple):
    """Mean [D], zero where nothing takes it over, and second moment [D, D] about it."""

    mean: Tensor
    gram: Tensor


def _moments(rows: Tensor, *, is_centred: bool) -> _Moments:
    mean = rows.mean(0) if is_centred else torch.zeros_like(rows[0])
    centred = rows - mean
    return _Moments(mean, centred.T @ centred / len(rows))


def _damped(gram: Tensor, damping: float) -> Tensor:
    """The matrix with so much of the mean of its diagonal added to it, and a little where that is zero."""
    return gram + torch.eye(len(gram), dtype=gram.dtype) * (damping * gram.diagonal().mean()).clamp(min=1e-12)


def _sides(columns: Tensor, width: int, cut: Collection[int]) -> tuple[Tensor, Tensor]:
    """The columns that stay, those of no unit included, and the columns that go, both ascending."""
    goes = torch.zeros(width, dtype=torch.bool)
    goes[columns[sorted(cut)].flatten()] = True
    return (~goes).nonzero().flatten(), goes.nonzero().flatten()


def _stand_in(problem: Problem, moments: _Moments, cut: Collection[int], damping: float | None) -> StandIn | None:
    """A and a of the cut columns."""
    if damping is None:
        return None
    kept, gone = _sides(problem.columns, problem.rows.shape[1], cut)
    factor = torch.linalg.cholesky(_damped(moments.gram[kept][:, kept], damping))
    matrix = torch.cholesky_solve(moments.gram[kept][:, gone], factor).T
    return matrix, moments.mean[gone] - matrix @ moments.mean[kept]


def _error(problem: Problem, cut: Collection[int], stand_in: StandIn | None, rows: Tensor) -> float:
    """Mean square of what the consumers' output is off by."""
    kept, gone = _sides(problem.columns, problem.rows.shape[1], cut)
    missed = rows[:, gone]
    if stand_in is not None:
        missed = missed - rows[:, kept] @ stand_in[0].T - stand_in[1]
    return float((missed @ problem.weight[:, gone].T).square().sum(1).mean())


def _size(problem: Problem, moments: _Moments, rows: Tensor) -> float:
    return float(((rows - moments.mean) @ problem.weight.T).square().sum(1).mean())


def _least_read(problem: Problem, moments: _Moments, n_cut: int) -> frozenset[int]:
    """Units whose cut changes the consumers' output least where nothing takes them over, chosen one after another."""
    second = moments.gram + torch.outer(moments.mean, moments.mean)
    terms = (problem.weight.T @ problem.weight) * second
    n_units, width = problem.columns.shape
    order = problem.columns.flatten()
    pairs = terms[order][:, order].reshape(n_units, width, n_units, width).sum((1, 3))
    costs, cut = pairs.diagonal().clone(), list[int]()
    for _ in range(n_cut):
        unit = int(costs.argmin())
        cut.append(unit)
        costs += 2 * pairs[unit]
        costs[cut] = torch.inf
    return frozenset(cut)


def _least_missed(problem: Problem, moments: _Moments, n_cut: int) -> frozenset[int]:
    """Units that the others stand in for with the least error of the consumers' output, cut one after another."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(_damped(moments.gram, _SELECTION_DAMPING)))
    weight, cut = problem.weight.clone(), list[int]()
    alive = torch.ones(len(problem.columns), dtype=torch.bool)
    for n_now in _rounds(n_cut):
        costs = _costs(problem.columns, weight, inverse)
        costs[~alive] = torch.inf
        units = costs.topk(n_now, largest=False).indices
        gone = problem.columns[units].flatten()
        step = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
        weight -= weight[:, gone] @ step
        inverse -= inverse[:, gone] @ step
        inverse[gone, gone] = 1.0  # what is gone stays invertible on its own, and touches nothing any more
        alive[units] = False
        cut += units.tolist()
    return frozenset(cut)


def _costs(columns: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """What every unit costs, [U], where the others take it over."""
    if columns.shape[1] == 1:
        return (weight.square().sum(0) / inverse.diagonal())[columns[:, 0]]
    blocks = torch.linalg.inv(inverse[columns[:, :, None], columns[:, None, :]])
    second = (weight.T @ weight)[columns[:, :, None], columns[:, None, :]]
    costs: Tensor = (second * blocks).sum((1, 2))
    return costs


def _rounds(n_cut: int) -> Iterator[int]:
    """How many units go in each round."""
    most = -(-n_cut // _ROUNDS)
    while n_cut > 0:
        yield min(most, n_cut)
        n_cut -= most
