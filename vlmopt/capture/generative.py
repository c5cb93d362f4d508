"""Assembly `generative`: images become features in an embedded prompt, and a decoder with a cache writes the answer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from vlmopt.capture.across import across_of
from vlmopt.capture.crossed import capture_crossed
from vlmopt.capture.decoder import Decoder, reads_types
from vlmopt.capture.export import run_eager
from vlmopt.capture.joining import generation_of
from vlmopt.capture.parts import dims_of, part, sample
from vlmopt.capture.patches import merged_grid, n_deep, reads_patches
from vlmopt.capture.plan import CapturePlan
from vlmopt.capture.prefix import PrefixTower, is_prefixed
from vlmopt.capture.samples import text_config
from vlmopt.capture.towers import tower_of
from vlmopt.capture.whole import compare_alone, compare_whole
from vlmopt.capture.wrappers import TokenEmbedding, VisionEncoder, image_method
from vlmopt.core.errors import CaptureError
from vlmopt.core.program import Assembly, Component, Dim, ModelSource, Program
from vlmopt.graph.assembled import DECODER, EMBEDDING, VISION


def is_generative(model: nn.Module) -> bool:
    """It writes text, and encoder of images, embedding and decoder can be called alone."""
    if is_prefixed(model) or across_of(model) is not None:
        return True
    names = ("get_decoder", "get_input_embeddings", "get_output_embeddings", "can_generate")
    if image_method(model) is None or not all(hasattr(model, name) for name in names):
        return False
    return bool(model.can_generate())  # type: ignore[operator]


def capture_generative(model: nn.Module, source: ModelSource, plan: CapturePlan) -> Program:
    """Components `vision_encoder`, `embed_tokens` and `decoder_model_merged`, compared with the model as a whole.

    Raises:
        CaptureError: a part cannot be captured, or the whole is more than its parts.
    """
    across = across_of(model)
    if across is not None:
        return capture_crossed(across, source, plan)
    _refuse_unread(model, source)
    dims = dims_of(plan)
    tokens = TokenEmbedding(model, n_deep(model), has_places=is_prefixed(model))
    embedding = part(EMBEDDING, tokens, {"input_ids": ("batch", "sequence")}, dims, plan)
    tower, pixels = tower_of(model, plan)
    _refuse_unseen(tower, source)
    vision = part(VISION, tower, {"pixel_values": pixels}, dims, plan)
    n_features, width = _features(vision)
    grid = merged_grid(plan.config, plan.image) if reads_patches(model) else None
    decoder = _decoder(model, plan, dims, width)
    components = {part.name: part for part in (vision, embedding, decoder)}
    generation = generation_of(model, source, image_tokens=n_features, image_grid=grid)
    program = Program(Assembly.GENERATIVE, components, dims, source, generation=generation)
    if plan.with_weights:
        if isinstance(tower, PrefixTower):
            compare_alone(model, program, plan, tower.asked)
        else:
            compare_whole(model, program, plan, tower)
    return program


def _refuse_unseen(tower: VisionEncoder, source: ModelSource) -> None:
    """Features that follow from more than the pixels cannot be made before the prompt is read, or for one size."""
    method = image_method(tower.model)
    if method is None:
        return
    known = inspect.signature(method).parameters.values()
    needed = {p.name for p in known if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    needed -= {"pixel_values", *tower.beside}
    if not needed:
        return
    reads_prompt = any("input_ids" in name for name in needed)
    why = "so what it sees in an image depends on the prompt" if reads_prompt else "for images of many sizes"
    prompt_free = "the same family without the prompt there (BLIP-2 for InstructBLIP)"
    one_size = "a model with one image size or one grid (LLaVA, SmolVLM, Qwen2.5-VL)"
    raise CaptureError(
        f"{source.path}, get_image_features of {source.architecture}",
        f"needs {' and '.join(sorted(needed))} beside the pixels, {why}",
        expected="features that follow from the pixels of images of one size alone",
        remedy=f"take {prompt_free if reads_prompt else one_size}",
    )


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
    config: Any = model.config
    if any(getattr(each, "is_encoder_decoder", False) for each in (config, text_config(config))):
        raise CaptureError(
            source.path,
            f"{source.architecture} writes its answer from the states of an encoder",
            expected="a decoder that reads features of images in its prompt, or an encoder and decoder of BART or BLIP",
            remedy="take a variant with a decoder alone, such as BLIP-2 with OPT in place of T5",
        )
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters and not reads_patches(model):
        raise CaptureError(
            source.path,
            f"{source.architecture} reads kinds of tokens (mm_token_type_ids) beside their places",
            expected="a decoder that reads features of images in its prompt",
            remedy="vlmopt/capture/README.md lists the families that do",
        )


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
    return part(DECODER, wrapper, shapes, dims, plan)


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
    given = sample(plan, {**named, **_beside(probe)}, sizes)
    with plan.rewrite(model):  # without weights, eager would stop where it looks into the data
        _, *present = run_eager(DECODER, probe, {**given, "past": ()}, call=probe)
    return [(int(value.shape[1]), int(value.shape[3])) for value in present]
