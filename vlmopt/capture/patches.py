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
    patch, merge = _number(config, "patch_size"), _number(config, "spatial_merge_size")
    if any(size % (patch * merge) for size in image):
        raise CaptureError(
            f"image size {image}", f"is no multiple of {patch * merge}", expected="whole patches, merged"
        )
    return image[0] // patch, image[1] // patch


def merged_grid(config: Any, image: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the features of an image."""
    rows, columns = patch_grid(config, image)
    merge = _number(config, "spatial_merge_size")
    return rows // merge, columns // merge


def patch_size(config: Any) -> int:
    """Numbers of one patch, over colours and frames."""
    n_values = _number(config, "in_channels") * _number(config, "temporal_patch_size")
    return n_values * _number(config, "patch_size") ** 2


def _number(config: Any, name: str) -> int:
    found: Any = getattr(vision_config(config), name, None)
    if not isinstance(found, int):
        raise CaptureError(f"config.json vision_config {name}", f"is {found!r}", expected="a whole number")
    return found


def n_deep(model: nn.Module) -> int:
    """Layers of the decoder that features of images are added behind."""
    return len(getattr(vision_config(model.config), "deepstack_visual_indexes", ()))
