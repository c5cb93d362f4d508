"""Stores what phantom dimensions take from token 0, for prompts that all begin with one token.

Before: q_0, k_0 and v_0 of every layer are looked for in the prompt and in the cache, whose entry for q_0
(`past_key_values_N_query`) is one that other runtimes have no place for; after: they are constants
(`vlmopt/graph/first_token.py`), and `fold-constants` takes what the modules make of them along.
Bound: none for prompts that begin otherwise, which are refused from then on; for those that begin with the token, that
of rounding.

Cases:
1. Every phantom dimension of a causal decoder.
2. Where the token is no word, or a prompt begins with an image, all are refused.
3. Where what token 0 gives depends on the tokens behind it, or where it is a constant already, it is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Refusal, Site
from vlmopt.core.facts import ADAPTERS_INSERTED, CAPTURED, Fact
from vlmopt.core.program import Assembly, Generation, Program
from vlmopt.graph.assembled import DECODER, EMBEDDING
from vlmopt.graph.costing import component_cost
from vlmopt.graph.example import GroupedHeads, component_of, eyes_and_words, program_from
from vlmopt.graph.first_token import freeze_first, is_frozen, values_of_first, why_not_fixed
from vlmopt.graph.modules import clone_graph
from vlmopt.graph.phantom import PhantomForm, with_phantoms
from vlmopt.graph.phantom_removal import find_phantoms, phantom_of


@dataclass(frozen=True)
class FreezeFirstToken(Pass):
    """Stores what phantom dimensions take from the first token of all prompts.

    Args:
        token: the id of the token that every prompt begins with, as its tokenizer gives it.
    """

    token: int

    name: ClassVar[str] = "freeze-first-token"
    promise: ClassVar[Promise] = Promise.LOSSY
    requires: ClassVar[frozenset[Fact]] = frozenset({CAPTURED, ADAPTERS_INSERTED})
    changes_signature: ClassVar[bool] = True  # the cache loses entries, and the program says what prompts begin with

    def plan(self, program: Program, context: Context) -> Plan:
        sites: list[Site] = []
        refusals: list[Refusal] = []
        reason = why_not_fixed(program, self.token)
        known = {} if reason or DECODER not in program.components else values_of_first(program, self.token)
        for name, component in program.components.items():
            trial = replace(component, graph=clone_graph(component.graph))
            for phantom in find_phantoms(component.graph):
                key, values = f"{name}/{phantom.path}", known.get(phantom.path, "is not in the decoder")
                if is_frozen(component.graph, phantom):
                    refusals.append(Refusal(key, name, "holds constants already"))
                elif reason or isinstance(values, str):
                    refusals.append(Refusal(key, name, reason or str(values)))
                else:
                    before, own = component_cost(trial, program.dims), phantom_of(trial.graph, phantom.path)
                    assert own is not None
                    trial = freeze_first(trial, own, values)
                    saving = before - component_cost(trial, program.dims)
                    sites.append(Site(key, name, (phantom.path,), saving, f"for prompts that begin with {self.token}"))
        return Plan(tuple(sites), tuple(refusals))

    def apply(self, program: Program, site: Site, context: Context) -> None:
        component = program.components[site.component]
        phantom = phantom_of(component.graph, site.target[0])
        values = values_of_first(program, self.token).get(site.target[0])
        if phantom is None or values is None or isinstance(values, str) or is_frozen(component.graph, phantom):
            return
        program.components[site.component] = freeze_first(component, phantom, values)
        assert program.generation is not None
        program.generation = replace(program.generation, first_token=self.token)

    @classmethod
    def cases(cls) -> Iterable[Case]:
        yield Case("causal", _writer, 2, options={"token": 3})
        yield Case("no word", _writer, 0, ("is none of the 16",) * 2, {"token": 16})
        yield Case("image first", _writer, 0, ("begins with an image",) * 2, {"token": 15})
        yield Case(
            "not causal", lambda: _writer(is_turned=True), 0, ("depends on the tokens behind",) * 2, {"token": 3}
        )


class _Words(nn.Module):
    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table = table

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.table(input_ids)  # type: ignore[no-any-return]


class _Decoder(nn.Module):
    """Causal blocks over embeddings; turned round, every token sees those behind it."""

    def __init__(self, *, is_turned: bool) -> None:
        super().__init__()
        self.blocks, self.is_turned = GroupedHeads(), is_turned

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        if self.is_turned:
            inputs_embeds = inputs_embeds + inputs_embeds.mean(1, keepdim=True)
        return self.blocks(inputs_embeds)  # type: ignore[no-any-return]


def _writer(*, is_turned: bool = False) -> Program:
    parts, decoder = dict(eyes_and_words().components), _Decoder(is_turned=is_turned)
    words, ids = _Words(parts[EMBEDDING].graph.get_submodule("layer")), torch.arange(6).reshape(2, 3)
    parts[EMBEDDING] = component_of(words, ids, name=EMBEDDING, output="inputs_embeds")
    parts[DECODER] = component_of(decoder, torch.ones(2, 3, 8), name=DECODER, output="logits")
    program = program_from(parts, Assembly.GENERATIVE)
    program.heads.clear()
    program.generation = Generation(image_token=15, image_tokens=4)
    return with_phantoms(program, PhantomForm(eta=0.5))
