"""How long work reports that it goes on. The command line shows it; everybody else only calls it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """A display of stages and of steps within one."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Shows that a named stage runs, and how long it took."""
        ...

    def track(self, items: Iterable[T], what: str, *, total: int | None = None) -> Iterator[T]:
        """Hands on the items while showing how many are done."""
        ...

    def message(self, text: str) -> None:
        """Shows one line that stays."""
        ...


class Silent:
    """Shows nothing."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def track(self, items: Iterable[T], what: str, *, total: int | None = None) -> Iterator[T]:
        return iter(items)

    def message(self, text: str) -> None:
        return None
