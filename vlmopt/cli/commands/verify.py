"""`vlmopt verify`: the gates of an artifact, once more, and where it departs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from vlmopt.cli import options
from vlmopt.cli.display import make_progress, show, show_json

_N_NODES = 10


@click.command("verify", short_help="Check an artifact again: its files, its outputs and its metric.")
@click.argument("path", type=click.Path(path_type=Path), metavar="OUT")
@options.task(is_required=False)
@click.option(
    "--worst-nodes",
    "n_nodes",
    type=click.IntRange(min=1),
    is_flag=False,
    flag_value=_N_NODES,
    metavar="[N]",
    help="Show the nodes where the ONNX files depart most from the program, and the program from the original.  "
    f"[default: {_N_NODES} nodes]",
)
@options.threads()
@options.as_json()
@options.common
@click.pass_context
def command(
    ctx: click.Context, /, path: Path, task: str | None, *, n_nodes: int | None, threads: int | None, is_json: bool
) -> None:
    """Check an artifact again: its files, its outputs and its metric.

    \b
    Example: vlmopt verify out

    Exits with 3 when anything differs, be it one changed byte. --worst-nodes comes behind OUT; it makes the program
    again from the artifact's recipe, and shows what it found even where the check then fails.
    """
    options.set_threads(threads)
    from vlmopt import workflow

    progress = make_progress(options.settings_of(ctx))
    nodes = None if n_nodes is None else workflow.worst_nodes(path, n=n_nodes, progress=progress)
    if nodes is not None and not is_json:
        _show_nodes(nodes)
    found = workflow.verify_artifact(path, task=task, progress=progress)
    if is_json:
        show_json(found if nodes is None else {**found, "worst_nodes": nodes})
    elif options.settings_of(ctx).verbosity >= 0:
        from vlmopt.report import table_renderables
        from vlmopt.report.tables import gates_table

        show(*table_renderables(gates_table(found["gates"])))


def _show_nodes(found: Mapping[str, Any]) -> None:
    from vlmopt.report import Table, table_renderables

    titles = [(f"{part['file']} against the program", part) for part in found["files"].values()]
    titles += [(f"{name} against the original", part) for name, part in found["original"].items()]
    for title, part in titles:
        rows = tuple(
            (node["name"], node["operation"], node["module"], f"{node['error']:.2g}", f"{node['growth']:.2g}")
            for node in part["nodes"]
            if node["error"] > 0
        )
        columns = ("node", "operation", "module", "error", "growth")
        show(*table_renderables(Table(title, columns, rows, n_text_columns=3, note=_jump(part))))
    if found["note"]:
        show(found["note"])


def _jump(part: Mapping[str, Any]) -> str:
    scale = f"Of {part['n_compared']} nodes; errors are relative to the largest value of the node."
    jump = part["first_jump"]
    if jump is None:
        return f"{scale} No node departs by itself."
    return f"{scale} The first to depart by itself: {jump['name']} ({jump['operation']}), {jump['error']:.2g}."
