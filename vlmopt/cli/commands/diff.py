"""`vlmopt diff`: what differs between two runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from vlmopt.cli import options
from vlmopt.cli.display import show, show_json


@click.command("diff", short_help="Show what differs between two runs.")
@click.argument("first", type=click.Path(path_type=Path), metavar="RUN")
@click.argument("second", type=click.Path(path_type=Path), metavar="RUN")
@click.option("--graphs", is_flag=True, help="Compare the text of the final graphs as well.")
@options.as_json()
@options.common
def command(first: Path, second: Path, *, graphs: bool, is_json: bool) -> None:
    """Show what differs between two runs.

    \b
    Example: vlmopt diff out-style out-meaning

    A RUN is a folder that `vlmopt optimize` wrote, or the partial folder of a run that failed a gate. Latencies are
    those of the reports, each measured on the machine of its run.
    """
    from vlmopt.report.run_diff import diff_runs

    found = diff_runs(first, second, graphs=graphs)
    if is_json:
        show_json(found)
        return
    from vlmopt.report.run_diff_tables import diff_tables
    from vlmopt.report.terminal import table_renderables

    tables = diff_tables(found)
    for table in tables:
        show(*table_renderables(table))
    show(*_graph_lines(found))
    if not any(found["differences"].values()):
        show("the runs do not differ but in what was measured")


def _graph_lines(found: Mapping[str, Any]) -> Iterator[str]:
    if found.get("graphs") == {}:
        yield "the final graphs do not differ, or a run kept no text of them"
    for name, lines in found.get("graphs", {}).items():
        yield f"graph of {name}"
        yield from lines
