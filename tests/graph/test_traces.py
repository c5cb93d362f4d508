"""A module is traced once; what is handed out is as good as a trace of its own, and anything new is traced again."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import pytest
import torch
from torch import Tensor, fx, nn

from vlmopt.core.program import Component
from vlmopt.graph import example
from vlmopt.graph.example import component_of
from vlmopt.graph.modules import placeholders
from vlmopt.graph.raising import raise_program
from vlmopt.graph.text import component_text
from vlmopt.graph.traces import MAX_BYTES, traced_once

SAMPLE = torch.ones(2, 4)
numbers = count()


class Scaled(nn.Module):
    """A layer and what is done behind it. `number` keeps what one test traces from the others."""

    def __init__(self, then: Callable[[Tensor], Tensor] = torch.relu, *, fill: float = 0.5, by: float = 2.0) -> None:
        super().__init__()
        self.layer, self.then, self.by, self.number = nn.Linear(4, 4), then, by, 0
        nn.init.constant_(self.layer.weight, fill)
        nn.init.constant_(self.layer.bias, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.layer(x)) * self.by


class Other(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) - self.by


def numbered(module: Scaled, number: int) -> Scaled:
    module.number = number
    return module


@pytest.fixture
def n_traces(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    made: list[fx.GraphModule] = []

    def counted(*args: object, **options: object) -> fx.GraphModule:
        made.append(raise_program(*args, **options))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(example, "raise_program", counted)
    return lambda: len(made)


def adding(number: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x + number


def leaf(component: Component) -> nn.Linear:
    found = component.graph.get_submodule("layer")
    assert isinstance(found, nn.Linear)
    return found


def test_equal_modules_are_traced_once_and_each_graph_holds_the_tensors_of_its_own(
    n_traces: Callable[[], int],
) -> None:
    number = next(numbers)
    modules = [numbered(Scaled(), number) for _ in range(3)]
    found = [component_of(module, SAMPLE) for module in modules]
    assert n_traces() == 1
    for module, component in zip(modules, found, strict=True):
        assert leaf(component).weight is module.layer.weight
        assert leaf(component).bias is module.layer.bias
        assert component_text(component) == component_text(found[0])
        assert (component.inputs, component.outputs) == (found[0].inputs, found[0].outputs)
        assert torch.equal(component.graph(SAMPLE)[0], module(SAMPLE))
    assert len({id(component.graph) for component in found} | {id(leaf(component)) for component in found}) == 6


def test_an_edit_of_one_graph_and_numbers_written_into_it_show_in_no_other(n_traces: Callable[[], int]) -> None:
    number = next(numbers)
    first, second = (component_of(numbered(Scaled(), number), SAMPLE) for _ in range(2))
    text = component_text(second)
    with torch.no_grad():
        leaf(first).weight.fill_(9.0)
    for node in first.graph.graph.nodes:
        node.meta.clear()
    third = component_of(numbered(Scaled(), number), SAMPLE)
    assert n_traces() == 1
    assert component_text(third) == component_text(second) == text
    assert torch.equal(leaf(third).weight, torch.full((4, 4), 0.5))


def test_a_tensor_of_two_modules_is_one_in_both_graphs() -> None:
    number = next(numbers)
    one, other, alone = (numbered(Scaled(), number) for _ in range(3))
    other.layer.weight = one.layer.weight
    parts = [component_of(module, SAMPLE) for module in (alone, one, other)]
    assert leaf(parts[1]).weight is leaf(parts[2]).weight is not leaf(parts[0]).weight


@pytest.mark.parametrize(
    "changed",
    [
        lambda: Scaled(fill=0.25),
        lambda: Scaled(by=3.0),
        lambda: Scaled(torch.tanh),
        lambda: Scaled(adding(2.0)),
        lambda: Other(adding(1.0)),
        lambda: Scaled(lambda x: x - 1.0),
    ],
    ids=["number", "setting", "function", "closure", "class", "code"],
)
def test_whatever_is_new_about_a_module_is_traced(n_traces: Callable[[], int], changed: Callable[[], Scaled]) -> None:
    number = next(numbers)
    component_of(numbered(Scaled(adding(1.0)), number), SAMPLE)
    component_of(numbered(Scaled(adding(1.0)), number), SAMPLE)
    assert n_traces() == 1
    module = numbered(changed(), number)
    found = component_of(module, SAMPLE)
    assert n_traces() == 2
    assert torch.equal(found.graph(SAMPLE)[0], module(SAMPLE))


def test_another_sample_another_form_and_another_default_type_are_traced(n_traces: Callable[[], int]) -> None:
    number = next(numbers)
    component_of(numbered(Scaled(), number), SAMPLE)
    component_of(numbered(Scaled(), number), torch.zeros(2, 4))  # a trace reads no number of a sample
    assert n_traces() == 1
    component_of(numbered(Scaled(), number), torch.ones(2, 3, 4))
    component_of(numbered(Scaled(), number), SAMPLE, raw=True)
    assert n_traces() == 3
    module = numbered(Scaled(), number)
    torch.set_default_dtype(torch.float64)
    try:
        component_of(module, SAMPLE)
    finally:
        torch.set_default_dtype(torch.float32)
    assert n_traces() == 4


def test_a_trace_one_of_whose_copies_froze_a_size_is_not_used_again(n_traces: Callable[[], int]) -> None:
    number = next(numbers)
    first = component_of(numbered(Scaled(), number), SAMPLE)
    (node,) = placeholders(first.graph)
    assert int(node.meta["val"].shape[0]) == 2  # asking for the number makes it one
    again = component_of(numbered(Scaled(), number), SAMPLE)
    assert n_traces() == 2
    assert again.inputs[0].shape == ("batch", 4)
    assert again.outputs[0].shape == ("batch", 4)


def test_modules_that_cannot_be_read_or_are_large_are_traced_every_time() -> None:
    made: list[int] = []

    def trace() -> fx.GraphModule:
        made.append(1)
        return component_of(Scaled(), SAMPLE).graph

    unreadable = Scaled()
    unreadable.source = (number for number in (1, 2))  # type: ignore[assignment]
    large = nn.Linear(MAX_BYTES // 4, 1)
    for module in (unreadable, unreadable, large, large):
        traced_once(module, (SAMPLE,), trace, how=None)
    assert len(made) == 4
