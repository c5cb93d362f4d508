"""What is checked: a pass (`Subject`) and each of its cases (`Trial`). What is built is built once."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from vlmopt.core.contract import Case, Pass
from vlmopt.core.errors import PassError
from vlmopt.core.program import Program
from vlmopt.registry import build_case, cases_of, instantiate
from vlmopt.testing.attempt import Attempt, attempt
from vlmopt.testing.graphs import Blueprint, build_program
from vlmopt.testing.inputs import Feeds, make_feeds

DEFAULT_TIME_LIMIT_S = 60.0


@dataclass(frozen=True)
class Settings:
    """How a pass is checked.

    Args:
        seed: of the random inputs and programs.
        time_limit_s: for one call of the pass.
        golden: folder of the golden texts; without it they are not compared.
        n_programs: how many random programs.
    """

    seed: int = 0
    time_limit_s: float = DEFAULT_TIME_LIMIT_S
    golden: Path | None = None
    n_programs: int = 4


@dataclass(frozen=True)
class Finding:
    """What is wrong."""

    found: str
    expected: str = ""
    remedy: str = ""

    @classmethod
    def of(cls, error: PassError) -> Finding:
        return cls(f"{error.place}: {error.found}", error.expected, error.remedy)


@dataclass(frozen=True)
class Inapplicable:
    """The check says nothing about this pass or case, and why."""

    reason: str


@dataclass(frozen=True)
class Blocked:
    """The check was not made, since one that it builds on has failed."""

    reason: str


Outcome = Finding | Inapplicable | Blocked | None  # None: it holds


@dataclass
class Memory:
    """What several passes may share: random programs, and what was said of a graph that came before.

    Args:
        exports: by ONNX Runtime.
        stale: of its metadata, which are the same wherever a pass refuses to do anything.
    """

    programs: dict[Blueprint, Program] = field(default_factory=dict)
    exports: dict[object, str] = field(default_factory=dict)
    stale: dict[object, str] = field(default_factory=dict)

    def program(self, blueprint: Blueprint) -> Program:
        if blueprint not in self.programs:
            self.programs[blueprint] = build_program(blueprint)
        return self.programs[blueprint]


class Trial:
    """One case of a pass."""

    def __init__(self, subject: Subject, case: Case, *, dtype: torch.dtype = torch.float32) -> None:
        self.subject, self.case, self.dtype = subject, case, dtype
        self.outcomes: dict[str, Outcome] = {}

    @property
    def settings(self) -> Settings:
        return self.subject.settings

    @cached_property
    def program(self) -> Program:
        """The program of the case. PassError where it cannot be built."""
        return self.rebuilt()

    def rebuilt(self) -> Program:
        with default_dtype(self.dtype):
            return build_case(self.subject.pass_class, self.case, time_limit_s=self.settings.time_limit_s)

    @cached_property
    def pass_(self) -> Pass:
        """The pass with the options of the case. PassError where they do not fit."""
        return instantiate(self.subject.pass_class, self.case.options)

    @cached_property
    def attempt(self) -> Attempt:
        """What the pass does to the case."""
        return self.attempt_on(self.program)

    def attempt_on(self, program: Program, *, n_sites: int | None = None) -> Attempt:
        return attempt(program, self.pass_, self.case.context, time_limit_s=self.settings.time_limit_s, n_sites=n_sites)

    @cached_property
    def feeds(self) -> dict[str, Feeds]:
        """Inputs by their kind: example, zero, large, and two random ones."""
        return make_feeds(self.attempt.before, self.attempt.program, seed=self.settings.seed)


class Subject:
    """A pass with its cases."""

    def __init__(self, pass_class: type[Pass], settings: Settings, memory: Memory | None = None) -> None:
        self.pass_class, self.settings = pass_class, settings
        self.memory = memory or Memory()
        self.outcomes: dict[str, Outcome] = {}

    @property
    def name(self) -> str:
        return str(getattr(self.pass_class, "name", self.pass_class.__name__))

    @cached_property
    def file(self) -> Path | None:
        try:
            return Path(inspect.getfile(self.pass_class))
        except (TypeError, OSError):  # a class made at a prompt
            return None

    @cached_property
    def _listing(self) -> tuple[tuple[Case, ...], PassError | None]:
        try:
            return cases_of(self.pass_class, time_limit_s=self.settings.time_limit_s), None
        except PassError as error:
            return (), error

    @property
    def listing_error(self) -> PassError | None:
        return self._listing[1]

    @cached_property
    def trials(self) -> tuple[Trial, ...]:
        """One for every case; none where the cases cannot be listed."""
        return tuple(Trial(self, case) for case in self._listing[0])

    @cached_property
    def bfloat16_trials(self) -> tuple[Trial, ...]:
        """The cases listed while bfloat16 is torch's default: samples and weights come out in it."""
        with default_dtype(torch.bfloat16):
            cases = cases_of(self.pass_class, time_limit_s=self.settings.time_limit_s)
        return tuple(Trial(self, case, dtype=torch.bfloat16) for case in cases)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
