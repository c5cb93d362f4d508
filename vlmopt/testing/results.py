"""What a check says of a pass, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Verdict(Enum):
    """How a check ended."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_RUN = "not run"  # what it builds on has failed
    NOT_APPLICABLE = "does not apply"


@dataclass(frozen=True)
class CheckResult:
    """One check of one pass on one case. `case` is empty for checks of the pass as a whole."""

    pass_name: str
    check: str
    case: str
    verdict: Verdict
    found: str = ""
    expected: str = ""
    remedy: str = ""

    @property
    def is_fine(self) -> bool:
        return self.verdict in (Verdict.PASSED, Verdict.NOT_APPLICABLE)

    @property
    def place(self) -> str:
        return f"pass {self.pass_name}" + (f", case {self.case!r}" if self.case else "") + f", {self.check}"

    def one_line(self) -> str:
        """Place, what was found, what was expected and what to do; as the errors of vlmopt read."""
        parts = [f"{self.place}: {self.found or self.verdict.value}"]
        if self.expected:
            parts.append(f"expected {self.expected}")
        if self.remedy:
            parts.append(self.remedy)
        return "; ".join(" ".join(part.split()) for part in parts)


@dataclass(frozen=True)
class PassReport:
    """Everything that was checked of one pass."""

    name: str
    results: tuple[CheckResult, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        return all(result.is_fine for result in self.results)

    @property
    def failures(self) -> tuple[CheckResult, ...]:
        return tuple(result for result in self.results if result.verdict is Verdict.FAILED)

    @property
    def failed_checks(self) -> frozenset[str]:
        return frozenset(result.check for result in self.failures)
