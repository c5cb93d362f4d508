"""`vlmopt passes`: which passes there are, what one does, whether it keeps its word, and how to begin another."""

from __future__ import annotations

from pathlib import Path

import click

from vlmopt.cli import options
from vlmopt.cli.commands.passes_check import check
from vlmopt.cli.commands.passes_new import new_pass
from vlmopt.cli.commands.passes_show import show_pass
from vlmopt.cli.display import show_json
from vlmopt.core.errors import EXIT_ERROR, EXIT_OK


@click.group("passes", short_help="List and show passes, check them, or begin a new one.")
def command() -> None:
    """List and show passes, check them, or begin a new one.

    \b
    Example: vlmopt passes show skip-branches
    """


@command.command("list", short_help="List all passes with their promises.")
@options.pass_dir()
@options.as_json()
@options.common
def list_passes(pass_dirs: tuple[Path, ...], *, is_json: bool) -> int:
    """List all passes with their promises.

    \b
    Example: vlmopt passes list --pass-dir my_passes

    Plugins that cannot be used are listed after the others, with the reason; then the exit code is 1. Commands that do
    not name them work on.
    """
    from vlmopt.registry import survey

    found = survey(pass_dirs)
    passes = found.passes.values()
    if is_json:
        rows = [{"name": p.name, "promise": p.promise.value, "summary": p.summary, "origin": p.origin} for p in passes]
        broken = [{"name": b.name, "origin": b.origin, "error": b.error.one_line()} for b in found.broken]
        show_json({"passes": rows, "broken": broken})
        return EXIT_ERROR if broken else EXIT_OK
    width = max((len(info.name) for info in passes), default=0)
    for info in passes:
        click.echo(f"{info.name:{width}}  {info.promise.value:5}  {info.summary}")
    if not passes:
        click.echo("no passes are installed; pip install -e . registers those of vlmopt", err=True)
    for entry in found.broken:
        click.secho(f"error: cannot be used: {entry.name}: {entry.error.one_line()}", fg="red", err=True)
    return EXIT_ERROR if found.broken else EXIT_OK


command.add_command(show_pass)
command.add_command(check)
command.add_command(new_pass)
