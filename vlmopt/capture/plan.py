"""What a capture knows before it starts: sizes, sample inputs and the rewrite that the model needs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from vlmopt.capture.rewrites import rewrite_for
from vlmopt.capture.samples import BATCHES, TYPICAL_TEXT, longest_text, sample_inputs, vision_config
from vlmopt.core.program import Dim

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MAXIMUM_BATCH = 1024


@dataclass(frozen=True)
class CapturePlan:
    """`image` is (height, width); `dims` are the free dimensions, `batch` and `text`."""

    config: PretrainedConfig
    image: tuple[int, int]
    device: str = "cpu"
    dtype: str = "float32"
    with_weights: bool = True

    @property
    def channels(self) -> int:
        return int(getattr(vision_config(self.config), "num_channels", 3))

    @property
    def typical_text(self) -> int:
        return min(TYPICAL_TEXT, longest_text(self.config) - 1)

    @property
    def dims(self) -> Mapping[str, Dim]:
        longest = longest_text(self.config)
        return {"batch": Dim("batch", 1, MAXIMUM_BATCH, 1), "text": Dim("text", 2, longest, self.typical_text)}

    def samples(self, names: tuple[str, ...]) -> list[dict[str, torch.Tensor]]:
        """Inputs at two sizes: other batch, other text length."""
        lengths = (self.typical_text, max(2, self.typical_text - 3))
        return [self._sample(names, batch, text) for batch, text in zip(BATCHES, lengths, strict=True)]

    def _sample(self, names: tuple[str, ...], batch: int, text: int) -> dict[str, torch.Tensor]:
        made = sample_inputs(self.config, names, batch=batch, text=text, image=self.image)
        target = getattr(torch, self.dtype)
        return {
            name: value.to(self.device, target if value.is_floating_point() else None) for name, value in made.items()
        }

    def rewrite(self, model: nn.Module) -> AbstractContextManager[None]:
        return rewrite_for(str(self.config.model_type), model, self.image)
