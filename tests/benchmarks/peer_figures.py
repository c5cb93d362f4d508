"""From measured rows to figures: what every row has, and ours against the best of the peers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.benchmarks.peer_rows import ROWS

Record = dict[str, Any]  # what is known of a row, or `error`
TASKS = ("style", "meaning", "retrieval")
MAX_DROP = 1.0  # points
ASKED = (*(f"{task}_speedup_over_best_peer" for task in TASKS), "size_ratio")  # of results/device.json
KEPT = (
    "points",
    "drop_points",
    "low95",
    "high95",
    "bytes",
    "peak_bytes",
    "conversion_s",
    "macs",
    "departure",
    "n_test",
)


def latency_ms(record: Record) -> float:
    """On one thread, by the process's own clock, in the quietest round."""
    return float(min(record["cpu_ms_1"]))


def ours_of(records: Mapping[str, Record]) -> str | None:
    """The fastest row of ours within a point of the original; without one, the fastest."""
    return fastest(records, is_ours=True, most=MAX_DROP) or fastest(records, is_ours=True)


def fastest(records: Mapping[str, Record], *, is_ours: bool, most: float | None = None) -> str | None:
    names = [row.name for row in ROWS if row.is_ours == is_ours and "error" not in records.get(row.name, {"error": ""})]
    within = [name for name in names if most is None or records[name]["drop_points"] <= most]
    return min(within, key=lambda name: latency_ms(records[name]), default=None)


def as_figures(
    task: str, records: Mapping[str, Record], profiles: Mapping[str, Mapping[str, float]]
) -> dict[str, float | str]:
    """All that is known of a task by name; what a peer said that failed, and names, as texts."""
    found: dict[str, float | str] = {}
    for name, record in records.items():
        if "error" in record:
            found[f"{task}_{name}_error"] = record["error"]
            continue
        found |= {f"{task}_{name}_{key}": float(record[key]) for key in KEPT if key in record}
        found[f"{task}_{name}_made"] = record["date"]
        columns = {"ms": "cpu_ms_1", "wall_ms": "wall_ms_1", "ms_2_threads": "wall_ms_2"}
        for key, column in columns.items():
            found[f"{task}_{name}_{key}"] = min(record[column])
            found[f"{task}_{name}_{key}_spread"] = max(record[column]) - min(record[column])
    for name, kinds in profiles.items():
        found |= {f"{task}_{name}_share_{kind}": value for kind, value in kinds.items()}
    return found | _compared(task, records)


def _compared(task: str, records: Mapping[str, Record]) -> dict[str, float | str]:
    """Ours against the fastest peer within a point, and against the fastest of all."""
    ours, found = ours_of(records), dict[str, float | str]()
    for words, most in (("best_peer", MAX_DROP), ("fastest_peer", None)):
        peer = fastest(records, is_ours=False, most=most)
        if ours is not None and peer is not None:
            found[f"{task}_{words}"] = peer
            found[f"{task}_speedup_over_{words}"] = latency_ms(records[peer]) / latency_ms(records[ours])
    if ours is not None:
        found[f"{task}_ours"], found[f"{task}_drop_of_ours"] = ours, float(records[ours]["drop_points"])
        if "error" not in records.get("ort_fp32", {"error": ""}):
            found[f"{task}_size_ratio"] = records["ort_fp32"]["bytes"] / records[ours]["bytes"]
    if task == "style" and "style_size_ratio" in found:
        found["size_ratio"] = found["style_size_ratio"]
    return found
