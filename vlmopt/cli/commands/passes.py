"""`vlmopt passes`: which passes there are, and what one of them does."""

from __future__ import annotations

from pathlib import Path

import click

from vlmopt.cli import options
from vlmopt.cli.display import show_json


@click.group("passes", short_help="List the passes, or show one.")
def command() -> None:
    """List the passes, or show one.

    \b
    Example: vlmopt passes show skip-branches
    """


@command.command("list", short_help="List all passes with their promises.")
@options.pass_dir()
@options.as_json()
@options.common
def list_passes(pass_dirs: tuple[Path, ...], *, is_json: bool) -> None:
    """List all passes with their promises.

    \b
    Example: vlmopt passes list --pass-dir my_passes
    """
    from vlmopt.registry import find_passes

    found = find_passes(pass_dirs).values()
    if is_json:
        facts = [{"name": p.name, "promise": p.promise.value, "summary": p.summary, "origin": p.origin} for p in found]
        show_json({"passes": facts})
        return
    width = max((len(info.name) for info in found), default=0)
    for info in found:
        click.echo(f"{info.name:{width}}  {info.promise.value:5}  {info.summary}")
    if not found:
        click.echo("no passes are installed; pip install -e . registers those of vlmopt", err=True)


@command.command("show", short_help="Show one pass: its options, facts and specification.")
@click.argument("name")
@options.pass_dir()
@options.as_json()
@options.common
def show_pass(name: str, pass_dirs: tuple[Path, ...], *, is_json: bool) -> None:
    """Show one pass: its options, facts and specification.

    \b
    Example: vlmopt passes show skip-branches
    """
    from vlmopt.registry import describe_pass

    found = describe_pass(name, pass_dirs)
    facts = {"requires": found.requires, "produces": found.produces, "breaks": found.breaks}
    if is_json:
        chosen = [vars(option) for option in found.options]
        origin = {"promise": found.info.promise.value, "origin": found.info.origin, "file": str(found.info.file)}
        show_json({"name": name, **origin, **facts, "options": chosen, "specification": found.specification})
        return
    click.echo(f"{name}: {found.info.summary}\n")
    click.echo(f"promise   {found.info.promise.value}")
    for label, names in facts.items():
        click.echo(f"{label:9} {', '.join(names) or 'none'}")
    click.echo(f"origin    {found.info.origin} ({found.info.file})")
    click.echo("\noptions" if found.options else "\noptions   none")
    for option in found.options:
        default = "required" if option.is_required else f"default {option.default!r}"
        click.echo(f"  {option.name}: {option.type}  [{default}]")
    click.echo(f"\n{found.specification}")
