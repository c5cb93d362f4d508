"""Reads of one token: what in front of them can be computed for it alone, and that it is the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vlmopt.graph.example import component_of
from vlmopt.graph.modules import output_node
from vlmopt.graph.replay import run_component
from vlmopt.graph.token_reads import find_token_reads, read_early

SAMPLE = torch.linspace(-1, 1, 80).reshape(2, 5, 8)


class Read(nn.Module):
    """A Linear on every token, then what a test says. [B, 5, 8]."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        match self.kind:
            case "last":
                return y[:, -1]
            case "slice":
                return y[:, 2:3].flatten(1)
            case "two":
                return y[:, 1:3].flatten(1)
            case "turned":
                return y.transpose(1, 2)[:, :, 3]
            case "channel":
                return y[:, :, 3]
            case "heads":
                return y.unflatten(-1, (2, 4)).transpose(1, 2).relu()[:, :, 4].flatten(1)
            case "constant":
                return (y * torch.arange(5.0)[:, None])[:, 3]
            case "softmax":
                return y.softmax(1)[:, 0]
            case "sum":
                return (y + y.mean(1, keepdim=True))[:, 0]
        raise AssertionError(self.kind)


@pytest.mark.parametrize("kind", ["last", "slice", "turned", "heads", "constant"])
def test_a_layer_in_front_of_a_read_is_called_for_one_token(kind: str) -> None:
    component = component_of(Read(kind), SAMPLE)
    wanted = run_component(component, [{"x": SAMPLE}])
    ((read,), _) = find_token_reads(component.graph)
    assert read.n_tokens == 5
    read_early(component.graph, read)
    component.graph.recompile()
    component.graph.graph.lint()
    (linear,) = (node for node in component.graph.graph.nodes if node.op == "call_module")
    assert [str(size) for size in linear.meta["val"].shape[1:]] == ["1", "8"]
    assert torch.allclose(run_component(component, [{"x": SAMPLE}]), wanted, atol=1e-6)
    assert output_node(component.graph).all_input_nodes
    assert find_token_reads(component.graph)[0] == []


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("two", None),  # several tokens are no read of one
        ("channel", None),  # a number of every token
        ("softmax", "softmax in front of it looks across tokens"),
        ("sum", None),  # the addition runs for one token, but nothing that is worth it
    ],
)
def test_a_layer_whose_tokens_are_all_needed_stays(kind: str, reason: str | None) -> None:
    found, reasons = find_token_reads(component_of(Read(kind), SAMPLE).graph)
    assert found == []
    assert reason is None or list(reasons.values()) == [reason]
