"""Calls a method of a pass and tells, as data, everything it did beside returning: what `guarded_call` makes errors of.

The harness wants each of these on its own, since each is a check of its own.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from vlmopt.core.errors import VlmoptError
from vlmopt.core.guarding import UNGUARDED
from vlmopt.core.output_watch import OutputWatch
from vlmopt.core.process_state import ProcessState
from vlmopt.core.time_limit import Clocked, TimeLimit

T = TypeVar("T")
_MAX_TEXT = 300


@dataclass(frozen=True)
class Watched(Generic[T]):
    """One call. `printed` is the first line, None when there was no output; `changes` names what it left changed."""

    action: str
    done: Clocked[T]
    printed: str | None = None
    changes: tuple[str, ...] = ()

    @property
    def error(self) -> BaseException | None:
        return None if self.done.has_expired else self.done.error

    @property
    def has_returned(self) -> bool:
        return self.done.error is None and not self.done.has_expired

    def value(self) -> T:
        return self.done.value()


def watched(call: Callable[[], T], action: str, *, time_limit_s: float) -> Watched[T]:
    """Makes the call under a time limit, gathers what it prints and puts back what it changes in the process."""
    if os.environ.get(UNGUARDED, "") not in ("", "0"):  # as for `guarded_call`: a debugger needs the terminal
        return Watched(action, Clocked(call(), None, has_expired=False))
    state = ProcessState.now()
    try:
        with OutputWatch() as output:
            done = TimeLimit(time_limit_s).run(call)
    finally:
        changes = state.restore(with_environment=True)
    return Watched(action, done, output.first_line, changes)


def error_text(error: BaseException, file: Path | None = None) -> str:
    """One line for an exception; with the line of the pass's own file that it came from."""
    text = error.one_line() if isinstance(error, VlmoptError) else str(error)
    short = " ".join(text.split())[:_MAX_TEXT]
    return f"{type(error).__name__}{': ' if short else ''}{short}{_location(error, file)}"


def _location(error: BaseException, file: Path | None) -> str:
    if file is None:
        return ""
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == str(file)]
    return f" ({file.name}:{lines[-1]})" if lines else ""
