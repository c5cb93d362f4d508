"""A generative program as one model in PyTorch: a prompt with images in, logits and the cache for the next step out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vlmopt.core.program import PAST, PRESENT, Component, Program
from vlmopt.graph.replay import inputs_of

VISION, EMBEDDING, DECODER = "vision_encoder", "embed_tokens", "decoder_model_merged"

Cache = Mapping[str, Tensor]  # inputs `past_key_values_N_*` of the decoder, [B, H, P, K]


def embedded(program: Program, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
    """The prompt as the decoder reads it, [B, S, D].

    Args:
        input_ids: [B, S], with `image_token` wherever a feature of an image belongs.
        pixel_values: the images of all prompts in order, [N, C, H, W].
    """
    (embeds,) = _run(program.components[EMBEDDING], {"input_ids": input_ids})
    if pixel_values is None:
        return embeds
    assert program.generation is not None
    (features,) = _run(program.components[VISION], {"pixel_values": pixel_values})
    places = (input_ids == program.generation.image_token).unsqueeze(-1)
    return embeds.masked_scatter(places, features.to(embeds.dtype))


def empty_cache(decoder: Component, batch: int) -> dict[str, Tensor]:
    """The cache before the first step: nothing for every layer that has an entry."""
    sizes = {"batch": batch, "past": 0}
    shapes = {
        spec.name: [size if isinstance(size, int) else sizes[size] for size in spec.shape]
        for spec in decoder.inputs
        if spec.name.startswith(PAST)
    }
    dtypes = {spec.name: getattr(torch, spec.dtype) for spec in decoder.inputs}
    return {name: torch.zeros(shape, dtype=dtypes[name]) for name, shape in shapes.items()}


def step(
    program: Program, inputs_embeds: Tensor, attention_mask: Tensor, cache: Cache | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of the tokens [B, S, V], and the cache for the next step.

    Args:
        attention_mask: [B, P + S] for what the cache holds and for these tokens; zeros are padding, on the left.
    """
    decoder = program.components[DECODER]
    batch, n_new = inputs_embeds.shape[:2]
    feed = {
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        "position_ids": positions(attention_mask)[:, -n_new:],
        **(empty_cache(decoder, batch) if cache is None else cache),
    }
    logits, *present = _run(decoder, feed)
    names = (spec.name.replace(PRESENT, PAST, 1) for spec in decoder.outputs[1:])
    return logits, dict(zip(names, present, strict=True))


def positions(attention_mask: Tensor) -> Tensor:
    """The place of every token among those of its prompt, [B, N]; padding counts as the first."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def _run(component: Component, feed: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = component.graph(*inputs_of(component, feed))
    return found
