"""What whole graphs take, by the clock that operations are timed with, and the energy of a call."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmopt.core.energy import EnergyMeter, energy_meter
from vlmopt.core.progress import Progress
from vlmopt.core.sessions import drop_garbage, n_alive, opened
from vlmopt.devices.measure import WARMUP, run_times_us
from vlmopt.devices.operations import Level, given_inputs, session_options

if TYPE_CHECKING:
    from numpy.typing import NDArray

Call = tuple[Path, Mapping[str, "NDArray[Any]"]]  # a file and what it is given


@dataclass(frozen=True)
class CallCost:
    """Of one call: microseconds, the median of the quietest round; joules, the median of the rounds, or None where
    none could be read."""

    us: float
    joules: float | None


def call_costs(
    calls: Mapping[str, Call],
    *,
    threads: int,
    progress: Progress,
    rounds: int = 6,
    seconds: float = 0.3,
    level: Level = "all",
    meter: EnergyMeter | None = None,
) -> dict[str, CallCost]:
    """What a call of every graph takes; graphs take turns, one at a time.

    Args:
        meter: reads the energy; by default that of this machine.
    """
    import onnxruntime

    drop_garbage()
    meter = meter or energy_meter()
    medians: dict[str, list[float]] = {title: [] for title in calls}
    joules: dict[str, list[float]] = {title: [] for title in calls}
    turns = [title for _ in range(rounds) for title in calls]
    for title in progress.track(turns, "timing whole graphs", total=len(turns)):
        path, feed = calls[title]
        options = session_options(level, threads=threads)
        n_others = n_alive()
        session = opened(onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]))
        given, start = given_inputs(session, feed), meter.start()
        times = run_times_us(session, given, threads=threads, seconds=seconds)
        used = meter.joules_since(start)
        medians[title].append(statistics.median(times))
        joules[title] += [] if used is None else [used / (WARMUP + len(times))]
        del session
        drop_garbage(at_most=n_others)
    return {
        title: CallCost(min(values), statistics.median(joules[title]) if joules[title] else None)
        for title, values in medians.items()
    }
