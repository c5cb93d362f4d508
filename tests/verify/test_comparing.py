"""Groups that lose most, and items whose answer changed, against what a plain count says."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest

from vlmopt.verify.comparing import MAX_GROUPS, Change, GroupScores, changes, examples, group_drops
from vlmopt.verify.statistics import drop_interval, paired_difference


@dataclass(frozen=True)
class Said:
    text: str
    is_right: bool


def group(name: str, original: list[float], optimized: list[float], clusters: list[str] | None = None) -> GroupScores:
    names = clusters or [f"{name}{i}" for i in range(len(original))]
    return GroupScores(name, np.array(original, dtype=float), np.array(optimized, dtype=float), names)


def test_groups_come_with_the_largest_drop_first_and_an_interval_where_there_are_enough_items() -> None:
    found = group_drops(
        [
            group("same", [1, 0] * 10, [1, 0] * 10),
            group("few", [1] * 19, [0] * 10 + [1] * 9),
            group("enough", [1] * 20, [0] * 5 + [1] * 15),
            group("better", [0] * 4, [1] * 4),
        ],
        seed=0,
    )
    assert [row.name for row in found] == ["few", "enough", "same", "better"]
    assert [row.n for row in found] == [19, 20, 20, 4]
    assert [row.drop_points for row in found] == pytest.approx([1000 / 19, 25, 0, -100])
    assert [row.original for row in found] == [1, 1, 0.5, 0]
    assert [row.optimized for row in found] == pytest.approx([9 / 19, 0.75, 0.5, 1])
    assert [row.interval95 is None for row in found] == [True, False, False, True]
    assert found[1].interval95 == drop_interval([1] * 20, [0] * 5 + [1] * 15, seed=0)


def test_items_of_few_clusters_have_no_interval_and_others_are_drawn_by_cluster() -> None:
    original, optimized = [1.0] * 40, [0.0] * 10 + [1.0] * 30
    nine = [str(i % 9) for i in range(40)]
    ten = [str(i // 4) for i in range(40)]
    assert group_drops([group("g", original, optimized, nine)], seed=0)[0].interval95 is None
    clustered = group_drops([group("g", original, optimized, ten)], seed=0)[0].interval95
    alone = group_drops([group("g", original, optimized)], seed=0)[0].interval95
    assert clustered is not None
    assert alone is not None
    assert clustered == paired_difference(original, optimized, ten, seed=0).interval95
    assert clustered[1] - clustered[0] > 1.5 * (alone[1] - alone[0])


def test_equal_drops_put_the_larger_group_first_and_fifty_are_enough() -> None:
    groups = [group(f"{i:02d}", [1.0] * (1 + i // 30), [0.0] * (1 + i // 30)) for i in range(60)]
    names = [row.name for row in group_drops(groups, seed=0)]
    assert len(names) == MAX_GROUPS
    assert names == [f"{i:02d}" for i in range(30, 60)] + [f"{i:02d}" for i in range(20)]
    assert names == [row.name for row in group_drops(groups[::-1], seed=0)]


@pytest.mark.parametrize("bad", [[float("nan"), 1.0], [float("inf"), 1.0], []])
def test_a_group_without_numbers_is_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="left: scores that are missing or not finite"):
        group_drops([group("fine", [1.0], [1.0]), group("left", bad, [1.0] * len(bad))], seed=0)


def test_answers_are_lost_gained_or_other_and_right_ones_stay() -> None:
    before = [Said("a", True), Said("a", True), Said("b", False), Said("b", False), Said("b", False), Said("a", True)]
    after = [Said("a", True), Said("b", False), Said("a", True), Said("c", False), Said("b", False), Said("c", True)]
    assert changes(before, after) == {1: Change.LOST, 2: Change.GAINED, 3: Change.OTHER}
    with pytest.raises(ValueError, match="shorter"):
        changes(before, after[:-1])


def test_counts_agree_with_a_plain_count_on_random_answers() -> None:
    generator = np.random.default_rng(4)
    truth, first, second = generator.integers(0, 4, (3, 500))
    before = [Said(str(a), bool(a == t)) for a, t in zip(first, truth, strict=True)]
    after = [Said(str(a), bool(a == t)) for a, t in zip(second, truth, strict=True)]
    found = Counter(changes(before, after).values())
    assert found[Change.LOST] == int(((first == truth) & (second != truth)).sum())
    assert found[Change.GAINED] == int(((first != truth) & (second == truth)).sum())
    assert found[Change.OTHER] == int(((first != second) & (first != truth) & (second != truth)).sum())


def test_examples_are_lost_ones_first_and_the_same_for_the_same_seed() -> None:
    found = {i: [Change.OTHER, Change.GAINED, Change.LOST][i % 3] for i in range(0, 60, 2)}
    names = [str(i) for i in range(60)]
    shown = examples(found, names, names, seed=1, limit=24)
    assert [found[i] for i in shown] == [Change.LOST] * 10 + [Change.GAINED] * 10 + [Change.OTHER] * 4
    assert len(set(shown)) == 24
    assert shown == examples(found, names, names, seed=1, limit=24)
    assert shown != examples(found, names, names, seed=2, limit=24)
    assert examples({}, names, names, seed=1, limit=24) == []
    assert len(examples(found, names, names, seed=1, limit=99)) == 30


def test_examples_take_turns_among_kinds_and_among_clusters() -> None:
    # Forty items of one label in ten clusters of four, and two items of another label: both labels come first.
    kinds = ["cat"] * 40 + ["dog"] * 2
    clusters = [str(i // 4) for i in range(40)] + ["x", "y"]
    found = dict.fromkeys(range(42), Change.LOST)
    for seed in range(5):
        shown = examples(found, kinds, clusters, seed=seed, limit=12)
        assert Counter(kinds[i] for i in shown) == {"cat": 10, "dog": 2}
        assert len({clusters[i] for i in shown}) == 12
        assert {kinds[i] for i in shown[:2]} == {"cat", "dog"}
