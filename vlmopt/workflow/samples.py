"""A few inputs of every component: of the task where there is one, drawn where there is none."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmopt.core.program import NO_WORD, Assembly, Component, Program
from vlmopt.core.workload import Feed
from vlmopt.graph.assembled import (
    DECODER,
    EMBEDDING,
    ENCODER,
    VISION,
    embedded,
    encoder_feed,
    on_the_right,
    opened,
    placed,
    step,
)
from vlmopt.graph.modules import get_at, placeholders
from vlmopt.graph.replay import device_of
from vlmopt.tasks.binding import TaskWorkload
from vlmopt.verify.parity import two_shapes

PARITY_BATCH = 4
WORDS = 8  # of a drawn prompt, beside an image's features
_LARGEST_WORD = 50  # ids below it are in nearly every vocabulary


def sample_feeds(program: Program, fit: TaskWorkload | None, *, seed: int) -> dict[str, Feed]:
    """A few samples of the workload for every component; random inputs of the right shapes where it has none."""
    if program.assembly is Assembly.GENERATIVE:
        return {name: shapes[0] for name, shapes in _generative(program, PARITY_BATCH, seed=seed).items()}
    feeds: dict[str, Feed] = {}
    for name, component in program.components.items():
        if fit is not None and name in fit.feeds:
            first = fit.feeds[name][0]
            feeds[name] = {key: value[:PARITY_BATCH] for key, value in first.items()}
        else:
            feeds[name] = random_feed(component, program, seed=seed)
    return feeds


def sample_shapes(program: Program, fit: TaskWorkload | None, *, seed: int) -> dict[str, list[Feed]]:
    """Inputs of every component at two shapes; of a decoder a prompt, and a step behind prompts one of them padded."""
    if program.assembly is Assembly.GENERATIVE:
        return _generative(program, 1, seed=seed)
    feeds = sample_feeds(program, fit, seed=seed)
    parts = program.components.items()
    return {name: two_shapes(component, feeds[name], program.dims) for name, component in parts}


def single(component: Component, feed: Feed) -> Feed:
    """The first sample of a batch, on the CPU; the batch need not be the first axis."""
    found: dict[str, Tensor] = {}
    for spec in component.inputs:
        axis = next((i for i, size in enumerate(spec.shape) if size in ("batch", "images")), 0)
        found[spec.name] = feed[spec.name].narrow(axis, 0, 1).cpu().contiguous()
    return found


def random_feed(component: Component, program: Program, *, seed: int) -> Feed:
    """Seeded inputs of the component's shapes: normal pixels, small token ids, a full mask."""
    generator = torch.Generator().manual_seed(seed)
    feed: dict[str, Tensor] = {}
    for spec in component.inputs:
        shape = [
            dim if isinstance(dim, int) else PARITY_BATCH if dim == "batch" else program.dims[dim].typical
            for dim in spec.shape
        ]
        dtype = getattr(torch, spec.dtype)
        if dtype.is_floating_point:
            feed[spec.name] = torch.randn(shape, generator=generator).to(dtype)
        elif "mask" in spec.name:
            feed[spec.name] = torch.ones(shape, dtype=dtype)
        else:
            n_words = min([_LARGEST_WORD, *_tables(component, spec.name)])
            feed[spec.name] = torch.randint(min(1, n_words - 1), n_words, shape, generator=generator, dtype=dtype)
    return feed


def _tables(component: Component, name: str) -> list[int]:
    """Rows of the tables that are read at an input's numbers."""
    (given,) = (node for node in placeholders(component.graph) if name in (node.name, node.target))
    leaves = (get_at(component.graph, str(node.target)) for node in given.users if node.op == "call_module")
    rows = (getattr(leaf, "num_embeddings", None) for leaf in leaves)
    return [n for n in rows if isinstance(n, int)]


def _generative(program: Program, batch: int, *, seed: int) -> dict[str, list[Feed]]:
    """`batch` prompts with an image each, and behind two more, one of them padded, a step with a cache."""
    prompt, pixels = _prompts(program, batch, seed=seed)
    others, other_pixels = _prompts(program, 2, seed=seed + 1)
    word = others[:, -1:]
    others = torch.stack([torch.cat([others[0], word[0]]), torch.cat([word[1], others[1]])])
    mask = torch.ones_like(others)
    mask[1, 0] = 0
    given = [(prompt, torch.ones_like(prompt), pixels), (others, mask, other_pixels)]
    with torch.no_grad():
        first, second = (opened(program, *each) for each in given)
        _, cache = step(program, second.inputs_embeds, second.attention_mask, second.cache, input_ids=second.input_ids)
        word = second.input_ids[:, -1:]
        longer, mask = (torch.cat([v, v[:, -1:]], 1) for v in (second.input_ids, second.attention_mask))
        next_ = {"inputs_embeds": embedded(program, word), **placed(program, mask, 1, input_ids=longer), **cache}
        start = {
            "inputs_embeds": first.inputs_embeds,
            **placed(program, first.attention_mask, first.input_ids.shape[1], input_ids=first.input_ids),
            **first.cache,
        }
        feeds = {
            VISION: [{"pixel_values": pixels}, {"pixel_values": other_pixels}],
            EMBEDDING: [{"input_ids": prompt}, {"input_ids": word}],
            DECODER: [start, next_],
        }
        if ENCODER in program.components:
            rows = [(*on_the_right(ids, mask), images) for ids, mask, images in given]
            feeds[ENCODER] = [encoder_feed(program, *each) for each in rows]
    return {name: [_ordered(program.components[name], feed) for feed in shapes] for name, shapes in feeds.items()}


def _ordered(component: Component, feed: Feed) -> Feed:
    """The inputs that the component takes, in its order, on the CPU."""
    return {spec.name: feed[spec.name].detach().cpu().contiguous() for spec in component.inputs}


def _prompts(program: Program, batch: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Prompts of one length with an image each [B, S], and the images. An image that no word stands for comes first."""
    assert program.generation is not None
    generator = torch.Generator().manual_seed(seed)
    mark, vision = program.generation.image_token, program.components[VISION]
    words = torch.randint(1, _LARGEST_WORD, (batch, WORDS), generator=generator)
    words[words == mark] = _LARGEST_WORD if mark != _LARGEST_WORD else 1
    if program.generation.first_token is not None:
        words[:, 0] = program.generation.first_token
    places = torch.full((batch, program.generation.image_tokens), mark)
    shape = [batch, *(int(size) for size in vision.inputs[0].shape[1:])]
    pixels = torch.randn(shape, generator=generator).to(getattr(torch, vision.inputs[0].dtype))
    device = device_of(program.components[DECODER].graph)
    n_before = 0 if mark == NO_WORD else 2
    return torch.cat([words[:, :n_before], places, words[:, n_before:]], 1).to(device), pixels.to(device)
