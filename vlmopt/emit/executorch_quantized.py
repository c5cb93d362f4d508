"""Quantized layers as ExecuTorch knows them: in the terms of torch's PT2E, which XNNPACK's kernels are chosen by."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from vlmopt.core.errors import EmitError
from vlmopt.core.program import Component
from vlmopt.graph.modules import clone_graph, set_at
from vlmopt.graph.quantized import Int8Linear, QuantizedLeaf

_LOWEST, _HIGHEST = -128, 127
_EPSILON = 2.0**-40  # of a scale, in the place of that of an input of zeros


class Int8Product(nn.Module):
    """`y = x W^T + b`, the input in int8 by its own range, the weight in int8 by output.

    Shapes: weight [out, in] int8, scale [out] float32, bias [out] or None; x is [..., in]. XNNPACK takes the range row
    by row, which is finer than that of a whole input, and than a range that was found before.
    """

    weight: Tensor
    scale: Tensor
    zero: Tensor
    bias: Tensor | None

    def __init__(self, leaf: Int8Linear) -> None:
        super().__init__()
        self.register_buffer("weight", leaf.weight.T.contiguous())
        self.register_buffer("scale", leaf.scale.float())
        self.register_buffer("zero", torch.zeros(leaf.scale.shape, dtype=torch.int64))
        self.register_buffer("bias", leaf.bias)

    def forward(self, x: Tensor) -> Tensor:
        ops = torch.ops.quantized_decomposed
        scale, zero = ops.choose_qparams.tensor(x, _LOWEST, _HIGHEST, _EPSILON, torch.int8)
        levels = ops.quantize_per_tensor.tensor(x, scale, zero, _LOWEST, _HIGHEST, torch.int8)
        seen = ops.dequantize_per_tensor.tensor(levels, scale, zero, _LOWEST, _HIGHEST, torch.int8)
        weight = ops.dequantize_per_channel.default(self.weight, self.scale, self.zero, 0, -127, 127, torch.int8)
        return nn.functional.linear(seen, weight, self.bias)


def with_kernels(component: Component) -> Component:
    """The component with its quantized layers as XNNPACK has kernels for them; the others' tensors are shared.

    Raises:
        EmitError: there is none for a layer.
    """
    found = {path: leaf for path, leaf in component.graph.named_modules() if isinstance(leaf, QuantizedLeaf)}
    if not found:
        return component
    import torch.ao.quantization.fx._decomposed  # noqa: F401 - registers torch.ops.quantized_decomposed

    graph = clone_graph(component.graph)
    for path, leaf in found.items():
        if not isinstance(leaf, Int8Linear):
            what = f"holds a weight of {leaf.bits} bits, which XNNPACK has no kernel for"
            remedy = "quantize it with quantize-int8, or leave executorch out of --emit"
            raise EmitError(f"{component.name}/{path}", what, remedy=remedy)
        set_at(graph, path, Int8Product(leaf))
    return replace(component, graph=graph)
