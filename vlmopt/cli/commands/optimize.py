"""`vlmopt optimize`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from vlmopt.cli import options
from vlmopt.cli.display import make_progress, show, show_json

if TYPE_CHECKING:
    from vlmopt.recipe import Recipe


@click.command("optimize", short_help="Compile a model for one task into a smaller, faster, verified artifact.")
@options.model(is_required=False)
@options.task(is_required=False)
@options.output("Folder to create.", is_required=False)
@click.option("--recipe", type=click.Path(path_type=Path), metavar="FILE", help="Start from this recipe (YAML).")
@click.option("--profile", "profile_file", metavar="FILE", help="Use this profile instead of measuring one.")
@click.option(
    "--max-drop",
    type=click.FloatRange(0, 100),
    metavar="POINTS",
    help="Points of the metric that may be lost.  [default: 1 with a task and no recipe]",
)
@options.emit()
@click.option("--opset", type=click.IntRange(min=1), metavar="N", help="ONNX operator set.  [default: 20]")
@options.device()
@options.dtype()
@options.seed()
@options.num_samples("all")
@options.threads()
@options.pass_dir()
@options.allow_pickle()
@click.option("--dry-run", is_flag=True, help="Show what would be done, and write nothing.")
@options.force()
@options.as_json()
@options.common
@click.pass_context
def command(
    ctx: click.Context,
    /,
    model: str | None,
    task: str | None,
    output: Path | None,
    recipe: Path | None,
    *,
    threads: int | None,
    dry_run: bool,
    force: bool,
    is_json: bool,
    **overrides: object,
) -> None:
    """Compile a model for one task into a smaller, faster, verified artifact.

    \b
    Example: vlmopt optimize -m openai/clip-vit-base-patch32 -t tasks/style -o out --max-drop 1

    Options given here win over those of the recipe; the defaults hold where neither says anything. A failed gate exits
    with 3 and leaves nothing under the output's name.
    """
    _refuse_early(ctx, model or recipe, output, dry_run=dry_run, force=force)
    resolved = _recipe(recipe, {"model": model, "task": task, **overrides})
    options.set_threads(threads)
    from vlmopt import workflow

    progress = make_progress(options.settings_of(ctx))
    report = workflow.optimize(resolved, output or Path("out"), force=force, dry_run=dry_run, progress=progress)
    if is_json:
        show_json(report)
    elif dry_run:
        _show_plan(report)
    elif options.settings_of(ctx).verbosity >= 0:
        from vlmopt.report import render_terminal

        show(render_terminal(report), f"\nwritten to {output}")


def _refuse_early(
    ctx: click.Context, source: str | Path | None, output: Path | None, *, dry_run: bool, force: bool
) -> None:
    """Refuses what cannot work before torch is imported."""
    from vlmopt.rundir import refuse_existing

    if source is None:
        raise click.UsageError("Missing option '-m' / '--model' (or '--recipe').", ctx)
    if dry_run:
        return
    if output is None:
        raise click.UsageError("Missing option '-o' / '--output'.", ctx)
    refuse_existing(output, force=force)


def _recipe(file: Path | None, given: dict[str, object]) -> Recipe:
    from vlmopt.recipe import default_recipe, load_recipe

    keys = {"max_drop": "budgets.max_drop", "profile_file": "profile.file"}
    changes: dict[str, object] = {}
    for name, value in given.items():
        if isinstance(value, tuple):
            value = [str(item) if isinstance(item, Path) else item for item in value] or None
        if value is not None and value is not False:  # what was not typed does not override the recipe
            changes[keys.get(name, name)] = value
    if file is not None:
        return load_recipe(file, changes)
    return default_recipe(str(changes.pop("model")), changes=changes)


def _show_plan(report: dict[str, object]) -> None:
    from vlmopt.cli.generic import lines_of

    show(*lines_of(report))
