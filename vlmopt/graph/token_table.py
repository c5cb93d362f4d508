"""Functions of single tokens, evaluated once for every word: `E'[v] = E[v] + f(E[v])`.

A value [B, N, D] behind an embedding is such a function where nothing between ids and value looks at another token or
at a place: the values are then rows of a table, which is as large as the embedding's whatever was computed.
"""

from __future__ import annotations

import torch
from torch import fx, nn

from vlmopt.graph.canonical import drop_dead_nodes
from vlmopt.graph.modules import clone_graph, free_path, get_at, has_path, output_node, set_at
from vlmopt.graph.text import operation_text

aten = torch.ops.aten

_WORDS_AT_ONCE = 8192
_LEAVES = (nn.Linear, nn.LayerNorm)
_SINGLE = {  # the value at a place follows from the operands' at that place
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.silu.default, aten.relu.default,
    aten.gelu.default, aten.tanh.default, aten.sigmoid.default, aten._to_copy.default, aten.to.dtype,
}  # fmt: skip


def token_embedding(module: fx.GraphModule, value: fx.Node) -> fx.Node | str:
    """The call of the one Embedding that the value is a function of, token by token, or why it is none."""
    order = {node: i for i, node in enumerate(module.graph.nodes)}
    above, pending = set[fx.Node](), [value]
    while pending:
        node = pending.pop()
        if node not in above:
            above.add(node)
            pending += [] if _is_embedding(module, node) else node.all_input_nodes
    calls = [node for node in above if _is_embedding(module, node)]
    if len(calls) != 1:
        return f"it is made of {len(calls)} embeddings" if calls else "it is made of no embedding"
    if calls[0].all_input_nodes[0].op != "placeholder":
        return "its ids are computed in the graph"
    for node in sorted(above - set(calls), key=order.__getitem__):
        if not _is_single(module, node):
            return f"a {operation_text(module, node)} ({node.name}) is part of it, which is no map of single tokens"
    return calls[0]


def _is_embedding(module: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(get_at(module, str(node.target)), nn.Embedding)


def _is_single(module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(get_at(module, str(node.target)), _LEAVES)
    if node.op == "get_attr":
        return int(node.meta["val"].dim()) <= 1  # one number, or one for each feature
    return node.op == "call_function" and node.target in _SINGLE


def value_table(module: fx.GraphModule, call: fx.Node, value: fx.Node) -> torch.Tensor:
    """The value of every word, [V, D]."""
    clone = clone_graph(module)
    names = {node.name: node for node in clone.graph.nodes}
    ids = names[call.all_input_nodes[0].name]
    output_node(clone).args = ((names[value.name],),)
    drop_dead_nodes(clone)
    clone.recompile()
    leaf = get_at(module, str(call.target))
    assert isinstance(leaf, nn.Embedding)
    words = torch.arange(leaf.num_embeddings, device=leaf.weight.device)
    others = [node for node in clone.graph.nodes if node.op == "placeholder"]
    rows = []
    with torch.no_grad():
        for some in torch.split(words, _WORDS_AT_ONCE):
            rows.append(clone(*(some[None] if node is ids else None for node in others))[0][0])
    return torch.cat(rows)


def put_table(module: fx.GraphModule, call: fx.Node, value: fx.Node, table: torch.Tensor) -> None:
    """Lets all that read the value read rows of the table instead; dead code is gone afterwards."""
    leaf, old = nn.Embedding(len(table), table.shape[1], device="meta"), str(call.target)
    leaf.weight = nn.Parameter(table, requires_grad=False)
    path = free_path(module, old)
    set_at(module, path, leaf.train(False))
    with module.graph.inserting_before(call.next):
        made = module.graph.call_module(path, (call.all_input_nodes[0],))
    made.meta["val"] = value.meta["val"]
    value.replace_all_uses_with(made)
    drop_dead_nodes(module)
    if not has_path(module, old):  # nothing reads the old table here any more
        set_at(module, old, leaf)
        made.target = old
        drop_dead_nodes(module)
