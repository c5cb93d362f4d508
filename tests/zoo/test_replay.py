"""Replaying a component with branches skipped gives what the really skipped graph gives, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from tests.zoo.conftest import Captured, captured_toy
from vlmopt.core.program import Component
from vlmopt.core.workload import Feed
from vlmopt.graph import replay as replaying
from vlmopt.graph.branches import find_branches
from vlmopt.graph.canonical import drop_dead_nodes
from vlmopt.graph.modules import clone_graph, output_values
from vlmopt.graph.regions import skip_branch
from vlmopt.graph.replay import Replay, Skips, run_component


def subsets(names: list[str]) -> list[Skips]:
    singles = [frozenset({name}) for name in names]
    several = [names[:2], names[-2:], [names[0], names[-1]], names[::2], names[1:], names]
    return [frozenset(), *singles, *map(frozenset, several)]


def really_skipped(component: Component, skips: Skips) -> Component:
    graph = clone_graph(component.graph)
    for branch in find_branches(graph):
        if branch.name in skips:
            (current,) = (b for b in find_branches(graph) if b.name == branch.name)
            skip_branch(graph, current)
            drop_dead_nodes(graph)
    graph.recompile()
    return replace(component, graph=graph)


def test_every_variant_equals_the_skipped_graph_and_a_run_of_its_own(captured: Captured) -> None:
    for component in captured.program.components.values():
        feed = captured.feed(component, batch=3, text=7)
        branches = find_branches(component.graph)
        replay = Replay(component, branches, output_values(component.graph)[0])
        wanted = subsets([branch.name for branch in branches])
        made = replay.variants(feed, wanted)
        for skips, value in zip(wanted, made, strict=True):
            assert torch.equal(value, run_component(really_skipped(component, skips), [feed])), sorted(skips)
            assert torch.equal(value, replay.run(feed, skips)), sorted(skips)
        assert len({float(value.double().sum()) for value in made}) > len(branches)


def test_variants_that_all_skip_the_same_branches_start_from_a_run_without_them(captured: Captured) -> None:
    for component in captured.program.components.values():
        feed = captured.feed(component, batch=2, text=6)
        branches = find_branches(component.graph)
        replay = Replay(component, branches, output_values(component.graph)[0])
        first, second, *rest = [branch.name for branch in branches]
        shared = frozenset({first, rest[-1]})
        wanted = [shared, *(shared | {name} for name in (second, *rest[:2])), frozenset(replay.branches)]
        for skips, value in zip(wanted, replay.variants(feed, wanted), strict=True):
            assert torch.equal(value, replay.run(feed, skips)), sorted(skips)


def test_variants_come_in_the_order_asked_for_and_can_repeat() -> None:
    captured = captured_toy("clip")
    component = captured.program.components["image_encoder"]
    feed = captured.feed(component, batch=2, text=7)
    branches = find_branches(component.graph)
    replay = Replay(component, branches, output_values(component.graph)[0])
    last, first = frozenset({branches[-1].name}), frozenset({branches[0].name})
    made = replay.variants(feed, [last, frozenset(), first, last])
    assert torch.equal(made[0], made[3])
    assert torch.equal(made[1], run_component(component, [feed]))
    assert torch.equal(made[2], replay.run(feed, first))


def test_a_target_inside_the_graph_is_not_changed_by_skips_behind_it() -> None:
    captured = captured_toy("clip")
    component = captured.program.components["image_encoder"]
    branches = find_branches(component.graph)
    feed = captured.feed(component, batch=2, text=7)
    replay = Replay(component, branches, branches[2].exit)
    full, behind, before = replay.variants(
        feed, [frozenset(), frozenset({branches[4].name}), frozenset({branches[0].name})]
    )
    assert torch.equal(full, behind)
    assert not torch.equal(full, before)
    assert torch.equal(full, run_component(component, [feed], branches[2].exit))


def test_batches_are_joined_in_order() -> None:
    captured = captured_toy("clip")
    component = captured.program.components["text_encoder"]
    feeds = [captured.feed(component, batch=n, text=7, seed=n) for n in (2, 1)]
    joined = run_component(component, feeds)
    assert joined.shape == (3, 16)
    assert torch.equal(joined[2:], run_component(component, feeds[1:]))
    assert torch.equal(joined, run_component(component, feeds, output_values(component.graph)[0]))


class Counting(Replay):
    """Notes how many values are held while a node is computed."""

    peak = 0

    def _run(self, needed, feed, sums, values, *, keep):  # type: ignore[no-untyped-def]
        return super()._run(needed, feed, sums, Watched(values, self), keep=keep)


class Watched(dict[fx.Node, object]):
    def __init__(self, values: dict[fx.Node, object], owner: Counting) -> None:
        super().__init__(values)
        self.owner = owner

    def __setitem__(self, node: fx.Node, value: object) -> None:
        super().__setitem__(node, value)
        self.owner.peak = max(self.owner.peak, sum(isinstance(v, torch.Tensor) for v in self.values()))


def test_values_are_freed_as_soon_as_nothing_reads_them_any_more() -> None:
    captured = captured_toy("clip")
    component = captured.program.components["image_encoder"]
    feed: Feed = captured.feed(component, batch=2, text=7)
    branches = find_branches(component.graph)
    counting = Counting(component, branches, output_values(component.graph)[0])
    counting.run(feed, frozenset({branches[-1].name}))
    assert counting.peak <= 8
    assert len(component.graph.graph.nodes) > 80


def test_a_variant_computes_only_what_lies_behind_its_first_skip(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    captured = captured_toy("clip")
    component = captured.program.components["image_encoder"]
    branches = find_branches(component.graph)
    feed = captured.feed(component, batch=2, text=7)
    replay = Replay(component, branches, output_values(component.graph)[0])
    computed: list[fx.Node] = []
    original = replaying.run_node

    def noting(module, node, values, feed):  # type: ignore[no-untyped-def]
        computed.append(node)
        return original(module, node, values, feed)

    monkeypatch.setattr(replaying, "run_node", noting)
    replay.variants(feed, [frozenset()])
    n_full = len(computed)
    computed.clear()
    replay.variants(feed, [frozenset({branches[-1].name})])
    assert len(computed) - n_full <= 12  # the pooling, the last norm, the projection
    assert not set(computed[n_full:]) & set(branches[0].region)
