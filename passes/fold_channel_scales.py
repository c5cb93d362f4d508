"""Moves the size of large channels from the values of a norm into the weights that read them, before a quantization.

Before: `y = norm(x) W`; after: `y = (norm(x) / s) (s W)`, the `1 / s` folded into the weight and bias of the norm.
Every `s` is a power of two, so the result is the same to the bit; on one grid for the whole tensor the channels then
lose less (SmoothQuant).

Cases:
1. A LayerNorm that Linears alone read is a site, and so is the product that ends an RMS norm.
2. A norm that is read by anything else (the stream, behind a post-norm layer), or whose weights are shared, is refused.
3. A norm whose values on the task are not known is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Refusal, Site, StatRequest
from vlmopt.core.facts import CANONICAL, CAPTURED, Fact
from vlmopt.core.program import Program
from vlmopt.graph.channel_scales import balanced_scales, find_norms, scale_channels
from vlmopt.graph.example import program_of


@dataclass(frozen=True)
class FoldChannelScales(Pass):
    """Moves the size of large channels from a norm into the weights that read it.

    Args:
        share: of the difference in size that goes to the weights, between 0 and 1.
    """

    share: float = 0.5

    name: ClassVar[str] = "fold-channel-scales"
    promise: ClassVar[Promise] = Promise.EXACT
    requires: ClassVar[frozenset[Fact]] = frozenset({CAPTURED, CANONICAL})

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share}; expected above 0 and at most 1")

    def wants(self, program: Program) -> Iterable[StatRequest]:
        for name, component in program.components.items():
            yield from (_request(name, norm.node.name) for norm in find_norms(component.graph)[0])

    def plan(self, program: Program, context: Context) -> Plan:
        sites: list[Site] = []
        refusals: list[Refusal] = []
        for name, component in program.components.items():
            norms, reasons = find_norms(component.graph)
            refusals += [Refusal(f"{name}/{node}", name, reason) for node, reason in reasons.items()]
            for norm in norms:
                key, largest = f"{name}/{norm.node.name}", context.statistics.get(_request(name, norm.node.name))
                if not isinstance(largest, Tensor):
                    refusals.append(Refusal(key, name, "its values on the task are not measured"))
                    continue
                scales = balanced_scales(component.graph, norm, largest, self.share)
                if bool((scales != 1).any()):
                    told = f"channels scaled by 2^{int(scales.min().log2())} to 2^{int(scales.max().log2())}"
                    sites.append(Site(key, name, (norm.node.name,), summary=told))
        return Plan(tuple(sites), tuple(refusals))

    def apply(self, program: Program, site: Site, context: Context) -> None:
        graph = program.components[site.component].graph
        for norm in find_norms(graph)[0]:
            largest = context.statistics.get(_request(site.component, norm.node.name))
            if norm.node.name in site.target and isinstance(largest, Tensor):
                scale_channels(graph, norm, balanced_scales(graph, norm, largest, self.share))
                return

    @classmethod
    def cases(cls) -> Iterable[Case]:
        for kind, node in (("layer", "norm"), ("rms", "mul_1")):
            yield Case(kind, partial(_program, kind), 1, (), {}, _known(node))
        yield Case("unmeasured", partial(_program, "layer"), 0, ("are not measured",))
        yield Case("stream", partial(_program, "stream"), 0, ("reads it too",), {}, _known("norm"))
        yield Case("shared", partial(_program, "shared"), 0, ("is used elsewhere",), {}, _known("norm"))


def _request(component: str, node: str) -> StatRequest:
    return StatRequest(component, node, "absmax")


def _known(node: str) -> Context:
    """As if the values of the norm had been measured."""
    return Context(statistics={_request("model", node): torch.tensor([1.0, 64.0, 0.5, 2.0, 1.0, 1.0, 9.0, 1.0])})


class _Normed(nn.Module):
    """A norm with two readers; what else happens depends on the kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(8, 4), nn.Linear(8, 4)
            self.norm, self.weight = nn.LayerNorm(8), nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "rms":
            y = self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))
        else:
            y = self.norm(x)
        found: Tensor = self.first(y) + torch.relu(self.second(y))
        if self.kind == "shared":
            found = found + self.second(x)
        return found + y[..., :4] if self.kind == "stream" else found


def _program(kind: str) -> Program:
    program = program_of(_Normed(kind), torch.linspace(-1, 1, 16).reshape(2, 8))
    program.heads.clear()
    return program
