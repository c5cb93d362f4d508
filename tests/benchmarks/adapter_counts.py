"""Parameters of adapters at real size, counted on programs without weights: what the papers print.

Sources: the tables of Lily (arXiv 2407.09946), TroL (2406.12246) and Phantom (2409.14713); of CROME (2408.06610) only
"about 5 M" is known. The fine print is in the tests that read this.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vlmopt.core.contract import Context, Plan
from vlmopt.core.program import Assembly, Program
from vlmopt.graph.assembled import EMBEDDING, VISION
from vlmopt.graph.example import GroupedHeads, ResidualBlocks, component_of, program_from, program_of
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


def figure_name(name: str) -> str:
    """The name of a counted model as figures have it."""
    return name.replace(", ", "_").replace(" ", "_").lower()


def lily_counts() -> dict[str, float]:
    """The parameters of every counted model."""
    found: dict[str, float] = {}
    for name in COUNTS:
        plan = lily_plan(name, "routed")
        found[f"lily_{figure_name(name)}"] = float(-sum(site.saving.parameters for site in plan.sites))
    return found


def counted(program: Program, name: str, **options: object) -> tuple[int, float]:
    """Sites of a pass and the parameters that it adds to a program."""
    plan = make_pass(name, options).plan(program, Context())
    return len(plan.sites), float(-sum(site.saving.parameters for site in plan.sites))


GATES = {"1_8b": (24, 2048), "3_8b": (32, 3072), "7b": (32, 4096)}  # layers, width


def traversed(size: str) -> Program:
    """Layers as many and as wide as those of one of TroL's models."""
    n_layers, width = GATES[size]
    with FakeTensorMode(allow_non_fake_inputs=True):
        return program_of(ResidualBlocks(blocks=n_layers, width=width), torch.ones(2, width))


PHANTOMS = {  # width of a head, heads, heads of keys, layers, parameters as printed
    "0_5b": (64, 14, 2, 24, 1.2e6),
    "1_8b": (128, 16, 8, 24, 4.8e6),
    "3_8b": (96, 32, 32, 32, 3.7e6),
    "7b": (128, 32, 8, 32, 6.2e6),
}


def attentive(size: str) -> Program:
    """Attentions as many and as wide as those of one of Phantom's models."""
    width, n_heads, n_keys, n_layers, _ = PHANTOMS[size]
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = GroupedHeads(blocks=1, width=width * n_heads, heads=n_heads, key_heads=n_keys)
        model.layers = nn.ModuleList([model.layers[0]] * n_layers)  # real layers, of which the graph has one name
        return program_of(model, torch.ones(2, 4, width * n_heads))


class Straight(nn.Module):
    """One layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


def vicuna_7b() -> Program:
    """Features of EVA ViT-G as 32 queries, and the words of Vicuna-7B, both 4096 wide."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        features = Straight(nn.Linear(1408, 4096))
        vision = component_of(features, torch.ones(2, 32, 1408), name=VISION, output="image_features")
        words = Straight(nn.Embedding(32000, 4096))
        embedding = component_of(words, torch.ones(2, 3, dtype=torch.int64), name=EMBEDDING)
        return program_from({VISION: vision, EMBEDDING: embedding}, Assembly.GENERATIVE)


def counts() -> dict[str, float]:
    """Every count of the papers, from graphs."""
    found = lily_counts()
    for size in GATES:
        program = traversed(size)
        for suffix, with_bias in (("", False), ("_with_bias", True)):
            _, n = counted(program, "insert-traversal", start="paper", with_bias=with_bias)
            found[f"trol_{size}{suffix}"] = n
    for size in PHANTOMS:
        found[f"phantom_{size}"] = counted(attentive(size), "insert-phantom", learn_eta=False)[1]
    found["crome_vicuna_7b"] = counted(vicuna_7b(), "insert-cross-modal-adapter", rank=256)[1]
    return found
