"""Fewer tokens of an image in the LLaVA example: what every method of `prune-tokens` loses on a task, untrained.

The metric is that of answers generated with the cache, on the same items of the test split for all, drawn once. MACs
are those of one image and a prompt of the task's mean length, all components together. `select-positions` finds its
places on the profile split. Nothing is trained.

Cells are kept as they are measured; the task's are committed with `python -m tests.benchmarks.tokens style`.
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

import numpy as np
import torch

from tests.benchmarks import towers
from tests.benchmarks.cutting import SEED
from tests.benchmarks.generative import CUT_TASKS
from tests.benchmarks.llava_cuts import _drawn, places, scores_of
from vlmopt.core.contract import Context
from vlmopt.core.program import Program
from vlmopt.core.progress import Silent
from vlmopt.emit import emit_program
from vlmopt.emit.manifest import component_entry, dim_entry, generation_entry
from vlmopt.graph.costing import program_cost
from vlmopt.graph.image_tokens import prompt_macs
from vlmopt.registry import make_pass
from vlmopt.rewrite.pipeline import run_step
from vlmopt.runtime.generation import Decoding, Prompt
from vlmopt.runtime.session import Session, open_session
from vlmopt.verify.statistics import paired_difference
from vlmopt.workflow.opening import OpenedTask, open_model, open_task
from vlmopt.workflow.requested import requested_statistics

Cell = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
KEPT = (18, 9, 4)
METHODS = ("pool", "merge", "select-positions", "select-salient")
PLAN = [(method, "encoded") for method in METHODS] + [("pool", "projected"), ("merge", "projected")]
N_MEASURED = 64
N_WORDS, N_NEW, REPEATS = 30, 16, 7


def figures(task: str) -> dict[str, float]:
    """What is committed: drop with its interval and MACs saved of every cell, and the speed of some."""
    known = json.loads((RESULTS / f"tokens-{task}.json").read_text(encoding="utf-8"))
    found: dict[str, float] = {}
    for cell in known["cells"]:
        name = f"tokens_{task}_{cell['method'].replace('-', '_')}_{cell['place']}_{cell['keep']}"
        found |= {f"{name}_{key}": cell[key] for key in ("drop_points", "low95", "high95", "macs_saved")}
    first = known["cells"][0]
    return found | known["speed"] | {f"tokens_{task}_{key}": float(first[key]) for key in ("original", "n_test")}


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


def speeds(task: str) -> dict[str, float]:
    """Milliseconds to the first token, tokens a second and bytes of the cache behind a prompt of 30 words and an image,
    of the original and of what merging leaves, in ONNX Runtime on one thread; they take turns."""
    model, _ = map(str, places(task))
    opened = open_model(model, device="cpu", dtype="float32", allow_pickle=False, progress=Silent())
    original = run_step(opened.program, make_pass("canonicalize", {}), Context(), step=1).program
    programs = {"36": original}
    for keep in KEPT:
        pass_ = make_pass("prune-tokens", {"method": "merge", "keep": keep})
        programs[str(keep)] = run_step(original, pass_, Context(), step=1).program
    found, rows = dict[str, float](), dict[str, list[tuple[float, float]]]()
    with tempfile.TemporaryDirectory() as folder:
        timed = {name: _Timed(program, Path(folder) / name) for name, program in programs.items()}
        for _ in range(REPEATS):
            for name, one in timed.items():
                rows.setdefault(name, []).append(one())
    bytes_a_token = program_cost(original).kv_cache_bytes_per_token
    for name, own in rows.items():
        found[f"tokens_{task}_{name}_first_token_ms"] = 1000 * statistics.median(first for first, _ in own)
        found[f"tokens_{task}_{name}_tokens_per_s"] = statistics.median(rate for _, rate in own)
        found[f"tokens_{task}_{name}_kv_bytes"] = float(bytes_a_token * (N_WORDS + int(name)))
    return found


class _Timed:
    """A program as ONNX files that answers a prompt with an image, over and over."""

    def __init__(self, program: Program, folder: Path) -> None:
        folder.mkdir()
        files = emit_program(program, ("onnx",), folder, progress=Silent())
        entry = generation_entry(program)
        assert entry is not None
        self._entry = entry.model_copy(update={"stop_tokens": ()})
        self._sessions = {
            name: Session(
                name,
                component_entry(part, files[name]),
                {key: dim_entry(dim) for key, dim in program.dims.items()},
                open_session(folder / files[name]["onnx"], threads=1),
            )
            for name, part in program.components.items()
        }
        self()

    def __call__(self) -> tuple[float, float]:
        """Seconds to the first token and tokens a second of those behind it."""
        ids = (*range(10, 25), *([self._entry.image_token] * self._entry.image_tokens), *range(30, 45))
        prompt = Prompt(ids, {"pixel_values": np.zeros([1, 3, 84, 84], dtype=np.float32)})
        decoding = Decoding(
            self._sessions.__getitem__, self._entry, [prompt], stop_tokens=frozenset(), max_new_tokens=N_NEW
        )
        for _ in decoding:
            pass
        rate = decoding.timing.tokens_per_s
        assert rate is not None
        return decoding.timing.first_token_s, rate


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=CUT_TASKS)
    parser.add_argument("cells", nargs="*", metavar="METHOD:PLACE", help="all by default")
    parser.add_argument("--speed", action="store_true", help="measure speed alone, and keep the cells")
    arguments = parser.parse_args()
    pairs = [(method, place or "encoded") for method, _, place in (cell.partition(":") for cell in arguments.cells)]
    file = RESULTS / f"tokens-{arguments.task}.json"
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"cells": [], "speed": {}}
    if arguments.speed:
        content["speed"] = speeds(arguments.task)
    else:
        content["cells"] = cells_of(arguments.task, pairs or PLAN)
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    sys.exit(0)
