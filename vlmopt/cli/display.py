"""Progress on standard error: live on a terminal, plain lines elsewhere; and results on standard output."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO, TypeVar

from vlmopt.cli.settings import Settings
from vlmopt.core.progress import Progress, Silent

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

T = TypeVar("T")
_INTERVAL_S = 5.0


def make_progress(settings: Settings) -> Progress:
    """The display that fits where standard error goes and how much the user wants to see."""
    if settings.verbosity < 0:
        return Silent()
    if sys.stderr.isatty():
        return LiveProgress()
    return PlainProgress(sys.stderr)


def show_json(data: Mapping[str, object]) -> None:
    """Prints JSON on standard output."""
    print(json.dumps(data, indent=2, ensure_ascii=False, default=str))


def show(*renderables: RenderableType) -> None:
    """Prints for a person on standard output."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:  # a pipe has no width, and folding at 80 columns breaks tables
        console = Console(highlight=False, markup=False, emoji=False, width=200)
    for renderable in renderables:
        console.print(renderable)


class PlainProgress:
    """A line when a stage begins and ends, and while it runs at most one every few seconds.

    Args:
        clock: seconds, from any start.
    """

    def __init__(self, stream: TextIO, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = self._clock()
        self.message(f"{name} ...")
        try:
            yield
        except BaseException:
            self.message(f"{name}: stopped after {self._clock() - start:.1f} s")
            raise
        self.message(f"{name}: done in {self._clock() - start:.1f} s")

    def track(self, items: Iterable[T], what: str, *, total: int | None = None) -> Iterator[T]:
        total = _total(items, total)
        last = self._clock()
        for done, item in enumerate(items):
            if self._clock() - last >= _INTERVAL_S:
                last = self._clock()
                self.message(f"  {what}: {done}" + (f" of {total}" if total is not None else ""))
            yield item

    def message(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class LiveProgress:
    """A bar for what runs now, and a line that stays for every stage that is done."""

    def __init__(self, console: Console | None = None) -> None:
        from rich import progress
        from rich.console import Console

        self._console = console or Console(stderr=True, highlight=False, markup=False, emoji=False)
        self._bars = progress.Progress(
            progress.SpinnerColumn(),
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._n_shown = 0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            with self._bar(name, None):
                yield
        except BaseException:
            self._console.print(f"✗ {name}  {time.monotonic() - start:.1f} s", style="red")
            raise
        self._console.print(f"✓ {name}  {time.monotonic() - start:.1f} s")

    def track(self, items: Iterable[T], what: str, *, total: int | None = None) -> Iterator[T]:
        with self._bar(what, _total(items, total)) as advance:
            for item in items:
                yield item
                advance()

    def message(self, text: str) -> None:
        self._console.print(text)

    @contextmanager
    def _bar(self, text: str, total: int | None) -> Iterator[Callable[[], None]]:
        task = self._bars.add_task(text, total=total)
        self._n_shown += 1
        self._bars.start()
        try:
            yield lambda: self._bars.advance(task)
        finally:
            self._bars.remove_task(task)
            self._n_shown -= 1
            if not self._n_shown:
                self._bars.stop()


def _total(items: Iterable[T], total: int | None) -> int | None:
    return len(items) if total is None and isinstance(items, Sized) else total
