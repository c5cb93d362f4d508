"""Leaves whose weights are of few bits, as files hold them, and which compute what ONNX Runtime computes with them.

Every rounding is simulated where the runtime makes it, so that a program with such leaves gives the runtime's answers
but for the order of sums (tried with ONNX Runtime 1.31 on x86: 1e-6 of the largest output of a layer):

| leaf | weight | activations | in ONNX |
|---|---|---|---|
| `Int8Linear` | int8, a scale for every output | uint8, one range for the whole tensor | `MatMulInteger`, or QDQ |
| `BlockwiseLinear` | 4 or 8 bits, a scale for a block of inputs | int8 by block, or float | `MatMulNBits` |
| `BlockwiseEmbedding` | 4 or 8 bits, a scale for a block of a row | | `GatherBlockQuantized` |
| `HalfLinear`, `HalfEmbedding` | float16 or bfloat16 | float | `Cast`, which runtimes do once |

None is an `nn.Linear`: what folds, fits or prunes weights leaves them alone. Whatever the type of the activations, the
sums are in float32. Gradients pass roundings as if there were none (straight through).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx, nn

from vlmopt.core.program import Component
from vlmopt.graph.modules import clone_graph, get_at, set_at

WeightBytes = Literal["auto", "signed", "unsigned"]  # of int8 weights in an ONNX file


class QuantizedLeaf(nn.Module):
    """What all have: `weight` in integers, `scale`, and how many bits a weight takes."""

    if TYPE_CHECKING:  # TorchScript reads annotations of classes, and does not know these
        weight: Tensor
        scale: Tensor
        bias: Tensor | None
        input_scale: Tensor | None
        input_zero: Tensor | None

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    @property
    def n_weights(self) -> int:
        """Weights that `weight` holds; two of 4 bits lie in one byte."""
        return self.weight.numel() * 8 // self.bits

    @abstractmethod
    def plain(self) -> nn.Module:
        """The `torch.nn` leaf with the same weights as numbers."""


def quantized_nodes(module: fx.GraphModule) -> list[fx.Node]:
    """The calls of quantized leaves."""
    calls = [node for node in module.graph.nodes if node.op == "call_module"]
    return [node for node in calls if isinstance(get_at(module, str(node.target)), QuantizedLeaf)]


def with_exact_inputs(component: Component) -> Component:
    """The component with the same weights in float and no rounding of activations."""
    graph = clone_graph(component.graph)
    for path in {str(node.target) for node in quantized_nodes(graph)}:
        leaf = get_at(graph, path)
        assert isinstance(leaf, QuantizedLeaf)
        set_at(graph, path, leaf.plain())
    return replace(component, graph=graph)


class Int8Linear(QuantizedLeaf):
    """`y = (x_q - zero) W_q * (s_x s_w) + b` in integers.

    Shapes: weight [in, out] int8, scale [out], bias [out] or None; with `is_static` the scale [] and zero point [] of
    the input, uint8. x is [..., in]. `is_qdq` is how a static range is written in ONNX, `weights` how the weight is: as
    it is, moved up by 128 and unsigned, or whichever of the two the runtime multiplies right on this machine.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        is_static: bool = False,
        is_qdq: bool = False,
        weights: WeightBytes = "auto",
        device: Any = None,
    ) -> None:
        super().__init__(8)
        self.in_features, self.out_features = in_features, out_features
        self.is_static, self.is_qdq, self.weights = is_static, is_qdq, weights
        self.register_buffer("weight", torch.empty(in_features, out_features, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.empty(out_features, device=device))
        self.register_buffer("bias", torch.empty(out_features, device=device) if bias else None)
        self.register_buffer("input_scale", torch.empty((), device=device) if is_static else None)
        self.register_buffer("input_zero", torch.empty((), dtype=torch.uint8, device=device) if is_static else None)

    def forward(self, x: Tensor) -> Tensor:
        return linear_int8(x, self.weight, self.scale, self.bias, self.input_scale, self.input_zero)

    def plain(self) -> nn.Module:
        return _linear((self.weight.float() * self.scale).T.contiguous(), self.bias)


class BlockwiseLinear(QuantizedLeaf):
    """`y = x dequantized(W)^T + b`; the dequantized weight is `(q - 2^(bits-1)) * scale` of its block of inputs.

    Shapes: weight [out, n_blocks, block * bits / 8] uint8, scale [out, n_blocks], bias [out] or None; the last block is
    filled up. x is [..., in].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        bits: int = 8,
        block: int = 32,
        rounds_input: bool = True,
        device: Any = None,
    ) -> None:
        super().__init__(bits)
        self.in_features, self.out_features = in_features, out_features
        self.block, self.rounds_input = block, rounds_input
        n_blocks = -(-in_features // block)
        shape = (out_features, n_blocks, block * bits // 8)
        self.register_buffer("weight", torch.empty(shape, dtype=torch.uint8, device=device))
        self.register_buffer("scale", torch.empty(out_features, n_blocks, device=device))
        self.register_buffer("bias", torch.empty(out_features, device=device) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        return linear_blockwise(
            x, self.weight, self.scale, self.bias, self.in_features, self.bits, self.block, self.rounds_input
        )

    def plain(self) -> nn.Module:
        return _linear(
            dequantized_blocks(self.weight, self.scale, self.bits).flatten(1)[:, : self.in_features], self.bias
        )


class BlockwiseEmbedding(QuantizedLeaf):
    """Rows of a table that is stored as `BlockwiseLinear` stores a weight.

    Shapes: weight [rows, width * bits / 8] uint8, scale [rows, width / block]; indices [...] give [..., width] in the
    type of the scale.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bits: int = 8,
        block: int = 32,
        device: Any = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(bits)
        self.num_embeddings, self.embedding_dim, self.block = num_embeddings, embedding_dim, block
        shape = (num_embeddings, embedding_dim * bits // 8)
        self.register_buffer("weight", torch.empty(shape, dtype=torch.uint8, device=device))
        self.register_buffer("scale", torch.empty(num_embeddings, embedding_dim // block, dtype=dtype, device=device))

    def forward(self, indices: Tensor) -> Tensor:
        return embedding_blockwise(indices, self.weight, self.scale, self.bits, self.block)

    def plain(self) -> nn.Module:
        every = torch.arange(self.num_embeddings, device=self.weight.device)
        leaf = nn.Embedding(self.num_embeddings, self.embedding_dim, device="meta")
        leaf.weight = nn.Parameter(self(every), requires_grad=False)
        return leaf.train(False)


class HalfLinear(QuantizedLeaf):
    """`y = x W + b` with a weight of 16 bits that is made float32 again.

    Shapes: weight [in, out] float16 or bfloat16, bias [out] or None; x is [..., in].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype = torch.float16,
    ) -> None:
        super().__init__(16)
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.empty(in_features, out_features, dtype=dtype, device=device))
        self.register_buffer("bias", torch.empty(out_features, device=device) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        return linear_half(x, self.weight, self.bias)

    def plain(self) -> nn.Module:
        return _linear(self.weight.float().T.contiguous(), self.bias)


class HalfEmbedding(QuantizedLeaf):
    """Rows of a table of 16 bits, in float32. Shapes: weight [rows, width]; indices [...] give [..., width]."""

    def __init__(
        self, num_embeddings: int, embedding_dim: int, device: Any = None, dtype: torch.dtype = torch.float16
    ) -> None:
        super().__init__(16)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.register_buffer("weight", torch.empty(num_embeddings, embedding_dim, dtype=dtype, device=device))

    def forward(self, indices: Tensor) -> Tensor:
        return embedding_half(indices, self.weight)

    def plain(self) -> nn.Module:
        leaf = nn.Embedding(self.num_embeddings, self.embedding_dim, device="meta")
        leaf.weight = nn.Parameter(self.weight.float(), requires_grad=False)
        return leaf.train(False)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    leaf = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    leaf.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        leaf.bias = nn.Parameter(bias, requires_grad=False)
    return leaf.train(False)


def linear_int8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero: Tensor | None,
) -> Tensor:
    """What `Int8Linear` computes, in float."""
    seen = x.float()
    low, high = seen.detach().amin().clamp_max(0), seen.detach().amax().clamp_min(0)
    step = (high - low) / 255
    step = torch.where(step == 0, torch.ones_like(step), step)
    zero = torch.round(-low / step).clamp(0, 255)
    if input_scale is not None and input_zero is not None:
        step, zero = input_scale, input_zero.float()
    levels = (torch.round(seen / step) + zero).clamp(0, 255) - zero
    if x.requires_grad:
        levels = seen / step + (levels - seen / step).detach()
    y = torch.matmul(levels, weight.float()) * (step * scale)
    if bias is not None:
        y = y + bias
    return y.to(x.dtype)


def linear_blockwise(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    in_features: int,
    bits: int,
    block: int,
    rounds_input: bool,
) -> Tensor:
    """What `BlockwiseLinear` computes, in float."""
    table = dequantized_blocks(weight, scale, bits).flatten(1)[:, :in_features]
    seen = x.float()
    if rounds_input:
        blocks = torch.stack(torch.split(_filled(seen.detach(), block), block, -1), -2)
        step = blocks.abs().amax(-1, keepdim=True) / 127
        step = torch.where(step == 0, torch.ones_like(step), step)
        rounded = (torch.round(blocks * step.reciprocal()) * step).flatten(-2)[..., :in_features]
        seen = seen + (rounded - seen).detach() if x.requires_grad else rounded
    return torch.nn.functional.linear(seen, table, bias).to(x.dtype)


def _filled(x: Tensor, block: int) -> Tensor:
    """x [..., n] with zeros behind, up to whole blocks; torch's own padding would fix the other sizes in an export."""
    missing = -x.shape[-1] % block
    return x if missing == 0 else torch.cat([x, torch.zeros_like(x[..., :1]).repeat_interleave(missing, -1)], -1)


def embedding_blockwise(indices: Tensor, weight: Tensor, scale: Tensor, bits: int, block: int) -> Tensor:
    """What `BlockwiseEmbedding` computes."""
    rows, steps = weight[indices], scale[indices]
    blocks = torch.stack(torch.split(rows, block * bits // 8, -1), -2)
    return dequantized_blocks(blocks, steps, bits).flatten(-2).to(scale.dtype)


def linear_half(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What `HalfLinear` computes."""
    return torch.nn.functional.linear(x.float(), weight.float().t(), bias).to(x.dtype)


def embedding_half(indices: Tensor, weight: Tensor) -> Tensor:
    """What `HalfEmbedding` computes."""
    return weight[indices].float()


def dequantized_blocks(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Numbers [..., n_blocks, block] of packed ones [..., n_blocks, block * bits / 8] and scales [..., n_blocks]."""
    levels = weight
    if bits == 4:  # the first of two lies in the lower half of a byte
        levels = torch.stack([weight & 15, weight >> 4], -1).flatten(-2)
    found: Tensor = (levels.float() - 2 ** (bits - 1)) * scale.unsqueeze(-1)
    return found
