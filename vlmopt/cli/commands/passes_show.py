"""`vlmopt passes show`: everything about one pass, its cases run before the reader's eyes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vlmopt.cli import options
from vlmopt.cli.display import make_progress, show_json

if TYPE_CHECKING:
    from vlmopt.registry import PassDescription
    from vlmopt.workflow.showing import ShownCase

_COLOURS = {"+": "green", "-": "red", "@": "cyan"}


@click.command("show", short_help="Show one pass: specification, options, facts and cases.")
@click.argument("name", metavar="NAME|FILE")
@click.option(
    "--cases/--no-cases", "has_cases", default=True, help="Run its cases and show the graphs before and after."
)
@options.pass_dir()
@options.pass_timeout()
@options.as_json()
@options.common
@click.pass_context
def show_pass(
    ctx: click.Context,
    name: str,
    pass_dirs: tuple[Path, ...],
    *,
    has_cases: bool,
    pass_timeout_s: float,
    is_json: bool,
) -> None:
    """Show one pass: specification, options, promise, facts, origin, and what it does to its cases.

    \b
    Example: vlmopt passes show fold-constants
             vlmopt passes show my_passes/drop_scaling.py
    """
    from vlmopt.registry import describe_pass

    found = describe_pass(name, pass_dirs, time_limit_s=pass_timeout_s)
    cases: tuple[ShownCase, ...] = ()
    if has_cases:
        from vlmopt.workflow.showing import show_cases

        progress = make_progress(options.settings_of(ctx))
        cases = show_cases(name, pass_dirs, progress=progress, time_limit_s=pass_timeout_s)
    if is_json:
        show_json(_as_json(found, cases))
        return
    _show_description(found)
    for case in cases:
        _show_case(case)


def _as_json(found: PassDescription, cases: tuple[ShownCase, ...]) -> dict[str, object]:
    info = found.info
    return {
        "name": info.name,
        "promise": info.promise.value,
        "origin": info.origin,
        "file": str(info.file),
        "needs_vlmopt": info.needs_vlmopt,
        "requires": found.requires,
        "produces": found.produces,
        "breaks": found.breaks,
        "facts": found.meanings,
        "options": [asdict(option) for option in found.options],
        "specification": found.specification,
        "cases": [asdict(case) for case in cases],
    }


def _show_description(found: PassDescription) -> None:
    info = found.info
    click.secho(f"{info.name}: {info.summary}\n", bold=True)
    click.echo(f"promise   {info.promise.value}")
    for label, names in (("requires", found.requires), ("produces", found.produces), ("breaks", found.breaks)):
        meanings = [f"{name}: {found.meanings[name]}" for name in names] or ["none"]
        for i, meaning in enumerate(meanings):
            click.echo(f"{label if i == 0 else '':9} {meaning}")
    if info.needs_vlmopt:
        click.echo(f"vlmopt    {info.needs_vlmopt}")
    click.echo(f"origin    {info.origin} ({info.file})" if info.module else f"origin    {info.file}")
    click.echo("\noptions" if found.options else "\noptions   none")
    for option in found.options:
        default = "required" if option.is_required else f"default {option.default!r}"
        click.echo(f"  {option.name}: {option.type}  [{default}]")
        if option.help:
            click.echo(f"      {option.help}")
    click.echo(f"\n{found.specification}")


def _show_case(case: ShownCase) -> None:
    chosen = f" with {', '.join(f'{key}={value!r}' for key, value in case.options.items())}" if case.options else ""
    click.secho(f"\ncase {case.name!r}{chosen}", bold=True)
    if case.error:
        click.secho(f"  fails: {case.error}", fg="red")
        return
    n = len(case.sites)
    click.echo(f"  fires {n} {'time' if n == 1 else 'times'}" + (f": {', '.join(case.sites)}" if n else ""))
    for refusal in case.refusals:
        click.echo(f"  refuses {refusal}")
    for line in case.diff:
        click.secho(f"  {line}", fg=_COLOURS.get(line[:1]))
