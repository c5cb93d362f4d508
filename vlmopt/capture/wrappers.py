"""Modules that give each component one plain signature: tensors in, a tuple of tensors out.

The model lies under `model`, a prefix that raising cuts off again, so every tensor keeps its original name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

PREFIX = "model."


class Wrapper(nn.Module):
    """A part of the model with the names of its inputs, in order, and of its output."""

    inputs: ClassVar[tuple[str, ...]]
    output: str
    model: Any

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


class ImageEncoder(Wrapper):
    """`pixel_values` [B, 3, H, W] -> `image_embeds` [B, D], not normalised."""

    inputs = ("pixel_values",)
    output = "image_embeds"

    def forward(self, pixel_values: Tensor) -> tuple[Tensor]:
        return (_pooled(self.model.get_image_features(pixel_values=pixel_values)),)


class TextEncoder(Wrapper):
    """`input_ids`, `attention_mask` [B, N] -> `text_embeds` [B, D], not normalised."""

    inputs = ("input_ids", "attention_mask")
    output = "text_embeds"

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        features = self.model.get_text_features(input_ids=input_ids, attention_mask=attention_mask)
        return (_pooled(features),)


class Fused(Wrapper):
    """`pixel_values` [B, 3, H, W], `input_ids`, `attention_mask` [B, N] -> the model's first scores."""

    inputs = ("pixel_values", "input_ids", "attention_mask")

    def __init__(self, model: nn.Module, output: str) -> None:
        super().__init__(model)
        self.output = output

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        result = self.model(pixel_values=pixel_values, input_ids=input_ids, attention_mask=attention_mask)
        value = result[self.output]
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{type(self.model).__name__} returns no tensor under {self.output!r}")
        return (value,)


def _pooled(features: Tensor | Mapping[str, Tensor]) -> Tensor:
    """The projected features: a tensor in older releases of transformers, `pooler_output` in newer ones."""
    return features if isinstance(features, torch.Tensor) else features["pooler_output"]
