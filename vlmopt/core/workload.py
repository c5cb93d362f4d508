"""What a task offers to profiling, planning and recovery: inputs, losses, metric items and the target of a head.

It is a role (Protocol), so that the stages which consume it need not import the tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from vlmopt.core.program import Program

Feed = Mapping[str, "Tensor"]  # input name -> tensor [B, ...]
Outputs = Mapping[str, "Tensor"]  # component name -> its first output over all feeds, [n, ...]


class Workload(Protocol):
    """One split of one task, bound to a program.

    Shapes: `feeds[c]` is a list of batches for component `c`; `losses` and `item_scores` have one value an item.
    """

    @property
    def fingerprint(self) -> str:
        """sha256 over the samples in order."""
        ...

    @property
    def n_items(self) -> int: ...

    @property
    def feeds(self) -> Mapping[str, Sequence[Feed]]: ...

    @property
    def item_groups(self) -> Sequence[str]:
        """The group of every item; items of one group are not independent."""
        ...

    def losses(self, outputs: Outputs) -> Tensor:
        """Task loss of every item, float64; lower is better."""
        ...

    def item_scores(self, outputs: Outputs) -> Tensor:
        """The metric's contribution of every item, float64 in [0, 1]; the metric is their mean."""
        ...

    def head_targets(self, component: str, reference: Outputs) -> Tensor | None:
        """What the component's head is to reproduce, [n_rows, d_out] (labels one-hot, or the reference's own outputs);
        None when the component has nothing to fit."""
        ...

    def groups(self, component: str) -> Sequence[str]:
        """Rows of one group must not be separated by cross-fitting (four drawings of one concept); one entry a row."""
        ...


class TrainableWorkload(Workload, Protocol):
    """A workload that can be taken in parts, as training does."""

    def rows(self, component: str, items: Sequence[int]) -> Sequence[int]:
        """The rows of a component that these items need, in the order in which their part feeds them."""
        ...

    def part(self, items: Sequence[int]) -> Workload:
        """The workload of these items alone, in this order; retrieval searches among them only."""
        ...


@runtime_checkable
class LabelledWorkload(Workload, Protocol):
    """A workload that can be had with some of its labels wrong, to see how much a result depends on them."""

    def with_wrong_labels(self, share: float, *, seed: int) -> Workload:
        """The same items, this share of them (rounded up) with another label than their own."""
        ...


@runtime_checkable
class PreferenceWorkload(Workload, Protocol):
    """A workload that knows of every item an answer that is wrong and likely."""

    def rejected(self) -> Workload:
        """The same items with the rejected answer in the place of the expected one.

        Raises:
            TaskError: an item has none.
        """
        ...


@dataclass(frozen=True)
class HeadBlock:
    """Rows of the component with a head that only some outputs of it answer: those of one task of several."""

    rows: Sequence[int]
    columns: Sequence[int]


@runtime_checkable
class MultiTaskWorkload(Workload, Protocol):
    """A workload of several tasks: each has outputs of its own, and may be held to a bound by itself."""

    @property
    def item_parts(self) -> Sequence[str]:
        """For every item what a drop is taken over: the name of its task, or one name for all of them."""
        ...

    def head_blocks(self) -> Sequence[HeadBlock]:
        """Every task's rows, and the outputs of the head that are its own; empty where a single task has them all."""
        ...


def parts_of(workload: Workload) -> Sequence[str]:
    """For every item the name of what a drop is taken over; one name where the workload is a single task."""
    return workload.item_parts if isinstance(workload, MultiTaskWorkload) else [""] * workload.n_items


def by_part(workload: Workload, values: Tensor) -> dict[str, Tensor]:
    """Values of all items, [n, ...], by what a drop is taken over."""
    rows: dict[str, list[int]] = {}
    for item, part in enumerate(parts_of(workload)):
        rows.setdefault(part, []).append(item)
    return {part: values[own] for part, own in rows.items()}


def head_blocks_of(workload: Workload) -> Sequence[HeadBlock]:
    """The blocks of a head that several tasks share; none where the workload is a single task."""
    return workload.head_blocks() if isinstance(workload, MultiTaskWorkload) else ()


class WorkloadSource(Protocol):
    """Gives the workloads that may be looked at before the final evaluation."""

    def workload(self, program: Program, split: str, *, limit: int | None = None) -> Workload: ...
