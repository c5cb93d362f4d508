"""`vlmopt verify`: the gates of an artifact, once more."""

from __future__ import annotations

from pathlib import Path

import click

from vlmopt.cli import options
from vlmopt.cli.display import make_progress, show, show_json


@click.command("verify", short_help="Check an artifact again: its files, its outputs and its metric.")
@click.argument("path", type=click.Path(path_type=Path), metavar="OUT")
@options.task(is_required=False)
@options.threads()
@options.as_json()
@options.common
@click.pass_context
def command(ctx: click.Context, /, path: Path, task: str | None, *, threads: int | None, is_json: bool) -> None:
    """Check an artifact again: its files, its outputs and its metric.

    \b
    Example: vlmopt verify out

    Exits with 3 when anything differs, be it one changed byte.
    """
    options.set_threads(threads)
    from vlmopt import workflow

    found = workflow.verify_artifact(path, task=task, progress=make_progress(options.settings_of(ctx)))
    if is_json:
        show_json(found)
    elif options.settings_of(ctx).verbosity >= 0:
        from vlmopt.report import table_renderables
        from vlmopt.report.tables import gates_table

        show(*table_renderables(gates_table(found["gates"])))
