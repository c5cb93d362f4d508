from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from vlmopt.core.energy import energy_meter
from vlmopt.runtime import Latency, LatencyTable, measure_latency

FEED = {"x": np.zeros(1, dtype=np.float32)}


class Sleeper:
    """Stands for a session that takes a known time."""

    alive = 0

    def __init__(self, log: list[str], name: str, milliseconds: float) -> None:
        self.seconds = milliseconds / 1e3
        Sleeper.alive += 1
        log.append(f"{name} {Sleeper.alive}")

    def __del__(self) -> None:
        Sleeper.alive -= 1

    def run(self, output_names: None, input_feed: dict[str, np.ndarray], /) -> object:
        assert output_names is None
        assert list(input_feed) == ["x"]
        time.sleep(self.seconds)
        return []


def test_models_take_turns_and_one_session_lives_at_a_time() -> None:
    log: list[str] = []
    factories = {"a": lambda: Sleeper(log, "a", 0), "b": lambda: Sleeper(log, "b", 0)}
    table = measure_latency(factories, {"a": FEED, "b": FEED}, runs=7, warmup=1, rounds=3)
    assert log == ["a 1", "b 1"] * 3
    assert list(table) == ["a", "b"]
    assert [table[name].n for name in table] == [7, 7]
    assert len(table["a"].round_medians_ms) == 3


def test_the_ratio_of_a_slow_and_a_fast_model_has_a_spread() -> None:
    log: list[str] = []
    factories = {"slow": lambda: Sleeper(log, "slow", 20), "fast": lambda: Sleeper(log, "fast", 2)}
    table = measure_latency(factories, {"slow": FEED, "fast": FEED}, runs=9, warmup=0, rounds=3)
    ratio = table.ratio("slow", "fast")
    assert table["slow"].median_ms >= 20
    assert table["fast"].p10_ms <= table["fast"].median_ms <= table["fast"].p90_ms
    assert 1 < ratio.lowest <= ratio.highest
    assert ratio.lowest <= ratio.value * 1.5


def test_quantiles_and_ratios_are_those_of_the_numbers() -> None:
    rows = {
        "a": Latency(4.0, 3.0, 5.0, 3, (4.0, 6.0)),
        "b": Latency(2.0, 1.0, 3.0, 3, (2.0, 2.0)),
    }
    ratio = LatencyTable(rows).ratio("a", "b")
    assert (ratio.value, ratio.lowest, ratio.highest) == (2.0, 2.0, 3.0)


def test_fewer_runs_than_rounds_still_measure() -> None:
    table = measure_latency({"a": lambda: Sleeper([], "a", 0)}, {"a": FEED}, runs=2, warmup=0, rounds=5)
    assert table["a"].n == 2


def test_few_calls_are_all_kept_and_many_are_thinned_to_their_quantiles() -> None:
    few = measure_latency({"a": lambda: Sleeper([], "a", 1)}, {"a": FEED}, runs=6, warmup=0)["a"]
    assert len(few.samples_ms) == 6
    assert list(few.samples_ms) == sorted(few.samples_ms)
    assert few.samples_ms[0] >= 1
    many = measure_latency({"a": lambda: Sleeper([], "a", 0)}, {"a": FEED}, runs=250, warmup=0)["a"]
    assert (many.n, len(many.samples_ms)) == (250, 100)
    assert list(many.samples_ms) == sorted(many.samples_ms)
    assert many.samples_ms[0] <= many.p10_ms <= many.median_ms <= many.p90_ms <= many.samples_ms[-1]
    assert abs(sum(value <= many.median_ms for value in many.samples_ms) - 50) <= 1


class Pool(Sleeper):
    """A session with threads of its own."""

    def __init__(self, n_threads: int) -> None:
        super().__init__([], "pool", 0)
        self.is_done = threading.Event()
        self.threads = [threading.Thread(target=self.is_done.wait) for _ in range(n_threads)]
        for thread in self.threads:
            thread.start()

    def __del__(self) -> None:
        self.is_done.set()
        for thread in self.threads:
            thread.join()
        super().__del__()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the system does not say how many threads there are")
def test_the_threads_that_a_session_starts_are_counted_beside_the_callers_own() -> None:
    factories = {"one": lambda: Sleeper([], "one", 0), "four": lambda: Pool(3)}
    table = measure_latency(factories, dict.fromkeys(factories, FEED), runs=4, warmup=0, rounds=2)
    assert [table[name].n_threads for name in factories] == [1, 4]


class Eater(Sleeper):
    """A session of which every call moves a counter on by a hundredth of a joule, round its end."""

    def __init__(self, file: Path) -> None:
        super().__init__([], "eater", 0)
        self.file = file

    def run(self, output_names: None, input_feed: dict[str, np.ndarray], /) -> object:
        used = int(self.file.read_text(encoding="ascii")) + 10_000
        self.file.write_text(f"{used % 55_000}\n", encoding="ascii")
        return []


def test_joules_of_a_call_are_those_that_the_counter_moved_during_the_timed_calls(tmp_path: Path) -> None:
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    for name, text in (("name", "package-0"), ("max_energy_range_uj", "54999"), ("energy_uj", "50000")):
        (zone / name).write_text(f"{text}\n", encoding="ascii")
    meter = energy_meter(tmp_path, tmp_path)
    counter = zone / "energy_uj"
    factories = {"eater": lambda: Eater(counter), "idle": lambda: Sleeper([], "idle", 0)}
    table = measure_latency(factories, dict.fromkeys(factories, FEED), runs=7, warmup=3, rounds=2, meter=meter)
    assert table["eater"].joules == pytest.approx(0.01, abs=1e-12)
    assert table["idle"].joules == 0.0


def test_there_are_no_joules_where_the_machine_does_not_say(tmp_path: Path) -> None:
    meter = energy_meter(tmp_path, tmp_path)
    table = measure_latency({"a": lambda: Sleeper([], "a", 0)}, {"a": FEED}, runs=2, meter=meter)
    assert table["a"].joules is None


@pytest.mark.parametrize("options", [{"runs": 0}, {"rounds": 0}, {"warmup": -1}])
def test_numbers_that_make_no_sense_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        measure_latency({"a": lambda: Sleeper([], "a", 0)}, {"a": FEED}, **options)
