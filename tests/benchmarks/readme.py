"""The README's tables, made from `results/frame.json` and `results/pcetl.json` and from nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "README.md"
LEVELS = {"head": "head fitted", "weights": "weights trained"}
ASKED = {
    "style": "which drawing style?",
    "meaning": "what kind of thing?",
    "retrieval": "which name? (a drawing style never trained on)",
    "count": "how many? (embedded, drawn scenes)",
}


def before_after(result: Mapping[str, object]) -> str:
    """Two real tasks of one model, and the compile time beside plain export, as Markdown."""
    figures, machine = result["figures"], result["machine"]
    assert isinstance(figures, dict)
    assert isinstance(machine, dict)
    rows = [_task_row(name, title, figures) for name, title in TITLES.items() if f"{name}_accuracy" in figures]
    columns = ("task", "original", "vlmopt", "drop (95 % interval)", "image tower, ms", "faster", "smaller", "n")
    header = f"| {' | '.join(columns)} |"
    intro = (
        "One real dual encoder (ViT-S/14 and MiniLM), two tasks on unseen drawings, at most 1 point of drop allowed:"
    )
    compiled = (
        f"Capture and ONNX of CLIP ViT-B/32 at full size: {figures['clip_b32_compile_s']:.1f} s and"
        f" {figures['clip_b32_peak_gb']:.2f} GB, every graph compared with eager; plain `torch.onnx.export` in the same"
        f" run: {figures['clip_b32_plain_export_s']:.1f} s and {figures['clip_b32_plain_peak_gb']:.2f} GB."
        f" `vlmopt --help` takes {figures['help_s']:.2f} s."
    )
    source = (
        "The original's head is fitted in the same way on the same pictures; both run in ONNX Runtime, float32,"
        f" batch 1, side by side. Measured by `make bench` on {machine['cpu']}, {machine['cores']} cores,"
        f" {result['date']} ([all figures](tests/benchmarks/results/frame.md))."
    )
    return "\n".join([intro, "", header, "|---|---:|---:|---:|---:|---:|---:|---:|", *rows, "", compiled, "", source])


TITLES = {"style": "which drawing style? (4)", "meaning": "what kind of thing? (9)"}


def _task_row(name: str, title: str, figures: Mapping[str, float]) -> str:
    def figure(key: str) -> float:
        return figures[f"{name}_{key}"]

    interval = f"{figure('drop_low95_points'):.1f} to {figure('drop_high95_points'):.1f}"
    cells = [
        title,
        f"{figure('original_accuracy'):.1f} %",
        f"{figure('accuracy'):.1f} %",
        f"{figure('drop_points'):.1f} ({interval})",
        f"{figure('original_ms'):.1f} to {figure('optimized_ms'):.2f}",
        f"{figure('latency_ratio'):.1f} times",
        f"{figure('size_ratio'):.1f} times",
        f"{figure('n_test'):.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def under_budgets(result: Mapping[str, object], budgets: Sequence[float]) -> str:
    """What our cuts and truncations lose under every budget, as Markdown."""
    figures = result["figures"]
    assert isinstance(figures, dict)
    columns = [f"{method}, {words}" for words in LEVELS.values() for method in ("our cut", "truncation")]
    intro = "Under budgets of multiply-accumulates, on test items that nothing else looked at"
    lines = [
        f"{intro} (points lost, with 95 % limits; below zero is a gain):",
        "",
        f"| task | MACs saved | {' | '.join(columns)} |",
        f"|---|---:|{'---:|' * len(columns)}",
    ]
    for task, title in ASKED.items():
        for budget in sorted({round(100 * budget) for budget in budgets}):
            if f"{task}_ours_head_{budget}_macs_saved" in figures:
                pairs = [(method, level) for level in LEVELS for method in ("ours", "depth")]
                drops = [_drop(figures, f"{task}_{method}_{level}_{budget}") for method, level in pairs]
                saved = 100 * figures[f"{task}_ours_head_{budget}_macs_saved"]
                lines.append(f"| {title} | {saved:.0f} % | {' | '.join(drops)} |")
    return "\n".join(lines)


def _drop(figures: Mapping[str, float], stem: str) -> str:
    if f"{stem}_drop_points" not in figures:
        return "not measured"
    drop, low, high = (figures[f"{stem}_{key}"] for key in ("drop_points", "low95", "high95"))
    return f"{drop:.1f} ({low:.1f} to {high:.1f})"


def with_table(readme: str, name: str, table: str) -> str:
    """The README with the table between the two marks of this name."""
    start, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    head, _, rest = readme.partition(start)
    _, _, tail = rest.partition(end)
    return f"{head}{start}\n{table}\n{end}{tail}"
