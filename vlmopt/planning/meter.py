"""Measures what a cut costs on the task: features behind it, head re-fitted in closed form, items the fit has not seen.

Two kinds of items count: those of another split, and those of the fitting split predicted by fits that held them out.
Together they are twice as many, and every plan is a comparison of noisy means. The reference is fitted on the same
samples in the same way, and compared on the same items.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmopt.core.program import Program
from vlmopt.core.progress import Progress
from vlmopt.core.workload import Outputs, Workload, parts_of
from vlmopt.graph.branches import by_component, find_branches
from vlmopt.graph.clusters import clustered
from vlmopt.graph.head import head_features
from vlmopt.graph.precision import measuring_precision
from vlmopt.graph.prefixes import Prefixes
from vlmopt.graph.refit import fit_head, prior_weight
from vlmopt.graph.replay import Replay
from vlmopt.planning.cuts import Measurement

PREFIX_BYTES = 1 << 30  # of the uncut run's values that a meter keeps in memory, which its cuts start from
MIN_GROUPS_TO_KEEP_OUT = 80  # with fewer groups of items none is kept out of a search: every one is needed


@dataclass(frozen=True)
class Unseen:
    """A component's outputs on both splits, each by a head that was fitted without the rows in question."""

    fit: Tensor
    check: Tensor


@dataclass(frozen=True)
class _Changes:
    """Of every item, [n]: the drop in points from the original, and the growth of the loss from the uncut program."""

    drops: Tensor
    losses: Tensor


class CutMeter:
    """Drop of the metric for sets of skipped branches, heads fitted on `fit` and looked at on both splits.

    Branches are named `component/branch`. `reference_fit` are the original program's outputs on `fit`. A share of the
    groups of items, `kept_out`, is hidden from `measure`: picking the best of many noisy cuts overstates it by one to
    one and a half standard errors, and only items that took no part in the picking can tell. `hidden` names those
    groups instead, where another meter has drawn them. `original` is what drops are counted from, where earlier passes
    have edited the program already: a program, with both splits as it reads them in `original_splits` where that is not
    what this one reads, or its own meter. `prefix_bytes` is the memory for values of the uncut run. Without
    `fits_heads` the heads stay as they are: those that were trained.
    """

    def __init__(
        self,
        program: Program,
        fit: Workload,
        check: Workload,
        reference_fit: Outputs,
        *,
        progress: Progress,
        seed: int = 0,
        kept_out: float = 0.0,
        hidden: frozenset[str] | None = None,
        original: Program | CutMeter | None = None,
        original_splits: tuple[Workload, Workload] | None = None,
        prefix_bytes: int = PREFIX_BYTES,
        fits_heads: bool = True,
    ) -> None:
        self._fits_heads = fits_heads
        self.program, self.fit, self.check = program, fit, check
        self.reference_fit, self.progress, self.seed = reference_fit, progress, seed
        self._replays = {name: _replay(program, name, fits_heads) for name in fit.feeds}
        self._prefixes = self._room(prefix_bytes)
        self._baseline: dict[str, Unseen] | None = None
        self._original = (
            original
            if original is None or isinstance(original, CutMeter)
            else CutMeter(
                original,
                *(original_splits or (fit, check)),
                reference_fit,
                progress=progress,
                seed=seed,
                hidden=frozenset(),
                prefix_bytes=0,  # it is run once
            )
        )
        self._changes: dict[frozenset[str], _Changes] = {}
        self._groups = [*self.fit.item_groups, *self.check.item_groups]
        self._parts = [*parts_of(self.fit), *parts_of(self.check)]
        self.hidden = _hidden_groups(self._groups, kept_out, seed=seed) if hidden is None else hidden
        self._is_hidden = torch.tensor([group in self.hidden for group in self._groups])

    def _room(self, limit_bytes: float) -> dict[tuple[str, bool], Prefixes]:
        """Memory for the uncut run's values, shared out by component and split."""
        splits = ((False, self.fit), (True, self.check))
        counts = {(name, is_check): len(feeds) for is_check, split in splits for name, feeds in split.feeds.items()}
        share = limit_bytes / max(1, sum(counts.values()))
        return {key: Prefixes(self._replays[key[0]], n, share * n) for key, n in counts.items()}

    def measure(self, cuts: Sequence[frozenset[str]]) -> list[Measurement]:
        """The drop of every cut in points, with its standard error over groups of items.

        Cuts that are measured together share one pass up to the first branch that they skip.
        """
        return self._measured(cuts, ~self._is_hidden)

    def measure_all(self, cuts: Sequence[frozenset[str]]) -> list[Measurement]:
        """The same on all items, those kept out of `measure` included; a cut measured before costs nothing."""
        return self._measured(cuts, torch.ones_like(self._is_hidden))

    def measure_kept_out(self, cuts: Sequence[frozenset[str]]) -> list[Measurement]:
        """The same on the items kept out of `measure`; empty where there are none."""
        return self._measured(cuts, self._is_hidden) if bool(self._is_hidden.any()) else []

    @property
    def is_cut_before(self) -> bool:
        """Whether earlier passes have cut the program, and drops are counted from the original."""
        return self._original is not None

    @property
    def n_measured(self) -> int:
        """Items that `measure` looks at."""
        return int((~self._is_hidden).sum())

    @property
    def reference_points(self) -> float:
        """The metric of what drops are counted from, on all items, in points; of several tasks the least."""
        items = self._reference_items()
        rows = ([i for i, own in enumerate(self._parts) if own == part] for part in dict.fromkeys(self._parts))
        return 100.0 * min(float(items[own].mean()) for own in rows)

    @property
    def mean_loss(self) -> float:
        """Of the program as it is, over all items."""
        if self._baseline is None:
            self._baseline = self._unseen([{}])[0]
        return float(self._losses(self._baseline).mean())

    def _reference_items(self) -> Tensor:
        """The items of what drops are counted from."""
        if self._original is not None:
            return self._original._reference_items()
        if self._baseline is None:
            self._baseline = self._unseen([{}])[0]
        return self._items(self._baseline)

    def _measured(self, cuts: Sequence[frozenset[str]], chosen: Tensor) -> list[Measurement]:
        new = list(dict.fromkeys(cut for cut in cuts if cut not in self._changes))
        if new:
            self._changes.update(zip(new, self._item_changes(new), strict=True))
        return [self._worst(self._changes[cut], chosen) for cut in cuts]

    def _worst(self, changes: _Changes, chosen: Tensor) -> Measurement:
        """The drop over the chosen items; of several tasks that of the one which loses most."""
        found = []
        for part in dict.fromkeys(self._parts):
            rows = [i for i, is_chosen in enumerate(chosen.tolist()) if is_chosen and self._parts[i] == part]
            if rows:
                drop = clustered(changes.drops[rows], [self._groups[i] for i in rows])
                found.append(Measurement(*drop, loss=float(changes.losses[rows].mean())))
        return max(found, key=lambda one: one.sort_key)

    def _item_changes(self, cuts: Sequence[frozenset[str]]) -> list[_Changes]:
        """What every item loses under every cut."""
        plans = [by_component(cut) for cut in cuts]
        if self._baseline is None:
            plans = [{}, *plans]
        unseen = self._unseen(plans)
        if self._baseline is None:
            self._baseline, unseen = unseen[0], unseen[1:]
        items, losses = self._reference_items(), self._losses(self._baseline)
        return [_Changes(100.0 * (items - self._items(one)), self._losses(one) - losses) for one in unseen]

    def _items(self, unseen: Mapping[str, Unseen]) -> Tensor:
        """The metric's items of both splits, one after the other."""
        fit = self.fit.item_scores({name: pair.fit for name, pair in unseen.items()})
        check = self.check.item_scores({name: pair.check for name, pair in unseen.items()})
        return torch.cat([fit, check])

    def _losses(self, unseen: Mapping[str, Unseen]) -> Tensor:
        """The items' losses of both splits, one after the other."""
        fit = self.fit.losses({name: pair.fit for name, pair in unseen.items()})
        check = self.check.losses({name: pair.check for name, pair in unseen.items()})
        return torch.cat([fit, check])

    def _unseen(self, plans: Sequence[Mapping[str, frozenset[str]]]) -> list[dict[str, Unseen]]:
        """Outputs of every component for every plan; each distinct cut of a component is run once."""
        made: list[dict[str, Unseen]] = [{} for _ in plans]
        for name in self.fit.feeds:
            cuts = list(dict.fromkeys(plan.get(name, frozenset()) for plan in plans))
            if self._baseline is not None:
                cuts = [cut for cut in cuts if cut]
            fitted = dict(zip(cuts, self._fitted(name, cuts), strict=True))
            if self._baseline is not None:
                fitted[frozenset()] = self._baseline[name]
            for outputs, plan in zip(made, plans, strict=True):
                outputs[name] = fitted[plan.get(name, frozenset())]
        return made

    def _fitted(self, name: str, cuts: Sequence[frozenset[str]]) -> list[Unseen]:
        """The component's outputs under every cut, its head fitted on `fit`."""
        fitting, checking = self._features(name, self.fit, cuts), self._features(name, self.check, cuts)
        if not self._fits_heads:
            return [Unseen(*pair) for pair in zip(fitting, checking, strict=True)]
        prior = prior_weight(self.program, name)
        outputs = []
        for features, seen in zip(fitting, checking, strict=True):
            fit = fit_head(name, features, self.fit, self.reference_fit, prior=prior, seed=self.seed)
            outputs.append(Unseen(features, seen) if fit is None else Unseen(fit.held_out, fit.outputs(seen)))
        return outputs

    def _features(self, name: str, workload: Workload, cuts: Sequence[frozenset[str]]) -> list[Tensor]:
        if not cuts:
            return []
        replay, feeds = self._replays[name], workload.feeds[name]
        prefixes = self._prefixes[name, workload is self.check]
        what = f"measuring {len(cuts)} cuts of {name}" if len(cuts) > 1 else f"measuring a cut of {name}"
        tracked = enumerate(self.progress.track(feeds, what, total=len(feeds)))
        parts = [replay.variants(feed, cuts, prefixes[batch]) for batch, feed in tracked]
        return [torch.cat([part[i] for part in parts]) for i in range(len(cuts))]


def _hidden_groups(groups: Sequence[str], share: float, *, seed: int) -> frozenset[str]:
    """A seeded share of the groups; none where there are too few of them."""
    distinct = sorted(set(groups))
    if share <= 0 or len(distinct) < MIN_GROUPS_TO_KEEP_OUT:
        return frozenset()
    return frozenset(random.Random(seed).sample(distinct, round(share * len(distinct))))


def _replay(program: Program, name: str, fits_heads: bool) -> Replay:
    component = program.components[name]
    target = head_features(component, program.heads.get(name) if fits_heads else None)
    return Replay(component, find_branches(component.graph), target, precision=measuring_precision(component))
