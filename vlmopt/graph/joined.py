"""A generative program as one graph that reads prompts with their answers: what the task sees of it in one pass.

Measuring, planning and tuning look at one component and the branches in it. For a model of several components that is
the joined program: vision, embedding and decoder one behind another, without a cache, and behind the logits two numbers
for every token of the answer. Leaf modules are shared with the parts, and branches have their names.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import is_fake

from vlmopt.core.program import PAST, Component, Program, TensorSpec
from vlmopt.graph.assembled import DECODER, EMBEDDING, VISION, placed
from vlmopt.graph.branches import find_branches
from vlmopt.graph.canonical import drop_dead_nodes
from vlmopt.graph.modules import clone_graph, get_at, has_path, output_values, placeholders, set_at
from vlmopt.graph.shapes import compute_shapes

MODEL = "model"  # the component that reads prompt and answer together
SCORES = "answer_scores"

aten = torch.ops.aten


@dataclass(frozen=True)
class Joined:
    """`program` has the one component `model`. `owners` tells for each of its branches and layers whose it is; in a
    program that was one component from the start all names stay as they are.

    Inputs: `input_ids`, `attention_mask`, `labels` [B, S] (-100 where nothing is taught) and the images of all rows.
    Output: `answer_scores` [B, S, 2], for every taught token its log-probability, and its logit less the largest other.
    """

    program: Program
    owners: Mapping[str, str]
    paths: Mapping[tuple[str, str], str] = field(default_factory=dict)  # component and path in it -> path in `model`

    def own_site(self, site: str) -> str:
        """`component/name` as the program that was joined calls it."""
        component, _, name = site.partition("/")
        return f"{self.owners.get(name, component)}/{name}"

    def joined_site(self, site: str) -> str:
        """`component/name` as the joined program calls it."""
        return f"{MODEL}/{site.partition('/')[2]}" if self.owners else site

    def joined_sites(self, sites: Iterable[str]) -> frozenset[str]:
        return frozenset(map(self.joined_site, sites))

    def separated(self, program: Program, trained: Program) -> Program:
        """The program that was joined, with the modules and tensors that the trained joined program has for its own."""
        if not self.owners:
            return trained
        source, components = trained.components[MODEL].graph, dict(program.components)
        graphs = {name: clone_graph(part.graph) for name, part in components.items()}
        for (name, path), place in self.paths.items():
            if has_path(source, place):  # else nothing that the task sees reads it, and it was not trained
                set_at(graphs[name], path, get_at(source, place))
        return program.with_components({name: replace(components[name], graph=graphs[name]) for name in components})

    def own_sites(self, sites: Iterable[str]) -> frozenset[str]:
        return frozenset(map(self.own_site, sites))


def joined(program: Program) -> Joined:
    """The program as tasks measure it; one that is not generative as it is."""
    if program.generation is None or MODEL in program.components:
        return Joined(program, {})
    joining = _Joining(program)
    component = joining.component()
    branches = {branch.name: branch for branch in find_branches(component.graph)}
    owners: dict[str, str] = {}
    for name, part in program.components.items():
        for branch in find_branches(part.graph):
            if branch.name not in branches or branch.name in owners:
                raise AssertionError(f"{name}/{branch.name} has no counterpart of its own in the joined graph")
            owners[branch.name] = owners[branch.layer_name] = name
    return Joined(program.with_components({MODEL: component}), owners, joining.paths)


class _Joining:
    """Copies the parts into one graph."""

    def __init__(self, program: Program) -> None:
        assert program.generation is not None
        self._program, self._generation = program, program.generation
        self._root = torch.nn.Module()
        self._graph = fx.Graph()
        self.paths: dict[tuple[str, str], str] = {}

    def component(self) -> Component:
        tokens: tuple[int | str, ...] = ("batch", "sequence")
        vision = self._program.components[VISION].inputs[0]
        specs = (
            *(TensorSpec(name, tokens, "int64") for name in ("input_ids", "attention_mask", "labels")),
            vision,
        )
        ids, mask, labels, pixels = (self._graph.placeholder(spec.name) for spec in specs)
        (embeds, *_) = self._part(EMBEDDING, {"input_ids": ids})
        (features, *_) = self._part(VISION, {vision.name: pixels})
        embeds = self._graph.call_function(_merged, (embeds, features, ids, self._generation.image_token))
        logits = self._decoded(embeds, ids, mask, labels)
        self._graph.output((self._graph.call_function(answer_scores, (logits, labels)),))
        module = fx.GraphModule(self._root, self._graph, class_name="Component").train(False)
        drop_dead_nodes(module)
        outputs = (TensorSpec(SCORES, (*tokens, 2), "float32"),)
        made = Component(MODEL, module, specs, outputs)
        compute_shapes(made, self._program.dims)
        return made

    def _decoded(self, embeds: fx.Node, ids: fx.Node, mask: fx.Node, labels: fx.Node) -> fx.Node:
        """The logits of all tokens, with nothing in the cache."""
        decoder = self._program.components[DECODER]
        names = [
            spec.name for spec in decoder.inputs if not spec.name.startswith(PAST) and spec.name != "inputs_embeds"
        ]
        place = _placing(self._program, tuple(names))
        every = self._graph.call_function(place, (mask, ids, labels))
        feed = {"inputs_embeds": embeds}
        feed |= {name: self._graph.call_function(operator.getitem, (every, i)) for i, name in enumerate(names)}
        for spec in decoder.inputs:
            if spec.name.startswith(PAST):
                sizes = tuple(0 if size == "past" else size for size in spec.shape[1:])
                feed[spec.name] = self._graph.call_function(_nothing, (embeds, *sizes))
        return self._part(DECODER, feed)[0]

    def _part(self, name: str, feed: Mapping[str, fx.Node]) -> list[fx.Node]:
        """The part's nodes behind those of the graph; returns its outputs."""
        source = self._program.components[name].graph
        mapping = {node: feed[str(node.target)] for node in placeholders(source)}
        for node in source.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            mapping[node] = self._graph.node_copy(node, lambda n: mapping[n])
            if node.op in ("call_module", "get_attr"):
                path = str(node.target)
                mapping[node].target = self.paths[name, path] = self._placed(get_at(source, path), path)
        return [mapping[node] for node in output_values(source)]

    def _placed(self, found: torch.nn.Module | Tensor, path: str) -> str:
        """Where the part's module or tensor lies in the joined graph: at its own path, unless another lies there."""
        own, count = path, 1
        while has_path(self._root, own) and get_at(self._root, own) is not found:
            count += 1
            own = f"{path}_{count}"
        if not has_path(self._root, own):
            set_at(self._root, own, found)
        return own


def _merged(embeds: Tensor, features: Tensor, input_ids: Tensor, image_token: int) -> Tensor:
    """Features of the images in their places, [B, S, D]."""
    places = (input_ids == image_token).unsqueeze(-1).expand_as(embeds)
    return embeds.masked_scatter(places, features.to(embeds.dtype))


def _nothing(embeds: Tensor, n_heads: int, n_past: int, width: int) -> Tensor:
    """An entry of the cache before the first step."""
    return embeds.new_zeros(embeds.shape[0], n_heads, n_past, width)


def _placing(program: Program, names: tuple[str, ...]) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
    """What the decoder reads of the tokens beside their embeddings, in the order of the names."""

    def places(attention_mask: Tensor, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        found = placed(program, attention_mask, input_ids.shape[1], input_ids=input_ids, is_answer=labels >= 0)
        return tuple(found[name] for name in names)

    return places


def answer_scores(logits: Tensor, labels: Tensor) -> Tensor:
    """For every taught token its log-probability, and its logit less the largest other, [B, S, 2]; elsewhere zeros.

    A margin above zero at all tokens of an answer: greedy decoding writes exactly this answer.

    Args:
        logits: [B, S, V], those at a place are for the token behind it.
        labels: [B, S], negative where nothing is taught.
    """
    scores = logits.new_zeros((*labels.shape, 2), dtype=torch.float32)
    if is_fake(logits):  # how many tokens are taught is in the data
        return scores
    taught = labels[:, 1:] >= 0
    chosen = logits[:, :-1][taught].float()  # [n, V]
    wanted = labels[:, 1:][taught].unsqueeze(-1)
    own = chosen.gather(-1, wanted)
    others = chosen.scatter(-1, wanted, -torch.inf).amax(-1, keepdim=True)
    found = torch.cat([own - chosen.logsumexp(-1, keepdim=True), own - others], -1)
    places = torch.nn.functional.pad(taught, (1, 0))
    return scores.masked_scatter(places.unsqueeze(-1).expand_as(scores), found)
