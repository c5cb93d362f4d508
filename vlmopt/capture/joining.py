"""What joins the components of a model that writes text: tokens, types and places, found by asking the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vlmopt.capture.decoder import one_way_type, reads_types
from vlmopt.capture.export import run_eager
from vlmopt.capture.prefix import is_prefixed
from vlmopt.capture.samples import text_config
from vlmopt.capture.wrappers import Wrapper
from vlmopt.core.errors import CaptureError
from vlmopt.core.program import NO_WORD, Generation, ModelSource


def generation_of(
    model: nn.Module, source: ModelSource, *, image_tokens: int, image_grid: tuple[int, int] | None
) -> Generation:
    """The join of the captured components.

    Raises:
        CaptureError: the configuration names no token for images.
    """
    if is_prefixed(model):
        found = (image_tokens, _stop_tokens(model), _start_tokens(model))
        return Generation(NO_WORD, *found, first_position=-image_tokens, token_types=(0, 1, 0))  # text counts from 0
    return Generation(
        _image_token(model, source),
        image_tokens,
        _stop_tokens(model),
        first_position=_first_position(model),
        token_types=_token_types(model),
        image_grid=image_grid,
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


def _start_tokens(model: nn.Module) -> tuple[int, ...]:
    """What the text of a model begins with that has no prompt otherwise."""
    config: Any = model.config
    found = text_config(config).bos_token_id
    if not isinstance(found, int):
        place = f"{type(model).__name__}, bos_token_id of config.json"
        raise CaptureError(place, f"is {found!r}", expected="the token that begins a text")
    return (found,)


def _first_position(model: Any) -> int:
    """Most models count from 0; PaliGemma counts from 1, and says so only when it prepares a step."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        zero = torch.zeros(1, 1, dtype=torch.int64)
        step = {"attention_mask": zero + 1, "position_ids": zero, "use_cache": True, "is_first_iteration": True}
        prepare = model.prepare_inputs_for_generation
        found = run_eager("a step", Wrapper(model), {"input_ids": zero, **step}, call=prepare).get("position_ids")
        return 0 if found is None else int(found.flatten()[0])


def _token_types(model: nn.Module) -> tuple[int, int, int] | None:
    """Types of a prompt's text, of an image and of the answer. Where type 0, which a processor gives to text, sees both
    ways, the whole prompt does (PaliGemma); where type 1 does, which it gives to an image, only images do (Gemma 3).
    """
    if not reads_types(model):
        return None
    return (0, 1, 0) if one_way_type(model) == 0 else (0, 0, 1)
