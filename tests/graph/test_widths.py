"""Which units hang together: our groups are those of Torch-Pruning where it finds any, and right where it finds
none; what mixes units is named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch_pruning
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tests.graph.blocks import Block, LayerScale, PostNorm, PreNorm, in_heads, sample, seeded
from vlmopt.core.program import Component, Program
from vlmopt.graph.branches import BranchKind, find_branches
from vlmopt.graph.example import GroupedHeads, program_of
from vlmopt.graph.folding import linear_of
from vlmopt.graph.modules import clone_graph, make_code
from vlmopt.graph.narrowing import narrowed, narrowing_saving
from vlmopt.graph.replay import run_outputs
from vlmopt.graph.widths import Group, find_head_groups, find_hidden

Cuts = dict[tuple[str, str], set[int]]


def found(program: Program) -> tuple[Component, list[Group | str]]:
    """For every branch its hidden channels, or its heads."""
    component = program.components["model"]
    branches = find_branches(component.graph)
    finding = {BranchKind.FFN: find_hidden}
    return component, [finding.get(one.kind, find_head_groups)(program, component, one) for one in branches]


def own_cuts(group: Group, units: list[int]) -> Cuts:
    """Rows and columns of Linears that go with these units."""
    gone = torch.tensor(units)
    rows = {(str(node.target), "rows"): group.layouts[node].units for node in group.producers}
    columns = {(str(node.target), "columns"): group.layouts[group.source].units for node in group.consumers}
    return {key: set(torch.isin(units, gone).nonzero().flatten().tolist()) for key, units in (rows | columns).items()}


def their_cuts(graph: fx.GraphModule, x: Tensor, root: str, rows: list[int]) -> Cuts:
    """The same by Torch-Pruning, from the rows of one Linear on."""
    make_code(graph)
    dependencies = torch_pruning.DependencyGraph().build_dependency(graph, example_inputs=x)
    names = {module: name for name, module in graph.named_modules()}
    leaf = graph.get_submodule(root)
    cuts: Cuts = {}
    for dependency, places in dependencies.get_pruning_group(leaf, torch_pruning.prune_linear_out_channels, idxs=rows):
        module = dependency.target.module
        if isinstance(module, nn.Linear):
            is_rows = dependency.handler == torch_pruning.prune_linear_out_channels
            cuts.setdefault((names[module], "rows" if is_rows else "columns"), set()).update(places)
    return cuts


@pytest.mark.parametrize("block", [PreNorm, PostNorm, LayerScale])
@pytest.mark.parametrize("is_ffn", [True, False])
def test_groups_are_those_of_torch_pruning(block: Callable[[], Block], *, is_ffn: bool) -> None:
    program = program_of(seeded(block()), sample())
    component, groups = found(program)
    group = groups[1 if is_ffn else 0]
    assert isinstance(group, Group)
    units = [1, 5] if is_ffn else [1]
    own = own_cuts(group, units)
    root = str(group.producers[0].target)
    theirs = their_cuts(clone_graph(component.graph), sample(), root, sorted(own[root, "rows"]))
    assert own == theirs
    assert len(own) == (2 if is_ffn else 4)


class Twice(nn.Module):
    """A residual attention or FFN of width 12 around a function of its Linears: [B, N, 12] -> [B, N, 12]."""

    def __init__(self, function: Callable[[Twice, Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.norm = function, nn.LayerNorm(12)
        self.qkv, self.uneven, self.q, self.kv = (
            nn.Linear(12, 36),
            nn.Linear(12, 24),
            nn.Linear(12, 12),
            nn.Linear(12, 24),
        )
        self.qk_norm, self.wide_norm, self.out = nn.LayerNorm(3), nn.LayerNorm(12), nn.Linear(12, 12)
        self.scale, self.alibi = nn.Parameter(torch.ones(4, 1, 1)), nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.function(self, self.norm(x)))  # type: ignore[no-any-return]


def joined(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)


def fused(m: Twice, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).reshape(x.shape[0], x.shape[1], 3, 4, 3).permute(2, 0, 3, 1, 4)
    return joined(q, k, v)


def uneven(m: Twice, x: Tensor) -> Tensor:
    """Four heads of queries and two of keys and values from one projection, as Phi has them."""
    q, k, v = m.uneven(x).split([12, 6, 6], -1)
    k, v = (in_heads(t, 2).repeat_interleave(2, 1) for t in (k, v))
    return joined(in_heads(q, 4), k, v)


def rotary(m: Twice, x: Tensor) -> Tensor:
    q, (k, v) = in_heads(m.q(x), 4), (in_heads(t, 4) for t in m.kv(x).chunk(2, -1))
    q, k = m.qk_norm(q), m.qk_norm(k)
    angles = torch.arange(x.shape[1])[:, None] * torch.ones(3)
    q, k = (t * angles.cos() + torch.cat([-t[..., 2:], t[..., :2]], -1) * angles.sin() for t in (q, k))
    return joined(q, k, v)


def biased(m: Twice, x: Tensor) -> Tensor:
    q, (k, v) = in_heads(m.q(x), 4), (in_heads(t, 4) for t in m.kv(x).chunk(2, -1))
    places = torch.arange(x.shape[1])
    return joined(q, k, v * m.scale, (places[:, None] - places).abs() * m.alibi)


def normed_whole(m: Twice, x: Tensor) -> Tensor:
    q, (k, v) = in_heads(m.wide_norm(m.q(x)), 4), (in_heads(t, 4) for t in m.kv(x).chunk(2, -1))
    return joined(q, k, v)


@pytest.mark.parametrize(
    ("function", "n_units", "saved"),
    [
        (fused, 4, 12 * 3 + 13 * 9),  # columns of the last Linear, and rows with their biases
        (uneven, 2, 12 * 6 + 13 * 12),
        (rotary, 4, 12 * 3 + 13 * 9),
        (biased, 4, 12 * 3 + 13 * 9 + 2),  # and a number a head in two tensors
    ],
)
def test_heads_that_nobody_reads_go_from_however_they_are_made(
    function: Callable[[Twice, Tensor], Tensor], n_units: int, saved: int
) -> None:
    program = program_of(seeded(Twice(function)).double(), sample(width=12).double())
    component, (group,) = found(program)
    assert isinstance(group, Group)
    assert group.n_units == n_units
    kept = [unit for unit in range(n_units) if unit != 1]
    leaf = linear_of(component.graph, group.consumers[0])
    leaf.weight.data[:, group.columns[1]] = 0
    feeds = [{component.inputs[0].name: sample(batch=n, width=12, seed=n).double()} for n in (1, 3)]
    wanted = [run_outputs(component, feed) for feed in feeds]
    saving = narrowing_saving(component, group, len(kept), program.dims)
    small = narrowed(component, group, kept)
    for feed, values in zip(feeds, wanted, strict=True):
        (value,), (own,) = values, run_outputs(small, feed)
        assert float((value - own).abs().max()) < 1e-12
    assert saving.parameters == saved


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (normed_whole, "computes one unit from the others"),
        (lambda m, x: joined(*(in_heads(m.q(x), 4),) * 3).flip(-1), "no operation that keeps them apart"),
    ],
)
def test_what_mixes_heads_is_named(function: Callable[[Twice, Tensor], Tensor], reason: str) -> None:
    _, (group,) = found(program_of(seeded(Twice(function)), sample(width=12)))
    assert isinstance(group, str)
    assert reason in group


def test_a_weight_that_is_read_twice_stays() -> None:
    block = seeded(GroupedHeads(key_heads=4))
    block.layers[1].attention["value"].weight = block.layers[0].attention["value"].weight  # type: ignore[index, union-attr]
    _, groups = found(program_of(block, sample()))
    assert all(isinstance(group, str) and "reads one of its weights too" in group for group in groups)
