"""Statistics of single values of a program on task data, as passes ask for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from vlmopt.core.contract import StatRequest
from vlmopt.core.errors import ProfileError
from vlmopt.core.program import Program
from vlmopt.core.progress import Progress
from vlmopt.core.workload import Feed, Workload
from vlmopt.graph.joined import MODEL, joined
from vlmopt.graph.modules import output_values
from vlmopt.graph.replay import Replay

_STATISTICS = ("mean", "absmax", "second_moment")


@dataclass
class _Sums:
    n: int = 0
    total: float = 0.0
    squares: float = 0.0
    largest: float = 0.0

    def add(self, value: Tensor) -> None:
        found = value.detach().double()
        if found.numel():
            self.n += found.numel()
            self.total += float(found.sum())
            self.squares += float(found.square().sum())
            self.largest = max(self.largest, float(found.abs().max()))

    def value(self, statistic: str) -> float:
        if statistic == "absmax":
            return self.largest
        return (self.total if statistic == "mean" else self.squares) / max(self.n, 1)


def collect_statistics(
    program: Program, requests: Iterable[StatRequest], workload: Workload, *, progress: Progress
) -> dict[StatRequest, float]:
    """Every requested statistic over all numbers of the node's value, on all of the workload.

    Tokens that are padding do not count, and neither do those of an answer: the prompt's do.

    Raises:
        ProfileError: a statistic that is not known, or a node that the program does not have.
    """
    wanted = tuple(dict.fromkeys(requests))
    for request in wanted:
        if request.statistic not in _STATISTICS:
            where = f"{request.component}/{request.node}"
            raise ProfileError(where, f"statistic {request.statistic!r}", expected=", ".join(_STATISTICS))
    whole = joined(program)
    sums: dict[tuple[str, str], _Sums] = {(one.component, one.node): _Sums() for one in wanted}
    places: dict[str, dict[str, _Sums]] = {}
    for (component, node), own in sums.items():
        place = (MODEL, whole.nodes.get((component, node), node)) if whole.owners else (component, node)
        places.setdefault(place[0], {})[place[1]] = own
    for component, nodes in places.items():
        _collect(whole.program, component, nodes, workload, progress)
    return {one: sums[one.component, one.node].value(one.statistic) for one in wanted}


def _collect(program: Program, name: str, wanted: Mapping[str, _Sums], workload: Workload, progress: Progress) -> None:
    component = program.components.get(name)
    known = {} if component is None else {node.name: node for node in component.graph.graph.nodes}
    if missing := [node for node in wanted if node not in known]:
        raise ProfileError(f"{name}/{missing[0]}", "there is no such node", expected="a node of the program")
    assert component is not None
    nodes: dict[fx.Node, _Sums] = {known[node]: own for node, own in wanted.items()}
    replay = Replay(component, [], output_values(component.graph)[0])
    feeds = workload.feeds[name]
    for feed in progress.track(feeds, f"measuring {name}", total=len(feeds)):
        _, values = replay.run_keeping(feed, nodes.keys())
        for node, own in nodes.items():
            value = values[node]
            assert isinstance(value, Tensor)
            own.add(_counted(value.cpu(), feed))


def _counted(value: Tensor, feed: Feed) -> Tensor:
    """What belongs to tokens of prompts, where the value has a row for every token."""
    mask = feed.get("attention_mask")
    if mask is None or value.shape[: mask.ndim] != mask.shape:
        return value
    is_counted = mask.bool()
    if "labels" in feed:
        is_counted = is_counted & (feed["labels"] < 0)
    return value[is_counted.to(torch.bool)]
