"""The phantom dimension (arXiv 2409.14713): in an attention every head is twice as wide inside, and no wider outside.

Of each of q, k and v [.., H, d] a module of its own makes a second one, by attention across the heads of token 0:

    y(u, p) = gelu(softmax(gelu(u W_q) gelu(p W_k)^T / sqrt(d)) gelu(p W_v) W_o)    u: H x d of a token, p: of token 0
    q' = eta y(q, q_0)      k' = eta y(k, k_0)      v' = v + eta y(v, v_0)
    A = softmax(s (q k^T + q' k'^T) + mask)         o1 = A v      o2 = A v'
    out = w o1 + (1 - w) o2                         w = exp f(o1) / (exp f(o1) + exp g(o2))

W_q, W_k, W_v, W_o [d, d] without biases, shared by the heads; f and g are Linears to one number, with biases. So a
layer has `12 d^2 + 2 (d + 1)` parameters, and eta is one more where it is learned. Grouped queries: the modules of k
and v act on the heads of keys.

What differs from the released code: `1 - w` is `sigmoid(g(o2) - f(o1))`, where bare exponentials overflow; eta may be
learned; and what is added is computed as such, `out = o1 + (1 - w) A (eta y_v)`, so that with eta 0 nothing changes, to
the bit. (Rows of padding that see no key at all get the mean of the values.)

Token 0 of a decoder with a cache is the first token of each row that is no padding (which lies on the left); of
anything else it is the first one. Its keys and values lie in the cache; its queries do not, so they get an entry of
their own, `past_key_values_N_query` [B, H, 1, d], zeros before the first step. k' and v' are made anew of all that is
cached.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from vlmopt.core.program import PAST, PRESENT, Component, Program, TensorSpec
from vlmopt.graph.adapters import site_name
from vlmopt.graph.branches import Branch, find_branches
from vlmopt.graph.build import insert_call, insert_leaf
from vlmopt.graph.heads import SDPA, Heads, find_heads
from vlmopt.graph.modules import (
    ADAPTERS,
    free_path,
    output_node,
    output_values,
    placeholders,
    set_at,
)

aten = torch.ops.aten

PLAIN, _PHANTOM, _ETA = "weigh_plain", "weigh_phantom", "eta"
_OWN = "phantom"
_MASK = "attention_mask"


@dataclass(frozen=True)
class PhantomForm:
    """What a phantom dimension begins with.

    Args:
        eta: how much of it counts; with 0 the program computes what it did.
        is_learned: eta is a parameter.
    """

    eta: float = 1e-4
    is_learned: bool = True

    def __post_init__(self) -> None:
        if not math.isfinite(self.eta):
            raise ValueError(f"eta is {self.eta}; expected a finite number")


def is_cached(component: Component) -> bool:
    """Whether the component reads in a step what it kept of the last one."""
    names = [spec.name for spec in component.inputs]
    return _MASK in names and any(name.startswith(PAST) for name in names)


def cache_number(component: Component, heads: Heads) -> int | None:
    """The number of the entry that the keys have in the cache; None where they have none."""
    if not is_cached(component):
        return None
    pairs = zip(output_values(component.graph), component.outputs, strict=True)
    return next((spec.cache_layer for node, spec in pairs if node is heads.keys), None)


def unfit(component: Component, heads: Heads) -> str:
    """Why the attention gets no phantom dimension; empty where it can."""
    if is_cached(component) and cache_number(component, heads) is None:
        return "its keys are not what the cache keeps of them, so that token 0 is not found in a later step"
    return ""


def insert_phantom(
    component: Component, branch: Branch, heads: Heads, form: PhantomForm, *, seed: int = 0
) -> Component:
    """The component, its graph edited in place; with a cache it has an entry more."""
    return _Insertion(component, branch, heads, form, seed).insert()


class _Insertion:
    def __init__(self, component: Component, branch: Branch, heads: Heads, form: PhantomForm, seed: int) -> None:
        self.component, self.heads, self.form, self.seed = component, heads, form, seed
        self.module: fx.GraphModule = component.graph
        self.path = free_path(self.module, f"{ADAPTERS}.{site_name(branch.name)}.{_OWN}")
        self.like: Tensor = heads.queries.meta["val"]
        self._is_first: fx.Node | None = None  # [B, P + S], once for keys, values and queries

    def insert(self) -> Component:
        heads = self.heads
        readers, component, carried = list(heads.mixed.users), self.component, None
        number = cache_number(component, heads)
        if number is not None:
            component, carried = self._with_entry(number)
        made_at = heads.mixed if heads.scores is None else heads.scores.next
        with self.module.graph.inserting_before(made_at):
            eta = self._eta()
            first = self._first(heads.queries, carried)
            queries = self._times(self._across("query", heads.queries, first), eta)
            keys = self._times(self._across("key", heads.keys, self._first(heads.keys)), eta)
            scores = self._scores(queries, keys)
            self._add_scores(scores)
        with self.module.graph.inserting_before(heads.mixed.next):
            out = self._weighed(self._shift(eta))
        for reader in readers:
            reader.replace_input_with(heads.mixed, out)
        if carried is not None:
            output = output_node(self.module)
            output.args = ((*output_values(self.module), first),)
        return component

    def _with_entry(self, number: int) -> tuple[Component, fx.Node]:
        """The component with an entry for the queries of token 0, and its input."""
        name = f"{number}_query"
        n_heads, width = int(self.like.shape[1]), self.heads.width
        shape: tuple[int | str, ...] = ("batch", n_heads, 1, width)
        dtype = str(self.like.dtype).removeprefix("torch.")
        last = placeholders(self.module)[-1]
        with self.module.graph.inserting_before(last.next):
            node = self.module.graph.placeholder(f"{PAST}{name}")
        node.meta["val"] = self.like.new_empty((self.like.shape[0], n_heads, 1, width))
        inputs = (*self.component.inputs, TensorSpec(f"{PAST}{name}", shape, dtype))
        outputs = (*self.component.outputs, TensorSpec(f"{PRESENT}{name}", shape, dtype))
        return replace(self.component, inputs=inputs, outputs=outputs), node

    def _eta(self) -> fx.Node | float:
        if not self.form.is_learned:
            return self.form.eta
        path = f"{self.path}.{_ETA}"
        value = torch.full((1,), self.form.eta).to(dtype=self.like.dtype, device=self.like.device)
        set_at(self.module, path, nn.Parameter(value))
        node = self.module.graph.create_node("get_attr", path)
        node.meta["val"] = self.like.new_empty((1,))
        return node

    def _call(self, target: object, *args: object) -> fx.Node:
        return insert_call(self.module, target, args)  # type: ignore[arg-type]

    def _call_like(self, like: fx.Node, target: object, *args: object, **kwargs: object) -> fx.Node:
        """A call whose value has the shape of another. An export has a symbol of its own for the past of each layer's
        keys and values, and torch would take two that meet here for one, in all graphs that share them.
        """
        node = self.module.graph.call_function(target, args, kwargs)  # type: ignore[arg-type]
        node.meta["val"] = like.meta["val"].new_empty(like.meta["val"].shape)
        return node

    def _times(self, value: fx.Node, factor: fx.Node | float) -> fx.Node:
        return self._call(aten.mul.Tensor, value, factor)

    def _first(self, value: fx.Node, carried: fx.Node | None = None) -> fx.Node:
        """`value` [B, H, N, d] of token 0, [B, H, 1, d]; what was carried of it where it is past.

        Exactly one token of a row is the first, here or before, so that sums give its numbers as they are.
        """
        if not is_cached(self.component):
            return self._call(aten.slice.Tensor, value, 2, 0, 1)
        nodes = {spec.name: node for spec, node in zip(self.component.inputs, placeholders(self.module), strict=False)}
        if self._is_first is None:
            rank = self._call(aten.cumsum.default, nodes[_MASK], 1)
            self._is_first = self._call(aten.eq.Scalar, self._call(aten.mul.Tensor, rank, nodes[_MASK]), 1)
        is_first = self._is_first
        if carried is not None:  # of all tokens, the new ones
            past = next(node for name, node in nodes.items() if name.startswith(PAST) and _is_grown(node))
            is_first = self._sliced(is_first, self._call(aten.sym_size.int, past, 2), value)
        for axis in (1, 3):
            is_first = self._call(aten.unsqueeze.default, is_first, axis)
        chosen = self._call_like(value, aten.where.ScalarOther, is_first, value, 0.0)
        found = self._call(aten.sum.dim_IntList, chosen, [2], True)
        return found if carried is None else self._call(aten.add.Tensor, carried, found)

    def _sliced(self, is_first: fx.Node, n_past: fx.Node, value: fx.Node) -> fx.Node:
        """What says of all tokens whether they are the first one, of the new ones alone, [B, N]."""
        node = self.module.graph.call_function(aten.slice.Tensor, (is_first, 1, n_past, _END))
        like = value.meta["val"]
        node.meta["val"] = like.new_empty((like.shape[0], like.shape[2]), dtype=torch.bool)
        return node

    def _across(self, name: str, value: fx.Node, first: fx.Node) -> fx.Node:
        """y [B, H, N, d]: attention across the heads of token 0."""
        tokens, source = (self._call(aten.transpose.int, node, 1, 2) for node in (value, first))
        wanted, keys, values = (
            self._call(aten.gelu.default, self._linear(f"{name}.{leaf}", operand))
            for leaf, operand in (("query", tokens), ("key", source), ("value", source))
        )
        scores = self._call(aten.matmul.default, wanted, self._call(aten.transpose.int, keys, -2, -1))
        scores = self._times(scores, 1.0 / math.sqrt(self.heads.width))
        mixed = self._call(aten.matmul.default, self._call(aten.softmax.int, scores, -1), values)
        made = self._call(aten.gelu.default, self._linear(f"{name}.out", mixed))
        return self._call(aten.transpose.int, made, 1, 2)

    def _linear(self, name: str, operand: fx.Node, width: int = 0) -> fx.Node:
        d = self.heads.width
        leaf = nn.Linear(d, width or d, bias=bool(width), device="meta")
        path = f"{self.path}.{name}"
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {path}".encode()))
        drawn = (torch.rand((width or d, d), generator=generator, dtype=torch.float32) * 2 - 1) / math.sqrt(d)
        leaf.weight = nn.Parameter(drawn.to(dtype=self.like.dtype, device=self.like.device))
        if width:
            leaf.bias = nn.Parameter(torch.zeros(width, dtype=self.like.dtype, device=self.like.device))
        return insert_leaf(self.module, path, leaf.train(False), operand)

    def _scores(self, queries: fx.Node, keys: fx.Node) -> fx.Node:
        """q' k'^T as the products of q and k are scaled where they are added, [B, H, N, T]."""
        turned = self._call(aten.transpose.int, self._repeated(keys), -2, -1)
        scores = self._call(aten.matmul.default, queries, turned)
        factor = self.heads.query_factor
        if self.heads.scores is None:
            scale = self.heads.mixed.kwargs.get("scale")
            factor *= float(scale) if isinstance(scale, float | int) else 1.0 / math.sqrt(self.heads.width)
        return scores if factor == 1.0 else self._times(scores, factor)

    def _repeated(self, value: fx.Node) -> fx.Node:
        """Heads of keys or values, once for every query of their group."""
        n = self.heads.n_groups
        if n == 1:
            return value
        wide = self._call(aten.unsqueeze.default, value, 2)
        return self._call(aten.flatten.using_ints, self._call(aten.expand.default, wide, [-1, -1, n, -1, -1]), 1, 2)

    def _add_scores(self, scores: fx.Node) -> None:
        heads = self.heads
        if heads.scores is not None:
            readers = list(heads.scores.users)
            total = self._call(aten.add.Tensor, heads.scores, scores)
            for reader in readers:
                reader.replace_input_with(heads.scores, total)
            return
        mask = heads.mixed.args[3] if len(heads.mixed.args) > 3 else None
        if isinstance(mask, fx.Node) and mask.meta["val"].dtype is torch.bool:
            # no infinity: rows that see nothing would have no gradient, nor a value in every runtime
            lowest = torch.finfo(self.like.dtype).min
            scores = self._call_like(scores, aten.where.ScalarOther, mask, scores, lowest)
        elif isinstance(mask, fx.Node):
            scores = self._call_like(scores, aten.add.Tensor, mask, scores)
        heads.mixed.args = (*heads.mixed.args[:3], scores)

    def _shift(self, eta: fx.Node | float) -> fx.Node:
        """A (eta y_v), what o2 has more than o1."""
        heads = self.heads
        made = self._times(self._across("value", heads.values, self._first(heads.values)), eta)
        if heads.scores is None:
            own = made if heads.mixed.kwargs.get("enable_gqa") else self._repeated(made)
            queries, keys, _, mask = heads.mixed.args
            return self._call_like(heads.mixed, SDPA, queries, keys, own, mask, **heads.mixed.kwargs)
        return self._call_like(heads.mixed, aten.matmul.default, heads.mixed.args[0], self._repeated(made))

    def _weighed(self, shift: fx.Node) -> fx.Node:
        plain = self.heads.mixed
        other = self._call(aten.add.Tensor, plain, shift)
        own, its = self._linear(PLAIN, plain, 1), self._linear(_PHANTOM, other, 1)
        share = self._call(aten.sigmoid.default, self._call(aten.sub.Tensor, its, own))
        return self._call(aten.add.Tensor, plain, self._call(aten.mul.Tensor, share, shift))


_END = 9223372036854775807


def _is_grown(node: fx.Node) -> bool:
    return isinstance(node.meta["val"].shape[2], torch.SymInt)


def with_phantoms(program: Program, form: PhantomForm) -> Program:
    """The program, edited: every attention whose heads are found has a phantom dimension."""
    for name in program.components:
        for number in range(len(find_branches(program.components[name].graph))):
            component = program.components[name]
            branch = find_branches(component.graph)[number]
            heads = find_heads(branch)
            if not isinstance(heads, str) and not unfit(component, heads):
                program.components[name] = insert_phantom(component, branch, heads, form)
    return program
