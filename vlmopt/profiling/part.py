"""Some rows and items of a workload, as a workload of its own: a batch, a sample of the images, a tenth of the items.

Rows that are not in the part keep the outputs of `base`, so a loss that compares a row with all others (retrieval)
still does. Where no item of the part looks at other rows, `base` may hold anything.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlmopt.core.program import Program
from vlmopt.core.workload import Feed, HeadBlock, Outputs, Workload, head_blocks_of, parts_of

_ROWS = 32  # in a batch of a part


@dataclass(frozen=True, eq=False)
class WorkloadPart:
    """Rows by component and items of `whole`, both in ascending order; `base` has outputs for all rows.

    `feeds` may be left out where only outputs are judged.
    """

    whole: Workload
    rows: Mapping[str, Tensor]
    items: Tensor
    base: Outputs
    feeds: Mapping[str, Sequence[Feed]] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        return self.whole.fingerprint

    @property
    def n_items(self) -> int:
        return len(self.items)

    @property
    def item_groups(self) -> Sequence[str]:
        groups = self.whole.item_groups
        return [groups[item] for item in self.items.tolist()]

    @property
    def item_parts(self) -> Sequence[str]:
        parts = parts_of(self.whole)
        return [parts[item] for item in self.items.tolist()]

    def head_blocks(self) -> Sequence[HeadBlock]:
        """Of the whole's blocks the rows that are in this part, counted within it."""
        made = []
        for block in head_blocks_of(self.whole):
            (rows,) = self.rows.values()
            inside = {row: place for place, row in enumerate(rows.tolist())}
            made.append(HeadBlock([inside[row] for row in block.rows if row in inside], block.columns))
        return made

    def losses(self, outputs: Outputs) -> Tensor:
        return self.whole.losses(self._all_rows(outputs))[self.items]

    def item_scores(self, outputs: Outputs) -> Tensor:
        return self.whole.item_scores(self._all_rows(outputs))[self.items]

    def head_targets(self, component: str, reference: Outputs) -> Tensor | None:
        targets = self.whole.head_targets(component, self._all_rows(reference))
        return None if targets is None else targets[self.rows[component]]

    def groups(self, component: str) -> Sequence[str]:
        groups = self.whole.groups(component)
        return [groups[row] for row in self.rows[component].tolist()]

    def reference(self) -> dict[str, Tensor]:
        """The rows of the part in `base`."""
        return {name: self.base[name][rows] for name, rows in self.rows.items()}

    def _all_rows(self, outputs: Outputs) -> dict[str, Tensor]:
        made = dict(self.base)
        for name, rows in self.rows.items():
            value = outputs[name]
            if len(rows) == len(made[name]):
                made[name] = value
                continue
            full = made[name].to(value.dtype)
            if full.shape[1:] != value.shape[1:]:
                full = value.new_zeros(len(full), *value.shape[1:])
            made[name] = full.index_copy(0, rows, value)
        return made


def empty_outputs(program: Program, workload: Workload) -> dict[str, Tensor] | None:
    """Zeros in the shape of every component's outputs; None where a shape is known only after a run."""
    made: dict[str, Tensor] = {}
    for name in workload.feeds:
        sizes = program.components[name].outputs[0].shape[1:]
        if not all(isinstance(size, int) for size in sizes):
            return None
        made[name] = torch.zeros(len(workload.groups(name)), *(int(size) for size in sizes))
    return made


def items_that_read(workload: Workload, outputs: Outputs, component: str, rows: Tensor) -> Tensor:
    """Which items have a loss that depends on these rows of the component, [n_items] of bool.

    How: the rows are made NaN, and whatever reads them becomes NaN as well.
    """
    spoilt = outputs[component].double().index_fill(0, rows, float("nan"))
    return ~torch.isfinite(workload.losses({**outputs, component: spoilt}))


def batch_part(workload: Workload, base: Outputs, batch: int) -> WorkloadPart:
    """One batch of every component (counted round where a component has fewer) and the items that read it."""
    rows: dict[str, Tensor] = {}
    feeds: dict[str, Sequence[Feed]] = {}
    read = torch.ones(workload.n_items, dtype=torch.bool)
    for name, batches in workload.feeds.items():
        n_rows, index = len(workload.groups(name)), batch % len(batches)
        size = -(-n_rows // len(batches)) if len(batches) == 1 else rows_of(batches[0])
        rows[name] = torch.arange(size * index, min(size * (index + 1), n_rows))
        feeds[name] = [batches[index]]
        read &= items_that_read(workload, base, name, rows[name])
    items = torch.nonzero(read).flatten() if read.any() else torch.arange(workload.n_items)
    return WorkloadPart(workload, rows, items, base, feeds)


def looks_outside(part: WorkloadPart) -> bool:
    """Whether some item of the part has a loss that depends on rows outside it."""
    for name, rows in part.rows.items():
        outside = torch.ones(len(part.base[name]), dtype=torch.bool)
        outside[rows] = False
        others = torch.nonzero(outside).flatten()
        if len(others) and items_that_read(part.whole, part.base, name, others)[part.items].any():
            return True
    return False


def group_part(workload: Workload, base: Outputs, groups: frozenset[str]) -> WorkloadPart:
    """The items of these groups and the rows of these groups; a component that has none of them keeps all its rows."""
    items = _positions(workload.item_groups, groups)
    rows: dict[str, Tensor] = {}
    for name in workload.feeds:
        own = _positions(workload.groups(name), groups)
        rows[name] = own if len(own) else torch.arange(len(workload.groups(name)))
    return WorkloadPart(workload, rows, items, base)


def _positions(names: Sequence[str], wanted: frozenset[str]) -> Tensor:
    return torch.tensor([i for i, name in enumerate(names) if name in wanted], dtype=torch.long)


def sampled_rows(workload: Workload, component: str, n_samples: int, *, seed: int) -> Tensor:
    """At most `n_samples` rows of a component, drawn by the seed, ascending. Data often lie sorted: the first rows
    would be one class."""
    n_rows = len(workload.groups(component))
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(n_rows, generator=generator)[:n_samples].sort().values


def feeds_of_rows(feeds: Sequence[Feed], rows: Tensor) -> Iterator[Feed]:
    """Batches of these rows, which are in ascending order."""
    wanted, start = rows.tolist(), 0
    pending: list[Feed] = []
    for feed in feeds:
        if not wanted:
            break
        end = start + rows_of(feed)
        inside = list(itertools.takewhile(lambda row: row < end, wanted))  # noqa: B023
        wanted = wanted[len(inside) :]
        if inside:
            index = torch.tensor(inside) - start
            pending.append({name: value[index.to(value.device)] for name, value in feed.items()})
        start = end
        if sum(map(rows_of, pending)) >= _ROWS:
            yield _joined(pending)
            pending = []
    if pending:
        yield _joined(pending)


def rows_of(feed: Feed) -> int:
    return len(next(iter(feed.values())))


def _joined(feeds: Sequence[Feed]) -> Feed:
    return {name: torch.cat([feed[name] for feed in feeds]) for name in feeds[0]}
