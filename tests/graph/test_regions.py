"""Edits of regions do what the same edit of the module does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.graph.blocks import WIDTH, Attention, Parallel, PostNorm, PreNorm, Stack, in_heads, sample, seeded
from vlmopt.core.program import Component
from vlmopt.graph.branches import Branch, find_branches
from vlmopt.graph.canonical import drop_dead_nodes
from vlmopt.graph.costing import component_cost, nodes_cost
from vlmopt.graph.example import DIMS, component_of
from vlmopt.graph.modules import clone_graph
from vlmopt.graph.regions import clone_region, is_read_behind, skip_branch, splice


class Nothing(nn.Module):
    def forward(self, x: Tensor, *_: Tensor) -> Tensor:
        return torch.zeros_like(x)


def by_name(graph: torch.fx.GraphModule, name: str) -> Branch:
    return next(branch for branch in find_branches(graph) if branch.name == name)


def skipped(component: Component, *names: str) -> torch.fx.GraphModule:
    graph = clone_graph(component.graph)
    for name in names:
        skip_branch(graph, by_name(graph, name))
        drop_dead_nodes(graph)
    graph.graph.lint()
    return graph


@pytest.mark.parametrize("block", [PreNorm, Parallel], ids=["pre-norm", "parallel"])
@pytest.mark.parametrize("parts", [("attn",), ("mlp",), ("attn", "mlp"), ("mlp", "attn")], ids="-".join)
def test_a_skip_equals_the_module_without_the_branch(block: type[nn.Module], parts: tuple[str, ...]) -> None:
    module = seeded(Stack(block(), block()))
    graph = skipped(component_of(module, sample()), *(f"layers.1.{part}" for part in parts))
    for part in parts:
        setattr(module.layers[1], part, Nothing())  # type: ignore[index, union-attr]
    x = sample(batch=3, seed=1)
    with torch.no_grad():
        assert torch.equal(graph(x)[0], module(x))
    gone = {f"layers.1.{part}." for part in parts}
    assert not [name for name, _ in graph.named_parameters() if any(map(name.startswith, gone))]


def test_skipping_a_post_norm_branch_takes_the_norm_along() -> None:
    class WithoutAttention(PostNorm):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm2(x + self.mlp(x))

    module = seeded(Stack(PostNorm(), PostNorm()))
    graph = skipped(component_of(module, sample()), "layers.0.attn")
    by_hand = copy.deepcopy(module)
    by_hand.layers[0].__class__ = WithoutAttention  # type: ignore[index, union-attr]
    with torch.no_grad():
        assert torch.equal(graph(sample(seed=2))[0], by_hand(sample(seed=2)))
    assert "layers.0.norm1.weight" not in dict(graph.named_parameters())


@pytest.mark.parametrize("block", [PreNorm, PostNorm, Parallel])
def test_what_a_region_costs_is_what_a_skip_saves(block: type[nn.Module]) -> None:
    component = component_of(seeded(Stack(block(), block())), sample())
    before = component_cost(component, DIMS)
    for branch in find_branches(component.graph):
        smaller = Component("model", skipped(component, branch.name), component.inputs, component.outputs)
        assert before - component_cost(smaller, DIMS) == nodes_cost(component, branch.region, DIMS), branch.name


def test_both_parallel_branches_together_save_what_their_regions_and_the_shared_norm_cost() -> None:
    component = component_of(seeded(Stack(Parallel())), sample())
    names = [branch.name for branch in find_branches(component.graph)]
    smaller = Component("model", skipped(component, *names), component.inputs, component.outputs)
    nodes = [node for branch in find_branches(component.graph) for node in branch.region]
    nodes += [node for node in component.graph.graph.nodes if node.target == "layers.0.norm1"]
    saved = component_cost(component, DIMS) - component_cost(smaller, DIMS)
    assert saved == nodes_cost(component, nodes, DIMS)


def test_a_skip_leaves_the_original_graph_alone() -> None:
    module = seeded(Stack(PreNorm()))
    component = component_of(module, sample())
    skipped(component, "layers.0.attn", "layers.0.mlp")
    with torch.no_grad():
        assert torch.equal(component.graph(sample())[0], module(sample()))


def test_a_cloned_block_runs_twice() -> None:
    class Twice(Stack):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.layers[0](self.layers[0](self.embed(x))))

    module = seeded(Stack(PreNorm()))
    component = component_of(module, sample())
    graph = clone_graph(component.graph)
    first, last = find_branches(graph)
    region = [node for node in graph.graph.nodes if node in {*first.region, *last.region}]
    readers = list(last.exit.users)
    copies = clone_region(graph, region, {first.stream: last.exit}, before=readers[0])
    splice(last.exit, copies[last.exit], readers=readers)
    graph.graph.lint()
    graph.recompile()
    module.__class__ = Twice
    x = sample(seed=3)
    with torch.no_grad():
        assert torch.equal(graph(x)[0], module(x))
    assert len(list(graph.parameters())) == len(list(component.graph.parameters()))
    assert len(find_branches(graph)) == 4


def test_splicing_a_value_into_all_readers_spares_the_value_itself() -> None:
    component = component_of(seeded(Stack(PreNorm())), sample())
    graph = clone_graph(component.graph)
    branch = by_name(graph, "layers.0.mlp")
    with graph.graph.inserting_after(branch.exit):
        doubled = graph.graph.call_function(torch.ops.aten.mul.Tensor, (branch.exit, 2.0))
    splice(branch.exit, doubled)
    graph.recompile()
    assert doubled.args == (branch.exit, 2.0)
    assert list(branch.exit.users) == [doubled]


class Weights(nn.Module):
    """Attention that also returns its weights (or keys), or the normed stream that parallel branches share."""

    def __init__(self, returned: str) -> None:
        super().__init__()
        self.returned, self.norm, self.attn = returned, nn.LayerNorm(WIDTH), Attention()

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        n = self.norm(x)
        key = in_heads(self.attn.k_proj(n))
        q, v = in_heads(self.attn.q_proj(n)), in_heads(self.attn.v_proj(n))
        bias = mask * -10.0
        weights = torch.softmax(q @ key.transpose(2, 3) + bias[:, None, None, :], -1)
        y = x + self.attn.out_proj((weights @ v).transpose(1, 2).flatten(2))
        values = {"weights": weights, "mean": weights.mean(1), "key": key, "bias": bias, "stream": x * 2}
        return (y, values[self.returned]) if self.returned in values else (y,)


@pytest.mark.parametrize(
    ("returned", "is_read"),
    [("nothing", False), ("bias", False), ("stream", False), ("weights", True), ("mean", True), ("key", True)],
)
def test_only_values_computed_inside_count_as_read_behind(returned: str, is_read: bool) -> None:
    component = component_of(seeded(Weights(returned)), sample(), torch.zeros(2, 5))
    (branch,) = find_branches(component.graph)
    assert is_read_behind(component, branch) is is_read


@pytest.mark.parametrize("block", [PreNorm, PostNorm, Parallel])
def test_ordinary_branches_are_not_read_behind(block: type[nn.Module]) -> None:
    component = component_of(seeded(Stack(block(), block())), sample())
    assert [is_read_behind(component, b) for b in find_branches(component.graph)] == [False] * 4
