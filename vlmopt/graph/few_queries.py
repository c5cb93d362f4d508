"""Attentions with few queries: what moves the maps of keys and values over to the queries' side.

Of a head with queries q [n, d], tokens x [T, D], maps `k = x Wk + ck` and `v = x Wv + cv`:

    softmax(s q k^T) v  =  softmax((s q Wk^T) x^T) x Wv + cv

since `s q ck` is the same for all tokens, which a softmax does not see, and weights of a softmax sum to one. On the
left the maps take `T D d` products each, on the right `n D d` and `n D T`; for one query of 65 tokens a thirtieth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from vlmopt.graph.build import insert_call
from vlmopt.graph.constants import constant_nodes, evaluate_constant
from vlmopt.graph.heads import SDPA
from vlmopt.graph.modules import free_path, get_at, set_at

aten = torch.ops.aten

_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unflatten.int}


@dataclass(frozen=True)
class FewQueries:
    """An attention call with fewer queries than tokens; `keys` and `values` are the calls of its Linears."""

    call: fx.Node
    queries: fx.Node
    keys: fx.Node
    values: fx.Node
    mask: fx.Node | None
    scale: float

    @property
    def n_queries(self) -> int:
        return int(self.queries.meta["val"].shape[2])

    @property
    def n_heads(self) -> int:
        return int(self.queries.meta["val"].shape[1])


def find_few_queries(module: fx.GraphModule) -> tuple[list[FewQueries], dict[str, str]]:
    """Attentions whose maps can move, and of others with fewer queries than tokens, by name, why they cannot."""
    found: list[FewQueries] = []
    reasons: dict[str, str] = {}
    for node in module.graph.nodes:
        if node.target is SDPA and _has_few_queries(node):
            one = _recognised(module, node)
            if isinstance(one, str):
                reasons[node.name] = one
            else:
                found.append(one)
    return found, reasons


def _has_few_queries(call: fx.Node) -> bool:
    shapes = [operand.meta["val"].shape for operand in call.args[:2] if isinstance(operand, fx.Node)]
    sizes = [shape[-2] for shape in shapes]
    return all(len(shape) == 4 for shape in shapes) and all(isinstance(n, int) for n in sizes) and sizes[0] < sizes[1]


def _recognised(module: fx.GraphModule, call: fx.Node) -> FewQueries | str:
    queries, keys, values, *rest = call.args
    given = dict(zip(("attn_mask", "dropout_p", "is_causal"), rest, strict=False)) | dict(call.kwargs)
    mask, scale = given.get("attn_mask"), given.get("scale")
    if given.get("is_causal") or given.get("dropout_p"):
        return "its mask is made inside of the attention call"
    if isinstance(scale, fx.Node):
        return "its scale is computed"
    if isinstance(mask, fx.Node) and _hides_nothing(module, mask):
        mask = None
    if isinstance(mask, fx.Node) and not mask.meta["val"].is_floating_point():
        return "its mask may hide all tokens from a query, whose weights then sum to nothing"
    assert isinstance(queries, fx.Node)
    if queries.meta["val"].dtype not in (torch.float32, torch.float64):
        return f"in {str(queries.meta['val'].dtype).removeprefix('torch.')} scores in another order are too far off"
    maps = [_map_of(module, one, queries) for one in (keys, values) if isinstance(one, fx.Node)]
    said = next((one for one in maps if isinstance(one, str)), None)
    if said is not None:
        return said
    own_keys, own_values = (one for one in maps if isinstance(one, fx.Node))
    factor = scale if isinstance(scale, int | float) else 1.0 / math.sqrt(int(queries.meta["val"].shape[3]))
    return FewQueries(call, queries, own_keys, own_values, mask if isinstance(mask, fx.Node) else None, factor)


def _hides_nothing(module: fx.GraphModule, mask: fx.Node) -> bool:
    """Whether a mask is true everywhere, whatever the inputs."""
    while mask.target in (aten.expand.default, aten.slice.Tensor):
        mask = mask.all_input_nodes[0]
    if mask.meta["val"].dtype is not torch.bool or mask not in constant_nodes(module):
        return False
    return bool(evaluate_constant(module, mask).all())


def _map_of(module: fx.GraphModule, heads: fx.Node, queries: fx.Node) -> fx.Node | str:
    """The call of the Linear whose columns, apart by heads, are keys or values [B, H, T, d]; or why there is none."""
    view = next(iter(heads.all_input_nodes), heads)  # keys that come from outside have nothing above them
    own = next(iter(view.all_input_nodes), view)
    shape, n_heads = heads.meta["val"].shape, queries.meta["val"].shape[1]
    unknown = "its keys or values are more than a Linear apart by heads (turned by their place, or repeated)"
    if heads.target is not aten.transpose.int or {int(axis) % 4 for axis in heads.args[1:]} != {1, 2}:  # type: ignore[arg-type]
        return unknown
    if view.target not in _VIEWS or own.op != "call_module" or shape[1] != n_heads:
        return unknown
    leaf = get_at(module, str(own.target))
    if not isinstance(leaf, nn.Linear):
        return f"{own.target} is a {type(leaf).__name__}, whose weight is not at hand"
    if own.meta["val"].dim() != 3 or leaf.out_features != shape[1] * shape[3] or own.meta["val"].shape[1] != shape[2]:
        return unknown
    if any(len(node.users) > 1 for node in (heads, view, own)):
        return f"what {own.target} computes is read elsewhere, too"
    return own


def move_maps(module: fx.GraphModule, one: FewQueries) -> None:
    """Puts the maps of keys and values on the queries' side, in place; what computed them is dead then."""
    (seen,), (mixed,) = one.keys.all_input_nodes, one.values.all_input_nodes
    keys, values = (_leaf(module, node) for node in (one.keys, one.values))
    by_head = [one.n_heads, -1, keys.in_features]
    own_keys = (keys.weight.detach() * one.scale).reshape(by_head)  # [H, d, D]
    own_values = values.weight.detach().reshape([one.n_heads, -1, values.in_features]).transpose(1, 2)  # [H, D, d]

    def call(target: Any, *args: Any) -> fx.Node:
        return insert_call(module, target, args)

    with module.graph.inserting_before(one.call):
        asked = call(aten.matmul.default, one.queries, _stored(module, one.keys, own_keys, keys.weight))
        asked = call(aten.flatten.using_ints, asked, 1, 2)  # [B, H n, D]
        scores = call(aten.matmul.default, asked, call(aten.transpose.int, seen, 1, 2))
        if one.mask is not None:
            apart = call(aten.unflatten.int, scores, 1, [one.n_heads, one.n_queries])
            scores = call(aten.flatten.using_ints, call(aten.add.Tensor, apart, one.mask), 1, 2)
        weights = call(aten.softmax.int, scores, -1)  # [B, H n, T]
        read = call(aten.unflatten.int, call(aten.matmul.default, weights, mixed), 1, [one.n_heads, one.n_queries])
        made = call(aten.matmul.default, read, _stored(module, one.values, own_values, values.weight))
        if values.bias is not None:
            bias = values.bias.detach().reshape(one.n_heads, 1, -1)
            made = call(aten.add.Tensor, made, _stored(module, one.values, bias, values.bias, name="bias"))
    one.call.replace_all_uses_with(made)
    module.graph.erase_node(one.call)


def _leaf(module: fx.GraphModule, node: fx.Node) -> nn.Linear:
    leaf = get_at(module, str(node.target))
    assert isinstance(leaf, nn.Linear)
    return leaf


def _stored(module: fx.GraphModule, node: fx.Node, value: Tensor, like: Tensor, *, name: str = "weight") -> fx.Node:
    """A parameter by heads beside the Linear that it was of, read at the graph's present place."""
    path = free_path(module, f"{node.target}_by_head.{name}")
    set_at(module, path, nn.Parameter(value.contiguous(), requires_grad=like.requires_grad))
    made = module.graph.create_node("get_attr", path)
    sizes: Sequence[int] = value.shape
    made.meta["val"] = node.meta["val"].new_empty(sizes)
    return made
