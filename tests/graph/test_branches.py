"""Branches are found by structure, whatever the modules are called."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.graph.blocks import (
    WIDTH,
    Attention,
    LayerScale,
    Mlp,
    Parallel,
    PostNorm,
    PreNorm,
    RmsNormed,
    Stack,
    in_heads,
    sample,
    seeded,
)
from vlmopt.core.program import Component
from vlmopt.graph.branches import Branch, BranchKind, find_branches
from vlmopt.graph.example import component_of
from vlmopt.graph.modules import output_values


def found(module: nn.Module, *samples: Tensor) -> tuple[Component, list[Branch]]:
    component = component_of(seeded(module), *samples)
    return component, find_branches(component.graph)


def told(branches: list[Branch]) -> list[tuple[str, str, int]]:
    return [(branch.name, branch.kind.value, branch.layer) for branch in branches]


BOTH = [("layers.0.attn", "attention", 0), ("layers.0.mlp", "ffn", 0)]


def test_pre_norm_blocks_have_two_branches_each_and_leave_the_norm_inside() -> None:
    component, branches = found(Stack(PreNorm(), PreNorm()), sample())
    assert told(branches) == [*BOTH, ("layers.1.attn", "attention", 1), ("layers.1.mlp", "ffn", 1)]
    assert [branch.is_post_norm for branch in branches] == [False] * 4
    assert [branch.layer_name for branch in branches] == ["layers.0", "layers.0", "layers.1", "layers.1"]
    modules = {str(node.target) for node in branches[1].region if node.op == "call_module"}
    assert modules == {"layers.0.norm2", "layers.0.mlp.fc1", "layers.0.mlp.fc2"}
    assert branches[1].exit in branches[1].region
    assert branches[-1].exit is not output_values(component.graph)[0]  # the final norm is no branch's


def test_post_norm_blocks_take_their_norm_along() -> None:
    _, branches = found(Stack(PostNorm()), sample())
    assert told(branches) == BOTH
    assert [branch.is_post_norm for branch in branches] == [True, True]
    assert [str(branch.exit.target) for branch in branches] == ["layers.0.norm1", "layers.0.norm2"]
    assert all(branch.exit in branch.region for branch in branches)


def test_a_post_norm_block_on_an_unnormed_stream_keeps_its_norm() -> None:
    _, branches = found(PostNorm(), sample())
    assert told(branches) == [("attn", "attention", 0), ("mlp", "ffn", 0)]
    assert [branch.is_post_norm for branch in branches] == [False, True]


def test_joined_normed_streams_count_as_normed() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.block = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), PostNorm()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.block(torch.cat((self.a(x).repeat(1, 2, 1), self.b(y)), dim=1))

    _, branches = found(Joined(), sample(), sample(seed=1))
    assert [branch.is_post_norm for branch in branches] == [True, True]


def test_layer_scale_belongs_to_the_branch() -> None:
    _, branches = found(Stack(LayerScale()), sample())
    assert told(branches) == BOTH
    scales = [str(n.target) for branch in branches for n in branch.region if n.op == "get_attr"]
    assert scales == ["layers.0.scale1", "layers.0.scale2"]


def test_parallel_attention_and_ffn_are_two_branches_of_one_sum_however_it_is_bracketed() -> None:
    for is_inner in (False, True):
        _, branches = found(Stack(Parallel(is_inner=is_inner)), sample())
        assert told(branches) == BOTH
        assert branches[0].exit is branches[1].exit
        assert len(branches[0].terms) == 3
        first, second = ({str(n.target) for n in b.region if n.op == "call_module"} for b in branches)
        assert first == {f"layers.0.attn.{name}_proj" for name in ("q", "k", "v", "out")}
        assert second == {"layers.0.mlp.fc1", "layers.0.mlp.fc2"}
        additions = [n for b in branches for n in b.region if n.target is torch.ops.aten.add.Tensor]
        assert len(additions) == len(set(additions)) == 2  # skipping both leaves no addition


def test_attention_written_out_is_attention_with_and_without_a_mask() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.attn = nn.LayerNorm(WIDTH), Attention(fused=False)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            n = self.norm(x)
            return x + self.attn(n, n, mask[:, None, None, :])

    _, branches = found(Stack(PreNorm(fused=False)), sample())
    assert told(branches) == BOTH
    component, branches = found(Masked(), sample(), torch.zeros(2, 5))
    assert told(branches) == [("attn", "attention", 0)]
    inputs = [node for node in component.graph.graph.nodes if node.op == "placeholder"]
    assert not set(inputs) & set(branches[0].region)


def test_cross_attention_reads_encoder_states_as_a_side_input() -> None:
    class Decoder(nn.Module):
        def __init__(self, *, fused: bool) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
            self.self_attn, self.cross_attn, self.mlp = Attention(fused=fused), Attention(fused=fused), Mlp()

        def forward(self, x: Tensor, states: Tensor) -> Tensor:
            n = self.norms[0](x)
            x = x + self.self_attn(n, n)
            x = x + self.cross_attn(self.norms[1](x), states)
            return x + self.mlp(self.norms[2](x))

    for fused in (True, False):
        _, branches = found(Decoder(fused=fused), sample(), sample(tokens=7))
        assert told(branches) == [
            ("self_attn", "attention", 0),
            ("cross_attn", "cross_attention", 0),
            ("mlp", "ffn", 0),
        ]
        modules = {str(node.target) for node in branches[1].region if node.op == "call_module"}
        assert {"cross_attn.k_proj", "cross_attn.v_proj"} <= modules  # computed from the side input, for it alone


def test_attention_by_einsum_is_self_attention() -> None:
    class ByEinsum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (in_heads(value) for value in self.qkv(self.norm(x)).chunk(3, dim=-1))
            weights = torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1)
            return x + self.out(torch.einsum("bhij,bhjd->bhid", weights, v).transpose(1, 2).flatten(2))

    _, branches = found(ByEinsum(), sample())
    assert [branch.kind for branch in branches] == [BranchKind.ATTENTION]


def test_masks_and_rotary_tables_computed_before_are_side_inputs() -> None:
    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(PreNorm() for _ in range(2))

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            angles = torch.arange(x.shape[1])[:, None] * torch.tensor([1.0, 0.1])
            cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()
            bias = (1.0 - mask[:, None, None, :]) * -1e4
            for layer in self.layers:
                n = layer.norm1(x)
                q, k, v = (in_heads(f(n)) for f in (layer.attn.q_proj, layer.attn.k_proj, layer.attn.v_proj))
                q, k = (t * cos + torch.cat((-t[..., 2:], t[..., :2]), -1) * sin for t in (q, k))
                mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
                x = x + layer.attn.out_proj(mixed.transpose(1, 2).flatten(2))
                x = x + layer.mlp(layer.norm2(x))
            return x

    component, branches = found(Rotary(), sample(), torch.ones(2, 5))
    assert told(branches) == [*BOTH, ("layers.1.attn", "attention", 1), ("layers.1.mlp", "ffn", 1)]
    tables = [
        n for n in component.graph.graph.nodes if n.target in (torch.ops.aten.cos.default, torch.ops.aten.sin.default)
    ]
    assert len(tables) >= 2
    assert not any(table in branch.region for table in tables for branch in branches)


def test_grouped_query_attention_with_repeated_keys_is_one_branch() -> None:
    _, branches = found(Stack(PreNorm(heads=4, kv_heads=2)), sample())
    assert told(branches) == BOTH


def test_a_norm_written_out_changes_nothing() -> None:
    _, branches = found(Stack(RmsNormed()), sample())
    assert told(branches) == BOTH


def test_gelu_by_tanh_written_out_is_no_branch() -> None:
    class Approximate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc1, self.fc2 = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            h = self.fc1(self.norm(x))
            h = 0.5 * h * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (h + 0.044715 * torch.pow(h, 3.0))))
            return x + self.fc2(h)

    _, branches = found(Approximate(), sample())
    assert told(branches) == [("ffn", "ffn", 0)]


def test_a_long_skip_around_blocks_and_a_position_embedding_are_no_branches() -> None:
    class Long(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.positions = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.zeros(1, 5, WIDTH))
            self.layers = nn.ModuleList([PreNorm(), PreNorm()])

        def forward(self, x: Tensor) -> Tensor:
            start = x = self.patch(x) + self.positions
            for layer in self.layers:
                x = layer(x)
            return start + x

    _, branches = found(Long(), sample())
    assert [branch.name for branch in branches] == ["layers.0.attn", "layers.0.mlp", "layers.1.attn", "layers.1.mlp"]


def test_a_module_in_a_sequential_is_not_taken_for_a_block() -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.attn = nn.LayerNorm(WIDTH), Attention()
            self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())

        def forward(self, x: Tensor) -> Tensor:
            n = self.norm(x)
            x = x + self.attn(n, n)
            return x + self.mlp(x)

    _, branches = found(Stack(Sequence(), Sequence()), sample())
    assert told(branches)[:2] == [("layers.0.attn", "attention", 0), ("layers.0.mlp.ffn", "ffn", 0)]
    assert [branch.layer for branch in branches] == [0, 0, 1, 1]


def test_blocks_that_are_bare_linears_keep_their_numbers() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + block(x)
            return x

    _, branches = found(Chain(), sample())
    assert told(branches) == [("blocks.0.ffn", "ffn", 0), ("blocks.1.ffn", "ffn", 1)]


def test_a_block_that_runs_twice_gives_unique_names_and_two_layers() -> None:
    class Twice(Stack):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.layers[0](self.layers[0](x)))

    _, branches = found(Twice(PreNorm()), sample())
    assert told(branches) == [*BOTH, ("layers.0.attn.2", "attention", 1), ("layers.0.mlp.2", "ffn", 1)]
    assert [branch.layer_name for branch in branches] == ["layers.0"] * 2 + ["layers.0.2"] * 2


def test_names_are_unique_without_any_module_path() -> None:
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.eye(WIDTH)), nn.Parameter(torch.eye(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            x = x + torch.relu(x @ self.a)
            return x + torch.relu(x @ self.b)

    _, branches = found(Raw(), sample())
    assert told(branches) == [("other", "other", 0), ("other.2", "other", 1)]


def test_a_convolution_branch_is_of_another_kind() -> None:
    class Convolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.relu(self.conv(x))

    _, branches = found(Convolution(), torch.ones(2, 3, 6, 6))
    assert told(branches) == [("conv.other", "other", 0)]


def test_a_list_that_holds_one_block_twice_names_each_place() -> None:
    block = PreNorm()
    component, branches = found(Stack(block, block), sample())
    assert told(branches) == [*BOTH, ("layers.1.attn", "attention", 1), ("layers.1.mlp", "ffn", 1)]
    shared = [component.graph.get_submodule(f"layers.{i}.mlp.fc1").weight for i in (0, 1)]
    assert shared[0] is shared[1]
