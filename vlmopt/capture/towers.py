"""How the tower of a model that writes text takes its images: one wrapper and one shape for each way."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from vlmopt.capture.patches import n_deep, patch_grid, patch_size, reads_patches
from vlmopt.capture.plan import CapturePlan
from vlmopt.capture.prefix import PrefixTower, is_prefixed
from vlmopt.capture.samples import vision_config
from vlmopt.capture.wrappers import VisionEncoder

Shape = tuple[int | str, ...]


def tower_of(model: nn.Module, plan: CapturePlan) -> tuple[VisionEncoder, Shape]:
    """The wrapped tower, and the shape of its `pixel_values`."""
    if reads_patches(model):
        rows, columns = patch_grid(plan.config, plan.image)
        return PatchTower(model, (rows, columns)), ("images", rows * columns, patch_size(plan.config))
    shape = ("images", plan.channels, *plan.image)
    if is_prefixed(model):
        return PrefixTower(model), shape
    known = inspect.signature(model.forward).parameters
    if "pixel_attention_mask" in known:
        return TileTower(model), shape
    if "image_sizes" in known and hasattr(plan.config, "image_grid_pinpoints"):
        tower = ViewTower(model, plan.image)
        return tower, ("images", tower.n_views, plan.channels, tower.side, tower.side)
    return VisionEncoder(model), shape


class PatchTower(VisionEncoder):
    """`pixel_values` [N, P, C], the patches of N images as the processor flattens them -> `image_features` [N, T, D].

    Features that the decoder adds behind its early layers stand beside those in the prompt: [N, T, D * (1 + layers)].
    """

    beside = frozenset({"image_grid_thw"})

    def __init__(self, model: nn.Module, grid: tuple[int, int]) -> None:
        super().__init__(model)
        self.grid = grid
        self.n_deep = n_deep(model)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor]:
        found: Any = self.model.get_image_features(**self.images(pixel_values))
        every = [found["pooler_output"], *(found["deepstack_features"] if self.n_deep else ())]
        # one tensor for each image, or as the rewrite has them, all in one
        whole = [torch.stack(tuple(each)) if isinstance(each, list | tuple) else each for each in every]
        return (torch.cat(whole, -1) if self.n_deep else whole[0],)

    def images(self, pixel_values: Tensor) -> dict[str, Tensor]:
        grid = torch.tensor([[1, *self.grid]], device=pixel_values.device)
        return {"pixel_values": pixel_values.flatten(0, 1), "image_grid_thw": grid.expand(pixel_values.shape[0], 3)}


class ViewTower(VisionEncoder):
    """`pixel_values` [N, n, C, H, W], for each of N images the whole and its tiles -> `image_features` [N, T, D]."""

    beside = frozenset({"image_sizes"})

    def __init__(self, model: nn.Module, image: tuple[int, int]) -> None:
        super().__init__(model)
        self.image = image
        self.side = int(vision_config(self.model.config).image_size)
        points = self.model.config.image_grid_pinpoints
        self.n_views = int(image_size_to_num_patches(image, points, self.side))

    def forward(self, pixel_values: Tensor) -> tuple[Tensor]:
        found: Any = self.model.get_image_features(**self.images(pixel_values))["pooler_output"]
        return (torch.stack(tuple(found)) if isinstance(found, list | tuple) else found,)

    def images(self, pixel_values: Tensor) -> dict[str, Tensor]:
        size = torch.tensor([self.image], device=pixel_values.device)
        return {"pixel_values": pixel_values, "image_sizes": size.expand(pixel_values.shape[0], 2)}


class TileTower(VisionEncoder):
    """`pixel_values` [N, 3, H, W] -> `image_features` [N, T, D], where eager has [B, n, 3, H, W]."""

    def forward(self, pixel_values: Tensor) -> tuple[Tensor]:
        found: Any = self.model.get_image_features(pixel_values=pixel_values[None])["pooler_output"]
        whole = torch.cat(tuple(found)) if isinstance(found, list | tuple) else found
        return (whole.view(pixel_values.shape[0], -1, whole.shape[-1]),)

    def images(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return {"pixel_values": pixel_values[:, None]}
