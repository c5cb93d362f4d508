"""Computes Linears in int8: weights with a scale for every output, inputs with the range of each call or a fixed one.

Before: `y = x W^T + b`; after: `y = s_x s_w (x_q - z) W_q^T + b'` in integers, in ONNX `MatMulInteger` behind
`DynamicQuantizeLinear`, or with `ranges: static` a product between `QuantizeLinear` and `DequantizeLinear`.
A dynamic range is that of the whole tensor: of all tokens and all items of a batch. Attention stays in float.
Bound: none in general; the task judges the result.

Cases:
1. Every Linear is a site; with `modules` given, those that match. A task's head is one only where it is named itself.
2. With `ranges: static`, or `rounding: gptq`, a layer whose input on the task is not known is refused.
3. A static range is refused where the input on the task is always zero, or has another size than the layer takes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Site, StatRequest
from vlmopt.core.facts import CANONICAL, CAPTURED, QUANTIZED, Fact
from vlmopt.core.program import Program
from vlmopt.graph.example import ResidualBlocks, program_of
from vlmopt.graph.quantizable import Layer, chosen, exchange, find_layers, layer_at, savings
from vlmopt.graph.quantized import Int8Linear
from vlmopt.graph.quantizing import best_range, int8_linear


@dataclass(frozen=True)
class QuantizeInt8(Pass):
    """Computes Linears in int8, weights and activations.

    Args:
        ranges: of inputs: `dynamic`, of each call, or `static`, the one that loses least on the task.
        modules: names or patterns of Linears, as COMPONENT/PATH; by default all, or as many
            as the allowed drop lets through, those that lose least for their bytes first.
        rounding: `nearest`, or `gptq`, where the rounding errors of a layer make up for each other on the task.
        operators: how a static range is written: `qdq`, floating-point operations between conversions, which a runtime
            fuses and every runtime reads, or `integer`, the integer operations themselves.
        weights: bytes of an ONNX file: `unsigned` is exact on every processor, `signed` faster and exact where products
            of bytes do not saturate (x86 with VNNI, ARM); `auto` is what is exact on this one.
    """

    ranges: Literal["dynamic", "static"] = "dynamic"
    modules: tuple[str, ...] = ()
    rounding: Literal["nearest", "gptq"] = "nearest"
    operators: Literal["qdq", "integer"] = "qdq"
    weights: Literal["auto", "signed", "unsigned"] = "auto"

    name: ClassVar[str] = "quantize-int8"
    promise: ClassVar[Promise] = Promise.LOSSY
    requires: ClassVar[frozenset[Fact]] = frozenset({CAPTURED, CANONICAL})
    produces: ClassVar[frozenset[Fact]] = frozenset({QUANTIZED})

    @property
    def _is_static(self) -> bool:
        return self.ranges == "static"

    def wants(self, program: Program) -> Iterable[StatRequest]:
        taken, _ = chosen(self.name, program, find_layers(program), self.modules)
        for layer in taken:
            yield from layer.requests() if self.rounding == "gptq" else ()
            yield from layer.requests(["rows"]) if self._is_static else ()

    def plan(self, program: Program, context: Context) -> Plan:
        def why_not(layer: Layer) -> str:
            rows, moments = _rows(layer, context), layer.moments(context)
            is_unknown = self.rounding == "gptq" and moments is None
            if is_unknown or (self._is_static and rows is None):
                return "its input on the task is not measured"
            if misfit := layer.misfit(rows, moments):
                return misfit
            has_range = rows is None or (bool(rows.isfinite().all()) and bool(rows.any()))
            return "" if has_range else "its input on the task is always zero, or not finite"

        taken, refusals = chosen(self.name, program, find_layers(program), self.modules, why_not)
        saved = savings(program, taken, self._empty)
        told = f"int8, {self.ranges} ranges"
        sites = [Site(o.key, o.component, (o.path,), cost, told) for o, cost in zip(taken, saved, strict=True)]
        return Plan(tuple(sites), tuple(refusals), is_chosen=bool(self.modules))

    def _empty(self, layer: Layer) -> Int8Linear:
        d_out, d_in = layer.leaf.weight.shape
        has_bias = getattr(layer.leaf, "bias", None) is not None
        return Int8Linear(d_in, d_out, has_bias, self._is_static, self.operators == "qdq", device="meta")

    def apply(self, program: Program, site: Site, context: Context) -> None:
        layer = layer_at(program, site.component, site.target[0])
        if layer is None or not isinstance(layer.leaf, torch.nn.Linear):
            return
        moments = layer.moments(context) if self.rounding == "gptq" else None
        rows = _rows(layer, context) if self._is_static else None
        found = None if rows is None else best_range(rows)
        made = int8_linear(
            layer.leaf,
            input_range=found,
            is_qdq=self.operators == "qdq",
            weights=self.weights,
            moments=moments,
            rounding=self.rounding,
        )
        exchange(program, layer, made)

    @classmethod
    def cases(cls) -> Iterable[Case]:
        others, is_head = ("not named in `modules`",) * 4, ("is the task's head",)
        head: dict[str, object] = {"modules": ("head",)}
        static: dict[str, object] = {**head, "ranges": "static"}
        yield Case("all", _blocks, 4, is_head)
        yield Case("named", _blocks, 1, others, head)
        yield Case("unknown", _blocks, 0, ("is not measured", *others), static)
        known, zeros = (_known(rows) for rows in (torch.linspace(-1, 2, 64).reshape(8, 8), torch.zeros(8, 8)))
        yield Case("qdq", _blocks, 1, others, static, known)
        yield Case("integer", _blocks, 1, others, {**static, "operators": "integer"}, known)
        yield Case("zeros", _blocks, 0, ("always zero", *others), static, zeros)
        yield Case("of another size", _blocks, 0, ("has 7 numbers", *others), static, _known(torch.ones(8, 7)))


def _rows(layer: Layer, context: Context) -> Tensor | None:
    """Some of the layer's inputs on the task, [n, in]."""
    found = context.statistics.get(layer.requests(["rows"])[0])
    return found if isinstance(found, Tensor) else None


def _blocks() -> Program:
    return program_of(ResidualBlocks(), torch.ones(2, 8))


def _known(rows: Tensor) -> Context:
    """As if the input of the head had been measured."""
    (head,) = (layer for layer in find_layers(_blocks()) if layer.path == "head")
    return Context(statistics=dict.fromkeys(head.requests(["rows"]), rows))
