"""Ours beside its peers: the image tower of the real dual encoder at 112 pixels, batch 1, for three tasks.

Every row is a file in a runtime. Metric: all rows answer the same test pictures one by one (ranges of dynamic int8 are
those of a batch), read by the task's own metric; drops are paired. Rows that compute the original's function are
compared with it on some pictures instead, and have its metric. Latency: rows take turns in rounds; a figure is the
median of the quietest round, the spread is that of the medians over the rounds. On one thread the clock is that of the
process, which stands still while another program has the core; the wall's is beside it, and stands alone on two
threads. Memory is that of a fresh process.

`TASK`: everything of one task. What was made and answered is kept under a digest of model and data, so a second run
only measures; `python -m tests.benchmarks.peers TASK` makes it and stops there, with `--samples 64` in short, with
`--rows` in parts. `python -m tests.benchmarks peers --kept` measures what is made already and leaves out the rest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.benchmarks import towers
from tests.benchmarks.cutting import SEED
from tests.benchmarks.frame import is_prepared
from tests.benchmarks.peer_figures import MAX_DROP, TASKS, Record, as_figures, fastest, ours_of
from tests.benchmarks.peer_ours import artifact, macs_of, pruned
from tests.benchmarks.peer_rows import ROWS, Row, RowError, Workers, called, converted, last_line, size_bytes
from tests.benchmarks.peer_towers import (
    TOLERANCE,
    TOWER,
    Given,
    arrays,
    given,
    link_or_copy,
    original_outputs,
    write_plain,
)
from vlmopt.core.errors import VlmoptError
from vlmopt.core.program import Program
from vlmopt.core.progress import Silent
from vlmopt.graph.costing import program_cost
from vlmopt.tasks.binding import TaskWorkload
from vlmopt.verify.parity import OPENERS, difference
from vlmopt.verify.statistics import paired_difference
from vlmopt.workflow.answering import program_outputs

THREADS, ROUNDS, SECONDS = (1, 2), 6, 0.4  # seconds of calls a turn
FEW_ROUNDS = 2  # of a quick trial
NAMES = tuple(row.name for row in ROWS)
N_COMPARED = 64  # pictures on which rows of the original's function are compared with it


def parts(*, is_kept: bool = False) -> Mapping[str, Callable[[], dict[str, float | str]]]:
    """What can be measured on its own; with `is_kept` only of what is made already."""
    return {task: partial(figures, task, is_kept=is_kept) for task in TASKS}


def figures(
    task: str, *, n_samples: int | None = None, rounds: int = ROUNDS, is_kept: bool = False
) -> dict[str, float | str]:
    """Everything about a task: made where it is not kept, and measured; nothing where the example cannot be fetched."""
    if not is_prepared():
        return {}
    one = given(task, n_samples=n_samples)
    folder = folder_of(one)
    records = records_of(one, folder, wanted=() if is_kept else NAMES)
    if not records:
        return {}
    rows = [row for row in ROWS if "error" not in records.get(row.name, {"error": ""})]
    records = {name: dict(record) for name, record in records.items()}
    for row in rows:
        try:
            records[row.name]["peak_bytes"] = called("memory", row, folder, folder / "sample.npy")["peak_bytes"]
        except RowError as error:
            records[row.name]["error"] = str(error)
    rows = [row for row in rows if "error" not in records[row.name]]
    for name, found in timed(rows, folder, rounds).items():
        records[name] |= found
    return as_figures(task, records, shares(records, folder))


def folder_of(one: Given) -> Path:
    """Where a task's files and what they answered are kept."""
    digest = hashlib.sha256(json.dumps(one.key).encode()).hexdigest()[:12]
    folder = towers.cache() / "benchmarks" / "peers" / f"{one.task}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def records_of(one: Given, folder: Path, wanted: Collection[str] = NAMES) -> dict[str, Record]:
    """Of rows that are kept or wanted: what the file is and what it answers, or why there is none; kept as made."""
    file = folder / "rows.json"
    records: dict[str, Record] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    missing = [row for row in ROWS if row.name in wanted and row.name not in records]
    if not missing:
        return records
    if not (folder / "sample.npy").is_file():
        write_plain(one, folder)
    with arrays(one, folder) as test:
        for row in missing:
            records[row.name] = _record(one, row, records, folder, test)
            file.write_text(json.dumps(records, indent=1), encoding="utf-8")
            print(one.task, row.name, records[row.name], flush=True)
    return records


def _record(one: Given, row: Row, records: Mapping[str, Record], folder: Path, test: TaskWorkload) -> Record:
    """A row: seconds of its conversion, bytes, and what it loses; or `error`."""
    try:
        found = _made(one, row, records, folder, test)
        answered = original_outputs(one, test, folder)
        if row.is_same:
            found["departure"] = _departure(row, folder, answered[TOWER])
            scores = test.item_scores(answered)
        else:
            target = folder / "answers.npy"
            called("outputs", row, folder, folder / "test.npy", target)
            texts = torch.load(folder / f"{row.name}.pt", weights_only=True) if found.pop("has_texts", False) else {}
            scores = test.item_scores({**answered, **texts, TOWER: torch.from_numpy(np.load(target))})
    except (RowError, VlmoptError) as error:
        return {"error": last_line(str(error)), "date": _now()}
    lost = paired_difference(test.item_scores(answered), scores, list(test.item_groups), seed=SEED)
    return found | {
        "bytes": size_bytes(row, folder),
        "points": 100 * float(scores.mean()),
        "drop_points": lost.drop_points,
        "low95": lost.interval95[0],
        "high95": lost.interval95[1],
        "n_test": test.n_items,
        "date": _now(),
    }


def _departure(row: Row, folder: Path, wanted: Tensor) -> float:
    """How far a row of the original's function is from it, over the largest output.

    Raises:
        RowError: too far.
    """
    some, target = folder / "some.npy", folder / "answers.npy"
    np.save(some, np.load(folder / "test.npy", mmap_mode="r")[:N_COMPARED])
    called("outputs", row, folder, some, target)
    found = difference(torch.from_numpy(np.load(target)), wanted[:N_COMPARED])
    if found > TOLERANCE:
        raise RowError(f"differs from the original by {found:.2g} of the largest output")
    return found


def _made(one: Given, row: Row, records: Mapping[str, Record], folder: Path, test: TaskWorkload) -> Record:
    """Makes the row's file; what is known of it then."""
    if row.is_ours:
        out, seconds = artifact(row.name, one)
        link_or_copy(out / f"{TOWER}.onnx", folder / row.file)
        return {"conversion_s": seconds, "macs": macs_of(out), "has_texts": _keep_texts(row, out, folder, test)}
    if row.made == "pruned":
        wanted = records.get("ours", {}).get("macs")
        if wanted is None:
            raise RowError("there are no MACs of ours to cut to")
        program, seconds = pruned(one, wanted, folder / row.file)
        _keep_program_texts(row, program, folder, test)
        return {"conversion_s": seconds, "macs": program_cost(program).macs, "has_texts": len(test.feeds) > 1}
    known = next((o for o in ROWS if o.file == row.file and o.name in records), None)
    before = next((o for o in ROWS if o.file == row.behind), None)
    if before is not None and "error" in records.get(before.name, {"error": "is not made yet"}):
        raise RowError(f"{before.title}: {records.get(before.name, {'error': 'is not made yet'})['error']}")
    seconds = 0.0
    if known is not None and (folder / row.file).is_file():
        seconds = records[known.name]["conversion_s"]
    elif row.made:
        seconds = converted(row, folder) + (records[before.name]["conversion_s"] if before is not None else 0.0)
    found: Record = {"conversion_s": seconds}
    if before is not None and before.made == "pruned":
        link_or_copy(folder / f"{before.name}.pt", folder / f"{row.name}.pt")
        found |= {"macs": records[before.name]["macs"], "has_texts": len(test.feeds) > 1}
    return found


def _keep_texts(row: Row, out: Path, folder: Path, test: TaskWorkload) -> bool:
    """What the artifact's other graphs answer, where the task reads them."""
    others = [name for name in test.feeds if name != TOWER]
    runs = {name: OPENERS["onnx"](out / f"{name}.onnx") for name in others}
    answers = {name: torch.cat([run(feed)[0] for feed in test.feeds[name]]) for name, run in runs.items()}
    torch.save(answers, folder / f"{row.name}.pt")
    return bool(others)


def _keep_program_texts(row: Row, program: Program, folder: Path, test: TaskWorkload) -> None:
    others = {name: part for name, part in program.components.items() if name != TOWER}
    answers = program_outputs(program.with_components(others), test, what="", progress=Silent()) if others else {}
    torch.save(answers, folder / f"{row.name}.pt")


def timed(rows: list[Row], folder: Path, rounds: int) -> dict[str, Record]:
    """Milliseconds by row: medians of every round, by threads and clock; a row that fails has `error`."""
    found: dict[str, Record] = {row.name: {} for row in rows}
    workers = Workers()
    try:
        for threads in THREADS:
            for _ in range(rounds):
                for row in rows:
                    if "error" in found[row.name]:
                        continue
                    try:
                        turn = workers.time(row, folder, threads=threads, seconds=SECONDS)
                    except RowError as error:
                        found[row.name]["error"] = str(error)
                        continue
                    for clock in ("wall_ms", "cpu_ms"):
                        found[row.name].setdefault(f"{clock}_{threads}", []).append(turn[clock])
    finally:
        workers.close()
    return found


def shares(records: Mapping[str, Record], folder: Path) -> dict[str, dict[str, float]]:
    """Percent of the time by type of operation, by the runtime's profiler: of ours and of the best peer."""
    found = {}
    for name in (ours_of(records), fastest(records, is_ours=False, most=MAX_DROP)):
        row = next((row for row in ROWS if row.name == name), None)
        if row is not None and row.runtime in ("onnxruntime", "openvino"):
            us = called("operations", row, folder, folder / "sample.npy")["us"]
            found[row.name] = {kind: 100 * value / sum(us.values()) for kind, value in us.items()}
    return found


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="minutes")


if __name__ == "__main__":
    os.environ["VLMOPT_CACHE"] = "off"  # a conversion is timed with its capture
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--samples", type=int, help="of every split, for a quick trial that is kept apart")
    parser.add_argument("--rows", nargs="+", choices=NAMES, default=NAMES, metavar="ROW", help="make these only")
    parser.add_argument("--measure", action="store_true", help="measure as well, and print; nothing is committed")
    options = parser.parse_args()
    if options.measure:
        print(
            json.dumps(
                figures(options.task, n_samples=options.samples, rounds=ROUNDS if options.samples is None else 2),
                indent=1,
            )
        )
    else:
        chosen = given(options.task, n_samples=options.samples)
        records_of(chosen, folder_of(chosen), options.rows)
    sys.exit(0)
