"""Drawings for tests: blocks of a transformer, and graphs at random."""

from __future__ import annotations

import random

from vlmopt.core.drawing import Drawing, DrawnNode, NodeKind

BLOCK = 20  # boxes
_MODULES = ("norm", "proj", "fc")


class Builder:
    """Boxes and edges of one drawing."""

    def __init__(self) -> None:
        self.nodes: list[DrawnNode] = []
        self.edges: list[tuple[str, str]] = []

    def add(self, name: str, *operands: str, group: str = "", follows: str = "", kind: NodeKind | None = None) -> str:
        if kind is None:
            kind = NodeKind.MODULE if any(word in name for word in _MODULES) else NodeKind.OPERATION
        detail = (f"{group}.{name}", "float32[batch, 8]")
        self.nodes.append(DrawnNode(name, f"{name}\nfloat32[batch, 8]", group, detail, kind=kind, follows=follows))
        self.edges += [(operand, name) for operand in operands]
        return name


def transformer(layers: int, *, title: str = "encoder") -> Drawing:
    """Blocks as a real graph has them: attention beside the stream, then an FFN; all layers read the size of x."""
    build = Builder()
    stream = build.add("x", kind=NodeKind.INPUT)
    build.add("size", "x", kind=NodeKind.SIZE)
    for i in range(layers):
        stream = block(build, i, stream)
    build.add("output", stream, kind=NodeKind.OUTPUT)
    return Drawing(title, tuple(build.nodes), tuple(build.edges))


def block(build: Builder, i: int, stream: str) -> str:
    """Adds one layer; the name of its last sum."""
    layer, attn, mlp = (f"encoder.layers.{i}{part}" for part in ("", ".attn", ".mlp"))
    norm = build.add(f"norm1_{i}", stream, group=layer)
    heads = []
    for name in "qkv":
        projected = build.add(f"{name}_proj_{i}", norm, group=attn)
        view = build.add(f"{name}_view_{i}", projected, "size", group=attn, kind=NodeKind.VIEW)
        heads.append(build.add(f"{name}_turn_{i}", view, group=attn, kind=NodeKind.VIEW))
    mixed = build.add(f"attention_{i}", *heads, group=attn)
    joined = build.add(f"join_{i}", mixed, "size", group=attn, kind=NodeKind.VIEW)
    out = build.add(f"out_proj_{i}", joined, group=attn)
    middle = build.add(f"add1_{i}", stream, out, group=layer, kind=NodeKind.SUM, follows=stream)
    norm = build.add(f"norm2_{i}", middle, group=layer)
    up = build.add(f"fc1_{i}", norm, group=mlp)
    gate = build.add(f"sigmoid_{i}", up, group=mlp)
    product = build.add(f"mul_{i}", up, gate, group=mlp)
    down = build.add(f"fc2_{i}", product, group=mlp)
    return build.add(f"add2_{i}", middle, down, group=layer, kind=NodeKind.SUM, follows=middle)


def at_random(seed: int, n_nodes: int) -> Drawing:
    """Any graph without circles, with modules that do and do not hang together."""
    generator = random.Random(seed)
    kinds = list(NodeKind)
    groups = ["", "a", "a.0", "a.0.b", "a.1", "c", "c.d"]
    nodes, edges = [], []
    for i in range(n_nodes):
        label = "x" * generator.randint(1, 45) + ("\nfloat32[1]" if generator.random() < 0.5 else "")
        nodes.append(DrawnNode(f"n{i}", label, generator.choice(groups), kind=generator.choice(kinds)))
        n_operands = min(i, generator.choice([0, 1, 1, 1, 2, 3]))
        edges += [(f"n{j}", f"n{i}") for j in generator.sample(range(i), n_operands)]
    return Drawing(f"random {seed}", tuple(nodes), tuple(edges))
