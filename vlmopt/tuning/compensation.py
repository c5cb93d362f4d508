"""Closed-form compensation: what is kept takes over what was skipped behind it, without a gradient step and at no cost.

Before: `x + s * (W h + c)` for a kept branch with its output map `W, c` (and the layer scale `s`, where there is one),
followed by branches that are skipped. After: the same expression with other numbers in `W, c`, chosen by weighted least
squares so that the stream equals the original's stream *behind the skipped branches*:

    min  sum_t  a_t | x_t + s * (W h_t + c) - T_t |^2  +  strength * |[W c] - [W0 c0]|^2

over tokens t of unlabelled task data, with T the original's stream and a_t how much the task's features feel a change
of the stream at that position (mean squared gradient). All branches behind the first gap are fitted, in order, each
seeing what those before it have become. A fit is taken only where it is closer on samples that it has not seen.

Source: the output-reconstruction step of layer-wise pruning (He et al., "Channel Pruning", arXiv 1707.06168, eq. 5).
What differs: the target lies behind whole skipped branches, and the ridge draws towards the weights that are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, fx, nn

from vlmopt.core.program import Component
from vlmopt.core.workload import Feed
from vlmopt.graph.branches import Branch, find_branches
from vlmopt.graph.head import fitted_linear
from vlmopt.graph.lockstep import Lockstep
from vlmopt.graph.modules import clone_graph, get_at, set_at

aten = torch.ops.aten
STRENGTHS = (1e-4, 1e-2, 1.0)  # relative to the mean of the diagonal
_EVERY = 5  # each fifth sample is kept out of the fit


@dataclass(frozen=True)
class Compensation:
    """One kept branch: the weighted squared distance to the original's stream on unseen samples, over the stream's own
    size, as it was and as it is.
    """

    branch: str
    before: float
    after: float


@dataclass(frozen=True)
class _OutputMap:
    """`term = scale * linear(hidden)`; `scale` is None where the linear's output is the term."""

    linear: fx.Node
    hidden: fx.Node
    scale: Tensor | None


def compensated(
    cut: Component, original: Component, feeds: Sequence[Feed], relevance: Sequence[Tensor]
) -> tuple[Component, tuple[Compensation, ...]]:
    """The cut component with output maps fitted to the original's stream, and what became of each.

    Args:
        feeds: batches of task data; all of them are in memory at once, with one layer's values.
        relevance: for every branch of the original, in order, the weight of each token position of its exit.
    """
    graph = clone_graph(cut.graph)
    kept, every = find_branches(graph), find_branches(original.graph)
    place = {branch.name: i for i, branch in enumerate(every)}
    if not kept or any(branch.name not in place for branch in kept):
        return cut, ()
    ends = [place[branch.name] for branch in kept[1:]] + [len(every)]
    first_gap = next((i for i, (b, end) in enumerate(zip(kept, ends, strict=True)) if end - place[b.name] > 1), None)
    if place[kept[0].name] > 0:
        first_gap = 0
    if first_gap is None:
        return cut, ()
    return replace(cut, graph=graph), _fit_all(graph, kept, ends, first_gap, original, every, feeds, relevance)


def _fit_all(
    graph: fx.GraphModule,
    kept: Sequence[Branch],
    ends: Sequence[int],
    first: int,
    original: Component,
    every: Sequence[Branch],
    feeds: Sequence[Feed],
    relevance: Sequence[Tensor],
) -> tuple[Compensation, ...]:
    maps = {
        i: found
        for i in range(first, len(kept))
        if _is_alike(kept[i].exit, every[ends[i] - 1].exit) and (found := _fittable(graph, kept[i])) is not None
    }
    student = Lockstep(graph, feeds, [node for i, site in maps.items() for node in (kept[i].stream, site.hidden)])
    teacher = Lockstep(original.graph, feeds, [every[ends[i] - 1].exit for i in maps])
    done: list[Compensation] = []
    for i, site in maps.items():
        stream, target = kept[i].stream, every[ends[i] - 1].exit
        streams, hidden, targets = student.values(stream), student.values(site.hidden), teacher.values(target)
        with torch.no_grad():
            before, after, linear = _fit(graph, site, streams, hidden, targets, relevance[ends[i] - 1])
        if after < before:
            set_at(graph, str(site.linear.target), linear)
        done.append(Compensation(kept[i].name, before, min(before, after)))
        for runner, node in ((student, stream), (student, site.hidden), (teacher, target)):
            runner.release(node)
    return tuple(done)


def _is_alike(own: fx.Node, other: fx.Node) -> bool:
    """Whether both streams hold as many tokens where that number is fixed: of many one may be left, which is read."""
    shapes = zip(own.meta["val"].shape, other.meta["val"].shape, strict=True)
    return all(a == b for a, b in shapes if isinstance(a, int) and isinstance(b, int))


def _fittable(graph: fx.GraphModule, branch: Branch) -> _OutputMap | None:
    """The branch's output map; None behind a norm of the sum, for another ending, for a map called twice, and where
    several branches end in one sum.
    """
    site = None if branch.is_post_norm or len(branch.terms) != 2 else _output_map(graph, branch)
    return site if site is not None and _is_called_once(graph, site) else None


def _output_map(graph: fx.GraphModule, branch: Branch) -> _OutputMap | None:
    """The Linear that makes the branch's term, alone or under a constant scale; None for any other ending."""
    node, scale = branch.term, None
    if node.target is aten.mul.Tensor:
        constants = [operand for operand in node.all_input_nodes if operand.op == "get_attr"]
        others = [operand for operand in node.all_input_nodes if operand.op != "get_attr"]
        if len(constants) != 1 or len(others) != 1:
            return None
        value = get_at(graph, str(constants[0].target))
        if not isinstance(value, Tensor) or value.ndim != 1 or bool((value == 0).any()):
            return None
        node, scale = others[0], value.detach()
    if node.op != "call_module" or not isinstance(get_at(graph, str(node.target)), nn.Linear):
        return None
    return _OutputMap(node, node.all_input_nodes[0], scale)


def _is_called_once(graph: fx.GraphModule, site: _OutputMap) -> bool:
    """A Linear that is called in two places cannot be fitted for one of them."""
    target = site.linear.target
    return len([node for node in graph.graph.nodes if node.op == "call_module" and node.target == target]) == 1


@dataclass(frozen=True)
class _Equations:
    """Normal equations of some batches, for a correction of the present weights.

    Shapes: `gram` [h + 1, h + 1], `moment` [h + 1, d], `square` [d]; `size`, a scalar, is the weighted square of the
    target.
    """

    gram: Tensor
    moment: Tensor
    square: Tensor
    size: Tensor

    def __add__(self, other: _Equations) -> _Equations:
        return _Equations(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def solution(self, strength: float) -> Tensor:
        """The correction [h + 1, d] under a ridge relative to the mean of the diagonal."""
        unit = torch.eye(len(self.gram)).to(self.gram)
        ridge = strength * self.gram.diagonal().mean().clamp(min=1e-12)
        found: Tensor = torch.linalg.solve(self.gram + ridge * unit, self.moment)
        return found

    def distance(self, correction: Tensor, scale: Tensor) -> float:
        """Weighted square of what is left of the stream's residual, over the size of the target."""
        left = self.square + (correction * (self.gram @ correction - 2 * self.moment)).sum(0)
        return float((left * scale**2).sum() / self.size.clamp(min=1e-30))


def _equations(linear: nn.Linear, scale: Tensor, weight: Tensor, x: Tensor, h: Tensor, target: Tensor) -> _Equations:
    """Of one batch; `weight` has one entry a token position."""
    rows = torch.cat([h, torch.ones_like(h[..., :1])], dim=-1).flatten(0, -2)
    residual = ((target - x) / scale.to(x) - linear(h)).flatten(0, -2)
    own = (weight.expand(h.shape[:-1]) if h.ndim == 3 else torch.ones(len(h))).flatten().to(h)[:, None]
    weighted = rows * own
    parts = (
        weighted.T @ rows,
        weighted.T @ residual,
        (own * residual**2).sum(0),
        (own * target.flatten(0, -2) ** 2).sum(),
    )
    return _Equations(*(part.double() for part in parts))  # products of one batch in its own dtype, sums in float64


def _fit(
    graph: fx.GraphModule,
    site: _OutputMap,
    streams: Sequence[Tensor],
    hidden: Sequence[Tensor],
    targets: Sequence[Tensor],
    relevance: Tensor,
) -> tuple[float, float, nn.Linear]:
    """Distances on unseen samples before and after, and the Linear of the strength that is closest there."""
    linear = get_at(graph, str(site.linear.target))
    assert isinstance(linear, nn.Linear)
    like = linear.weight.detach()
    scale = (torch.ones(linear.out_features) if site.scale is None else site.scale).to(like.device).double()
    weight = relevance if hidden[0].ndim == 3 and len(relevance) == hidden[0].shape[1] else torch.ones(1)
    parts: dict[bool, _Equations] = {}
    n_samples = 0
    for values in zip(streams, hidden, targets, strict=True):
        is_unseen = torch.arange(n_samples, n_samples + len(values[0])) % _EVERY == _EVERY - 1
        n_samples += len(is_unseen)
        for side in (False, True):
            rows = is_unseen == side
            if bool(rows.any()):
                own = _equations(linear, scale, weight, *(value[rows] for value in values))
                parts[side] = parts[side] + own if side in parts else own
    fitted, unseen = parts[False], parts.get(True, parts[False])
    tried = [fitted.solution(strength) for strength in STRENGTHS]
    correction = min(tried, key=lambda one: unseen.distance(one, scale))
    bias = like.new_zeros(linear.out_features) if linear.bias is None else linear.bias
    made = fitted_linear(linear.weight.double() + correction[:-1].T, bias.double() + correction[-1], like=like)
    return unseen.distance(torch.zeros_like(correction), scale), unseen.distance(correction, scale), made
