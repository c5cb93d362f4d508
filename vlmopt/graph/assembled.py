"""A generative program as one model in PyTorch: a prompt with images in, logits and the cache for the next step out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from vlmopt.core.errors import VlmoptError
from vlmopt.core.program import PAST, PRESENT, Component, Generation, Program
from vlmopt.graph.replay import inputs_of

VISION, EMBEDDING, DECODER = "vision_encoder", "embed_tokens", "decoder_model_merged"
ENCODER = "encoder_model"  # reads the prompt of a model whose decoder attends to it across
ENCODER_MASK = "encoder_attention_mask"

Cache = Mapping[str, Tensor]  # inputs `past_key_values_N_*` of the decoder, [B, H, P, K], and what it attends to across


@dataclass(frozen=True)
class Opening:
    """What the decoder reads first: tokens [B, S] with their mask, as embeddings [B, S, D], and its cache."""

    input_ids: Tensor
    attention_mask: Tensor
    inputs_embeds: Tensor
    cache: dict[str, Tensor]


def opened(program: Program, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor | None = None) -> Opening:
    """The beginning of an answer to prompts [B, S], padded on the left. For images see `embedded`.

    Raises:
        VlmoptError: the decoder attends to an image, and there is not one for every prompt; a prompt does not begin
            with the token that it has to begin with; or it has other places than images have features.
    """
    generation, decoder = _generation(program), program.components[DECODER]
    first = input_ids.gather(1, attention_mask.argmax(1, keepdim=True))
    if generation.first_token is not None and not bool((first == generation.first_token).all()):
        found = f"one begins with token {int(first[first != generation.first_token][0])}"
        expected = f"{generation.first_token}, of which the program holds constants"
        raise VlmoptError("the prompts", found, expected=expected, remedy="leave out freeze-first-token")
    cache = empty_cache(decoder, len(input_ids))
    if generation.cross_source is None:
        return Opening(input_ids, attention_mask, embedded(program, input_ids, pixel_values), cache)
    source = program.components[generation.cross_source]
    if generation.reads_across:
        ids, mask = on_the_right(input_ids, attention_mask)
        cache |= _crossed(source, encoder_feed(program, ids, mask, pixel_values))
        if any(spec.name == ENCODER_MASK for spec in decoder.inputs):
            cache[ENCODER_MASK] = mask
        input_ids = ids.new_tensor(generation.start_tokens).expand(len(ids), -1)
        attention_mask = torch.ones_like(input_ids)
    else:
        cache |= _crossed(source, {source.inputs[0].name: _images(source, pixel_values, len(input_ids))})
    return Opening(input_ids, attention_mask, embedded(program, input_ids), cache)


def on_the_right(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows padded on their left, moved so that they are padded on their right: encoders count from the left."""
    length = attention_mask.sum(-1, keepdim=True)
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    ids = input_ids.gather(1, (places - length) % input_ids.shape[1])
    return ids, (places < length).to(attention_mask.dtype)


def encoder_feed(
    program: Program, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor | None
) -> dict[str, Tensor]:
    """What the encoder of prompts reads, of whichever of these it takes: tokens or embeddings, mask, features."""
    names = {spec.name for spec in program.components[ENCODER].inputs}
    feed = {"input_ids": input_ids, "attention_mask": attention_mask}
    if "inputs_embeds" in names:
        feed["inputs_embeds"] = embedded(program, input_ids, pixel_values)
    if "image_features" in names:
        vision = program.components[VISION]
        pixels = _images(vision, pixel_values, len(input_ids))
        (feed["image_features"],) = _run(vision, {vision.inputs[0].name: pixels})
    return feed


def _crossed(source: Component, feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the decoder attends to across, by the names of its inputs."""
    pairs = zip(source.outputs, _run(source, feed), strict=True)
    return {spec.name.replace(PRESENT, PAST, 1): value for spec, value in pairs if spec.is_cross}


def _images(vision: Component, pixel_values: Tensor | None, n_prompts: int) -> Tensor:
    """One image for every prompt, in the shape of the graph's input."""
    n_images = 0
    if pixel_values is not None:
        images = pixel_values.reshape(-1, *(int(size) for size in vision.inputs[0].shape[1:]))
        if (n_images := len(images)) == n_prompts:
            return images
    raise VlmoptError("the prompts", f"{n_images} images for {n_prompts}", expected="one image for every prompt")


def embedded(program: Program, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
    """The prompt as the decoder reads it, [B, S, D].

    Args:
        input_ids: [B, S], with `image_token` wherever a feature of an image belongs.
        pixel_values: the images of all prompts in order, [N, C, H, W], or as the processor of the model lays them out:
            the same numbers in the same order.
    """
    (embeds,) = _run(program.components[EMBEDDING], {"input_ids": input_ids})
    if pixel_values is None:
        return embeds
    vision = program.components[VISION]
    assert "image_features" in {spec.name for spec in vision.outputs}, "the decoder attends to images across"
    images = pixel_values.reshape(-1, *(int(size) for size in vision.inputs[0].shape[1:]))
    (features,) = _run(vision, {"pixel_values": images})
    return merged(embeds, features, input_ids, _generation(program).image_token)


def merged(embeds: Tensor, features: Tensor, input_ids: Tensor, image_token: int) -> Tensor:
    """Features of images [N, T, D] in their places, [B, S, D].

    Raises:
        VlmoptError: there are more or fewer places than features, so that they would lie wrong.
    """
    places = input_ids == image_token
    if not is_fake(places):  # how many there are is in the data
        n_places, n_features = int(places.sum()), features.shape[:-1].numel()
        if n_places != n_features:
            found = f"have {n_places} places for features of images, and the images have {n_features}"
            raise VlmoptError("the prompts", found, expected="as many of either")
    return embeds.masked_scatter(places.unsqueeze(-1).expand_as(embeds), features.to(embeds.dtype))


def empty_cache(decoder: Component, batch: int) -> dict[str, Tensor]:
    """The cache before the first step: nothing for every layer that keeps keys and values of its own tokens."""
    sizes = {"batch": batch, "past": 0}
    shapes = {
        spec.name: [size if isinstance(size, int) else sizes[size] for size in spec.shape]
        for spec in decoder.inputs
        if spec.name.startswith(PAST) and not spec.is_cross
    }
    dtypes = {spec.name: getattr(torch, spec.dtype) for spec in decoder.inputs}
    return {name: torch.zeros(shape, dtype=dtypes[name]) for name, shape in shapes.items()}


def step(
    program: Program,
    inputs_embeds: Tensor,
    attention_mask: Tensor,
    cache: Cache | None = None,
    *,
    input_ids: Tensor | None = None,
    is_answer: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of the tokens [B, S, V], and the cache for the next step.

    Args:
        attention_mask: [B, P + S] for what the cache holds and for these tokens; zeros are padding, on the left.
        cache: by default nothing is past; of a decoder that attends across, that of `opened`.
        input_ids, is_answer: see `placed`.
    """
    decoder = program.components[DECODER]
    feed = {
        "inputs_embeds": inputs_embeds,
        **placed(program, attention_mask, inputs_embeds.shape[1], input_ids=input_ids, is_answer=is_answer),
        **(empty_cache(decoder, len(inputs_embeds)) if cache is None else cache),
    }
    logits, *present = _run(decoder, feed)
    names = [spec.name.replace(PRESENT, PAST, 1) for spec in decoder.outputs[1:]]
    kept = {} if cache is None else {name: value for name, value in cache.items() if name not in names}
    return logits, {**dict(zip(names, present, strict=True)), **kept}


def placed(
    program: Program,
    attention_mask: Tensor,
    n_new: int,
    *,
    input_ids: Tensor | None = None,
    is_answer: Tensor | None = None,
) -> dict[str, Tensor]:
    """What the decoder reads of the last `n_new` tokens beside their embeddings: the mask, and where and what they are.

    Args:
        attention_mask: [B, P + S] for all tokens so far, S of them new.
        input_ids: [B, P + S], the tokens so far; only a model that tells images from text by place or type needs them.
        is_answer: [B, S], which of the new tokens the model wrote; by default all of them where something is past.

    Raises:
        VlmoptError: the model needs `input_ids`.
    """
    generation = _generation(program)
    found = {"attention_mask": attention_mask}
    if generation.image_grid is None:
        found["position_ids"] = positions(attention_mask)[:, -n_new:] + generation.first_position
    else:
        found["position_ids"] = grid_positions(generation, attention_mask, _needed(input_ids))[:, :, -n_new:]
    if generation.token_types is not None:
        if is_answer is None:
            is_answer = torch.full_like(attention_mask[:, -n_new:], attention_mask.shape[1] > n_new, dtype=torch.bool)
        found["token_type_ids"] = _token_types(generation, is_answer, input_ids)
    return found


def positions(attention_mask: Tensor) -> Tensor:
    """The place of every token among those of its prompt, [B, N]; padding counts as the first."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def grid_positions(generation: Generation, attention_mask: Tensor, input_ids: Tensor) -> Tensor:
    """Time, row and column of every token, [3, B, N]: text counts on in all three, an image of R x C features lies in
    one plane of them and moves what follows on by max(R, C).

    Source: Wang et al. 2024, arXiv 2409.12191, section 2.1, multimodal rotary position embedding; here without video.
    """
    assert generation.image_grid is not None
    rows, columns = generation.image_grid
    is_image = (input_ids == generation.image_token) & attention_mask.bool()
    count = is_image.cumsum(-1)
    # less than an image are tokens that the model wrote itself, and text to it
    is_image = is_image & (count <= count[:, -1:] // (rows * columns) * (rows * columns))
    within = (count - 1) % (rows * columns)
    is_last = is_image & (within == rows * columns - 1)
    moves = torch.where(is_image, is_last * max(rows, columns), attention_mask)
    start = moves.cumsum(-1) - moves
    places = torch.stack([torch.zeros_like(within), within // columns, within % columns])
    return start + torch.where(is_image, places, 0)


def _token_types(generation: Generation, is_answer: Tensor, input_ids: Tensor | None) -> Tensor:
    assert generation.token_types is not None
    text, image, answer = generation.token_types
    types = torch.where(is_answer, answer, text)
    if image == text or (input_ids is None and bool(is_answer.all())):
        return types
    is_image = _needed(input_ids)[:, -is_answer.shape[1] :] == generation.image_token
    return torch.where(is_image & ~is_answer, image, types)


def _needed(input_ids: Tensor | None) -> Tensor:
    if input_ids is None:
        raise VlmoptError(
            "a step of the assembled model",
            "places and types of its tokens depend on where the images are",
            expected="input_ids [B, P + S], the tokens so far",
        )
    return input_ids


def _generation(program: Program) -> Generation:
    assert program.generation is not None
    return program.generation


def _run(component: Component, feed: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = component.graph(*inputs_of(component, feed))
    return found


def greedy(
    program: Program,
    input_ids: Tensor,
    attention_mask: Tensor,
    pixel_values: Tensor | None,
    max_new_tokens: int,
    stop_tokens: frozenset[int],
) -> Tensor:
    """The likeliest token after the other behind prompts padded on the left, [B, T]; -1 behind the end of an answer."""
    stops = torch.tensor(sorted(stop_tokens | set(_generation(program).stop_tokens)), device=input_ids.device)
    found: list[Tensor] = []
    with torch.no_grad():
        has_ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        opening = opened(program, input_ids, attention_mask, pixel_values)
        input_ids, attention_mask = opening.input_ids, opening.attention_mask
        logits, cache = step(program, opening.inputs_embeds, attention_mask, opening.cache, input_ids=input_ids)
        while True:
            token = logits[:, -1].argmax(-1)
            found.append(torch.where(has_ended, -1, token))
            has_ended |= torch.isin(token, stops)
            if bool(has_ended.all()) or len(found) == max_new_tokens:
                return torch.stack(found, 1)
            input_ids = torch.cat([input_ids, token[:, None]], 1)
            attention_mask = torch.cat([attention_mask, torch.ones_like(token[:, None])], 1)
            logits, cache = step(program, embedded(program, token[:, None]), attention_mask, cache, input_ids=input_ids)
