"""Rewrites for models whose code torch.export refuses. The only place of the compiler that may know a model by name.

A rewrite is a context manager: inside, the model computes the same with code that can be exported; eager stays as it
is outside, so that capture can compare the two.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from torch import nn

from vlmopt.capture.rewrites import gemma3, idefics3, llava_tiles, qwen_vl, vilt

Rewrite = Callable[[nn.Module, tuple[int, int]], AbstractContextManager[None]]

_REWRITES: dict[str, Rewrite] = {
    "gemma3": gemma3.broadcast_masks,
    "idefics3": idefics3.every_image,
    "llava_next": llava_tiles.one_size,
    "llava_onevision": llava_tiles.one_size,
    "qwen2_5_vl": qwen_vl.one_grid,
    "qwen2_vl": qwen_vl.one_grid,
    "qwen3_vl": qwen_vl.one_grid,
    "smolvlm": idefics3.every_image,
    "vilt": vilt.static_visual_embed,
}


def rewrite_for(model_type: str, model: nn.Module, image: tuple[int, int]) -> AbstractContextManager[None]:
    """The context in which a model of this type can be exported at this image size (height, width)."""
    rewrite = _REWRITES.get(model_type)
    return nullcontext() if rewrite is None else rewrite(model, image)
