"""What a user may watch of a run: observers around passes, which change nothing.

They are also for `vlmopt explain`. What changes the recipe instead (--skip, --stop-after, --limit) is no observer.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from vlmopt.core.contract import Pass, Promise, Site
from vlmopt.core.errors import GateError, OutputExistsError, PassError, VlmoptError
from vlmopt.core.guarding import DEFAULT_TIME_LIMIT_S
from vlmopt.core.program import Program
from vlmopt.core.workload import Feed
from vlmopt.graph.text import component_text
from vlmopt.rewrite.invariants import Snapshot, check_invariants
from vlmopt.rewrite.pipeline import Observer, StepResult
from vlmopt.rundir import partial_path
from vlmopt.verify.parity import check_step, program_scores
from vlmopt.workflow.watching.covering import named_lines
from vlmopt.workflow.watching.dumping import GraphDump, open_dump
from vlmopt.workflow.watching.tracing import Trace

Feeds = Callable[[Program], dict[str, Feed]]
Write = Callable[[str], None]


def _say_nothing(text: str) -> None:
    return None


@dataclass(frozen=True)
class Watch:
    """What to watch. Steps are numbers in the recipe that runs; `write` shows lines that are not the result.

    `left_out` says what was taken out of the recipe on the way here, for the warnings of the report;
    `pass_timeout_s` ends every call of a pass that takes longer.
    """

    print_before: frozenset[int] = frozenset()
    print_after: frozenset[int] = frozenset()
    print_diff: frozenset[int] = frozenset()
    why: tuple[str, ...] = ()
    dump_graph: Path | None = None
    force_dump: bool = False
    verify_each: bool = False
    left_out: tuple[str, ...] = ()
    pass_timeout_s: float = DEFAULT_TIME_LIMIT_S
    write: Write = _say_nothing


@dataclass(frozen=True)
class Watching:
    """The observers of one run, and the trace among them that answers `--why`."""

    observers: tuple[Observer, ...]
    trace: Trace | None


def prepare(watch: Watch, *, output: Path | None = None) -> None:
    """Makes the folder for graphs, before anything expensive begins.

    Args:
        output: where the run will write, which must not hold that folder: it appears whole or not at all.

    Raises:
        OutputExistsError: the folder holds something, or lies in the output.
    """
    if watch.dump_graph is None:
        return
    if output is not None and _is_below(watch.dump_graph, (output, partial_path(output))):
        raise OutputExistsError(
            str(watch.dump_graph), "lies in the output, which is made anew", remedy="choose a folder beside it"
        )
    open_dump(watch.dump_graph, force=watch.force_dump)


def _is_below(folder: Path, others: tuple[Path, ...]) -> bool:
    whole = folder.resolve()
    return any(whole.is_relative_to(other.resolve()) for other in others)


def start_watching(watch: Watch, feeds: Feeds) -> Watching:
    """The observers that do what was asked for.

    Args:
        feeds: inputs for a program, which `verify_each` runs it on.
    """
    observers: list[Observer] = []
    trace = Trace(watch.why, watch.write) if watch.why else None
    if trace is not None:
        observers.append(trace)
    if watch.dump_graph is not None:
        observers.append(GraphDump(watch.dump_graph))
    if watch.print_before or watch.print_after or watch.print_diff:
        observers.append(PrintGraphs(watch.print_before, watch.print_after, watch.print_diff, watch.write))
    if watch.verify_each:
        observers.append(VerifyEach(feeds))  # last, since it stops the run: the others have seen the site by then
    return Watching(tuple(observers), trace)


class PrintGraphs(Observer):
    """Writes the canonical text of every component before and after the steps asked for, or what differs between."""

    def __init__(self, before: frozenset[int], after: frozenset[int], diff: frozenset[int], write: Write) -> None:
        self._before, self._after, self._diff, self._write = before, after, diff, write
        self._program: Program | None = None

    def before(self, step: int, pass_: Pass, program: Program) -> None:
        self._program = program
        if step in self._before:
            self._show(f"before step {step} {pass_.name}", program)

    def after(self, result: StepResult) -> None:
        title = f"step {result.step} {result.name}"
        if result.step in self._after:
            self._show(f"after {title}", result.program)
        if result.step in self._diff and self._program is not None:
            lines = program_diff(self._program, result.program)
            self._write("\n".join([f"# {title}", *(lines or ["(no change)"])]))

    def _show(self, title: str, program: Program) -> None:
        texts = [component_text(component) for component in program.components.values()]
        self._write("\n".join([f"# {title}", *texts]).rstrip("\n"))


def program_diff(before: Program, after: Program) -> list[str]:
    """A unified diff of two programs, component by component, nodes under their own names."""
    lines: list[str] = []
    for name in dict.fromkeys((*before.components, *after.components)):
        old, new = _lines(before, name), _lines(after, name)
        lines += difflib.unified_diff(old, new, f"{name} before", f"{name} after", lineterm="", n=2)
    return lines


def _lines(program: Program, name: str) -> list[str]:
    return [*named_lines(program.components[name]).values()] if name in program.components else []


class VerifyEach(Observer):
    """Checks the program after every site, and stops at the first site that breaks something.

    Exact and close passes are compared with the program before the step, as the whole step is; after a site of a lossy
    pass the outputs must be finite where they were before.
    """

    def __init__(self, feeds: Feeds) -> None:
        self._make_feeds = feeds

    def before(self, step: int, pass_: Pass, program: Program) -> None:
        self._program, self._n_applied = program, 0
        self._snapshot, self._feeds = Snapshot.of(program), self._make_feeds(program)

    def applied(self, step: int, pass_: Pass, program: Program, site: Site) -> None:
        self._n_applied += 1
        place = f"step {step} {pass_.name}, site {site.name}"
        try:
            check_invariants(self._snapshot, program, pass_, step, n_applied=self._n_applied)
            self._compare(place, pass_.promise, program)
        except PassError as error:
            where = f"{error.place}, site {site.name}"
            raise PassError(where, error.found, expected=error.expected, remedy=error.remedy) from error
        except VlmoptError:
            raise
        except Exception as error:
            raise PassError(place, f"the program fails to run: {type(error).__name__}: {error}") from error

    def _compare(self, place: str, promise: Promise, program: Program) -> None:
        feeds = {name: feed for name, feed in self._feeds.items() if name in program.components}
        gate = check_step(place, promise, self._program, program, self._feeds)
        if gate is not None and not gate.passed:
            found = f"changed the result by {gate.found:.2g} of the largest output"
            raise GateError(place, found, expected=f"at most {gate.allowed:.0e} ({promise.value})")
        if gate is None:
            broken = _not_finite(program, feeds) - _not_finite(self._program, self._feeds)
            if broken:
                raise GateError(place, f"{', '.join(sorted(broken))} is not finite", expected="finite outputs")


def _not_finite(program: Program, feeds: dict[str, Feed]) -> frozenset[str]:
    scores = program_scores(program, feeds)
    return frozenset(name for name, values in scores.items() if not bool(torch.isfinite(values).all()))
