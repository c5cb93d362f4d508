"""Calls code that somebody else wrote, so that whatever it does ends in a result or in one line naming it.

Rules:
1. A call ends within its time limit, or as soon afterwards as Python gets a word in: one call of a library is not cut.
2. Whatever it raises, `sys.exit` included, becomes a `PassError`; only Ctrl-C goes through.
3. It prints nothing. Warnings and log records are no prints.
4. It leaves the process as it was (`vlmopt.core.process_state`).

The process has one standard output and one set of random generators, so guarded calls of several threads run one by
one. VLMOPT_UNGUARDED=1 in the environment switches the guard off, for stepping through a pass in a debugger.
"""

from __future__ import annotations

import inspect
import logging
import os
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

from vlmopt.core.errors import PassError, VlmoptError
from vlmopt.core.output_watch import OutputWatch
from vlmopt.core.process_state import ProcessState
from vlmopt.core.time_limit import Clocked, TimeLimit

T = TypeVar("T")

DEFAULT_TIME_LIMIT_S = 600.0
UNGUARDED = "VLMOPT_UNGUARDED"
_MAX_TEXT = 300
_LOCK = threading.RLock()
_log = logging.getLogger("vlmopt.guarding")


@dataclass(frozen=True)
class Owner:
    """Whose code is called. `file`: where its author wrote it; the place of an error is looked for there."""

    name: str
    file: Path | None = None

    @classmethod
    def of(cls, pass_class: type, name: str) -> Self:
        """The author of a class."""
        try:
            return cls(name, Path(inspect.getfile(pass_class)))
        except (TypeError, OSError):  # made at a prompt
            return cls(name)


def guarded_call(
    call: Callable[[], T],
    *,
    place: str,
    owner: Owner,
    time_limit_s: float = DEFAULT_TIME_LIMIT_S,
    is_import: bool = False,
) -> T:
    """What the call returns.

    Args:
        place: where the call happens, as errors name it ("step 3 skip-branches, plan").
        is_import: the call may import libraries, which set what they need in the environment.

    Raises:
        PassError: the call failed, printed, took too long, or left the process changed.
    """
    if os.environ.get(UNGUARDED, "") not in ("", "0"):
        return call()
    with _LOCK:
        limit, state = TimeLimit(time_limit_s), ProcessState.now()
        try:
            with OutputWatch() as output:
                done = limit.run(call)
        finally:
            changes = state.restore(with_environment=not is_import)
        if output.text:
            _log.debug("%s printed:\n%s", place, output.text)
        return _judged(done, place, owner, time_limit_s, output.first_line, changes)


def _judged(
    done: Clocked[T], place: str, owner: Owner, time_limit_s: float, first_line: str | None, changes: tuple[str, ...]
) -> T:
    if done.has_expired:
        found = f"is not done after {time_limit_s:g} s{_location(done.error, place, owner)}"
        raise PassError(place, found, remedy="leave the pass out, or allow more with --pass-timeout") from done.error
    if done.error is not None:
        if isinstance(done.error, PassError) and owner.name in done.error.place:
            raise done.error  # it names its place itself
        raise _explained(done.error, place, owner) from done.error
    if first_line is not None:
        remedy = "a pass says things in Site.summary and Refusal.reason, or with logging"
        raise PassError(place, f"printed {_short(first_line, 80)!r}", expected="no output", remedy=remedy)
    if changes:
        remedy = "a pass works on the program alone; leave it out, or tell its author"
        raise PassError(place, f"changed {changes[0]}", expected="a process left as it was", remedy=remedy)
    return done.value()


def _explained(error: BaseException, place: str, owner: Owner) -> VlmoptError:
    if isinstance(error, VlmoptError):
        return PassError(f"{place}, {error.place}", error.found, expected=error.expected, remedy=error.remedy)
    if isinstance(error, SystemExit):
        found = f"called sys.exit({error.code if error.code is not None else ''}){_location(error, place, owner)}"
    else:
        text = _short(_text_of(error), _MAX_TEXT)
        found = f"raised {type(error).__name__}{': ' if text else ''}{text}{_location(error, place, owner)}"
    return PassError(place, found, remedy="leave the pass out, or run with --debug and send its author the traceback")


def _text_of(error: BaseException) -> str:
    try:
        return " ".join(str(error).split())
    except Exception:  # noqa: BLE001 - an exception of somebody else's may fail even at this
        return ""


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."


def _location(error: BaseException | None, place: str, owner: Owner) -> str:
    """` (file:line)` of the deepest frame in the owner's file; the line alone where the place names the file."""
    if error is None or owner.file is None:
        return ""
    lines = [
        line
        for frame, line in traceback.walk_tb(error.__traceback__)
        if _is_same_file(frame.f_code.co_filename, owner.file)
    ]
    if not lines:
        return ""
    return f" (line {lines[-1]})" if str(owner.file) in place else f" ({owner.file}:{lines[-1]})"


def _is_same_file(name: str, file: Path) -> bool:
    return name == str(file) or (Path(name).name == file.name and Path(name).resolve() == file.resolve())
