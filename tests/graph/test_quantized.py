"""Quantized leaves: what they compute, beside plain arithmetic on integers; and how weights become integers."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vlmopt.graph.quantized import BlockwiseEmbedding, BlockwiseLinear, Int8Linear, dequantized_blocks
from vlmopt.graph.quantizing import (
    Moments,
    best_range,
    blockwise_embedding,
    blockwise_linear,
    int8_linear,
    packed,
    rounded,
)


def linear(d_in: int = 40, d_out: int = 12, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(d_in, d_out, bias=bias)


def inputs(d_in: int = 40, n: int = 400) -> Tensor:
    """Rows whose columns depend on each other, as those of a model do, about a mean that is not zero."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(d_in, d_in, generator=generator) * torch.logspace(0, -1.5, d_in)
    return torch.randn(n, d_in, generator=generator) @ mix.T + 0.5


def moments(rows: Tensor) -> Moments:
    rows = rows.double()
    return Moments(rows.mean(0), rows.T @ rows / len(rows))


def relative_error(linear: nn.Linear, found: Tensor, known: Moments) -> float:
    """Root mean square error of the layer's output over that of the output itself."""
    weight = linear.weight.detach().double()

    def size(matrix: Tensor) -> Tensor:
        return ((matrix @ known.second) * matrix).sum()

    return float((size(found - weight) / size(weight)).sqrt())


def test_int8_is_integer_arithmetic() -> None:
    leaf, x = int8_linear(linear(), input_range=None, moments=None, rounding="nearest"), inputs()
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    step = np.float32((high - low) / 255)
    zero = int(np.clip(np.round(-np.float32(low) / step), 0, 255))
    levels = np.clip(np.round(x.numpy() / step) + zero, 0, 255).astype(np.int64) - zero
    assert leaf.bias is not None
    wanted = (levels @ leaf.weight.numpy().astype(np.int64)) * (step * leaf.scale.numpy()) + leaf.bias.numpy()
    assert np.allclose(leaf(x).numpy(), wanted, rtol=1e-5, atol=1e-5)


def test_a_static_range_does_not_look_at_the_batch() -> None:
    leaf = int8_linear(linear(), input_range=(-2.0, 3.0), moments=None, rounding="nearest")
    x = inputs(n=4)
    alone = torch.cat([leaf(row[None]) for row in x])
    assert torch.equal(leaf(x), alone)
    ranged = int8_linear(linear(), input_range=None, moments=None, rounding="nearest")
    assert not torch.equal(ranged(x), torch.cat([ranged(row[None]) for row in x]))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("d_in", [64, 40, 7])  # whole blocks, one and a part, less than one
def test_blocks_are_weights_of_few_bits(bits: Literal[4, 8], d_in: int) -> None:
    layer, x = linear(d_in), inputs(d_in, 5)
    leaf = blockwise_linear(layer, bits, 32, rounds_input=False, moments=None, rounding="nearest")
    found = rounded(layer.weight.detach(), bits, 32, None, "nearest")
    assert int(found.levels.abs().max()) <= 2 ** (bits - 1) - 1
    assert torch.allclose(leaf(x), nn.functional.linear(x, found.weight.float(), leaf.bias), atol=1e-5)
    n_blocks = -(-d_in // 32)
    assert leaf.weight.numel() == 12 * n_blocks * 32 * bits // 8
    assert leaf.n_weights == 12 * n_blocks * 32
    assert torch.allclose(leaf.plain()(x), leaf(x), atol=1e-6)


def test_inputs_are_rounded_block_by_block() -> None:
    layer = linear(64)
    exact, rounds = (
        blockwise_linear(layer, 8, 32, rounds_input=is_rounded, moments=None, rounding="nearest")
        for is_rounded in (False, True)
    )
    x = inputs(64, 3)
    x[0, 32:] *= 1000  # a large block does not coarsen the other one
    levels = x.reshape(3, 2, 32)
    step = levels.abs().amax(-1, keepdim=True) / 127
    wanted = exact((torch.round(levels * step.reciprocal()) * step).reshape(3, 64))
    assert torch.allclose(rounds(x), wanted, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(rounds(x), exact(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("leaf", [Int8Linear(4, 3), BlockwiseLinear(4, 3, rounds_input=True, block=16)])
def test_an_input_of_zeros_gives_the_bias(leaf: Int8Linear | BlockwiseLinear) -> None:
    layer = linear(4, 3)
    made = (
        int8_linear(layer, input_range=None, moments=None, rounding="nearest")
        if isinstance(leaf, Int8Linear)
        else blockwise_linear(layer, 8, 16, rounds_input=True, moments=None, rounding="nearest")
    )
    assert torch.equal(made(torch.zeros(2, 4)), layer.bias.detach().expand(2, 3))


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_is_undone(bits: int) -> None:
    largest = 2 ** (bits - 1) - 1
    levels = torch.randint(-largest, largest + 1, (3, 2, 16), generator=torch.Generator().manual_seed(0)).double()
    scale = torch.rand(3, 2)
    assert torch.equal(dequantized_blocks(packed(levels, bits), scale, bits), levels.float() * scale.unsqueeze(-1))


def test_an_embedding_gives_its_rounded_rows_in_its_own_type() -> None:
    table = nn.Embedding(9, 64, dtype=torch.bfloat16)
    leaf = blockwise_embedding(table, 8, 32)
    rows = leaf(torch.tensor([[1, 8]]))
    assert rows.dtype == torch.bfloat16
    assert torch.allclose(rows.float(), table.weight[[1, 8]].float()[None], atol=0.03)
    assert isinstance(leaf, BlockwiseEmbedding)
    assert torch.equal(leaf.plain()(torch.tensor([[1, 8]])), rows)


@pytest.mark.parametrize("kind", ["int8", "blocks"])
def test_gradients_pass_roundings(kind: str) -> None:
    layer, x = linear(64), inputs(64, 3).requires_grad_(True)
    leaf = (
        int8_linear(layer, input_range=None, moments=None, rounding="nearest")
        if kind == "int8"
        else blockwise_linear(layer, 8, 32, rounds_input=True, moments=None, rounding="nearest")
    )
    (gradient,) = torch.autograd.grad(leaf(x).sum(), x)
    wanted = leaf.plain().weight.sum(0).expand_as(gradient)  # type: ignore[union-attr,operator]
    assert torch.allclose(gradient, wanted, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [16, 128])
def test_gptq_loses_less_of_the_output_than_rounding_alone(bits: int, block: int) -> None:
    """Blocks that end within and behind a batch of columns; the error is that on other rows of the same kind."""
    layer, rows = linear(300, 24), inputs(300, 3000)
    known, unseen = moments(rows[:2000]), moments(rows[2000:])
    errors = {
        way: relative_error(layer, rounded(layer.weight.detach(), bits, block, known, way).weight, unseen)
        for way in ("nearest", "gptq")
    }
    assert errors["gptq"] < 0.8 * errors["nearest"]


def test_gptq_is_the_published_recursion() -> None:
    """One column after the other with the inverse computed anew, as in the derivation, at one block for all."""
    layer, known = linear(20, 3), moments(inputs(20, 200))
    weight, second = layer.weight.detach().double(), known.second.clone()
    second.diagonal().add_(0.01 * second.diagonal().mean())
    found = rounded(layer.weight.detach(), 4, 32, known, "gptq")
    scale, rest = found.scale[:, 0], weight.clone()
    for column in range(20):
        inverse = torch.linalg.inv(second[column:, column:])
        level = (rest[:, column] / scale).round().clamp(-7, 7)
        error = (rest[:, column] - level * scale) / inverse[0, 0]
        rest[:, column:] -= error[:, None] * inverse[0]
        assert torch.equal(level, found.levels[:, 0, column])


def test_a_range_ends_where_the_task_loses_least() -> None:
    """A weight whose input is next to nothing on the task may lie outside of it; so may a rare large input."""
    layer, rows = linear(), inputs().clamp(-1, 1)
    layer.weight.data[0, 0] = 0.3  # the others are within 0.16
    rows[:, 0] *= 1e-3
    known = moments(rows)
    ends = [float(rounded(layer.weight.detach(), 4, 64, m, "nearest").scale[0, 0]) * 7 for m in (None, known)]
    assert ends[0] > 0.2 > ends[1]
    many = torch.randn(10_000, 40, generator=torch.Generator().manual_seed(0))
    many[0, 0] = 9.0
    assert float(many[1:].max()) < best_range(many)[1] < 9.0


def test_the_bias_makes_up_for_what_rounding_adds_to_the_mean() -> None:
    layer, rows = linear(), inputs()
    leaf = blockwise_linear(layer, 4, 64, rounds_input=False, moments=moments(rows), rounding="nearest")
    plain = blockwise_linear(layer, 4, 64, rounds_input=False, moments=None, rounding="nearest")
    wanted = layer(rows).detach().mean(0)
    assert float((leaf(rows).mean(0) - wanted).abs().max()) < 1e-4
    assert float((plain(rows).mean(0) - wanted).abs().max()) > 1e-2


def test_a_layer_without_bias_gets_none() -> None:
    leaf = blockwise_linear(linear(bias=False), 8, 32, rounds_input=True, moments=moments(inputs()), rounding="nearest")
    assert leaf.bias is None


def test_gptq_without_moments_is_refused() -> None:
    with pytest.raises(ValueError, match="needs the moments"):
        rounded(torch.ones(2, 4), 4, 16, None, "gptq")
