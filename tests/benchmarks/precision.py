"""What measuring in bfloat16 changes on the real tower: ranks by leave-one-out, drops of cuts, and seconds."""

from __future__ import annotations

import statistics
import time
from unittest.mock import patch

from tests.benchmarks import towers
from vlmopt.core.program import Program
from vlmopt.core.progress import Silent
from vlmopt.graph.branches import find_branches
from vlmopt.planning.cuts import Measurement
from vlmopt.planning.meter import CutMeter
from vlmopt.profiling.document import spearman
from vlmopt.profiling.estimator import no_checkpoint
from vlmopt.profiling.selection import make_estimator
from vlmopt.tasks.binding import TaskWorkload
from vlmopt.workflow.opening import LazyOutputs, open_model, open_task, with_fitted_head

N_ITEMS, N_PROFILED = 512, 256
IS_FAST = "vlmopt.graph.precision._multiplies_bfloat16_fast"


def figures(task: str) -> dict[str, float]:
    """Both precisions on one machine, one after the other."""
    model, data = towers.places(task)
    opened = open_model(str(model), device="cpu", dtype="float32", allow_pickle=False, progress=Silent())
    bound = open_task(opened, str(data), seed=towers.SEED, progress=Silent())
    fit, check = (bound.source.workload(bound.program, split, limit=N_ITEMS) for split in ("profile", "validation"))
    profiled = bound.source.workload(bound.program, "profile", limit=N_PROFILED)
    program = with_fitted_head(bound.program, fit, seed=towers.SEED, progress=Silent())
    scores, drops, seconds = [], [], []
    for is_half in (False, True):
        with patch(IS_FAST, return_value=is_half):
            start = time.perf_counter()
            scores.append(_scores(program, profiled))
            drops.append(_drops(program, fit, check))
            seconds.append(time.perf_counter() - start)
    rank = spearman(*scores)
    assert rank is not None
    shifts = [(b.drop_points - a.drop_points) / a.standard_error for a, b in zip(*drops, strict=True)]
    return {
        f"bfloat16_leave_one_out_spearman_{task}": rank,
        f"bfloat16_drop_shift_in_standard_errors_{task}": statistics.fmean(shifts),
        f"bfloat16_largest_drop_shift_in_standard_errors_{task}": max(map(abs, shifts)),
        f"bfloat16_speedup_{task}": seconds[0] / seconds[1],
    }


def _scores(program: Program, workload: TaskWorkload) -> list[float]:
    estimator = make_estimator("leave-one-out", "refit", with_layers=False, with_stability=False)
    found = estimator.estimate(program, workload, progress=Silent(), checkpoint=no_checkpoint, seed=towers.SEED)
    return [score.mean for score in found.scores]


def _drops(program: Program, fit: TaskWorkload, check: TaskWorkload) -> list[Measurement]:
    """Truncations, and cuts of every fourth branch."""
    meter = CutMeter(
        program, fit, check, LazyOutputs(program, fit, progress=Silent()), progress=Silent(), seed=towers.SEED
    )
    cuts = list[frozenset[str]]()
    for name, component in program.components.items():
        sites = [f"{name}/{branch.name}" for branch in find_branches(component.graph)]
        cuts += [frozenset(sites[i:]) for i in range(0, len(sites), 2)]
        cuts += [frozenset(sites[i::4]) for i in range(4)]
    return meter.measure_all(cuts)
