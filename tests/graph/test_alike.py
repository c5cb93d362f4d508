"""Two versions of a component that begin alike."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import fx, nn

from vlmopt.core.program import Component
from vlmopt.graph import replay
from vlmopt.graph.alike import run_both, same_values
from vlmopt.graph.branches import find_branches
from vlmopt.graph.canonical import drop_dead_nodes
from vlmopt.graph.example import ResidualBlocks, component_of
from vlmopt.graph.modules import clone_graph, output_values, set_at
from vlmopt.graph.regions import skip_branch

FEEDS = [{"x": torch.randn(n, 8, generator=torch.Generator().manual_seed(n))} for n in (3, 5)]


@pytest.fixture
def component() -> Component:
    return component_of(ResidualBlocks(), torch.ones(2, 8))


def with_other(component: Component, path: str) -> Component:
    graph = clone_graph(component.graph)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        set_at(graph, path, nn.Linear(*reversed(graph.get_parameter(f"{path}.weight").shape)))
    return replace(component, graph=graph)


def without_first_branch(component: Component) -> Component:
    graph = clone_graph(component.graph)
    skip_branch(graph, find_branches(graph)[0])
    drop_dead_nodes(graph)
    return replace(component, graph=graph)


def outputs(component: Component) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([component.graph(feed["x"])[0] for feed in FEEDS])


@pytest.mark.parametrize("path", ["layers.0.down", "layers.1.down", "head"])
def test_both_are_what_either_computes_alone(component: Component, path: str) -> None:
    for other in (with_other(component, path), without_first_branch(component), component):
        for pair in ((component, other), (other, component)):
            targets = tuple(output_values(one.graph)[0] for one in pair)
            found = run_both(*pair, FEEDS, (targets[0], targets[1]))
            for value, one in zip(found, pair, strict=True):
                assert torch.equal(value, outputs(one))


def test_what_they_have_in_common_runs_once(component: Component, monkeypatch: pytest.MonkeyPatch) -> None:
    other = with_other(component, "layers.1.down")
    ran: list[str] = []

    def counted(module: fx.GraphModule, node: fx.Node, *rest: object) -> object:
        ran.append(str(node.target))
        return run_node(module, node, *rest)  # type: ignore[arg-type]

    run_node = replay.run_node
    monkeypatch.setattr(replay, "run_node", counted)
    run_both(component, other, FEEDS[:1], (output_values(component.graph)[0], output_values(other.graph)[0]))
    calls = [ran.count(path) for path in ("layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down", "head")]
    assert calls == [1, 1, 1, 2, 2]


def test_another_argument_is_another_value(component: Component) -> None:
    other = replace(component, graph=clone_graph(component.graph))
    assert len(same_values(component.graph, other.graph)) == len(list(other.graph.graph.nodes)) - 1
    norm = next(node for node in other.graph.graph.nodes if node.target == "layers.0.up")
    with other.graph.graph.inserting_before(norm):
        norm.args = (other.graph.graph.call_function(torch.ops.aten.neg.default, (norm.args[0],)),)
    same = same_values(component.graph, other.graph)
    assert norm not in same
    assert next(node for node in other.graph.graph.nodes if node.op == "placeholder") in same
