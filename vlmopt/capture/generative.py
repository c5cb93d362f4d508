"""Assembly `generative`: images become features in an embedded prompt, and a decoder with a cache writes the answer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlmopt.capture.decoder import Decoder, reads_types
from vlmopt.capture.export import capture_component, run_eager
from vlmopt.capture.joining import generation_of
from vlmopt.capture.patches import merged_grid, n_deep, reads_patches
from vlmopt.capture.plan import CapturePlan
from vlmopt.capture.samples import longest_text, text_config
from vlmopt.capture.towers import tower_of
from vlmopt.capture.whole import compare_whole
from vlmopt.capture.wrappers import TokenEmbedding, Wrapper, image_method
from vlmopt.core.errors import CaptureError
from vlmopt.core.program import Assembly, Component, Dim, ModelSource, Program
from vlmopt.graph.assembled import DECODER, EMBEDDING, VISION, positions

BATCH, SEQUENCE, PAST = (2, 3), (5, 7), (4, 3)  # two sizes of each, none of them 0 or 1
TYPICAL_SEQUENCE = 64  # tokens of a prompt without its images


def is_generative(model: nn.Module) -> bool:
    """It writes text, and encoder of images, embedding and decoder can be called alone."""
    names = ("get_decoder", "get_input_embeddings", "get_output_embeddings", "can_generate")
    if image_method(model) is None or not all(hasattr(model, name) for name in names):
        return False
    return bool(model.can_generate())  # type: ignore[operator]


def capture_generative(model: nn.Module, source: ModelSource, plan: CapturePlan) -> Program:
    """Components `vision_encoder`, `embed_tokens` and `decoder_model_merged`, compared with the model as a whole.

    Raises:
        CaptureError: a part cannot be captured, or the whole is more than its parts.
    """
    _refuse_unread(model, source)
    dims = _dims(plan)
    tokens = TokenEmbedding(model, n_deep(model))
    embedding = _component(EMBEDDING, tokens, {"input_ids": ("batch", "sequence")}, dims, plan)
    tower, pixels = tower_of(model, plan)
    vision = _component(VISION, tower, {"pixel_values": pixels}, dims, plan)
    n_features, width = _features(vision)
    grid = merged_grid(plan.config, plan.image) if reads_patches(model) else None
    decoder = _decoder(model, plan, dims, width)
    components = {part.name: part for part in (vision, embedding, decoder)}
    generation = generation_of(model, source, image_tokens=n_features, image_grid=grid)
    program = Program(Assembly.GENERATIVE, components, dims, source, generation=generation)
    if plan.with_weights:
        compare_whole(model, program, plan, tower)
    return program


def _features(vision: Component) -> tuple[int, int]:
    """Features of one image, and their width."""
    shape = vision.outputs[0].shape
    if len(shape) != 3 or not all(isinstance(size, int) for size in shape[1:]):
        raise CaptureError(
            vision.name, f"gives features of shape {shape}", expected="images, a number of features, width"
        )
    return int(shape[1]), int(shape[2])


def _refuse_unread(model: nn.Module, source: ModelSource) -> None:
    """What a model reads and no step here gives it would be silently left out, also where the whole is compared."""
    found = ""
    config: Any = model.config
    if any(getattr(each, "is_encoder_decoder", False) for each in (config, text_config(config))):
        found = "writes its answer from the states of an encoder"
    elif "mm_token_type_ids" in inspect.signature(model.forward).parameters and not reads_patches(model):
        found = "reads kinds of tokens (mm_token_type_ids) beside their places"
    if found:
        raise CaptureError(
            source.path,
            f"{source.architecture} {found}",
            expected="a decoder that reads features of images in its prompt",
        )


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
        elif name == "token_type_ids":
            made[name] = torch.randint(0, 2, shape, generator=generator)
        elif name == "position_ids":
            # contiguous, for torch.export takes the strides of a slice for sizes
            made[name] = positions(made["attention_mask"])[:, -sizes["sequence"] :].expand(shape).contiguous()
            if len(shape) > 2:  # rows that are told apart
                made[name] += torch.arange(shape[0])[:, None, None]
        else:
            made[name] = torch.randn(shape, generator=generator, dtype=getattr(torch, plan.dtype))
    return {name: value.to(plan.device) for name, value in made.items()}


def _decoder(model: nn.Module, plan: CapturePlan, dims: Mapping[str, Dim], width: int) -> Component:
    entries = _cache_entries(model, plan, width)
    wrapper = Decoder(model, len(entries) // 2)
    shapes: dict[str, tuple[int | str, ...]] = {
        "inputs_embeds": ("batch", "sequence", width),
        "attention_mask": ("batch", "total"),
    }
    shapes |= _beside(wrapper)
    for name, (heads, size) in zip(wrapper.past, entries, strict=True):
        shapes[name] = ("batch", heads, "past", size)
    return _component(DECODER, wrapper, shapes, dims, plan)


def _beside(wrapper: Decoder) -> dict[str, tuple[int | str, ...]]:
    """Shapes of what the decoder reads of every new token beside its embedding."""
    rows: tuple[int | str, ...] = (3,) if reads_patches(wrapper.model) else ()
    types: dict[str, tuple[int | str, ...]] = {"token_type_ids": ("batch", "sequence")}
    return {"position_ids": (*rows, "batch", "sequence")} | (types if reads_types(wrapper.model) else {})


def _cache_entries(model: nn.Module, plan: CapturePlan, width: int) -> list[tuple[int, int]]:
    """Heads and width of the keys and the values that each layer keeps, as one step of eager returns them."""
    sizes = {"batch": 1, "sequence": 2, "total": 2}
    named: dict[str, tuple[int | str, ...]] = {
        "attention_mask": ("batch", "total"),
        "inputs_embeds": ("batch", "sequence", width),
    }
    probe = Decoder(model, 0)
    sample = _sample(plan, {**named, **_beside(probe)}, sizes)
    with plan.rewrite(model):  # without weights, eager would stop where it looks into the data
        _, *present = run_eager(DECODER, probe, {**sample, "past": ()}, call=probe)
    return [(int(value.shape[1]), int(value.shape[3])) for value in present]
