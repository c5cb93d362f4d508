"""Latency and size of emitted graphs, original and optimized side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from vlmopt.core.budgets import Quantity
from vlmopt.core.formats import parts_of
from vlmopt.core.program import Program
from vlmopt.core.progress import Progress
from vlmopt.core.session_choice import Optimization
from vlmopt.core.workload import Feed
from vlmopt.graph.assembled import DECODER
from vlmopt.runtime.latency import Latency, LatencyTable, measure_latency
from vlmopt.runtime.session import open_session
from vlmopt.workflow.run_state import RunState
from vlmopt.workflow.samples import sample_shapes, single

NEXT_TOKEN = "next_token"  # the decoder again, on one token behind a prompt of the sample's length
T = TypeVar("T")
Arrays = Mapping[str, Any]  # numpy arrays by input
Files = Mapping[str, Mapping[str, str]]  # component -> format -> file name
Options = tuple[Path, int | None, Optimization]  # of a session: file, threads, how far it is optimized


@dataclass(frozen=True)
class Timings:
    """Rows of the report by component, the threads that a graph ran on, and the time of all components together in the
    quietest round of each, original and optimized."""

    rows: dict[str, Any]
    n_threads: int | None
    quietest_us: dict[str, float]


def time_components(state: RunState, files: Files, originals: Files, *, original_folder: Path) -> Timings:
    """Batch 1 in ONNX Runtime, original and optimized taking turns; a component that is gone has no second number."""
    programs = read_by(state, state.optimized)
    feeds = of_each(programs, state.sample_feeds)
    calls = [(name, name, {side: own.get(name, {}) for side, own in feeds.items()}) for name in originals]
    if state.original.generation is not None:
        seed = state.recipe.seed
        steps = of_each(programs, lambda program: sample_shapes(program, None, seed=seed)[DECODER][1])
        calls.append((NEXT_TOKEN, DECODER, steps))
    rows: dict[str, Any] = {}
    threads: list[int] = []
    quietest = {"original": 0.0, "optimized": 0.0}
    for title, name, given in calls:
        one = {side: arrays_of(programs[side], name, feed) for side, feed in given.items()}
        paths = {"original": original_folder / originals[name]["onnx"]}
        if name in files and "onnx" in files[name]:
            paths["optimized"] = state.run.path(files[name]["onnx"])
        measured = time_each(paths, one, progress=state.progress)
        optimized = measured.get("optimized")
        ratio = None if optimized is None else measured.ratio("original", "optimized").value
        rows[title] = {
            "original": _milliseconds(measured["original"]),
            "optimized": None if optimized is None else _milliseconds(optimized),
            "ratio": ratio,
        }
        for side, latency in _for_the_budget(state, paths, one, measured).items():
            quietest[side] += 1e3 * latency.quietest_ms
        threads += [latency.n_threads for latency in measured.values() if latency.n_threads is not None]
    return Timings(rows, max(threads, default=None), quietest)


def read_by(state: RunState, program: Program) -> dict[str, Program]:
    """The programs whose samples the graphs of the original and of this program are timed on: the original's for both,
    unless the other reads more inputs, fewer heads in its cache, or fewer tokens of an image."""
    pairs = ((part, state.original.components.get(name)) for name, part in program.components.items())
    reads_otherwise = any(
        {(spec.name, spec.shape) for spec in part.inputs} - {(spec.name, spec.shape) for spec in original.inputs}
        for part, original in pairs
        if original is not None
    )
    n_tokens = [one.generation and one.generation.image_tokens for one in (state.original, program)]
    is_alike = not reads_otherwise and n_tokens[0] == n_tokens[1]
    return {"original": state.original, "optimized": state.original if is_alike else program}


def of_each(programs: Mapping[str, Program], make: Callable[[Program], T]) -> dict[str, T]:
    """What is made of every program, once of one that occurs twice."""
    made = {id(program): make(program) for program in {id(one): one for one in programs.values()}.values()}
    return {name: made[id(program)] for name, program in programs.items()}


def arrays_of(program: Program, name: str, feed: Feed) -> dict[str, Any]:
    """The first sample of a component's inputs; nothing where the program has no such component."""
    if name not in program.components:
        return {}
    return {key: value.numpy() for key, value in single(program.components[name], feed).items()}


def _for_the_budget(
    state: RunState, paths: Mapping[str, Path], feeds: Mapping[str, Arrays], measured: LatencyTable
) -> LatencyTable:
    """What a budget is held against: for a share of the original both on one thread, as the planner checked it."""
    limit = state.recipe.budgets.limits.limits.get(Quantity.LATENCY)
    if limit is None or not limit.is_relative:
        return measured
    return time_each(paths, feeds, progress=state.progress, runs=60, rounds=10, threads=1)


def time_sessions(
    paths: Mapping[str, Path],
    feed: Arrays,
    *,
    progress: Progress,
    runs: int = 50,
    rounds: int = 3,
    threads: int | None = None,
) -> LatencyTable:
    """Latency of ONNX files on one feed, one session at a time, in rounds."""
    each = dict.fromkeys(paths, feed)
    return time_each(paths, each, progress=progress, runs=runs, rounds=rounds, threads=threads)


def time_each(
    paths: Mapping[str, Path],
    feeds: Mapping[str, Arrays],
    *,
    progress: Progress,
    runs: int = 50,
    rounds: int = 3,
    threads: int | None = None,
) -> LatencyTable:
    """The same, each file on the feed of its name."""
    with progress.stage(f"timing {', '.join(paths)}"):
        sessions: dict[str, Options] = {name: (path, threads, "all") for name, path in paths.items()}
        return time_variants(sessions, feeds, runs=runs, rounds=rounds)


def time_variants(
    sessions: Mapping[str, Options], feeds: Mapping[str, Arrays], *, runs: int, rounds: int
) -> LatencyTable:
    """The same for sessions that also differ in their options."""
    factories = {name: partial(_ByName, *options) for name, options in sessions.items()}
    return measure_latency(factories, feeds, runs=runs, rounds=rounds)


class _ByName:
    """A file in ONNX Runtime that takes of a feed what it reads, named with dots or without."""

    def __init__(self, path: Path, threads: int | None, optimization: Optimization) -> None:
        self._session = open_session(path, threads=threads, optimization=optimization)
        self._names = {value.name: value.name.replace(".", "_") for value in self._session.get_inputs()}

    def run(self, output_names: None, input_feed: dict[str, Any], /) -> object:
        given = {key.replace(".", "_"): value for key, value in input_feed.items()}
        return self._session.run(output_names, {name: given[key] for name, key in self._names.items()})


def _milliseconds(latency: Latency) -> dict[str, Any]:
    return {
        "median_ms": latency.median_ms,
        "p10_ms": latency.p10_ms,
        "p90_ms": latency.p90_ms,
        "joules": latency.joules,
        "samples_ms": [round(value, 6) for value in latency.samples_ms],  # the clock's own nanoseconds
    }


def graphs_bytes(folder: Path, files: Files) -> int:
    """Bytes of one format's graphs, the first that every component has, external weights included."""
    kind = next(iter(next(iter(files.values()))))
    return sum(path.stat().st_size for formats in files.values() for path in parts_of(folder / formats[kind]))
