"""Folds the text's part of a cross-modal adapter into the table of the embedding.

Before: `t + (silu(t G) * (t D)) U` with `t = E[id]`; after: `E'[id]`. Identity: the adapter sees one token at a time
and no place, so what it makes of a token is one row of a table, evaluated once: `E'[v] = E[v] + f(E[v])`.
A table that the output layer reads too (tied) stays there as it is: the program then grows by one table, which the
predicted saving says. Images have no table: their part stays as a small map, or `replace-adapter-gate` makes it linear.

Cases:
1. The adapter behind an embedding goes, whatever lies between that maps single tokens.
2. A tied table becomes two.
3. Image features, and towers that mix tokens, are refused with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Refusal, Site
from vlmopt.core.facts import CANONICAL, CAPTURED, Fact
from vlmopt.core.program import Component, Program
from vlmopt.graph.costing import program_cost
from vlmopt.graph.cross_modal import MODALITIES, adapted_program, adapted_sum, component_of
from vlmopt.graph.example import eyes_and_words, two_towers
from vlmopt.graph.modules import clone_graph, get_at
from vlmopt.graph.parallel_folding import weight_readers
from vlmopt.graph.token_table import put_table, token_embedding, value_table


@dataclass(frozen=True)
class FoldCrossModalAdapter(Pass):
    """Folds the text's part of a cross-modal adapter into the table of the embedding."""

    name: ClassVar[str] = "fold-cross-modal-adapter"
    promise: ClassVar[Promise] = Promise.CLOSE
    requires: ClassVar[frozenset[Fact]] = frozenset({CAPTURED, CANONICAL})

    def plan(self, program: Program, context: Context) -> Plan:
        sites: list[Site] = []
        refusals: list[Refusal] = []
        for modality in MODALITIES:
            name = component_of(program, modality)
            part = program.components.get(name)
            total = None if part is None else adapted_sum(part.graph, modality)
            if part is None or total is None:
                continue
            call = token_embedding(part.graph, total)
            if isinstance(call, str):
                remedy = "`replace-adapter-gate` makes a linear map of it that other passes fold"
                refusals.append(Refusal(f"{name}/{modality}", name, f"{call}; {remedy}"))
                continue
            cut = replace(part, graph=clone_graph(part.graph))
            _fold(cut, modality, is_trial=True)
            after = program.with_components({**program.components, name: cut})
            saving = program_cost(program) - program_cost(after)
            sites.append(
                Site(f"{name}/{modality}", name, (modality,), saving, _summary(program, name, str(call.target)))
            )
        return Plan(tuple(sites), tuple(refusals))

    def apply(self, program: Program, site: Site, context: Context) -> None:
        _fold(program.components[site.component], site.target[0])

    @classmethod
    def cases(cls) -> Iterable[Case]:
        images = ("it is made of no embedding",)
        yield Case("words", partial(adapted_program, eyes_and_words), 1, images)
        yield Case("tied words", partial(adapted_program, partial(eyes_and_words, is_tied=True)), 1, images)
        yield Case("two towers", partial(adapted_program, two_towers), 0, images * 2)


def _fold(part: Component, modality: str, *, is_trial: bool = False) -> None:
    """Puts the table in the adapter's place; a trial's has a shape alone."""
    total = adapted_sum(part.graph, modality)
    call = None if total is None else token_embedding(part.graph, total)
    if total is None or not isinstance(call, torch.fx.Node):
        return
    if is_trial:
        leaf, value = get_at(part.graph, str(call.target)), total.meta["val"]
        assert isinstance(leaf, nn.Embedding)
        table = torch.empty(leaf.num_embeddings, int(value.shape[-1]), dtype=value.dtype, device="meta")
    else:
        table = value_table(part.graph, call, total)
    put_table(part.graph, call, total, table)


def _summary(program: Program, component: str, path: str) -> str:
    leaf = get_at(program.components[component].graph, path)
    assert isinstance(leaf, nn.Embedding)
    others = sorted(name for name, _ in weight_readers(program)[id(leaf.weight)] if name != component)
    if not others:
        return "into the embedding"
    n_bytes = leaf.weight.numel() * leaf.weight.element_size()
    return f"into the embedding; {others[0]} keeps the table that it shared, {n_bytes:,} bytes more"
