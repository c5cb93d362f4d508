"""Forms that the weight of a layer can be stored in, activations in float: 16 bits, or blocks of 8 or 4 bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from vlmopt.graph.quantized import BlockwiseEmbedding, BlockwiseLinear, QuantizedLeaf
from vlmopt.graph.quantizing import (
    Moments,
    Rounding,
    blockwise_embedding,
    blockwise_linear,
    half_layer,
    half_shape,
)


@dataclass(frozen=True)
class WeightForm:
    """`half` is the type of 16 bits; the others are of 8 and 4 bits."""

    bits: int
    half: torch.dtype
    block: int
    rounds_input: bool
    rounding: Rounding

    def why_not(self, leaf: nn.Linear | nn.Embedding) -> str:
        """Why the layer cannot have it; empty where it can."""
        if self.bits == 16 and leaf.weight.element_size() <= 2:
            return "its weight has 16 bits already"
        if self.bits == 16:
            largest = float(leaf.weight.detach().abs().max())
            most = torch.finfo(self.half).max
            return "" if largest <= most else f"holds {largest:.3g}, and {self.half} ends at {most:.3g}"
        if isinstance(leaf, nn.Embedding) and leaf.embedding_dim % self.block:
            return f"a row of {leaf.embedding_dim} is no whole number of blocks"
        return ""

    def shape(self, leaf: nn.Linear | nn.Embedding) -> QuantizedLeaf:
        """The layer in this form, without its numbers."""
        if self.bits == 16:
            return half_shape(leaf, self.half)
        if isinstance(leaf, nn.Linear):
            has_bias = leaf.bias is not None
            return BlockwiseLinear(leaf.in_features, leaf.out_features, has_bias, self.bits, self.block, device="meta")
        rows, width, kind = leaf.num_embeddings, leaf.embedding_dim, leaf.weight.dtype
        return BlockwiseEmbedding(rows, width, self.bits, self.block, device="meta", dtype=kind)

    def made(self, leaf: nn.Linear | nn.Embedding, moments: Moments | None) -> QuantizedLeaf:
        """The layer in this form.

        Args:
            moments: of its input on the task, where they are known.
        """
        if self.bits == 16:
            return half_layer(leaf, self.half)
        if isinstance(leaf, nn.Embedding):
            return blockwise_embedding(leaf, self.bits, self.block)
        return blockwise_linear(
            leaf, self.bits, self.block, rounds_input=self.rounds_input, moments=moments, rounding=self.rounding
        )
