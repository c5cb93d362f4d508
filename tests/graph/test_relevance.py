"""Which positions of the stream the features feel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlmopt.graph.example import component_of
from vlmopt.graph.modules import output_values
from vlmopt.graph.relevance import token_relevance


class FirstToken(nn.Module):
    """Two position-wise branches; the output is token 0 and a tenth of token 2. [B, 4, 6] -> [B, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(2))
        for layer in self.layers:
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x[:, 0] + 0.1 * x[:, 2]


def test_positions_count_by_the_square_of_their_gradient() -> None:
    component = component_of(FirstToken(), torch.ones(2, 4, 6))
    (output,) = output_values(component.graph)
    feed = {"x": torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))}
    wanted = torch.tensor([1.0, 0.0, 0.01, 0.0])
    for found in token_relevance(component, output, feed):
        assert torch.allclose(found, wanted / wanted.mean(), atol=1e-6)


def test_a_stream_without_positions_has_one_weight() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.map(x)

    component = component_of(Flat(), torch.ones(2, 6))
    (output,) = output_values(component.graph)
    assert [found.tolist() for found in token_relevance(component, output, {"x": torch.ones(3, 6)})] == [[1.0]]
