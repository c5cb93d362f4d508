"""Rows of `results/generative.json` for families at their real size, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping

from tests.benchmarks.generative import PARITIES, REAL, STRUCTURES, is_exact

COLUMNS = (
    "model", "parameters, M", "exact", "capture", "ONNX, prompt", "ONNX, cached", "seconds", "of the processor",
    "peak GB", "files over parameters",
)  # fmt: skip
COSTS = {"seconds": ".0f", "cpu_seconds": ".0f", "peak_gb": ".1f", "size_over_unique_params": ".4f"}


def is_real(name: str) -> bool:
    """Whether a figure or a note is shown here."""
    return name.startswith("real_")


def real_rows(figures: Mapping[str, float], notes: Mapping[str, str]) -> list[str]:
    """A table of what was captured at full size, then one of structures; nothing where neither was measured."""
    rows = [_row(name, figures, notes) for name in REAL if f"real_{name}_seconds" in figures]
    if not rows:
        return []
    counts = f"{figures['real_sizes_ok']:.0f} of {figures['real_sizes_tried']:.0f}"
    intro = (
        f"Published configurations at full size with random weights, so nothing is said of their answers: {counts}"
        " tried are exact. Seconds are of capture and ONNX files, all comparisons with eager included; where other work"
        " ran beside (see below), those of the processor say more."
    )
    head = [f"| {' | '.join(COLUMNS)} |", f"|---|---:|---|{'---:|' * (len(COLUMNS) - 3)}"]
    return [intro, "", *head, *rows, "", *_structures(figures)]


def _row(name: str, figures: Mapping[str, float], notes: Mapping[str, str]) -> str:
    prefix, reason = f"real_{name}", notes.get(f"real_{name}_refusal")
    verdict = f"no: {reason}" if reason else "yes" if is_exact(figures, prefix) else "WRONG"
    parities = ["" if reason else f"{figures[f'{prefix}_{key}']:.1e}" for key in PARITIES]
    costs = [format(figures[f"{prefix}_{key}"], unit) for key, unit in COSTS.items()]
    return f"| {' | '.join([name, _millions(figures, prefix), verdict, *parities, *costs])} |"


def _millions(figures: Mapping[str, float], prefix: str) -> str:
    return f"{figures[f'{prefix}_parameters'] / 1e6:.0f}"


def in_words(figures: Mapping[str, float]) -> str:
    """Which models are exact at their real size; nothing where none was measured."""
    tried = [name for name in REAL if f"real_{name}_parity_decode" in figures]
    exact = [f"{n} ({_millions(figures, f'real_{n}')}M)" for n in tried if is_exact(figures, f"real_{n}")]
    return f" At full size, too, random weights: {', '.join(exact)}." if exact else ""


def _structures(figures: Mapping[str, float]) -> list[str]:
    found = [name for name in STRUCTURES if f"real_{name}_structure_seconds" in figures]
    if not found:
        return []
    head = ["Larger ones, structure alone, without weights:", "", "| model | parameters, M | seconds | peak GB |"]
    rows = []
    for name in found:
        prefix = f"real_{name}_structure"
        costs = [format(figures[f"{prefix}_{key}"], COSTS[key]) for key in ("seconds", "peak_gb")]
        rows.append(f"| {' | '.join([name, _millions(figures, prefix), *costs])} |")
    return [*head, "|---|---:|---:|---:|", *rows, ""]
