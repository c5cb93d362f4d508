"""Latency of several models, side by side.

One session lives at a time, since the idle threads of a live session spin and slow all others down (eight live sessions
made every one two to three times slower). The models take turns in rounds (A, B, A, B), so that noise hits all alike.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from vlmopt.core.energy import EnergyMeter, energy_meter
from vlmopt.core.machine import n_native_threads
from vlmopt.core.sessions import drop_garbage, n_alive

MAX_SAMPLES = 100  # so many quantiles tell a distribution apart from its neighbours

Feed = Mapping[str, NDArray[Any]]


class Runnable(Protocol):
    """What an ONNX Runtime session does."""

    def run(self, output_names: None, input_feed: dict[str, NDArray[Any]], /) -> object: ...


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call, over all rounds.

    `round_medians_ms` has one median a round. `samples_ms` is the distribution: all calls, sorted, or 100 quantiles of
    them, the fastest and the slowest included. `n_threads` were there to run the model; None where that is not known.
    `joules` is what the processor's packages used in the mean per call, whatever else ran on them included; None where
    the machine does not say.
    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    n: int
    round_medians_ms: tuple[float, ...]
    samples_ms: tuple[float, ...] = ()
    n_threads: int | None = None
    joules: float | None = None

    @property
    def quietest_ms(self) -> float:
        """Median of the fastest round: what else the machine did in the others says nothing about the model."""
        return min(self.round_medians_ms)


@dataclass(frozen=True)
class Ratio:
    """How many times longer one model takes than another: of the medians, with the extremes over the rounds."""

    value: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class LatencyTable(Mapping[str, Latency]):
    """The latencies by name."""

    rows: Mapping[str, Latency]

    def __getitem__(self, name: str) -> Latency:
        return self.rows[name]

    def __iter__(self) -> Any:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def ratio(self, slow: str, fast: str) -> Ratio:
        """`slow` over `fast`; each round compares what was measured next to each other."""
        top, bottom = self.rows[slow], self.rows[fast]
        rounds = [a / b for a, b in zip(top.round_medians_ms, bottom.round_medians_ms, strict=True)]
        return Ratio(top.median_ms / bottom.median_ms, min(rounds), max(rounds))


def measure_latency(
    factories: Mapping[str, Callable[[], Runnable]],
    feeds: Mapping[str, Feed],
    *,
    runs: int = 50,
    warmup: int = 5,
    rounds: int = 3,
    meter: EnergyMeter | None = None,
) -> LatencyTable:
    """Latency of every model on its feed, and the energy of a call.

    Args:
        factories: make a session when it is the model's turn; it is deleted before the next one's.
        runs: timed calls of each model, shared out evenly over the rounds (at least one a round).
        warmup: untimed calls after each creation.
        meter: reads the energy; by default that of this machine.
    """
    if runs < 1 or rounds < 1 or warmup < 0:
        raise ValueError(f"runs {runs}, rounds {rounds} and warmup {warmup} must be positive")
    rounds, meter = min(rounds, runs), meter or energy_meter()
    shares = [runs // rounds + (turn < runs % rounds) for turn in range(rounds)]
    found: dict[str, list[_Turn]] = {name: [] for name in factories}
    drop_garbage()
    for share in shares:
        for name, make in factories.items():
            found[name].append(_timed(make, dict(feeds[name]), meter, runs=share, warmup=warmup))
    return LatencyTable({name: _summary(turns) for name, turns in found.items()})


@dataclass(frozen=True)
class _Turn:
    """The calls of one session, in milliseconds, the threads that ran them, and the joules of all of them."""

    times_ms: list[float]
    n_threads: int | None
    joules: float | None


def _timed(
    make: Callable[[], Runnable], feed: dict[str, NDArray[Any]], meter: EnergyMeter, *, runs: int, warmup: int
) -> _Turn:
    before, n_others = n_native_threads(), n_alive()
    session = make()
    # Counted, since ONNX Runtime chooses a number that it does not tell; the caller's own thread works as well.
    after = n_native_threads()
    n_threads = None if before is None or after is None else 1 + max(0, after - before)
    was_collecting = gc.isenabled()
    try:
        for _ in range(warmup):
            session.run(None, feed)
        times = []
        gc.disable()  # a call is not charged with what others left
        energy = meter.start()
        for _ in range(runs):
            start = time.perf_counter()
            session.run(None, feed)
            times.append((time.perf_counter() - start) * 1e3)
        return _Turn(times, n_threads, meter.joules_since(energy))
    finally:
        if was_collecting:
            gc.enable()
        del session
        drop_garbage(at_most=n_others)


def _summary(turns: list[_Turn]) -> Latency:
    times = sorted(value for turn in turns for value in turn.times_ms)
    counts = [turn.n_threads for turn in turns if turn.n_threads is not None]
    joules = [turn.joules for turn in turns if turn.joules is not None]
    return Latency(
        median_ms=statistics.median(times),
        p10_ms=_quantile(times, 0.1),
        p90_ms=_quantile(times, 0.9),
        n=len(times),
        round_medians_ms=tuple(statistics.median(turn.times_ms) for turn in turns),
        samples_ms=_thinned(times),
        n_threads=max(counts, default=None),
        joules=sum(joules) / len(times) if len(joules) == len(turns) else None,
    )


def _thinned(ordered: list[float]) -> tuple[float, ...]:
    if len(ordered) <= MAX_SAMPLES:
        return tuple(ordered)
    return tuple(_quantile(ordered, i / (MAX_SAMPLES - 1)) for i in range(MAX_SAMPLES))


def _quantile(ordered: list[float], fraction: float) -> float:
    position = fraction * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)
