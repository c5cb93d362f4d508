"""Costs against numbers worked out by hand, and against torch's own counter."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.graph.blocks import WIDTH, Attention, PreNorm, Stack, in_heads, sample, seeded
from vlmopt.core.program import Assembly, Component
from vlmopt.graph.branches import find_branches
from vlmopt.graph.costing import component_cost, nodes_cost, peak_activation_bytes, program_cost
from vlmopt.graph.example import DIMS, component_of, program_from
from vlmopt.graph.modules import clone_graph


def macs(module: nn.Module, *samples: Tensor) -> int:
    return component_cost(component_of(seeded(module), *samples), DIMS).macs


def test_a_linear_costs_tokens_times_both_widths() -> None:
    component = component_of(nn.Linear(8, 6), sample(tokens=5))
    cost = component_cost(component, DIMS)
    assert cost.macs == 5 * 8 * 6
    assert (cost.parameters, cost.parameters_bytes) == (8 * 6 + 6, 4 * (8 * 6 + 6))
    assert cost.activation_bytes == 4 * 5 * 6


def test_a_convolution_costs_its_window_at_every_place() -> None:
    images = torch.ones(2, 4, 9, 9)
    assert macs(nn.Conv2d(4, 6, 3, stride=2), images) == (4 * 4) * 6 * (4 * 3 * 3)
    assert macs(nn.Conv2d(4, 6, 3, stride=2, groups=2), images) == (4 * 4) * 6 * (2 * 3 * 3)
    assert macs(nn.Conv2d(4, 6, 3, padding="same"), images) == (9 * 9) * 6 * (4 * 3 * 3)


class Mixing(nn.Module):
    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.fused = fused

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = in_heads(q), in_heads(k), in_heads(v)
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v)
        return torch.softmax(q @ k.transpose(2, 3), -1) @ v


def test_attention_costs_scores_and_weighted_sum_fused_or_written_out() -> None:
    """2 heads, 5 queries, 7 keys of width 4, values of width 8: 2 * 5 * 7 * (4 + 8)."""
    samples = sample(tokens=5), sample(tokens=7), sample(tokens=7, width=16)
    for fused in (True, False):
        assert macs(Mixing(fused=fused), *samples) == 2 * 5 * 7 * (4 + 8)


def test_the_count_agrees_with_torch_on_written_out_attention() -> None:
    module = seeded(Stack(PreNorm(fused=False), PreNorm(fused=False)))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(sample(batch=1))
    assert counter.get_total_flops() == 2 * macs(module, sample())


def test_fused_and_written_out_attention_cost_the_same() -> None:
    assert macs(Stack(PreNorm(fused=True)), sample()) == macs(Stack(PreNorm(fused=False)), sample())


def test_branches_and_the_rest_add_up_to_the_whole() -> None:
    component = component_of(seeded(Stack(PreNorm(), PreNorm())), sample())
    whole = component_cost(component, DIMS)
    parts = [nodes_cost(component, branch.region, DIMS) for branch in find_branches(component.graph)]
    assert sum(part.macs for part in parts) == whole.macs
    assert sum(part.parameters for part in parts) == whole.parameters - 4 * WIDTH  # first and last norm


def test_a_shared_tensor_counts_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 11, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.embed(ids))

    component = component_of(seeded(Tied()), torch.ones(2, 3, dtype=torch.int64))
    assert component_cost(component, DIMS).parameters == 11 * WIDTH
    twin = Component("twin", clone_graph(component.graph), component.inputs, component.outputs)
    program = program_from({"model": component, "twin": twin}, Assembly.DUAL)
    assert program_cost(program).parameters == 11 * WIDTH
    assert program_cost(program).macs == 2 * component_cost(component, DIMS).macs


def test_index_buffers_are_no_parameters_and_views_write_nothing() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("ids", torch.arange(5))
            self.table = nn.Embedding(5, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            first, second = (x + self.table(self.ids)).chunk(2, dim=-1)
            return first.transpose(1, 2) * second.transpose(1, 2)

    cost = component_cost(component_of(seeded(Positions()), sample()), DIMS)
    assert cost.parameters == 5 * WIDTH
    assert cost.activation_bytes == 4 * (5 * WIDTH + 5 * WIDTH + 5 * WIDTH // 2)  # embedding, sum, product


def test_the_peak_is_the_largest_set_of_values_alive_together() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.relu(self.up(x)))

    component = component_of(Wide(), torch.ones(2, 8))
    assert peak_activation_bytes(component, DIMS) == 4 * (32 + 32)  # before and behind the relu


def test_a_view_keeps_the_value_behind_it_alive() -> None:
    class Late(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            kept = (x * 2).unsqueeze(1)
            y = torch.relu(torch.relu(x * 3))
            return kept.squeeze(1) + y

    component = component_of(Late(), torch.ones(2, 10))
    # `x * 2` lives until the sum although only views of it are read there: with it the two relus, then the sum.
    assert peak_activation_bytes(component, DIMS) == 4 * 10 * 3


def test_grouped_queries_cost_all_query_heads() -> None:
    module = Attention(heads=4, kv_heads=2)

    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = module

        def forward(self, x: Tensor) -> Tensor:
            return self.attn(x, x)

    projections = 5 * (8 * 8 + 8 * 4 + 8 * 4 + 8 * 8)
    assert macs(Alone(), sample()) == projections + 4 * 5 * 5 * (2 + 2)
