"""Statistics of single nodes on task data, for passes that ask for them (`Pass.wants`).

Why one sample at a time: a value that is a mean over the batch says something of a sample only where it is alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import is_fake

from vlmopt.core.contract import StatRequest
from vlmopt.core.program import Program
from vlmopt.core.progress import Progress
from vlmopt.core.workload import Feed, TrainableWorkload
from vlmopt.graph.joined import joined
from vlmopt.graph.modules import clone_graph
from vlmopt.graph.replay import inputs_of

STATISTICS = ("mean", "absmax", "second_moment", "rows", "row_variance")
SAMPLE = 64  # items
_ROWS = 64  # of an item


def node_statistics(
    program: Program, requests: Iterable[StatRequest], workload: TrainableWorkload, progress: Progress
) -> dict[StatRequest, Tensor]:
    """Every requested statistic over at most `SAMPLE` items and all axes but the last, of width D, in float64.

    `mean` and `absmax` are [D], `second_moment` is the mean outer product [D, D] about zero, and `rows` are some
    of the rows themselves, [n, D] in float32, drawn anew but alike in every run. `row_variance` is for nodes [N, T, D]
    with one T: how much each of the T rows varies over the items, the mean of its D variances, [T]. In the others, of a
    node that has a row for every token of a text, those of the prompt count, and not those of the answer. What no item
    reaches, as a component that the task does not run, is left out.

    Raises:
        ValueError: a request names no node with a floating-point value, or a statistic that is not there.
    """
    wanted = list(dict.fromkeys(requests))
    if not wanted:
        return {}
    clone = program.with_components(
        {name: replace(part, graph=clone_graph(part.graph)) for name, part in program.components.items()}
    )
    records: dict[tuple[str, str], _Record] = {}
    for request in wanted:
        place = (request.component, request.node)
        if place not in records:
            records[place] = _recorded(clone, request)
        records[place].wanted.add(request.statistic)
    run = joined(clone).program
    for component in run.components.values():
        component.graph.recompile()
    n = min(workload.n_items, SAMPLE)
    with torch.no_grad():
        for item in progress.track(range(n), "statistics of nodes", total=n):
            for name, feeds in workload.part([item]).feeds.items():
                if name in run.components:
                    for feed in feeds:
                        for record in records.values():
                            record.is_counted = _prompt(feed)
                        run.components[name].graph(*inputs_of(run.components[name], feed))
    found = {request: records[request.component, request.node] for request in wanted}
    return {request: record.statistic(request.statistic) for request, record in found.items() if record.n_rows}


@dataclass
class _Record:
    """Sums over the rows of a node's value. It stands in the graph as the identity."""

    wanted: set[str] = field(default_factory=set)
    is_counted: Tensor | None = None  # [B, S], of the present batch
    n_rows: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    largest: Tensor = field(default_factory=lambda: torch.zeros(()))
    outer: Tensor = field(default_factory=lambda: torch.zeros(()))
    n_values: int = 0  # of [T, D] each, for the sums by row
    row_total: Tensor = field(default_factory=lambda: torch.zeros(()))
    row_square: Tensor = field(default_factory=lambda: torch.zeros(()))
    rows: list[Tensor] = field(default_factory=list)
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def add(self, value: Tensor) -> None:
        seen, mask = value.detach().to("cpu", torch.float64), self.is_counted
        if mask is not None and value.dim() > mask.dim() and value.shape[: mask.dim()] == mask.shape:
            seen = seen[mask]
        rows = seen.reshape(-1, value.shape[-1])
        self.n_rows += len(rows)
        self.total = self.total + rows.sum(0)
        self.largest = torch.maximum(self.largest, rows.abs().amax(0)) if len(rows) else self.largest
        if "second_moment" in self.wanted:
            self.outer = self.outer + rows.T @ rows
        if "row_variance" in self.wanted:
            values = value.detach().to("cpu", torch.float64)
            self.n_values += len(values)
            self.row_total, self.row_square = self.row_total + values.sum(0), self.row_square + values.square().sum(0)
        if "rows" in self.wanted:
            self.rows.append(rows[torch.randperm(len(rows), generator=self.generator)[:_ROWS]].float())

    def statistic(self, name: str) -> Tensor:
        if name == "rows":
            return torch.cat(self.rows)
        if name == "row_variance":
            return (self.row_square / self.n_values - (self.row_total / self.n_values).square()).mean(-1)
        values = {"mean": self.total / self.n_rows, "absmax": self.largest, "second_moment": self.outer / self.n_rows}
        return values[name]


def _prompt(feed: Feed) -> Tensor | None:
    """Which tokens belong to a prompt, [B, S]; None where the feed holds no text."""
    if "attention_mask" not in feed:
        return None
    is_token = feed["attention_mask"].cpu().bool()
    return is_token & (feed["labels"].cpu() < 0) if "labels" in feed else is_token


def _recorded(program: Program, request: StatRequest) -> _Record:
    """Puts a record behind the requested node."""
    part = program.components.get(request.component)
    nodes = {} if part is None else {node.name: node for node in part.graph.graph.nodes}
    value = nodes[request.node].meta.get("val") if request.node in nodes else None
    if part is None or not isinstance(value, Tensor) or not value.is_floating_point() or not value.dim():
        raise ValueError(f"{request.component}/{request.node} is no node with a floating-point tensor")
    if request.statistic not in STATISTICS:
        raise ValueError(f"the statistic {request.statistic!r}; expected {', '.join(STATISTICS)}")
    if request.statistic == "row_variance" and (value.dim() != 3 or not isinstance(value.shape[1], int)):
        raise ValueError(f"{request.component}/{request.node} has no rows of one number, which row_variance is over")
    record = _Record()
    node = nodes[request.node]

    def recorded(seen: Tensor) -> Tensor:
        if not is_fake(seen):
            record.add(seen)
        return seen

    with part.graph.graph.inserting_after(node):
        behind: fx.Node = part.graph.graph.call_function(recorded, (node,))
    behind.meta = dict(node.meta)
    node.replace_all_uses_with(behind, delete_user_cb=lambda user: user is not behind)
    return record
