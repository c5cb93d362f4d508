"""Puts a gated adapter in front of the join of images and text, with one projection back for both (CROME).

Before: image features `v` and token embeddings `t` go to the language model, or what two towers found to their joint
projections; after: `v + (silu(v G_v) * (v D_v)) U` and `t + (silu(t G_t) * (t D_t)) U`, U one tensor in two parts.
Bound: U begins at zero, so the function stays what it is, to the bit, until it is trained; with `init: paper` it
changes at once. A class has one promise, and training changes the function, so it is the weakest one. `5 d h`
parameters. With `recovery: {level: adapters}` all else stays frozen. `fold-cross-modal-adapter` takes the text's into
the embedding.

Cases:
1. Images and text each get an adapter; the second that is made takes the first one's U.
2. With `modalities` given, the other one is refused.
3. An adapted modality is refused.
4. A program of one graph, and towers of unlike widths, are refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Refusal, Site
from vlmopt.core.facts import ADAPTERS_INSERTED, CANONICAL, CAPTURED, Fact
from vlmopt.core.program import Program
from vlmopt.graph.adapters import Init
from vlmopt.graph.costing import program_cost
from vlmopt.graph.cross_modal import (
    MODALITIES,
    CrossModalForm,
    component_of,
    cross_modal_place,
    has_cross_modal,
    insert_cross_modal,
)
from vlmopt.graph.example import ResidualBlocks, eyes_and_words, program_of, two_towers
from vlmopt.graph.modules import clone_graph


@dataclass(frozen=True)
class InsertCrossModalAdapter(Pass):
    """Puts a gated adapter in front of the join of images and text.

    Args:
        rank: hidden width h of the adapter.
        init: `zero` changes nothing before training; `paper` draws all weights.
        modalities: `visual`, `text`; by default both.
    """

    rank: int = 64
    init: Literal["zero", "paper"] = "zero"
    modalities: tuple[str, ...] = ()

    name: ClassVar[str] = "insert-cross-modal-adapter"
    promise: ClassVar[Promise] = Promise.LOSSY
    requires: ClassVar[frozenset[Fact]] = frozenset({CAPTURED, CANONICAL})
    produces: ClassVar[frozenset[Fact]] = frozenset({ADAPTERS_INSERTED})

    def __post_init__(self) -> None:
        self._form()  # a rank below 1 is refused
        if odd := set(self.modalities) - set(MODALITIES):
            raise ValueError(f"modalities holds {min(odd)!r}; expected visual or text")

    def _form(self) -> CrossModalForm:
        return CrossModalForm(self.rank, Init(self.init))

    def plan(self, program: Program, context: Context) -> Plan:
        sites: list[Site] = []
        refusals: list[Refusal] = []
        parts = program.components.items()
        trial = program.with_components({name: replace(part, graph=clone_graph(part.graph)) for name, part in parts})
        for modality in MODALITIES:
            name = component_of(program, modality)
            key, before = f"{name}/{modality}", program_cost(trial)
            place = cross_modal_place(trial, modality)
            if self.modalities and modality not in self.modalities:
                refusals.append(Refusal(key, name, "not named in `modalities`"))
            elif has_cross_modal(trial.components[name].graph, modality):
                refusals.append(Refusal(key, name, "has a cross-modal adapter already"))
            elif isinstance(place, str):
                refusals.append(Refusal(key, name, place))
            else:
                insert_cross_modal(trial, modality, place, self._form(), seed=context.seed)
                saving = before - program_cost(trial)
                sites.append(Site(key, name, (modality,), saving, f"gated adapter of rank {self.rank}"))
        return Plan(tuple(sites), tuple(refusals))

    def apply(self, program: Program, site: Site, context: Context) -> None:
        (modality,) = site.target
        place = cross_modal_place(program, modality)
        if isinstance(place, str) or has_cross_modal(program.components[site.component].graph, modality):
            return
        insert_cross_modal(program, modality, place, self._form(), seed=context.seed)

    @classmethod
    def cases(cls) -> Iterable[Case]:
        rank: dict[str, object] = {"rank": 2}
        yield Case("image features and words", eyes_and_words, 2, options=rank)
        yield Case("two towers", two_towers, 2, options={**rank, "init": "paper"})
        one = {**rank, "modalities": ("text",)}
        yield Case("words alone", eyes_and_words, 1, ("not named in",), one)
        yield Case("unlike towers", lambda: two_towers(text_width=4), 0, ("8 wide", "4 wide"), rank)
        yield Case(
            "one graph", lambda: program_of(ResidualBlocks(), torch.ones(2, 8)), 0, ("inside of one graph",), rank
        )
