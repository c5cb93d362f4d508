"""What the gate of a cross-modal adapter lets through per token of the task: `|f(x)| / |x|` where it adds `f(x)`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from vlmopt.core.program import Program
from vlmopt.graph.cross_modal import TEXT, VISUAL, adapted_sum, component_of, gated_value
from vlmopt.graph.joined import MODEL, joined
from vlmopt.graph.replay import inputs_of
from vlmopt.workflow.run_state import RunState

_N_ITEMS, _N_WORDS = 64, 12


def let_through(state: RunState, program: Program) -> dict[str, Any] | None:
    """The mean share at every place of an image, and for the commonest words of prompts and answers, on at most 64
    items of the profile split; None where the program writes no text or holds no such adapter.
    """
    if state.bound is None or program.generation is None:
        return None
    whole = joined(program)
    pairs = {m: pair for m in (VISUAL, TEXT) if (pair := _pair(program, m, whole.nodes)) is not None}
    if not pairs:
        return None
    fit = state.bound.source.workload(program, "profile", limit=_N_ITEMS)
    component = whole.program.components[MODEL]
    shares: dict[str, list[Tensor]] = {modality: [] for modality in pairs}
    ids: list[Tensor] = []
    for feed in fit.feeds[MODEL]:
        watching = _Watching(component.graph, {name for pair in pairs.values() for name in pair})
        with torch.no_grad():
            watching.run(*inputs_of(component, feed))
        for modality, (before, after) in pairs.items():
            shares[modality].append(_share(watching.seen[before], watching.seen[after]))
        is_word = feed["attention_mask"].bool() & (feed["input_ids"] != program.generation.image_token)
        ids.append(torch.where(is_word, feed["input_ids"], -1).flatten())
    places = torch.cat(shares[VISUAL]).mean(0).tolist() if VISUAL in shares else []
    words = torch.cat([one.flatten() for one in shares[TEXT]]) if TEXT in shares else torch.empty(0)
    spelled = state.opened.preprocessor.tokenizer.decode
    return {"places": places, "words": _commonest(torch.cat(ids), words, spelled)}


def _pair(program: Program, modality: str, nodes: Mapping[tuple[str, str], str]) -> tuple[str, str] | None:
    """Names in the joined graph of the value in front of the adapter and the one behind it."""
    part = component_of(program, modality)
    graph = program.components[part].graph
    value, total = gated_value(graph, modality), adapted_sum(graph, modality)
    return None if value is None or total is None else (nodes[part, value.name], nodes[part, total.name])


def _share(before: Tensor, after: Tensor) -> Tensor:
    """[B, N] of two values [B, N, D], in float64."""
    x = before.double().cpu()
    size, added = (torch.linalg.vector_norm(one, dim=-1) for one in (x, after.double().cpu() - x))
    share: Tensor = added / size.clamp(min=1e-30)
    return share


def _commonest(ids: Tensor, shares: Tensor, spelled: Callable[[list[int]], str]) -> list[dict[str, Any]]:
    """The words that occur most, each with its share, which is one number, as the adapter sees a word alone."""
    known: dict[int, float] = {}
    counts: dict[int, int] = defaultdict(int)
    for word, share in zip(ids.tolist(), shares.tolist(), strict=bool(len(shares))):
        if word >= 0:
            known[word] = share
            counts[word] += 1
    common = sorted(counts, key=lambda word: (-counts[word], word))[:_N_WORDS]
    return [{"text": spelled([word]).strip() or "(space)", "n": counts[word], "share": known[word]} for word in common]


class _Watching(fx.Interpreter):
    """Runs a graph and keeps the values of some nodes."""

    def __init__(self, graph: fx.GraphModule, names: set[str]) -> None:
        super().__init__(graph)
        self._names = names
        self.seen: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> object:
        value: object = super().run_node(n)
        if n.name in self._names:
            assert isinstance(value, Tensor)
            self.seen[n.name] = value
        return value
