"""Scales of single channels, moved from the values that a norm gives into the weights that read them.

Before a tensor is rounded on one grid, a few channels that are far larger than the others (as vision towers have them)
should be smaller: `x / s` and `W s` give the same products, and the norm in front takes the `1 / s` over (SmoothQuant:
Xiao et al. 2022, arXiv 2211.10438). Here every `s` is a power of two, so not a bit of the result changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from vlmopt.graph.build import insert_call, replace_leaf
from vlmopt.graph.modules import free_path, get_at, set_at

aten = torch.ops.aten
_LARGEST_EXPONENT = 16  # of a scale: beyond it numbers would come near the ends of float32


@dataclass(frozen=True)
class ScaledNorm:
    """The node that multiplies by a norm's weight, that weight's path, and the Linears that alone read the result."""

    node: fx.Node
    weight_path: str
    readers: tuple[fx.Node, ...]


def find_norms(module: fx.GraphModule) -> tuple[list[ScaledNorm], dict[str, str]]:
    """Norms whose channels can be scaled, and for the other ones (by node) why not."""
    found: list[ScaledNorm] = []
    reasons: dict[str, str] = {}
    for node in module.graph.nodes:
        path = _weight_path(module, node)
        if path is None:
            continue
        others = [user for user in node.users if not _is_linear(module, user)]
        if others or not node.users:
            reasons[node.name] = f"{others[0].name if others else 'nothing'} reads it too, which is no Linear"
        elif _is_read_again(module, node, path):
            reasons[node.name] = "its weight, or that of a reader, is used elsewhere as well"
        else:
            found.append(ScaledNorm(node, path, tuple(node.users)))
    return found, reasons


def _weight_path(module: fx.GraphModule, node: fx.Node) -> str | None:
    """Where the weight of a LayerNorm lies, or that of an RMS norm, which multiplies by it at its end."""
    if node.op == "call_module":
        leaf = get_at(module, str(node.target))
        is_norm = type(leaf) is nn.LayerNorm and leaf.weight is not None and len(leaf.normalized_shape) == 1
        return f"{node.target}.weight" if is_norm else None
    if node.target is not aten.mul.Tensor or len(node.all_input_nodes) != 2:
        return None
    (weight, other) = sorted(node.all_input_nodes, key=lambda one: one.op != "get_attr")
    if weight.op != "get_attr" or other.op == "get_attr" or not _is_rms(other):
        return None
    tensor = get_at(module, str(weight.target))
    return str(weight.target) if isinstance(tensor, Tensor) and tensor.dim() == 1 and tensor.numel() > 1 else None


def _is_rms(node: fx.Node) -> bool:
    """Whether the value is one that was divided by the root of a mean, casts left out."""
    while node.target in (aten.to.dtype, aten._to_copy.default) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node.target is aten.mul.Tensor and any(one.target is aten.rsqrt.default for one in node.all_input_nodes)


def _is_linear(module: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and type(get_at(module, str(node.target))) is nn.Linear


def _is_read_again(module: fx.GraphModule, norm: fx.Node, path: str) -> bool:
    """Whether another node reads a weight that would change."""
    own = {str(node.target) for node in norm.users} | {path, path.removesuffix(".weight")}
    weights = {id(get_at(module, f"{node.target}.weight")) for node in norm.users} | {id(get_at(module, path))}
    allowed = {norm, *norm.users, *(node for node in norm.all_input_nodes if node.op == "get_attr")}
    for node in module.graph.nodes:
        if node in allowed or node.op not in ("call_module", "get_attr"):
            continue
        value = get_at(module, str(node.target))
        held = [value] if isinstance(value, Tensor) else list(value.parameters())
        if str(node.target) in own or any(id(tensor) in weights for tensor in held):
            return True
    return False


def balanced_scales(module: fx.GraphModule, norm: ScaledNorm, largest: Tensor, share: float) -> Tensor:
    """Powers of two [d] that make channels and weights about equally hard to round.

    Args:
        largest: the largest absolute value of every channel on the task, [d].
        share: of the difference in size that goes to the weights; 0 leaves all as it is, 1 makes all channels equal.
    """
    columns = torch.stack([_linear_at(module, reader).weight.detach().abs().amax(0) for reader in norm.readers]).amax(0)
    seen, columns = largest.double().clamp_min(1e-5), columns.double().clamp_min(1e-5)
    scale = seen.pow(share) / columns.pow(1 - share)
    exponents = (scale / scale.median()).log2().round().clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT)
    return torch.exp2(exponents)


def scale_channels(module: fx.GraphModule, norm: ScaledNorm, scales: Tensor) -> None:
    """Divides the norm's weight and bias by the scales, and multiplies the readers' columns."""
    for reader in dict.fromkeys(norm.readers):
        old = _linear_at(module, reader)
        replace_leaf(module, reader, _like(old, (old.weight.detach() * scales.to(old.weight.dtype)), old.bias))
    if norm.node.op == "call_module":
        leaf = get_at(module, str(norm.node.target))
        assert isinstance(leaf, nn.LayerNorm)
        made = nn.LayerNorm(leaf.normalized_shape, leaf.eps, bias=leaf.bias is not None, device="meta")
        made.weight = _divided(leaf.weight, scales)
        if leaf.bias is not None:
            made.bias = _divided(leaf.bias, scales)
        replace_leaf(module, norm.node, made.train(False))
        return
    weight = get_at(module, norm.weight_path)
    assert isinstance(weight, Tensor)
    path, before = free_path(module, norm.weight_path), [n for n in norm.node.all_input_nodes if n.op == "get_attr"]
    set_at(module, path, _divided(weight, scales))
    with module.graph.inserting_before(norm.node):
        read = module.graph.get_attr(path)
        read.meta["val"] = before[0].meta["val"]
        args = tuple(read if getattr(arg, "op", "") == "get_attr" else arg for arg in norm.node.args)
        scaled = insert_call(module, aten.mul.Tensor, args)
    norm.node.replace_all_uses_with(scaled)
    module.graph.erase_node(norm.node)
    for node in before:
        if not node.users:
            module.graph.erase_node(node)


def _divided(tensor: Tensor, scales: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach() / scales.to(tensor.dtype), requires_grad=False)


def _linear_at(module: fx.GraphModule, node: fx.Node) -> nn.Linear:
    leaf = get_at(module, str(node.target))
    assert isinstance(leaf, nn.Linear)
    return leaf


def _like(old: nn.Linear, weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    made = nn.Linear(old.in_features, old.out_features, bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = bias
    return made.train(False)
