"""What whole graphs take, by the clock that operations are timed with."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmopt.core.progress import Progress
from vlmopt.devices.measure import run_times_us
from vlmopt.devices.operations import Level, given_inputs, session_options

if TYPE_CHECKING:
    from numpy.typing import NDArray

Call = tuple[Path, Mapping[str, "NDArray[Any]"]]  # a file and what it is given


def quietest_us(
    calls: Mapping[str, Call],
    *,
    threads: int,
    progress: Progress,
    rounds: int = 6,
    seconds: float = 0.3,
    level: Level = "all",
) -> dict[str, float]:
    """Microseconds of a call of every graph, the median of its quietest round; graphs take turns, one at a time."""
    import onnxruntime

    medians: dict[str, list[float]] = {title: [] for title in calls}
    turns = [title for _ in range(rounds) for title in calls]
    for title in progress.track(turns, "timing whole graphs", total=len(turns)):
        path, feed = calls[title]
        options = session_options(level, threads=threads)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        times = run_times_us(session, given_inputs(session, feed), threads=threads, seconds=seconds)
        medians[title].append(statistics.median(times))
        del session
        gc.collect()  # the threads of a session that a cycle keeps alive would spin on
    return {title: min(values) for title, values in medians.items()}
