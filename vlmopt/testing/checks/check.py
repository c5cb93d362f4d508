"""A check: its name, what it holds a pass to, and what must hold before it can be made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from vlmopt.core.errors import VlmoptError
from vlmopt.testing.calls import error_text
from vlmopt.testing.trial import Blocked, Finding, Outcome, Subject, Trial

PROGRAM = ("builds-its-cases",)
PLAN = (*PROGRAM, "runs-to-the-end", "ends-in-time", "plans-sites-and-refusals")
RESULT = (*PLAN, "leaves-sound-graphs")


@dataclass(frozen=True)
class CaseCheck:
    """A check of every case. `is_general`: it must hold on any program, not only on the cases.

    Args:
        needs: checks of the case that must not have failed.
    """

    name: str
    description: str
    run: Callable[[Trial], Outcome]
    needs: tuple[str, ...] = ()
    is_general: bool = False

    def outcome(self, trial: Trial, catalogue: Mapping[str, CaseCheck]) -> Outcome:
        """What the check says of the case; made once."""
        if self.name not in trial.outcomes:
            trial.outcomes[self.name] = self._blocked(trial, catalogue) or _caught(lambda: self.run(trial))
        return trial.outcomes[self.name]

    def _blocked(self, trial: Trial, catalogue: Mapping[str, CaseCheck]) -> Blocked | None:
        return _blocked_by((name, catalogue[name].outcome(trial, catalogue)) for name in self.needs)


@dataclass(frozen=True)
class PassCheck:
    """A check of the pass as a whole.

    Args:
        run: is given the checks of cases as well, by name.
        needs: checks that must not have failed on any case.
    """

    name: str
    description: str
    run: Callable[[Subject, Mapping[str, CaseCheck]], Outcome]
    needs: tuple[str, ...] = ()

    def outcome(self, subject: Subject, catalogue: Mapping[str, CaseCheck]) -> Outcome:
        """What the check says of the pass; made once."""
        if self.name not in subject.outcomes:
            outcomes = (
                (f"{name} on {trial.case.name!r}", catalogue[name].outcome(trial, catalogue))
                for name in self.needs
                for trial in subject.trials
            )
            subject.outcomes[self.name] = _blocked_by(outcomes) or _caught(lambda: self.run(subject, catalogue))
        return subject.outcomes[self.name]


Check = CaseCheck | PassCheck


def _blocked_by(outcomes: Iterable[tuple[str, Outcome]]) -> Blocked | None:
    for name, outcome in outcomes:
        if isinstance(outcome, Blocked):
            return outcome
        if isinstance(outcome, Finding):
            return Blocked(f"not run, since {name} failed ({outcome.found})")
    return None


def _caught(run: Callable[[], Outcome]) -> Outcome:
    try:
        return run()
    except VlmoptError as error:
        return Finding(f"{error.place}: {error.found}", error.expected, error.remedy)
    except Exception as error:  # noqa: BLE001 - a program that cannot even be run is a finding about the pass
        return Finding(f"what it left raises {error_text(error)}", expected="a program that runs")
