"""Intervals and paired tests for task metrics: what a number on a test split lets one say.

Scores are fractions in [0, 1], one an item. Items of one group (four drawings of one concept, several questions on one
picture) are not independent; where groups are given, whole groups are drawn. Every draw comes from the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Interval = tuple[float, float]
Values = NDArray[np.float64]

N_RESAMPLES = 4000
N_FLIPS = 9999
_EXACT_FLIPS = 12  # up to so many differing groups, all 2^n sign patterns are looked at
_CHUNK_CELLS = 4_000_000


@dataclass(frozen=True)
class PairedResult:
    """Two models on the same items.

    Units: `drop_points` and `interval95` in percentage points, positive where the optimized model is worse. `p_value`
    is two-sided, for "both are equally good". The last two count items on which one model scores more than the other.
    """

    drop_points: float
    interval95: Interval
    p_value: float
    n: int
    n_only_original: int
    n_only_optimized: int


def wilson_interval(successes: float, n: int, *, confidence: float = 0.95) -> Interval:
    """The score interval of a proportion, as fractions.

    Raises:
        ValueError: there are no trials, or more successes than trials.
    Source: Wilson 1927; it keeps its coverage near 0 and 1, where the textbook interval fails.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} trials")
    z = _z(confidence)
    share = successes / n
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (0.0 if successes == 0 else float(center - half)), (1.0 if successes == n else float(center + half))


def bootstrap_interval(
    item_scores: ArrayLike,
    groups: Sequence[str] | None = None,
    *,
    seed: int,
    confidence: float = 0.95,
    n_resamples: int = N_RESAMPLES,
) -> Interval:
    """The percentile bootstrap interval of the mean; whole groups are drawn where they are given.

    Raises:
        ValueError: there are no scores, or not one group for each.
    """
    scores = _scores(item_scores)
    sums, sizes = _by_group(scores, groups)
    means = _resampled(sums, sizes, seed=seed, n_resamples=n_resamples)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def mean_interval(item_scores: ArrayLike, groups: Sequence[str] | None = None, *, seed: int) -> Interval:
    """The 95 % interval of a metric, as fractions: Wilson for independent hits and misses, else the bootstrap.

    Where all groups score alike there is nothing to resample; then as many trials as groups are counted.
    """
    scores = _scores(item_scores)
    if _is_binary(scores) and not _has_groups(len(scores), groups):
        return wilson_interval(float(scores.sum()), len(scores))
    sums, sizes = _by_group(scores, groups)
    if np.ptp(sums / sizes) == 0:
        return wilson_interval(float(scores.mean()) * len(sums), len(sums))
    return bootstrap_interval(scores, groups, seed=seed)


def paired_difference(
    original_items: ArrayLike, optimized_items: ArrayLike, groups: Sequence[str] | None = None, *, seed: int
) -> PairedResult:
    """How much the optimized model loses on the same items, with an interval and a test.

    Hits and misses without groups: exact McNemar test and the adjusted interval of Bonett and Price. Else: a test that
    flips the sign of each group's difference, and the paired bootstrap over groups. Groups of one item each are none.

    Raises:
        ValueError: there are no items, or not the same number on both sides.
    Source: McNemar 1947; Bonett and Price 2012, equation 5 (the difference of paired proportions, Laplace-adjusted).
    """
    original, optimized = _paired(original_items, optimized_items)
    drops = original - optimized
    n_original, n_optimized = int((drops > 0).sum()), int((drops < 0).sum())
    if _are_hits(original, optimized, groups):
        p_value = mcnemar_p_value(n_original, n_optimized)
    else:
        p_value = _sign_flip_p_value(_by_group(drops, groups)[0], seed=seed)
    interval = drop_interval(original, optimized, groups, seed=seed)
    return PairedResult(100 * float(drops.mean()), interval, p_value, len(drops), n_original, n_optimized)


def drop_interval(
    original_items: ArrayLike, optimized_items: ArrayLike, groups: Sequence[str] | None = None, *, seed: int
) -> Interval:
    """The 95 % interval of what the optimized model loses on the same items, in points, as in `paired_difference`.

    Raises:
        ValueError: there are no items, or not the same number on both sides.
    """
    original, optimized = _paired(original_items, optimized_items)
    drops = original - optimized
    if _are_hits(original, optimized, groups):
        interval = _bonett_price(int((drops > 0).sum()), int((drops < 0).sum()), len(drops))
    else:
        sums, sizes = _by_group(drops, groups)
        is_flat = np.ptp(sums / sizes) == 0 and float(drops.mean()) == 0
        interval = _bonett_price(0, 0, len(sums)) if is_flat else bootstrap_interval(drops, groups, seed=seed)
    return 100 * interval[0], 100 * interval[1]


def mcnemar_p_value(n_only_original: int, n_only_optimized: int) -> float:
    """The exact two-sided p-value for the items on which exactly one of two models is right."""
    n = n_only_original + n_only_optimized
    return float(stats.binomtest(n_only_original, n).pvalue) if n else 1.0


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _bonett_price(n_only_original: int, n_only_optimized: int, n: int) -> Interval:
    first, second = (n_only_original + 1) / (n + 2), (n_only_optimized + 1) / (n + 2)
    difference = first - second
    half = _z(0.95) * float(np.sqrt((first + second - difference**2) / (n + 2)))
    return max(difference - half, -1.0), min(difference + half, 1.0)


def _scores(items: ArrayLike) -> Values:
    scores = np.asarray(items, dtype=np.float64)
    if scores.ndim != 1 or not len(scores):
        raise ValueError(f"item scores of shape {scores.shape}, expected one number for each of at least one item")
    if not np.isfinite(scores).all():
        raise ValueError("item scores hold numbers that are not finite")
    return scores


def _paired(original_items: ArrayLike, optimized_items: ArrayLike) -> tuple[Values, Values]:
    original, optimized = _scores(original_items), _scores(optimized_items)
    if len(original) != len(optimized):
        raise ValueError(f"{len(original)} items of the original, {len(optimized)} of the optimized model")
    return original, optimized


def _are_hits(original: Values, optimized: Values, groups: Sequence[str] | None) -> bool:
    """Whether these are independent hits and misses."""
    return _is_binary(original) and _is_binary(optimized) and not _has_groups(len(original), groups)


def _is_binary(scores: Values) -> bool:
    return bool(np.isin(scores, (0.0, 1.0)).all())


def _has_groups(n_items: int, groups: Sequence[str] | None) -> bool:
    return groups is not None and len(set(groups)) < n_items


def _by_group(scores: Values, groups: Sequence[str] | None) -> tuple[Values, Values]:
    """Sum of scores and number of items of every group, in order of first appearance."""
    if groups is None:
        return scores, np.ones_like(scores)
    if len(groups) != len(scores):
        raise ValueError(f"{len(groups)} groups for {len(scores)} items")
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    index = np.array([numbers[group] for group in groups])
    return np.bincount(index, weights=scores).astype(np.float64), np.bincount(index).astype(np.float64)


def _in_chunks(n_draws: int, width: int, draw: Callable[[int], Values]) -> Values:
    """The results of `draw(n)` for n adding up to `n_draws`, with bounded memory for n x width cells."""
    step = max(1, _CHUNK_CELLS // width)
    return np.concatenate([draw(min(step, n_draws - start)) for start in range(0, n_draws, step)])


def _resampled(sums: Values, sizes: Values, *, seed: int, n_resamples: int) -> Values:
    generator = np.random.default_rng(seed)
    n_groups = len(sums)

    def draw(n: int) -> Values:
        picked = generator.integers(0, n_groups, size=(n, n_groups))
        means: Values = sums[picked].sum(1) / sizes[picked].sum(1)
        return means

    return _in_chunks(n_resamples, n_groups, draw)


def _sign_flip_p_value(sums: Values, *, seed: int) -> float:
    """Share of sign patterns whose total is at least as far from zero as the one seen (which is one of them)."""
    moved = sums[sums != 0]
    if not len(moved):
        return 1.0
    seen = abs(moved.sum()) - 1e-9
    if len(moved) <= _EXACT_FLIPS:
        patterns = 1.0 - 2.0 * ((np.arange(2 ** len(moved))[:, None] >> np.arange(len(moved))) & 1)
        return float((np.abs(patterns @ moved) >= seen).mean())
    generator = np.random.default_rng(seed)

    def draw(n: int) -> Values:
        signs = 1.0 - 2.0 * generator.integers(0, 2, size=(n, len(moved)))
        totals: Values = np.abs(signs @ moved)
        return totals

    totals = _in_chunks(N_FLIPS, len(moved), draw)
    return (1 + int((totals >= seen).sum())) / (N_FLIPS + 1)
