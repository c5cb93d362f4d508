"""The pass contract: what a pass declares, plans and applies, and what everybody else checks about it.

Rules:
1. `plan` is read-only: it returns every candidate as a `Site` or as a `Refusal` with its reason.
2. `apply` makes one site's edit on the program it is given, whole or not at all, and never writes a tensor in place.
3. A pass never prints, counts or vouches for itself: the pipeline measures, verifies and reports.
4. The fields of a pass are its options, in recipes and in help texts.
5. A pass works on the program alone: it leaves the process as it was (`vlmopt.core.guarding` watches over it).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, ClassVar

from vlmopt.core.cost import Cost
from vlmopt.core.facts import Fact

if TYPE_CHECKING:
    from vlmopt.core.program import Program


class Promise(Enum):
    """What a pass promises about the function that the program computes."""

    EXACT = "exact"  # same function, same rounding: bit-equal
    CLOSE = "close"  # same function, other rounding
    LOSSY = "lossy"  # other function, judged on the task


@dataclass(frozen=True)
class Site:
    """An atomic edit. `name` is unique within the plan; `target` is what the pass edits, by names and never by objects,
    since the program is cloned between plan and apply."""

    name: str
    component: str
    target: tuple[str, ...]
    saving: Cost = field(default_factory=Cost)
    summary: str = ""


@dataclass(frozen=True)
class Refusal:
    """A candidate left alone, with the reason."""

    name: str
    component: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """All candidates of a pass.

    With `is_chosen`, the user's options already name the sites and all of them are applied; without it, the sites of a
    LOSSY pass are candidates from which the planner chooses under the budgets.
    """

    sites: tuple[Site, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    is_chosen: bool = True


@dataclass(frozen=True)
class StatRequest:
    """Statistics of a node that a pass wants collected on task data before it plans; without a task there are none.

    `rows` are values [n, D] of the node, drawn from all of the profile split, on the CPU; `row_variance` is how much
    each of the T rows of a node [N, T, D] varies over items, [T].
    """

    component: str
    node: str
    statistic: str  # "mean", "absmax", "second_moment", "rows", "row_variance"


@dataclass(frozen=True)
class Context:
    """What a pass may know beside the program."""

    importance: Mapping[str, float] = field(
        default_factory=dict
    )  # site name -> loss increase on the task, from a profile
    statistics: Mapping[StatRequest, object] = field(default_factory=dict)
    device_costs_us: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True)
class Case:
    """A smallest program on which a pass must fire `n_sites` times, or refuse for a stated reason (substring)."""

    name: str
    build: Callable[[], Program]
    n_sites: int
    refusals: tuple[str, ...] = ()
    options: Mapping[str, object] = field(default_factory=dict)
    context: Context = field(default_factory=Context)


class Pass(ABC):
    """A transformation of programs. Subclasses are frozen dataclasses; their fields are the options."""

    name: ClassVar[str]
    promise: ClassVar[Promise]
    requires: ClassVar[frozenset[Fact]] = frozenset()
    produces: ClassVar[frozenset[Fact]] = frozenset()
    breaks: ClassVar[frozenset[Fact]] = frozenset()
    changes_signature: ClassVar[bool] = False
    needs_vlmopt: ClassVar[str] = ""  # versions, as in ">=0.1,<1"; with any other vlmopt the pass is refused

    def wants(self, program: Program) -> Iterable[StatRequest]:
        """Statistics to collect on task data before `plan`; none by default."""
        return ()

    @abstractmethod
    def plan(self, program: Program, context: Context) -> Plan:
        """Every candidate, as a site or as a refusal. Read-only."""

    @abstractmethod
    def apply(self, program: Program, site: Site, context: Context) -> None:
        """Makes one site's edit on `program`, whose graphs are clones."""

    @classmethod
    @abstractmethod
    def cases(cls) -> Iterable[Case]:
        """Smallest programs: where the pass fires, and where it must refuse."""
