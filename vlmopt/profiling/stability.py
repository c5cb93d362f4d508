"""How far a leave-one-out ranking can be trusted, from features that were measured already: no forward pass more.

Three disturbances: other items (bootstrap over groups of items), wrong labels, and a tenth of the items. The first
keeps every loss and draws items anew; the others fit the heads anew, as a profile of that data would.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vlmopt.core.errors import ProfileError
from vlmopt.core.workload import LabelledWorkload, Outputs, Workload
from vlmopt.profiling.document import Profile, spearman
from vlmopt.profiling.estimator import Stability, Unit
from vlmopt.profiling.part import WorkloadPart, group_part

N_RESAMPLES = 400
WRONG_SHARES = (0.05, 0.2)
FEW_ITEMS = 0.1
_ENDS = (0.05, 0.95)

# The mean score of every branch on a workload (the whole, one with wrong labels, or a part of it).
BranchScores = Callable[[Workload, Sequence[Unit]], list[float]]


def measure_stability(
    units: Sequence[Unit],
    differences: Tensor,
    workload: Workload,
    reference: Outputs,
    branch_scores: BranchScores,
    *,
    seed: int,
) -> Stability:
    """The stability of a leave-one-out profile.

    Args:
        differences: loss without each unit minus loss of the whole, [n_units, n_items].
        branch_scores: measures again on a disturbed workload.
    """
    branches = [i for i, unit in enumerate(units) if not unit.is_layer]
    layers = [i for i, unit in enumerate(units) if unit.is_layer]
    ranks: dict[str, tuple[float, float]] = {}
    for members in (branches, layers):  # a branch is compared with branches, a layer with layers
        if members:
            found = bootstrap_ranks(differences[members], workload.item_groups, seed=seed)
            ranks |= {units[i].site: pair for i, pair in zip(members, found, strict=True)}
    chosen = [units[i] for i in branches]
    own = differences[branches].mean(dim=1).tolist()
    agreement = {
        what: spearman(own, branch_scores(disturbed, chosen))
        for what, disturbed in _disturbed(workload, reference, seed=seed).items()
    }
    return Stability(N_RESAMPLES, ranks, agreement)


def bootstrap_ranks(
    differences: Tensor, groups: Sequence[str], *, n_resamples: int = N_RESAMPLES, seed: int = 0
) -> list[tuple[float, float]]:
    """For every row of differences [n_units, n_items] the 5 % and 95 % quantile of its rank (0: the least) over
    resamples of the groups of items."""
    names = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    index = torch.tensor([names[group] for group in groups])
    totals = torch.zeros(len(names), len(differences), dtype=torch.float64)
    totals.index_add_(0, index, differences.double().T)
    sizes = torch.bincount(index, minlength=len(names)).double()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(names), (n_resamples, len(names)), generator=generator)
    counts = torch.zeros(n_resamples, len(names), dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    means = (counts @ totals) / (counts @ sizes)[:, None]
    ranks = means.argsort(dim=1).argsort(dim=1).double()
    low, high = torch.quantile(ranks, torch.tensor(_ENDS, dtype=torch.float64), dim=0)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def _disturbed(workload: Workload, reference: Outputs, *, seed: int) -> dict[str, Workload]:
    made: dict[str, Workload] = {}
    if isinstance(workload, LabelledWorkload):
        for share in WRONG_SHARES:
            made[f"{share:.0%} of the labels wrong"] = workload.with_wrong_labels(share, seed=seed)
    few = few_items(workload, reference, FEW_ITEMS, seed=seed)
    if few is not None:
        made[f"{FEW_ITEMS:.0%} of the items"] = few
    return made


def few_items(workload: Workload, reference: Outputs, share: float, *, seed: int) -> WorkloadPart | None:
    """A share of the groups of items, drawn by the seed; None where that leaves fewer than two groups."""
    names = list(dict.fromkeys(workload.item_groups))
    count = round(share * len(names))
    if count < 2:
        return None
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    return group_part(workload, reference, frozenset(names[i] for i in order))


def cut_certainty(profile: Profile, cut_names: Sequence[str]) -> dict[str, str]:
    """For every cut branch or layer (`component/name`) whether the profile is sure that it belongs to the cut.

    "certain": in nine of ten resamples of the items its rank stays within as many of its kind as were cut; else
    "uncertain".

    Raises:
        ProfileError: the profile has no stability, or does not know a name.
    """
    if profile.stability is None:
        raise ProfileError("profile", "has no stability", remedy="measure it with `vlmopt profile --stability`")
    scopes = {f"{score.component}/{score.name}": score.scope for score in profile.scores}
    ranks = profile.stability.ranks
    for name in cut_names:
        if name not in ranks or name not in scopes:
            raise ProfileError("profile", f"has no rank of {name}", expected="a branch or layer of the profiled model")
    counts = {scope: sum(scopes[name] == scope for name in cut_names) for scope in scopes.values()}
    return {name: "certain" if ranks[name][1] <= counts[scopes[name]] - 1 else "uncertain" for name in cut_names}
