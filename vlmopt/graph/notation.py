"""What a node holds, as plain data for JSON and back: arguments, functions and `torch.nn` leaves."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from vlmopt.core.errors import VlmoptError
from vlmopt.graph.quantized import BlockwiseEmbedding, BlockwiseLinear, HalfEmbedding, HalfLinear, Int8Linear

_FUNCTION_HOMES = {"operator": operator, "math": math, "torch": torch}
_LEAVES: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "Linear": (nn.Linear, ("in_features", "out_features")),
    "LayerNorm": (nn.LayerNorm, ("normalized_shape", "eps")),
    "Embedding": (nn.Embedding, ("num_embeddings", "embedding_dim")),
    "Conv2d": (
        nn.Conv2d,
        ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
    ),
    "Int8Linear": (Int8Linear, ("in_features", "out_features", "is_static", "is_qdq", "weights")),
    "BlockwiseLinear": (BlockwiseLinear, ("in_features", "out_features", "bits", "block", "rounds_input")),
    "HalfLinear": (HalfLinear, ("in_features", "out_features")),
    "HalfEmbedding": (HalfEmbedding, ("num_embeddings", "embedding_dim")),
    "BlockwiseEmbedding": (BlockwiseEmbedding, ("num_embeddings", "embedding_dim", "bits", "block")),
}
_TORCH_CONSTANTS = {torch.dtype: "dtype", torch.memory_format: "memory_format", torch.layout: "layout"}


def write_value(value: object, place: str) -> Any:
    """An argument of a node as plain data; nodes by name.

    Raises:
        VlmoptError: there is no notation for it.
    """
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return {"tuple": [write_value(item, place) for item in value]}
    if isinstance(value, list):
        return [write_value(item, place) for item in value]
    if isinstance(value, slice):
        return {"slice": [write_value(item, place) for item in (value.start, value.stop, value.step)]}
    if value is ...:
        return {"ellipsis": True}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, word in _TORCH_CONSTANTS.items():
        if isinstance(value, kind):
            return {word: str(value).removeprefix("torch.")}
    raise VlmoptError(place, f"has an argument of type {type(value).__name__}, which cannot be written down")


def read_value(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    """What `write_value` wrote down."""
    if isinstance(value, list):
        return [read_value(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    ((word, content),) = value.items()
    if word == "node":
        return nodes[content]
    if word == "tuple":
        return tuple(read_value(item, nodes) for item in content)
    if word == "slice":
        return slice(*(read_value(item, nodes) for item in content))
    if word == "ellipsis":
        return ...
    if word == "float":
        return float(content)
    return torch.device(content) if word == "device" else getattr(torch, content)


def target_word(node: fx.Node, place: str) -> str:
    """The target of a node as a word; VlmoptError for a function that cannot be found again by its name."""
    target = node.target
    if not callable(target) or isinstance(target, str):
        return str(target)
    if isinstance(target, torch._ops.OpOverload):
        return f"torch.ops.{target}"
    home = str(getattr(target, "__module__", "")).removeprefix("_")
    name = getattr(target, "__name__", "")
    if getattr(_FUNCTION_HOMES.get(home), name, None) is not target:
        raise VlmoptError(place, f"calls {home}.{name}, which cannot be written down")
    return f"{home}.{name}"


def target_from(words: Mapping[str, Any]) -> Any:
    """The function that a word of a `call_function` stands for; the words of other nodes are their targets."""
    word = str(words["target"])
    if words["op"] != "call_function":
        return word
    if word.startswith("torch.ops."):
        found: Any = torch.ops
        for part in word.removeprefix("torch.ops.").split("."):
            found = getattr(found, part)
        return found
    home, _, name = word.partition(".")
    return getattr(_FUNCTION_HOMES[home], name)


def leaf_words(leaf: nn.Module, place: str) -> dict[str, Any]:
    """Class and arguments of a leaf; VlmoptError for a class that raising does not make."""
    kind = type(leaf).__name__
    known, names = _LEAVES.get(kind, (None, ()))
    if type(leaf) is not known:
        raise VlmoptError(place, f"calls a module of class {kind}, which cannot be written down")
    arguments = {name: write_value(getattr(leaf, name), place) for name in names}
    if not kind.endswith("Embedding"):
        arguments["bias"] = getattr(leaf, "bias", None) is not None
    return {"class": kind, "arguments": arguments}


def leaf_from(words: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """The leaf, holding these tensors."""
    kind, _ = _LEAVES[words["class"]]
    arguments = {name: read_value(value, {}) for name, value in words["arguments"].items()}
    leaf = kind(**arguments, device="meta")
    for name, tensor in tensors.items():
        setattr(leaf, name, tensor)
    return leaf.train(False)
