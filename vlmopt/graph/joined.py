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

from vlmopt.core.program import NO_WORD, PAST, PRESENT, Component, Program, TensorSpec
from vlmopt.graph.assembled import DECODER, EMBEDDING, ENCODER, ENCODER_MASK, VISION, merged, placed
from vlmopt.graph.branches import find_branches
from vlmopt.graph.canonical import drop_dead_nodes
from vlmopt.graph.modules import clone_graph, get_at, graph_module, has_path, output_values, placeholders, set_at
from vlmopt.graph.shapes import compute_shapes
from vlmopt.graph.traversal import find_traversals

MODEL = "model"  # the component that reads prompt and answer together
SCORES = "answer_scores"

aten = torch.ops.aten

_ON_ELEMENTS = (  # what may lie between the head and its logits: scales, a soft cap, another dtype
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.tanh.default,
    aten._to_copy.default,
    aten.to.dtype,
)


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
    nodes: Mapping[tuple[str, str], str] = field(default_factory=dict)  # component and node in it -> node in `model`

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

    def own_path(self, path: str) -> str:
        """`component/path` of a weight as the program that was joined calls it."""
        component, _, place = path.partition("/")
        if not self.owners:
            return path
        own = [(place_of, f"{name}/{own}") for (name, own), place_of in self.paths.items()]
        fitting = [(at, found) for at, found in own if place == at or place.startswith(f"{at}.")]
        at, found = max(fitting, key=lambda pair: len(pair[0]), default=("", f"{component}/"))
        return found + place.removeprefix(at)

    def own_sites(self, sites: Iterable[str]) -> frozenset[str]:
        return frozenset(map(self.own_site, sites))


N_KEPT = 3  # joined graphs: of the original, of the program as it is, and of one that is tried


@dataclass(frozen=True, eq=False)
class _Made:
    """`whole` and what it was made of; programs that share these graphs hold the same tensors."""

    graphs: tuple[fx.GraphModule, ...]
    structure: tuple[object, ...]
    whole: Joined


_made: list[_Made] = []  # the last used comes last


def joined(program: Program) -> Joined:
    """The program as tasks measure it; one that is not generative as it is.

    A run asks for it of the same few programs again and again, so the last ones are kept. A graph that was edited since
    is joined anew, and so is one whose modules or tensors were exchanged.
    """
    if program.generation is None or MODEL in program.components:
        return Joined(program, {})
    graphs, structure = tuple(part.graph for part in program.components.values()), _structure(program)
    known = next((made for made in _made if made.graphs == graphs), None)
    others = [made for made in _made if made is not known]
    if known is None or known.structure != structure:
        known = _Made(graphs, structure, _join(program))
    _made[:] = [*others, known][-N_KEPT:]
    return replace(known.whole, program=program.with_components(known.whole.program.components))


def _structure(program: Program) -> tuple[object, ...]:
    """What a joined graph follows from, beside the identity of its parts' graphs. Tensors are never written in place,
    so their identity stands for them."""
    parts = tuple(
        (name, part.inputs, part.outputs, str(part.graph.graph), _held(part.graph))
        for name, part in program.components.items()
    )
    return parts, tuple(program.dims.items()), program.generation


def _held(graph: fx.GraphModule) -> tuple[int, ...]:
    return tuple(map(id, (*graph.modules(), *graph.parameters(), *graph.buffers())))


def _join(program: Program) -> Joined:
    joining = _Joining(program)
    component = joining.component()
    branches = {branch.name: branch for branch in find_branches(component.graph)}
    owners: dict[str, str] = {}
    for name, part in program.components.items():
        for branch in find_branches(part.graph):
            if branch.name not in branches or branch.name in owners:
                raise AssertionError(f"{name}/{branch.name} has no counterpart of its own in the joined graph")
            owners[branch.name] = owners[branch.layer_name] = name
    names = {place: node.name for place, node in joining.nodes.items()}
    return Joined(program.with_components({MODEL: component}), owners, joining.paths, names)


class _Joining:
    """Copies the parts into one graph."""

    def __init__(self, program: Program) -> None:
        assert program.generation is not None
        self._program, self._generation = program, program.generation
        self._root = torch.nn.Module()
        self._graph = fx.Graph()
        self.paths: dict[tuple[str, str], str] = {}
        self.nodes: dict[tuple[str, str], fx.Node] = {}

    def component(self) -> Component:
        tokens: tuple[int | str, ...] = ("batch", "sequence")
        vision = self._program.components[VISION].inputs[0]
        if self._generation.image_token == NO_WORD:  # then every prompt has one
            vision = replace(vision, shape=("batch", *vision.shape[1:]))
        specs = (
            *(TensorSpec(name, tokens, "int64") for name in ("input_ids", "attention_mask", "labels")),
            vision,
        )
        ids, mask, labels, pixels = (self._graph.placeholder(spec.name) for spec in specs)
        images = self._named(VISION, {vision.name: pixels})
        if self._generation.reads_across:
            rows = self._graph.call_function(_two_rows, (ids, mask, labels, self._generation.start_tokens))
            prompt, prompt_mask, ids, mask = (self._graph.call_function(operator.getitem, (rows, i)) for i in range(4))
            feed = {"input_ids": prompt, "attention_mask": prompt_mask, **images}
            if "inputs_embeds" in {spec.name for spec in self._program.components[ENCODER].inputs}:
                feed["inputs_embeds"] = self._embedded(prompt, images)
            across = self._named(ENCODER, feed) | {ENCODER_MASK: prompt_mask}
            embeds = self._embedded(ids, {})
        else:
            across = {name: node for name, node in images.items() if name != "image_features"}
            embeds = self._embedded(ids, images)
        logits = self._decoded(embeds, ids, mask, labels, across)
        self._graph.output((self._graph.call_function(answer_scores, (logits, labels)),))
        module = graph_module(self._root, self._graph)
        _traverse_prompts(module, labels)
        drop_dead_nodes(module)
        outputs = (TensorSpec(SCORES, (*tokens, 2), "float32"),)
        made = Component(MODEL, module, specs, outputs)
        compute_shapes(made, self._program.dims)
        return made

    def _embedded(self, ids: fx.Node, images: Mapping[str, fx.Node]) -> fx.Node:
        """Tokens as embeddings, features of images in their places."""
        (embeds, *_) = self._part(EMBEDDING, {"input_ids": ids})
        if "image_features" not in images:
            return embeds
        found = (embeds, images["image_features"], ids, self._generation.image_token)
        return self._graph.call_function(merged, found)

    def _named(self, name: str, feed: Mapping[str, fx.Node]) -> dict[str, fx.Node]:
        """A part's outputs; what the decoder attends to across by the names of its inputs."""
        outputs = zip(self._program.components[name].outputs, self._part(name, feed), strict=True)
        return {spec.name.replace(PRESENT, PAST, 1): node for spec, node in outputs}

    def _decoded(
        self, embeds: fx.Node, ids: fx.Node, mask: fx.Node, labels: fx.Node, across: Mapping[str, fx.Node]
    ) -> fx.Node:
        """The logits of all tokens, with nothing in the cache but what the decoder attends to across."""
        decoder = self._program.components[DECODER]
        feed = {"inputs_embeds": embeds, **across}
        names = [spec.name for spec in decoder.inputs if not spec.name.startswith(PAST) and spec.name not in feed]
        place = _placing(self._program, tuple(names))
        every = self._graph.call_function(place, (mask, ids, labels))
        feed |= {name: self._graph.call_function(operator.getitem, (every, i)) for i, name in enumerate(names)}
        for spec in decoder.inputs:
            if spec.name.startswith(PAST) and not spec.is_cross:
                sizes = tuple(0 if size == "past" else size for size in spec.shape[1:])
                feed[spec.name] = self._graph.call_function(_nothing, (embeds, *sizes))
        logits = self._part(DECODER, feed)[0]
        head = _head_of(self._root, logits)
        if head is not None:
            hidden = head.args[0]
            assert isinstance(hidden, fx.Node)
            with self._graph.inserting_before(head):
                head.replace_input_with(hidden, self._graph.call_function(_read_by_answers, (hidden, labels)))
        return logits

    def _part(self, name: str, feed: Mapping[str, fx.Node]) -> list[fx.Node]:
        """The part's nodes behind those of the graph; returns its outputs."""
        source = self._program.components[name].graph
        mapping = {node: feed[str(node.target)] for node in placeholders(source)}
        for node in source.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            mapping[node] = self.nodes[name, node.name] = self._graph.node_copy(node, lambda n: mapping[n])
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


def _traverse_prompts(module: fx.GraphModule, labels: fx.Node) -> None:
    """Traversals choose token by token here: those of the prompt, as decoding does where nothing is past."""
    choices = [one.choice for one in find_traversals(module) if one.choice is not None]
    if not choices:
        return
    with module.graph.inserting_before(choices[0]):
        is_prompt = module.graph.call_function(_of_prompt, (labels,))
    for choice in choices:
        choice.args = (is_prompt, *choice.args[1:])


def _of_prompt(labels: Tensor) -> Tensor:
    """Whether a token is no part of the answer, [B, S, 1]."""
    return (labels < 0).unsqueeze(-1)


def _two_rows(
    input_ids: Tensor, attention_mask: Tensor, labels: Tensor, start_tokens: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens and mask of an encoder, which reads the prompts, and of a decoder, which reads the answers behind the
    tokens that they start with; all [B, S]. A prompt is no shorter than what the decoder starts with.
    """
    is_answer = labels >= 0
    is_prompt = attention_mask.bool() & ~is_answer
    length = is_prompt.sum(-1, keepdim=True)
    n, first = input_ids.shape[1], attention_mask.shape[1] - attention_mask.sum(-1, keepdim=True)
    places = torch.arange(n, device=input_ids.device)
    prompt = input_ids.gather(1, (places + first) % n)
    starts, ids = first + length - len(start_tokens), input_ids
    is_start = (places >= starts) & (places < first + length)
    for number, token in enumerate(start_tokens):
        ids = torch.where(places == starts + number, token, ids)
    seen = (is_answer | is_start).to(attention_mask.dtype)
    return prompt, (places < length).to(attention_mask.dtype), ids, seen


def _nothing(embeds: Tensor, n_heads: int, n_past: int, width: int) -> Tensor:
    """An entry of the cache before the first step."""
    return embeds.new_zeros(embeds.shape[0], n_heads, n_past, width)


def _placing(program: Program, names: tuple[str, ...]) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
    """What the decoder reads of the tokens beside their embeddings, in the order of the names."""

    def places(attention_mask: Tensor, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        found = placed(program, attention_mask, input_ids.shape[1], input_ids=input_ids, is_answer=labels >= 0)
        return tuple(found[name] for name in names)

    return places


def _head_of(root: torch.nn.Module, logits: fx.Node) -> fx.Node | None:
    """The linear map that logits come from, nothing but operations on single elements between; None where it is not
    found, and every token is then read by it.
    """
    node = logits
    while node.op == "call_function" and node.target in _ON_ELEMENTS and len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
    if node.op == "call_function":
        is_linear = node.target is aten.linear.default
    else:
        is_linear = node.op == "call_module" and isinstance(get_at(root, str(node.target)), torch.nn.Linear)
    return node if is_linear and isinstance(node.args[0], fx.Node) else None


def _read_by_answers(hidden: Tensor, labels: Tensor) -> Tensor:
    """Of [B, S, D] the rows that taught tokens are read from, [n, D]: a vocabulary is wide, and answers are short."""
    if is_fake(hidden):  # how many there are is in the data
        return hidden
    return hidden[:, :-1][labels[:, 1:] >= 0]


def answer_scores(logits: Tensor, labels: Tensor) -> Tensor:
    """For every taught token its log-probability, and its logit less the largest other, [B, S, 2]; elsewhere zeros.

    A margin above zero at all tokens of an answer: greedy decoding writes exactly this answer.

    Args:
        logits: [B, S, V], those at a place are for the token behind it; or only those that taught tokens are read from,
            [n, V].
        labels: [B, S], negative where nothing is taught.
    """
    scores = logits.new_zeros((*labels.shape, 2), dtype=torch.float32)
    if is_fake(logits):  # how many tokens are taught is in the data
        return scores
    taught = labels[:, 1:] >= 0
    chosen = (logits if logits.ndim == 2 else logits[:, :-1][taught]).float()  # [n, V]
    wanted = labels[:, 1:][taught].unsqueeze(-1)
    own = chosen.gather(-1, wanted)
    others = chosen.scatter(-1, wanted, -torch.inf).amax(-1, keepdim=True)
    found = torch.cat([own - chosen.logsumexp(-1, keepdim=True), own - others], -1)
    places = torch.nn.functional.pad(taught, (1, 0))
    return scores.masked_scatter(places.unsqueeze(-1).expand_as(scores), found)
