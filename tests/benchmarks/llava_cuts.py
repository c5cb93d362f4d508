"""The LLaVA example under budgets of MACs: what our planner skips for a task, beside what else one would skip.

Each budget is a share of the program's MACs to be saved at least. `ours` is chosen by the task's profile and measured
on the validation split; `last` skips the last branches of the decoder, `cosine` those of the whole model that
change their stream least. Nothing is trained at the level `none`; at `adapters` skip adapters are,
for all methods alike, and the best epoch is that of the validation split.

The metric is that of answers generated with the cache, on the same items of the test split for all, drawn once. Speed
is that of the ONNX artifacts, which take turns.

Cells are kept as they are measured: `python -m tests.benchmarks.llava_cuts style ours:none last:none`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.benchmarks import towers
from tests.benchmarks.cutting import SEED, first_that_fit, kept_profile, recovered, state_of, steps_of
from tests.benchmarks.generative import CUT_TASKS
from vlmopt.core.contract import Context
from vlmopt.core.manifest import GenerationEntry
from vlmopt.core.program import Program
from vlmopt.core.progress import Silent
from vlmopt.graph.assembled import DECODER
from vlmopt.graph.costing import program_cost
from vlmopt.graph.joined import MODEL, joined
from vlmopt.planning.cuts import Candidate
from vlmopt.profiling.document import Profile
from vlmopt.profiling.estimator import no_checkpoint
from vlmopt.profiling.selection import make_estimator
from vlmopt.recipe.schema import Recipe
from vlmopt.registry import make_pass
from vlmopt.runtime import load
from vlmopt.runtime.generation import Decoding, Prompt
from vlmopt.tasks.binding import TaskWorkload
from vlmopt.verify.statistics import paired_difference
from vlmopt.workflow.answering import program_outputs
from vlmopt.workflow.opening import OpenedModel, OpenedTask, open_model, open_task
from vlmopt.workflow.optimizing import optimize, set_up
from vlmopt.workflow.searching import candidates_of, measured_planner

BUDGETS = (0.10, 0.20, 0.30)
METHODS = ("ours", "last", "cosine")
LEVELS: dict[str, dict[str, Any]] = {
    "none": {"level": "head"},
    "adapters": {"level": "adapters", "epochs": 3, "learning_rate": 1e-3, "batch_items": 8},
}
PLAN = [(method, "none") for method in METHODS] + [("ours", "adapters"), ("last", "adapters")]
N_PROFILED, N_PLANNED, N_TRAINED, N_TEST = 64, 64, 256, 300
N_NEW = 16  # tokens of a timed answer, whatever they say
REPEATS = 7


@dataclass(frozen=True)
class Bench:
    """A task of the example; `test` was drawn from its test split, and answers of the original are known."""

    task: str
    opened: OpenedModel
    bound: OpenedTask
    original: Program
    profile: Profile
    test: TaskWorkload
    whole: torch.Tensor


def figures(task: str, plan: Sequence[tuple[str, str]] = PLAN) -> dict[str, float]:
    """Drop and MACs saved of every cell, and what the artifacts of the untrained cuts need for an answer."""
    found: dict[str, float] = {}
    cells = [cell for cell in cells_of(task, plan) if (cell["method"], cell["level"]) in plan]
    for cell in cells:
        name = f"llava_{task}_{cell['method']}_{cell['level']}_{100 * cell['budget']:.0f}"
        found |= {f"{name}_{key}": cell[key] for key in ("drop_points", "low95", "high95", "macs_saved")}
    found[f"llava_{task}_original_points"], found[f"llava_{task}_n_test"] = cells[0]["original"], cells[0]["n_test"]
    return found | _speeds(task, [cell for cell in cells if cell["level"] == "none"])


def cells_of(task: str, plan: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """The cells that the plan of methods and levels names: measured before, or now."""
    path = towers.cache() / "benchmarks" / f"llava-{task}.json"
    cells: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    wanted = [(method, level, budget) for method, level in plan for budget in BUDGETS]
    missing = [key for key in wanted if key not in {(c["method"], c["level"], c["budget"]) for c in cells}]
    if missing:
        for cell in _measured(task, missing, cells):
            cells.append(cell)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(cells, indent=1), encoding="utf-8")
            print(task, {name: value for name, value in cell.items() if name != "cut"}, flush=True)
    return cells


def _measured(
    task: str, missing: Sequence[tuple[str, str, float]], cells: Sequence[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    cuts = {(cell["method"], cell["budget"]): cell["cut"] for cell in cells}
    with tempfile.TemporaryDirectory() as folder:
        bench = opened_bench(task, Path(folder))
        chooser = _Chooser(bench)
        for method, level, budget in missing:
            cut = cuts.get((method, budget)) or chooser.cut(method, budget)
            cuts[method, budget] = cut
            optimized = _recovered(bench, Path(folder) / f"{method}-{level}-{budget}", cut, level)
            found = paired_difference(
                bench.whole, scores_of(optimized, bench.test), list(bench.test.item_groups), seed=SEED
            )
            yield {
                "method": method,
                "level": level,
                "budget": budget,
                "n_cut": len(cut),
                "macs_saved": 1 - program_cost(optimized).macs / program_cost(bench.original).macs,
                "drop_points": found.drop_points,
                "low95": found.interval95[0],
                "high95": found.interval95[1],
                "original": 100 * float(bench.whole.mean()),
                "n_test": bench.test.n_items,
                "cut": cut,
            }


def places(task: str) -> tuple[Path, Path]:
    home = towers.cache() / "llava"
    return home / "model", home / "tasks" / task


def opened_bench(task: str, folder: Path) -> Bench:
    model, data = places(task)
    opened = open_model(str(model), device="cpu", dtype="float32", allow_pickle=False, progress=Silent())
    bound, apart = (open_task(opened, str(data), seed=SEED, progress=Silent()) for _ in range(2))
    state = state_of(Recipe(model=str(model), task=str(data), num_samples=N_TRAINED), folder / "set-up", opened, bound)
    with state.run:
        set_up(state)
    original, profiled = state.original, bound.source.workload(bound.program, "profile", limit=N_PROFILED)
    file = towers.cache() / "benchmarks" / f"llava-{task}.profile.json"
    profile = kept_profile(bound, original, profiled, file, folder, scoring="raw")
    test = _drawn(apart.source.open_test(original))
    return Bench(task, opened, bound, original, profile, test, scores_of(original, test))


def _drawn(test: Any) -> Any:
    """Some of the items, drawn once; all where they are few."""
    items = sorted(random.Random(SEED).sample(range(test.n_items), min(N_TEST, test.n_items)))
    return test.part(items)


def scores_of(program: Program, test: TaskWorkload) -> torch.Tensor:
    return test.item_scores(program_outputs(program, test, what=DECODER, progress=Silent()))


def _recovered(bench: Bench, folder: Path, cut: Sequence[str], level: str) -> Program:
    model, data = map(str, places(bench.task))
    steps = steps_of(cut, level)
    written = {"model": model, "task": data, "passes": steps, "recovery": LEVELS[level], "num_samples": N_TRAINED}
    state = state_of(Recipe.model_validate(written), folder, bench.opened, bench.bound)
    return recovered(state, bench.original).optimized


class _Chooser:
    """Names what every method cuts under a budget."""

    def __init__(self, bench: Bench) -> None:
        self._bench, plan = bench, make_pass("skip-branches", {}).plan(bench.original, Context())
        self.candidates = candidates_of(plan, bench.profile, bench.original)
        self._total = program_cost(bench.original).macs
        self._planner = measured_planner(
            bench.original, bench.bound, self.candidates, lambda _: {}, limit=N_PLANNED, seed=SEED, progress=Silent()
        )

    def cut(self, method: str, budget: float) -> list[str]:
        needs = {"macs": budget * self._total}
        by_name = {candidate.name: candidate.branches for candidate in self.candidates}
        if method == "ours":
            names: tuple[str, ...] = self._planner.choose(needs=needs).names
        else:
            names = first_that_fit(self._ranked(method), needs)
        return sorted(frozenset[str]().union(*(by_name[name] for name in names)))

    def _ranked(self, method: str) -> list[Candidate]:
        """The candidates, what goes first in front."""
        if method == "last":
            return sorted(self.candidates, key=lambda c: -c.position)
        bench = self._bench
        workload = bench.bound.source.workload(bench.bound.program, "profile", limit=N_PROFILED)
        estimator = make_estimator("block-influence", "raw", with_layers=False)
        view = joined(bench.original)
        scores = estimator.estimate(
            view.program, workload, progress=Silent(), checkpoint=no_checkpoint, seed=SEED
        ).scores
        found = {view.own_site(f"{MODEL}/{one.unit.name}"): one.mean for one in scores}
        return sorted(self.candidates, key=lambda c: found[c.name])


def _speeds(task: str, cells: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Milliseconds to the first token, tokens a second and bytes of cache a token, of the original and of every cut."""
    model, _ = places(task)
    with tempfile.TemporaryDirectory() as folder:
        found, answering = dict[str, float](), dict[str, _Timed]()
        cuts = {f"{c['method']}_{100 * c['budget']:.0f}": c["cut"] for c in cells}
        for name, cut in {"original": [], **cuts}.items():
            place = Path(folder) / name
            skipping: list[dict[str, Any]] = [{"skip-branches": {"branches": list(cut)}}] if cut else []
            passes = ["canonicalize", *skipping, "fold-constants"]
            report = optimize(Recipe.model_validate({"model": str(model), "passes": passes}), place)
            cost = report["result"]["cost"]["optimized"]
            found[f"llava_{task}_{name}_kv_bytes_per_token"] = float(cost["kv_cache_bytes_per_token"])
            answering[name] = _Timed(place)
        rows: dict[str, list[tuple[float, float]]] = {name: [] for name in answering}
        for _ in range(REPEATS):
            for name, timed in answering.items():
                rows[name].append(timed())
    for name, own in rows.items():
        found[f"llava_{task}_{name}_first_token_ms"] = 1000 * statistics.median(first for first, _ in own)
        found[f"llava_{task}_{name}_tokens_per_s"] = statistics.median(rate for _, rate in own)
    return found


class _Timed:
    """An artifact that answers a prompt with an image, over and over, its graphs loaded before."""

    def __init__(self, folder: Path) -> None:
        self._model = load(folder)
        self._model.warm_up()
        entry = self._model.manifest.generation
        assert entry is not None
        self._entry: GenerationEntry = entry.model_copy(update={"stop_tokens": ()})
        self()

    def __call__(self) -> tuple[float, float]:
        """Seconds to the first token and tokens a second of those behind it, preprocessing left out."""
        ids = (*range(10, 25), *([self._entry.image_token] * self._entry.image_tokens), *range(30, 45))
        vision = self._model.manifest.components["vision_encoder"].inputs[0]
        pixels = np.zeros([1, *(size for size in vision.shape[1:] if isinstance(size, int))], dtype=np.float32)
        prompt = Prompt(ids, {vision.name: pixels})
        graphs = self._model._session  # as `Model.answering` does: the timed answer must not end early
        decoding = Decoding(graphs, self._entry, [prompt], stop_tokens=frozenset(), max_new_tokens=N_NEW)
        for _ in decoding:
            pass
        rate = decoding.timing.tokens_per_s
        assert rate is not None
        return decoding.timing.first_token_s, rate


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=CUT_TASKS)
    parser.add_argument("cells", nargs="*", metavar="METHOD:LEVEL", help="all by default")
    arguments = parser.parse_args()
    pairs = [tuple(cell.split(":")) for cell in arguments.cells]
    cells_of(arguments.task, [(method, level) for method, level in pairs] or PLAN)
    sys.exit(0)
