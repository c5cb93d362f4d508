"""Folds chains beside a layer into it: who else needs the old weight, what is saved, and the edit itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import is_fake

from vlmopt.core.cost import Cost
from vlmopt.core.program import Program
from vlmopt.graph.costing import nodes_cost, weights_of
from vlmopt.graph.head import fitted_linear
from vlmopt.graph.marks import hand_marks_on
from vlmopt.graph.modules import get_at, set_at
from vlmopt.graph.parallel import ParallelFold, collapsing

Readers = Mapping[int, set[tuple[str, fx.Node]]]  # identity of a weight -> components and nodes that read it


def weight_readers(program: Program) -> Readers:
    """Who reads each weight of the program."""
    readers: dict[int, set[tuple[str, fx.Node]]] = {}
    for name, part in program.components.items():
        for node in part.graph.graph.nodes:
            for weight in weights_of(part.graph, node):
                readers.setdefault(id(weight), set()).add((name, node))
    return readers


def alike(folds: Sequence[ParallelFold]) -> list[list[ParallelFold]]:
    """The folds, those together that give one layer the same weight: a layer of a traversal is called again, with the
    same chains beside it.
    """
    by_path: dict[str, list[ParallelFold]] = {}
    for fold in folds:
        by_path.setdefault(fold.path, []).append(fold)
    found: list[list[ParallelFold]] = []
    for own in by_path.values():
        found += [own] if len(own) == 1 or _is_one_weight(own) else [[fold] for fold in own]
    return found


def _is_one_weight(folds: Sequence[ParallelFold]) -> bool:
    with torch.no_grad():
        first, *others = [fold.map.values() for fold in folds]
    if any(not isinstance(part, Tensor) or part.is_meta or is_fake(part) for part in first if part is not None):
        return False
    return all(
        (mine is None) is (its is None) and (mine is None or torch.equal(mine, its))  # type: ignore[arg-type]
        for other in others
        for mine, its in zip(first, other, strict=True)
    )


def why_shared(module: fx.GraphModule, component: str, folds: Sequence[ParallelFold], readers: Readers) -> str:
    """Who else reads the weights of the layer that these give one weight, and stays, so that the old ones would have to
    be kept; empty where nobody."""
    going = {(component, node) for node in (*(fold.layer for fold in folds), *gone_nodes(module, folds))}
    others = {reader for weight in weights_of(module, folds[0].layer) for reader in readers[id(weight)]} - going
    if not others:
        return ""
    name, node = min(others, key=lambda reader: (reader[0], reader[1].name))
    return f"{name}/{node.name} reads the weight of its base too, which would have to stay"


def gone_nodes(module: fx.GraphModule, folds: Sequence[ParallelFold]) -> set[fx.Node]:
    """The nodes that die when all these folds are applied."""
    layers, scaled = {fold.layer for fold in folds}, {fold.own.node for fold in folds} - {fold.layer for fold in folds}
    dropped = {term.node for fold in folds for term in fold.chains}
    gone: set[fx.Node] = {holder for fold in folds for holder in collapsing(fold.total, dropped)} | scaled
    kept = {node for holder in gone - scaled for node in holder.all_input_nodes} - dropped - gone | layers
    for node in reversed(module.graph.nodes):
        if node not in kept and node.op not in ("placeholder", "output") and node.users and set(node.users) <= gone:
            gone.add(node)
    return gone


def fold_savings(
    program: Program, component: str, groups: Sequence[Sequence[ParallelFold]], readers: Readers
) -> list[Cost]:
    """What each group of folds that are alike saves when all are applied in this order; a weight that chains share goes
    with the last one."""
    part = program.components[component]
    module, gone, costs = part.graph, set[fx.Node](), list[Cost]()
    for i, group in enumerate(groups):
        now = gone_nodes(module, [fold for before in groups[: i + 1] for fold in before])
        own = {(component, node) for node in now}
        fresh = [node for node in module.graph.nodes if node in now - gone]
        read = {id(w): w for node in fresh for w in weights_of(module, node)}
        freed = {key: weight for key, weight in read.items() if readers[key] <= own}
        cost = nodes_cost(part, fresh, program.dims, seen=set(read))
        n, n_bytes = sum(w.numel() for w in freed.values()), sum(w.numel() * w.element_size() for w in freed.values())
        costs.append(cost + Cost(n, n_bytes) - _grown(module, group[0]))
        gone = now
    return costs


def _grown(module: fx.GraphModule, fold: ParallelFold) -> Cost:
    """The bias that the layer did not have before."""
    leaf = get_at(module, fold.path)
    if isinstance(leaf, nn.Embedding) or not fold.map.has_shift or getattr(leaf, "bias", None) is not None:
        return Cost()
    assert isinstance(leaf, nn.Linear | nn.Conv2d)
    return Cost(fold.map.width, fold.map.width * leaf.weight.element_size())


def apply_parallel(module: fx.GraphModule, folds: Sequence[ParallelFold]) -> None:
    """Puts the new layer in the old one's place and takes the chains of folds that are alike out of their sums; dead
    code is left behind."""
    first = folds[0]
    leaf = get_at(module, first.path)
    assert isinstance(leaf, nn.Linear | nn.Conv2d | nn.Embedding)
    with torch.no_grad():
        matrix, shift = first.map.values()
    assert isinstance(matrix, Tensor)
    set_at(module, first.path, _layer(leaf, matrix, shift))
    for fold in folds:
        _drop_chains(fold)


def _drop_chains(fold: ParallelFold) -> None:
    dropped = {term.node for term in fold.chains}
    for holder in collapsing(fold.total, dropped):  # the inner ones first
        rest = [operand for operand in holder.all_input_nodes if operand not in dropped]
        if rest:  # else all of it goes, with the sum that reads it
            hand_marks_on(holder, rest[0])
            holder.replace_all_uses_with(rest[0])
        else:
            dropped.add(holder)
    if fold.own.node is not fold.layer:
        fold.own.node.replace_all_uses_with(fold.layer)


def _layer(leaf: nn.Linear | nn.Conv2d | nn.Embedding, matrix: Tensor, shift: Tensor | None) -> nn.Module:
    """A layer of the old one's kind and shape with this matrix [D, K] and shift [D]."""
    if isinstance(leaf, nn.Linear):
        return fitted_linear(matrix, shift, like=leaf.weight)
    if isinstance(leaf, nn.Embedding):
        table = matrix.T if shift is None else matrix.T + shift
        made: nn.Embedding | nn.Conv2d = nn.Embedding(leaf.num_embeddings, leaf.embedding_dim, device="meta")
        made.weight = nn.Parameter(table.to(leaf.weight).contiguous(), requires_grad=False)
        return made.train(False)
    made = nn.Conv2d(
        leaf.in_channels, leaf.out_channels, leaf.kernel_size, leaf.stride, leaf.padding, leaf.dilation,  # type: ignore[arg-type]
        leaf.groups, bias=shift is not None, device="meta",
    )  # fmt: skip
    dense = matrix.reshape(leaf.out_channels, leaf.in_channels, *leaf.kernel_size)
    made.weight = nn.Parameter(_grouped(dense, leaf.groups).to(leaf.weight).contiguous(), requires_grad=False)
    if shift is not None:
        made.bias = nn.Parameter(shift.to(leaf.weight).contiguous(), requires_grad=False)
    return made.train(False)


def _grouped(dense: Tensor, groups: int) -> Tensor:
    """The blocks on the diagonal of a dense kernel, one above another."""
    n_out, n_in = dense.shape[0] // groups, dense.shape[1] // groups
    blocks = [dense[g * n_out : (g + 1) * n_out, g * n_in : (g + 1) * n_in] for g in range(groups)]
    return torch.cat(blocks)
