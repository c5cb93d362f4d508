"""Where two models differ on the same test items: by group of items, and item by item."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import numpy as np

from vlmopt.verify.statistics import Interval, Values, drop_interval

MAX_GROUPS = 50
# Fewer items, or fewer independent ones among them, say too little for an interval.
MIN_ITEMS, MIN_CLUSTERS = 20, 10


@dataclass(frozen=True)
class GroupScores:
    """Scores of both models on the items of one group, with the cluster of every item: those of one are drawn whole."""

    name: str
    original: Values
    optimized: Values
    clusters: Sequence[str]

    @property
    def drop_points(self) -> float:
        return 100 * float((self.original - self.optimized).mean())


@dataclass(frozen=True)
class GroupDrop:
    """The metric of both models on one group, as fractions, and its drop in points.

    `interval95` is None where there are too few items for one.
    """

    name: str
    n: int
    original: float
    optimized: float
    drop_points: float
    interval95: Interval | None


def group_drops(groups: Sequence[GroupScores], *, seed: int) -> list[GroupDrop]:
    """The groups that lose most, at most 50, largest drop first; of equal drops the larger group first.

    The intervals are those of single groups: of fifty groups that lose nothing, two or three stand apart by chance.

    Raises:
        ValueError: a group is empty, or holds scores that are not finite.
    """
    for group in groups:
        if not len(group.original) or not np.isfinite([*group.original, *group.optimized]).all():
            raise ValueError(f"{group.name}: scores that are missing or not finite")
    ranked = sorted(groups, key=lambda group: (-group.drop_points, -len(group.clusters), group.name))
    return [_measured(group, seed=seed) for group in ranked[:MAX_GROUPS]]


def _measured(group: GroupScores, *, seed: int) -> GroupDrop:
    n = len(group.clusters)
    has_enough = n >= MIN_ITEMS and len(set(group.clusters)) >= MIN_CLUSTERS
    return GroupDrop(
        name=group.name,
        n=n,
        original=float(group.original.mean()),
        optimized=float(group.optimized.mean()),
        drop_points=group.drop_points,
        interval95=drop_interval(group.original, group.optimized, group.clusters, seed=seed) if has_enough else None,
    )


class Change(Enum):
    """What became of an answer."""

    LOST = "lost"  # right before, wrong now
    GAINED = "gained"  # wrong before, right now
    OTHER = "other"  # wrong before and now, with another answer


class Given(Protocol):
    """What a model answered, and whether that is right."""

    @property
    def text(self) -> str: ...

    @property
    def is_right(self) -> bool: ...


def changes(original: Sequence[Given], optimized: Sequence[Given]) -> dict[int, Change]:
    """What became of the items whose answer changed, by index; all others are left out.

    Raises:
        ValueError: not the same number of answers on both sides.
    """
    found: dict[int, Change] = {}
    for i, (before, after) in enumerate(zip(original, optimized, strict=True)):
        if before.is_right != after.is_right:
            found[i] = Change.LOST if before.is_right else Change.GAINED
        elif not before.is_right and before.text != after.text:
            found[i] = Change.OTHER
    return found


def examples(
    found: dict[int, Change], kinds: Sequence[str], clusters: Sequence[str], *, seed: int, limit: int
) -> list[int]:
    """At most `limit` of the changed items: lost ones first, then gained ones, then others.

    Among those of one change an order is drawn by the seed in which kinds and clusters take turns, so that not all of
    them are alike.
    """
    drawn = np.random.default_rng(seed).permutation(len(kinds)).tolist()
    chosen: list[int] = []
    for change in Change:
        members = [i for i in drawn if found.get(i) is change]
        by_cluster = _taking_turns(members, clusters)
        chosen += _taking_turns(by_cluster, kinds)
    return chosen[:limit]


def _taking_turns(members: Sequence[int], names: Sequence[str]) -> list[int]:
    """The members, the first of every name before the second of any."""
    seen: Counter[str] = Counter()
    turns: list[tuple[int, int]] = []
    for member in members:
        turns.append((seen[names[member]], member))
        seen[names[member]] += 1
    return [member for _, member in sorted(turns, key=lambda turn: turn[0])]
