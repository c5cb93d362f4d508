"""The image tower as its authors run it: the model's own module and a linear head, in PyTorch."""

from __future__ import annotations

from torch import Tensor, nn


class PlainTower(nn.Module):
    """Pixels [B, 3, h, w] to logits or embeddings [B, d]; what converters are given."""

    def __init__(self, vision: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.vision, self.head = vision, head

    def forward(self, pixel_values: Tensor) -> Tensor:
        found: Tensor = self.head(self.vision(pixel_values=pixel_values).pooler_output)
        return found
