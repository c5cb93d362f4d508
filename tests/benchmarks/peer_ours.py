"""Rows of ours in the comparison with peers: runs of `vlmopt optimize` that are kept, and Torch-Pruning at their MACs.

The cut of a task is chosen by the planner on the validation split. For `style` the head is fitted behind it; the others
train all kept weights, since there a cut without training loses more than a point (`results/pcetl.json`). Where no cut
of the first budget is within a point after training, the next one is tried; the test split decides nothing.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks import towers
from tests.benchmarks.cutting import SEED, state_of
from tests.benchmarks.peer_rows import RowError
from tests.benchmarks.peer_towers import TOWER, Given
from tests.benchmarks.width import by_magnitude, n_kept, with_widths
from vlmopt import workflow
from vlmopt.core.contract import Context
from vlmopt.core.errors import VlmoptError
from vlmopt.core.program import Program
from vlmopt.core.progress import Silent
from vlmopt.emit import emit_program
from vlmopt.graph.costing import program_cost
from vlmopt.graph.narrowing import shape_only
from vlmopt.recipe import QUANTIZATIONS, Recipe, load_recipe, with_quantization
from vlmopt.recipe.schema import EXACT_PASSES, SHORTENING_PASSES
from vlmopt.recipe.together import with_one_plan
from vlmopt.registry import make_pass
from vlmopt.rewrite.pipeline import run_step
from vlmopt.rundir import RECIPE
from vlmopt.tuning.closed_form import recover_heads
from vlmopt.workflow.optimizing import set_up
from vlmopt.workflow.recovering import tuned

MAX_DROP = 1.0  # points
BUDGETS: Mapping[str, Sequence[str | None]] = {  # of MACs, the hardest first
    "style": (None,),
    "meaning": ("0.45x", "0.55x", "0.7x"),
    "retrieval": ("0.6x", "0.7x"),
}
PLANNED: Mapping[str, Sequence[str | None]] = {  # of latency, for one plan over everything
    "style": (None,),
    "meaning": ("0.2x", "0.27x"),
    "retrieval": ("0.27x", "0.35x"),
}
RECOVERY: Mapping[str, dict[str, Any]] = {
    "style": {"level": "head"},
    "meaning": {**towers.LEVELS["weights"], "headroom": 12.0},
    "retrieval": {**towers.OWN_LEVELS["retrieval"]["weights"], "headroom": 40.0},
}
CUTTING = ("canonicalize", "skip-branches", *SHORTENING_PASSES, "fold-constants")
SCALING = [step.name for step in QUANTIZATIONS["int8"][0] if step.name != "quantize-int8"]
ROUNDING = frozenset(step.name for step in QUANTIZATIONS["int8"][0])
FEWEST_HALVINGS = 12


def recipes_of(row: str, one: Given) -> list[Recipe]:
    """What is tried for a row, in order.

    For the cut alone that is what `ours` chose without what rounds it, and for int8 alone every layer, so that neither
    searches.
    """
    if row == "ours_skip":
        chosen = load_recipe(artifact("ours", one)[0] / RECIPE)
        return [
            chosen.model_copy(update={"passes": tuple(step for step in chosen.passes if step.name not in ROUNDING)})
        ]
    base = {
        "model": str(one.opened.folder),
        "task": str(one.bound.task.path),
        "profile": {"num_samples": towers.N_PROFILED},
        "verify": {"max_drop_gate": False},  # what is lost is a figure here
    }
    if row == "ours_int8":
        every = {"quantize-int8": {"modules": [f"{TOWER}/*"]}}
        return [Recipe.model_validate({**base, "passes": ["canonicalize", *SCALING, every, "fold-constants"]})]
    resource, limits = ("latency", PLANNED) if row == "ours_plan" else ("macs", BUDGETS)
    found = [
        Recipe.model_validate(
            {
                **base,
                "passes": CUTTING,
                "budgets": {"max_drop": MAX_DROP, resource: limit},
                "recovery": recovery_of(one),
            }
        )
        for limit in limits[one.task]
    ]
    return [with_one_plan(each) if row == "ours_plan" else with_quantization(each, "int8") for each in found]


def recovery_of(one: Given) -> dict[str, Any]:
    """The recovery section of a task's recipes."""
    return RECOVERY[one.task] | ({"epochs": 1} if one.is_short else {})


def artifact(row: str, one: Given) -> tuple[Path, float]:
    """The folder of a row of ours and the seconds of its run, the tries before it included; kept between runs.

    Raises:
        RowError: no recipe gives one.
    """
    recipes = recipes_of(row, one)
    text = json.dumps([*one.key, *(each.as_dict() for each in recipes)], sort_keys=True)
    kept = (
        towers.cache() / "benchmarks" / "peers" / f"{one.task}-{row}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    )
    seconds = kept / "seconds.json"
    if not seconds.is_file():
        kept.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        _first_that_holds(recipes, kept / "out")
        seconds.write_text(json.dumps(time.perf_counter() - start), encoding="utf-8")
    return kept / "out", float(json.loads(seconds.read_text(encoding="utf-8")))


def _first_that_holds(recipes: Sequence[Recipe], out: Path) -> None:
    said = ""
    for recipe in recipes:
        try:
            workflow.optimize(recipe, out, force=True)
            return
        except VlmoptError as error:
            said = str(error)
    raise RowError(said)


def report_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return found


def macs_of(folder: Path) -> int:
    """Of the whole artifact, one sample."""
    return int(report_of(folder)["result"]["cost"]["optimized"]["macs"])


def pruned(one: Given, macs: int, file: Path) -> tuple[Program, float]:
    """The original cut to so many MACs by magnitudes and recovered as ours is, as an ONNX file; and the seconds."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        recipe = {"model": str(one.opened.folder), "task": str(one.bound.task.path)}
        loaded = Recipe.model_validate({**recipe, "recovery": recovery_of(one)})
        state = state_of(loaded, Path(folder) / "run", one.opened, one.bound)
        with state.run:
            set_up(state)
            state.reference = state.original = _exact(state.original)
            program = by_magnitude(state.original, share_at(state.original, macs))
            assert state.fit is not None
            parts, reference = frozenset(program.components), state.outputs_of(state.original, state.fit)
            program = recover_heads(program, state.fit, reference, components=parts, progress=Silent(), seed=SEED)
            program = tuned(state, program) if loaded.recovery.trains else program
        graphs = Path(folder) / "graphs"
        graphs.mkdir()
        files = emit_program(program, ("onnx",), graphs, progress=Silent())
        shutil.copy(graphs / files[TOWER]["onnx"], file)
    return program, time.perf_counter() - start


def _exact(program: Program) -> Program:
    for step, name in enumerate(EXACT_PASSES, 1):
        program = run_step(program, make_pass(name, {}), Context(), step=step).program
    return program


def share_at(program: Program, macs: int) -> float:
    """The largest share of every width that takes no more MACs, by halving; the smallest there is where all do."""
    low, high = 0.0, 1.0
    for _ in range(FEWEST_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _macs_at(program, middle) <= macs else (low, middle)
    return low


def _macs_at(program: Program, share: float) -> int:
    """What a share would take: the first units of every group, no weights."""
    made = with_widths(program, lambda _, group: list(range(n_kept(share, group))), taking=shape_only)
    return program_cost(made).macs
