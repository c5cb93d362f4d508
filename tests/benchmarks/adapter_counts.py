"""Parameters of low-rank adapters at real size, counted on programs without weights: what the papers print.

Source: Lily (arXiv 2407.09946), its tables; the fine print is in the tests that read this.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vlmopt.core.contract import Context, Plan
from vlmopt.graph.example import program_of
from vlmopt.registry import make_pass


class Stack(nn.Module):
    """Layers of Linears of these shapes (name -> width in, width out), as many as a real model has."""

    def __init__(self, n_layers: int, shapes: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in shapes.items()})
            for _ in range(n_layers)
        )
        self.widths = {name: d_in for name, (d_in, _) in shapes.items()}

    def forward(self, x: Tensor) -> Tensor:
        total = x.sum()
        for layer in self.layers:
            for name, width in self.widths.items():
                total = total + layer[name](x[:, :width]).sum()  # type: ignore[index]
        return x + total


QKV = {"q": (4096, 4096), "k": (4096, 1024), "v": (4096, 1024)}
LLAMA_MLP = {"gate": (3072, 8192), "up": (3072, 8192), "down": (8192, 3072)}
COUNTS: dict[str, tuple[int, dict[str, tuple[int, int]], dict[str, Any], int]] = {
    "commonsense": (32, QKV, {"rank": 16, "stride": 8, "experts": 4}, 1_185_792),
    "state space": (64, {"in_proj": (4096, 16384)}, {"rank": 40, "stride": 16, "experts": 4}, 3_287_040),
    "mathematics, FFN": (28, LLAMA_MLP, {"rank": 140, "stride": 14, "experts": 2}, 9_485_280),
    "mathematics, attention": (
        28, {"q": (3072, 3072), "v": (3072, 1024)}, {"rank": 896, "stride": 14, "experts": 2}, 18_450_432
    ),
    "sentences": (12, {"q": (768, 768), "v": (768, 768)}, {"rank": 32, "stride": 4, "experts": 3}, 297_216),
}  # fmt: skip


def lily_plan(name: str, mixture: str) -> Plan:
    """Where Lily goes in one of the counted models."""
    n_layers, shapes, options, _ = COUNTS[name]
    with FakeTensorMode(allow_non_fake_inputs=True):
        program = program_of(Stack(n_layers, shapes), torch.ones(2, max(width for width, _ in shapes.values())))
    made: dict[str, Any] = {**options, "kind": "lily", "mixture": mixture, "modules": ["*"]}
    return make_pass("insert-low-rank-adapter", made).plan(program, Context())


def lily_counts() -> dict[str, float]:
    """The parameters of every counted model."""
    found: dict[str, float] = {}
    for name in COUNTS:
        plan = lily_plan(name, "routed")
        figure = "lily_" + name.replace(", ", "_").replace(" ", "_").lower()
        found[figure] = float(-sum(site.saving.parameters for site in plan.sites))
    return found
