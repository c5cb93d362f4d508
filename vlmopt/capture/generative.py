"""Assembly `generative`: images become features in an embedded prompt, and a decoder with a cache writes the answer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlmopt.capture.export import TOLERANCE, capture_component, run_eager
from vlmopt.capture.plan import CapturePlan
from vlmopt.capture.samples import longest_text, sample_inputs, text_config
from vlmopt.capture.wrappers import Decoder, TokenEmbedding, VisionEncoder, Wrapper
from vlmopt.core.errors import CaptureError
from vlmopt.core.program import Assembly, Component, Dim, Generation, ModelSource, Program
from vlmopt.graph.assembled import DECODER, EMBEDDING, VISION, embedded, positions, step

BATCH, SEQUENCE, PAST = (2, 3), (5, 7), (4, 3)  # two sizes of each, none of them 0 or 1
TYPICAL_SEQUENCE = 64  # tokens of a prompt without its images
MARGIN = 10  # the whole model may depart from eager so many times further than one of its parts


def is_generative(model: nn.Module) -> bool:
    """It writes text, and encoder of images, embedding and decoder can be called alone."""
    names = ("get_image_features", "get_decoder", "get_input_embeddings", "get_output_embeddings", "can_generate")
    return all(hasattr(model, name) for name in names) and bool(model.can_generate())  # type: ignore[operator]


def capture_generative(model: nn.Module, source: ModelSource, plan: CapturePlan) -> Program:
    """Components `vision_encoder`, `embed_tokens` and `decoder_model_merged`, compared with the model as a whole.

    Raises:
        CaptureError: a part cannot be captured, or the whole is more than its parts.
    """
    _refuse_types(model, source)
    dims = _dims(plan)
    embedding = _component(EMBEDDING, TokenEmbedding(model), {"input_ids": ("batch", "sequence")}, dims, plan)
    pixels = {"pixel_values": ("images", plan.channels, *plan.image)}
    vision = _component(VISION, VisionEncoder(model), pixels, dims, plan)
    _, n_features, width = vision.outputs[0].shape
    decoder = _decoder(model, plan, dims, int(width))
    components = {part.name: part for part in (vision, embedding, decoder)}
    generation = Generation(_image_token(model, source), int(n_features), _stop_tokens(model))
    program = Program(Assembly.GENERATIVE, components, dims, source, generation=generation)
    if plan.with_weights:
        _compare_whole(model, program, plan)
    return program


def _dims(plan: CapturePlan) -> dict[str, Dim]:
    longest = longest_text(plan.config)
    batch = plan.dims["batch"]
    typical = min(TYPICAL_SEQUENCE, longest)
    return {
        "images": Dim("images", batch.minimum, batch.maximum, batch.typical),
        "batch": batch,
        "sequence": Dim("sequence", 1, longest, typical),
        "past": Dim("past", 0, longest, 0),
        "total": Dim("total", 1, 2 * longest, typical, sum_of=("sequence", "past")),
    }


def _component(
    name: str,
    wrapper: Wrapper,
    shapes: Mapping[str, tuple[int | str, ...]],
    dims: Mapping[str, Dim],
    plan: CapturePlan,
) -> Component:
    sizes = [
        {"images": b, "batch": b, "sequence": s, "past": p, "total": s + p}
        for b, s, p in zip(BATCH, SEQUENCE, PAST, strict=True)
    ]
    used = {size for shape in shapes.values() for size in shape}
    return capture_component(
        name,
        wrapper.eval(),
        [_sample(plan, shapes, size) for size in sizes],
        dims={key: dim for key, dim in dims.items() if key in used},
        shapes=shapes,
        rewrite=plan.rewrite(wrapper.model),
        is_checked=plan.with_weights,
    )


def _sample(
    plan: CapturePlan, shapes: Mapping[str, tuple[int | str, ...]], sizes: Mapping[str, int]
) -> dict[str, Tensor]:
    """Inputs of these shapes; in every other row the first token is padding."""
    made: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(sizes["total"])
    for name, named in shapes.items():
        shape = [size if isinstance(size, int) else sizes[size] for size in named]
        if name == "input_ids":
            made[name] = torch.randint(0, int(text_config(plan.config).vocab_size), shape, generator=generator)
        elif name == "attention_mask":
            made[name] = torch.ones(shape, dtype=torch.int64)
            made[name][1::2, 0] = 0
        elif name == "position_ids":
            # contiguous, for torch.export takes the strides of a slice for sizes
            made[name] = positions(made["attention_mask"])[:, -sizes["sequence"] :].contiguous()
        else:
            made[name] = torch.randn(shape, generator=generator, dtype=getattr(torch, plan.dtype))
    return {name: value.to(plan.device) for name, value in made.items()}


def _decoder(model: nn.Module, plan: CapturePlan, dims: Mapping[str, Dim], width: int) -> Component:
    entries = _cache_entries(model, plan, width)
    wrapper = Decoder(model, len(entries) // 2)
    shapes: dict[str, tuple[int | str, ...]] = {
        "inputs_embeds": ("batch", "sequence", width),
        "attention_mask": ("batch", "total"),
        "position_ids": ("batch", "sequence"),
    }
    for name, (heads, size) in zip(wrapper.inputs[len(shapes) :], entries, strict=True):
        shapes[name] = ("batch", heads, "past", size)
    return _component(DECODER, wrapper, shapes, dims, plan)


def _cache_entries(model: nn.Module, plan: CapturePlan, width: int) -> list[tuple[int, int]]:
    """Heads and width of the keys and the values that each layer keeps, as one step of eager returns them."""
    sizes = {"batch": 1, "sequence": 2, "total": 2}
    named = {"attention_mask": ("batch", "total"), "inputs_embeds": ("batch", "sequence", width)}
    sample = _sample(plan, {**named, "position_ids": ("batch", "sequence")}, sizes)
    probe = Decoder(model, 0)
    _, *present = run_eager(DECODER, probe, {**sample, "past": ()}, call=probe)
    return [(int(value.shape[1]), int(value.shape[3])) for value in present]


def _refuse_types(model: nn.Module, source: ModelSource) -> None:
    """Types of tokens say which of them see what comes behind them; the mask of the decoder knows the order alone."""
    if "token_type_ids" in inspect.signature(model.forward).parameters:
        raise CaptureError(
            source.path,
            f"{source.architecture} reads types of tokens, which decide who sees whom",
            expected="a decoder in which every token sees those before it",
        )


def _image_token(model: nn.Module, source: ModelSource) -> int:
    config: Any = model.config
    for name in ("image_token_id", "image_token_index"):
        if isinstance(found := getattr(config, name, None), int):
            return found
    raise CaptureError(
        source.path,
        "config.json names no token for images",
        expected="image_token_id or image_token_index",
    )


def _stop_tokens(model: nn.Module) -> tuple[int, ...]:
    config: Any = getattr(model, "generation_config", None)
    found = getattr(config, "eos_token_id", None)
    return () if found is None else tuple(found) if isinstance(found, list | tuple) else (int(found),)


def _compare_whole(model: nn.Module, program: Program, plan: CapturePlan) -> None:
    """Two prompts with an image each, one padded, and one more token: the logits of the program and of eager.

    Raises:
        CaptureError: they differ, so the model does more than its parts show.
    """
    assert program.generation is not None
    mark, n = program.generation.image_token, program.generation.image_tokens
    sample = sample_inputs(plan.config, ("pixel_values",), batch=2, text=4, image=plan.image)
    pixels = sample["pixel_values"].to(plan.device, getattr(torch, plan.dtype))
    words = torch.randint(
        0, int(text_config(plan.config).vocab_size), (2, 7), generator=torch.Generator().manual_seed(0)
    )
    words[words == mark] = mark - 1 if mark else 1
    ids = torch.cat([words[:, :2], torch.full((2, n), mark), words[:, 2:]], 1).to(plan.device)
    mask = torch.ones_like(ids)
    mask[1, 0] = 0
    whole = Wrapper(model)
    with torch.no_grad():
        prompt = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask), "pixel_values": pixels}
        eager: Any = run_eager("the model", whole, {**prompt, "use_cache": True})
        logits, cache = step(program, embedded(program, ids, pixels), mask)
        _require(logits, eager.logits, mask, "a prompt with an image")
        more = words[:, :1].to(plan.device)
        mask = torch.cat([mask, torch.ones_like(more)], 1)
        one_more = {"input_ids": more, "attention_mask": mask, "position_ids": positions(mask)[:, -1:]}
        kept = {"past_key_values": eager.past_key_values, "use_cache": True}
        again: Any = run_eager("the model", whole, {**one_more, **kept})
        logits, _ = step(program, embedded(program, more), mask, cache)
        _require(logits, again.logits, torch.ones_like(more), "the step behind it")


def _require(found: Tensor, wanted: Tensor, mask: Tensor, what: str) -> None:
    seen = mask.bool()
    scale = wanted[seen].double().abs().max().clamp(min=1e-6)
    worst = float((found[seen].double() - wanted[seen].double()).abs().max() / scale)
    allowed = MARGIN * TOLERANCE.get(wanted.dtype, 1e-5)
    if not worst <= allowed:
        raise CaptureError(
            "the assembled model",
            f"differs from eager by {worst:.2g} of the largest logit at {what}",
            expected=f"at most {allowed:.0e}",
            remedy="what this family does beside its parts belongs into vlmopt/capture/generative.py",
        )
