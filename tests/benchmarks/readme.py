"""The README's before/after table, made from `results/frame.json` and from nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "README.md"
START, END = "<!-- bench:frame -->", "<!-- /bench:frame -->"


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


def with_table(readme: str, table: str) -> str:
    """The README with the table between its two marks."""
    head, _, rest = readme.partition(START)
    _, _, tail = rest.partition(END)
    return f"{head}{START}\n{table}\n{END}{tail}"
