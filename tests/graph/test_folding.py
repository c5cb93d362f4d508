"""What folds computes the same to the last digits of float64; what does not says why."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from vlmopt.core.program import Program
from vlmopt.graph.adapter_places import AdapterPlace, ffn_place
from vlmopt.graph.adapters import AdapterForm, AdapterKind, Init, find_adapters, insert_adapter
from vlmopt.graph.canonical import drop_dead_nodes
from vlmopt.graph.costing import component_cost, program_cost
from vlmopt.graph.example import DIMS, AttentionBlocks, program_of, without_branches
from vlmopt.graph.folding import Fold, apply_fold, find_fold, fold_saving, folded_linear, why_shared
from vlmopt.graph.marks import marks_of
from vlmopt.graph.modules import get_at
from vlmopt.rewrite.pipeline import clone_program


def random_linear(d_in: int, d_out: int, *, bias: bool = True, seed: int = 0) -> nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(d_in, d_out, bias=bias, dtype=torch.float64)
    for parameter in linear.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return linear


@pytest.mark.parametrize("adapter_bias", [False, True])
@pytest.mark.parametrize("reader_bias", [False, True])
def test_a_reader_takes_over_an_adapter_with_its_bias_once(*, adapter_bias: bool, reader_bias: bool) -> None:
    down, up = random_linear(6, 2, bias=adapter_bias, seed=1), random_linear(2, 6, bias=adapter_bias, seed=2)
    reader = random_linear(6, 5, bias=reader_bias, seed=3)
    folded = folded_linear([down, up], reader, is_residual=True)
    n = torch.randn(7, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    with torch.no_grad():
        wanted = reader(n + up(down(n)))
        assert float((folded(n) - wanted).abs().max()) < 1e-12 * float(wanted.abs().max())
        assert (folded.bias is not None) is (adapter_bias or reader_bias)
        if adapter_bias:
            # As the released code does: the bias goes through the weight that holds the adapter already.
            shift = up.weight @ down.bias + up.bias
            twice = n @ folded.weight.T + folded.weight @ shift + (reader.bias if reader_bias else 0.0)
            assert float((twice - wanted).abs().max()) > 0.1 * float(wanted.abs().max())


def test_a_chain_without_residual_is_the_product_of_its_maps() -> None:
    chain = [random_linear(3, 4, seed=1), random_linear(4, 5, bias=False, seed=2), random_linear(5, 2, seed=3)]
    folded = folded_linear(chain[:-1], chain[-1], is_residual=False)
    n = torch.randn(7, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    with torch.no_grad():
        wanted = chain[2](chain[1](chain[0](n)))
        assert float((folded(n) - wanted).abs().max()) < 1e-12 * float(wanted.abs().max())


def adapted_program(form: AdapterForm) -> Program:
    """Blocks whose second attention is skipped, an adapter in the FFN behind it, everything random in float64."""
    program = without_branches(
        program_of(AttentionBlocks().double(), torch.ones(2, 3, 8).double()), "layers.1.attention"
    )
    graph = program.components["model"].graph
    (node,) = (node for node in graph.graph.nodes if marks_of(node))
    place = ffn_place(graph, node, marks_of(node)[0])
    assert isinstance(place, AdapterPlace)
    insert_adapter(graph, place, form, site="eas")
    generator = torch.Generator().manual_seed(1)
    for parameter in graph.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    graph.recompile()
    return program


def fold_of(program: Program) -> Fold | str:
    graph = program.components["model"].graph
    (adapter,) = find_adapters(graph)
    return find_fold(graph, adapter)


def test_an_adapter_inside_an_ffn_folds_to_the_last_digits_and_leaves_the_program_before_alone() -> None:
    program = adapted_program(AdapterForm(AdapterKind.LINEAR, 2))
    x = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    old = get_at(program.components["model"].graph, "layers.1.ffn.up")
    with torch.no_grad():
        wanted = program.components["model"].graph(x)[0]
    clone = clone_program(program)
    graph = clone.components["model"].graph
    fold = fold_of(clone)
    assert isinstance(fold, Fold)
    assert why_shared(clone, "model", fold) == ""
    saving = fold_saving(clone.components["model"], fold, DIMS)
    apply_fold(graph, fold)
    drop_dead_nodes(graph)
    with torch.no_grad():
        assert float((graph(x)[0] - wanted).abs().max()) < 1e-12 * float(wanted.abs().max())
        assert torch.equal(program.components["model"].graph(x)[0], wanted)
    assert get_at(program.components["model"].graph, "layers.1.ffn.up") is old
    assert find_adapters(graph) == []
    assert not any(parameter.requires_grad for path, parameter in graph.named_parameters() if "1.ffn.up" in path)
    assert program_cost(program) - program_cost(clone) == saving
    assert saving.parameters == 2 * 8 * 2 + 2 + 8
    assert (
        component_cost(clone.components["model"], DIMS).macs
        == component_cost(
            without_branches(program_of(AttentionBlocks(), torch.ones(2, 3, 8)), "layers.1.attention").components[
                "model"
            ],
            DIMS,
        ).macs
    )


@pytest.mark.parametrize(
    ("form", "what"),
    [
        (AdapterForm(AdapterKind.BOTTLENECK, 2), "a layernorm is part of it"),
        (AdapterForm(AdapterKind.BOTTLENECK, 2, has_norm=False), "a relu is part of it"),
    ],
)
def test_what_is_no_linear_map_is_told_by_the_graph(form: AdapterForm, what: str) -> None:
    found = fold_of(adapted_program(form))
    assert isinstance(found, str)
    assert what in found


class Reading(nn.Module):
    """An adapter with a reader of some kind behind it."""

    def __init__(self, kind: str, *, rank: int = 2) -> None:
        super().__init__()
        self.kind = kind
        pair = {"down": nn.Linear(8, rank), "up": nn.Linear(rank, 8)}
        self.adapters = nn.ModuleDict({"a": nn.ModuleDict(pair)})
        self.norm, self.linear, self.other = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        if kind == "tied":
            self.other.weight = self.linear.weight

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        change = self.adapters["a"]["up"](self.adapters["a"]["down"](x))  # type: ignore[index]
        z = x + change
        if self.kind == "linear":
            return self.linear(change)  # type: ignore[no-any-return]
        if self.kind == "norm":
            return self.linear(self.norm(z))  # type: ignore[no-any-return]
        if self.kind == "stream":
            return z + torch.relu(self.linear(self.norm(z)))  # type: ignore[no-any-return]
        if self.kind == "beside":
            return self.linear(torch.relu(x) + change)  # type: ignore[no-any-return]
        if self.kind == "output":
            return self.linear(z), z
        if self.kind == "twice":
            return self.linear(z) + self.linear(torch.relu(x))  # type: ignore[no-any-return]
        return torch.relu(self.linear(z)) + self.other(z)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("norm", r"norm \(layernorm\) reads its sum, and no map but a multiple of the identity crosses a norm"),
        ("stream", "the residual goes by the next norm"),
        ("beside", "the residual goes by the next norm"),
        ("output", "an output reads its sum, and is no Linear"),
        ("twice", r"linear_\d+ reads one of its weights too"),
        ("tied", "two of its Linears share a weight"),
    ],
)
def test_an_adapter_that_nothing_can_take_over_is_refused_with_the_reason(kind: str, reason: str) -> None:
    program = program_of(Reading(kind), torch.ones(2, 8))
    found = fold_of(program)
    said = found if isinstance(found, str) else why_shared(program, "model", found)
    assert re.search(reason, said), said


def test_maps_in_a_row_become_the_smallest_one() -> None:
    torch.manual_seed(0)
    program = program_of(Reading("linear").double(), torch.ones(2, 8).double())
    graph = program.components["model"].graph
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    wanted = graph(x)[0].detach()
    before = program_cost(program)
    fold = fold_of(program)
    assert isinstance(fold, Fold)
    # up [2 -> 8] and linear [8 -> 8] are one map [2 -> 8]; all three would be [8 -> 8], which is larger.
    assert [str(node.target) for node in (*fold.chain, *fold.readers)] == ["adapters.a.up", "linear"]
    saving = fold_saving(program.components["model"], fold, DIMS)
    apply_fold(graph, fold)
    drop_dead_nodes(graph)
    assert float((graph(x)[0] - wanted).abs().max()) < 1e-12 * float(wanted.abs().max())
    assert before - program_cost(program) == saving
    assert saving.parameters == (2 * 8 + 8 + 8 * 8 + 8) - (2 * 8 + 8)
    assert saving.macs == 8 * 8


@pytest.mark.parametrize(("rank", "is_merged"), [(3, False), (4, True), (6, True)])
def test_a_linear_adapter_on_the_stream_becomes_one_map_where_that_is_not_larger(rank: int, *, is_merged: bool) -> None:
    found = fold_of(program_of(Reading("stream", rank=rank), torch.ones(2, 8)))
    assert isinstance(found, Fold) is is_merged
    if isinstance(found, Fold):
        assert found.total is None


def test_the_papers_beginning_folds_too() -> None:
    program = adapted_program(AdapterForm(AdapterKind.LINEAR, 2, Init.PAPER, has_bias=False))
    assert isinstance(fold_of(program), Fold)
