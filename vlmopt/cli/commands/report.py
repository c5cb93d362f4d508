"""`vlmopt report`: what a run found, again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from vlmopt.cli import options
from vlmopt.cli.display import show


@click.command("report", short_help="Show the report of an artifact, or compare several.")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="OUT...")
@click.option(
    "--format",
    "form",
    type=click.Choice(("terminal", "markdown", "json")),
    default="terminal",
    show_default=True,
    help="How to print it.",
)
@options.common
def command(paths: tuple[Path, ...], form: str) -> None:
    """Show the report of an artifact, or compare several.

    \b
    Example: vlmopt report out-style out-meaning
    """
    from vlmopt import report

    reports = [_read(path) for path in paths]
    if form == "json":
        click.echo(json.dumps(reports[0] if len(reports) == 1 else reports, indent=2, ensure_ascii=False))
    elif form == "markdown":
        single = len(reports) == 1
        click.echo(report.render_markdown(reports[0]) if single else report.compare_markdown(reports), nl=False)
    else:
        show(report.render_terminal(reports[0]) if len(reports) == 1 else report.compare_terminal(reports))


def _read(path: Path) -> dict[str, Any]:
    from vlmopt.core.errors import ArtifactError
    from vlmopt.report import read_report
    from vlmopt.rundir import REPORT_JSON

    file = path / REPORT_JSON if path.is_dir() else path
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ArtifactError(
            str(file), f"cannot be read ({reason})", expected="a folder that `vlmopt optimize` wrote"
        ) from error
    except ValueError as error:
        raise ArtifactError(str(file), f"is not JSON: {error}") from error
    return read_report(data, place=str(file)).as_dict()
