"""Towers that read an image as a row of flattened patches, and where the patches lie."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from vlmopt.capture.samples import vision_config
from vlmopt.core.errors import CaptureError


def reads_patches(model: nn.Module) -> bool:
    """Its images come as patches beside their grid."""
    return "image_grid_thw" in inspect.signature(model.forward).parameters


def patch_grid(config: Any, image: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the patches of an image of (height, width).

    Raises:
        CaptureError: the size is no whole number of merged patches.
    """
    vision = vision_config(config)
    unit = int(vision.patch_size) * int(vision.spatial_merge_size)
    if any(size % unit for size in image):
        raise CaptureError(f"image size {image}", f"is no multiple of {unit}", expected="whole patches, merged")
    return image[0] // int(vision.patch_size), image[1] // int(vision.patch_size)


def merged_grid(config: Any, image: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the features of an image."""
    rows, columns = patch_grid(config, image)
    merge = int(vision_config(config).spatial_merge_size)
    return rows // merge, columns // merge


def patch_size(config: Any) -> int:
    """Numbers of one patch, over colours and frames."""
    vision = vision_config(config)
    return int(vision.in_channels) * int(vision.temporal_patch_size) * int(vision.patch_size) ** 2


def n_deep(model: nn.Module) -> int:
    """Layers of the decoder that features of images are added behind."""
    return len(getattr(vision_config(model.config), "deepstack_visual_indexes", ()))
