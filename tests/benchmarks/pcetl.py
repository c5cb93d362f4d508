"""How well cheap importance finds the best subset: against all subsets of a small real model, and against re-fits.

`counts`: parameters of the adapters of the papers at real size (`counts.py`).

`cheap-TASK`: estimators against leave-one-out with re-fitted heads (`cheap.py`). `precision-TASK`: what measuring in
bfloat16 changes (`precision.py`). `TASK`: every method and recovery under five budgets (`towers.py`). `pipeline`:
seconds of the main job.

`overlap`: the embedded question answering model has 16 branches; all 1,820 ways to skip four of them are evaluated on
the profile split, so the truly best one is known. Every estimator names four branches; what is compared is how many of
them are in the best subset, and how much more loss its choice has. Bandit and ridge see the same evaluations, drawn by
the bandit and looked up in the table of all subsets, so many seeds cost nothing. Baselines: the last four branches, the
attentions of the last four layers, random ones, and block influence (cosine).
"""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tests.benchmarks import cheap, counts, precision, towers
from vlmopt.core.errors import EXIT_DIFFERENT
from vlmopt.core.program import Program
from vlmopt.core.progress import Silent
from vlmopt.core.workload import Workload
from vlmopt.graph.branches import BranchKind, find_branches
from vlmopt.profiling.das_bandit import draw_subsets, updated
from vlmopt.profiling.estimator import Evaluation, Unit, no_checkpoint, program_units
from vlmopt.profiling.selection import make_estimator
from vlmopt.profiling.subset_losses import SubsetLosses
from vlmopt.profiling.subset_ridge import ridge_scores
from vlmopt.workflow.opening import open_model, open_task, with_fitted_head

ROOT = Path(__file__).resolve().parents[2]
TASK = "count"  # of the embedded tasks the one that needs most of the model
TOWER_TASKS = ("style", "meaning", "retrieval")
N_SKIPPED, N_ITEMS = 4, 192
SEEDS, UPDATES = 20, (50, 200, 600)
CHUNK = 64  # subsets that share one run of the model
CHEAP = ("leave-one-out", "fisher", "gate-gradient", "logit-distortion", "feature-distortion", "block-influence")


def parts() -> Mapping[str, Callable[[], dict[str, float]]]:
    """What can be measured on its own."""
    fixed = {"counts": counts.adapter_counts, "overlap": _overlaps}
    on_tower = {f"cheap-{task}": partial(cheap.figures, task) for task in TOWER_TASKS}
    half = {f"precision-{task}": partial(precision.figures, task) for task in TOWER_TASKS}
    budgets = {task: partial(_under_budgets, task) for task in (*TOWER_TASKS, TASK)}
    return fixed | on_tower | half | budgets | {"pipeline": _pipeline_seconds}


def _under_budgets(task: str) -> dict[str, float]:
    return towers.figures(task) | towers.latencies(task)


def _pipeline_seconds() -> dict[str, float]:
    """Wall-clock of the main job on the dual encoder, from the model to the verified artifact."""
    home = towers.cache() / "emoji"
    found = {}
    for name, options in (("pipeline_s", ["--recover", "closed-form"]), ("pipeline_tuned_s", ["--recover", "weights"])):
        with tempfile.TemporaryDirectory() as folder:
            command = [str(Path(sys.executable).parent / "vlmopt"), "optimize", "-q", *options, "--max-drop", "1"]
            command += ["-m", str(home / "model"), "-t", str(home / "tasks" / "meaning"), "-o", f"{folder}/out"]
            start = time.perf_counter()
            done = subprocess.run(command, check=False)
            found[name] = time.perf_counter() - start
            if done.returncode not in (0, EXIT_DIFFERENT):  # a drop above the bound takes as long
                done.check_returncode()
    return found


@dataclass(frozen=True)
class _Truth:
    """Losses of every subset on every batch, [n_subsets, n_batches]."""

    arms: tuple[Unit, ...]
    subsets: tuple[tuple[int, ...], ...]
    losses: Tensor
    whole: float

    @property
    def best(self) -> frozenset[int]:
        return frozenset(self.subsets[int(self.losses.mean(1).argmin())])

    def excess(self, chosen: frozenset[int]) -> float:
        """How much more loss this subset has than the best one."""
        mean = self.losses.mean(1)
        return float(mean[self.subsets.index(tuple(sorted(chosen)))] - mean.min())


def _overlaps() -> dict[str, float]:
    program, workload = _embedded()
    truth = _all_subsets(program, workload)
    figures = {
        "overlap_n_subsets": float(len(truth.subsets)),
        "overlap_best_loss": float(truth.losses.mean(1).min()),
        "overlap_whole_loss": truth.whole,
    }
    for name, chosen in {**_baselines(program, truth), **_estimated(program, workload, truth)}.items():
        figures |= _figures(name, [chosen], truth)
    for n_updates in UPDATES:
        runs = [_search(truth, n_updates, seed) for seed in range(SEEDS)]
        figures |= _figures(f"das_{n_updates}", [run[0] for run in runs], truth)
        figures |= _figures(f"ridge_{n_updates}", [run[1] for run in runs], truth)
    return figures


def _embedded() -> tuple[Program, Workload]:
    with tempfile.TemporaryDirectory() as folder:
        tasks = Path(folder) / "tasks"
        made = [sys.executable, str(ROOT / "examples" / "embedded" / "make_tasks.py"), str(tasks)]
        subprocess.run(made, check=True, capture_output=True)
        source = str(ROOT / "examples" / "embedded" / "model")
        opened = open_model(source, device="cpu", dtype="float32", allow_pickle=False, progress=Silent())
        bound = open_task(opened, str(tasks / TASK), seed=0, progress=Silent())
        workload = bound.source.workload(bound.program, "profile", limit=N_ITEMS)
        for feeds in workload.feeds.values():
            list(feeds)  # images are read and kept while their folder is there
        return with_fitted_head(bound.program, workload, seed=0, progress=Silent()), workload


def _all_subsets(program: Program, workload: Workload) -> _Truth:
    arms = tuple(program_units(program, workload, with_layers=False))
    subsets = tuple(itertools.combinations(range(len(arms)), N_SKIPPED))
    meter = SubsetLosses(program, workload, is_refit=False, progress=Silent())
    columns = []
    for batch in range(meter.n_batches):
        found = []
        for start in range(0, len(subsets), CHUNK):
            chunk = subsets[start : start + CHUNK]
            found.append(meter.losses(batch, [frozenset().union(*(arms[i].sites for i in one)) for one in chunk]))
        columns.append(torch.cat(found))
    whole = [float(meter.losses(batch, [frozenset()])[0]) for batch in range(meter.n_batches)]
    return _Truth(arms, subsets, torch.stack(columns, 1), statistics.mean(whole))


def _baselines(program: Program, truth: _Truth) -> dict[str, frozenset[int]]:
    n = len(truth.arms)
    (component,) = program.components.values()
    kinds = {branch.name: branch.kind for branch in find_branches(component.graph)}
    attentions = [i for i, arm in enumerate(truth.arms) if kinds[arm.name] is BranchKind.ATTENTION]
    return {
        "last": frozenset(range(n - N_SKIPPED, n)),
        "last_attentions": frozenset(attentions[-N_SKIPPED:]),
    }


def _estimated(program: Program, workload: Workload, truth: _Truth) -> dict[str, frozenset[int]]:
    chosen = {}
    for name in CHEAP:
        estimator = make_estimator(name, "raw", with_layers=False, sample_size=N_ITEMS)
        found = estimator.estimate(program, workload, progress=Silent(), checkpoint=no_checkpoint, seed=0)
        scores = {score.unit.name: score.mean for score in found.scores if not score.unit.is_layer}
        chosen[name.replace("-", "_")] = _least([scores[arm.name] for arm in truth.arms])
    return chosen


def _least(scores: Sequence[float]) -> frozenset[int]:
    return frozenset(sorted(range(len(scores)), key=scores.__getitem__)[:N_SKIPPED])


def _search(truth: _Truth, n_updates: int, seed: int) -> tuple[frozenset[int], frozenset[int]]:
    """What the bandit chooses after so many turns, and what the ridge chooses from the same evaluations."""
    place = {subset: i for i, subset in enumerate(truth.subsets)}
    generator = torch.Generator().manual_seed(seed)
    preferences, log = torch.zeros(len(truth.arms), dtype=torch.float64), list[Evaluation]()
    for turn in range(n_updates):
        batch = turn % truth.losses.shape[1]
        subsets = draw_subsets(preferences, N_SKIPPED, 3, generator=generator)
        losses = truth.losses[[place[subset] for subset in subsets], batch]
        preferences = updated(preferences, subsets, losses, learning_rate=0.1)
        for subset, loss in zip(subsets, losses.tolist(), strict=True):
            log.append(Evaluation(frozenset().union(*(truth.arms[i].sites for i in subset)), loss, batch))
    ridge = ridge_scores(log, truth.arms, seed=seed)
    return _least((-preferences).tolist()), _least(ridge.scores.tolist())


def _figures(name: str, choices: Sequence[frozenset[int]], truth: _Truth) -> dict[str, float]:
    overlaps = [len(chosen & truth.best) / N_SKIPPED for chosen in choices]
    return {
        f"overlap_{name}": statistics.mean(overlaps),
        f"excess_loss_{name}": statistics.mean(truth.excess(chosen) for chosen in choices),
    }
