"""Stores weights in 16 bits, or in 8 or 4 bits, in blocks with a scale each; activations stay in float.

Before: `y = x W^T + b`; after: `y = x (scale * level)^T + b'`, in ONNX one `MatMulNBits`, which with `integer_products`
rounds each block of inputs to int8 of its own range as well: several times faster, and less exact than the weights of
8 bits alone. Embeddings become `GatherBlockQuantized`. Of 16 bits there is a `Cast`, and half the size.
Bound: none in general; the task judges the result.

Cases:
1. Every Linear is a site; with `modules` given, those that match. A task's head is one only where it is named itself.
2. With `embeddings`, tables are sites too, of 8 and 4 bits where a row is a whole number of blocks.
3. With `rounding: gptq` a layer whose input is not known, or has another size than the layer takes, is refused.
4. What a layer shares with others goes with the last of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Site, StatRequest
from vlmopt.core.facts import CANONICAL, CAPTURED, QUANTIZED, Fact
from vlmopt.core.program import Program
from vlmopt.graph.example import AttentionBlocks, program_of
from vlmopt.graph.quantizable import Layer, chosen, exchange, find_layers, layer_at, savings
from vlmopt.graph.weight_forms import WeightForm

_BLOCKS = (16, 32, 64, 128, 256)  # what ONNX Runtime has kernels for


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Stores weights of Linears, and of embeddings where asked for, in 16, 8 or 4 bits.

    Args:
        bits: of a weight, 16, 8 or 4.
        half: the type of 16 bits, `float16` or `bfloat16`.
        block: inputs that share a scale: 16, 32, 64, 128 or 256. Smaller is more exact and larger.
        modules: names or patterns of layers, as COMPONENT/PATH; by default all, or as many
            as the allowed drop lets through, those that lose least for their bytes first.
        embeddings: whether tables of embeddings are stored so as well.
        rounding: `nearest`, or `gptq`, where the rounding errors of a layer make up for each other on the task.
        integer_products: whether inputs are rounded to int8 by block, for the speed of integer products.
    """

    bits: Literal[16, 8, 4] = 8
    half: Literal["float16", "bfloat16"] = "float16"
    block: int = 32
    modules: tuple[str, ...] = ()
    embeddings: bool = False
    rounding: Literal["nearest", "gptq"] = "nearest"
    integer_products: bool = True

    name: ClassVar[str] = "quantize-weights"
    promise: ClassVar[Promise] = Promise.LOSSY
    requires: ClassVar[frozenset[Fact]] = frozenset({CAPTURED, CANONICAL})
    produces: ClassVar[frozenset[Fact]] = frozenset({QUANTIZED})

    def __post_init__(self) -> None:
        if self.block not in _BLOCKS:
            raise ValueError(f"block is {self.block}; expected one of {', '.join(map(str, _BLOCKS))}")
        if self.bits == 16 and self.rounding == "gptq":
            raise ValueError("rounding is gptq with 16 bits; expected 8 or 4 bits, or nearest")

    def _layers(self, program: Program) -> list[Layer]:
        return find_layers(program, (nn.Linear, nn.Embedding) if self.embeddings else (nn.Linear,))

    def wants(self, program: Program) -> Iterable[StatRequest]:
        if self.rounding == "gptq":
            taken, _ = chosen(self.name, program, self._layers(program), self.modules)
            for layer in taken:
                yield from layer.requests() if isinstance(layer.leaf, nn.Linear) else ()

    @property
    def _form(self) -> WeightForm:
        return WeightForm(self.bits, getattr(torch, self.half), self.block, self.integer_products, self.rounding)

    def plan(self, program: Program, context: Context) -> Plan:
        def why_not(layer: Layer) -> str:
            is_read = self.rounding == "gptq" and isinstance(layer.leaf, nn.Linear)
            moments = layer.moments(context) if is_read else None
            if is_read and moments is None:
                return "its input on the task is not measured"
            return layer.misfit(None, moments) or self._form.why_not(layer.leaf)

        taken, refusals = chosen(self.name, program, self._layers(program), self.modules, why_not)
        saved = savings(program, taken, lambda layer: self._form.shape(layer.leaf))
        told = self.half if self.bits == 16 else f"{self.bits} bits, blocks of {self.block}"
        sites = [Site(o.key, o.component, (o.path,), cost, told) for o, cost in zip(taken, saved, strict=True)]
        return Plan(tuple(sites), tuple(refusals), is_chosen=bool(self.modules))

    def apply(self, program: Program, site: Site, context: Context) -> None:
        layer = layer_at(program, site.component, site.target[0])
        if layer is not None:
            moments = layer.moments(context) if self.rounding == "gptq" else None
            exchange(program, layer, self._form.made(layer.leaf, moments))

    @classmethod
    def cases(cls) -> Iterable[Case]:
        rest = ("not named in `modules`",) * 12
        yield Case("all", _blocks, 12, ("is the task's head",))
        yield Case("half", _blocks, 12, ("is the task's head",), {"bits": 16, "half": "bfloat16"})
        yield Case("half words", _words, 2, (), {"bits": 16, "embeddings": True})
        yield Case("named", _blocks, 4, rest[:9], {"modules": ("*.query", "*.key"), "bits": 4})
        for embeddings, n_sites in ((True, 2), (False, 1)):
            yield Case(f"embeddings {embeddings}", _words, n_sites, (), {"embeddings": embeddings, "block": 16})
        yield Case("row of half a block", _words, 1, ("no whole number of blocks",), {"embeddings": True})
        yield Case("unknown", _blocks, 0, ("is not measured", *rest), {"rounding": "gptq", "modules": ("head",)})


def _blocks() -> Program:
    return program_of(AttentionBlocks(), torch.ones(2, 3, 8))


class _Tied(nn.Module):
    """A table that is also the output layer, as in most small decoders."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(12, 16), nn.Linear(16, 12, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(torch.tanh(self.words(x)))
        return found


def _words() -> Program:
    program = program_of(_Tied(), torch.zeros(2, 3, dtype=torch.int64))
    program.heads.clear()  # no task fits the words of a language
    return program
