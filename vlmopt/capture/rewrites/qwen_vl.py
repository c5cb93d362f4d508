"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL for one image size.

Before: the patches of all images lie in one row, and the lengths of images and windows are read from a tensor
`image_grid_thw`; a patch is unflattened for a convolution that is as large as itself; features of images that the
decoder adds in its early layers are added where a mask is true. After: images of one grid [N, P, C], so lengths, places
and windows are constants; a patch goes through a linear layer; features are added everywhere, for they are zero where
there is no image. The same up to rounding, because no patch sees another image, and adding zero changes nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import vision_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlmopt.capture.patches import patch_grid


@dataclass(frozen=True)
class _Grid:
    """Constants of one image: how places are resampled, where patches lie, and how windows take them together."""

    n_patches: int
    places: Tensor  # [P, 2], in the order of windows
    learned: tuple[Tensor, Tensor] | None  # indices and weights [P, 4] into the learned table of positions
    order: Tensor | None  # merged patches in the order of windows
    windows: tuple[int, ...]  # patches of each window


@contextmanager
def one_grid(model: nn.Module, image: tuple[int, int]) -> Iterator[None]:
    """Replaces `get_image_features`, parts of the tower and how the decoder adds features, while the context lasts."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    visual: Any = model.model.visual  # type: ignore[union-attr]
    with unset_fake_temporarily():
        grid = _grid(visual, patch_grid(model.config, image))
    replaced: list[tuple[Any, str, Any]] = [(model, "get_image_features", partial(_image_features, visual, grid))]
    replaced += [(block.attn, "forward", partial(_attention, block.attn)) for block in visual.blocks]
    replaced += [(part, "_deepstack_process", _add) for part in model.modules() if hasattr(part, "_deepstack_process")]
    convolution = visual.patch_embed.proj
    for owner, name, function in replaced:
        setattr(owner, name, function)
    visual.patch_embed.proj = _linear(convolution)
    try:
        yield
    finally:
        visual.patch_embed.proj = convolution
        for owner, name, _ in replaced:
            delattr(owner, name)


def _linear(convolution: nn.Module) -> nn.Linear:
    """The convolution of a kernel with what lies under it once, on the flattened patch."""
    found = nn.Linear(1, 1, bias=False, device="meta")
    weight: Any = convolution.weight
    found.out_features, found.in_features = weight.shape[0], weight[0].numel()
    found.weight, found.bias = nn.Parameter(weight.flatten(1), requires_grad=False), convolution.bias  # type: ignore[assignment]
    return found.eval()


def _grid(visual: Any, size: tuple[int, int]) -> _Grid:
    config, thw = visual.config, torch.tensor([[1, *size]])
    merge, n_patches = int(config.spatial_merge_size), size[0] * size[1]
    places = vision_utils.get_vision_position_ids(thw, merge)
    learned = order = None
    windows: tuple[int, ...] = (n_patches,)
    if hasattr(visual, "interpolation_mode"):
        learned = vision_utils.get_vision_interpolation_indices_and_weights(
            thw,
            num_grid_per_side=visual.num_grid_per_side,
            mode=visual.interpolation_mode,
            align_corners=visual.interpolation_align_corners,
            spatial_merge_size=merge,
        )
    if hasattr(visual, "window_size"):
        order, bounds = vision_utils.get_vision_window_index(thw, merge, visual.window_size, visual.patch_size)
        windows = tuple((bounds[1:] - bounds[:-1]).tolist())
        places = places.view(-1, merge**2, 2)[order].flatten(0, 1)
    return _Grid(n_patches, places, learned, order, windows)


def _image_features(visual: Any, grid: _Grid, pixel_values: Tensor, image_grid_thw: Tensor) -> dict[str, Any]:
    """Features of N images from their patches [N * P, C]; the grid is the one that the constants were made for."""
    x = visual.patch_embed.proj(pixel_values.view(-1, grid.n_patches, pixel_values.shape[-1]))
    if grid.learned is not None:
        indices, weights = (value.to(x.device) for value in grid.learned)
        x = x + (visual.pos_embed(indices) * weights[:, :, None]).sum(1).to(x.dtype)
    if grid.order is not None:
        order = grid.order.to(x.device)
        x = x.view(x.shape[0], len(order), -1, x.shape[-1])[:, order].flatten(1, 2)
    turns = visual.rotary_pos_emb(x, grid.places.to(x.device))
    whole, deep = (grid.n_patches,), []
    for layer, block in enumerate(visual.blocks):
        is_whole = layer in getattr(visual, "fullatt_block_indexes", (layer,))
        x = block(x, cu_seqlens=whole if is_whole else grid.windows, position_embeddings=turns)
        if layer in getattr(visual, "deepstack_visual_indexes", ()):
            merger = visual.deepstack_merger_list[visual.deepstack_visual_indexes.index(layer)]
            deep.append(_by_image(merger(x), x))
    features = _by_image(visual.merger(x), x)
    if grid.order is not None:
        features = features[:, torch.argsort(grid.order).to(x.device)]
    return {"pooler_output": features, "deepstack_features": deep}


def _by_image(features: Tensor, x: Tensor) -> Tensor:
    return features.view(x.shape[0], -1, features.shape[-1])


def _attention(module: Any, hidden_states: Tensor, cu_seqlens: tuple[int, ...], **given: Any) -> Tensor:
    """Attention of patches [N, P, D] to those of their window; `cu_seqlens` holds the lengths of the windows."""
    code = sys.modules[type(module).__module__]
    n_images, n_patches, width = hidden_states.shape
    qkv = module.qkv(hidden_states).view(n_images, n_patches, 3, module.num_heads, -1)
    query, key, value = qkv.unbind(2)
    query, key = code.apply_rotary_pos_emb_vision(query, key, *given["position_embeddings"])
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(
        module.config._attn_implementation,
        code.eager_attention_forward,
    )
    settings = {"attention_mask": None, "scaling": module.scaling, "dropout": 0.0, "is_causal": False}
    if len(set(cu_seqlens)) == 1:  # windows of one size are a batch
        split = [[each.reshape(-1, cu_seqlens[0], *each.shape[2:])] for each in (query, key, value)]
    else:
        split = [each.split(cu_seqlens, dim=1) for each in (query, key, value)]
    windows = ([each.transpose(1, 2) for each in window] for window in zip(*split, strict=True))
    found = [attend(module, *window, **settings)[0] for window in windows]
    whole = found[0] if len(found) == 1 else torch.cat(found, 1)
    return module.proj(whole.reshape(n_images, n_patches, width))  # type: ignore[no-any-return]


def _add(hidden_states: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor) -> Tensor:
    return hidden_states + visual_embeds.view_as(hidden_states)
