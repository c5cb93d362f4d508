"""Intervals and tests: known values, limits, and coverage by simulation."""

from __future__ import annotations

import numpy as np
import pytest

from vlmopt.verify.statistics import (
    bootstrap_interval,
    mcnemar_p_value,
    mean_interval,
    paired_difference,
    wilson_interval,
)


def test_wilson_gives_the_published_values() -> None:
    # Newcombe 1998, table I, method 3: 81/263, 15/148, 0/20, 1/29.
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (successes, n), expected in published.items():
        assert wilson_interval(successes, n) == pytest.approx(expected, abs=5e-5)
    assert wilson_interval(20, 20) == pytest.approx((1 - 0.1611, 1), abs=5e-5)


def test_wilson_refuses_what_is_no_proportion() -> None:
    for successes, n in ((0, 0), (3, 2), (-1, 5)):
        with pytest.raises(ValueError, match="successes in"):
            wilson_interval(successes, n)


def test_mcnemar_gives_the_values_of_the_binomial_distribution() -> None:
    assert mcnemar_p_value(0, 0) == 1
    assert mcnemar_p_value(5, 0) == 2 / 2**5
    assert mcnemar_p_value(1, 9) == pytest.approx(2 * 11 / 2**10)
    assert mcnemar_p_value(4, 4) == 1


def test_a_paired_difference_counts_who_is_right_alone() -> None:
    original = [1] * 60 + [1] * 9 + [0] * 1 + [0] * 30
    optimized = [1] * 60 + [0] * 9 + [1] * 1 + [0] * 30
    found = paired_difference(original, optimized, seed=0)
    assert (found.drop_points, found.n, found.n_only_original, found.n_only_optimized) == (pytest.approx(8), 100, 9, 1)
    assert found.p_value == pytest.approx(2 * 11 / 2**10)
    # Bonett and Price: (10 - 2) / 102 -+ 1.96 sqrt((12 / 102 - (8 / 102)^2) / 102)
    half = 1.959964 * np.sqrt((12 / 102 - (8 / 102) ** 2) / 102)
    assert found.interval95 == pytest.approx((100 * (8 / 102 - half), 100 * (8 / 102 + half)), abs=1e-4)


def test_two_equal_models_still_have_an_interval() -> None:
    found = paired_difference([1, 0] * 50, [1, 0] * 50, seed=0)
    assert (found.drop_points, found.p_value) == (0, 1)
    assert found.interval95[0] == -found.interval95[1]
    assert 2 < found.interval95[1] < 4
    grouped = paired_difference([1, 0] * 50, [1, 0] * 50, [str(i // 4) for i in range(100)], seed=0)
    assert grouped.interval95[1] > found.interval95[1]


def test_groups_of_one_item_are_no_groups() -> None:
    generator = np.random.default_rng(0)
    original, optimized = generator.integers(0, 2, (2, 80))
    names = [str(i) for i in range(80)]
    assert paired_difference(original, optimized, names, seed=0) == paired_difference(original, optimized, seed=0)


def test_repeating_every_item_in_its_group_changes_nothing() -> None:
    generator = np.random.default_rng(1)
    original, optimized = generator.integers(0, 2, (2, 40))
    groups = [str(i) for i in range(40) for _ in range(5)]
    once = bootstrap_interval(original - optimized, seed=0)
    five = paired_difference(np.repeat(original, 5), np.repeat(optimized, 5), groups, seed=0)
    assert five.interval95 == pytest.approx((100 * once[0], 100 * once[1]))
    without = paired_difference(np.repeat(original, 5), np.repeat(optimized, 5), seed=0)
    assert five.interval95[1] - five.interval95[0] > 2 * (without.interval95[1] - without.interval95[0])


def test_few_differences_are_tested_by_all_sign_patterns() -> None:
    # Three groups lose 2, 2 and 1: of the eight sign patterns only two are as far from zero.
    original = [1, 1, 0.5] + [0] * 9
    optimized = [0, 0, 0] + [0] * 9
    assert paired_difference(original, optimized, seed=0).p_value == 2 / 8


def test_many_differences_are_tested_by_drawn_signs_near_the_exact_value() -> None:
    groups = [str(i // 2) for i in range(200)]
    original, optimized = np.zeros(200), np.zeros(200)
    original[0:40:2] = 1  # twenty groups lose one item
    optimized[40:60:2] = 1  # ten win one
    found = paired_difference(original, optimized, groups, seed=0)
    assert found.p_value == pytest.approx(mcnemar_p_value(20, 10), abs=0.015)
    assert found == paired_difference(original, optimized, groups, seed=0)


def test_the_interval_of_a_metric_is_wilson_for_hits_and_the_bootstrap_for_shares() -> None:
    assert mean_interval([1] * 9 + [0], seed=0) == wilson_interval(9, 10)
    shares = np.random.default_rng(2).choice([0, 0.5, 1], 400)
    low, high = mean_interval(shares, seed=0)
    half = 1.96 * shares.std() / 20
    assert (low, high) == pytest.approx((shares.mean() - half, shares.mean() + half), abs=0.005)
    assert mean_interval([1.0] * 40, [str(i // 4) for i in range(40)], seed=0) == wilson_interval(10, 10)


def test_bad_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one item"):
        bootstrap_interval([], seed=0)
    with pytest.raises(ValueError, match="not finite"):
        mean_interval([1, float("nan")], seed=0)
    with pytest.raises(ValueError, match="3 items of the original, 2 of the optimized"):
        paired_difference([1, 1, 0], [1, 0], seed=0)
    with pytest.raises(ValueError, match="2 groups for 3 items"):
        paired_difference([1, 1, 0.5], [1, 0, 0], ["a", "a"], seed=0)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    generator = np.random.default_rng(3)
    runs, covered = 300, {"wilson": 0, "paired": 0, "clusters": 0, "clusters as items": 0}
    for run in range(runs):
        hits = generator.random(60) < 0.9
        low, high = wilson_interval(int(hits.sum()), 60)
        covered["wilson"] += low <= 0.9 <= high
        kind = generator.choice(4, 150, p=[0.7, 0.1, 0.05, 0.15])  # both, only original, only optimized, none
        low, high = paired_difference((kind == 0) | (kind == 1), (kind == 0) | (kind == 2), seed=run).interval95
        covered["paired"] += low <= 5 <= high
        scores = np.repeat(generator.random(60) < 0.6, 4).astype(float)
        groups = [str(i // 4) for i in range(240)]
        low, high = bootstrap_interval(scores, groups, seed=run, n_resamples=500)
        covered["clusters"] += low <= 0.6 <= high
        low, high = bootstrap_interval(scores, seed=run, n_resamples=500)
        covered["clusters as items"] += low <= 0.6 <= high
    for name in ("wilson", "paired", "clusters"):
        assert 0.92 <= covered[name] / runs <= 0.98, (name, covered[name] / runs)
    assert (
        covered["clusters as items"] / runs < 0.75
    )  # the check can fail: without its groups the interval is too short


def test_the_paired_test_rejects_equal_models_no_more_often_than_it_says() -> None:
    generator = np.random.default_rng(4)
    groups = [str(i // 2) for i in range(100)]
    rejected = 0
    for run in range(200):
        base = np.repeat(generator.random(50), 2)
        original, optimized = (base + generator.random(100) * 0.4 > 0.7 for _ in range(2))
        rejected += paired_difference(original, optimized, groups, seed=run).p_value < 0.05
    assert rejected / 200 <= 0.08
