"""ViLT for one image size and a full pixel mask.

Before: `visual_embed` reads sizes from the mask's data and draws the patches in random order. After: the patches in
order, the position embedding resized once to the patch grid, a mask of ones. The same up to rounding, because the
transformer does not see the order of patches that carry their position, and a full mask selects all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers.models.vilt.modeling_vilt import ViltEmbeddings

from vlmopt.core.errors import CaptureError


@contextmanager
def static_visual_embed(model: nn.Module, image: tuple[int, int]) -> Iterator[None]:
    """Replaces `visual_embed` of the model's embeddings while the context lasts.

    Raises:
        CaptureError: the configuration keeps a random part of the patches only.
    """
    embeddings = [module for module in model.modules() if isinstance(module, ViltEmbeddings)]
    for module in embeddings:
        _check_all_patches(module, image)
    for module in embeddings:
        module.visual_embed = partial(_visual_embed, module)
    try:
        yield
    finally:
        for module in embeddings:
            del module.visual_embed


def _check_all_patches(module: ViltEmbeddings, image: tuple[int, int]) -> None:
    limit = int(module.config.max_image_length)
    patches = (image[0] // module.config.patch_size) * (image[1] // module.config.patch_size)
    if 0 < limit < patches:
        raise CaptureError(
            "config.json max_image_length",
            f"{limit} of {patches} patches are drawn at random in every call",
            expected=f"-1 or at least {patches}",
        )


def _visual_embed(
    module: ViltEmbeddings, pixel_values: Tensor, pixel_mask: Tensor, max_image_length: int = -1
) -> tuple[Tensor, Tensor, tuple[None, tuple[int, int]]]:
    x = module.patch_embeddings(pixel_values)
    batch, width, rows, columns = x.shape
    grid = module.config.image_size // module.config.patch_size
    spatial = module.position_embeddings[:, 1:, :].transpose(1, 2).view(1, width, grid, grid)
    if (rows, columns) != (grid, grid):
        spatial = nn.functional.interpolate(spatial, size=(rows, columns), mode="bilinear", align_corners=True)
    positions = torch.cat((module.position_embeddings[:, :1, :], spatial.flatten(2).transpose(1, 2)), dim=1)
    cls = module.cls_token.expand(batch, -1, -1)
    x = torch.cat((cls, x.flatten(2).transpose(1, 2)), dim=1) + positions
    mask = torch.ones(batch, rows * columns + 1, dtype=torch.int64, device=x.device)
    return module.dropout(x), mask, (None, (rows, columns))
