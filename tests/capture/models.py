"""Models that capture must refuse, and one that it takes: the smallest fused and dual models there are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


def configuration(**changes: object) -> Any:
    fields = {"model_type": "tiny", "image_size": 4, "vocab_size": 11, "max_position_embeddings": 16, "id2label": {}}
    return SimpleNamespace(**{**fields, **changes})


class Tiny(nn.Module):
    """Pixels and tokens to three scores; `tokens` holds what a subclass does with the text."""

    def __init__(self, **changes: object) -> None:
        super().__init__()
        self.config = configuration(**changes)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.patch, self.embed, self.out = nn.Linear(3 * 4 * 4, 8), nn.Embedding(11, 8), nn.Linear(8, 3)
            self.inner = self.make_inner()
        self.eval()

    def make_inner(self) -> nn.Module:
        return nn.Identity()

    def tokens(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        weights = attention_mask[..., None].float()
        return (self.inner(self.embed(input_ids)) * weights).sum(1) / weights.sum(1)

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {"logits": self.out(self.patch(pixel_values.flatten(1)) + self.tokens(input_ids, attention_mask))}


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # the line that the error must name
            return x
        return -x


class DataDependent(Tiny):
    """Control flow on data in `inner`."""

    def make_inner(self) -> nn.Module:
        return Branching()


class AddsTable(Tiny):
    """Adds a table of 15 rows, so no other length fits."""

    def tokens(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        table = torch.ones(15, 8, device=input_ids.device)
        return (self.embed(input_ids) + table).mean(1)


class ReadsSizeAsNumber(Tiny):
    """Makes a plain number of a size, which torch takes for a constant."""

    def tokens(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.embed(input_ids).sum(1) / int(input_ids.shape[1])


class Fails(Tiny):
    """Cannot be called at all."""

    def make_inner(self) -> nn.Module:
        return nn.Linear(5, 5)


class TextOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config, self.embed = configuration(), nn.Embedding(11, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.embed(input_ids)
