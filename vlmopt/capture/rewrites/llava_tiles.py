"""LLaVA-NeXT and LLaVA-OneVision for one image size.

Before: each image has a whole view and tiles of its own number, which follow from its size, a number in a tensor.
After: images [N, n, C, H, W] of one size, so tiles, padding and new lines are constants. The same, since the code of
the model packs them: it works on each channel alone, and gets N images of D channels as one image of N * D.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def one_size(model: nn.Module, image: tuple[int, int]) -> Iterator[None]:
    """Replaces `get_image_features` while the context lasts."""
    model.get_image_features = partial(_image_features, model.model, image)  # type: ignore[assignment]
    try:
        yield
    finally:
        del model.get_image_features


def _image_features(model: Any, image: tuple[int, int], pixel_values: Tensor, image_sizes: Tensor) -> dict[str, Tensor]:
    """Features [N, T, D]; the sizes are all `image`."""
    n_images, n_tiles = pixel_values.shape[:2]
    found = model.vision_tower(pixel_values.flatten(0, 1), output_hidden_states=True, return_dict=True).hidden_states
    layers = model.config.vision_feature_layer
    chosen = found[layers] if isinstance(layers, int) else torch.cat([found[layer] for layer in layers], -1)
    strategy = {"vision_feature_select_strategy": model.config.vision_feature_select_strategy}
    if strategy["vision_feature_select_strategy"] == "default":
        chosen = chosen[:, 1:]
    tiles = model.multi_modal_projector(chosen)
    width = tiles.shape[-1]
    as_one = tiles.view(n_images, n_tiles, -1, width).permute(1, 2, 0, 3).flatten(2)
    line = model.image_newline.expand(n_images, width).flatten()
    known = inspect.signature(model.pack_image_features).parameters
    more = {name: value for name, value in strategy.items() if name in known}
    if "vision_aspect_ratio" in known:
        more["vision_aspect_ratio"] = model.config.vision_aspect_ratio
    (packed,), _ = model.pack_image_features([as_one], [image], image_newline=line, **more)
    return {"pooler_output": packed.view(packed.shape[0], -1, width).transpose(0, 1)}
