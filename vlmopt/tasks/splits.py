"""Which sample belongs to which split, whether splits leak into each other, and smaller samples of a split."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlmopt.core.errors import TaskError
from vlmopt.tasks.folder import SPLITS
from vlmopt.tasks.images import ImageSource
from vlmopt.tasks.specification import Splits


@dataclass(frozen=True)
class Sample:
    """One item of a task.

    `label` is the class or the answer, `text` the caption or the question; empty where the kind has none. `group` holds
    samples together that are alike (four drawings of one concept); without a group column it is the image.
    `references` are the answers or captions that count as right where the model writes its own; the first is the label.
    `rejected` is an answer that is wrong, and that the label is preferred to; empty where there is none.
    """

    image: ImageSource
    label: str
    text: str
    group: str
    origin: str
    references: tuple[str, ...] = ()
    rejected: str = ""


def divided(keys: Sequence[str], splits: Splits, *, parts: Sequence[str] = SPLITS) -> list[str]:
    """The split of every key, from the key and the seed alone: adding data later moves no key to another split.

    Only `parts` are given out, in the proportion of their fractions.
    """
    ends = list(itertools.accumulate(getattr(splits, part) for part in parts))
    points = (_unit(f"{splits.seed}:{key}") * ends[-1] for key in keys)
    return [next(part for part, end in zip(parts, ends, strict=True) if point < end) for point in points]


def _unit(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def refuse_leaks(place: str, splits: Mapping[str, Sequence[Sample]], *, group: str) -> None:
    """Makes sure that no image file and, where `group` names a column, no group is in two splits.

    Raises:
        TaskError: one is; names it and both splits.
    """
    homes: dict[tuple[str, str], str] = {}
    for split, samples in splits.items():
        for sample in samples:
            keys = [("image", sample.image.name)] + ([(group, sample.group)] if group else [])
            for what, name in keys:
                home = homes.setdefault((what, name), split)
                if home != split:
                    remedy = f"keep each {what} in one split"
                    found = f"{what} {name!r} is in the {home} split and in the {split} split"
                    raise TaskError(place, found, expected="splits that share nothing", remedy=remedy)


def subsample(samples: Sequence[Sample], limit: int, *, seed: int, has_groups: bool) -> tuple[Sample, ...]:
    """At most `limit` samples in their own order, classes in proportion, groups whole.

    How: within its class the r-th of n units (in an order drawn by the seed) stands at (r + 1/2) / n, the first of
    every class before all others; the first units along that line are taken. A group counts for its most frequent
    label. A group that would exceed the limit is passed over, unless nothing was taken yet.
    """
    if limit >= len(samples):
        return tuple(samples)
    units: dict[str, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        units[sample.group if has_groups else str(index)].append(index)
    strata: dict[str, list[str]] = defaultdict(list)
    for unit, members in units.items():
        counts = Counter(samples[index].label for index in members)
        strata[min(counts, key=lambda label: (-counts[label], label))].append(unit)
    positions: list[tuple[float, float, str]] = []
    for names in strata.values():
        drawn = sorted((_unit(f"{seed}:{name}"), name) for name in names)
        positions += [((r + 0.5) / len(drawn) if r else 0.0, u, name) for r, (u, name) in enumerate(drawn)]
    taken: list[int] = []
    for _, _, name in sorted(positions):
        if not taken or len(taken) + len(units[name]) <= limit:
            taken += units[name]
    return tuple(samples[index] for index in sorted(taken))
