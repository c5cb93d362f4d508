"""Lets layers read their own output a second time, mixed in by a gate: layer traversal (TroL, arXiv 2406.12246).

Before: `y = L(x)`; after: `y = h1 + w (L(h1) - h1)` with `h1 = L(x)`, the same weights, and for every token
`w = 0.5 tanh(h1 u + b) + 0.5`, a gate of its own for every layer. In a decoder with a cache the prompt is traversed and
the answer is not, and the keys and values of the first pass are kept.
Bound: with `start: closed` a learned number that begins at zero lies before the gate, so the function stays what it is,
to the bit, until it is trained; with `start: paper` it changes at once. A class has one promise: it is the weaker one.

Cases:
1. Every layer gets a traversal; with `layers` given, those that match, with `n_layers` the first or the most important.
2. With `times` above one, each further pass reads what the gate before it made, and has its own gate.
3. A layer with side effects, random numbers, or another shape at its end is refused; so is one that is traversed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Refusal, Site
from vlmopt.core.errors import PassOptionError
from vlmopt.core.facts import ADAPTERS_INSERTED, CANONICAL, CAPTURED, TRAVERSAL_INSERTED, Fact
from vlmopt.core.program import Program
from vlmopt.graph.assembled import DECODER
from vlmopt.graph.example import AttentionBlocks, program_of
from vlmopt.graph.layer_regions import LayerRegion
from vlmopt.graph.patterns import check_patterns, is_match
from vlmopt.graph.traversal import (
    Start,
    TraversalForm,
    insert_traversal,
    layers_to_traverse,
    traversal_saving,
    why_not_traversed,
)


@dataclass(frozen=True)
class InsertTraversal(Pass):
    """Lets layers read their own output again, mixed in by a gate.

    Args:
        layers: names or patterns of layers, as COMPONENT/LAYER; by default those of the decoder of a model that writes
            text, and all of any other model.
        n_layers: only so many of them; 0 for all.
        by: which of them: the first ones (`depth`), or the most important ones of the profile (`importance`).
        times: passes after the first, 1 to 3.
        start: `closed` changes nothing before training; `paper` begins with open gates.
        with_bias: gates have a bias.
        rank: of low-rank adapters that the later passes have for themselves; 0 for none.
        alpha: those adapters count `alpha / rank` times.
    """

    layers: tuple[str, ...] = ()
    n_layers: int = 0
    by: Literal["depth", "importance"] = "depth"
    times: int = 1
    start: Literal["closed", "paper"] = "closed"
    with_bias: bool = True
    rank: int = 0
    alpha: float = 16.0

    name: ClassVar[str] = "insert-traversal"
    promise: ClassVar[Promise] = Promise.LOSSY
    requires: ClassVar[frozenset[Fact]] = frozenset({CAPTURED, CANONICAL})
    produces: ClassVar[frozenset[Fact]] = frozenset({ADAPTERS_INSERTED, TRAVERSAL_INSERTED})

    def __post_init__(self) -> None:
        self._form()  # what cannot be traversed so is refused
        if self.n_layers < 0:
            raise ValueError(f"n_layers is {self.n_layers}; expected 0 for all, or how many")

    def _form(self) -> TraversalForm:
        scale = self.alpha / max(self.rank, 1)
        return TraversalForm(self.times, Start(self.start), has_bias=self.with_bias, rank=self.rank, scale=scale)

    def plan(self, program: Program, context: Context) -> Plan:
        sites: list[Site] = []
        refusals: list[Refusal] = []
        found = {name: layers_to_traverse(part) for name, part in program.components.items()}
        keys = [f"{name}/{layer.name}" for name, layers in found.items() for layer in layers]
        check_patterns(f"{self.name}: layers", self.layers, keys)
        chosen = self._chosen(found, program, context)
        for name, layers in found.items():
            component = program.components[name]
            for layer in layers:
                key = f"{name}/{layer.name}"
                reason = chosen.get(key, "") or why_not_traversed(program, component, layer)
                saving = reason or traversal_saving(program, component, layer, self._form())
                if isinstance(saving, str):
                    refusals.append(Refusal(key, name, saving))
                else:
                    sites.append(Site(key, name, (layer.name,), saving, f"passes after the first: {self.times}"))
        return Plan(tuple(sites), tuple(refusals))

    def _chosen(self, found: dict[str, list[LayerRegion]], program: Program, context: Context) -> dict[str, str]:
        """For every layer that the options leave out, why."""
        reasons: dict[str, str] = {}
        default = [DECODER] if DECODER in found and program.generation is not None else list(found)
        for name, layers in found.items():
            scores = _layer_scores(layers, name, context) if self.by == "importance" else {}
            keys = [f"{name}/{layer.name}" for layer in layers]
            named = [key for key in keys if is_match(key, self.layers)] if self.layers else keys * (name in default)
            named.sort(key=lambda key: -scores.get(key, 0.0))
            what = "not named in `layers`" if self.layers else "not of the decoder, and `layers` does not name it"
            reasons |= {key: what for key in keys if key not in named}
            if self.n_layers:
                what = "not one of the first" if self.by == "depth" else "not one of the most important"
                reasons |= dict.fromkeys(named[self.n_layers :], f"{what} {self.n_layers}")
        return reasons

    def apply(self, program: Program, site: Site, context: Context) -> None:
        component = program.components[site.component]
        for layer in layers_to_traverse(component):
            if layer.name in site.target and not why_not_traversed(program, component, layer):
                insert_traversal(component, layer, self._form(), program.dims, seed=context.seed)
                return

    @classmethod
    def cases(cls) -> Iterable[Case]:
        sample = torch.ones(2, 3, 8)
        yield Case("every layer", lambda: program_of(AttentionBlocks(), sample), 2)
        paper: dict[str, object] = {"start": "paper", "with_bias": False, "n_layers": 1}
        yield Case("shallow", lambda: program_of(AttentionBlocks(), sample), 1, ("one of the first 1",), paper)
        thrice: dict[str, object] = {"times": 2, "rank": 2, "layers": ("layers.1",)}
        yield Case("thrice", lambda: program_of(AttentionBlocks(), sample), 1, ("not named in",), thrice)
        yield Case("random", lambda: program_of(_Random(), torch.ones(2, 8)), 0, ("draws random numbers",))


def _layer_scores(layers: list[LayerRegion], component: str, context: Context) -> dict[str, float]:
    """The importance of layers by their keys: the sum over their branches."""
    if not context.importance:
        raise PassOptionError("insert-traversal: by", "importance, and there is no profile", remedy="give profile.file")
    names = {layer.name: [f"{component}/{branch.name}" for branch in layer.branches] for layer in layers}
    known = context.importance
    return {f"{component}/{layer}": sum(known.get(name, 0.0) for name in own) for layer, own in names.items()}


class _Random(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + nn.functional.dropout(torch.tanh(self.layer(x)), 0.5, training=True)
        return self.head(x)  # type: ignore[no-any-return]
