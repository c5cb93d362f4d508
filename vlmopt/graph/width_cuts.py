"""Cuts widths down to what task data say is needed most, the Linears behind them compensated for the rest."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmopt.core.contract import Context, Plan, Refusal, Site, StatRequest
from vlmopt.core.program import Component, Program
from vlmopt.graph.branches import Branch, BranchKind, find_branches
from vlmopt.graph.folding import linear_of
from vlmopt.graph.modules import get_at
from vlmopt.graph.narrowing import linear_like, narrowed, narrowing_saving
from vlmopt.graph.patterns import check_patterns, is_match
from vlmopt.graph.reconstruction import Choice, Problem, choose_units, taken_over
from vlmopt.graph.unit_axes import Mixed
from vlmopt.graph.widths import Group

_UNMEASURED = "what the Linear at its end reads is measured on the task when the recipe runs, and was not yet"

Finding = Callable[[Program, Component, Branch], Group | str]


@dataclass(frozen=True)
class Place:
    """A branch with the width that may be cut in it, or why none is; `key` is COMPONENT/BRANCH."""

    key: str
    component: Component
    branch: Branch
    found: Group | str


@dataclass(frozen=True)
class Wanted:
    """Which widths are cut, and down to what.

    Args:
        kinds: of branches.
        find: the width of one.
        patterns: names of branches; all where there are none.
        n_kept: how many of so many units stay, or why no fewer do.
        unit: what a unit is called.
    """

    kinds: Collection[BranchKind]
    find: Finding
    patterns: Sequence[str]
    n_kept: Callable[[int], int | str]
    unit: str

    def places(self, program: Program) -> Iterator[Place]:
        """All branches of these kinds; only those that the patterns mean are looked into."""
        for name, component in program.components.items():
            for branch in find_branches(component.graph):
                key = f"{name}/{branch.name}"
                if branch.kind in self.kinds:
                    is_meant = not self.patterns or is_match(key, self.patterns)
                    found = self.find(program, component, branch) if is_meant else "not named in `branches`"
                    yield Place(key, component, branch, found)


def statistics_wanted(program: Program, wanted: Wanted) -> Iterator[StatRequest]:
    """Rows of what the Linears behind every width read."""
    for place in wanted.places(program):
        if not isinstance(place.found, str):
            yield _request(place, place.found)


def plan_cuts(program: Program, wanted: Wanted, context: Context, *, place: str) -> Plan:
    """A site for every width, named COMPONENT/BRANCH@UNITS, or the reason why it is left alone.

    Raises:
        PassOptionError: a pattern means no branch.
    """
    sites: list[Site] = []
    refusals: list[Refusal] = []
    found = list(wanted.places(program))
    check_patterns(place, wanted.patterns, [one.key for one in found])
    for one in found:
        site = _site(program, one, wanted, context)
        if isinstance(site, str):
            refusals.append(Refusal(one.key, one.component.name, site))
        else:
            sites.append(site)
    return Plan(tuple(sites), tuple(refusals))


def _site(program: Program, place: Place, wanted: Wanted, context: Context) -> Site | str:
    """The cut of one width, or why there is none."""
    group = place.found
    if isinstance(group, str):
        return group
    n_kept = wanted.n_kept(group.n_units)
    if isinstance(n_kept, str):
        return n_kept
    if _rows(place, group, context) is None:
        return _UNMEASURED
    try:
        saving = narrowing_saving(place.component, group, n_kept, program.dims)
    except Mixed as reason:
        return str(reason)
    target = (place.branch.name, str(group.n_units), str(n_kept))
    summary = f"{n_kept} of {group.n_units} {wanted.unit} stay"
    return Site(f"{place.key}@{n_kept}", place.component.name, target, saving, summary)


def apply_cut(program: Program, site: Site, find: Finding, context: Context, *, compensates: bool) -> None:
    """Cuts what the site names, in place; nothing where it was cut to another width before, or is gone."""
    found = _place_of(program, site, find)
    if found is None:
        return
    place, group = found
    rows = _rows(place, group, context)
    if rows is not None:
        choice = _choice(place, group, rows, int(site.target[2]), compensates=compensates)
        program.components[site.component] = _cut(place.component, group, choice)


def cut_anyhow(program: Program, site: Site, find: Finding) -> None:
    """Keeps as many units as the site says, the first ones: for who needs the sizes alone."""
    found = _place_of(program, site, find)
    if found is not None:
        place, group = found
        program.components[site.component] = narrowed(place.component, group, range(int(site.target[2])))


def _place_of(program: Program, site: Site, find: Finding) -> tuple[Place, Group] | None:
    """What a site cuts; None where it was cut to another width before, or is gone."""
    name, n_units, _ = site.target
    component = program.components[site.component]
    branch = next((one for one in find_branches(component.graph) if one.name == name), None)
    group = "" if branch is None else find(program, component, branch)
    if branch is None or isinstance(group, str) or group.n_units != int(n_units):
        return None
    return Place(f"{component.name}/{name}", component, branch, group), group


def _request(place: Place, group: Group) -> StatRequest:
    return StatRequest(place.component.name, group.source.name, "rows")


def _rows(place: Place, group: Group, context: Context) -> Tensor | None:
    """Rows [n, D] of what the consumers read, where they were collected on a group of this width."""
    found = context.statistics.get(_request(place, group))
    if not isinstance(found, Tensor) or found.dim() != 2 or not len(found):
        return None
    return found if found.shape[1] == group.source.meta["val"].shape[-1] else None


def _choice(place: Place, group: Group, rows: Tensor, n_kept: int, *, compensates: bool) -> Choice:
    """Which units the task needs, by how well the consumers' output is reconstructed from them."""
    leaves = [linear_of(place.component.graph, node) for node in group.consumers]
    weight = torch.cat([leaf.weight.detach().cpu().double() for leaf in leaves])
    scale = _output_scale(place)
    if scale is not None and scale.shape == weight.shape[:1]:
        weight = weight * scale[:, None]
    is_centred = all(leaf.bias is not None for leaf in leaves)
    return choose_units(Problem(rows, weight, group.columns, is_centred), n_kept, compensates=compensates)


def _output_scale(place: Place) -> Tensor | None:
    """What numbers of the Linear's output are multiplied by before they are added (layer scale); None for nothing."""
    term = place.branch.term
    stored = [node for node in term.all_input_nodes if node.op == "get_attr"]
    if term.target is not torch.ops.aten.mul.Tensor or len(stored) != 1:
        return None
    found = get_at(place.component.graph, str(stored[0].target))
    return found.detach().cpu().double() if isinstance(found, Tensor) and found.dim() == 1 else None


def _cut(component: Component, group: Group, choice: Choice) -> Component:
    module, readers = component.graph, {}
    for node in group.consumers:
        leaf = linear_of(module, node)
        weight, bias = taken_over(group.columns, choice, leaf.weight, leaf.bias)
        parts = (weight.to(leaf.weight), None if bias is None else bias.to(leaf.weight))
        readers[str(node.target)] = linear_like(*parts, leaf)
    return narrowed(component, group, choice.kept, readers=readers)
