"""Adapters compute their formula, begin where they say, and are found, counted, stored and trained as parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.graph.blocks import WIDTH, Parallel, PostNorm, PreNorm, Stack, sample, seeded
from vlmopt.core.program import Component
from vlmopt.graph.adapter_places import AdapterPlace, branch_place, ffn_place, stream_place
from vlmopt.graph.adapters import (
    AdapterForm,
    AdapterKind,
    Init,
    adapter_cost,
    adapter_parameters,
    find_adapters,
    insert_adapter,
)
from vlmopt.graph.branches import BranchKind, find_branches
from vlmopt.graph.costing import component_cost, program_cost
from vlmopt.graph.example import DIMS, ResidualBlocks, component_of, program_of, without_branches
from vlmopt.graph.marks import marks_of
from vlmopt.graph.modules import get_at
from vlmopt.graph.regions import skip_branch
from vlmopt.graph.stored import read_program, write_program

FORMS = [
    AdapterForm(AdapterKind.BOTTLENECK, 3),
    AdapterForm(AdapterKind.BOTTLENECK, 3, has_norm=False),
    AdapterForm(AdapterKind.LINEAR, 3),
    AdapterForm(AdapterKind.LINEAR, 3, has_bias=False),
]


class Identity(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


def with_adapter(form: AdapterForm, *, seed: int = 0) -> Component:
    component = component_of(Identity(), sample())
    node = next(node for node in component.graph.graph.nodes if node.name == "tanh")
    insert_adapter(component.graph, AdapterPlace(node), form, site="here", seed=seed)
    component.graph.recompile()
    return component


def randomised(component: Component) -> dict[str, Tensor]:
    """Gives every adapter parameter random float64 numbers and returns them by their last two names."""
    generator = torch.Generator().manual_seed(5)
    component.graph.double()
    for parameter in component.graph.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return {path.removeprefix("adapters.here."): value.detach() for path, value in component.graph.named_parameters()}


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_an_adapter_computes_its_formula(form: AdapterForm) -> None:
    component = with_adapter(form)
    w = randomised(component)
    x = sample(batch=3, seed=1).double()
    with torch.no_grad():
        found = component.graph(x)[0]
    value = torch.tanh(x)
    hidden = value
    if form.is_normed:
        mean, spread = value.mean(-1, keepdim=True), value.var(-1, keepdim=True, correction=0)
        hidden = (value - mean) / torch.sqrt(spread + 1e-5) * w["norm.weight"] + w["norm.bias"]
    hidden = hidden @ w["down.weight"].T + w.get("down.bias", 0.0)
    if form.kind is AdapterKind.BOTTLENECK:
        hidden = hidden.clamp(min=0.0)
    wanted = value + hidden @ w["up.weight"].T + w.get("up.bias", 0.0)
    assert float((found - wanted).abs().max()) < 1e-12 * float(wanted.abs().max())


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_an_adapter_that_begins_at_zero_changes_no_bit(form: AdapterForm) -> None:
    x = sample(batch=3, seed=1)
    component = with_adapter(form)
    assert torch.equal(component.graph(x)[0], torch.tanh(x))
    weights = dict(component.graph.named_parameters())
    assert float(weights["adapters.here.down.weight"].detach().abs().min()) > 0.0  # or it would never learn
    assert all(weight.requires_grad for weight in weights.values())


def test_the_papers_beginning_is_normal_with_deviation_2_percent_and_no_bias() -> None:
    component = component_of(Identity(), sample(width=256))
    node = next(node for node in component.graph.graph.nodes if node.name == "tanh")
    insert_adapter(
        component.graph, AdapterPlace(node), AdapterForm(AdapterKind.BOTTLENECK, 64, Init.PAPER), site="here"
    )
    weights = dict(component.graph.named_parameters())
    for name in ("down", "up"):
        weight = weights[f"adapters.here.{name}.weight"].detach()
        assert weight.numel() == 256 * 64
        assert float(weight.mean()) == pytest.approx(0.0, abs=0.02 * 4 / 128)  # four standard errors
        assert float(weight.std()) == pytest.approx(0.02, rel=0.03)
        assert not bool(weights[f"adapters.here.{name}.bias"].any())


def test_weights_follow_the_seed_and_the_site_and_leave_torchs_generator_alone() -> None:
    state = torch.get_rng_state()
    first, same, other = (with_adapter(FORMS[2], seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    one, two, three = (part.graph.get_parameter("adapters.here.down.weight") for part in (first, same, other))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_an_adapter_is_said_to_cost_is_what_is_counted(form: AdapterForm) -> None:
    before, after = component_of(Identity(), sample()), with_adapter(form)
    node = next(node for node in before.graph.graph.nodes if node.name == "tanh")
    cost = adapter_cost(before, node, form, DIMS)
    assert component_cost(after, DIMS) - component_cost(before, DIMS) == cost
    norm, bias = 2 * WIDTH * form.is_normed, (3 + WIDTH) * form.is_biased
    assert cost.parameters == form.parameters(WIDTH) == 2 * WIDTH * 3 + norm + bias
    assert cost.macs == 5 * 2 * WIDTH * 3


ROUTED = AdapterForm(AdapterKind.ROUTED, 4)


def test_a_routed_adapter_computes_its_formula() -> None:
    component = with_adapter(ROUTED)
    w = randomised(component)
    x = sample(batch=3, seed=1).double()
    with torch.no_grad():
        found = component.graph(x)[0]
    value, half = torch.tanh(x), WIDTH // 2
    route = torch.softmax((value[:, 0] @ w["route.weight"].T + w["route.bias"]) / 10, dim=-1)
    hidden = value @ w["down.weight"].T + w["down.bias"]
    maps = []
    for side in (slice(0, half), slice(half, WIDTH)):  # of each group's outputs: B's, then D's
        groups = [
            hidden[..., 2 * i : 2 * i + 2] @ w[f"up_{i}.weight"][side].T + w[f"up_{i}.bias"][side] for i in range(2)
        ]
        maps.append(torch.cat(groups, dim=-1))
    wanted = value + route[:, :1, None] * maps[0] + route[:, 1:, None] * maps[1]
    assert float((found - wanted).abs().max()) < 1e-12 * float(wanted.abs().max())


def test_a_routed_adapter_begins_at_zero_and_costs_what_it_says() -> None:
    x = sample(batch=3, seed=1)
    before, after = component_of(Identity(), sample()), with_adapter(ROUTED)
    assert torch.equal(after.graph(x)[0], torch.tanh(x))
    node = next(node for node in before.graph.graph.nodes if node.name == "tanh")
    cost = adapter_cost(before, node, ROUTED, DIMS)
    assert component_cost(after, DIMS) - component_cost(before, DIMS) == cost
    assert cost.parameters == ROUTED.parameters(WIDTH)
    (adapter,) = find_adapters(after.graph)
    assert len(adapter.calls) == 4


def test_a_routed_adapter_needs_tokens_and_two_even_groups() -> None:
    with pytest.raises(ValueError, match="expected an even number"):
        AdapterForm(AdapterKind.ROUTED, 3)
    flat = component_of(Identity(), torch.ones(2, WIDTH))
    node = next(node for node in flat.graph.graph.nodes if node.name == "tanh")
    assert "reads tokens [B, N, D]" in ROUTED.unfit(node)
    assert FORMS[0].unfit(node) == ""


def test_two_adapters_of_one_site_lie_beside_each_other() -> None:
    component = with_adapter(FORMS[2])
    node = next(node for node in component.graph.graph.nodes if node.name == "tanh")
    insert_adapter(component.graph, AdapterPlace(node), FORMS[2], site="here")
    assert [adapter.site for adapter in find_adapters(component.graph)] == ["here_2", "here"]
    # A site below a module of another adapter would put it into a leaf, which clones share.
    insert_adapter(component.graph, AdapterPlace(node), FORMS[2], site="here.down.more")
    assert not list(get_at(component.graph, "adapters.here.down").children())  # type: ignore[union-attr]
    assert len(find_adapters(component.graph)) == 3


def test_parameters_of_adapters_are_found_stored_and_read_back(tmp_path: Path) -> None:
    program = program_of(ResidualBlocks().requires_grad_(requires_grad=False), torch.ones(2, 8))
    graph = program.components["model"].graph
    (branch, _) = find_branches(graph)
    place = branch_place(branch)
    assert isinstance(place, AdapterPlace)
    insert_adapter(graph, place, AdapterForm(AdapterKind.BOTTLENECK, 2), site="layers.0")
    found = adapter_parameters(program)
    parts = ("norm.weight", "norm.bias", "down.weight", "down.bias", "up.weight", "up.bias")
    assert sorted(found) == sorted(f"model/adapters.layers.0.{part}" for part in parts)
    write_program(program, tmp_path, name="p")
    again = read_program(tmp_path, name="p")
    assert {path: value.requires_grad for path, value in adapter_parameters(again).items()} == dict.fromkeys(
        found, True
    )
    trained = {path for path, value in again.components["model"].graph.named_parameters() if value.requires_grad}
    assert trained == {path.removeprefix("model/") for path in found}
    assert program_cost(again) == program_cost(program)


def test_training_the_adapters_alone_takes_the_place_of_a_skipped_branch() -> None:
    model = ResidualBlocks(seed=3).eval()
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    wanted = model(x)
    program = without_branches(program_of(model, torch.ones(2, 8)), "layers.0.ffn")
    graph = program.components["model"].graph
    (node,) = (node for node in graph.graph.nodes if marks_of(node))
    place = stream_place(node)
    assert isinstance(place, AdapterPlace)
    insert_adapter(graph, place, AdapterForm(AdapterKind.BOTTLENECK, 8), site="layers.0.skip")
    graph.recompile()
    optimizer = torch.optim.Adam(adapter_parameters(program).values(), lr=0.01)
    losses = []
    for _ in range(150):
        loss = (graph(x)[0] - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]
    assert all(value.grad is None for path, value in graph.named_parameters() if not path.startswith("adapters."))


def adapted(block: type[nn.Module], name: str) -> tuple[Component, nn.Module]:
    """A stack with an adapter beside a branch, and the stack."""
    module = seeded(Stack(block(), block()))
    component = component_of(module, sample())
    branch = next(branch for branch in find_branches(component.graph) if branch.name == name)
    place = branch_place(branch)
    assert isinstance(place, AdapterPlace)
    insert_adapter(component.graph, place, AdapterForm(AdapterKind.BOTTLENECK, 2, Init.PAPER), site=f"{name}.beside")
    component.graph.recompile()
    return component, module


@pytest.mark.parametrize("block", [PreNorm, Parallel, PostNorm])
def test_an_adapter_beside_a_branch_is_a_branch_of_the_same_layer_that_can_be_skipped(block: type[nn.Module]) -> None:
    component, module = adapted(block, "layers.0.attn")
    x = sample(batch=3, seed=1)
    with torch.no_grad():
        assert not torch.equal(component.graph(x)[0], module(x))
    found = find_branches(component.graph)
    assert sorted(branch.name for branch in found if branch.layer_name == "layers.0") == [
        "adapters.layers.0.attn.beside",
        "layers.0.attn",
        "layers.0.mlp",
    ]
    assert [branch.layer for branch in found] == [0, 0, 0, 1, 1]
    own = next(branch for branch in found if branch.name.startswith("adapters"))
    assert own.kind is BranchKind.OTHER
    skip_branch(component.graph, own)
    component.graph.recompile()
    with torch.no_grad():
        assert torch.equal(component.graph(x)[0], module(x))


def test_an_adapter_inside_an_ffn_is_a_part_of_it() -> None:
    component = component_of(seeded(Stack(PreNorm(), PreNorm())), sample())
    graph = component.graph
    skip_branch(graph, find_branches(graph)[0])
    graph.graph.eliminate_dead_code()
    before = [(branch.name, branch.kind, branch.layer_name) for branch in find_branches(graph)]
    (node,) = (node for node in graph.graph.nodes if marks_of(node))
    place = ffn_place(graph, node, marks_of(node)[0])
    assert isinstance(place, AdapterPlace)
    assert [str(reader.target) for reader in place.readers or ()] == ["layers.0.mlp.fc1"]
    assert str(place.value.target) == "layers.0.norm2"
    insert_adapter(graph, place, AdapterForm(AdapterKind.LINEAR, 2), site="layers.0.attn.eas")
    assert [(branch.name, branch.kind, branch.layer_name) for branch in find_branches(graph)] == before
    assert {call for adapter in find_adapters(graph) for call in adapter.calls} < set(find_branches(graph)[0].region)


def test_a_post_norm_stack_stays_one_behind_an_adapter_and_the_adapter_takes_no_norm_along() -> None:
    names = ("layers.0.attn", "layers.0.mlp", "layers.2.attn", "layers.2.mlp")
    program = without_branches(program_of(seeded(Stack(PostNorm(), PostNorm(), PostNorm())), sample()), *names)
    graph = program.components["model"].graph
    for node in [node for node in graph.graph.nodes if marks_of(node)]:
        place = stream_place(node)
        assert isinstance(place, AdapterPlace)
        insert_adapter(graph, place, AdapterForm(AdapterKind.LINEAR, 2), site=marks_of(node)[0].layer + ".skip")
    found = [(branch.name, branch.is_post_norm) for branch in find_branches(graph)]
    assert found == [
        ("adapters.layers.0.skip", False),
        ("layers.1.attn", True),
        ("layers.1.mlp", True),
        ("adapters.layers.2.skip", False),
    ]


class Gated(nn.Module):
    """A skipped attention in front of an FFN with a gate and without a norm."""

    def __init__(self) -> None:
        super().__init__()
        names = ("attention", "gate", "up", "down")
        self.layers = nn.ModuleList(nn.ModuleDict({name: nn.Linear(4, 4) for name in names}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.nn.functional.scaled_dot_product_attention(x, x, layer["attention"](x))  # type: ignore[index]
            x = x + layer["down"](torch.relu(layer["gate"](x)) * layer["up"](x))  # type: ignore[index]
        return x


def test_all_first_linears_of_a_gated_ffn_read_the_adapter_and_the_residual_does_not() -> None:
    component = component_of(Gated(), sample(width=4))
    graph = component.graph
    attention = find_branches(graph)[2]
    assert attention.kind is BranchKind.ATTENTION
    skip_branch(graph, attention)
    (node,) = (node for node in graph.graph.nodes if marks_of(node))
    (mark,) = marks_of(node)
    place = ffn_place(graph, node, mark)
    assert isinstance(place, AdapterPlace)
    total = insert_adapter(graph, place, AdapterForm(AdapterKind.LINEAR, 2), site="eas")
    assert [str(reader.target) for reader in total.users] == ["layers.1.gate", "layers.1.up"]
    assert any(user.target is torch.ops.aten.add.Tensor and user is not total for user in node.users)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [((2, 3, 4, 8), "4 axes"), ((2,), "1 axes")],
)
def test_a_value_that_is_no_row_of_vectors_gets_no_adapter(shape: tuple[int, ...], reason: str) -> None:
    component = component_of(Identity(), torch.ones(shape))
    place = stream_place(next(iter(component.graph.graph.nodes)))
    assert isinstance(place, str)
    assert reason in place


def test_a_rank_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="rank is 0; expected at least 1"):
        AdapterForm(AdapterKind.LINEAR, 0)
