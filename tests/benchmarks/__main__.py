"""Runs the benchmarks and writes one JSON file and one Markdown table each: `python -m tests.benchmarks [NAME ...]`."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.benchmarks import (
    adapters,
    contract,
    device,
    frame,
    generative,
    generative_tables,
    pcetl,
    peer_tables,
    peers,
    picture,
    readme,
    towers,
    width,
)

RESULTS = Path(__file__).parent / "results"
Parts = Callable[[], Mapping[str, Callable[[], Mapping[str, float | str]]]]
BENCHMARKS: dict[str, Parts] = {
    "frame": frame.parts,
    "contract": contract.parts,
    "pcetl": pcetl.parts,
    "generative": generative.parts,
    "adapters": adapters.parts,
    "device": device.parts,
    "width": width.parts,
    "peers": peers.parts,
}
README_TABLES = {
    "frame": readme.before_after,
    "pcetl": partial(readme.under_budgets, budgets=(*towers.BUDGETS, *itertools.chain(*towers.MORE_BUDGETS.values()))),
    "generative": generative_tables.for_readme,
}
TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "generative": generative_tables.as_table,
    "peers": peer_tables.as_table,
}
PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "numpy")


def main() -> int:
    """Runs the benchmarks named, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(BENCHMARKS)}; all by default")
    parser.add_argument("--only", metavar="PART", help="measure this part anew and keep the other parts' figures")
    parser.add_argument("--kept", action="store_true", help="of peers: measure the rows that are made, and make none")
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    for name in arguments.names or list(BENCHMARKS):
        result = write(name, measure(name, only=arguments.only, is_kept=arguments.kept))
        if name in ("peers", "device") and all((RESULTS / f"{one}.json").is_file() for one in ("peers", "device")):
            write("device", peer_tables.merged(read("device"), read("peers")))
        if name == "pcetl":
            draw_pictures(result)
        if name in README_TABLES:
            text = readme.README.read_text(encoding="utf-8")
            readme.README.write_text(readme.with_table(text, name, README_TABLES[name](result)), encoding="utf-8")
    return 0


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def write(name: str, result: dict[str, Any]) -> dict[str, Any]:
    """Writes and prints a result as JSON and as a table."""
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    table = TABLES.get(name, as_table)(result)
    (RESULTS / f"{name}.md").write_text(table, encoding="utf-8")
    print(table)
    return result


def draw_pictures(result: Mapping[str, object]) -> None:
    """One picture a task of what is lost against what is saved."""
    figures = result["figures"]
    assert isinstance(figures, dict)
    for task in (*pcetl.TOWER_TASKS, pcetl.TASK):
        curves = picture.curves_of(figures, task)
        if curves:
            (RESULTS / f"pcetl-{task}.svg").write_text(picture.draw(curves, title=task), encoding="utf-8")


def measure(name: str, *, only: str | None = None, is_kept: bool = False) -> dict[str, Any]:
    """The figures with everything that is needed to read them: machine, versions, and when each part was measured.

    What a part says in words goes to `notes`.
    """
    figures: dict[str, float] = {}
    notes: dict[str, str] = {}
    measured: dict[str, str] = {}
    path = RESULTS / f"{name}.json"
    if only is not None and path.is_file():
        before = read(name)
        figures, notes, measured = before["figures"], before.get("notes", {}), before["measured"]
        if name == "peers":  # a row that failed before and runs now, or the other way round, is there once
            figures, notes = (
                {k: v for k, v in own.items() if not k.startswith(f"{only}_")} for own in (figures, notes)
            )
    found = peers.parts(is_kept=is_kept) if name == "peers" else BENCHMARKS[name]()
    for part, run in found.items():
        if only in (None, part):
            for key, value in run().items():
                if isinstance(value, str):
                    notes[key] = value
                else:
                    figures[key] = value
            if name == "generative":
                figures |= generative.real_counts(figures)
            measured[part] = f"{datetime.now(UTC).isoformat(timespec='minutes')}, {cpu_name()}, {os.cpu_count()} cores"
    return {
        "figures": figures,
        **({"notes": notes} if notes else {}),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.system()},
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
        "date": datetime.now(UTC).date().isoformat(),
        "measured": measured,
        "command": f"python -m tests.benchmarks {name}",
    }


def cpu_name() -> str:
    """The processor as the system names it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def as_table(result: Mapping[str, object]) -> str:
    """The figures as a Markdown table, and below it when and where they were measured: all at once, or part by part."""
    figures, machine, measured = result["figures"], result["machine"], result["measured"]
    assert isinstance(figures, dict)
    assert isinstance(machine, dict)
    assert isinstance(measured, dict)
    rows = [f"| `{name}` | {_shown(value)} |" for name, value in figures.items()]
    where = [f"Measured on {machine['cpu']}, {machine['cores']} cores, {result['date']}: `{result['command']}`."]
    if any("," in place for place in measured.values()):
        where = [f"Measured by `{result['command']}`:", "", *(f"- `{part}`: {measured[part]}" for part in measured)]
    return "\n".join(["| figure | value |", "|---|---:|", *rows, "", *where, ""])


def _shown(value: float) -> str:
    """Counts in full, all else in four digits."""
    return f"{value:,.0f}" if value >= 1e4 and float(value).is_integer() else f"{value:.4g}"


if __name__ == "__main__":
    os.environ["VLMOPT_CACHE"] = "off"  # every run captures, as a user's first one does
    sys.exit(main())
