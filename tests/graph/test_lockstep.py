"""A graph on several batches, node by node."""

from __future__ import annotations

import torch

from vlmopt.graph.example import ResidualBlocks, component_of
from vlmopt.graph.lockstep import Lockstep
from vlmopt.graph.modules import get_at, output_values

FEEDS = [{"x": torch.randn(n, 8, generator=torch.Generator().manual_seed(n))} for n in (3, 5)]


def test_values_are_those_of_a_run_of_the_graph() -> None:
    graph = component_of(ResidualBlocks(), torch.ones(2, 8)).graph
    (output,) = output_values(graph)
    found = Lockstep(graph, FEEDS, [output]).values(output)
    assert all(torch.equal(value, graph(feed["x"])[0]) for value, feed in zip(found, FEEDS, strict=True))


def test_a_weight_that_changes_on_the_way_counts_from_there_on() -> None:
    graph = component_of(ResidualBlocks(), torch.ones(2, 8)).graph
    first = next(node for node in graph.graph.nodes if node.target == "layers.0.down")
    (output,) = output_values(graph)
    runner = Lockstep(graph, FEEDS, [first, output])
    before = [value.clone() for value in runner.values(first)]
    with torch.no_grad():
        for path in ("layers.0.down.weight", "layers.1.down.weight"):
            graph.get_parameter(path).zero_()
    after = runner.values(output)
    assert all(bool(value.any()) for value in before)
    with torch.no_grad():
        for feed, value, own in zip(FEEDS, before, after, strict=True):
            # layer 0 was computed before the change, layer 1 behind it
            stream = feed["x"] + value + get_at(graph, "layers.1.down").bias  # type: ignore[operator]
            wanted = get_at(graph, "head")(get_at(graph, "norm")(stream))  # type: ignore[operator]
            assert torch.allclose(own, wanted, atol=1e-6)


def test_what_nobody_reads_any_more_is_let_go() -> None:
    graph = component_of(ResidualBlocks(), torch.ones(2, 8)).graph
    nodes = list(graph.graph.nodes)
    (output,) = output_values(graph)
    runner = Lockstep(graph, FEEDS, [nodes[0], output])
    runner.values(output)
    assert [set(values) for values in runner._values] == [{nodes[0], output}] * 2
    runner.release(nodes[0])
    assert [set(values) for values in runner._values] == [{output}] * 2
