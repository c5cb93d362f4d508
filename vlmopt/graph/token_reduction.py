"""Fewer tokens of an image, as edits of a graph: `x` [N, T, D] becomes [N, K, D], with T and K the same for all images.

1. pooled: the mean over blocks of rows and columns of the grid in which the tokens lie.
2. merged: the likeliest pairs become their mean, each token counted by how many it stands for; of T tokens those at
   even places look for the likest one at an odd place. A step halves them at most, so K < T / 2 takes several.
3. chosen: those at fixed places.
4. salient: those that lie farthest from the mean token of their image.

What is left keeps the order of places. Operations are such that torch.export, ONNX and ONNX Runtime take them; sets and
orders come from comparing all pairs, for a sort has no order among equals that two runtimes share: of equals the first
counts. Gradients reach `x`; which tokens are taken is not differentiated.

Source of 2: Bolya et al. 2023, "Token Merging: Your ViT But Faster" (arXiv 2210.09461), section 3. What differs: tokens
are compared by themselves, not by an attention's keys; they are merged at one place, not in every layer; and no
attention behind it weighs a token by its size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from vlmopt.graph.build import insert_call
from vlmopt.graph.modules import free_path, set_at

aten = torch.ops.aten

CONSTANTS = "token_reduction"  # where the numbers of places lie
_LEAST_NORM = 1e-12
_TO_THE_END = 2**63 - 1


@dataclass(frozen=True)
class _Graph:
    """Inserts calls into a module at its graph's present place."""

    module: fx.GraphModule

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return insert_call(self.module, target, args, kwargs)

    def places(self, values: Sequence[int], like: fx.Node) -> fx.Node:
        """Whole numbers as a stored tensor, on the device of the value."""
        path = free_path(self.module, f"{CONSTANTS}.places")
        value = like.meta["val"]
        set_at(self.module, path, torch.tensor(values, device=None if value.is_meta else value.device))
        made = self.module.graph.create_node("get_attr", path)
        made.meta["val"] = value.new_empty((len(values),), dtype=torch.int64)
        return made


def pooled(module: fx.GraphModule, x: fx.Node, grid: tuple[int, int], block: tuple[int, int]) -> fx.Node:
    """[N, K, D], K the number of blocks; those have to cover the grid, row by row."""
    call = _Graph(module)
    split = [grid[0] // block[0], block[0], grid[1] // block[1], block[1]]
    means = call(aten.mean.dim, call(aten.unflatten.int, x, 1, split), [2, 4])
    return call(aten.flatten.using_ints, means, 1, 2)


def chosen(module: fx.GraphModule, x: fx.Node, places: Sequence[int]) -> fx.Node:
    """[N, K, D], the tokens at these places."""
    call = _Graph(module)
    return call(aten.index_select.default, x, 1, call.places(places, x))


def salient(module: fx.GraphModule, x: fx.Node, keep: int) -> fx.Node:
    """[N, K, D], the tokens farthest from the mean token of their image, in their order."""
    call = _Graph(module)
    n_tokens, width = (int(size) for size in x.meta["val"].shape[1:])
    apart = call(aten.sub.Tensor, x, call(aten.mean.dim, x, [1], True))
    score = call(aten.mean.dim, call(aten.mul.Tensor, apart, apart), [-1])
    is_kept = call(aten.lt.Scalar, _rank(call, score, n_tokens), keep)
    count = _counted(call, is_kept)  # [N, T], how many are kept up to a place
    numbers = call(aten.unsqueeze.default, call.places(range(keep), x), 1)
    is_before = call(aten.le.Tensor, call(aten.unsqueeze.default, count, 1), numbers)
    index = call(aten.unsqueeze.default, _summed(call, is_before), 2)
    return call(aten.gather.default, x, 1, call(aten.expand.default, index, [-1, -1, width]))


def merged(module: fx.GraphModule, x: fx.Node, keep: int) -> fx.Node:
    """[N, K, D], the likest tokens as their mean, which lies at the odd one's place."""
    call = _Graph(module)
    n, sizes = int(x.meta["val"].shape[1]), None
    while n > keep:
        n_left = max(keep, n // 2)
        x, sizes = _merged_once(call, x, sizes, n, n_left)
        n = n_left
    return x


def _merged_once(call: _Graph, x: fx.Node, sizes: fx.Node | None, n: int, n_left: int) -> tuple[fx.Node, fx.Node]:
    """`n_left` of the n tokens, and how many of the first ones each stands for, [N, n_left, 1]."""
    length = call(aten.linalg_vector_norm.default, x, 2, [-1], True)
    unit = call(aten.div.Tensor, x, call(aten.clamp.default, length, _LEAST_NORM))
    even, odd = (_every_other(call, unit, start) for start in (0, 1))
    likeness = call(aten.matmul.default, even, call(aten.transpose.int, odd, 1, 2))
    likest = call(aten.argmax.default, likeness, -1)  # [N, even]
    n_even, n_odd, n_merged = n - n // 2, n // 2, n - n_left
    if n_merged == n_even:
        places_even, places_odd = likest, None  # all odd ones stay, and nothing else
    else:
        best = call(aten.amax.default, likeness, [-1])
        is_kept = call(aten.ge.Scalar, _rank(call, best, n_even), n_merged)
        count = _counted(call, is_kept)
        places_odd = call(aten.add.Tensor, call(aten.slice.Tensor, count, 1, 0, n_odd), call.places(range(n_odd), x))
        own = call(aten.add.Tensor, count, call.places(range(-1, n_even - 1), x))
        places_even = call(aten.where.self, is_kept, own, call(aten.gather.default, places_odd, 1, likest))
    to_even = _goes_to(call, places_even, x, n_left)
    to_odd = None if places_odd is None else _goes_to(call, places_odd, x, n_left)
    if sizes is None:
        weighed, counts = x, _row_sums(call, to_even, to_odd)
    else:
        weighed, counts = call(aten.mul.Tensor, x, sizes), _gathered(call, sizes, to_even, to_odd)
    return call(aten.div.Tensor, _gathered(call, weighed, to_even, to_odd), counts), counts


def _gathered(call: _Graph, x: fx.Node, to_even: fx.Node, to_odd: fx.Node | None) -> fx.Node:
    """Sums of the tokens that go to every new place, [N, n_left, D]."""
    even, odd = (_every_other(call, x, start) for start in (0, 1))
    second = odd if to_odd is None else call(aten.matmul.default, to_odd, odd)
    return call(aten.add.Tensor, call(aten.matmul.default, to_even, even), second)


def _row_sums(call: _Graph, to_even: fx.Node, to_odd: fx.Node | None) -> fx.Node:
    """How many tokens go to every new place, [N, n_left, 1]."""
    first = call(aten.sum.dim_IntList, to_even, [-1], True)
    if to_odd is None:
        return call(aten.add.Scalar, first, 1)
    return call(aten.add.Tensor, first, call(aten.sum.dim_IntList, to_odd, [-1], True))


def _goes_to(call: _Graph, places: fx.Node, x: fx.Node, n_left: int) -> fx.Node:
    """[N, n_left, n] in the dtype of x: 1 where the token goes to the place."""
    numbers = call(aten.unsqueeze.default, call.places(range(n_left), x), 1)
    is_there = call(aten.eq.Tensor, call(aten.unsqueeze.default, places, 1), numbers)
    return call(aten._to_copy.default, is_there, dtype=x.meta["val"].dtype)


def _every_other(call: _Graph, x: fx.Node, start: int) -> fx.Node:
    return call(aten.slice.Tensor, x, 1, start, _TO_THE_END, 2)


def _rank(call: _Graph, score: fx.Node, n: int) -> fx.Node:
    """[N, n]: how many have a greater score, or the same one at an earlier place."""
    own, other = (call(aten.unsqueeze.default, score, axis) for axis in (2, 1))
    places = call.places(range(n), score)
    is_earlier = call(aten.lt.Tensor, places, call(aten.unsqueeze.default, places, 1))
    at_least, above = (call(compare, other, own) for compare in (aten.ge.Tensor, aten.gt.Tensor))
    is_ahead = call(aten.logical_or.default, above, call(aten.logical_and.default, at_least, is_earlier))
    return _summed(call, is_ahead)


def _counted(call: _Graph, is_true: fx.Node) -> fx.Node:
    """[N, n]: how many are true up to every place."""
    return call(aten.cumsum.default, call(aten._to_copy.default, is_true, dtype=torch.int64), 1)


def _summed(call: _Graph, is_true: fx.Node) -> fx.Node:
    """How many are true along the last axis."""
    return call(aten.sum.dim_IntList, call(aten._to_copy.default, is_true, dtype=torch.int64), [-1])
