"""Figures of the contract: how many checks there are, how many catch their bad pass, and what checking a pass costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

from vlmopt.registry import find_passes


def parts() -> Mapping[str, Callable[[], dict[str, float]]]:
    """What can be measured on its own."""
    return {"harness": _harness, "bisect": _bisect}


def _harness() -> dict[str, float]:
    from tests.testing.catching import count_caught  # loads torch, which the other benchmarks start without

    n_checks, n_caught = count_caught()  # also warms the process up: what is timed below starts as in a run of pytest
    return {
        "harness_checks": n_checks,
        "bad_passes_caught": n_caught,
        "harness_seconds_per_pass": statistics.median(_seconds(name) for name in find_passes()),
    }


def _bisect() -> dict[str, float]:
    from tests.benchmarks.bisect_steps import bisect_part

    return bisect_part()


def _seconds(name: str) -> float:
    """Wall-clock seconds of every check of one pass, with nothing kept from the passes before."""
    from vlmopt.testing import check_pass

    start = time.perf_counter()
    report = check_pass(name)
    if not report.passed:
        raise AssertionError("; ".join(failure.one_line() for failure in report.failures))
    return time.perf_counter() - start
