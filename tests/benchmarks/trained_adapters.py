"""What training adapters on the LLaVA example is worth: every kind with the same items, steps and recovery.

The metric is that of answers generated with the cache on items of the test split, drawn once for all; the epoch that is
kept is the best of the validation split. Rates of learning are tried for LoRA on the validation split, and every kind
gets LoRA's best. `traversal` and `phantom` are trained together with that LoRA and judged twice: as trained, and with
what was inserted removed again (the control), so that what only training gained is told apart. `preference` is that
LoRA trained to prefer right answers to wrong ones that the model finds likely as well.

Cells are kept as they are measured, beside the tables: `python -m tests.benchmarks.trained_adapters style lora lily`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.cutting import SEED, recovered, state_of
from tests.benchmarks.generative import CUT_TASKS
from tests.benchmarks.llava_cuts import Bench, opened_bench, places, scores_of
from vlmopt.core.contract import Context
from vlmopt.core.program import Program
from vlmopt.core.progress import Silent
from vlmopt.graph.adapters import adapter_parameters
from vlmopt.graph.assembled import DECODER
from vlmopt.recipe.schema import Recipe
from vlmopt.registry import make_pass
from vlmopt.rewrite.pipeline import run_step
from vlmopt.verify.statistics import paired_difference
from vlmopt.workflow.confusing import make_triples
from vlmopt.workflow.opening import OpenedTask, open_task

Step = dict[str, Any]

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
RATES = (3e-4, 1e-3, 3e-3)
EPOCHS, BATCH, N_ITEMS = 3, 8, 128
_DECODER = [f"{DECODER}/*layers*"]
_LILY: Step = {"kind": "lily", "rank": 32, "stride": 6, "experts": 4, "alpha": 2.0}


@dataclass(frozen=True)
class Kind:
    """Passes that insert what is trained; `removal` takes a part of it out again; `preference` weighs triples."""

    passes: tuple[Step, ...]
    removal: str = ""
    preference: float = 0.0


def _low_rank(options: Step) -> Step:
    return {"insert-low-rank-adapter": {**options, "modules": _DECODER}}


_LORA = _low_rank({"kind": "lora", "rank": 8})
KINDS: dict[str, Kind] = {
    "lora": Kind((_LORA,)),
    "lily": Kind((_low_rank(_LILY),)),
    "lily-routed": Kind((_low_rank({**_LILY, "mixture": "routed"}),)),
    "rasa": Kind((_low_rank({"kind": "rasa", "rank": 8}),)),
    "cross-modal": Kind(({"insert-cross-modal-adapter": {"rank": 64}},)),
    "traversal": Kind((_LORA, {"insert-traversal": {"n_layers": 4}}), removal="drop-traversal"),
    "phantom": Kind((_LORA, {"insert-phantom": {"eta": 0.01, "branches": [f"{DECODER}/*"]}}), removal="drop-phantom"),
    "preference": Kind((_LORA,), preference=1.0),
}
Cell = dict[str, Any]


def figures(task: str) -> dict[str, float]:
    """Mean and spread over seeds of every kind's metric, the drop with its interval for the first seed, parameters."""
    cells = cells_of(task, tuple(KINDS))
    rate = best_rate(cells)
    found = {f"trained_{task}_none_points": float(cells[0]["original"])}
    found |= {f"trained_{task}_n_test": float(cells[0]["n_test"]), f"trained_{task}_rate": rate}
    for kind in KINDS:
        own = [cell for cell in cells if (cell["kind"], cell["rate"]) == (kind, rate)]
        name = f"trained_{task}_{kind.replace('-', '_')}"
        found |= _over_seeds(name, [cell["points"] for cell in own])
        found |= {f"{name}_{key}": float(own[0][key]) for key in ("parameters", "drop_points", "low95", "high95")}
        if KINDS[kind].removal:
            found |= _over_seeds(f"{name}_removed", [cell["removed_points"] for cell in own])
    return found


def _over_seeds(name: str, points: Sequence[float]) -> dict[str, float]:
    return {f"{name}_points": statistics.mean(points), f"{name}_spread": statistics.pstdev(points)}


def best_rate(cells: Sequence[Cell]) -> float:
    """The rate of learning at which LoRA is best on the validation split."""
    tried = [cell for cell in cells if cell["kind"] == "lora" and cell["seed"] == SEEDS[0]]
    return float(max(tried, key=lambda cell: cell["validation_points"])["rate"])


def cells_of(task: str, kinds: Sequence[str]) -> list[Cell]:
    """The cells of these kinds and of LoRA's trials: measured before, or now."""
    path = RESULTS / f"trained-{task}.json"
    cells: list[Cell] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    with tempfile.TemporaryDirectory() as folder:
        training: _Training | None = None
        for cell in _missing(kinds, cells):
            training = training or _Training(opened_bench(task, Path(folder)), Path(folder))
            cells.append(training.measured(*cell))
            path.write_text(json.dumps(cells, indent=1), encoding="utf-8")
            print(task, cells[-1], flush=True)
    return cells


def _missing(kinds: Sequence[str], cells: Sequence[Cell]) -> Iterator[tuple[str, int, float]]:
    """What is to be measured: first LoRA's trials, whose best rate the rest has. `cells` grows meanwhile."""
    known = {(cell["kind"], cell["seed"], cell["rate"]) for cell in cells}
    yield from (trial for trial in (("lora", SEEDS[0], rate) for rate in RATES) if trial not in known)
    rate = best_rate(cells)
    known |= {("lora", SEEDS[0], rate) for rate in RATES}
    yield from (one for one in ((kind, seed, rate) for seed in SEEDS for kind in kinds) if one not in known)


class _Training:
    """Trains and judges one kind after another on one opened task."""

    def __init__(self, bench: Bench, folder: Path) -> None:
        self._bench, self._folder, self._count = bench, folder, 0
        self._triples: OpenedTask | None = None

    def measured(self, kind: str, seed: int, rate: float) -> Cell:
        bench, self._count, own = self._bench, self._count + 1, KINDS[kind]
        model, data = map(str, places(bench.task))
        recovery = {
            "level": "adapters", "epochs": EPOCHS, "learning_rate": rate, "batch_items": BATCH,
            "preference": own.preference, "precision": "bfloat16",
        }  # fmt: skip
        passes = list(own.passes)
        written = {"model": model, "task": data, "passes": passes, "num_samples": N_ITEMS, "seed": seed}
        recipe = Recipe.model_validate({**written, "recovery": recovery})
        bound = self._with_triples() if own.preference else bench.bound
        state = recovered(state_of(recipe, self._folder / str(self._count), bench.opened, bound), bench.original)
        trained = state.optimized
        scores = scores_of(trained, bench.test)
        found = paired_difference(bench.whole, scores, list(bench.test.item_groups), seed=SEED)
        assert state.tuned is not None
        cell: Cell = {
            "kind": kind,
            "seed": seed,
            "rate": rate,
            "validation_points": 100 * state.tuned.history[state.tuned.best].validation_score,
            "points": _points(scores),
            "drop_points": found.drop_points,
            "low95": found.interval95[0],
            "high95": found.interval95[1],
            "parameters": sum(weight.numel() for weight in adapter_parameters(trained).values()),
            "original": _points(bench.whole),
            "n_test": bench.test.n_items,
        }
        if own.removal:
            cell["removed_points"] = _points(scores_of(_without(trained, own.removal), bench.test))
        return cell

    def _with_triples(self) -> OpenedTask:
        """The same task with a wrong answer for each of the items that are trained on."""
        if self._triples is None:
            model, data = map(str, places(self._bench.task))
            folder = self._folder / "triples"
            make_triples(model, data, folder, num_samples=N_ITEMS, seed=SEED)
            self._triples = open_task(self._bench.opened, str(folder), seed=SEED, progress=Silent())
        return self._triples


def _points(scores: torch.Tensor) -> float:
    return 100 * float(scores.mean())


def _without(program: Program, removal: str) -> Program:
    return run_step(program, make_pass(removal, {}), Context(), step=1).program


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=CUT_TASKS)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}; all by default")
    arguments = parser.parse_args()
    cells_of(arguments.task, arguments.kinds or tuple(KINDS))
    sys.exit(0)
