"""Components of a model whose decoder attends across: to an image, or to a prompt that an encoder has read.

Keys and values of what is attended to are made once for a prompt, by the component in front of the decoder, and are
inputs of the decoder: `past_key_values_N_encoder_key`, `past_key_values_N_encoder_value` [B, H, E, K].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from vlmopt.capture.across import Across, Reading
from vlmopt.capture.export import run_eager
from vlmopt.capture.parts import dims_of, part
from vlmopt.capture.plan import CapturePlan
from vlmopt.capture.samples import vision_config
from vlmopt.capture.whole import compare_alone
from vlmopt.capture.wrappers import Wrapper
from vlmopt.core.program import PAST, PRESENT, Assembly, Generation, ModelSource, Program
from vlmopt.graph.assembled import DECODER, EMBEDDING, ENCODER, ENCODER_MASK, VISION

Shape = tuple[int | str, ...]
SIDES = ("key", "value")


class _Part(Wrapper):
    """A wrapper that calls the model by an `Across`, which is no module and holds the same model."""

    def __init__(self, across: Across) -> None:
        super().__init__(across.model)
        self.across = across

    def crossed(self, states: Tensor) -> list[Tensor]:
        """Keys and values of every layer for states [B, E, D]: what the decoder keeps of them in a step."""
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        embeds = states.new_zeros(states.shape[0], 1, self.across.width)
        places = torch.zeros_like(embeds[..., 0], dtype=torch.int64)
        self.across.decoded(embeds, places + 1, places, cache, states, None)
        return _entries(cache.cross_attention_cache)


class Embedding(_Part):
    """`input_ids` [B, S] -> `inputs_embeds` [B, S, D]."""

    inputs = ("input_ids",)
    outputs = ("inputs_embeds",)

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        return (self.across.embedding()(input_ids),)


class Features(_Part):
    """`pixel_values` [N, 3, H, W] -> `image_features` [N, T, D], which an encoder of prompts reads."""

    inputs = ("pixel_values",)
    outputs = ("image_features",)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor]:
        return (self.across.features(pixel_values),)


class SeenAcross(_Part):
    """`pixel_values` [N, 3, H, W] -> keys and values of the images for every layer of the decoder, [N, H, T, K]."""

    inputs = ("pixel_values",)

    def __init__(self, across: Across, n_layers: int) -> None:
        super().__init__(across)
        self.outputs = _names(PRESENT, "encoder", n_layers)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.crossed(self.across.features(pixel_values)))


class ReadAcross(_Part):
    """A prompt [B, E] as the model's encoder takes it -> its keys and values for every layer of the decoder."""

    def __init__(self, across: Reading, n_layers: int) -> None:
        super().__init__(across)
        self.encoded = across.encoded
        self.inputs = across.reads
        self.outputs = _names(PRESENT, "encoder", n_layers)

    def arguments(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {"read": tuple(values[name] for name in self.inputs)}

    def forward(self, read: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(self.crossed(self.encoded(**dict(zip(self.inputs, read, strict=True)))))


class CrossDecoder(_Part):
    """`inputs_embeds` [B, S, D], `attention_mask` [B, P + S], `position_ids` [B, S], where what it attends to may be
    padded `encoder_attention_mask` [B, E], its own past keys and values [B, H, P, K] and those across [B, H, E, K]
    -> `logits` [B, S, V] and its own keys and values [B, H, P + S, K].
    """

    def __init__(self, across: Across, n_layers: int) -> None:
        super().__init__(across)
        self.past = (*_names(PAST, "decoder", n_layers), *_names(PAST, "encoder", n_layers))
        padded = (ENCODER_MASK,) if across.reads else ()
        self.inputs = ("inputs_embeds", "attention_mask", "position_ids", *padded, *self.past)
        self.outputs = ("logits", *_names(PRESENT, "decoder", n_layers))

    def arguments(self, values: Mapping[str, Any]) -> dict[str, Any]:
        own = {name: values[name] for name in self.inputs if name not in self.past}
        return own | {"past": tuple(values[name] for name in self.past)}

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        encoder_attention_mask: Tensor | None = None,
        past: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, ...]:
        half = len(past) // 2
        cache = EncoderDecoderCache(_filled(past[:half]), _filled(past[half:]))
        # what its keys were made of is read no more, but for its length
        states = past[half].transpose(1, 2).flatten(2)
        logits = self.across.decoded(inputs_embeds, attention_mask, position_ids, cache, states, encoder_attention_mask)
        return (logits, *_entries(cache.self_attention_cache))


def capture_crossed(across: Across, source: ModelSource, plan: CapturePlan) -> Program:
    """Components `vision_encoder`, `embed_tokens`, `encoder_model` where the model reads prompts with one, and
    `decoder_model_merged`, compared with the model as a whole.

    Raises:
        CaptureError: a part cannot be captured, or the whole is more than its parts.
    """
    dims = dims_of(plan, has_encoder=bool(across.reads))
    own, seen = _probed(across, plan)
    n_layers = len(own) // 2
    pixels: dict[str, Shape] = {"pixel_values": ("images", plan.channels, *plan.image)}
    tower = Features(across) if across.reads else SeenAcross(across, n_layers)
    parts = [
        part(VISION, tower, pixels, dims, plan),
        part(EMBEDDING, Embedding(across), {"input_ids": ("batch", "sequence")}, dims, plan),
    ]
    image_tokens, shape = 0, parts[0].outputs[0].shape
    if isinstance(across, Reading):
        n_features, width = int(shape[1]), int(shape[2])
        image_tokens = n_features if "image_features" not in across.reads else 0
        parts.append(part(ENCODER, ReadAcross(across, n_layers), _read(across, n_features, width), dims, plan))
    length = "encoder" if across.reads else int(shape[2])
    decoder = CrossDecoder(across, n_layers)
    parts.append(part(DECODER, decoder, _decoder_shapes(decoder, [*own, *seen], length), dims, plan))
    generation = Generation(
        across.image_token,
        image_tokens,
        across.stop_tokens(),
        across.start_tokens(),
        cross_source=ENCODER if across.reads else VISION,
    )
    components = {each.name: each for each in parts}
    program = Program(Assembly.GENERATIVE, components, dims, source, generation=generation)
    if plan.with_weights:
        compare_alone(across.model, program, plan, across.asked)
    return program


def _read(across: Across, n_features: int, width: int) -> dict[str, Shape]:
    """Shapes of what the encoder of prompts takes."""
    known: dict[str, Shape] = {
        "input_ids": ("batch", "encoder"),
        "inputs_embeds": ("batch", "encoder", across.width),
        "attention_mask": ("batch", "encoder"),
        "image_features": ("batch", n_features, width),
    }
    return {name: known[name] for name in across.reads}


def _decoder_shapes(wrapper: CrossDecoder, entries: Sequence[tuple[int, int]], length: int | str) -> dict[str, Shape]:
    width = wrapper.across.width
    known: dict[str, Shape] = {
        "inputs_embeds": ("batch", "sequence", width),
        "attention_mask": ("batch", "total"),
        "position_ids": ("batch", "sequence"),
        ENCODER_MASK: ("batch", "encoder"),
    }
    shapes = {name: known[name] for name in wrapper.inputs if name in known}
    for name, (heads, size) in zip(wrapper.past, entries, strict=True):
        shapes[name] = ("batch", heads, length if "_encoder_" in name else "past", size)
    return shapes


def _probed(across: Across, plan: CapturePlan) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Heads and width of the keys and values that each layer keeps of its own tokens, and of what it attends to, as a
    step of eager shows them."""
    wide = _state_width(across)
    dtype = getattr(torch, plan.dtype)
    states = torch.zeros(1, 2, wide, dtype=dtype, device=plan.device)
    embeds = states.new_zeros(1, 1, across.width)
    places = torch.zeros(1, 1, dtype=torch.int64, device=plan.device)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())

    def step(**given: Any) -> Tensor:
        return across.decoded(**given, cache=cache, states_mask=None)

    feed = {"embeds": embeds, "mask": places + 1, "positions": places, "states": states}
    run_eager(DECODER, Wrapper(across.model), feed, call=step)
    caches = (cache.self_attention_cache, cache.cross_attention_cache)
    own, seen = ([(int(v.shape[1]), int(v.shape[3])) for v in _entries(each)] for each in caches)
    return own, seen


def _state_width(across: Across) -> int:
    """Width of the states that the decoder attends to."""
    if across.reads:
        return across.width
    return int(vision_config(across.model.config).hidden_size)


def _names(prefix: str, kind: str, n_layers: int) -> tuple[str, ...]:
    return tuple(f"{prefix}{layer}_{kind}_{side}" for layer in range(n_layers) for side in SIDES)


def _filled(past: Sequence[Tensor]) -> DynamicCache:
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(zip(past[::2], past[1::2], strict=True)):
        cache.update(keys, values, layer)
    return cache


def _entries(cache: Any) -> list[Tensor]:
    return [value for layer in cache.layers for value in (layer.keys, layer.values)]
