"""Weights that train are copies; everything else stays shared and takes no gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vlmopt.core.program import Program
from vlmopt.graph.example import ResidualBlocks, program_of
from vlmopt.graph.replay import run_component
from vlmopt.tuning.trainable import frozen, trainable_copy

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


class Tied(nn.Module):
    """One Linear called twice, and a bare parameter that scales."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.full((8,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.map(self.map(x) * self.scale)  # type: ignore[no-any-return]


def output(program: Program) -> Tensor:
    return run_component(program.components["model"], [{"x": X}])


def test_what_trains_is_a_copy_and_computes_the_same() -> None:
    program = program_of(ResidualBlocks(), torch.ones(2, 8))
    copy, weights = trainable_copy(program, lambda key: "layers.0" in key)
    assert set(weights) == {
        f"model/layers.0.{leaf}.{part}" for leaf in ("norm", "up", "down") for part in ("weight", "bias")
    }
    assert torch.equal(output(copy), output(program))
    with torch.no_grad():
        weights["model/layers.0.down.bias"] += 1.0
    assert not torch.equal(output(copy), output(program))
    untouched = program.components["model"].graph.get_parameter("layers.0.down.bias")
    assert float(untouched.detach().abs().max()) < 1.0


def test_only_wanted_weights_take_a_gradient() -> None:
    copy, weights = trainable_copy(
        program_of(ResidualBlocks(), torch.ones(2, 8)), lambda key: key.endswith("up.weight")
    )
    graph = copy.components["model"].graph
    graph(X)[0].sum().backward()
    assert sorted(weights) == ["model/layers.0.up.weight", "model/layers.1.up.weight"]
    assert all(weight.grad is not None for weight in weights.values())
    assert [name for name, weight in graph.named_parameters() if weight.grad is not None] == [
        "layers.0.up.weight",
        "layers.1.up.weight",
    ]


def test_a_leaf_that_is_called_twice_stays_one_and_a_bare_parameter_trains_too() -> None:
    program = program_of(Tied(), torch.ones(2, 8))
    copy, weights = trainable_copy(program, lambda key: True)
    assert sorted(weights) == ["model/map.bias", "model/map.weight", "model/scale"]
    assert torch.equal(output(copy), output(program))
    with torch.no_grad():
        weights["model/scale"].fill_(0.0)
    assert torch.allclose(output(copy), weights["model/map.bias"].expand(5, 8))


def test_a_frozen_program_takes_no_gradient() -> None:
    copy, weights = trainable_copy(program_of(ResidualBlocks(), torch.ones(2, 8)), lambda key: True)
    copy.components["model"].graph(X)[0].sum().backward()
    frozen(copy)
    assert not any(weight.requires_grad or weight.grad is not None for weight in weights.values())
    assert not copy.components["model"].graph(X)[0].requires_grad


@pytest.mark.parametrize("wanted", ["layers", "nothing"])
def test_tensors_that_do_not_train_share_their_memory(wanted: str) -> None:
    program = program_of(ResidualBlocks(), torch.ones(2, 8))
    copy, _ = trainable_copy(program, lambda key: wanted in key)
    ours, theirs = (dict(p.components["model"].graph.named_parameters()) for p in (copy, program))
    shared = {name for name in ours if ours[name].data_ptr() == theirs[name].data_ptr()}
    assert shared == {name for name in ours if wanted not in name}
