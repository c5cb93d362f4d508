"""`vlmopt passes new`: a working pass with its cases and its test, to begin with."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from vlmopt.cli import options
from vlmopt.cli.display import show_json


@click.command("new", short_help="Write a working pass with its cases and its test.")
@click.argument("name")
@click.option(
    "-o",
    "--output",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(),
    metavar="DIR",
    help="Folder to write into, made if it is missing.  [default: this one]",
)
@click.option(
    "--promise",
    type=click.Choice(["exact", "close", "lossy"]),
    default="exact",
    show_default=True,
    help="What the pass promises: bit-equal outputs, equal but for rounding, or judged on the task.",
)
@click.option(
    "--package", "is_package", is_flag=True, help="Write a distribution with an entry point, for pip install."
)
@options.as_json()
@options.common
def new_pass(name: str, *, folder: Path, promise: str, is_package: bool, is_json: bool) -> None:
    """Write a working pass with its cases and its test, to be changed into the one you want.

    \b
    Example: vlmopt passes new drop-scaling -o my_passes

    NAME is verb-object, in kebab-case. Files that exist are never overwritten.
    """
    from vlmopt.core.contract import Promise
    from vlmopt.registry.scaffolding import new_files

    texts = {
        folder / path: text for path, text in new_files(name, promise=Promise(promise), is_package=is_package).items()
    }
    _refuse_claimed(name)
    _write(texts)
    if is_json:
        show_json({"name": name, "files": [str(path) for path in texts]})
        return
    for path in texts:
        click.echo(path)
    source = next(path for path in texts if path.name == f"{name.replace('-', '_')}.py")
    click.echo(f"next: vlmopt passes check {shlex.quote(str(source))}", err=True)
    if is_package:
        click.echo(f"      pip install -e {shlex.quote(str(folder / f'vlmopt-{name}'))}", err=True)


def _refuse_claimed(name: str) -> None:
    from vlmopt.core.errors import PassError
    from vlmopt.registry import survey

    found = survey()
    claimants = [found.passes[name].origin] if name in found.passes else []
    claimants += [entry.origin for entry in found.broken if name in entry.names]
    if claimants:
        raise PassError(f"name {name!r}", f"{claimants[0]} has a pass of that name", remedy="choose another one")


def _write(texts: dict[Path, str]) -> None:
    from vlmopt.core.errors import OutputExistsError
    from vlmopt.rundir import atomic_write

    for path in texts:
        if path.exists():
            raise OutputExistsError(str(path), "exists already", remedy="choose another name or another -o")
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, text)
