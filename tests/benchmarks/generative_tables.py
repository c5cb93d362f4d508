"""The tables of `results/generative.json`: all of it beside the file, and what a reader of the README needs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tests.benchmarks.generative import CUT_TASKS, PARITIES, TOLERANCE, is_exact
from tests.benchmarks.real_size_tables import in_words, is_real, real_rows

METHODS = {
    "ours": "those the profile and the planner name",
    "last": "the last of the decoder",
    "cosine": "those that change their stream least",
}
COLUMNS = ("family", "captured", "capture", "ONNX, prompt", "ONNX, cached", "seconds", "peak GB")
AIMS = {  # at most, or where it says so at least
    "llava_7b_structure_s": (90.0, "most", "structure of a 7B LLaVA without its weights, s"),
    "llava_7b_structure_gb": (2.0, "most", "its peak memory, GB"),
    "llava_example_compile_s": (
        90.0,
        "most",
        "capture and ONNX of a LLaVA of 157M parameters, all compared, s",
    ),
    "llava_example_peak_gb": (4.0, "most", "its peak memory, GB"),
    "size_over_unique_params": (1.03, "most", "size of its ONNX files over its parameters, each counted once"),
    "speedup_over_export_for_generation": (5.0, "least", "times faster than `export_for_generation`, toy LLaVA"),
}


def as_table(result: Mapping[str, Any]) -> str:
    """Families one by one, then the other figures, then when and where each part was measured."""
    figures, notes = result["figures"], result["notes"]
    others = {name: value for name, value in figures.items() if not _is_of_family(name, figures) and not is_real(name)}
    words = [f"- `{name}`: {text}" for name, text in notes.items() if not name.endswith("_refusal")]
    places = [f"- `{part}`: {place}" for part, place in result["measured"].items()]
    read = (
        "Differences are the largest from the logits of the model's own `generate`, over two shapes (one prompt with an"
        " image; two, one of them padded), as a share of the largest logit; a toy of each family, float32, at most"
        f" {TOLERANCE:.0e} allowed."
    )
    rows = [f"| `{name}` | {value:.4g} |" for name, value in others.items()]
    by = f"Measured by `{result['command']}`:"
    real = real_rows(figures, notes)
    lines = [
        *_family_rows(figures, notes),
        "",
        read,
        "",
        *real,
        "| figure | value |",
        "|---|---:|",
        *rows,
        "",
        *words,
        "",
    ]
    return "\n".join([*lines, by, "", *places, ""])


def for_readme(result: Mapping[str, Any]) -> str:
    """What was aimed at and what was reached, and which families are captured, as Markdown."""
    figures, notes = result["figures"], result["notes"]
    rows = [
        f"| {words} | {figures[name]:.3g} | {'at least' if side == 'least' else 'at most'} {aim:g} |"
        for name, (aim, side, words) in AIMS.items()
        if name in figures
    ]
    captured = [name for name in _families(figures) if f"{name}_refusal" not in notes]
    exact = [name for name in captured if is_exact(figures, name)]
    worst = max(figures[f"{name}_{key}"] for name in exact for key in PARITIES)
    intro = (
        f"Models that write text: {len(exact)} of {figures['families_tried']:.0f} families are captured, with ONNX"
        f" files that answer as the original does, cached steps included (largest difference {worst:.0e} of the largest"
        f" logit): {', '.join(exact)}. The others are refused, each with its reason.{in_words(figures)}"
    )
    cuts = [line for task in CUT_TASKS for line in _cut_rows(task, figures)]
    source = (
        "Toys for families and for the comparison, random weights throughout. `export_for_generation` of transformers"
        f" gives {notes['export_for_generation_graphs']}: no encoder of images, and nothing is compared."
        " [Every family, and when and where each part was measured](tests/benchmarks/results/generative.md)."
    )
    return "\n".join([intro, "", "| what | measured | aim |", "|---|---:|---:|", *rows, "", source, *cuts])


def _cut_rows(task: str, figures: Mapping[str, float]) -> list[str]:
    """The LLaVA example cut for this task, a line a method and budget; nothing where it was not measured."""
    prefix = f"llava_{task}"
    pattern = re.compile(rf"{prefix}_([a-z]+)_([a-z]+)_(\d+)_drop_points")
    found = [match.groups() for match in map(pattern.fullmatch, figures) if match]
    if not found:
        return []
    original = figures[f"{prefix}_original_points"]
    rows = [_cut_row("the original", f"{original:.1f}", 0.0, f"{prefix}_original", figures)]
    for method, level, budget in sorted(found, key=lambda one: (int(one[2]), one[1] != "none", one[0] != "ours")):
        name = f"{prefix}_{method}_{level}_{budget}"
        drop, low, high = (figures[f"{name}_{key}"] for key in ("drop_points", "low95", "high95"))
        points = f"{original - drop:.1f} ({-drop:+.1f}, {-high:+.1f} to {-low:+.1f})"
        words = METHODS[method] + ("" if level == "none" else ", adapters trained")
        artifact = f"{prefix}_{method}_{budget}" if level == "none" else name
        rows.append(_cut_row(words, points, figures[f"{name}_macs_saved"], artifact, figures))
    items = f"{figures[f'{prefix}_n_test']:.0f}"
    head = (
        f"`examples/llava` cut for `{task}`: answers generated on {items} items of its test split, in percent right,"
        " with the paired difference and its 95 % interval; speed is that of the ONNX files, batch 1."
    )
    columns = "| branches skipped | MACs saved | right | first token, ms | tokens/s | cache, bytes a token |"
    return ["", head, "", columns, "|---|---:|---|---:|---:|---:|", *rows]


def _cut_row(words: str, points: str, saved: float, name: str, figures: Mapping[str, float]) -> str:
    """Speeds are left out where none was measured: those of adapters, which are another graph."""
    units = {"first_token_ms": ".0f", "tokens_per_s": ".1f", "kv_bytes_per_token": ".0f"}
    speed = [
        format(figures[f"{name}_{key}"], unit) if f"{name}_{key}" in figures else "" for key, unit in units.items()
    ]
    return f"| {' | '.join([words, f'{100 * saved:.0f} %', points, *speed])} |"


def _family_rows(figures: Mapping[str, float], notes: Mapping[str, str]) -> list[str]:
    rows = [f"| {' | '.join(COLUMNS)} |", "|---|---|---:|---:|---:|---:|---:|"]
    for name in _families(figures):
        reason = notes.get(f"{name}_refusal")
        verdict = "no: " + reason.replace("|", "\\|") if reason else "yes" if is_exact(figures, name) else "WRONG"
        parities = ["" if reason else f"{figures[f'{name}_{key}']:.1e}" for key in PARITIES]
        cost = [f"{figures[f'{name}_seconds']:.0f}", f"{figures[f'{name}_peak_gb']:.2f}"]
        rows.append(f"| {' | '.join([name, verdict, *parities, *cost])} |")
    return rows


def _families(figures: Mapping[str, float]) -> list[str]:
    return [
        name.removesuffix("_peak_gb")
        for name in figures
        if name.endswith("_peak_gb") and name not in AIMS and not is_real(name)
    ]


def _is_of_family(name: str, figures: Mapping[str, float]) -> bool:
    return any(name == f"{family}_{key}" for family in _families(figures) for key in (*PARITIES, "seconds", "peak_gb"))
