"""Smallest programs, made from any `nn.Module`: what the cases of passes and the tests are built from."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.export import Dim as ExportDim

from vlmopt.core.program import Assembly, Component, Dim, ModelSource, Program, TensorSpec
from vlmopt.graph.branches import find_branches
from vlmopt.graph.canonical import drop_dead_nodes
from vlmopt.graph.head import find_head
from vlmopt.graph.modules import get_at, output_values, placeholders
from vlmopt.graph.raising import raise_program
from vlmopt.graph.regions import skip_branch
from vlmopt.graph.traces import traced_once

DIMS = {"batch": Dim("batch", 1, 64, 1)}


def component_of(
    module: nn.Module, *samples: Tensor, name: str = "model", raw: bool = False, output: str = "output"
) -> Component:
    """A component with a dynamic first axis ("batch") on every input; `raw` leaves dead code and assertions in."""
    graph = traced_once(module.eval(), samples, lambda: _traced(module, samples, raw=raw), how=raw)
    inputs = tuple(
        TensorSpec(node.name, ("batch", *sample.shape[1:]), _dtype(sample))
        for node, sample in zip(placeholders(graph), samples, strict=True)
    )
    outputs = tuple(
        TensorSpec(output if i == 0 else f"{output}_{i}", _shape(node.meta["val"]), _dtype(node.meta["val"]))
        for i, node in enumerate(output_values(graph))
    )
    return Component(name, graph, inputs, outputs)


def _traced(module: nn.Module, samples: tuple[Tensor, ...], *, raw: bool) -> fx.GraphModule:
    batch = ExportDim("batch", min=1, max=64)
    dynamic = tuple({0: batch} for _ in samples)
    with torch.no_grad():
        exported = torch.export.export(module, samples, dynamic_shapes=dynamic, strict=False)
    return raise_program(exported, is_canonical=not raw)


def program_of(module: nn.Module, *samples: Tensor, raw: bool = False) -> Program:
    """A fused program of one component named `model`."""
    return program_from({"model": component_of(module, *samples, raw=raw)}, Assembly.FUSED)


def program_from(components: dict[str, Component], assembly: Assembly) -> Program:
    """A program of ready components; a final Linear counts as the head."""
    heads = {name: head for name, part in components.items() if (head := find_head(part)) is not None}
    return Program(assembly, components, DIMS, ModelSource("example", "example", "Example", ""), heads=heads)


def without_branches(program: Program, *names: str) -> Program:
    """The program, edited: these branches are skipped, in this order, in every component that has them."""
    for component in program.components.values():
        for name in names:
            for branch in find_branches(component.graph):
                if branch.name == name:
                    skip_branch(component.graph, branch)
                    drop_dead_nodes(component.graph)
    return program


def two_towers(*, text_width: int = 8) -> Program:
    """A dual program whose projections read [B, 8], and [B, text_width] of texts."""
    parts = {
        name: component_of(ResidualBlocks(blocks=1, width=width), torch.ones(2, width), name=name)
        for name, width in (("image_encoder", 8), ("text_encoder", text_width))
    }
    return program_from(parts, Assembly.DUAL)


def eyes_and_words(*, is_tied: bool = False) -> Program:
    """The parts of a model that writes text which lie in front of its decoder, and what reads the words again: patches
    [B, 4, 6] to features [B, 4, 8], ids of sixteen words [B, 3] to embeddings [B, 3, 8], and those to logits.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        eyes, words, head = nn.Linear(6, 8), nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
    parts = (
        component_of(_Single(eyes), torch.ones(2, 4, 6), name="vision_encoder", output="image_features"),
        component_of(_Single(words), torch.arange(6).reshape(2, 3), name="embed_tokens", output="inputs_embeds"),
        component_of(_Single(head), torch.ones(2, 3, 8), name="decoder_model_merged", output="logits"),
    )
    if is_tied:
        table, output = (get_at(parts[i].graph, "layer") for i in (1, 2))
        assert isinstance(table, nn.Embedding)
        assert isinstance(output, nn.Linear)
        output.weight = table.weight
    program = program_from({part.name: part for part in parts}, Assembly.GENERATIVE)
    program.heads.clear()  # no task fits the words of a language
    return program


def _shape(value: Tensor) -> tuple[int | str, ...]:
    return tuple(dim if isinstance(dim, int) else "batch" for dim in value.shape)


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


class _Single(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


class ResidualBlocks(nn.Module):
    """Pre-norm residual FFN blocks and a linear head: the smallest model with branches. [B, width] -> [B, classes]."""

    def __init__(self, *, blocks: int = 2, width: int = 8, classes: int = 3, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.ModuleList(
                nn.ModuleDict(
                    {
                        "norm": nn.LayerNorm(width),
                        "up": nn.Linear(width, 2 * width),
                        "down": nn.Linear(2 * width, width),
                    }
                )
                for _ in range(blocks)
            )
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["down"](torch.relu(layer["up"](layer["norm"](x))))  # type: ignore[index]
        return self.head(self.norm(x))  # type: ignore[no-any-return]


class AttentionBlocks(nn.Module):
    """Pre-norm blocks of self-attention and FFN, and a linear head: [B, N, width] -> [B, N, classes].

    Branches: `layers.I.attention` and `layers.I.ffn`.
    """

    def __init__(self, *, blocks: int = 2, width: int = 8, classes: int = 3, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.ModuleList(_AttentionBlock(width) for _ in range(blocks))
            self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)  # type: ignore[no-any-return]


class _AttentionBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value", "out")})
        self.ffn = nn.ModuleDict({"up": nn.Linear(width, 2 * width), "down": nn.Linear(2 * width, width)})
        self.norm_before, self.norm_between = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm_before(x)
        query, key, value = (self.attention[name](n) for name in ("query", "key", "value"))
        x = x + self.attention["out"](nn.functional.scaled_dot_product_attention(query, key, value))
        n = self.norm_between(x)
        return x + self.ffn["down"](torch.relu(self.ffn["up"](n)))  # type: ignore[no-any-return]


class GroupedHeads(nn.Module):
    """Pre-norm blocks of causal self-attention with heads, and a linear head: [B, N, width] -> [B, N, classes].

    Branches: `layers.I.attention`. Heads of keys are shared by groups of queries; `is_fused` is one attention call,
    otherwise product, scale, mask, softmax and product are spelled out.
    """

    def __init__(
        self,
        *,
        blocks: int = 2,
        width: int = 8,
        heads: int = 4,
        key_heads: int = 2,
        is_fused: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            made = (_HeadsBlock(width, heads, key_heads, is_fused=is_fused) for _ in range(blocks))
            self.layers = nn.ModuleList(made)
            self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)  # type: ignore[no-any-return]


class _HeadsBlock(nn.Module):
    def __init__(self, width: int, heads: int, key_heads: int, *, is_fused: bool) -> None:
        super().__init__()
        self.width, self.n_groups, self.is_fused = width // heads, heads // key_heads, is_fused
        sizes = {"query": heads, "key": key_heads, "value": key_heads}
        parts = {name: nn.Linear(width, n * self.width) for name, n in sizes.items()}
        self.attention = nn.ModuleDict({**parts, "out": nn.Linear(width, width)})
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        query, key, value = (
            self.attention[name](n).unflatten(-1, (-1, self.width)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        if self.n_groups > 1:
            key, value = (t[:, :, None].expand(-1, -1, self.n_groups, -1, -1).flatten(1, 2) for t in (key, value))
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        if self.is_fused:
            mixed = nn.functional.scaled_dot_product_attention(query, key, value, mask)
        else:
            scores = query @ key.transpose(-2, -1) * self.width**-0.5
            mixed = scores.masked_fill(~mask, torch.finfo(x.dtype).min).softmax(-1) @ value
        return x + self.attention["out"](mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]
