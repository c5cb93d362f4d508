"""Shapes that follow from the weights, beside what torch says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vlmopt.graph.shapes import known_value


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (2, 1, 3, 4)])
@pytest.mark.parametrize("is_turned", [False, True])
def test_known_values_are_those_of_torch(shape: tuple[int, ...], *, is_turned: bool) -> None:
    """Shape, strides and type of a linear layer and of a layer norm, of operands that lie in any order."""
    x = torch.randn(shape)
    if is_turned:
        x = torch.randn(shape[::-1]).permute(*reversed(range(len(shape))))
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (torch.ops.aten.linear.default, (x, torch.ones(5, 4), torch.ones(5))),
        (torch.ops.aten.linear.default, (x, torch.ones(5, 4))),
        (torch.ops.aten.layer_norm.default, (x, [4], torch.ones(4), torch.ones(4), 1e-5)),
        (torch.ops.aten.layer_norm.default, (x, list(shape[-2:]))),
    ]
    for target, args in calls:
        wanted, found = target(*args), known_value(target, args, {})
        assert found is not None
        assert (found.shape, found.stride(), found.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)


@pytest.mark.parametrize(
    "args",
    [
        (torch.ones(2, 3), torch.ones(5, 4)),
        (torch.ones(2, 4), torch.ones(5, 4).double()),
        (torch.ones(2, 4), torch.ones(5, 4), torch.ones(3)),
    ],
)
def test_what_torch_refuses_has_no_known_value(args: tuple[Tensor, ...]) -> None:
    target = torch.ops.aten.linear.default
    assert known_value(target, args, {}) is None
    with pytest.raises(RuntimeError):
        target(*args)
