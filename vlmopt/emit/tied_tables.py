"""Tables of few bits that an embedding and an output layer share.

`GatherBlockQuantized` and `MatMulNBits` read the same bytes: a row of blocks of levels about one zero point, and a
scale a block; only the shapes differ, [rows, bytes] and [rows, blocks, bytes of a block]. So where a decoder ties the
two, and both were rounded alike, files hold the table once.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace

import torch
from torch import Tensor

from vlmopt.core.program import Component, Program
from vlmopt.emit.onnx_bytes import SMALL_BYTES
from vlmopt.graph.modules import clone_graph, get_at, set_at
from vlmopt.graph.quantized import BlockwiseEmbedding, BlockwiseLinear, quantized_nodes


def with_shared_tables(program: Program) -> Program:
    """The program, its output layers reading the memory of an embedding of another component that holds the same bytes.

    It is the bytes that are compared: the layers are no longer tied once they are quantized, one by one.
    """
    tables = [
        (name, leaf)
        for name, component in program.components.items()
        for _, leaf in _leaves(component)
        if isinstance(leaf, BlockwiseEmbedding)
    ]
    if not tables:
        return program
    made = {
        name: _sharing(component, [table for owner, table in tables if owner != name])
        for name, component in program.components.items()
    }
    return replace(program, components=made)


def shared_tensors(component: Component) -> list[Tensor]:
    """What tables of few bits hold that other components may read too; what is small lies in every graph file."""
    kinds = (BlockwiseEmbedding, BlockwiseLinear)
    leaves = [leaf for _, leaf in _leaves(component) if isinstance(leaf, kinds)]
    return [tensor for leaf in leaves for tensor in (leaf.weight, leaf.scale) if tensor.nbytes >= SMALL_BYTES]


def _leaves(component: Component) -> list[tuple[str, object]]:
    """Each once, with its path: a layer may be called several times."""
    paths = dict.fromkeys(str(node.target) for node in quantized_nodes(component.graph))
    return [(path, get_at(component.graph, path)) for path in paths]


def _sharing(component: Component, tables: list[BlockwiseEmbedding]) -> Component:
    found = {
        path: table
        for path, leaf in _leaves(component)
        if isinstance(leaf, BlockwiseLinear)
        for table in tables
        if _holds_the_same(leaf, table)
    }
    if not found:
        return component
    graph = clone_graph(component.graph)
    for path, table in found.items():
        leaf = get_at(graph, path)
        assert isinstance(leaf, BlockwiseLinear)
        own = copy(leaf)
        own._buffers = dict(leaf._buffers)  # the copy shares its original's otherwise
        own.weight, own.scale = table.weight.view(leaf.weight.shape), table.scale.view(leaf.scale.shape)
        set_at(graph, path, own)
    return replace(component, graph=graph)


def _holds_the_same(leaf: BlockwiseLinear, table: BlockwiseEmbedding) -> bool:
    if (leaf.bits, leaf.block) != (table.bits, table.block) or leaf.scale.dtype != table.scale.dtype:
        return False
    pairs = ((leaf.weight, table.weight), (leaf.scale, table.scale))
    return all(one.numel() == other.numel() and torch.equal(one.flatten(), other.flatten()) for one, other in pairs)
