"""What operations take inside a whole graph, by ONNX Runtime's own clock.

That clock costs time itself, once for every operation, and its numbers move with whatever else the machine does; so it
serves where an operation cannot stand alone (an `If` reads values from around it), and as a second opinion.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmopt.devices.document import OperationTime
from vlmopt.devices.operations import GraphOperations, Level, given_inputs, session_options

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SUFFIX = "_kernel_time"
_WARMUP = 2


def times_inside(
    path: Path,
    feed: Mapping[str, NDArray[Any]],
    graph: GraphOperations,
    *,
    threads: int,
    level: Level = "all",
    runs: int = 20,
) -> dict[str, OperationTime]:
    """Times by signature: of every node the median over the runs, and of nodes of one signature the mean of those."""
    with tempfile.TemporaryDirectory(prefix="vlmopt-inside-") as folder:
        events = json.loads(_traced(path, feed, Path(folder), threads=threads, level=level, runs=runs))
    by_node: dict[str, list[float]] = defaultdict(list)
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith(_SUFFIX):
            by_node[name.removesuffix(_SUFFIX)].append(float(event["dur"]))
    by_signature: dict[str, list[list[float]]] = defaultdict(list)
    for node, signature in graph.nodes.items():
        if by_node.get(node):
            by_signature[signature].append(by_node[node][_WARMUP:])
    return {name: _time(nodes) for name, nodes in by_signature.items()}


def _time(nodes: list[list[float]]) -> OperationTime:
    medians = [statistics.median(times) for times in nodes]
    spreads = [statistics.median(abs(value - statistics.median(times)) for value in times) for times in nodes]
    return OperationTime(
        median_us=statistics.fmean(medians),
        quietest_us=statistics.fmean(sorted(times)[len(times) // 4] for times in nodes),
        spread_us=statistics.fmean(spreads),
        n_runs=sum(len(times) for times in nodes),
        measured="inside",
    )


def _traced(
    path: Path, feed: Mapping[str, NDArray[Any]], folder: Path, *, threads: int, level: Level, runs: int
) -> str:
    import onnxruntime

    options = session_options(level, threads=threads)
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "trace")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    given = given_inputs(session, feed)
    for _ in range(runs + _WARMUP):
        session.run(None, given)
    return Path(session.end_profiling()).read_text(encoding="utf-8")
