"""Assembly `dual`: two encoders whose embeddings are compared (CLIP, SigLIP, VisionTextDualEncoder and their like)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

from vlmopt.capture.export import capture_component
from vlmopt.capture.plan import CapturePlan
from vlmopt.capture.wrappers import ImageEncoder, TextEncoder
from vlmopt.core.program import Assembly, Dim, ModelSource, Program, Similarity
from vlmopt.graph.head import find_head


def is_dual(model: nn.Module) -> bool:
    """Both encoders can be called alone, and a learned scale compares them."""
    return all(hasattr(model, name) for name in ("get_image_features", "get_text_features", "logit_scale"))


def capture_dual(model: nn.Module, source: ModelSource, plan: CapturePlan) -> Program:
    """Components `image_encoder` and `text_encoder`, joined by the model's scale (and bias)."""
    pixels: Mapping[str, tuple[int | str, ...]] = {"pixel_values": ("batch", plan.channels, *plan.image)}
    tokens: Mapping[str, tuple[int | str, ...]] = {
        "input_ids": ("batch", "text"),
        "attention_mask": ("batch", "text"),
    }
    image_dims: dict[str, Dim] = {"batch": plan.dims["batch"]}
    components = {
        "image_encoder": capture_component(
            "image_encoder",
            ImageEncoder(model).eval(),
            plan.samples(ImageEncoder.inputs),
            dims=image_dims,
            shapes=pixels,
            image=plan.image,
            rewrite=plan.rewrite(model),
            is_checked=plan.with_weights,
        ),
        "text_encoder": capture_component(
            "text_encoder",
            TextEncoder(model).eval(),
            plan.samples(TextEncoder.inputs),
            dims=plan.dims,
            shapes=tokens,
            image=plan.image,
            rewrite=plan.rewrite(model),
            is_checked=plan.with_weights,
        ),
    }
    heads = {name: head for name, part in components.items() if (head := find_head(part)) is not None}
    return Program(Assembly.DUAL, components, plan.dims, source, _similarity(model, plan), heads=heads)


def _similarity(model: nn.Module, plan: CapturePlan) -> Similarity | None:
    if not plan.with_weights:
        return None  # without weights there is no scale to read
    scale = math.exp(float(model.logit_scale.detach().double()))  # type: ignore[operator]
    bias = getattr(model, "logit_bias", None)
    return Similarity(scale, 0.0 if bias is None else float(bias.detach()))
