"""Ends a call that takes too long, whatever it catches, and hands on everything else it raises as data."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Generic, TypeVar

T = TypeVar("T")

# A call that catches the first reminder gets another one after so many seconds, again and again.
_REMINDER_S = 0.5
_LONGEST_S = 1e8  # what every platform's timer can hold
_NOTHING = object()


class _TimeUp(BaseException):
    """Raised inside the call; no Exception, so that `except Exception` does not catch it."""


@dataclass(frozen=True)
class Clocked(Generic[T]):
    """How a call ended: with its result, with an error, or by the clock."""

    result: object
    error: BaseException | None
    has_expired: bool

    def value(self) -> T:
        return self.result  # type: ignore[return-value]


class TimeLimit:
    """Runs calls for at most `seconds` each.

    In the main thread a timer signal interrupts the call, sleeping included, and a timer that was set before goes on;
    in other threads Python raises at the next bytecode. Neither cuts one long call of a library written in C.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = min(seconds, _LONGEST_S)
        self._time_up: type[_TimeUp] = type("TimeUp", (_TimeUp,), {})  # its own class: limits may be nested
        self._lock = threading.Lock()  # between the end of the call and a reminder from another thread
        self._is_running = False
        self._has_expired = False
        self._not_ours: BaseException | None = None

    def run(self, call: Callable[[], T]) -> Clocked[T]:
        """How the call ended. KeyboardInterrupt, and what an outer timer raises, go through."""
        result: object = _NOTHING
        error: BaseException | None = None
        in_main_thread = threading.current_thread() is threading.main_thread()
        watch: AbstractContextManager[None] = self._by_signal() if in_main_thread else self._by_thread()
        with watch:
            try:
                self._is_running = True
                try:
                    result = call()
                finally:
                    with self._lock:
                        self._is_running = False
            except self._time_up as caught:
                self._is_running = False  # the reminder may have come just before it was set above
                error = caught
            except KeyboardInterrupt:
                raise
            except BaseException as caught:
                if caught is self._not_ours:
                    raise
                error = caught
        return Clocked(result, error, self._has_expired)

    @contextmanager
    def _by_signal(self) -> Iterator[None]:
        start = time.monotonic()
        deadline = start + self._seconds
        outer_handler = signal.getsignal(signal.SIGALRM)
        outer_delay, outer_interval = signal.getitimer(signal.ITIMER_REAL)
        outer_deadline = start + outer_delay if outer_delay else None

        def tick(number: int, frame: FrameType | None) -> None:
            nonlocal outer_deadline
            now = time.monotonic()
            if outer_deadline is not None and now >= outer_deadline and callable(outer_handler):
                outer_deadline = now + outer_interval if outer_interval else None
                try:
                    outer_handler(number, frame)
                except BaseException as caught:
                    self._not_ours = caught
                    raise
            if self._is_running and now >= deadline:
                self._has_expired = True
                raise self._time_up

        signal.signal(signal.SIGALRM, tick)
        first = min(self._seconds, outer_delay or self._seconds)
        signal.setitimer(signal.ITIMER_REAL, first, _REMINDER_S)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_IGN)  # discards one on its way, which the default would die of
            signal.signal(signal.SIGALRM, outer_handler)
            if outer_deadline is not None:
                left = max(outer_deadline - time.monotonic(), 1e-3)
                signal.setitimer(signal.ITIMER_REAL, left, outer_interval)

    @contextmanager
    def _by_thread(self) -> Iterator[None]:
        import ctypes

        caller = ctypes.c_ulong(threading.get_ident())
        is_over = threading.Event()

        def remind() -> None:
            wait = self._seconds
            while not is_over.wait(wait):
                wait = _REMINDER_S
                with self._lock:
                    if self._is_running:
                        self._has_expired = True
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(caller, ctypes.py_object(self._time_up))

        threading.Thread(target=remind, name="vlmopt-time-limit", daemon=True).start()
        try:
            yield
        finally:
            is_over.set()
            with self._lock:  # a reminder on its way would hit whoever runs next
                ctypes.pythonapi.PyThreadState_SetAsyncExc(caller, None)
