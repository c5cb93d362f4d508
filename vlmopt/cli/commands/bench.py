"""`vlmopt bench`: how fast an artifact is here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from vlmopt.cli import options
from vlmopt.cli.display import make_progress, show, show_json


@click.command("bench", short_help="Measure the latency of an artifact on this machine.")
@click.argument("path", type=click.Path(path_type=Path), metavar="OUT")
@click.option("--runs", type=click.IntRange(min=1), default=50, show_default=True, help="Timed runs of each graph.")
@options.threads()
@options.as_json()
@options.common
@click.pass_context
def command(ctx: click.Context, /, path: Path, runs: int, *, threads: int | None, is_json: bool) -> None:
    """Measure the latency of an artifact on this machine.

    \b
    Example: vlmopt bench out --runs 100 --threads 1

    Joules per call, those of the whole package, stand beside it where the machine lets them be read.
    """
    from vlmopt import workflow

    found = workflow.bench_artifact(path, runs=runs, threads=threads, progress=make_progress(options.settings_of(ctx)))
    if is_json:
        show_json(found)
    else:
        _show(found)


def _show(found: Mapping[str, Any]) -> None:
    from vlmopt.report import Table, table_renderables
    from vlmopt.report.quantities import count, energy

    has_energy = any(row["joules"] is not None for row in found["components"].values())
    rows = tuple(
        (
            name,
            row["file"],
            count(row["size_bytes"]),
            *(f"{row[key]:.2f}" for key in ("median_ms", "p10_ms", "p90_ms")),
            *((energy(row["joules"]),) if has_energy else ()),
        )
        for name, row in found["components"].items()
    )
    columns = ("component", "file", "size (B)", "median (ms)", "10 % (ms)", "90 % (ms)")
    columns_shown = (*columns, "energy") if has_energy else columns
    note = f"{found['energy'][0].upper()}{found['energy'][1:]}."
    show(*table_renderables(Table("Latency of one sample", columns_shown, rows, n_text_columns=2, note=note)))
