"""What training adapters on the LLaVA example is worth: every kind with the same items, steps and recovery.

The metric is that of answers generated with the cache on items of the test split, drawn once for all; the epoch that is
kept is the best of the validation split. `none` trains nothing. Rates of learning are tried for LoRA on the validation
split, and every kind gets LoRA's best.

Cells are kept as they are measured: `python -m tests.benchmarks.trained_adapters style lora lily`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks import towers
from tests.benchmarks.cutting import SEED, recovered, state_of
from tests.benchmarks.generative import CUT_TASKS
from tests.benchmarks.llava_cuts import N_TRAINED, Bench, opened_bench, places, scores_of
from vlmopt.graph.adapters import adapter_parameters
from vlmopt.graph.assembled import DECODER
from vlmopt.recipe.schema import Recipe
from vlmopt.verify.statistics import paired_difference

Step = dict[str, Any]

SEEDS = (0, 1, 2)
RATES = (3e-4, 1e-3, 3e-3)
EPOCHS, BATCH = 3, 8
_DECODER = [f"{DECODER}/*layers*"]
_LILY: Step = {"kind": "lily", "rank": 32, "stride": 6, "experts": 4, "alpha": 2.0}
LOW_RANK: dict[str, Step] = {
    "lora": {"kind": "lora", "rank": 8},
    "lily": _LILY,
    "lily-routed": {**_LILY, "mixture": "routed"},
    "rasa": {"kind": "rasa", "rank": 8},
}
KINDS: dict[str, Step] = {
    name: {"insert-low-rank-adapter": {**options, "modules": _DECODER}} for name, options in LOW_RANK.items()
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
        points, name = [cell["points"] for cell in own], f"trained_{task}_{kind.replace('-', '_')}"
        found |= {f"{name}_points": statistics.mean(points), f"{name}_spread": statistics.pstdev(points)}
        found |= {f"{name}_{key}": float(own[0][key]) for key in ("parameters", "drop_points", "low95", "high95")}
    return found


def best_rate(cells: Sequence[Cell]) -> float:
    """The rate of learning at which LoRA is best on the validation split."""
    tried = [cell for cell in cells if cell["kind"] == "lora" and cell["seed"] == SEEDS[0]]
    return float(max(tried, key=lambda cell: cell["validation_points"])["rate"])


def cells_of(task: str, kinds: Sequence[str]) -> list[Cell]:
    """The cells of these kinds and of LoRA's trials: measured before, or now."""
    path = towers.cache() / "benchmarks" / f"trained-{task}.json"
    cells: list[Cell] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    with tempfile.TemporaryDirectory() as folder:
        training: _Training | None = None
        for cell in _missing(kinds, cells):
            training = training or _Training(opened_bench(task, Path(folder)), Path(folder))
            cells.append(training.measured(*cell))
            path.parent.mkdir(parents=True, exist_ok=True)
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

    def measured(self, kind: str, seed: int, rate: float) -> Cell:
        bench, self._count = self._bench, self._count + 1
        model, data = map(str, places(bench.task))
        recipe = Recipe.model_validate(
            {
                "model": model, "task": data, "passes": [KINDS[kind]], "num_samples": N_TRAINED, "seed": seed,
                "recovery": {"level": "adapters", "epochs": EPOCHS, "learning_rate": rate, "batch_items": BATCH},
            }
        )  # fmt: skip
        state = recovered(state_of(recipe, self._folder / str(self._count), bench.opened, bench.bound), bench.original)
        trained = state.optimized
        scores = scores_of(trained, bench.test)
        found = paired_difference(bench.whole, scores, list(bench.test.item_groups), seed=SEED)
        assert state.tuned is not None
        cell: Cell = {
            "kind": kind,
            "seed": seed,
            "rate": rate,
            "validation_points": 100 * state.tuned.history[state.tuned.best].validation_score,
            "points": 100 * float(scores.mean()),
            "drop_points": found.drop_points,
            "low95": found.interval95[0],
            "high95": found.interval95[1],
            "parameters": sum(weight.numel() for weight in adapter_parameters(trained).values()),
            "original": 100 * float(bench.whole.mean()),
            "n_test": bench.test.n_items,
        }
        return cell


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=CUT_TASKS)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}; all by default")
    arguments = parser.parse_args()
    cells_of(arguments.task, arguments.kinds or tuple(KINDS))
    sys.exit(0)
