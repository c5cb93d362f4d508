"""SmolVLM and Idefics3 for images that are all there.

Before: images that are zero throughout are dropped, for they fill up prompts with fewer images, and patches that are
padding are masked. After: every image is taken whole. The same wherever no image is zero and none is padded, which the
assembly takes care of: it gives the images of all prompts one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def every_image(model: nn.Module, image: tuple[int, int]) -> Iterator[None]:
    """Replaces `get_image_features` while the context lasts."""
    model.get_image_features = partial(_image_features, model.model)  # type: ignore[assignment]
    try:
        yield
    finally:
        del model.get_image_features


def _image_features(model: Any, pixel_values: Tensor) -> dict[str, Tensor]:
    images = pixel_values.flatten(0, 1).to(model.dtype)
    patch = int(model.config.vision_config.patch_size)
    mask = torch.ones(
        (images.shape[0], images.shape[2] // patch, images.shape[3] // patch), dtype=torch.bool, device=images.device
    )
    hidden = model.vision_model(pixel_values=images, patch_attention_mask=mask, return_dict=True).last_hidden_state
    return {"pooler_output": model.connector(hidden)}
