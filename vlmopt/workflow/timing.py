"""Latency and size of emitted graphs, original and optimized side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vlmopt.core.budgets import Quantity
from vlmopt.core.program import Component
from vlmopt.core.progress import Progress
from vlmopt.core.session_choice import Optimization
from vlmopt.core.workload import Feed
from vlmopt.graph.assembled import DECODER
from vlmopt.runtime.latency import Latency, LatencyTable, measure_latency
from vlmopt.runtime.session import open_session
from vlmopt.workflow.run_state import RunState
from vlmopt.workflow.samples import sample_shapes, single

NEXT_TOKEN = "next_token"  # the decoder again, on one token behind a prompt of the sample's length
Files = Mapping[str, Mapping[str, str]]  # component -> format -> file name


@dataclass(frozen=True)
class Timings:
    """Rows of the report by component, the threads that a graph ran on, and the time of all components together in the
    quietest round of each, original and optimized."""

    rows: dict[str, Any]
    n_threads: int | None
    quietest_us: dict[str, float]


def time_components(state: RunState, files: Files, originals: Files, *, original_folder: Path) -> Timings:
    """Batch 1 in ONNX Runtime, original and optimized taking turns; a component that is gone has no second number."""
    programs = (state.optimized, state.original) if _reads_more(state) else (state.original,)
    every = [state.sample_feeds(program) for program in programs]
    calls = [(name, name, _merged([feeds.get(name, {}) for feeds in every])) for name in originals]
    if state.original.generation is not None:
        steps = [sample_shapes(program, None, seed=state.recipe.seed)[DECODER][1] for program in programs]
        calls.append((NEXT_TOKEN, DECODER, _merged(steps)))
    rows: dict[str, Any] = {}
    threads: list[int] = []
    quietest = {"original": 0.0, "optimized": 0.0}
    for title, name, feed in calls:
        readers = (program.components[name] for program in programs if name in program.components)
        tensors = _merged([single(component, feed) for component in readers])
        one = {key: value.numpy() for key, value in tensors.items()}
        paths = {"original": original_folder / originals[name]["onnx"]}
        own: dict[str, Mapping[str, Any]] = {}
        if name in files and "onnx" in files[name]:
            paths["optimized"] = state.run.path(files[name]["onnx"])
            own["optimized"] = _as_wide(one, state.optimized.components[name])
        measured = time_sessions(paths, one, own=own, progress=state.progress)
        optimized = measured.get("optimized")
        ratio = None if optimized is None else measured.ratio("original", "optimized").value
        rows[title] = {
            "original": _milliseconds(measured["original"]),
            "optimized": None if optimized is None else _milliseconds(optimized),
            "ratio": ratio,
        }
        for side, latency in _for_the_budget(state, paths, (one, own), measured).items():
            quietest[side] += 1e3 * latency.quietest_ms
        threads += [latency.n_threads for latency in measured.values() if latency.n_threads is not None]
    return Timings(rows, max(threads, default=None), quietest)


def _reads_more(state: RunState) -> bool:
    """Whether a pass has given a component an input that the original's has not."""
    pairs = ((part, state.original.components.get(name)) for name, part in state.optimized.components.items())
    return any(
        {spec.name for spec in part.inputs} - {spec.name for spec in original.inputs}
        for part, original in pairs
        if original is not None
    )


def _merged(feeds: Sequence[Feed]) -> Feed:
    """Inputs of all of them; the last one counts where two have the same."""
    return {name: value for feed in feeds for name, value in feed.items()}


def _as_wide(arrays: Mapping[str, Any], component: Component) -> dict[str, Any]:
    """The same inputs, entries of the cache of as many heads as the component has left."""
    fitted = dict(arrays)
    for spec in component.inputs:
        fixed = (slice(size if isinstance(size, int) else None) for size in spec.shape)
        fitted[spec.name] = np.ascontiguousarray(arrays[spec.name][tuple(fixed)])
    return fitted


def _for_the_budget(
    state: RunState,
    paths: Mapping[str, Path],
    feeds: tuple[Mapping[str, Any], Mapping[str, Mapping[str, Any]]],
    measured: LatencyTable,
) -> LatencyTable:
    """What a budget is held against: for a share of the original both on one thread, as the planner checked it."""
    limit = state.recipe.budgets.limits.limits.get(Quantity.LATENCY)
    if limit is None or not limit.is_relative:
        return measured
    feed, own = feeds
    return time_sessions(paths, feed, own=own, progress=state.progress, runs=60, rounds=10, threads=1)


def time_sessions(
    paths: Mapping[str, Path],
    feed: Mapping[str, Any],
    *,
    own: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Progress,
    runs: int = 50,
    rounds: int = 3,
    threads: int | None = None,
) -> LatencyTable:
    """Latency of ONNX files on one feed, or on their `own`, one session at a time, in rounds."""
    feeds = {name: (own or {}).get(name, feed) for name in paths}
    with progress.stage(f"timing {', '.join(paths)}"):
        return time_variants(
            {name: (path, threads, "all") for name, path in paths.items()}, feeds, runs=runs, rounds=rounds
        )


def time_variants(
    sessions: Mapping[str, tuple[Path, int | None, Optimization]],
    feeds: Mapping[str, Mapping[str, Any]],
    *,
    runs: int,
    rounds: int,
) -> LatencyTable:
    """The same for sessions that also differ in their options: file, threads, how far it is optimized."""
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
        "samples_ms": [round(value, 6) for value in latency.samples_ms],  # the clock's own nanoseconds
    }


def graphs_bytes(folder: Path, files: Files) -> int:
    """Bytes of one format's graphs, the first that every component has, external weights included."""
    kind = next(iter(next(iter(files.values()))))
    names = [formats[kind] for formats in files.values()]
    paths = [folder / part for name in names for part in (name, f"{name}_data")]
    return sum(path.stat().st_size for path in paths if path.is_file())
