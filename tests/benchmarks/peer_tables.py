"""The comparison with peers as Markdown, and what of it `results/device.json` is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tests.benchmarks.peer_figures import ASKED, TASKS
from tests.benchmarks.peer_rows import PINNED, ROWS

Figures = Mapping[str, float]
Notes = Mapping[str, str]
COLUMNS = (
    *("row", "metric, %", "points lost (95 % interval)", "1 thread, ms (spread)", "wall, ms", "2 threads, ms (spread)"),
    *("MB", "peak, MB", "made in, s", "made"),
)
AIMS = {"style": 4.0, "meaning": 1.8, "retrieval": 1.5}  # times faster than the best peer
SMALLER = 4.0  # times smaller than fp32
N_OPERATIONS = 8


def as_table(result: Mapping[str, Any]) -> str:
    """What was reached, every row of every task, where the time goes, and when and where it was measured."""
    figures, notes = result["figures"], result.get("notes", {})
    lines = ["| what | reached | aim |", "|---|---:|---:|", *_reached(figures, notes), ""]
    for task in TASKS:
        rows = list(_rows(task, figures, notes))
        if rows:
            n_test = int(max(value for name, value in figures.items() if name.startswith(task) and "n_test" in name))
            lines += [f"`{task}`, {n_test} test items:", "", f"| {' | '.join(COLUMNS)} |"]
            lines += ["|---|" + "---:|" * (len(COLUMNS) - 1), *rows, "", *_operations(task, figures)]
    lines += [f"Measured by `{result['command']}` with {_versions(result)}:", ""]
    lines += [f"- `{part}`: {place}" for part, place in result["measured"].items()]
    return "\n".join([*lines, ""])


def _versions(result: Mapping[str, Any]) -> str:
    own = [f"{name} {version}" for name, version in result["versions"].items()]
    return ", ".join([*own, *(text.replace("==", " ") for text in PINNED)])


def _reached(figures: Figures, notes: Notes) -> Iterator[str]:
    for task, aim in AIMS.items():
        if f"{task}_speedup_over_best_peer" not in figures:
            continue
        lost = f"{figures[f'{task}_drop_of_ours']:.1f} points lost"
        for words, wanted in (("best", f"at least {aim:g}"), ("fastest", "")):
            peer = _title(notes[f"{task}_{words}_peer"])
            which = f"the best peer within a point, {peer}" if words == "best" else f"the fastest of all, {peer}"
            faster = figures[f"{task}_speedup_over_{words}_peer"]
            what = f"`{task}`: {_title(notes[f'{task}_ours'])} ({lost}), times faster than {which}"
            yield f"| {what} | {faster:.2f} | {wanted} |"
    if "size_ratio" in figures:
        yield f"| `style`: times smaller than ONNX Runtime fp32 | {figures['size_ratio']:.2f} | at least {SMALLER:g} |"


def _title(name: str) -> str:
    return next(row.title for row in ROWS if row.name == name)


def _rows(task: str, figures: Figures, notes: Notes) -> Iterator[str]:
    for row in ROWS:
        stem = f"{task}_{row.name}"
        if f"{stem}_error" in notes:
            said = notes[f"{stem}_error"].replace("|", "/")
            yield f"| {row.title} | did not run: {said} |" + " |" * (len(COLUMNS) - 2)
        elif f"{stem}_ms" in figures:
            own = {name.removeprefix(f"{stem}_"): value for name, value in figures.items() if name.startswith(stem)}
            cells = [
                row.title,
                f"{own['points']:.1f}",
                f"{own['drop_points']:.1f} ({own['low95']:.1f} to {own['high95']:.1f})",
                f"{own['ms']:.2f} ({own['ms_spread']:.2f})",
                f"{own['wall_ms']:.2f}",
                f"{own['ms_2_threads']:.2f} ({own['ms_2_threads_spread']:.2f})",
                f"{own['bytes'] / 1e6:.1f}",
                f"{own['peak_bytes'] / 1e6:.0f}",
                f"{own['conversion_s']:.0f}",
                notes[f"{stem}_made"][:10],
            ]
            yield f"| {' | '.join(cells)} |"


def _operations(task: str, figures: Figures) -> Iterator[str]:
    """Where the time goes, by the runtime's profiler: the largest shares of each row that was looked at."""
    for row in ROWS:
        stem = f"{task}_{row.name}_share_"
        found = {name.removeprefix(stem): value for name, value in figures.items() if name.startswith(stem)}
        if found:
            largest = sorted(found, key=lambda kind: -found[kind])[:N_OPERATIONS]
            rest = 100 - sum(found[kind] for kind in largest)
            named = [f"{kind} {found[kind]:.0f} %" for kind in largest] + (
                [f"others {rest:.0f} %"] if rest >= 1 else []
            )
            yield f"Where the time of {row.title} goes: {', '.join(named)}."
            yield ""


def merged(device: Mapping[str, Any], peers: Mapping[str, Any]) -> dict[str, Any]:
    """`results/device.json` with what it is asked for of the comparison, and when and where that was measured."""
    asked = {name: peers["figures"][name] for name in ASKED if name in peers["figures"]}
    own = {f"peers, {part}": place for part, place in peers["measured"].items()}
    kept = {part: place for part, place in device["measured"].items() if not part.startswith("peers, ")}
    return {**device, "figures": {**device["figures"], **asked}, "measured": {**kept, **own}}
