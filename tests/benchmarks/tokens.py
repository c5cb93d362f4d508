"""Fewer tokens of an image in the LLaVA example: what every method of `prune-tokens` loses on a task, untrained.

The metric is that of answers generated with the cache, on the same items of the test split for all, drawn once. MACs
are those of one image and a prompt of the task's mean length, all components together. `select-positions` finds its
places on the profile split. Nothing is trained.

Cells are kept as they are measured; the task's are committed with `python -m tests.benchmarks.tokens style`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks import towers
from tests.benchmarks.cutting import SEED
from tests.benchmarks.generative import CUT_TASKS
from tests.benchmarks.llava_cuts import _drawn, places, scores_of
from vlmopt.core.contract import Context
from vlmopt.core.program import Program
from vlmopt.core.progress import Silent
from vlmopt.graph.image_tokens import prompt_macs
from vlmopt.registry import make_pass
from vlmopt.rewrite.pipeline import run_step
from vlmopt.verify.statistics import paired_difference
from vlmopt.workflow.opening import OpenedTask, open_model, open_task
from vlmopt.workflow.requested import requested_statistics

Cell = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
KEPT = (18, 9, 4)
METHODS = ("pool", "merge", "select-positions", "select-salient")
PLAN = [(method, "encoded") for method in METHODS] + [("pool", "projected"), ("merge", "projected")]
N_MEASURED = 64


def figures(task: str) -> dict[str, float]:
    """Drop with its interval, and MACs saved, of every cell that is committed."""
    cells = json.loads((RESULTS / f"tokens-{task}.json").read_text(encoding="utf-8"))
    found: dict[str, float] = {}
    for cell in cells:
        name = f"tokens_{task}_{cell['method'].replace('-', '_')}_{cell['place']}_{cell['keep']}"
        found |= {f"{name}_{key}": cell[key] for key in ("drop_points", "low95", "high95", "macs_saved")}
    return found | {f"tokens_{task}_{key}": float(cells[0][key]) for key in ("original", "n_test")}


def cells_of(task: str, plan: Sequence[tuple[str, str]]) -> list[Cell]:
    """The cells of these methods and places: measured before, or now."""
    kept = towers.cache() / "benchmarks" / f"tokens-{task}.json"
    cells: list[Cell] = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else []
    known = {(cell["method"], cell["place"], cell["keep"]) for cell in cells}
    missing = [one for one in ((*pair, keep) for keep in KEPT for pair in plan) if one not in known]
    kept.parent.mkdir(parents=True, exist_ok=True)
    for cell in _measured(task, missing) if missing else ():
        cells.append(cell)
        kept.write_text(json.dumps(cells, indent=1), encoding="utf-8")
        print(task, cell, flush=True)
    return cells


def _measured(task: str, missing: Sequence[tuple[str, str, int]]) -> Iterator[Cell]:
    model, data = map(str, places(task))
    opened = open_model(model, device="cpu", dtype="float32", allow_pickle=False, progress=Silent())
    bound, apart = (open_task(opened, data, seed=SEED, progress=Silent()) for _ in range(2))
    original = run_step(bound.program, make_pass("canonicalize", {}), Context(), step=1).program
    test = _drawn(apart.source.open_test(original))
    whole = _kept_scores(task, original, test)
    words = [len(prompt.token_ids) for prompt in test.prompts]
    n_words = round(sum(words) / len(words)) - original.generation.image_tokens
    for method, place, keep in missing:
        pruned = _pruned(bound, original, method, place, keep)
        scores = scores_of(pruned, _drawn(apart.source.open_test(pruned)))
        found = paired_difference(whole, scores, list(test.item_groups), seed=SEED)
        yield {
            "method": method,
            "place": place,
            "keep": keep,
            "macs_saved": 1 - prompt_macs(pruned, n_words=n_words) / prompt_macs(original, n_words=n_words),
            "drop_points": found.drop_points,
            "low95": found.interval95[0],
            "high95": found.interval95[1],
            "original": 100 * float(whole.mean()),
            "n_words": n_words,
            "n_test": test.n_items,
        }


def _kept_scores(task: str, original: Program, test: Any) -> torch.Tensor:
    """Scores of the original, measured once."""
    file = towers.cache() / "benchmarks" / f"tokens-{task}-{test.fingerprint[:12]}-{test.n_items}.pt"
    if not file.is_file():
        torch.save(scores_of(original, test), file)
    scores: torch.Tensor = torch.load(file, weights_only=True)
    return scores


def _pruned(bound: OpenedTask, original: Program, method: str, place: str, keep: int) -> Program:
    pass_ = make_pass("prune-tokens", {"method": method, "place": place, "keep": keep})
    known = requested_statistics(pass_, original, bound, Silent(), step=1, num_samples=N_MEASURED)
    done = run_step(original, pass_, Context(statistics=known, seed=SEED), step=1)
    assert done.applied, done.refusals
    return done.program


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=CUT_TASKS)
    parser.add_argument("cells", nargs="*", metavar="METHOD:PLACE", help="all by default")
    arguments = parser.parse_args()
    pairs = [(method, place or "encoded") for method, _, place in (cell.partition(":") for cell in arguments.cells)]
    made = cells_of(arguments.task, pairs or PLAN)
    (RESULTS / f"tokens-{arguments.task}.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    sys.exit(0)
