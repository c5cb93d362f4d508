"""Raising: weighted operations become `torch.nn` leaves under original names, bit-equal."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.graph.blocks import WIDTH, PreNorm, Stack, sample, seeded
from vlmopt.core.program import Component
from vlmopt.graph.canonical import writes
from vlmopt.graph.example import component_of
from vlmopt.graph.modules import clone_graph, get_at
from vlmopt.graph.raising import raise_program


def leaves(component: Component) -> dict[str, type]:
    nodes = component.graph.graph.nodes
    return {str(n.target): type(get_at(component.graph, str(n.target))) for n in nodes if n.op == "call_module"}


def assert_bit_equal(component: Component, module: nn.Module, *samples: Tensor) -> None:
    with torch.no_grad():
        assert torch.equal(component.graph(*samples)[0], module(*samples))


class Tied(nn.Module):
    """An embedding and an output layer that share one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.lm_head = nn.Linear(WIDTH, 11, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(torch.relu(self.body(self.embed(ids))))


def test_a_block_is_raised_bit_equal_under_its_own_names() -> None:
    module = seeded(Stack(PreNorm()))
    component = component_of(module, sample())
    assert_bit_equal(component, module, sample(batch=3, seed=1))
    wanted = {
        name: type(child) for name, child in module.named_modules() if isinstance(child, nn.Linear | nn.LayerNorm)
    }
    assert leaves(component) == wanted
    assert {name for name, _ in component.graph.named_parameters()} == {name for name, _ in module.named_parameters()}
    for name, parameter in component.graph.named_parameters():
        assert torch.equal(parameter, module.get_parameter(name))


def test_a_tied_embedding_and_linear_keep_their_names_and_share_the_tensor() -> None:
    module = seeded(Tied())
    ids = torch.tensor([[1, 2], [3, 10]])
    component = component_of(module, ids)
    assert leaves(component) == {"embed": nn.Embedding, "body": nn.Linear, "lm_head": nn.Linear}
    assert get_at(component.graph, "embed").weight is get_at(component.graph, "lm_head").weight  # type: ignore[union-attr]
    assert_bit_equal(component, module, torch.tensor([[0, 5]]))


def test_sharing_outlives_a_clone() -> None:
    component = component_of(seeded(Tied()), torch.tensor([[1, 2], [3, 10]]))
    clone = clone_graph(component.graph)
    assert get_at(clone, "embed").weight is get_at(component.graph, "lm_head").weight  # type: ignore[union-attr]


def test_a_weight_used_by_two_calls_is_one_leaf() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.linear(self.norm(self.linear(x))))

    module = seeded(Twice())
    component = component_of(module, sample())
    assert leaves(component) == {"linear": nn.Linear, "norm": nn.LayerNorm}
    assert [str(n.target) for n in component.graph.graph.nodes if n.op == "call_module"] == ["linear", "norm"] * 2
    assert_bit_equal(component, module, sample(seed=2))


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.Conv2d(4, 4, (2, 3), groups=2, bias=False),
        nn.Conv2d(3, 4, 3, dilation=2),
        nn.Conv2d(3, 4, 3, padding="same"),
        nn.Conv2d(3, 4, 3, stride=3, padding="valid"),
    ],
    ids=["strided", "grouped", "dilated", "same", "valid"],
)
def test_convolutions_are_raised_bit_equal(conv: nn.Conv2d) -> None:
    module = seeded(nn.Sequential(conv))
    images = torch.randn(2, conv.in_channels, 9, 9, generator=torch.Generator().manual_seed(0))
    component = component_of(module, images)
    assert_bit_equal(component, module, images)
    assert repr(get_at(component.graph, "0")) == repr(conv).replace(", padding=valid", "")  # which means none


def test_a_norm_without_bias_and_with_its_own_epsilon_is_raised_bit_equal() -> None:
    module = seeded(nn.Sequential(nn.LayerNorm(WIDTH, eps=0.5, bias=False)))
    component = component_of(module, sample())
    assert repr(get_at(component.graph, "0")) == repr(module[0])  # type: ignore[index]
    assert_bit_equal(component, module, sample(seed=3))


def test_a_computed_bias_is_not_lost() -> None:
    class ComputedBias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.shift = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.ones(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.layer_norm(x, [WIDTH], self.weight, self.shift * 2)

    module = seeded(ComputedBias())
    component = component_of(module, sample())
    assert_bit_equal(component, module, sample(seed=4))


def test_a_raw_parameter_beside_a_leaf_is_kept() -> None:
    class Scaled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(WIDTH, WIDTH)
            self.scale = nn.Parameter(torch.ones(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scale

    module = seeded(nn.Sequential(Scaled()))
    component = component_of(module, sample())
    assert leaves(component) == {"0": nn.Linear}
    assert_bit_equal(component, module, sample(seed=5))


def test_a_prefix_is_cut_from_every_name() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = seeded(Tied())

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(ids)

    with torch.no_grad():
        exported = torch.export.export(Wrapped(), (torch.tensor([[1, 2]]),), strict=False)
    graph = raise_program(exported, prefix="model.")
    assert {str(n.target) for n in graph.graph.nodes if n.op == "call_module"} == {"embed", "body", "lm_head"}


class InPlace(nn.Module):
    """Writes that are ordinary operations in disguise, one into a view, and regions of another mode."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.table = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        x += self.table
        return x.relu_()


class WriteIntoView(InPlace):
    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        x[:, 0] = self.table
        return self.linear(x)


class WriteIntoCopy(InPlace):
    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        copied = x.clone()
        copied += self.table
        return x * copied


class ReadAfterWrite(InPlace):
    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        y = x.add_(self.table)
        return x * 2 + y


class OtherModes(InPlace):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            x = self.linear(x).sin()
            with torch.autocast("cpu", enabled=False):
                x = x + self.table
        return self.linear(x)


@pytest.mark.parametrize("made", [InPlace, WriteIntoView, WriteIntoCopy, ReadAfterWrite, OtherModes])
def test_nothing_is_written_in_place_and_no_region_is_left(made: type[nn.Module]) -> None:
    module = seeded(made())
    component = component_of(module, sample())
    assert not any(writes(node) for node in component.graph.graph.nodes)
    assert all(isinstance(n.target, str | torch._ops.OpOverload) for n in component.graph.graph.nodes)
    assert leaves(component) == {"linear": nn.Linear}
    x = sample(seed=6)
    assert_bit_equal(component, module, x)
    assert torch.equal(component.graph(x)[0], component.graph(x)[0])
    assert torch.equal(x, sample(seed=6))


def test_a_write_into_a_copy_is_not_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def decomposed(*_: object) -> None:
        raise AssertionError("takes longer than the export itself")

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", decomposed)
    module = seeded(WriteIntoCopy())
    module.table = nn.Parameter(torch.full((WIDTH,), 0.5))  # no other test has traced it
    assert_bit_equal(component_of(module, sample()), module, sample(seed=7))


def test_a_write_that_keeps_a_narrower_type_is_left_to_torch() -> None:
    class Counter(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            count = ids + 1
            count.mul_(torch.tensor(2))
            return count.clamp_(max=9)

    component = component_of(Counter(), torch.ones(2, 3, dtype=torch.int64))
    assert component.graph(torch.full((2, 3), 4))[0].tolist() == [[9] * 3] * 2
