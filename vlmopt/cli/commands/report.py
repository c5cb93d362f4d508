"""`vlmopt report`: what a run found, again, and several runs beside each other."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from vlmopt.cli import options
from vlmopt.cli.display import show

_ENDINGS = {".html": "html", ".htm": "html", ".md": "markdown", ".json": "json"}


@click.command("report", short_help="Show the report of an artifact, or compare several.")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="OUT...")
@click.option(
    "--format",
    "form",
    type=click.Choice(("terminal", "html", "markdown", "json")),
    help="How to show it.  [default: what the ending of -o says, else terminal]",
)
@options.output("File to write instead of standard output (.html, .md, .json).", is_required=False)
@options.force("Replace the file.")
@options.common
def command(paths: tuple[Path, ...], form: str | None, output: Path | None, force: bool) -> None:
    """Show the report of an artifact, or compare several.

    \b
    Examples: vlmopt report out-style
              vlmopt report out-style out-meaning -o comparison.html
    """
    form = form or _form_of(output)
    _refuse_form(form, output)
    if output is not None:
        _refuse_existing(output, force=force)
    reports = [_read(path) for path in paths]
    labels = [str(path.parent if path.is_file() else path) for path in paths]
    if form == "terminal":
        from vlmopt import report

        is_single = len(reports) == 1
        show(report.render_terminal(reports[0]) if is_single else report.compare_terminal(reports, labels=labels))
        return
    text = _text(reports, labels, form)
    if output is None:
        click.echo(text, nl=False)
        return
    _write(output, text)
    click.echo(f"written to {output}", err=True)


def _form_of(output: Path | None) -> str:
    if output is None:
        return "terminal"
    form = _ENDINGS.get(output.suffix.lower())
    if form is None:
        endings = ", ".join(_ENDINGS)
        raise click.UsageError(f"{output}: its ending says no format; use one of {endings}, or add --format")
    return form


def _refuse_form(form: str, output: Path | None) -> None:
    if form == "terminal" and output is not None:
        raise click.UsageError("--format terminal is printed; a file holds html, markdown or json")
    if form == "html" and output is None and sys.stdout.isatty():
        raise click.UsageError("html is no use on a terminal; add -o FILE.html")


def _refuse_existing(output: Path, *, force: bool) -> None:
    from vlmopt.core.errors import OutputExistsError

    if output.is_dir():
        raise OutputExistsError(str(output), "is a folder", expected="a path for a file")
    if output.exists() and not force:
        raise OutputExistsError(str(output), "exists already", remedy="choose another path, or --force replaces it")


def _text(reports: Sequence[Mapping[str, Any]], labels: Sequence[str], form: str) -> str:
    is_single = len(reports) == 1
    if form == "json":
        return json.dumps(reports[0] if is_single else reports, indent=2, ensure_ascii=False) + "\n"
    if form == "html":
        from vlmopt.report import html

        return html.render_html(reports[0]) if is_single else html.compare_html(reports, labels=labels)
    from vlmopt import report

    return report.render_markdown(reports[0]) if is_single else report.compare_markdown(reports, labels=labels)


def _write(output: Path, text: str) -> None:
    from vlmopt.rundir import atomic_write, disk_errors

    with disk_errors(output.parent):
        output.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(output, text)


def _read(path: Path) -> dict[str, Any]:
    """The content of report.json as it was written, once it is known to follow the schema."""
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
    read_report(data, place=str(file))
    content: dict[str, Any] = data
    return content
