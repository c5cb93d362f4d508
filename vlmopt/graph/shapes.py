"""What `meta["val"]` of every node holds: fake tensors, computed anew from the input specs of the component."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StrictMinMaxConstraint
from torch.utils._sympy.value_ranges import ValueRanges

from vlmopt.core.errors import VlmoptError
from vlmopt.core.program import Component, Dim, TensorSpec
from vlmopt.graph.modules import get_at

aten = torch.ops.aten


def compute_shapes(component: Component, dims: Mapping[str, Dim]) -> None:
    """Sets `meta["val"]` of every node from the component's input specs, named dimensions symbolic.

    Raises:
        VlmoptError: an operation does not accept what it is given.
    """
    mode = shape_mode()
    assert mode.shape_env is not None
    inputs = iter(fake_inputs(component, mode, symbols(component, dims, mode.shape_env)))
    values: dict[fx.Node, Any] = {}
    with mode, torch.no_grad():
        for node in component.graph.graph.nodes:
            if node.op == "output":
                continue
            value: Any = next(inputs) if node.op == "placeholder" else _fake_value(component, node, values, mode)
            values[node] = node.meta["val"] = value


def shape_mode() -> FakeTensorMode:
    """A mode for symbolic sizes. Its cache is off: on models of two layers an entry costs more than it saves."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    mode.cache_enabled = False
    return mode


def fake_inputs(
    component: Component, mode: FakeTensorMode, sizes: Mapping[str, int | torch.SymInt]
) -> list[torch.Tensor]:
    """A fake tensor for every input, its named dimensions of these sizes."""
    with mode:
        return [_fake_input(spec, sizes) for spec in component.inputs]


def _fake_input(spec: TensorSpec, sizes: Mapping[str, int | torch.SymInt]) -> torch.Tensor:
    shape = [size if isinstance(size, int) else sizes[size] for size in spec.shape]
    return torch.empty(shape, dtype=getattr(torch, spec.dtype))


def symbols(component: Component, dims: Mapping[str, Dim], environment: ShapeEnv) -> dict[str, torch.SymInt]:
    """A symbol for every named dimension in its range, at sizes that differ: torch takes equal sizes for one."""
    from torch._dynamo.source import ConstantSource

    used = dict.fromkeys(size for spec in component.inputs for size in spec.shape if isinstance(size, str))
    sums = {name: dims[name].sum_of for name in used if dims[name].sum_of}
    names = dict.fromkeys([*(n for n in used if n not in sums), *(part for parts in sums.values() for part in parts)])
    found: dict[str, Any] = {}
    for position, name in enumerate(names):
        size = min(max(dims[name].typical, dims[name].minimum, 2) + 1 + position, max(dims[name].maximum, 2))
        source = ConstantSource(f"_{name}")
        limits = StrictMinMaxConstraint(vr=ValueRanges(dims[name].minimum, max(dims[name].maximum, 2)), warn_only=False)
        symbol = environment.create_symbol(size, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=limits)
        found[name] = environment.create_symintnode(symbol, hint=size, source=source)
    return found | {name: sum(found[part] for part in parts) for name, parts in sums.items()}


def _fake_value(component: Component, node: fx.Node, values: Mapping[fx.Node, Any], mode: FakeTensorMode) -> Any:
    target: Any = node.target
    if node.op != "call_function":
        target = get_at(component.graph, str(node.target))
    if node.op == "get_attr":
        return mode.from_tensor(target, static_shapes=True)
    args: Any = fx.node.map_arg(node.args, lambda n: values[n])
    kwargs: Any = fx.node.map_arg(node.kwargs, lambda n: values[n])
    try:
        made = _leaf_value(target, args) if node.op == "call_module" else known_value(target, args, kwargs)
        return target(*args, **kwargs) if made is None else made
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise VlmoptError(f"{component.name}/{node.name}", f"has no shape ({reason})") from error


def known_value(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What a linear layer or a layer norm of fake tensors gives; None for other calls and for what may be refused.

    Torch takes these apart into a dozen operations to find a shape that follows from the weights: most of the time that
    the shapes of a transformer take.
    """
    if kwargs or target not in (aten.linear.default, aten.layer_norm.default):
        return None
    operand, second, *others = args
    if target is aten.linear.default:
        return _linear_value(operand, second, *others)
    return _norm_value(operand, second, *others[:2])


def _leaf_value(leaf: Any, args: Sequence[Any]) -> Tensor | None:
    if len(args) != 1 or type(leaf) not in (nn.Linear, nn.LayerNorm) or leaf._forward_hooks or leaf._forward_pre_hooks:
        return None
    if isinstance(leaf, nn.Linear):
        return _linear_value(args[0], leaf.weight, leaf.bias)
    return _norm_value(args[0], leaf.normalized_shape, leaf.weight, leaf.bias)


def _linear_value(operand: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    if operand.dim() < 2 or weight.dim() != 2 or not _end_in(operand, weight.shape[1:]):
        return None
    if not _agree(operand, weight, bias) or (bias is not None and bias.shape != weight.shape[:1]):
        return None
    return operand.new_empty((*operand.shape[:-1], weight.shape[0]))


def _norm_value(
    operand: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor | None:
    if not shape or not _end_in(operand, shape) or not _agree(operand, weight, bias):
        return None
    if any(each is not None and tuple(each.shape) != tuple(shape) for each in (weight, bias)):
        return None
    return operand.new_empty(operand.shape)


def _end_in(operand: Tensor, shape: Sequence[int]) -> bool:
    sizes = operand.shape[-len(shape) :]
    return all(isinstance(size, int) for size in sizes) and tuple(sizes) == tuple(shape)


def _agree(operand: Tensor, *others: Tensor | None) -> bool:
    return all(each is None or (each.dtype, each.device) == (operand.dtype, operand.device) for each in others)
