"""Phantom dimensions for prompts that all begin with one token: what token 0 gives becomes constants.

A causal decoder computes nothing of its first token from the others, so q_0, k_0 and v_0 of every layer
(`vlmopt/graph/phantom.py`) are those of the token alone. With them stored, what the modules make of token 0 is
constant too, and the cache needs no entry for its queries. Whether the decoder is causal is found out by running it
with other tokens behind the first one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, fx, nn

from vlmopt.core.program import NO_WORD, Component, Program
from vlmopt.graph.assembled import DECODER, EMBEDDING, embedded, empty_cache, placed
from vlmopt.graph.modules import output_values, set_at
from vlmopt.graph.phantom_removal import Phantom, entry_of, find_phantoms, first_value, without_entry
from vlmopt.graph.replay import Replay

PARTS = ("query", "key", "value")
N_TOKENS = 3  # of the prompts that are run: the first token, and two behind it
_TOLERANCE = 1e-5  # of the largest number: by so much two kernels may round the same token apart

Values = Mapping[str, Tensor]  # of token 0, [1, H, 1, d], by PARTS


def why_not_fixed(program: Program, token: int) -> str:
    """Why no prompt can be said to begin with the token; empty where it can."""
    generation = program.generation
    if generation is None or EMBEDDING not in program.components:
        return "the program writes no text, so that nothing is its first token"
    if generation.cross_source is not None:
        return "the decoder attends to an image or a prompt across, so that its first token is not the same every time"
    if generation.image_token == NO_WORD or token == generation.image_token:
        return "a prompt begins with an image"
    n_words = _n_words(program)
    return "" if 0 <= token < n_words else f"token {token} is none of the {n_words} of the model"


def values_of_first(program: Program, token: int) -> dict[str, Values | str]:
    """For every phantom dimension of the decoder, by its path, the values of token 0, or why they are not constant."""
    assert program.generation is not None
    mark, n_words = program.generation.image_token, _n_words(program)
    others = [word for word in range(n_words) if word != mark][: 2 * (N_TOKENS - 1)]
    prompts = torch.tensor([[token, *others[: N_TOKENS - 1]], [token, *others[-N_TOKENS + 1 :]]])
    first, second = (_seen(program, prompt[None]) for prompt in prompts)
    return {path: _constant(first[path], second[path]) for path in first}


def _constant(first: Values, second: Values) -> Values | str:
    for part in PARTS:
        if first[part].is_meta:
            return "there are no weights to compute it from"
        gap = (first[part] - second[part]).abs().max()
        if gap > _TOLERANCE * first[part].abs().max():
            return "what token 0 gives depends on the tokens behind it: the decoder is not causal in the prompt"
    return first


def _n_words(program: Program) -> int:
    tables = [m for m in program.components[EMBEDDING].graph.modules() if isinstance(m, nn.Embedding)]
    return min((table.num_embeddings for table in tables), default=0)


def _seen(program: Program, ids: Tensor) -> dict[str, Values]:
    """What the phantom dimensions take for token 0 of one prompt [1, N]."""
    decoder = program.components[DECODER]
    ids = ids.to(next(iter(program.components[EMBEDDING].graph.parameters())).device)
    mask = torch.ones_like(ids)
    feed = {
        "inputs_embeds": embedded(program, ids),
        **placed(program, mask, ids.shape[1], input_ids=ids),
        **empty_cache(decoder, 1),
    }
    phantoms = [one for one in find_phantoms(decoder.graph) if not is_frozen(decoder.graph, one)]
    nodes = {one.path: first_nodes(decoder.graph, one) for one in phantoms}
    replay = Replay(decoder, [], output_values(decoder.graph)[0])
    _, seen = replay.run_keeping(feed, [node for parts in nodes.values() for node in parts.values()])
    return {path: {part: _tensor(seen[node]) for part, node in parts.items()} for path, parts in nodes.items()}


def _tensor(value: object) -> Tensor:
    assert isinstance(value, Tensor)
    return value


def first_nodes(module: fx.GraphModule, phantom: Phantom) -> dict[str, fx.Node]:
    """The nodes that hold q_0, k_0 and v_0 [B, H, 1, d], those that are folded into constants left out."""
    found = ((part, first_value(module, phantom, part)) for part in PARTS)
    return {part: node for part, node in found if node is not None}


def is_frozen(module: fx.GraphModule, phantom: Phantom) -> bool:
    return all(node.op == "get_attr" for node in first_nodes(module, phantom).values())


def freeze_first(component: Component, phantom: Phantom, values: Values) -> Component:
    """The component, its graph edited in place, with constants for token 0 and without its entry in the cache."""
    module, gone = component.graph, entry_of(component, phantom)
    for part, node in first_nodes(module, phantom).items():
        path = f"{phantom.path}.first_{part}"
        set_at(module, path, nn.Parameter(values[part].detach().clone(), requires_grad=False))
        with module.graph.inserting_before(node):
            constant = module.graph.create_node("get_attr", path)
        constant.meta["val"] = _of_one_row(node)
        readers = [user for user in node.users if user.op != "output"]
        for reader in readers:
            reader.replace_input_with(node, constant)
        _narrow([constant])
    return without_entry(component, gone)


def _narrow(constants: Iterable[fx.Node]) -> None:
    """What is made of constants alone has one row, whatever the batch."""
    narrow = set(constants)
    pending = list(narrow)
    while pending:
        for user in pending.pop().users:
            if user not in narrow and all(node in narrow for node in user.all_input_nodes):
                user.meta["val"] = _of_one_row(user)
                narrow.add(user)
                pending.append(user)


def _of_one_row(node: fx.Node) -> Tensor:
    value = node.meta["val"]
    made: Tensor = value.new_empty((1, *value.shape[1:]))
    return made
