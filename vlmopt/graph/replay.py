"""Runs a component again and again with other branches skipped, computing only what lies behind the first skip.

Why: leave-one-out over n branches would run the whole graph n times. From the cached values of the full run only the
nodes that a skip changes are computed, on average half of them, and one batch is held at a time.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from vlmopt.core.program import Component
from vlmopt.core.workload import Feed
from vlmopt.graph.branches import Branch
from vlmopt.graph.modules import get_at

Skips = frozenset[str]  # names of branches
Sums = Mapping[fx.Node, tuple[fx.Node, ...]]  # exits that a skip changes -> the terms that are left of their sum


class Prefix(Protocol):
    """Values of a batch's run without skips, from which runs under skips that lie behind them start."""

    @property
    def values(self) -> Mapping[fx.Node, object]: ...

    def keep(self, values: Mapping[fx.Node, object]) -> None:
        """Takes what it wants of the values of a run without skips."""
        ...


class Replay:
    """One component with its branches, ready to be run on batches under any set of skips.

    `target` is the node whose value is wanted (the features that a head reads, or the output). With `precision`
    bfloat16 the products of a float32 component are computed in it (autocast), and what is returned is float32.
    """

    def __init__(
        self, component: Component, branches: Sequence[Branch], target: fx.Node, *, precision: torch.dtype | None = None
    ) -> None:
        self.component, self.target = component, target
        self._is_half = precision is torch.bfloat16
        self.branches = {branch.name: branch for branch in branches}
        self._nodes = list(component.graph.graph.nodes)
        self._order = {node: i for i, node in enumerate(self._nodes)}
        self._kept = self._boundary()

    def _boundary(self) -> set[fx.Node]:
        """Values of the full run that some skip needs: those alive at the exit of a branch."""
        exits = sorted({self._order[branch.exit] for branch in self.branches.values()})
        kept: set[fx.Node] = set()
        for i, node in enumerate(self._nodes):
            last = max((self._order[user] for user in node.users), default=i)
            if any(i <= exit_index < last for exit_index in exits):
                kept.add(node)
        for branch in self.branches.values():
            kept.update(branch.terms)
        return kept

    def boundaries(self) -> list[frozenset[fx.Node]]:
        """For every place at which branches end, in order: the values from which a run can go on behind it."""
        exits = sorted({self._order[branch.exit] for branch in self.branches.values()})
        last = {n: max((self._order[user] for user in n.users), default=i) for n, i in self._order.items()}
        return [frozenset(n for n in self._kept if self._order[n] <= place < last[n]) for place in exits]

    def variants(self, feed: Feed, subsets: Iterable[Skips], prefix: Prefix | None = None) -> list[Tensor]:
        """The target's value on the CPU for every subset of skipped branches, in order, on one batch.

        Args:
            prefix: keeps values of the run without skips on this very batch, for calls to come.
        """
        wanted = list(subsets)
        shared = self._sums(frozenset.intersection(*wanted)) if wanted else {}
        with torch.no_grad(), self._products():
            base, cache = self._base(feed, shared, {} if prefix is None else prefix.values)
            if prefix is not None and not shared:
                prefix.keep(cache)
            sums = [self._sums(skips) for skips in wanted]
            found = (base if own == shared else self._variant(feed, cache, shared, own) for own in sums)
            return [self._returned(value) for value in found]

    def computed(self, subsets: Iterable[Skips]) -> list[fx.Node]:
        """The nodes that `variants` computes for these subsets, each as often as it does: what a batch costs."""
        wanted = list(subsets)
        shared = self._sums(frozenset.intersection(*wanted)) if wanted else {}
        base = self._needed(shared, set())
        nodes, cached = list(base), self._kept.intersection(base)
        for sums in map(self._sums, wanted):
            if sums != shared:
                nodes += self._needed(sums, cached - self._changed(shared, sums))
        return nodes

    def run(self, feed: Feed, skips: Skips) -> Tensor:
        """The target's value under one set of skips, without caching anything."""
        sums = self._sums(skips)
        with torch.no_grad(), self._products():
            return self._returned(self._run(self._needed(sums, set()), feed, sums, {}, keep=None))

    def run_keeping(self, feed: Feed, nodes: Collection[fx.Node]) -> tuple[Tensor, dict[fx.Node, object]]:
        """The target's value without skips, and those of the nodes."""
        values: dict[fx.Node, object] = {}
        with torch.no_grad(), self._products():
            found = self._run(self._needed({}, set()), feed, {}, {}, keep=values, kept=nodes)
            return self._returned(found), values

    def run_from(self, feed: Feed, known: Mapping[fx.Node, object]) -> Tensor:
        """The target's value without skips, computed from those known."""
        with torch.no_grad(), self._products():
            return self._returned(self._run(self._needed({}, set(known)), feed, {}, dict(known), keep=None))

    def run_changed(self, feed: Feed, known: Mapping[fx.Node, object], changed: Mapping[fx.Node, Tensor]) -> Tensor:
        """The target's value with some values in the place of what is computed, from those known of the run without.

        Args:
            known: of `run_keeping` with `resumable` nodes among them; values behind a change are not used.
        """
        behind: set[fx.Node] = set()
        for node in self._nodes:
            if node in changed or any(operand in behind for operand in node.all_input_nodes):
                behind.add(node)
        values = {node: value for node, value in known.items() if node not in behind} | dict(changed)
        with torch.no_grad(), self._products():
            return self._returned(self._run(self._needed({}, set(values)), feed, {}, values, keep=None))

    @property
    def resumable(self) -> frozenset[fx.Node]:
        """Nodes from whose values a run can go on behind any branch."""
        return frozenset(self._kept)

    def needed(self, known: Collection[fx.Node] = ()) -> list[fx.Node]:
        """The nodes that are computed for the target where these are known, in order."""
        return self._needed({}, set(known))

    def _products(self) -> torch.autocast:
        return torch.autocast(device_of(self.component.graph).type, torch.bfloat16, enabled=self._is_half)

    def _returned(self, value: Tensor) -> Tensor:
        return value.float().cpu() if self._is_half and value.is_floating_point() else value.cpu()

    def _base(self, feed: Feed, sums: Sums, known: Mapping[fx.Node, object]) -> tuple[Tensor, dict[fx.Node, object]]:
        """The run that all variants share, and the values of it that they may start from."""
        changed = self._changed({}, sums) if known and sums else set()
        cache = {node: value for node, value in known.items() if node not in changed}
        value = self._run(self._needed(sums, set(cache)), feed, sums, dict(cache), keep=cache)
        return value, cache

    def _variant(self, feed: Feed, cache: dict[fx.Node, object], shared: Sums, sums: Sums) -> Tensor:
        changed = self._changed(shared, sums)
        available = {node for node in cache if node not in changed}
        needed = self._needed(sums, available)
        return self._run(needed, feed, sums, {node: cache[node] for node in available}, keep=None)

    def _sums(self, skips: Skips) -> Sums:
        """For every exit that a skip changes, the terms that are left of its sum."""
        dropped: dict[fx.Node, set[fx.Node]] = {}
        terms: dict[fx.Node, tuple[fx.Node, ...]] = {}
        for name in skips:
            branch = self.branches[name]
            dropped.setdefault(branch.exit, set()).add(branch.term)
            terms[branch.exit] = branch.terms
        return {node: tuple(t for t in terms[node] if t not in gone) for node, gone in dropped.items()}

    def _changed(self, shared: Sums, sums: Sums) -> set[fx.Node]:
        """Nodes whose value differs from the shared run's."""
        different = {node for node in sums if sums[node] != shared.get(node)}
        changed: set[fx.Node] = set()
        for node in self._nodes[min(self._order[node] for node in different) :]:
            if node in different or any(operand in changed for operand in sums.get(node, node.all_input_nodes)):
                changed.add(node)
        return changed

    def _needed(self, sums: Sums, available: set[fx.Node]) -> list[fx.Node]:
        """Nodes to compute for the target, in order."""
        needed: set[fx.Node] = set()
        pending = [self.target]
        while pending:
            node = pending.pop()
            if node in needed or node in available:
                continue
            needed.add(node)
            pending.extend(sums.get(node, node.all_input_nodes))
        return sorted(needed, key=self._order.__getitem__)

    def _run(
        self,
        needed: list[fx.Node],
        feed: Feed,
        sums: Sums,
        values: dict[fx.Node, object],
        *,
        keep: dict[fx.Node, object] | None,
        kept: Collection[fx.Node] | None = None,
    ) -> Tensor:
        if self.target in values:
            found = values[self.target]
            assert isinstance(found, Tensor)
            return found
        last = self._last_readers(needed, sums)
        wanted = self._kept if kept is None else kept
        for node in needed:
            if node in sums:
                terms = [values[term] for term in sums[node]]
                values[node] = functools.reduce(operator.add, terms)
            else:
                values[node] = run_node(self.component.graph, node, values, feed)
            if keep is not None and node in wanted:
                keep[node] = values[node]
            for spent in last.get(node, ()):
                values.pop(spent, None)
        result = values[self.target]
        assert isinstance(result, Tensor)
        return result

    def _last_readers(self, needed: list[fx.Node], sums: Sums) -> dict[fx.Node, list[fx.Node]]:
        """For every node the values that nothing reads after it: freed at once, so one layer's worth is held."""
        last: dict[fx.Node, fx.Node] = {}
        for node in needed:
            for operand in sums.get(node, node.all_input_nodes):
                last[operand] = node
        spent: dict[fx.Node, list[fx.Node]] = {}
        for operand, node in last.items():
            if operand is not self.target:
                spent.setdefault(node, []).append(operand)
        return spent


def run_node(module: fx.GraphModule, node: fx.Node, values: Mapping[fx.Node, object], feed: Feed) -> object:
    """The value of one node from the values of its operands."""
    if node.op == "placeholder":
        return feed[str(node.target)].to(device_of(module))
    if node.op == "get_attr":
        return get_at(module, str(node.target))
    args: Any = fx.node.map_arg(node.args, lambda n: values[n])  # type: ignore[arg-type, return-value]
    kwargs: Any = fx.node.map_arg(node.kwargs, lambda n: values[n])  # type: ignore[arg-type, return-value]
    target: Any = get_at(module, str(node.target)) if node.op == "call_module" else node.target
    return target(*args, **kwargs)


def run_component(component: Component, feeds: Iterable[Feed], target: fx.Node | None = None) -> Tensor:
    """The first output (or the value of `target`) over all batches, concatenated on the CPU, [n, ...]."""
    if target is None:
        with torch.no_grad():
            return torch.cat([component.graph(*inputs_of(component, feed))[0].cpu() for feed in feeds])
    replay = Replay(component, [], target)
    return torch.cat([replay.variants(feed, [frozenset()])[0] for feed in feeds])


def run_outputs(component: Component, feed: Feed) -> tuple[Tensor, ...]:
    """All outputs on one batch, on the CPU."""
    with torch.no_grad():
        return tuple(value.cpu() for value in component.graph(*inputs_of(component, feed)))


def inputs_of(component: Component, feed: Feed) -> list[Tensor]:
    """The component's inputs in order, where its weights lie: feeds are made on the CPU."""
    device = device_of(component.graph)
    return [feed[spec.name].to(device) for spec in component.inputs]


def device_of(module: torch.nn.Module) -> torch.device:
    """Where the weights lie; the CPU where there are none."""
    weights = itertools.chain(module.parameters(), module.buffers())
    return next((weight.device for weight in weights), torch.device("cpu"))
