"""Weights to integers: ranges that lose least, roundings that make up for each other, shifts taken into the bias.

A weight W [out, in] is rounded in blocks of inputs to `scale * level`, levels symmetric about zero. With the second
moment H = E[x x^T] of the layer's input on the task, what is made small is the error of its output, `(Wq - W) H
(Wq - W)^T`: by the ranges alone (`nearest`, the diagonal of H), or column by column, each rounding error taken over by
the columns behind it (`gptq`: Frantar et al. 2022, arXiv 2210.17323).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vlmopt.graph.quantized import (
    BlockwiseEmbedding,
    BlockwiseLinear,
    HalfEmbedding,
    HalfLinear,
    Int8Linear,
    WeightBytes,
)

Rounding = Literal["nearest", "gptq"]

_SHARES = torch.linspace(1.0, 0.4, 25)  # of the largest weight, that a range may end at
_DAMPING = 0.01  # of the mean of the diagonal, as published
_LAZY = 128  # columns whose errors are handed on together


@dataclass(frozen=True)
class Moments:
    """What is known of a layer's input [.., in] on the task: E[x] [in] and E[x x^T] [in, in]."""

    mean: Tensor
    second: Tensor


@dataclass(frozen=True)
class Levels:
    """A rounded weight: levels [out, n_blocks, block], which lie within `+-largest`, and scales [out, n_blocks]."""

    levels: Tensor
    scale: Tensor
    in_features: int

    @property
    def weight(self) -> Tensor:
        """The rounded weight as numbers, [out, in]."""
        return (self.levels * self.scale.unsqueeze(-1)).flatten(1)[:, : self.in_features]


def rounded(weight: Tensor, bits: int, block: int, moments: Moments | None, rounding: Rounding) -> Levels:
    """The weight [out, in] in blocks of inputs.

    Raises:
        ValueError: `gptq` without moments.
    """
    if rounding == "gptq":
        if moments is None:
            raise ValueError("gptq needs the moments of the layer's input")
        return _gptq(weight.double(), bits, block, moments.second)
    diagonal = None if moments is None else moments.second.diagonal()
    blocks = _blocks(weight.double(), block)
    importance = _blocks(torch.ones(1, weight.shape[1]) if diagonal is None else diagonal[None], block)
    largest = 2 ** (bits - 1) - 1
    scale = _best_scale(blocks, importance, largest)
    return Levels(_nearest(blocks, scale.unsqueeze(-1), largest), scale, weight.shape[1])


def _blocks(matrix: Tensor, block: int) -> Tensor:
    """[n, in] as [n, n_blocks, block], filled up with zeros."""
    n_blocks = -(-matrix.shape[1] // block)
    filled = torch.nn.functional.pad(matrix, [0, n_blocks * block - matrix.shape[1]])
    return filled.reshape(len(matrix), n_blocks, block)


def _nearest(values: Tensor, scale: Tensor, largest: int) -> Tensor:
    return (values / scale).round().clamp(-largest, largest)


def _best_scale(blocks: Tensor, importance: Tensor, largest: int) -> Tensor:
    """The scale [...] of every block [..., block] whose rounding errors, counted by importance, are least."""
    ends = blocks.abs().amax(-1)
    ends = torch.where(ends == 0, torch.ones_like(ends), ends)
    best, least = ends / largest, torch.full_like(ends, torch.inf)
    for share in _SHARES.tolist():
        scale = (share * ends / largest).float().double()  # files hold scales in float32
        error = blocks - _nearest(blocks, scale.unsqueeze(-1), largest) * scale.unsqueeze(-1)
        found = (error.square() * importance).sum(-1)
        is_less = found < least
        best, least = torch.where(is_less, scale, best), torch.where(is_less, found, least)
    return best


def _gptq(weight: Tensor, bits: int, block: int, second: Tensor) -> Levels:
    largest, (n_out, n_in) = 2 ** (bits - 1) - 1, weight.shape
    factor, importance = _inverse_factor(second), second.diagonal()
    rest, levels = weight.clone(), torch.zeros_like(weight)
    scales: list[Tensor] = []
    for start in range(0, n_in, _LAZY):
        end = min(start + _LAZY, n_in)
        errors = torch.zeros(n_out, end - start, dtype=torch.float64)
        for column in range(start, end):
            if column % block == 0:
                behind = slice(column, min(column + block, n_in))
                present = rest[:, behind]
                if behind.stop > end:  # what this block will be handed by columns before it in the same batch is known
                    present = present.clone()
                    present[:, end - column :] -= errors @ factor[start:end, end : behind.stop]
                scales.append(_best_scale(present, importance[behind], largest))
            level = _nearest(rest[:, column], scales[-1], largest)
            levels[:, column] = level
            error = (rest[:, column] - level * scales[-1]) / factor[column, column]
            rest[:, column:end] -= error[:, None] * factor[column, column:end]
            errors[:, column - start] = error
        rest[:, end:] -= errors @ factor[start:end, end:]
    return Levels(_blocks(levels, block), torch.stack(scales, 1), n_in)


def _inverse_factor(second: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped moment; inputs that are always zero do not matter."""
    damped = second.double().clone()
    mean = damped.diagonal().mean().clamp_min(1e-12)
    damped.diagonal().add_(_DAMPING * mean)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def blockwise_linear(
    linear: nn.Linear, bits: int, block: int, *, rounds_input: bool, moments: Moments | None, rounding: Rounding
) -> BlockwiseLinear:
    """The layer with a weight of 4 or 8 bits."""
    found = rounded(linear.weight.detach(), bits, block, moments, rounding)
    shape = linear.in_features, linear.out_features
    leaf = BlockwiseLinear(*shape, linear.bias is not None, bits, block, rounds_input, device="meta")
    leaf.weight, leaf.scale = packed(found.levels, bits), found.scale.float()
    leaf.bias = _shifted(linear, found, moments)
    return leaf.train(False)


def int8_linear(
    linear: nn.Linear,
    *,
    input_range: tuple[float, float] | None,
    is_qdq: bool = False,
    weights: WeightBytes = "auto",
    moments: Moments | None,
    rounding: Rounding,
) -> Int8Linear:
    """The layer with a weight of int8, a scale for every output; the range of its input is that of each call, or
    fixed."""
    found = rounded(linear.weight.detach(), 8, linear.in_features, moments, rounding)
    shape = linear.in_features, linear.out_features
    leaf = Int8Linear(*shape, linear.bias is not None, input_range is not None, is_qdq, weights, device="meta")
    leaf.weight, leaf.scale = found.levels[:, 0].T.to(torch.int8).contiguous(), found.scale[:, 0].float()
    leaf.bias = _shifted(linear, found, moments)
    if input_range is not None:
        leaf.input_scale, leaf.input_zero = _grid(*input_range)
    return leaf.train(False)


def best_range(rows: Tensor) -> tuple[float, float]:
    """The range of a layer's inputs [n, in] whose rounding to 256 levels loses least; rare ones may lie outside."""
    low, high = min(float(rows.min()), 0.0), max(float(rows.max()), 0.0)
    found, least = (low, high), float("inf")
    for share in _SHARES.tolist():
        step, zero = _grid(share * low, share * high)
        kept = ((rows / step).round() + zero).clamp(0, 255) - zero
        error = float((rows - kept * step).square().sum())
        if error < least:
            found, least = (share * low, share * high), error
    return found


def _grid(low: float, high: float) -> tuple[Tensor, Tensor]:
    """Scale and zero point of 256 levels over a range that holds zero."""
    step = torch.tensor((high - low) / 255 or 1.0)
    return step, (-low / step).round().clamp(0, 255).to(torch.uint8)


def blockwise_embedding(embedding: nn.Embedding, bits: int, block: int) -> BlockwiseEmbedding:
    """The table with rows of 4 or 8 bits."""
    found = rounded(embedding.weight.detach(), bits, block, None, "nearest")
    leaf = BlockwiseEmbedding(embedding.num_embeddings, embedding.embedding_dim, bits, block, device="meta")
    leaf.weight, leaf.scale = packed(found.levels, bits).flatten(1), found.scale.to(embedding.weight.dtype)
    return leaf.train(False)


def half_layer(leaf: nn.Linear | nn.Embedding, dtype: torch.dtype) -> HalfLinear | HalfEmbedding:
    """The layer with a weight of 16 bits."""
    weight, made = leaf.weight.detach().to(dtype), half_shape(leaf, dtype)
    made.weight = weight.T.contiguous() if isinstance(leaf, nn.Linear) else weight
    if isinstance(leaf, nn.Linear):
        made.bias = None if leaf.bias is None else leaf.bias.detach().float().clone()
    return made.train(False)


def half_shape(leaf: nn.Linear | nn.Embedding, dtype: torch.dtype) -> HalfLinear | HalfEmbedding:
    """The same without its numbers."""
    if isinstance(leaf, nn.Embedding):
        return HalfEmbedding(leaf.num_embeddings, leaf.embedding_dim, device="meta", dtype=dtype)
    return HalfLinear(leaf.in_features, leaf.out_features, leaf.bias is not None, device="meta", dtype=dtype)


def packed(levels: Tensor, bits: int) -> Tensor:
    """Levels [..., block] about zero as bytes [..., block * bits / 8]."""
    raised = (levels + 2 ** (bits - 1)).to(torch.uint8)
    return raised if bits == 8 else torch.add(raised[..., 0::2], raised[..., 1::2], alpha=16)


def _shifted(linear: nn.Linear, found: Levels, moments: Moments | None) -> Tensor | None:
    """The bias less what rounding adds to the mean of the output on the task; a layer without one gets none."""
    bias: Tensor | None = linear.bias
    if bias is None or moments is None:
        return None if bias is None else bias.detach().float().clone()
    return (bias.detach().double() - (found.weight - linear.weight.detach().double()) @ moments.mean.double()).float()
